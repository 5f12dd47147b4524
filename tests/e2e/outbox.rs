//! What a worker sends on, where a destination refuses it: only the keys concerned wait, and nothing is lost.
use anyhow::ensure;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use warren_shared::topology::BUS;
use warren_tests::process::expect_exit;
use warren_tests::raw::free_port;
use warren_tests::{Lab, Sink, event, events, until};

const PATIENCE: Duration = Duration::from_secs(120);

/// A queue on the bus for events of this pattern.
fn queue(lab: &Lab, name: &str, pattern: &str, arguments: Value) -> anyhow::Result<()> {
    let body = json!({"durable": true, "arguments": arguments});
    lab.rabbit.api("PUT", &format!("queues/{}/{name}", lab.name), Some(body))?;
    let to = format!("bindings/{}/e/{BUS}/q/{name}", lab.name);
    lab.rabbit.api("POST", &to, Some(json!({"routing_key": pattern})))?;
    Ok(())
}

/// So many events, each of a key of its own, that a route sends on as another type.
fn each_of_its_key(kind: &str, count: usize) -> Vec<Value> {
    (0..count).map(|n| event(&format!("{kind}-{n}"), kind, &format!("{kind}-key-{n}"), json!({}))).collect()
}

#[tokio::test]
async fn a_destination_that_refuses_stops_no_other_key_and_gets_all_of_it_later() -> anyhow::Result<()> {
    const REFUSED: usize = 600;
    let mut lab = Lab::new("outbox-refused")?;
    let address = format!("127.0.0.1:{}", free_port()?);
    lab.set("WARREN_ADMIN_ADDR", &address);
    lab.set("WARREN_ROUTES", &lab.fresh_route("}, {on: up, emit: full.up"));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    // At its limit from the beginning: the broker refuses whatever would go there.
    queue(&lab, "full", "full.#", json!({"x-max-length": 0, "x-overflow": "reject-publish"}))?;
    lab.send(&each_of_its_key("up", REFUSED)).await?;
    let mut worker = lab.worker()?;
    until("all of them wait", PATIENCE, || lab.inbox() >= REFUSED && lab.outbox() == REFUSED).await?;

    let since = Instant::now();
    let ids = lab.send(&events(300, 20)).await?;
    until("the others are heard", PATIENCE, || heard.distinct().len() >= ids.len()).await?;
    println!("300 events beside {REFUSED} keys that wait: {:?}", since.elapsed());
    lab.calls_in_order()?;

    let why = "basic.nack";
    let (status, ready) = lab.page(&address, "/readyz")?;
    ensure!(status == 200 && ready.contains(why) && ready.contains("full.up"), "{status} {ready}");
    let held = || lab.metric(&address, "warren_outbox_held", &[]);
    until("the gauge tells", PATIENCE, || held().is_ok_and(|held| held == Some(REFUSED as f64))).await?;
    let (table, _) = expect_exit(&lab.run(&["status"]).await?, 1)?;
    ensure!(table.contains(why) && table.contains(&format!("{REFUSED} outgoing messages")), "{table}");

    // It need not wait for them when it is told to stop: the next owner has them.
    let since = Instant::now();
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    ensure!(since.elapsed() < Duration::from_secs(15), "the drain took {:?}", since.elapsed());
    ensure!(lab.outbox() == REFUSED, "{} rows are left", lab.outbox());

    lab.rabbit.api("DELETE", &format!("queues/{}/full", lab.name), None)?;
    let sink = Sink::listen(&lab.url(), "up", BUS, "full.#").await?;
    let mut worker = lab.worker()?;
    // A first delivery from each partition.
    let mut more = events(60, 20);
    more.iter_mut().for_each(|event| event["id"] = json!(format!("more-{}", event["id"])));
    lab.send(&more).await?;
    until("all of them arrive", PATIENCE, || sink.distinct().len() == REFUSED && lab.outbox() == 0).await?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    Ok(())
}

#[tokio::test]
async fn what_the_broker_will_never_take_is_dead_lettered_and_replayed_to_where_it_was_to_go() -> anyhow::Result<()> {
    let mut lab = Lab::new("outbox-never")?;
    let process = "processes: [{name: flow, on: flow.placed, steps: {one: {do: secret.step, final: true}}}]";
    let routes = lab.fresh_route("}, {on: leak, emit: secret.told").replace("routes:", &format!("{process}\nroutes:"));
    lab.set("WARREN_ROUTES", &routes);
    lab.declare().await?;
    queue(&lab, "secrets", "secret.#", json!({}))?;
    let topics = format!("topic-permissions/{}/guest", lab.name);
    let may = |write: &str| json!({"exchange": BUS, "write": write, "read": ".*"});
    lab.rabbit.api("PUT", &topics, Some(may(r"^(?!secret\.(told|step)$)")))?;
    let (heard, ended) = (lab.recorded().await?, Sink::listen(&lab.url(), "ended", BUS, "flow.*").await?);
    let mut all = events(200, 5);
    for n in 0..5 {
        // Of the keys of others.
        all.insert(20 * n + 7, event(&format!("leak-{n}"), "leak", &format!("k{n}"), json!({"n": n})));
    }
    all.push(event("flow", "flow.placed", "flow", json!({})));
    lab.send(&all).await?;
    let mut worker = lab.worker()?;
    until("the others are heard", PATIENCE, || heard.distinct().len() >= 200).await?;
    until("the process ends", PATIENCE, || ended.distinct().iter().any(|end| end.kind() != "flow.placed")).await?;
    let kinds: Vec<String> = ended.distinct().iter().map(|end| end.kind().to_owned()).collect();
    ensure!(kinds.contains(&"flow.compensated".to_owned()), "{kinds:?}");
    until("nothing is left", PATIENCE, || lab.outbox() == 0).await?;
    // The broker closes the channel over each of them: what is under way beside it may be sent twice, under its id.
    let dead = async || Ok::<BTreeSet<_>, anyhow::Error>(lab.dead().await?.into_iter().collect());
    let letters = dead().await?;
    ensure!(letters.len() == 6 && letters.iter().all(|(_, reason)| reason == "unsendable"), "{letters:?}");

    lab.rabbit.api("PUT", &topics, Some(may(".*")))?;
    expect_exit(&lab.run(&["dead", "replay", "--type", "secret.told"]).await?, 0)?;
    let taken = lab.take_all("secrets").await?;
    let told: BTreeSet<_> = taken
        .iter()
        .filter(|message| message.routing_key == "secret.told")
        .map(|message| &message.message_id)
        .collect();
    ensure!(told.len() == 5, "{told:?}");
    ensure!(dead().await?.len() == 1, "the step's letter stays: {:?}", dead().await?);
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    Ok(())
}

#[tokio::test]
async fn what_is_too_large_for_its_own_broker_leaves_a_letter_and_stops_nobody() -> anyhow::Result<()> {
    let mut lab = Lab::with_own_broker_set("outbox-large", "max_message_size = 100000")?;
    // Twice what came in: only what goes out is too large.
    lab.set("WARREN_ROUTES", &lab.fresh_route("}, {on: grow, transform: '{twice: [., .]}', emit: grown.up"));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let mut all = events(100, 5);
    all.insert(10, event("grows", "grow", "k1", json!({"fill": "x".repeat(60_000)})));
    lab.send(&all).await?;
    let mut worker = lab.worker()?;
    until("the others are heard", PATIENCE, || heard.distinct().len() >= 100).await?;
    let letters = lab.dead_letters(1, PATIENCE).await?;
    ensure!(letters[0].reason() == "unsendable" && letters[0].body.is_empty(), "{:?}", letters[0]);
    ensure!(
        letters[0].header("warren-dead-error").contains("120"),
        "its size is told: {}",
        letters[0].header("warren-dead-error")
    );
    until("nothing is left", PATIENCE, || lab.outbox() == 0).await?;
    lab.calls_in_order()?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    Ok(())
}

#[tokio::test]
async fn what_would_be_larger_than_a_body_may_be_fails_where_it_is_made() -> anyhow::Result<()> {
    let mut lab = Lab::new("outbox-sizes")?;
    lab.set("WARREN_BODY_LIMIT", "2000");
    let routes = "processes: [{name: flow, on: flow.placed, steps: {one: {do: made.step, with: '{twice: [.input, .input]}', final: true}}}]
routes: [{on: grow, transform: '{twice: [., .]}', emit: made.up},
  {on: part, gather: {emit: made.whole, group: '\"g\"', count: '2'}}]";
    lab.set("WARREN_ROUTES", routes);
    lab.declare().await?;
    let ended = Sink::listen(&lab.url(), "ended", BUS, "flow.*").await?;
    let made = Sink::listen(&lab.url(), "made", BUS, "made.#").await?;
    let large = |id: &str, kind: &str| event(id, kind, "k", json!({"fill": "x".repeat(1200)}));
    let small = event("small", "grow", "k", json!({"fill": "x"}));
    lab.send(&[large("grows", "grow"), large("a", "part"), large("b", "part"), large("f", "flow.placed"), small])
        .await?;
    let mut worker = lab.worker()?;
    until("the process ends", PATIENCE, || ended.distinct().iter().any(|end| end.kind() == "flow.compensated")).await?;
    let mut letters: Vec<(String, String)> = Vec::new();
    for letter in lab.dead_letters(2, PATIENCE).await? {
        let error = letter.header("warren-dead-error");
        ensure!(letter.reason() == "permanent" && error.contains("2000"), "{letter:?}");
        letters.push((letter.id.clone(), error.split(':').next().unwrap_or_default().to_owned()));
    }
    letters.sort();
    let wanted = [("b", "gather"), ("grows", "transform")].map(|(id, what)| (id.to_owned(), what.to_owned()));
    ensure!(letters == wanted, "{letters:?}");
    until("what fits goes out", PATIENCE, || made.distinct().len() == 1).await?;
    ensure!(made.distinct()[0].kind() == "made.up", "{:?}", made.distinct());
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    Ok(())
}

#[tokio::test]
async fn an_exchange_that_is_closed_to_a_worker_is_asked_now_and_then_and_stops_nothing_that_goes_elsewhere()
-> anyhow::Result<()> {
    let mut lab = Lab::new("outbox-closed")?;
    let address = format!("127.0.0.1:{}", free_port()?);
    lab.set("WARREN_ADMIN_ADDR", &address);
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let mut all = events(60, 30);
    for n in 0..5 {
        all.push(event(&format!("dies-{n}"), "order.placed", &format!("dies-{n}"), json!({"dead": true})));
    }
    lab.send(&all).await?;
    let permissions = format!("permissions/{}/guest", lab.name);
    let may = |write: &str| json!({"configure": ".*", "write": write, "read": ".*"});
    lab.rabbit.api("PUT", &permissions, Some(may(r"^(?!warren\.events$)")))?;
    let mut worker = lab.worker()?;
    until("the others have gone", PATIENCE, || lab.inbox() == 65 && lab.outbox() == 60).await?;
    // The broker closes the channel over each refusal: what is under way beside it may be sent twice, under its id.
    let dead: BTreeSet<_> = lab.dead().await?.into_iter().map(|(id, _)| id).collect();
    ensure!(dead.len() == 5 && dead.iter().all(|id| id.starts_with("dies-")), "{dead:?}");
    let held = || lab.metric(&address, "warren_outbox_held", &[]);
    until("the gauge tells", PATIENCE, || held().is_ok_and(|held| held == Some(60.0))).await?;
    let (status, ready) = lab.page(&address, "/readyz")?;
    ensure!(status == 200 && ready.contains("ACCESS_REFUSED"), "{status} {ready}");
    lab.rabbit.api("PUT", &permissions, Some(may(".*")))?;
    until("all of them arrive", PATIENCE, || heard.distinct().len() == 60 && lab.outbox() == 0).await?;
    lab.calls_in_order()?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    Ok(())
}
