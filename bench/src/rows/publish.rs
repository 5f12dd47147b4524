//! Events onto the bus, each confirmed: from the start of the process to its end.
use super::note;
use crate::bench::{Bench, beside, delete, dir, say};
use crate::events;
use crate::peers;
use crate::results::Results;
use crate::site::Site;
use anyhow::{Context, ensure};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use warren_shared::topology::BUS;

const CONTESTANTS: [&str; 3] = ["raw", "warren", "amqplib"];

pub(super) fn run(bench: &Bench, results: &mut Results) -> anyhow::Result<()> {
    say("publish");
    let file = dir().join("events.jsonl");
    write(&file, bench.plan.publish)?;
    let measured = rounds(bench, results, &file);
    delete(&file);
    measured
}

fn rounds(bench: &Bench, results: &mut Results, file: &Path) -> anyhow::Result<()> {
    let count = bench.plan.publish;
    for round in 1..=bench.plan.rounds {
        for name in CONTESTANTS.into_iter().filter(|name| bench.wants(name)) {
            if let Some(why) = (name == "amqplib").then(|| bench.peers.absent(name)).flatten() {
                results.absent(&format!("publish.{name}"), why);
                continue;
            }
            let site = bench.site()?;
            let command = command(bench, &site, name, file)?;
            let run = bench.run(&command).with_context(|| format!("publish: {name}"))?;
            let arrived = site.depth(count)?;
            ensure!(arrived == count, "publish: {name}: {arrived} of {count} events arrived");
            note(results, &format!("publish.{name}"), round, run.whole(count));
        }
    }
    Ok(())
}

fn command(bench: &Bench, site: &Site<'_>, name: &str, file: &Path) -> anyhow::Result<Command> {
    let count = bench.plan.publish;
    match name {
        "raw" => bench.client("publish_raw", site, count),
        "warren" => {
            let mut command = Command::new(beside("warren-publisher")?);
            command.arg("send").arg(file).env("AMQP_URL", site.url());
            Ok(command)
        }
        _ => {
            let mut command = peers::command(name, "publish");
            bench.describe(&mut command, site, count);
            command.env("BENCH_EXCHANGE", BUS).env("BENCH_ROUTING_KEY", events::KIND);
            Ok(command)
        }
    }
}

/// The same events as lines of JSON.
fn write(path: &Path, count: u64) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir())?;
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    for n in 0..count {
        writeln!(file, "{}", events::event(events::PUBLISHED, n)?.to_json())?;
    }
    Ok(file.flush()?)
}
