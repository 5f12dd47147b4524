//! Instances of a process of five steps, beside Celery chains as long: steps a second.
use super::{note, stranger};
use crate::bench::{Bench, say};
use crate::clients::steps::STEPS;
use crate::peers::POSTGRES;
use crate::results::Results;
use crate::site::Site;
use anyhow::Context;
use std::process::Command;

/// Who, what it cannot be without, and the share of a fast row's events that it takes as long for as many steps.
const CONTESTANTS: [(&str, Option<&str>, f64); 3] =
    [("warren_sqlite", None, 0.25), ("warren_postgres", Some(POSTGRES), 0.25), ("celery_chain", Some("celery"), 0.05)];

pub(super) fn run(bench: &Bench, results: &mut Results) -> anyhow::Result<()> {
    say("process");
    for round in 1..=bench.plan.rounds {
        for (name, needs, share) in CONTESTANTS.into_iter().filter(|(name, ..)| bench.wants(name)) {
            let row = format!("process.{name}");
            if let Some(why) = needs.and_then(|peer| bench.peers.absent(peer)) {
                results.absent(&row, why);
                continue;
            }
            let instances = (bench.plan.drain as f64 * share / STEPS as f64).ceil() as u64;
            let mut site = bench.site()?;
            if needs == Some(POSTGRES) {
                site = site.on_postgres()?;
            }
            let client = prepare(bench, &site, name, instances).context(row.clone())?;
            let run = bench.run(&client).context(row.clone())?;
            note(results, &row, round, run.between(instances * STEPS)?);
        }
    }
    Ok(())
}

/// Loads what starts the instances; returns who does their steps.
fn prepare(bench: &Bench, site: &Site<'_>, name: &str, instances: u64) -> anyhow::Result<Command> {
    if name != "celery_chain" {
        site.load(1, instances)?;
        return bench.client("process_warren", site, instances * STEPS);
    }
    stranger(bench, site, "celery", instances * STEPS, STEPS)
}
