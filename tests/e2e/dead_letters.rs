//! Dead letters: looked at, brought back and dropped, and nothing lost on the way.
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashSet};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;
use warren_tests::process::{self, Process, expect_exit};
use warren_tests::{Lab, Raw, event, until};

const PATIENCE: Duration = Duration::from_secs(120);

const NEW: &str = "{\"password\":\"payload of a letter\"}";

/// A pool whose handler takes `order.#` and fails for good what asks for `repaired`, until that file is there.
async fn pool(name: &str) -> anyhow::Result<Lab> {
    let mut lab = Lab::new(name)?;
    let more = ", retry: {attempts: 2, backoff: 100ms, max: 100ms}";
    lab.set("WARREN_ROUTES", &format!("routes: [{}]", lab.actor_route("order.#", more)));
    lab.set("WARREN_SUBSCRIBE", "strange.#");
    lab.declare().await?;
    Ok(lab)
}

fn broken(lab: &Lab, id: &str, key: &str) -> Value {
    event(id, "order.placed", key, json!({"fail_unless": lab.path("repaired")}))
}

fn repair(lab: &Lab) -> anyhow::Result<()> {
    Ok(std::fs::write(lab.path("repaired"), "")?)
}

async fn dead(lab: &Lab, arguments: &[&str]) -> anyhow::Result<(String, String)> {
    expect_exit(&lab.run(&[&["dead"], arguments].concat()).await?, 0)
}

/// How many letters a command says that it treated.
async fn treated(lab: &Lab, arguments: &[&str]) -> anyhow::Result<u64> {
    let (stdout, _) = dead(lab, arguments).await?;
    let account: Value = serde_json::from_str(stdout.trim())?;
    account["replayed"].as_u64().or(account["dropped"].as_u64()).with_context(|| format!("an account: {stdout}"))
}

fn ids(stdout: &str) -> anyhow::Result<Vec<String>> {
    let id = |line: &str| Ok(serde_json::from_str::<Value>(line)?["id"].as_str().unwrap_or_default().to_owned());
    stdout.lines().map(id).collect()
}

/// One letter of each kind: no route, permanent, exhausted, unreadable.
async fn four_letters(lab: &Lab) -> anyhow::Result<()> {
    lab.send(&[
        event("lost", "strange.thing", "k1", json!({})),
        event("hopeless", "order.placed", "k2", json!({"dead": true})),
        event("tired", "order.paid", "k3", json!({"fail": 9})),
    ])
    .await?;
    lab.publish(&[Raw::new("order.placed", "{\"a\":").content_type("application/json").id("broken").key("k4")]).await?;
    lab.dead_letters(4, PATIENCE).await.map(|_| ())
}

#[tokio::test]
async fn letters_are_listed_and_shown_by_reason_type_and_id() -> anyhow::Result<()> {
    let lab = pool("dead-list").await?;
    let _worker = lab.worker()?;
    four_letters(&lab).await?;
    for (filter, wanted) in [
        (&[][..], &["broken", "hopeless", "lost", "tired"][..]),
        (&["--reason", "no-route"], &["lost"]),
        (&["--reason", "permanent"], &["hopeless"]),
        (&["--reason", "exhausted"], &["tired"]),
        (&["--reason", "bad-json"], &["broken"]),
        (&["--type", "order.placed"], &["broken", "hopeless"]),
        (&["--type", "order.placed", "--reason", "permanent"], &["hopeless"]),
        (&["--id", "tired"], &["tired"]),
        (&["--id", "nobody"], &[]),
    ] {
        let (stdout, _) = dead(&lab, &[&["list", "--json"], filter].concat()).await?;
        let mut found = ids(&stdout)?;
        found.sort();
        ensure!(found == wanted, "{filter:?}: {found:?}");
    }
    let (stdout, stderr) = dead(&lab, &["list"]).await?;
    ensure!(stdout.lines().count() == 5 && stdout.starts_with("DIED"), "{stdout}");
    ensure!(stderr.contains("1 bad-json, 1 exhausted, 1 no-route, 1 permanent"), "{stderr}");

    let (stdout, _) = dead(&lab, &["show", "hopeless"]).await?;
    for wanted in ["permanent", "asked to die", "order.placed", "/tests", "k2", "order.#", "{\"dead\":true}", "w0"] {
        ensure!(stdout.contains(wanted), "{wanted} is not in:\n{stdout}");
    }
    let output = lab.run(&["dead", "show", "nobody"]).await?;
    let (_, stderr) = expect_exit(&output, 1)?;
    ensure!(stderr.contains("no dead letter has the id 'nobody'"), "{stderr}");
    ensure!(lab.letters().await?.len() == 4, "looking at letters removes none");
    Ok(())
}

#[tokio::test]
async fn a_letter_carries_all_its_marks_and_the_event_as_it_was() -> anyhow::Result<()> {
    let lab = pool("dead-marks").await?;
    let _worker = lab.worker()?;
    let before = jiff::Timestamp::now();
    let mut sent = event("tired", "order.paid", "customer-7", json!({"fail": 9, "secret": 1}));
    sent["subject"] = json!("order/7");
    sent["tenant"] = json!("acme");
    lab.send(&[sent]).await?;
    let letter = lab.dead_letters(1, PATIENCE).await?.remove(0);
    for (name, wanted) in [
        ("warren-dead-reason", "exhausted"),
        ("warren-dead-error", "asked to fail at attempt 2"),
        ("warren-dead-attempts", "2"),
        ("warren-dead-handler", "order.#"),
        ("warren-dead-worker", "w0"),
        ("warren-lane", "normal"),
        ("cloudEvents_id", "tired"),
        ("cloudEvents_type", "order.paid"),
        ("cloudEvents_source", "/tests"),
        ("cloudEvents_subject", "order/7"),
        ("cloudEvents_partitionkey", "customer-7"),
        ("cloudEvents_tenant", "acme"),
    ] {
        ensure!(letter.header(name) == wanted, "{name} is not '{wanted}': {letter:?}");
    }
    let at: Value = serde_json::from_str(&dead(&lab, &["list", "--json"]).await?.0)?;
    ensure!(at["at"] == letter.header("warren-dead-at"), "{at}");
    let died = letter.header("warren-dead-at").parse::<jiff::Timestamp>()?;
    ensure!(died >= before && died <= jiff::Timestamp::now(), "{letter:?}");
    ensure!(letter.body == b"{\"fail\":9,\"secret\":1}" && letter.routing_key == "order.paid", "{letter:?}");
    Ok(())
}

#[tokio::test]
async fn a_letter_that_the_broker_made_is_replayed_under_the_identity_that_it_had() -> anyhow::Result<()> {
    let mut lab = pool("dead-expired").await?;
    let (_connection, channel) = lab.channel().await?;
    let options = lapin::options::ExchangeDeclareOptions { durable: true, ..Default::default() };
    let arguments = lapin::types::FieldTable::default();
    channel.exchange_declare("orders-exchange".into(), lapin::ExchangeKind::Topic, options, arguments).await?;
    lab.set("WARREN_SUBSCRIBE", "orders-exchange:order.#");
    lab.declare().await?;
    let policies = format!("policies/{}/short", lab.name);
    let policy = json!({"pattern": "p[0-9]+$", "definition": {"message-ttl": 500}, "apply-to": "queues"});
    lab.rabbit.api("PUT", &policies, Some(policy))?;
    // It names neither app_id nor anything else: its exchange is its source.
    let plain = |id: &str| Raw::new("order.placed", "{}").to("orders-exchange").id(id).key("k");
    lab.publish(&[plain("twice")]).await?;
    lab.dead_letters(1, PATIENCE).await?;
    lab.rabbit.api("DELETE", &policies, None)?;
    let (stdout, _) = dead(&lab, &["list", "--json"]).await?;
    let letter: Value = serde_json::from_str(stdout.trim())?;
    ensure!(letter["reason"] == "expired" && letter["source"] == "/amqp/orders-exchange", "{letter}");
    // Its publisher missed an answer and sends it again; that one is handled.
    let _worker = lab.worker()?;
    lab.publish(&[plain("twice")]).await?;
    until("handled", PATIENCE, || lab.acts_of("twice").len() == 1).await?;
    ensure!(treated(&lab, &["replay", "--all"]).await? == 1);
    // One key: the replay is settled before what follows it.
    lab.publish(&[plain("last")]).await?;
    until("the last", PATIENCE, || !lab.acts_of("last").is_empty()).await?;
    ensure!(lab.acts_of("twice").len() == 1, "the replay was handled as another event: {:?}", lab.acts_of("twice"));
    Ok(())
}

#[tokio::test]
async fn an_empty_filter_treats_nothing() -> anyhow::Result<()> {
    let lab = pool("dead-empty").await?;
    let _worker = lab.worker()?;
    lab.publish(&[Raw::new("order.placed", "{\"a\":").content_type("application/json")]).await?;
    lab.dead_letters(1, PATIENCE).await?;
    for command in ["drop", "replay", "list"] {
        for filter in ["--id", "--type", "--reason"] {
            let (_, stderr) = expect_exit(&lab.run(&["dead", command, filter, ""]).await?, 64)?;
            ensure!(stderr.contains(filter), "{stderr}");
        }
    }
    expect_exit(&lab.run(&["dead", "show", ""]).await?, 64)?;
    ensure!(lab.letters().await?.len() == 1, "it is still there");
    ensure!(treated(&lab, &["drop", "--reason", "bad-json"]).await? == 1);
    Ok(())
}

#[tokio::test]
async fn all_letters_are_treated_only_when_that_is_said() -> anyhow::Result<()> {
    let lab = pool("dead-all").await?;
    let _worker = lab.worker()?;
    four_letters(&lab).await?;
    for command in ["replay", "drop"] {
        let (_, stderr) = expect_exit(&lab.run(&["dead", command]).await?, 64)?;
        ensure!(stderr.contains("--all"), "{stderr}");
    }
    ensure!(treated(&lab, &["drop", "--id", "nobody"]).await? == 0, "nothing matches");
    ensure!(lab.letters().await?.len() == 4, "nothing was dropped");
    ensure!(treated(&lab, &["drop", "--reason", "no-route"]).await? == 1, "one has that reason");
    ensure!(treated(&lab, &["drop", "--type", "order.paid"]).await? == 1, "one has that type");
    ensure!(treated(&lab, &["drop", "--id", "broken"]).await? == 1, "one has that id");
    let left: Vec<String> = lab.letters().await?.into_iter().map(|letter| letter.id).collect();
    ensure!(left == ["hopeless"], "{left:?}");
    ensure!(treated(&lab, &["drop", "--all"]).await? == 1 && lab.letters().await?.is_empty(), "the last one");
    Ok(())
}

#[tokio::test]
async fn replayed_after_the_repair_events_are_handled_in_the_order_of_their_key() -> anyhow::Result<()> {
    let lab = pool("dead-order").await?;
    let mut worker = lab.worker()?;
    let events: Vec<Value> = (0..60).map(|n| broken(&lab, &format!("e{n:02}"), &format!("k{}", n % 4))).collect();
    lab.send(&events).await?;
    lab.dead_letters(60, PATIENCE).await?;
    ensure!(lab.acts().len() == 60, "each was tried once");
    repair(&lab)?;
    ensure!(treated(&lab, &["replay", "--all"]).await? == 60, "all are replayed");
    until("all handled", PATIENCE, || lab.acts().len() >= 120).await?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    ensure!(lab.letters().await?.is_empty(), "{:?}", lab.letters().await?);
    let mut by_key: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for act in &lab.acts()[60..] {
        let text = |name: &str| act["event"][name].as_str().unwrap_or_default().to_owned();
        by_key.entry(text("partitionkey")).or_default().push(text("id"));
    }
    ensure!(by_key.values().map(Vec::len).sum::<usize>() == 60, "{by_key:?}");
    ensure!(by_key.values().all(|ids| ids.is_sorted()), "out of order: {by_key:?}");
    Ok(())
}

#[tokio::test]
async fn what_fails_again_dies_once_more_and_one_replay_ends() -> anyhow::Result<()> {
    let lab = pool("dead-again").await?;
    let _worker = lab.worker()?;
    lab.send(&(0..20).map(|n| broken(&lab, &format!("e{n}"), "k")).collect::<Vec<_>>()).await?;
    lab.publish(&[Raw::new("order.placed", "{\"a\":").content_type("application/json").id("broken").key("k")]).await?;
    lab.dead_letters(21, PATIENCE).await?;
    for round in 1..=3 {
        ensure!(treated(&lab, &["replay", "--all"]).await? == 21, "round {round}: each is replayed once");
        let letters = lab.dead_letters(21, PATIENCE).await?;
        let counts: HashSet<&str> = letters.iter().map(|letter| letter.header("warren-replayed")).collect();
        ensure!(counts == HashSet::from([round.to_string().as_str()]), "round {round}: {counts:?}");
        let distinct: HashSet<&str> = letters.iter().map(|letter| letter.id.as_str()).collect();
        ensure!(distinct.len() == 21, "round {round}: {distinct:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_second_copy_of_a_letter_is_absorbed_once_the_first_is_done() -> anyhow::Result<()> {
    let lab = pool("dead-copies").await?;
    let _worker = lab.worker()?;
    lab.send(&[broken(&lab, "e", "k")]).await?;
    let letter = lab.dead_letters(1, PATIENCE).await?.remove(0);
    // As a replay leaves it that is killed between the broker's confirm and its ack.
    let mut copy = Raw::new(&letter.routing_key, letter.body.clone()).to("warren.dead-copies.dead");
    copy = copy.content_type("application/json").id("e").key("k");
    for (name, value) in &letter.headers {
        copy = copy.header(name, value);
    }
    lab.publish(&[copy]).await?;
    lab.dead_letters(2, PATIENCE).await?;
    repair(&lab)?;
    ensure!(treated(&lab, &["replay", "--all"]).await? == 2, "both are replayed");
    lab.send(&[event("last", "order.placed", "k", json!({}))]).await?;
    until("the last", PATIENCE, || !lab.acts_of("last").is_empty()).await?;
    let attempts = lab.acts_of("e").len();
    ensure!(attempts == 2, "once dead, once done, and then known: {attempts} calls");
    ensure!(lab.letters().await?.is_empty(), "{:?}", lab.letters().await?);
    Ok(())
}

#[tokio::test]
async fn looking_at_the_letters_while_more_arrive_loses_none() -> anyhow::Result<()> {
    let lab = pool("dead-looking").await?;
    let _worker = lab.worker()?;
    let events: Vec<Value> = (0..200).map(|n| broken(&lab, &format!("e{n}"), &format!("k{}", n % 7))).collect();
    let sending = async {
        for chunk in events.chunks(20) {
            lab.send(chunk).await?;
        }
        Ok::<_, anyhow::Error>(())
    };
    let looking = async {
        for _ in 0..6 {
            dead(&lab, &["list", "--json"]).await?;
        }
        Ok::<_, anyhow::Error>(())
    };
    let (sent, looked) = tokio::join!(sending, looking);
    sent.and(looked)?;
    lab.dead_letters(200, PATIENCE).await?;
    let (stdout, _) = dead(&lab, &["list", "--json"]).await?;
    let listed = ids(&stdout)?;
    ensure!(listed.iter().collect::<HashSet<_>>().len() == 200 && listed.len() == 200, "{} listed", listed.len());
    Ok(())
}

#[tokio::test]
async fn a_replay_that_is_killed_in_the_middle_loses_nothing() -> anyhow::Result<()> {
    let lab = pool("dead-killed").await?;
    let mut worker = lab.worker()?;
    let events: Vec<Value> = (0..1500).map(|n| broken(&lab, &format!("e{n:04}"), &format!("k{}", n % 11))).collect();
    lab.send(&events).await?;
    lab.settled(1500, PATIENCE).await?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    let before = ready(&lab, "warren.dead-killed.dead").await?;
    ensure!(before == 1500, "{before} letters");

    // Killed when the broker has its third chunk of copies, and no ack of the letters.
    let mut command = process::command("warren-worker", &lab.environment);
    command.args(["dead", "replay", "--all"]).env("WARREN_TEST_CRASH", "letters-replayed:3");
    let mut replay = Process::start(command, &lab.path("replay.log"))?;
    let status = replay.wait(PATIENCE).await?;
    ensure!(status.signal() == Some(9), "it ended before it could be killed: {status} {}", replay.log());
    let replayed = lab.queued().await?;
    ensure!((1..1500).contains(&replayed), "{replayed} were replayed");

    repair(&lab)?;
    let again = treated(&lab, &["replay", "--all"]).await?;
    ensure!(again > 0, "letters were left");
    let _worker = lab.worker()?;
    let handled = || {
        let acts = lab.acts();
        let done: HashSet<String> = acts[1500..].iter().map(|act| act["event"]["id"].to_string()).collect();
        (done.len(), acts.len() - 1500)
    };
    until("all handled", PATIENCE, || handled().0 >= 1500).await?;
    let (distinct, calls) = handled();
    ensure!(distinct == 1500 && calls == 1500, "{distinct} events in {calls} calls");
    ensure!(lab.letters().await?.is_empty(), "{} letters", lab.letters().await?.len());
    Ok(())
}

async fn ready(lab: &Lab, queue: &str) -> anyhow::Result<u32> {
    let (connection, channel) = lab.channel().await?;
    let options = lapin::options::QueueDeclareOptions { passive: true, ..Default::default() };
    let queue = channel.queue_declare(queue.into(), options, lapin::types::FieldTable::default()).await?;
    connection.close(200, "counted".into()).await?;
    Ok(queue.message_count())
}

#[tokio::test]
async fn every_second_of_many_letters_can_be_dropped_and_none_of_them_comes_back() -> anyhow::Result<()> {
    let lab = pool("dead-second").await?;
    let mut worker = lab.worker()?;
    let kind = |n: u32| if n.is_multiple_of(2) { "order.placed" } else { "order.paid" };
    let event = |n| event(&format!("e{n:03}"), kind(n), "k", json!({"dead": true}));
    lab.send(&(0..600).map(event).collect::<Vec<_>>()).await?;
    lab.settled(600, PATIENCE).await?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    // One ack each: more than the broker's channel passes on to the queue before it closes.
    ensure!(treated(&lab, &["drop", "--type", "order.placed"]).await? == 300, "every second one");
    let left: Vec<String> = lab.dead_letters(300, PATIENCE).await?.into_iter().map(|letter| letter.id).collect();
    let wanted: Vec<String> = (0..600).filter(|n| n % 2 == 1).map(|n| format!("e{n:03}")).collect();
    ensure!(left == wanted, "{left:?}");
    Ok(())
}

#[tokio::test]
async fn a_letter_without_marks_is_listed_and_can_be_replayed() -> anyhow::Result<()> {
    let lab = pool("dead-unmarked").await?;
    let _worker = lab.worker()?;
    // As the broker's own net leaves it, or a person who moved it there by hand.
    let letter = Raw::new("order.placed", NEW).content_type("application/json").id("moved").key("k");
    lab.publish(&[letter.to("warren.dead-unmarked.dead")]).await?;
    let (stdout, _) = dead(&lab, &["list"]).await?;
    ensure!(stdout.contains("moved") && !stdout.contains("password"), "{stdout}");
    ensure!(treated(&lab, &["replay", "--id", "moved"]).await? == 1, "it is replayed");
    until("handled", PATIENCE, || lab.acts_of("moved").len() == 1).await?;
    ensure!(lab.letters().await?.is_empty(), "{:?}", lab.letters().await?);
    Ok(())
}

#[tokio::test]
async fn letters_of_a_pool_that_is_not_there_are_an_error_with_a_cure() -> anyhow::Result<()> {
    let lab = Lab::new("dead-nowhere")?;
    let output = lab.run(&["dead", "list"]).await?;
    let (_, stderr) = expect_exit(&output, 69)?;
    ensure!(stderr.contains("is WARREN_POOL right, and its topology declared?"), "{stderr}");
    Ok(())
}
