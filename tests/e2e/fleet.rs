//! A pool of workers behaves as one: balanced, failed over, handed over, and in order all the while.
use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::json;
use std::collections::HashMap;
use std::time::{Duration, Instant};
use warren_tests::process::expect_exit;
use warren_tests::trace::{self, Call};
use warren_tests::{Answers, Fleet, Lab, Map, Proxy, Trace, event, length, quantile, until};

const PATIENCE: Duration = Duration::from_secs(120);

/// A pool of one lane.
async fn lab(name: &str, partitions: &str) -> anyhow::Result<Lab> {
    let mut lab = Lab::new(name)?;
    lab.set("WARREN_PARTITIONS", partitions);
    lab.set("WARREN_ROUTES", "");
    lab.set("WARREN_SUBSCRIBE", "order.#");
    // What is measured here rests on the timers as they are.
    lab.set("WARREN_TEST_PACE", "1");
    lab.declare().await?;
    lab.gather().await?;
    Ok(lab)
}

/// Every event once, in the order of its key, by one worker at a time.
async fn kept(lab: &Lab, ids: &[String]) -> anyhow::Result<Trace> {
    let ledger = lab.tally(ids, PATIENCE).await?;
    let trace = Trace::read(&lab.dir)?;
    let verdict = trace.verdict();
    println!("handlers: {verdict:?}");
    ensure!(ledger.adds_up(), "{ledger}{}", lab.logs());
    ensure!(verdict.inversions == 0 && verdict.overlaps == 0, "{verdict:?}");
    Ok(trace)
}

#[tokio::test]
async fn one_three_eight_two_workers_share_the_partitions_and_keep_every_promise() -> anyhow::Result<()> {
    let lab = lab("fleet-scale", "48").await?;
    let mut fleet = Fleet::default();
    fleet.scale(&lab, 1).await?;
    let (mut map, _) = lab.balanced(1, PATIENCE).await?;
    // What two slow cores bear with everything built for debugging.
    let load = lab.load(250, 960)?;
    let stretch = length(1_000, 3_000);
    lab.progressed(stretch, PATIENCE).await?;
    let (mut moved, mut ideal) = (0, 0);
    for count in [3, 8, 2] {
        let before = lab.inbox();
        let changed = Instant::now();
        fleet.scale(&lab, count).await?;
        // Until they are all heard, programs start, and on two cores that take each other's time.
        lab.until_map(count, PATIENCE, |map| map.workers == count).await?;
        let starting = changed.elapsed();
        let even = |map: &Map| map.workers == count && map.active.len() == 48 && map.spread() <= 1;
        let (_, even) = lab.until_map(count, Duration::from_secs(10), even).await.context("not even")?;
        let (after, settled) = lab.balanced(count, PATIENCE).await?;
        let (now, least) = (map.moved(&after), map.ideal(&after));
        println!(
            "{count} workers: {now} partitions moved, {least} had to; all heard after {starting:.1?}, even {even:.1?} later, \
             standbys too after another {settled:.1?}, spread {}",
            after.spread()
        );
        (moved, ideal, map) = (moved + now, ideal + least, after);
        lab.progressed(before + stretch, PATIENCE).await?;
    }
    ensure!(moved * 10 <= ideal * 12, "{moved} partitions moved, {ideal} had to");
    let ids = load.finish().await?;
    let trace = kept(&lab, &ids).await?;
    ensure!(trace.verdict().repeats == 0, "nobody was killed: {:?}", trace.verdict());
    fleet.stop(&lab).await
}

#[tokio::test]
async fn a_second_store_in_a_pool_is_refused() -> anyhow::Result<()> {
    let lab = lab("fleet-stores", "3").await?;
    let mut fleet = Fleet::default();
    fleet.start(&lab)?;
    lab.balanced(1, PATIENCE).await?;
    let other = format!("sqlite://{}", lab.path("other.db").display());
    let mut stranger =
        lab.worker_with(&[("DATABASE_URL", &other), ("WARREN_ROUTES", "routes: [{on: 'order.#', log: {}}]")])?;
    let status = stranger.wait(PATIENCE).await?;
    ensure!(status.code() == Some(64), "{status}\n{}", stranger.log());
    ensure!(stranger.log().contains("keeps its records in another store"), "{}", stranger.log());
    ensure!(stranger.log().contains("DATABASE_URL"), "{}", stranger.log());
    until("the worker that was there goes on", PATIENCE, || {
        fleet.workers.values_mut().all(|worker| worker.is_running())
    })
    .await?;
    lab.balanced(1, PATIENCE).await?;
    fleet.stop(&lab).await
}

/// How long each partition of a worker that stopped was not served, in milliseconds, sorted.
fn outages(trace: &Trace, places: &HashMap<String, String>, lost: &[String], gone: &str, at: u64) -> Vec<f64> {
    let next = |queue: &String| {
        let of = |call: &&Call| call.worker != gone && call.begin >= at && places.get(&call.key) == Some(queue);
        trace.calls.iter().find(of).map_or(f64::INFINITY, |call| (call.begin - at) as f64 / 1e6)
    };
    let mut outages: Vec<f64> = lost.iter().map(next).collect();
    outages.sort_by(f64::total_cmp);
    outages
}

const KEYS: usize = 120;

/// Three workers at work, the partitions of one of them, and where each key goes.
async fn three(lab: &Lab) -> anyhow::Result<(Fleet, Vec<String>, HashMap<String, String>)> {
    let places = lab.places((0..KEYS).map(|n| format!("k{n}"))).await?;
    let mut fleet = Fleet::default();
    fleet.scale(lab, 3).await?;
    let (map, _) = lab.balanced(3, PATIENCE).await?;
    let owned = map.active.iter().filter(|(_, worker)| *worker == "w0").map(|(queue, _)| queue.clone()).collect();
    Ok((fleet, owned, places))
}

#[tokio::test]
async fn the_standby_takes_over_from_a_killed_owner_within_two_seconds() -> anyhow::Result<()> {
    let lab = lab("fleet-kill", "12").await?;
    let (mut fleet, owned, places) = three(&lab).await?;
    let load = lab.load(600, KEYS)?;
    lab.progressed(1_500, PATIENCE).await?;
    let at = trace::now();
    fleet.workers.get_mut("w0").context("it runs")?.kill().await?;
    fleet.workers.remove("w0");
    lab.progressed(lab.inbox() + 2_400, PATIENCE).await?;
    // The survivors share what it had, again with a standby each.
    let (_, took) = lab.balanced(2, Duration::from_secs(15)).await?;
    let ids = load.finish().await?;
    let trace = kept(&lab, &ids).await?;
    let outages = outages(&trace, &places, &owned, "w0", at);
    println!(
        "kill -9: {} partitions, outage median {:.0} ms, most {:.0} ms; two lines each again after {took:.1?}",
        owned.len(),
        quantile(&outages, 0.5),
        quantile(&outages, 1.0)
    );
    ensure!(!outages.is_empty() && quantile(&outages, 1.0) <= 2_000.0, "{outages:?}{}", lab.logs());
    fleet.stop(&lab).await
}

#[tokio::test]
async fn the_standby_takes_over_from_a_frozen_owner_which_breaks_nothing_when_it_thaws() -> anyhow::Result<()> {
    let mut lab = lab("fleet-freeze", "12").await?;
    lab.set("AMQP_URL", &format!("{}?heartbeat=5", lab.url()));
    let (mut fleet, owned, places) = three(&lab).await?;
    let load = lab.load(300, KEYS)?;
    lab.progressed(900, PATIENCE).await?;
    // Whoever is frozen inside a transaction of SQLite takes the file's lock along, and the whole pool waits for it: that
    // is no matter of the fleet, so it is frozen outside of one.
    let at = loop {
        let at = trace::now();
        fleet.workers["w0"].freeze().await?;
        if !lab.store_is_locked()? {
            break at;
        }
        fleet.workers["w0"].signal(Signal::CONT)?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    // It thaws into a fleet that has gone on without it.
    let served_again = || {
        let outages = Trace::read(&lab.dir).map(|trace| outages(&trace, &places, &owned, "w0", at));
        outages.is_ok_and(|outages| outages.iter().all(|outage| outage.is_finite()))
    };
    until("all that it had is served", PATIENCE, served_again).await.with_context(|| lab.logs())?;
    tokio::time::sleep(length(Duration::ZERO, Duration::from_secs(15))).await;
    fleet.workers["w0"].signal(Signal::CONT)?;
    lab.progressed(lab.inbox() + 600, PATIENCE).await?;
    lab.balanced(3, Duration::from_secs(30)).await?;
    let ids = load.finish().await?;
    let ledger = lab.tally(&ids, PATIENCE).await?;
    let trace = Trace::read(&lab.dir)?;
    let (verdict, outages) = (trace.verdict(), outages(&trace, &places, &owned, "w0", at));
    println!(
        "frozen: {} partitions, outage median {:.0} ms, most {:.0} ms; {verdict:?}",
        owned.len(),
        quantile(&outages, 0.5),
        quantile(&outages, 1.0)
    );
    ensure!(ledger.adds_up() && verdict.inversions == 0, "{ledger} {verdict:?}{}", lab.logs());
    ensure!(!outages.is_empty() && quantile(&outages, 1.0) <= 10_000.0, "{outages:?}{}", lab.logs());
    fleet.stop(&lab).await
}

#[tokio::test]
async fn rolling_restarts_under_load_leave_no_partition_unserved_for_long() -> anyhow::Result<()> {
    let lab = lab("fleet-rolling", "12").await?;
    let (mut fleet, _, places) = three(&lab).await?;
    let load = lab.load(600, KEYS)?;
    lab.progressed(1_000, PATIENCE).await?;
    let rounds = length(2, 10);
    for _ in 0..rounds {
        let old: Vec<String> = fleet.workers.keys().cloned().collect();
        for name in old {
            fleet.start(&lab)?;
            // As a Deployment does it: the next goes when the new one takes events.
            lab.balanced(4, PATIENCE).await?;
            fleet.drain(&name).await?;
        }
    }
    lab.balanced(3, PATIENCE).await?;
    let ids = load.finish().await?;
    let trace = kept(&lab, &ids).await?;
    let gaps = trace.gaps(|key| places.get(key).cloned());
    println!(
        "{} restarts, {} hand-overs: gap median {:.0} ms, p99 {:.0} ms, most {:.0} ms",
        3 * rounds,
        gaps.len(),
        quantile(&gaps, 0.5),
        quantile(&gaps, 0.99),
        quantile(&gaps, 1.0)
    );
    ensure!(trace.verdict().repeats == 0, "nobody was killed: {:?}", trace.verdict());
    ensure!(
        gaps.len() > 10 * rounds && quantile(&gaps, 0.99) <= 1_000.0,
        "{:?}",
        &gaps[gaps.len().saturating_sub(20)..]
    );
    fleet.stop(&lab).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_the_broker_has_forgotten_is_replaced() -> anyhow::Result<()> {
    // As rabbitmq-server 17317: the queue has messages and an active consumer, and delivers nothing on its connection.
    let mut lab = lab("fleet-silent", "1").await?;
    let way = Proxy::before(&lab.url()).await?;
    lab.set("WARREN_PREFETCH", "10");
    let through = way.url.clone();
    let mut fleet = Fleet::default();
    way.answers(Answers::Undelivered);
    fleet.start_with(&lab, &[("AMQP_URL", &through)])?;
    until("it takes events", PATIENCE, || fleet.workers["w0"].log().contains("owns 1 partitions")).await?;
    let all = warren_tests::events(100, 10);
    let ids = lab.send(&all).await?;
    ensure!(lab.inbox() == 0, "its deliveries were to be swallowed");
    way.answers(Answers::Pass);
    let began = Instant::now();
    lab.settled(100, Duration::from_secs(60)).await?;
    println!("served again after {:.1?}", began.elapsed());
    let log = fleet.workers["w0"].log();
    ensure!(log.contains("the broker delivers none to its first consumer"), "{log}");
    kept(&lab, &ids).await?;
    fleet.stop(&lab).await
}

#[tokio::test]
async fn another_number_of_partitions_is_refused_and_status_says_what_needs_a_person() -> anyhow::Result<()> {
    let lab = lab("fleet-status", "3").await?;
    let status = lab.run(&["status"]).await?;
    let (table, _) = expect_exit(&status, 1)?;
    ensure!(table.contains("needs a person: no consumer: warren.fleet-status.normal.p00"), "{table}");
    let mut fleet = Fleet::default();
    fleet.start(&lab)?;
    lab.balanced(1, PATIENCE).await?;
    let mut stranger =
        lab.worker_with(&[("WARREN_PARTITIONS", "4"), ("WARREN_ROUTES", "routes: [{on: 'order.#', log: {}}]")])?;
    let status = stranger.wait(PATIENCE).await?;
    ensure!(
        status.code() == Some(64) && stranger.log().contains("WARREN_PARTITIONS=3, this one 4"),
        "{status}\n{}",
        stranger.log()
    );
    let (table, _) = expect_exit(&lab.run(&["status"]).await?, 0)?;
    println!("{table}");
    ensure!(table.contains("w0") && table.contains("normal (weight 1)"), "{table}");
    // What nobody takes is dead-lettered, and that needs somebody.
    lab.send(&[event("odd", "unheard.of", "k", json!({}))]).await.expect_err("nobody subscribes to it");
    let exchange = "warren.fleet-status";
    let (_connection, channel) = lab.channel().await?;
    let properties = lapin::BasicProperties::default().with_message_id("odd".into()).with_type("unheard.of".into());
    channel.basic_publish(exchange.into(), "unheard.of".into(), Default::default(), b"{}", properties).await?;
    lab.dead_letters(1, PATIENCE).await?;
    let (table, _) = expect_exit(&lab.run(&["status"]).await?, 1)?;
    ensure!(table.contains("1 dead letters: see 'warren-worker dead list'"), "{table}");
    fleet.stop(&lab).await
}
