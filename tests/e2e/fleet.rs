//! A pool of workers behaves as one: balanced, failed over, handed over, and in order all the while.
use anyhow::ensure;
use std::time::Duration;
use warren_tests::{Fleet, Lab, Trace, until};

const PATIENCE: Duration = Duration::from_secs(120);

/// A pool of one lane.
async fn lab(name: &str, partitions: &str) -> anyhow::Result<Lab> {
    let mut lab = Lab::new(name)?;
    lab.set("WARREN_PARTITIONS", partitions);
    lab.set("WARREN_ROUTES", "");
    lab.set("WARREN_SUBSCRIBE", "order.#");
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
    let load = lab.load(1500, 960)?;
    lab.progressed(3_000, PATIENCE).await?;
    let (mut moved, mut ideal) = (0, 0);
    for count in [3, 8, 2] {
        let before = lab.inbox();
        fleet.scale(&lab, count).await?;
        let (after, took) = lab.balanced(count, Duration::from_secs(10)).await?;
        let (now, least) = (map.moved(&after), map.ideal(&after));
        println!(
            "{count} workers: {now} partitions moved, {least} had to, balanced after {took:.1?}, spread {}",
            after.spread()
        );
        (moved, ideal, map) = (moved + now, ideal + least, after);
        lab.progressed(before + 5_000, PATIENCE).await?;
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
