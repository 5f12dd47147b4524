//! From publish to handled at an even 2,000 events a second.
use super::note;
use crate::bench::{Bench, say};
use crate::clients::latency::{PER_SECOND, now};
use crate::events;
use crate::load::Loader;
use crate::results::Results;
use anyhow::Context;
use serde_json::Value;
use std::time::Duration;
use tokio::time::MissedTickBehavior;

/// Ten events every five milliseconds.
const TICK: Duration = Duration::from_millis(5);
const EACH: u64 = 10;

pub(super) fn run(bench: &Bench, results: &mut Results) -> anyhow::Result<()> {
    say("latency");
    let count = PER_SECOND * bench.plan.latency;
    for round in 1..=bench.plan.rounds {
        for name in ["raw", "warren"].into_iter().filter(|name| bench.wants(name)) {
            let site = bench.site()?;
            let paced = bench.runtime.spawn(pace(site.url(), count));
            let client = bench.client(&format!("latency_{name}"), &site, count)?;
            let run = bench.run(&client).with_context(|| format!("latency: {name}"))?;
            bench.runtime.block_on(paced)??;
            let line = run.lines.iter().find_map(|line| line.text.strip_prefix("result "));
            let result: Value = serde_json::from_str(line.context("the client reports no result")?)?;
            let row = format!("latency.{name}");
            for figure in ["p50_ms", "p99_ms", "max_ms"] {
                let value = result[figure].as_f64().context("a result is a number")?;
                results.put(&format!("{row}.{figure}"), round, value);
            }
            say(&format!("    {result}"));
            note(results, &row, round, run.between(count)?);
        }
    }
    Ok(())
}

/// Publishes so many, evenly, each with its time.
async fn pace(url: String, count: u64) -> anyhow::Result<()> {
    let mut loader = Loader::connect(&url, events::KIND).await?;
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    for from in (0..count).step_by(EACH as usize) {
        tick.tick().await;
        loader.publish((from..count.min(from + EACH)).map(|n| events::wire(1, n, now()))).await?;
    }
    loader.finish().await
}
