//! Times that are waited for, and what is remembered of them: no machine's clock decides.
use anyhow::ensure;
use serde_json::json;
use std::time::{Duration, Instant};
use warren_tests::process::expect_exit;
use warren_tests::{Lab, Raw, event, until};

const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test]
async fn a_copy_carries_what_is_left_of_its_wait_and_no_moment_that_another_clock_would_read() -> anyhow::Result<()> {
    let mut lab = Lab::new("clocks-left")?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(""));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    // As after one queue of several: two seconds and a half are left, whatever time it is here and there.
    lab.publish(&[Raw::new("order.placed", "{}")
        .content_type("application/json")
        .id("left")
        .header("warren-left", "2500")])
        .await?;
    let worker = lab.worker()?;
    until("it takes events", PATIENCE, || worker.log().contains("first delivery")).await?;
    let begun = Instant::now();
    until("it is handled", PATIENCE, || heard.distinct().len() == 1).await?;
    ensure!(begun.elapsed() + Duration::from_millis(200) > Duration::from_secs(2), "after {:?}", begun.elapsed());
    Ok(())
}

#[tokio::test]
async fn under_order_strict_an_end_leaves_no_record_of_attempts_for_a_replay_to_begin_with() -> anyhow::Result<()> {
    let mut lab = Lab::new("clocks-strict")?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(", order: strict, retry: {attempts: 2, backoff: 100ms}"));
    lab.declare().await?;
    let mut first = lab.worker()?;
    let tired = event("tired", "order.placed", "k1", json!({"fail": 2, "sleeps": [0, 0, 60, 0, 0]}));
    lab.send(&[tired, event("once", "order.placed", "k2", json!({"fail": 1}))]).await?;
    lab.settled(2, PATIENCE).await?;
    ensure!(lab.dead().await? == [("tired".to_owned(), "exhausted".to_owned())], "{:?}", lab.dead().await?);
    ensure!(lab.starts() == 0, "{} records are left of what has ended", lab.starts());

    expect_exit(&lab.run(&["dead", "replay", "--all"]).await?, 0)?;
    let attempts = || -> Vec<String> {
        lab.calls().into_iter().filter(|[_, id, ..]| id == "tired").map(|[.., attempt]| attempt).collect()
    };
    until("its replay runs", PATIENCE, || attempts().len() == 3).await?;
    first.kill().await?;
    let mut second = lab.worker()?;
    until("it has its attempts again", PATIENCE, || attempts().len() == 5).await?;
    ensure!(attempts() == ["1", "2", "1", "1", "2"], "the attempts were {:?}", attempts());
    until("nothing is left of it", PATIENCE, || lab.starts() == 0 && lab.outbox() == 0).await?;
    ensure!(second.terminate(PATIENCE).await?.success(), "{}", second.log());
    Ok(())
}
