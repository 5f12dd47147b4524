//! The main path: every event handled once, in order, and the worker drained.
use anyhow::ensure;
use serde_json::json;
use std::time::Duration;
use warren_tests::{Lab, Ledger, event, events};

const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn every_event_is_handled_once_and_in_order() -> anyhow::Result<()> {
    let lab = Lab::new("basics-once")?;
    lab.declare().await?;
    let recorded = lab.recorded().await?;
    let mut worker = lab.worker()?;
    let ids = lab.send(&events(500, 20)).await?;
    lab.settled(500, PATIENCE).await?;
    warren_tests::until("all heard", PATIENCE, || recorded.heard().len() >= 500).await?;
    let ledger = Ledger::of(&ids, &recorded, &lab.dead().await?)?;
    ensure!(ledger.adds_up() && ledger.handled == 500 && ledger.repeats == 0, "{ledger:?}");
    ensure!(worker.terminate(PATIENCE).await?.success(), "a drain ends with 0: {}", worker.log());
    Ok(())
}

#[tokio::test]
async fn the_same_event_published_five_times_has_one_recorded_effect() -> anyhow::Result<()> {
    let lab = Lab::new("basics-five")?;
    lab.declare().await?;
    let recorded = lab.recorded().await?;
    let _worker = lab.worker()?;
    let one = event("same", "order.placed", "k", json!({}));
    for _ in 0..5 {
        lab.send(std::slice::from_ref(&one)).await?;
    }
    let ids = lab.send(&[event("last", "order.placed", "k", json!({}))]).await?;
    lab.settled(2, PATIENCE).await?;
    warren_tests::until("both heard", PATIENCE, || recorded.distinct().len() >= 2).await?;
    let ids = [ids, vec!["same".to_owned()]].concat();
    let ledger = Ledger::of(&ids, &recorded, &lab.dead().await?)?;
    ensure!(ledger.adds_up() && ledger.handled == 2, "{ledger:?}");
    ensure!(lab.calls().len() == 2, "the handler ran for a duplicate: {:?}", lab.calls());
    Ok(())
}
