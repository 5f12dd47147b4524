//! What publishing says is what the broker did: every outcome, in every mixture, through every loss.
use anyhow::{Context, ensure};
use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashSet};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use warren_publisher::publish::{Options, Outcome, Refused};
use warren_publisher::{Broker, Publisher};
use warren_shared::Message;
use warren_shared::env::Secret;
use warren_tests::process::{command, expect_exit};
use warren_tests::{Answers, Lab, Process, Proxy, event, events, until};

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

/// A topic exchange with a queue for each pattern, of a type, holding at most so many messages (0 = no limit).
async fn exchange(lab: &Lab, name: &str, queues: &[(&str, &str, i64)]) -> anyhow::Result<()> {
    let (_connection, channel) = lab.channel().await?;
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare(name.into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
    for (pattern, kind, most) in queues {
        let queue = format!("{name}.{}", pattern.split('.').next().unwrap_or_default());
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString((*kind).into()));
        if *most > 0 {
            arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(*most));
            arguments.insert("x-overflow".into(), AMQPValue::LongString("drop-head".into()));
        }
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(queue.as_str().into(), durable, arguments).await?;
        let options = QueueBindOptions::default();
        channel.queue_bind(queue.into(), name.into(), (*pattern).into(), options, FieldTable::default()).await?;
    }
    Ok(())
}

fn ids(messages: &[Message]) -> Vec<String> {
    messages.iter().filter_map(|message| message.message_id.clone()).collect()
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
    for round in 0..20 {
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
                    waiting.push((keys, tokio::spawn(outcomes)));
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
        waiting.push(publisher.submit(batch).await);
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
            waiting.push(feed.submit(messages).await);
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
    let publisher = publisher(&proxy.url, Options { window: 50, timeout: Duration::from_secs(2) }).await?;
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
async fn send_says_of_every_alarm_of_the_own_broker_that_it_waits() -> anyhow::Result<()> {
    let lab = Lab::with_own_broker("publishing-alarms")?;
    exchange(&lab, "sink", &[("big.#", "classic", 10)]).await?;
    let alarm = |limit: &str| lab.rabbit.ctl(&format!("set_vm_memory_high_watermark absolute {limit}"));
    alarm("1MB")?;
    // Large enough that writing a chunk takes time: an alarm then comes in the middle of one.
    let text = "x".repeat(10_000);
    let large = |i: usize| event(&format!("l{i}"), "big.event", &format!("l{}", i % 20), json!({"text": text}));
    let events: Vec<Value> = (0..12_000).map(large).collect();
    let mut sender = lab.sender(&events, &["--exchange", "sink", "--rate", "1500"])?;
    let mut alarms = 0;
    while sender.account().is_err() {
        let said = |what: &str| sender.log().matches(what).count() > alarms || sender.account().is_ok();
        until("it says that it waits", PATIENCE, || said("the broker blocks publishing")).await?;
        alarm("1GB")?;
        until("it says that it goes on", PATIENCE, || said("publishing goes on")).await?;
        alarms += 1;
        alarm("1MB")?;
    }
    println!("{alarms} alarms");
    ensure!(alarms >= 2, "only {alarms} alarms while it sent");
    ensure!(sender.wait(PATIENCE).await?.success(), "{}", sender.log());
    ensure!(sender.account()?["confirmed"] == json!(events.len()), "{}", sender.log());
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
        let batches: Vec<Vec<Message>> = (0..30)
            .map(|b| (0..100).map(|i| message("there", "good.a", &format!("{window}-{b}-{i}"), 10)).collect())
            .collect();
        let feed = publisher.clone();
        let publishing = tokio::spawn(async move {
            let mut waiting = Vec::new();
            for batch in batches {
                waiting.push(feed.submit(batch).await);
            }
            futures_util::future::join_all(waiting).await
        });
        until("the window is full", PATIENCE, || proxy.seen().most >= window).await?;
        ensure!(!publishing.is_finished(), "outcomes without confirms");
        proxy.answers(Answers::Pass);
        let outcomes: Vec<Outcome> = publishing.await?.into_iter().flatten().collect();
        ensure!(outcomes.len() == 3000 && outcomes.iter().all(Result::is_ok), "not all are confirmed");
        let seen = proxy.seen();
        ensure!(seen.most == window, "window {window}: {seen:?}");
        ensure!(seen.published == 3000 && seen.connections == 1, "published more than once: {seen:?}");
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
async fn send_needs_little_memory_for_many_lines() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-memory")?;
    let peak = memory_of_send(&lab, 200_000, 850).await?;
    ensure!(peak < 150 << 20, "{} MB of memory", peak >> 20);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn send_needs_little_memory_for_long_lines() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-memory-long")?;
    let peak = memory_of_send(&lab, 120, 4 << 20).await?;
    // What is in flight (64 MiB) exists as line, as message and as frames.
    ensure!(peak < 200 << 20, "{} MB of memory", peak >> 20);
    Ok(())
}

/// Sends a file of so many lines with so much text; returns the sender's peak of memory.
async fn memory_of_send(lab: &Lab, lines: usize, text: usize) -> anyhow::Result<u64> {
    // Messages are not kept: the test is not about the broker's disk.
    exchange(lab, "sink", &[("big.#", "classic", 10)]).await?;
    let file = lab.path("large.jsonl");
    {
        use std::io::Write;
        let mut out = std::io::BufWriter::new(std::fs::File::create(&file)?);
        let text = "x".repeat(text);
        for i in 0..lines {
            let start = r#"{"specversion":"1.0","source":"/tests","type":"big.event","data":{"text":""#;
            writeln!(out, r#"{start}{text}"}},"id":"b{i}","partitionkey":"k{}"}}"#, i % 100)?;
        }
        out.flush()?;
    }
    let size = std::fs::metadata(&file)?.len();
    let mut command = command("warren-publisher", &lab.environment);
    command.args(["send", "--exchange", "sink"]).arg(&file);
    let mut sender = Process::start(command, &lab.path("send.log"))?;
    let (mut peak, since) = (0, Instant::now());
    while sender.is_running() {
        peak = sender.pid().and_then(peak_memory).unwrap_or(peak).max(peak);
        ensure!(since.elapsed() < Duration::from_secs(240), "it still runs: {}", sender.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    std::fs::remove_file(&file)?;
    let account = sender.account()?;
    ensure!(account["confirmed"] == json!(lines), "{account} {}", sender.log());
    println!("{} MB sent in {} s, at most {} MB of memory", size >> 20, account["seconds"], peak >> 20);
    ensure!(peak > 0, "its memory was never seen");
    Ok(peak)
}

/// The most physical memory that a process ever had, in bytes.
fn peak_memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
}

// ---- send

#[tokio::test]
async fn the_account_of_send_adds_up_and_the_rejects_name_their_lines() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-account")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let mut input = String::new();
    let (mut bad, mut number) = (Vec::new(), 0_u64);
    let mut line = |text: &str, reason: Option<&str>| {
        number += 1;
        input.push_str(text);
        input.push('\n');
        if let Some(reason) = reason {
            bad.push((number, reason.to_owned(), text.to_owned()));
        }
    };
    let good = |i: usize| event(&format!("g{i}"), "good.a", &format!("k{}", i % 5), json!({"n": i})).to_string();
    for i in 0..400 {
        line(&good(i), None);
        match i {
            20 => line("{not json", Some("malformed")),
            60 => line("", None),
            61 => line("   ", None),
            100 => line("[]", Some("malformed")),
            140 => line(r#"{"specversion":"1.0","id":"x","source":"/s"}"#, Some("attribute")),
            180 => line(r#"{"specversion":"1.0","id":"","source":"/s","type":"good.a"}"#, Some("attribute")),
            220 => line(&event("nobody", "bad.a", "k", json!({})).to_string(), Some("returned")),
            260 => line(&event(&"i".repeat(300), "good.a", "k", json!({})).to_string(), Some("")),
            300 => line(r#"{"id":"1","id":"2","specversion":"1.0","source":"/s","type":"good.a"}"#, Some("")),
            _ => {}
        }
    }
    let rejects = lab.path("rejects.jsonl");
    let arguments = ["--exchange", "there", "--rejects", rejects.to_str().context("UTF-8")?];
    let (account, stderr) = lab.send_raw(input.clone().into_bytes(), &arguments).await?;
    let (confirmed, refused) = (400, bad.len());
    ensure!(account["read"] == json!(confirmed + refused), "{account} {stderr}");
    ensure!(account["confirmed"] == json!(confirmed) && account["refused"] == json!(refused), "{account} {stderr}");
    ensure!(account["unknown"] == json!(0), "{account}");
    let mut records: Vec<Value> =
        std::fs::read_to_string(&rejects)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    records.sort_by_key(|record| record["line"].as_u64());
    let found: Vec<(u64, String)> = records
        .iter()
        .map(|r| (r["line"].as_u64().unwrap_or(0), r["input"].as_str().unwrap_or_default().to_owned()))
        .collect();
    let wanted: Vec<(u64, String)> = bad.iter().map(|(line, _, text)| (*line, text.clone())).collect();
    ensure!(found == wanted, "{found:?} instead of {wanted:?}");
    for (record, (line, reason, _)) in records.iter().zip(&bad) {
        println!("{line}: {} - {}", record["reason"], record["error"]);
        ensure!(record["error"].as_str().is_some_and(|e| !e.is_empty()), "{record}");
        ensure!(stderr.contains(&format!("line {line}: ")), "stderr does not name line {line}: {stderr}");
        ensure!(reason != "returned" || record["reason"] == json!("returned"), "{record}");
    }
    let stored = ids(&lab.take_all("there.good").await?);
    ensure!(stored.len() == confirmed, "{} are stored", stored.len());
    let output = send(&lab, &arguments, input.into_bytes()).await?;
    expect_exit(&output, 1)?;
    Ok(())
}

async fn send(lab: &Lab, arguments: &[&str], input: Vec<u8>) -> anyhow::Result<std::process::Output> {
    let mut command = command("warren-publisher", &lab.environment);
    command.arg("send").args(arguments);
    warren_tests::process::output(command, input).await
}

#[tokio::test]
async fn any_json_becomes_events_by_type_id_key_and_lane() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-pointers")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let input = "{\"no\":17,\"customer\":{\"name\":\"ada\"}}\n{\"no\":\"x\",\"customer\":{\"name\":\"bob\"}}\n";
    let arguments = ["--exchange", "there", "--type", "good.order", "--source", "/shop", "--id", "/no"];
    let more = ["--key", "/customer/name", "--lane", "high"];
    let (account, stderr) = lab.send_raw(input.into(), &[&arguments[..], &more[..]].concat()).await?;
    ensure!(account["confirmed"] == json!(2), "{account} {stderr}");
    let stored = lab.take_all("there.good").await?;
    for (message, (id, key, body)) in stored.iter().zip([("17", "ada", 0), ("x", "bob", 1)]) {
        let incoming = message.read(warren_shared::Limits::default(), String::new)?;
        let event = incoming.event;
        ensure!((event.id(), event.source(), event.kind()) == (id, "/shop", "good.order"), "{event:?}");
        ensure!(event.key() == key && message.correlation_id.as_deref() == Some(key), "{event:?}");
        ensure!(message.routing_key == "good.order", "{}", message.routing_key);
        ensure!(message.header("warren-lane").map(ToString::to_string).as_deref() == Some("high"), "{message:?}");
        let (data, line) =
            (event.json::<Value>()?, serde_json::from_str::<Value>(input.lines().nth(body).unwrap_or(""))?);
        ensure!(data == line, "{data}");
    }
    ensure!(stored.len() == 2, "{} are stored", stored.len());
    // A line without the pointer's value is refused, and only it.
    let (account, stderr) = lab.send_raw(b"{\"no\":1}\n{\"nr\":2}\n".to_vec(), &arguments).await?;
    ensure!(account["confirmed"] == json!(1) && account["refused"] == json!(1), "{account}");
    ensure!(stderr.contains("line 2: ") && stderr.contains("/no"), "{stderr}");
    Ok(())
}

#[tokio::test]
async fn a_file_that_is_sent_again_has_the_same_ids() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-again")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let file = lab.path("orders.jsonl");
    std::fs::write(&file, "{\"a\":1}\n{\"a\":1}\n\n{\"a\":2}\n")?;
    let mut rounds = Vec::new();
    for _ in 0..2 {
        let path = file.to_str().context("UTF-8")?;
        let output = send(&lab, &["--exchange", "there", "--type", "good.order", path], Vec::new()).await?;
        expect_exit(&output, 0)?;
        rounds.push(ids(&lab.take_all("there.good").await?));
    }
    ensure!(rounds[0] == rounds[1] && rounds[0].len() == 3, "{rounds:?}");
    ensure!(rounds[0].iter().collect::<HashSet<_>>().len() == 3, "equal lines have one id: {rounds:?}");
    Ok(())
}

#[tokio::test]
async fn a_rate_is_kept() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-rate")?;
    exchange(&lab, "there", &[("order.#", "classic", 0)]).await?;
    for (rate, count) in [(200, 2000), (5, 50)] {
        let rate_text = rate.to_string();
        let mut sender = lab.sender(&events(count, 10), &["--exchange", "there", "--rate", &rate_text])?;
        ensure!(sender.wait(PATIENCE).await?.success(), "{}", sender.log());
        let account = sender.account()?;
        let seconds = account["seconds"].as_f64().context("seconds")?;
        let measured = count as f64 / seconds;
        println!("{measured:.1}/s of {rate}/s");
        ensure!((measured / f64::from(rate) - 1.0).abs() < 0.2, "{measured:.1}/s instead of {rate}/s: {account}");
    }
    Ok(())
}

#[tokio::test]
async fn the_exit_code_says_what_kind_of_failure_it_was() -> anyhow::Result<()> {
    let mut lab = Lab::new("publishing-exit")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let good = format!("{}\n", event("g", "good.a", "k", json!({}))).into_bytes();
    let there = ["--exchange", "there"];
    expect_exit(&send(&lab, &there, good.clone()).await?, 0)?;
    expect_exit(&send(&lab, &there, Vec::new()).await?, 0)?;
    let nobody = format!("{}\n", event("n", "bad.a", "k", json!({}))).into_bytes();
    expect_exit(&send(&lab, &there, nobody).await?, 1)?;
    expect_exit(&send(&lab, &["--exchange", "missing"], good.clone()).await?, 1)?;
    expect_exit(&send(&lab, &["--colour"], good.clone()).await?, 64)?;
    expect_exit(&send(&lab, &["--rate", "0"], good.clone()).await?, 64)?;
    expect_exit(&send(&lab, &["--window", "5000"], good.clone()).await?, 64)?;
    expect_exit(&send(&lab, &["--key", "/k"], good.clone()).await?, 64)?;
    expect_exit(&send(&lab, &["/not/a/file"], good.clone()).await?, 64)?;
    let url = lab.url();
    lab.set("WARREN_CONNECT_TIMEOUT", "1s");
    // Nothing listens there, and no other test is given this port meanwhile.
    let closed = "127.0.0.1:1";
    lab.set("AMQP_URL", &format!("amqp://guest:guest@{closed}/x"));
    let (_, stderr) = expect_exit(&send(&lab, &there, good.clone()).await?, 69)?;
    ensure!(stderr.contains(closed) && stderr.contains("AMQP_URL"), "{stderr}");
    let silent = std::net::TcpListener::bind("127.0.0.1:0")?;
    lab.set("AMQP_URL", &format!("amqp://guest:guest@{}/x", silent.local_addr()?));
    let (_, stderr) = expect_exit(&send(&lab, &there, good.clone()).await?, 69)?;
    ensure!(stderr.contains("does not answer"), "{stderr}");
    lab.set("AMQP_URL", &url.replace("guest:guest@", "guest:wrong@"));
    let (_, stderr) = expect_exit(&send(&lab, &there, good.clone()).await?, 69)?;
    ensure!(stderr.contains("user 'guest'") && !stderr.contains("wrong"), "{stderr}");
    lab.set("AMQP_URL", &format!("{url}-not-there"));
    let (_, stderr) = expect_exit(&send(&lab, &there, good.clone()).await?, 69)?;
    ensure!(stderr.contains("vhost"), "{stderr}");
    lab.set("AMQP_URL", "not a url");
    expect_exit(&send(&lab, &there, good.clone()).await?, 64)?;
    lab.set("AMQP_URL", &url);
    lab.set("WARREN_PUBLISH_TIMEOUT", "soon");
    let (_, stderr) = expect_exit(&send(&lab, &there, good).await?, 64)?;
    ensure!(stderr.contains("WARREN_PUBLISH_TIMEOUT"), "{stderr}");
    Ok(())
}

#[tokio::test]
async fn an_interrupt_prints_the_account_of_what_was_sent() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-interrupt")?;
    exchange(&lab, "there", &[("order.#", "classic", 0)]).await?;
    let mut sender = lab.sender(&events(50_000, 10), &["--exchange", "there", "--rate", "500"])?;
    let since = Instant::now();
    while lab.depth("there.order").await?.is_none_or(|(ready, _)| ready < 300) {
        ensure!(since.elapsed() < PATIENCE, "nothing is sent: {}", sender.log());
    }
    sender.signal(rustix::process::Signal::INT)?;
    let status = sender.wait(Duration::from_secs(20)).await?;
    ensure!(status.code() == Some(1), "what was not read is not sent: {status}: {}", sender.log());
    let account = sender.account()?;
    let number = |name: &str| account[name].as_u64().unwrap_or(u64::MAX);
    ensure!(number("read") == number("confirmed") + number("refused") + number("unknown"), "{account}");
    ensure!(number("read") < 50_000 && number("refused") == 0, "{account}");
    let stored = ids(&lab.take_all("there.order").await?);
    let stored_count = stored.len() as u64;
    ensure!(number("confirmed") <= stored_count, "{account}, {stored_count} are stored");
    ensure!(stored_count <= number("confirmed") + number("unknown"), "{account}, {stored_count} are stored");
    ensure!(stored.iter().enumerate().all(|(i, id)| *id == format!("e{i}")), "not a prefix of the input");
    ensure!(sender.log().contains("interrupted"), "{}", sender.log());
    Ok(())
}

#[tokio::test]
async fn an_interrupt_before_the_first_line_ends_it_too() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-interrupt-idle")?;
    exchange(&lab, "there", &[("order.#", "classic", 0)]).await?;
    let mut child = streaming(&lab, &["--exchange", "there"])?;
    let stdin = child.stdin.take();
    let pid = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())).context("it runs")?;
    until("it is connected", PATIENCE, || lab.connections("send").is_ok_and(|names| !names.is_empty())).await?;
    rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    let output =
        tokio::time::timeout(Duration::from_secs(20), child.wait_with_output()).await.context("it still runs")??;
    drop(stdin);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let account: Value = serde_json::from_str(stdout.lines().last().with_context(|| stderr.clone().into_owned())?)?;
    ensure!(account["read"] == json!(0), "{account} {stderr}");
    Ok(())
}

fn streaming(lab: &Lab, arguments: &[&str]) -> anyhow::Result<tokio::process::Child> {
    let mut command = command("warren-publisher", &lab.environment);
    command.arg("send").args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(tokio::process::Command::from(command).kill_on_drop(true).spawn()?)
}

#[tokio::test]
async fn a_line_on_stdin_is_published_at_once() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-stream")?;
    exchange(&lab, "there", &[("order.#", "quorum", 0)]).await?;
    let mut child = streaming(&lab, &["--exchange", "there", "-"])?;
    let mut stdin = child.stdin.take().context("piped")?;
    for (i, line) in events(5, 1).iter().enumerate() {
        stdin.write_all(format!("{line}\n").as_bytes()).await?;
        stdin.flush().await?;
        let since = Instant::now();
        while lab.depth("there.order").await? != Some((u32::try_from(i + 1)?, 0)) {
            ensure!(since.elapsed() < Duration::from_secs(20), "line {i} waits for more input");
        }
        println!("line {i} is stored after {:?}", since.elapsed());
    }
    // The last line of a stream may lack its newline.
    stdin.write_all(event("last", "order.placed", "k", json!({})).to_string().as_bytes()).await?;
    drop(stdin);
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await??;
    let (stdout, _) = expect_exit(&output, 0)?;
    let account: Value = serde_json::from_str(stdout.lines().last().context("an account")?)?;
    ensure!(account["read"] == json!(6) && account["confirmed"] == json!(6), "{account}");
    Ok(())
}
