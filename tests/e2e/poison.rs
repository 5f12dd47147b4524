//! Events that kill the worker, and innocents that were near them.
use anyhow::{Context, ensure};
use lapin::BasicProperties;
use lapin::options::BasicPublishOptions;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use warren_shared::topology::BUS;
use warren_tests::{Lab, Process, Proxy, Sink, event, events, until};

const PATIENCE: Duration = Duration::from_secs(120);

/// What Kubernetes does: starts the worker again whenever it died. Returns the last one and how often it died.
async fn supervise(lab: &Lab, outcomes: usize) -> anyhow::Result<(Process, usize)> {
    let (mut worker, mut deaths, started) = (lab.worker()?, 0, Instant::now());
    loop {
        if !worker.is_running() {
            deaths += 1;
            ensure!(deaths <= 15, "the worker dies again and again{}", lab.logs());
            worker = lab.worker()?;
        }
        if lab.inbox() >= outcomes && lab.outbox() == 0 {
            return Ok((worker, deaths));
        }
        ensure!(started.elapsed() < PATIENCE, "{} of {outcomes}, {deaths} deaths{}", lab.inbox(), lab.logs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Good events, and poison somewhere among them; only the poison may die.
async fn only_poison_dies(name: &str, good: usize, keys: usize, poison: &[(usize, Value)]) -> anyhow::Result<()> {
    only_poison_dies_by(3, name, good, keys, poison).await
}

/// The same, after so many deaths.
async fn only_poison_dies_by(
    limit: usize,
    name: &str,
    good: usize,
    keys: usize,
    poison: &[(usize, Value)],
) -> anyhow::Result<()> {
    let mut lab = Lab::new(name)?;
    lab.set("WARREN_CRASH_LIMIT", &limit.to_string());
    lab.set("WARREN_ROUTES", &lab.fresh_route(""));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let mut all = events(good, keys);
    for (at, event) in poison {
        all.insert(*at, event.clone());
    }
    let ids = lab.send(&all).await?;
    let (mut worker, deaths) = supervise(&lab, all.len()).await?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    println!("{deaths} deaths of the process");
    // The other poison may kill the process between a letter's confirm and the note of it: then it is sent again.
    let dead: BTreeSet<_> = lab.dead().await?.into_iter().collect();
    for (id, reason) in &dead {
        ensure!(reason == "crash" && id.starts_with("poison"), "{id} died of {reason}{}", lab.logs());
    }
    ensure!(dead.len() == poison.len(), "the dead are {dead:?}");
    ensure!(ledger.adds_up() && ledger.handled == good, "{ledger:?}");
    ensure!(deaths <= limit * poison.len(), "{deaths} deaths of the process by {} events", poison.len());
    ensure!(deaths >= limit, "{deaths} deaths do not prove that it is the event");
    lab.calls_in_order()?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    ensure!(lab.starts() == 0 && lab.queued().await? == 0, "{} starts, {} queued", lab.starts(), lab.queued().await?);
    Ok(())
}

fn poison(id: &str, key: &str) -> Value {
    event(id, "order.placed", key, json!({"kill_parent": true}))
}

#[tokio::test]
async fn an_event_that_kills_the_worker_dies_after_three_crashes_and_alone() -> anyhow::Result<()> {
    only_poison_dies("poison-one", 2_000, 20, &[(1_000, poison("poison", "p"))]).await
}

#[tokio::test]
async fn poison_that_shares_its_key_dies_and_the_key_goes_on() -> anyhow::Result<()> {
    only_poison_dies("poison-key", 600, 20, &[(300, poison("poison", "k7"))]).await
}

#[tokio::test]
async fn poison_amid_as_many_others_as_can_run_at_once_dies_alone() -> anyhow::Result<()> {
    only_poison_dies("poison-crowd", 300, 60, &[(30, poison("poison", "p"))]).await
}

#[tokio::test]
async fn two_poisons_at_once_both_die_and_nobody_else() -> anyhow::Result<()> {
    let both = [(20, poison("poison-a", "p")), (40, poison("poison-b", "q"))];
    only_poison_dies("poison-two", 300, 40, &both).await
}

#[tokio::test]
async fn where_two_deaths_condemn_nobody_dies_for_the_others_either() -> anyhow::Result<()> {
    let both = [(20, poison("poison-a", "p")), (40, poison("poison-b", "q"))];
    only_poison_dies_by(2, "poison-harsh", 300, 40, &both).await
}

#[tokio::test]
async fn a_crowd_of_poisons_dies_and_nobody_else() -> anyhow::Result<()> {
    let crowd: Vec<_> = (0..5).map(|n| (10 * n, poison(&format!("poison-{n}"), &format!("p{n}")))).collect();
    only_poison_dies("poison-many", 200, 40, &crowd).await
}

/// Publishes a message as systems do that know nothing of Warren, without a `message_id`.
async fn publish_anonymous(lab: &Lab, body: &Value) -> anyhow::Result<()> {
    let (_connection, channel) = lab.channel().await?;
    channel.confirm_select(Default::default()).await?;
    let properties = BasicProperties::default().with_delivery_mode(2);
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let body = body.to_string();
    let confirm =
        channel.basic_publish(BUS.into(), "order.placed".into(), options, body.as_bytes(), properties).await?;
    let confirmation = confirm.await?;
    ensure!(confirmation.is_ack() && confirmation.take_message().is_none(), "the broker did not take it");
    Ok(())
}

#[tokio::test]
async fn an_anonymous_message_that_kills_the_worker_dies_too() -> anyhow::Result<()> {
    let lab = Lab::new("poison-anonymous")?;
    lab.declare().await?;
    let heard = lab.recorded().await?;
    publish_anonymous(&lab, &json!({"kill_parent": true})).await?;
    let ids = lab.send(&events(200, 20)).await?;
    let (mut worker, mut deaths, started) = (lab.worker()?, 0, Instant::now());
    while lab.dead().await?.is_empty() {
        if !worker.is_running() {
            deaths += 1;
            worker = lab.worker()?;
        }
        ensure!(deaths <= 10 && started.elapsed() < PATIENCE, "{deaths} deaths and no dead letter{}", lab.logs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    ensure!(deaths <= 3, "{deaths} deaths of the process");
    lab.settled(200, PATIENCE).await?;
    until("all heard", PATIENCE, || heard.distinct().len() >= 200).await?;
    let reasons: Vec<String> = lab.dead().await?.into_iter().map(|(_, reason)| reason).collect();
    ensure!(reasons == ["crash"], "{reasons:?}");
    let ledger = warren_tests::Ledger::of(&ids, &heard, &[])?;
    ensure!(ledger.adds_up() && ledger.handled == 200, "{ledger:?}");
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    ensure!(lab.starts() == 0 && lab.queued().await? == 0, "{} starts, {} queued", lab.starts(), lab.queued().await?);
    Ok(())
}

#[tokio::test]
async fn anonymous_messages_that_look_alike_do_not_die_for_each_other() -> anyhow::Result<()> {
    let lab = Lab::new("poison-alike")?;
    lab.declare().await?;
    let heard = lab.recorded().await?;
    // The same words twenty times, as heartbeats are: they cannot be told apart.
    for _ in 0..20 {
        publish_anonymous(&lab, &json!({"sleep": 0.2})).await?;
    }
    let mut first = lab.worker()?;
    until("they run", PATIENCE, || lab.calls().len() >= 2).await?;
    first.kill().await?;
    let mut second = lab.worker()?;
    until("all are handled", PATIENCE, || heard.distinct().len() >= 20).await?;
    ensure!(second.terminate(PATIENCE).await?.success(), "{}", second.log());
    let dead = lab.dead().await?;
    ensure!(dead.is_empty(), "one crash, and these died: {dead:?}");
    ensure!(lab.starts() == 0 && lab.queued().await? == 0, "{} starts, {} queued", lab.starts(), lab.queued().await?);
    Ok(())
}

#[tokio::test]
async fn connections_that_break_again_and_again_are_no_events_fault() -> anyhow::Result<()> {
    let mut lab = Lab::new("poison-connections")?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(""));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let _fleet = [lab.worker()?, lab.worker()?];
    let mut all = events(1_500, 30);
    all.iter_mut().for_each(|event| event["data"] = json!({"sleep": 0.004}));
    let breaking = async {
        for round in 1..=8 {
            lab.progressed(round * 150, PATIENCE).await?;
            let mut closed = 0;
            until("a connection to close", PATIENCE, || {
                closed = lab.connections("warren-worker").and_then(|names| lab.close(&names)).unwrap_or(0);
                closed > 0
            })
            .await?;
            println!("closed {closed} connections at {} recorded", lab.inbox());
        }
        anyhow::Ok(())
    };
    let (ids, broken) = tokio::join!(lab.send(&all), breaking);
    broken?;
    let ledger = lab.account(&ids?, &heard, PATIENCE).await?;
    ensure!(ledger.dead == BTreeMap::new(), "{ledger:?}{}", lab.logs());
    ensure!(ledger.adds_up() && ledger.handled == 1_500, "{ledger:?}{}", lab.logs());
    lab.calls_in_order()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_event_that_wanders_through_the_fleet_as_connections_break_is_innocent() -> anyhow::Result<()> {
    wanders("poison-wanderer", "3").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_event_that_wanders_is_innocent_where_two_deaths_condemn() -> anyhow::Result<()> {
    wanders("poison-wanderer-harsh", "2").await
}

async fn wanders(name: &str, limit: &str) -> anyhow::Result<()> {
    let mut lab = Lab::new(name)?;
    lab.set("WARREN_CRASH_LIMIT", limit);
    lab.set("WARREN_ROUTES", &lab.fresh_route(", timeout: 90s"));
    lab.set("WARREN_PARTITIONS", "1");
    lab.declare().await?;
    let heard: Sink = lab.recorded().await?;
    let (mut fleet, mut ways) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        let way = Proxy::before(&lab.url()).await?;
        fleet.push(lab.worker_with(&[("AMQP_URL", &way.url)])?);
        ways.push(way);
    }
    lab.balanced(4, PATIENCE).await?;
    let ids = lab.send(&[event("slow", "order.placed", "k", json!({"sleeps": [90, 90, 90, 3]}))]).await?;
    // Each worker in turn is its owner, is cut off from the broker, and goes on with it.
    for gone in 0..4 {
        until("the event runs at the next worker", PATIENCE, || lab.calls().len() > gone || lab.inbox() > 0).await?;
        ensure!(lab.inbox() == 0, "it has an outcome at worker {}: {:?}{}", gone + 1, lab.dead().await?, lab.logs());
        if gone < 3 {
            let (map, _) = lab.balanced(4 - gone, PATIENCE).await?;
            let owner = map.active.values().next().context("it is served")?;
            ways[owner[1..].parse::<usize>()?].shut();
        }
    }
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 1 && ledger.dead.is_empty(), "{ledger:?}{}", lab.logs());
    ensure!(lab.calls().len() == 4, "it ran {} times", lab.calls().len());
    Ok(())
}
