//! What publishing says is what the broker did: every outcome, in every mixture, through every loss.
use anyhow::{Context, ensure};
use serde_json::json;
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use warren_publisher::publish::{Options, Outcome, Refused};
use warren_publisher::{Broker, Publisher};
use warren_shared::Message;
use warren_shared::env::Secret;
use warren_tests::process::{Process, command};
use warren_tests::{Answers, Lab, Proxy, event, exchange, ids, length, until};

const PATIENCE: Duration = Duration::from_secs(120);

/// Chance that can be repeated: a failed run names its seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap_or(0) % below
    }

    fn thrown() -> Self {
        use std::hash::{BuildHasher, Hasher};
        Self(std::hash::RandomState::new().build_hasher().finish() | 1)
    }
}

async fn publisher(url: &str, options: Options) -> anyhow::Result<Publisher> {
    let broker = Broker::new(Secret::new(url), "publishing test");
    let link = broker.connect_within("publish", Duration::from_secs(10)).await?;
    Ok(Publisher::start(broker, link, options))
}

fn message(exchange: &str, key: &str, id: &str, size: usize) -> Message {
    Message {
        exchange: exchange.into(),
        routing_key: key.into(),
        message_id: Some(id.into()),
        body: vec![b'x'; size],
        ..Message::default()
    }
}

fn count(outcomes: &[Outcome], which: impl Fn(&Outcome) -> bool) -> usize {
    outcomes.iter().filter(|outcome| which(outcome)).count()
}

// ---- outcomes

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_the_unroutable_ones_are_reported_returned() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-returned")?;
    // Quorum queues confirm late and in groups, a classic one soon: the confirms come in all orders.
    let queues = [("quorum.#", "quorum", 2000), ("classic.#", "classic", 2000)];
    exchange(&lab, "mixed", &queues).await?;
    for round in 0..length(4, 20) {
        let mut dice = Dice::thrown();
        let seed = dice.0;
        let window = [20, 100, 500, 1000, 2000][dice.roll(5)];
        // The broker's answers come as it gives them, in bursts, or in few that settle many messages: the library then
        // hands a return to any of them.
        let proxy = Proxy::before(&lab.url()).await?;
        let url = if round % 3 == 0 { lab.url() } else { proxy.url.clone() };
        let flow = if round % 3 == 1 { Answers::Pass } else { Answers::Merged };
        let mut chance = Dice(seed ^ 0x5555);
        let bursts = tokio::spawn(async move {
            loop {
                proxy.answers(Answers::Wait);
                tokio::time::sleep(Duration::from_micros(chance.roll(20_000) as u64)).await;
                proxy.answers(flow);
                tokio::time::sleep(Duration::from_micros(chance.roll(5_000) as u64)).await;
            }
        });
        let publisher = publisher(&url, Options { window, ..Options::default() }).await?;
        let (tasks, total) = (1 + dice.roll(6), 10_000);
        let mut running = Vec::new();
        for task in 0..tasks {
            let (publisher, mut dice) = (publisher.clone(), Dice(seed + 1 + task as u64));
            running.push(tokio::spawn(async move {
                let (mut waiting, mut wrong, mut sent) = (Vec::new(), Vec::new(), 0);
                let most = [1, 30, 400][dice.roll(3)];
                while sent < total / tasks {
                    let batch = (1 + dice.roll(most)).min(total / tasks - sent);
                    let keys: Vec<String> = (0..batch)
                        .map(|_| match dice.roll(7) {
                            0 => "nobody.listens".to_owned(),
                            1..=3 => "quorum.a".to_owned(),
                            _ => "classic.a".to_owned(),
                        })
                        .collect();
                    let size = dice.roll(800);
                    let number =
                        |(i, key): (usize, &String)| message("mixed", key, &format!("{task}-{}", sent + i), size);
                    let messages = keys.iter().enumerate().map(number).collect();
                    sent += batch;
                    let outcomes = publisher.submit(messages).await;
                    waiting.push((keys, tokio::spawn(outcomes.into_future())));
                }
                for (keys, outcomes) in waiting {
                    for (key, outcome) in keys.iter().zip(outcomes.await.unwrap_or_default()) {
                        let right = match &outcome {
                            Ok(_) => key != "nobody.listens",
                            Err(Refused::Returned { routing_key, .. }) => key == "nobody.listens" && routing_key == key,
                            Err(_) => false,
                        };
                        if !right {
                            wrong.push(format!("{key}: {outcome:?}"));
                        }
                    }
                }
                (sent, wrong)
            }));
        }
        let since = Instant::now();
        let mut sum = 0;
        for task in running {
            let (sent, wrong) = task.await?;
            sum += sent;
            ensure!(wrong.is_empty(), "round {round}, seed {seed}, window {window}: {} wrong: {wrong:?}", wrong.len());
        }
        bursts.abort();
        println!("round {round}: {sum} messages, {tasks} tasks, window {window}, {:?}", since.elapsed());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_those_for_a_missing_exchange_are_forbidden() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-missing")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let publisher = publisher(&lab.url(), Options::default()).await?;
    let mut dice = Dice::thrown();
    let seed = dice.0;
    let bad: BTreeSet<usize> = (0..5).map(|_| dice.roll(4000)).collect();
    let to = |i: usize| if bad.contains(&i) { "not.there" } else { "there" };
    let messages: Vec<Message> = (0..4000).map(|i| message(to(i), "good.a", &format!("m{i}"), 100)).collect();
    let since = Instant::now();
    // Many batches at once: when the broker closes the channel, more are being written.
    let batches: Vec<Vec<Message>> = messages.chunks(128).map(<[Message]>::to_vec).collect();
    let mut waiting = Vec::new();
    for batch in batches {
        waiting.push(publisher.submit(batch).await.into_future());
    }
    let outcomes: Vec<Outcome> = futures_util::future::join_all(waiting).await.into_iter().flatten().collect();
    println!("{} at fault among 4000: {:?}", bad.len(), since.elapsed());
    for (i, outcome) in outcomes.iter().enumerate() {
        let right = match outcome {
            Ok(_) => !bad.contains(&i),
            Err(Refused::Forbidden(said)) => bad.contains(&i) && said.contains("not.there"),
            Err(_) => false,
        };
        ensure!(right, "seed {seed}: message {i} is {outcome:?}, at fault are {bad:?}");
    }
    let stored: HashSet<String> = ids(&lab.take_all("there.good").await?).into_iter().collect();
    ensure!(stored.len() == 4000 - bad.len(), "{} are stored", stored.len());
    ensure!(since.elapsed() < Duration::from_secs(60), "it took {:?}", since.elapsed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_refusal_after_another_is_reported() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-refusals")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let publisher = publisher(&lab.url(), Options::default()).await?;
    for i in 0..50 {
        let to = if i % 5 == 4 { "there" } else { "not.there" };
        let publishing = publisher.publish(message(to, "good.a", &format!("m{i}"), 10));
        let outcome = tokio::time::timeout(Duration::from_secs(10), publishing).await;
        match outcome.with_context(|| format!("message {i} has no outcome"))? {
            Ok(_) => ensure!(to == "there", "message {i} is confirmed"),
            Err(Refused::Forbidden(_)) => ensure!(to == "not.there", "message {i} is forbidden"),
            Err(other) => ensure!(false, "message {i} is {other:?}"),
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_closed_in_the_middle_of_writing_costs_one_connection_at_most() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-mid-write")?;
    exchange(&lab, "there", &[("good.#", "classic", 5000)]).await?;
    let proxy = Proxy::before(&lab.url()).await?;
    let publisher = publisher(&proxy.url, Options { window: 2000, ..Options::default() }).await?;
    // Large bodies: the broker complains of the first while the rest is still being written.
    for round in 0..10 {
        let to = |i: usize| if i == 0 { "not.there" } else { "there" };
        let messages = (0..1000).map(|i| message(to(i), "good.a", &format!("{round}-{i}"), 8_000)).collect();
        let outcomes = publisher.publish_all(messages).await;
        let forbidden = count(&outcomes, |outcome| matches!(outcome, Err(Refused::Forbidden(_))));
        let confirmed = count(&outcomes, Result::is_ok);
        ensure!((forbidden, confirmed) == (1, 999), "round {round}: {forbidden} forbidden, {confirmed} confirmed");
    }
    let seen = proxy.seen();
    // What the library still writes to the closed channel can end the connection; once a round, not once a try.
    ensure!(seen.connections <= 11, "the connection was opened {} times: {seen:?}", seen.connections);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_amqp_cannot_carry_is_refused_and_its_neighbours_are_not() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-unwritable")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let publisher = publisher(&lab.url(), Options::default()).await?;
    let mut large = message("there", "good.a", "headers", 10);
    large.set("big", "x".repeat(200_000));
    let messages = vec![
        message("there", "good.a", "first", 10),
        message("there", "good.a", &"i".repeat(300), 10),
        message("there", &"k".repeat(256), "key", 10),
        message(&"e".repeat(256), "good.a", "exchange", 10),
        large,
        message("there", "good.a", "last", 10),
    ];
    let outcomes = publisher.publish_all(messages).await;
    ensure!(outcomes[0].is_ok() && outcomes[5].is_ok(), "{outcomes:?}");
    for outcome in &outcomes[1..5] {
        ensure!(matches!(outcome, Err(Refused::Unwritable(_))), "{outcomes:?}");
    }
    let said = outcomes[1].as_ref().err().map(ToString::to_string).unwrap_or_default();
    ensure!(said.contains("message id") && said.contains("300 bytes"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_larger_than_a_small_frame_are_refused_and_the_connection_goes_on() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-frames")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let url = format!("{}?frame_max=8192", lab.url());
    let publisher = publisher(&url, Options::default()).await?;
    let mut large = message("there", "good.a", "large", 10);
    large.set("big", "x".repeat(20_000));
    let mut fits = message("there", "good.a", "fits", 100_000);
    fits.set("small", "x".repeat(6_000));
    let publishing = publisher.publish_all(vec![fits.clone(), large, fits]);
    let outcomes = tokio::time::timeout(Duration::from_secs(20), publishing).await.context("no outcome")?;
    ensure!(outcomes[0].is_ok() && outcomes[2].is_ok(), "{outcomes:?}");
    ensure!(matches!(outcomes[1], Err(Refused::Unwritable(_))), "{outcomes:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_beyond_the_own_brokers_limit_is_refused_and_its_neighbours_are_not() -> anyhow::Result<()> {
    let lab = Lab::with_own_broker_set("publishing-large", "max_message_size = 65536\n")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let publisher = publisher(&lab.url(), Options::default()).await?;
    let size = |i: usize| if i == 50 || i == 200 { 100_000 } else { 60_000 };
    let messages = (0..300).map(|i| message("there", "good.a", &format!("m{i}"), size(i))).collect();
    let outcomes = publisher.publish_all(messages).await;
    for (i, outcome) in outcomes.iter().enumerate() {
        let right = match outcome {
            Ok(_) => i != 50 && i != 200,
            Err(refused @ Refused::Forbidden(_)) => {
                let said = refused.to_string();
                (i == 50 || i == 200) && said.contains("message size 100000") && said.contains("65536")
            }
            Err(_) => false,
        };
        ensure!(right, "message {i} is {outcome:?}");
    }
    // The same through `send`: the refusal reaches the person.
    let text = "x".repeat(100_000);
    let lines = [event("small", "good.a", "k", json!({})), event("large", "good.a", "k", json!({"text": text}))];
    let input = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    let (account, stderr) = lab.send_raw(input.into_bytes(), &["--exchange", "there"]).await?;
    ensure!(account["confirmed"] == json!(1) && account["refused"] == json!(1), "{account} {stderr}");
    ensure!(stderr.contains("line 2") && stderr.contains("65536"), "{stderr}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exchange_without_permission_is_forbidden_and_another_is_not() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-permission")?;
    exchange(&lab, "mine", &[("good.#", "quorum", 0)]).await?;
    exchange(&lab, "theirs", &[("good.#", "quorum", 0)]).await?;
    let user = json!({"password": "secret", "tags": ""});
    lab.rabbit.api("PUT", "users/publishing-permission", Some(user))?;
    let rights = json!({"configure": "^$", "write": "^mine$", "read": "^$"});
    lab.rabbit.api("PUT", &format!("permissions/{}/publishing-permission", lab.name), Some(rights))?;
    let url = lab.url().replace("guest:guest@", "publishing-permission:secret@");
    let publisher = publisher(&url, Options::default()).await?;
    let to = |i: usize| if i % 30 == 7 { "theirs" } else { "mine" };
    let messages = (0..100).map(|i| message(to(i), "good.a", &format!("m{i}"), 10)).collect();
    let outcomes = publisher.publish_all(messages).await;
    for (i, outcome) in outcomes.iter().enumerate() {
        let right = match outcome {
            Ok(_) => i % 30 != 7,
            Err(Refused::Forbidden(said)) => i % 30 == 7 && said.contains("'theirs'"),
            Err(_) => false,
        };
        ensure!(right, "message {i} is {outcome:?}");
    }
    ensure!(lab.take_all("theirs.good").await?.is_empty(), "the broker took what it refused");
    lab.rabbit.api("DELETE", "users/publishing-permission", None)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_rejects_and_says_so() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-full")?;
    exchange(&lab, "there", &[("good.#", "classic", 0)]).await?;
    let policy = json!({"pattern": "^there", "definition": {"max-length": 10, "overflow": "reject-publish"}});
    lab.rabbit.api("PUT", &format!("policies/{}/small", lab.name), Some(policy))?;
    let publisher = publisher(&lab.url(), Options::default()).await?;
    let mut rejected = 0;
    let since = Instant::now();
    // A policy takes effect a moment after it was set.
    while rejected == 0 {
        ensure!(since.elapsed() < PATIENCE, "nothing is rejected");
        let messages = (0..100).map(|i| message("there", "good.a", &format!("m{i}"), 10)).collect();
        let outcomes = publisher.publish_all(messages).await;
        rejected =
            count(&outcomes, |outcome| *outcome.as_ref().err().unwrap_or(&Refused::Unknown) == Refused::Rejected);
        let confirmed = count(&outcomes, Result::is_ok);
        ensure!(rejected + confirmed == 100, "{outcomes:?}");
    }
    Ok(())
}

// ---- through losses

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_killed_in_mid_window_loses_and_reorders_nothing() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-killed")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let proxy = Proxy::before(&lab.url()).await?;
    let publisher = publisher(&proxy.url, Options { window: 500, ..Options::default() }).await?;
    let (tell, mut enough) = tokio::sync::watch::channel(false);
    let feed = publisher.clone();
    let publishing = tokio::spawn(async move {
        let (mut sent, mut waiting) = (Vec::new(), Vec::new());
        while !*enough.borrow_and_update() {
            let from = sent.len();
            let messages: Vec<Message> =
                (from..from + 100).map(|i| message("there", "good.a", &format!("m{i:06}"), 300)).collect();
            sent.extend(ids(&messages));
            waiting.push(feed.submit(messages).await.into_future());
        }
        let outcomes: Vec<Outcome> = futures_util::future::join_all(waiting).await.into_iter().flatten().collect();
        (sent, outcomes)
    });
    for round in 0..10 {
        let before = proxy.seen();
        until("it publishes", PATIENCE, || proxy.seen().published >= before.published + 700).await?;
        if round < 7 {
            proxy.cut();
        } else {
            until("closed by the broker", PATIENCE, || lab.close_connections("publishing test").unwrap_or(0) > 0)
                .await?;
        }
        until("connected again", PATIENCE, || proxy.seen().connections > before.connections).await?;
    }
    tell.send_replace(true);
    let (sent, outcomes) = publishing.await?;
    let confirmed = count(&outcomes, Result::is_ok);
    ensure!(confirmed == sent.len(), "{confirmed} of {} are confirmed", sent.len());
    let stored = ids(&lab.take_all("there.good").await?);
    let mut seen = HashSet::new();
    let firsts: Vec<String> = stored.iter().filter(|id| seen.insert((*id).clone())).cloned().collect();
    println!("{} messages, {} repeats", sent.len(), stored.len() - firsts.len());
    ensure!(firsts == sent, "{} of {} stored, or in another order", firsts.len(), sent.len());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn confirms_that_never_come_are_repeated_on_a_new_connection() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-stuck")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let proxy = Proxy::before(&lab.url()).await?;
    let publisher =
        publisher(&proxy.url, Options { window: 50, timeout: Duration::from_secs(2), ..Options::default() }).await?;
    proxy.answers(Answers::Lost);
    let messages: Vec<Message> = (0..200).map(|i| message("there", "good.a", &format!("m{i:03}"), 10)).collect();
    let sent = ids(&messages);
    let publishing = tokio::spawn(async move { publisher.publish_all(messages).await });
    until("a new connection is opened", PATIENCE, || proxy.seen().connections >= 2).await?;
    ensure!(!publishing.is_finished(), "outcomes without confirms");
    proxy.answers(Answers::Pass);
    let outcomes = publishing.await?;
    ensure!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    let mut seen = HashSet::new();
    let mut stored = ids(&lab.take_all("there.good").await?);
    stored.retain(|id| seen.insert(id.clone()));
    ensure!(stored == sent, "{stored:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_that_is_never_opened_is_given_up_for_a_new_connection() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-unopened")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let proxy = Proxy::before(&lab.url()).await?;
    proxy.answers(Answers::Unopened);
    let publisher = publisher(&proxy.url, Options::default()).await?;
    let publishing = tokio::spawn(async move { publisher.publish(message("there", "good.a", "m", 10)).await });
    until("a new connection is opened", PATIENCE, || proxy.seen().connections >= 2).await?;
    ensure!(!publishing.is_finished(), "an outcome without a channel");
    proxy.answers(Answers::Pass);
    ensure!(publishing.await?.is_ok());
    ensure!(ids(&lab.take_all("there.good").await?) == ["m"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn send_says_of_every_alarm_of_the_own_broker_that_it_waits() -> anyhow::Result<()> {
    let lab = Lab::with_own_broker("publishing-alarms")?;
    exchange(&lab, "sink", &[("big.#", "classic", 10)]).await?;
    let alarm = |limit: &str| lab.rabbit.ctl(&format!("set_vm_memory_high_watermark absolute {limit}"));
    alarm("1MB")?;
    let mut command = command("warren-publisher", &lab.environment);
    command.args(["send", "--exchange", "sink", "--rate", "1500", "-"]);
    let (mut sender, mut stdin) = Process::start_fed(command, &lab.path("send.log"))?;
    let enough = Arc::new(AtomicBool::new(false));
    let feed = tokio::spawn({
        let enough = enough.clone();
        async move {
            // Large enough that writing a chunk takes time: an alarm then comes in the middle of one.
            let text = "x".repeat(10_000);
            let mut fed = 0;
            while !enough.load(Relaxed) {
                let line = event(&format!("l{fed}"), "big.event", &format!("l{}", fed % 20), json!({"text": text}));
                stdin.write_all(format!("{line}\n").as_bytes()).await?;
                fed += 1;
            }
            anyhow::Ok(fed)
        }
    });
    for alarms in 0..4 {
        let said = |what: &str| sender.log().matches(what).count() > alarms;
        until("it says that it waits", PATIENCE, || said("the broker blocks publishing")).await?;
        alarm("1GB")?;
        until("it says that it goes on", PATIENCE, || said("publishing goes on")).await?;
        if alarms < 3 {
            alarm("1MB")?;
        }
    }
    enough.store(true, Relaxed);
    let fed = feed.await??;
    ensure!(sender.wait(PATIENCE).await?.success(), "{}", sender.log());
    ensure!(sender.account()?["confirmed"] == json!(fed), "{fed} fed: {}", sender.log());
    Ok(())
}

// ---- bounds

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn never_more_than_a_window_is_unconfirmed() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-window")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    for window in [1, 7, 300, 1000] {
        let proxy = Proxy::before(&lab.url()).await?;
        let publisher = publisher(&proxy.url, Options { window, ..Options::default() }).await?;
        proxy.answers(Answers::Wait);
        // One at a time takes its time.
        let total = if window < 100 { 500 } else { 3_000 };
        let batches: Vec<Vec<Message>> = (0..total / 100)
            .map(|b| (0..100).map(|i| message("there", "good.a", &format!("{window}-{b}-{i}"), 10)).collect())
            .collect();
        let feed = publisher.clone();
        let publishing = tokio::spawn(async move {
            let mut waiting = Vec::new();
            for batch in batches {
                waiting.push(feed.submit(batch).await.into_future());
            }
            futures_util::future::join_all(waiting).await
        });
        until("the window is full", PATIENCE, || proxy.seen().most >= window).await?;
        ensure!(!publishing.is_finished(), "outcomes without confirms");
        proxy.answers(Answers::Pass);
        let outcomes: Vec<Outcome> = publishing.await?.into_iter().flatten().collect();
        ensure!(outcomes.len() == total && outcomes.iter().all(Result::is_ok), "not all are confirmed");
        let seen = proxy.seen();
        ensure!(seen.most == window, "window {window}: {seen:?}");
        ensure!(seen.published == total as u64 && seen.connections == 1, "published more than once: {seen:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outcomes_and_messages_keep_their_order() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-order")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let publisher = publisher(&lab.url(), Options::default()).await?;
    let (tell, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let mut sent = Vec::new();
    for batch in 0..300 {
        let messages: Vec<Message> =
            (0..1 + batch % 37).map(|i| message("there", "good.a", &format!("m{batch:03}-{i:02}"), 10)).collect();
        sent.extend(ids(&messages));
        let outcomes = publisher.submit(messages).await;
        let tell = tell.clone();
        tokio::spawn(async move {
            let confirmed = outcomes.await.iter().all(Result::is_ok);
            let _ = tell.send((batch, confirmed));
        });
    }
    drop(tell);
    let mut batches = 0;
    while let Some((batch, confirmed)) = heard.recv().await {
        ensure!(confirmed, "batch {batch} is not confirmed");
        batches += 1;
    }
    ensure!(batches == 300, "{batches} batches");
    let stored = ids(&lab.take_all("there.good").await?);
    ensure!(stored == sent, "stored in another order, or not once each");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_confirm_that_does_not_come_holds_no_other_back_and_costs_no_connection() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-one-lost")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let proxy = Proxy::before(&lab.url()).await?;
    let timeout = Duration::from_secs(5);
    let publisher = publisher(&proxy.url, Options { timeout, ..Options::default() }).await?;
    proxy.answers(Answers::Without(3));
    let since = Instant::now();
    let mut outcomes =
        publisher.submit((0..10).map(|i| message("there", "good.a", &format!("m{i}"), 10)).collect()).await;
    let mut told = Vec::new();
    while told.len() < 9 {
        told.extend(outcomes.next().await.context("all were told")?);
    }
    ensure!(since.elapsed() < timeout, "the others waited for it: {:?}", since.elapsed());
    ensure!(told.iter().all(|(place, outcome)| *place != 2 && outcome.is_ok()), "{told:?}");
    // More go out meanwhile.
    let more = publisher.publish_all((0..10).map(|i| message("there", "good.a", &format!("n{i}"), 10)).collect()).await;
    ensure!(count(&more, Result::is_ok) == 10 && since.elapsed() < timeout, "{more:?} after {:?}", since.elapsed());
    let last = outcomes.next().await.context("the last")?;
    ensure!(matches!(last[..], [(2, Ok(_))]) && outcomes.next().await.is_none(), "{last:?}");
    let seen = proxy.seen();
    ensure!(
        (seen.published, seen.connections) == (21, 1),
        "only what was not confirmed is repeated, on the same connection: {seen:?}"
    );
    Ok(())
}
