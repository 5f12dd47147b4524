//! Sealed payloads: nobody on the way reads them or changes them, and keys are changed while events are under way.
use anyhow::{Context, ensure};
use lapin::options::{QueueBindOptions, QueueDeclareOptions};
use serde_json::{Value, json};
use std::time::Duration;
use warren_publisher::publish::Options;
use warren_publisher::{Broker, Publisher};
use warren_shared::Message;
use warren_shared::env::Secret;
use warren_tests::{Lab, Process, event, until};

const PATIENCE: Duration = Duration::from_secs(60);
/// What nobody but a handler may read.
const CARD: &str = "4111-1111-1111-1111";
const ONE: &str = "one:MTExMTExMTExMTExMTExMTExMTExMTExMTExMTExMTE=";
const TWO: &str = "two:MjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjI=";

/// A pool whose handler notes each event with its data, and emits one with the same data.
fn lab(name: &str) -> anyhow::Result<Lab> {
    let mut lab = Lab::new(name)?;
    let actor = warren_tests::broker::root().join("tests/handlers/actor.py");
    let (actor, notes) = (actor.display(), lab.path("notes").display().to_string());
    let routes = format!(
        "routes: [{{on: 'order.#', exec: [python3, '{actor}', '{notes}'], retry: {{attempts: 2, backoff: 1s}}}}]"
    );
    lab.set("WARREN_ROUTES", &routes);
    Ok(lab)
}

fn order(id: &str, mut data: Value) -> Value {
    data["card"] = json!(CARD);
    let mut order = event(id, "order.placed", "k", data);
    order["datacontenttype"] = json!("application/json");
    order
}

/// The data that the handler was given, by the event's id.
fn noted(lab: &Lab, id: &str) -> Option<Value> {
    let notes = std::fs::read_to_string(lab.path("notes")).unwrap_or_default();
    let mut notes = notes.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    notes.find(|note| note["event"]["id"] == id).map(|note| note["event"]["data"].clone())
}

async fn handled(lab: &Lab, id: &str) -> anyhow::Result<()> {
    until("it is handled", PATIENCE, || noted(lab, id).is_some()).await.with_context(|| lab.logs())?;
    ensure!(noted(lab, id).is_some_and(|data| data["card"] == CARD), "{:?}", noted(lab, id));
    Ok(())
}

async fn stop(mut worker: Process) -> anyhow::Result<()> {
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    ensure!(!worker.log().contains(CARD), "{}", worker.log());
    Ok(())
}

/// Takes what waits in the partitions.
async fn waiting(lab: &Lab) -> anyhow::Result<Vec<Message>> {
    let mut all = Vec::new();
    for queue in lab.topology()?.queues() {
        all.extend(lab.take_all(&queue).await?);
    }
    Ok(all)
}

fn is_sealed(message: &Message, key: &str) -> anyhow::Result<()> {
    ensure!(message.sealed_with().as_deref() == Some(key), "{:?}", message.headers);
    ensure!(!String::from_utf8_lossy(&message.body).contains("card"), "the body can be read");
    ensure!(message.content_type.as_deref() == Some("application/json"), "{:?}", message.content_type);
    Ok(())
}

/// A queue that hears events of this type on the bus.
async fn ear(lab: &Lab, kind: &str) -> anyhow::Result<()> {
    let (connection, channel) = lab.channel().await?;
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare("ear".into(), options, Default::default()).await?;
    let (queue, bus) = ("ear".into(), "warren.events".into());
    channel.queue_bind(queue, bus, kind.into(), QueueBindOptions::default(), Default::default()).await?;
    connection.close(200, "bound".into()).await?;
    Ok(())
}

/// Publishes messages as they are.
async fn publish(lab: &Lab, messages: Vec<Message>) -> anyhow::Result<()> {
    let broker = Broker::new(Secret::new(lab.url()), "seal test");
    let link = broker.connect("publish").await?;
    for outcome in Publisher::start(broker, link, Options::default()).publish_all(messages).await {
        let _proof = outcome?;
    }
    Ok(())
}

#[tokio::test]
async fn only_a_handler_reads_what_was_sent_and_what_it_emits_is_sealed_too() -> anyhow::Result<()> {
    let mut lab = lab("seal-way")?;
    lab.set("WARREN_PAYLOAD_KEYS", ONE);
    lab.declare().await?;
    lab.send(&[order("looked-at", json!({}))]).await?;
    let seen = waiting(&lab).await?;
    ensure!(seen.len() == 1, "{}", seen.len());
    is_sealed(&seen[0], "one")?;
    ensure!(seen[0].correlation_id.as_deref() == Some("k"), "what routes stays readable");

    ear(&lab, "order.emitted").await?;
    let worker = lab.worker()?;
    let emitting =
        json!({"emit": [{"type": "order.emitted", "datacontenttype": "application/json", "data": {"card": CARD}}]});
    lab.send(&[order("e", emitting), order("again", json!({"fail": 1}))]).await?;
    handled(&lab, "e").await?;
    handled(&lab, "again").await?;
    lab.settled(2, PATIENCE).await?;
    let emitted = lab.take_all("ear").await?;
    ensure!(emitted.len() == 1, "{}", emitted.len());
    is_sealed(&emitted[0], "one")?;
    // An event of a system without keys is taken, and its copies leave sealed.
    let mut plain = process("warren-publisher", &lab, "")?;
    plain.args(["send", "-"]);
    let line = format!("{}\n", order("plain", json!({"dead": true})));
    let output = warren_tests::process::output(plain, line.into_bytes()).await?;
    warren_tests::process::expect_exit(&output, 0)?;
    handled(&lab, "plain").await?;
    lab.dead_letters(1, PATIENCE).await?;
    stop(worker).await?;
    let dead = lab.take_all("warren.seal-way.dead").await?;
    is_sealed(&dead[0], "one")
}

/// A command with these keys instead.
fn process(name: &str, lab: &Lab, keys: &str) -> anyhow::Result<std::process::Command> {
    let mut command = warren_tests::process::command(name, &lab.environment);
    command.env("WARREN_PAYLOAD_KEYS", keys);
    Ok(command)
}

#[tokio::test]
async fn keys_rotate_and_whoever_lacks_one_leaves_the_event_sealed_for_a_replay() -> anyhow::Result<()> {
    let mut lab = lab("seal-rotation")?;
    lab.declare().await?;
    for (keys, id) in [(ONE.to_owned(), "by-one"), (format!("{TWO},{ONE}"), "by-two")] {
        lab.set("WARREN_PAYLOAD_KEYS", &keys);
        lab.send(&[order(id, json!({}))]).await?;
    }
    // Who has no second key yet, and who has none at all, give the events to a person.
    let worker = lab.worker_with(&[("WARREN_PAYLOAD_KEYS", ONE)])?;
    handled(&lab, "by-one").await?;
    lab.dead_letters(1, PATIENCE).await?;
    stop(worker).await?;
    lab.send(&[order("by-two-2", json!({}))]).await?;
    let worker = lab.worker_with(&[("WARREN_PAYLOAD_KEYS", "")])?;
    lab.dead_letters(2, PATIENCE).await?;
    stop(worker).await?;
    ensure!(lab.dead().await?.iter().all(|(_, reason)| reason == "sealed"), "{:?}", lab.dead().await?);
    let shown = lab.run(&["dead", "show", "by-two"]).await?;
    let (shown, _) = warren_tests::process::expect_exit(&shown, 0)?;
    ensure!(shown.contains("give WARREN_PAYLOAD_KEYS the key 'two', then replay"), "{shown}");
    ensure!(shown.contains("sealed with the key 'two'") && !shown.contains(CARD), "{shown}");

    let worker = lab.worker()?;
    warren_tests::process::expect_exit(&lab.run(&["dead", "replay", "--all"]).await?, 0)?;
    handled(&lab, "by-two").await?;
    handled(&lab, "by-two-2").await?;
    stop(worker).await
}

#[tokio::test]
async fn a_payload_that_was_changed_or_moved_dies_sealed_and_reaches_no_handler() -> anyhow::Result<()> {
    let mut lab = lab("seal-tampered")?;
    lab.set("WARREN_PAYLOAD_KEYS", ONE);
    lab.declare().await?;
    lab.send(&[order("good", json!({})), order("other", json!({}))]).await?;
    let mut taken = waiting(&lab).await?;
    taken.sort_by(|a, b| a.message_id.cmp(&b.message_id));
    let [good, other] = &taken[..] else { anyhow::bail!("{} events", taken.len()) };
    let bus = |mut message: Message| {
        message.strip();
        message.exchange = "warren.events".into();
        message
    };
    let mut changed = bus(other.clone());
    changed.body[20] ^= 1;
    let mut moved = bus(other.clone());
    moved.message_id = Some("moved".into());
    moved.set("cloudEvents_id", "moved");
    let mut elsewhere = bus(other.clone());
    elsewhere.message_id = Some("elsewhere".into());
    elsewhere.set("cloudEvents_partitionkey", "another");
    let mut cut = bus(other.clone());
    cut.body.truncate(11);
    let worker = lab.worker()?;
    publish(&lab, vec![changed.clone(), moved, elsewhere, cut, bus(good.clone())]).await?;
    handled(&lab, "good").await?;
    lab.dead_letters(4, PATIENCE).await?;
    ensure!(lab.dead().await?.iter().all(|(_, reason)| reason == "sealed"), "{:?}", lab.dead().await?);
    ensure!(noted(&lab, "other").is_none() && noted(&lab, "moved").is_none(), "a handler was given it");
    stop(worker).await?;
    let dead = lab.take_all("warren.seal-tampered.dead").await?;
    ensure!(dead.iter().any(|letter| letter.body == changed.body), "it is left as it came");
    for letter in &dead {
        is_sealed(letter, "one")?;
    }
    Ok(())
}

#[tokio::test]
async fn while_not_everybody_has_the_keys_nothing_is_sealed_but_what_came_so() -> anyhow::Result<()> {
    let mut lab = lab("seal-begin")?;
    lab.declare().await?;
    lab.set("WARREN_PAYLOAD_KEYS", ONE);
    lab.send(&[order("sealed", json!({"dead": true}))]).await?;
    lab.set("WARREN_PAYLOAD_KEYS", &format!("plain,{ONE}"));
    lab.send(&[order("open", json!({"dead": true}))]).await?;
    let worker = lab.worker()?;
    handled(&lab, "sealed").await?;
    handled(&lab, "open").await?;
    lab.dead_letters(2, PATIENCE).await?;
    stop(worker).await?;
    let dead = lab.take_all("warren.seal-begin.dead").await?;
    for letter in dead {
        match letter.message_id.as_deref() {
            Some("sealed") => is_sealed(&letter, "one")?,
            _ => ensure!(letter.sealed_with().is_none(), "{:?}", letter.headers),
        }
        ensure!(letter.header("warren-seal").is_none(), "{:?}", letter.headers);
    }
    Ok(())
}
