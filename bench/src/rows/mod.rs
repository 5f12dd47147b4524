//! The rows, a file a group. Each round runs every row of a group once, so that what drifts drifts for all.
mod backlog;
pub(crate) mod drain;
mod inbox;
mod latency;
mod process;
mod publish;
mod start;
pub(crate) mod tx;

use crate::bench::Bench;
use crate::measure::Figures;
use crate::peers;
use crate::results::Results;
use crate::site::Site;
use anyhow::ensure;
use std::process::{Command, Stdio};

/// A group of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Row {
    /// Queues that are full, emptied.
    Drain,
    /// Events onto the bus, confirmed.
    Publish,
    /// From publish to handled at 2,000 events a second.
    Latency,
    /// A million events in one go.
    Backlog,
    /// Few and many known ids.
    Inbox,
    /// From the start of the process to the first event.
    Start,
    /// Queues that are full, emptied by handlers with a database transaction an event.
    Tx,
    /// Instances of a process, started by events that wait in the queues.
    Process,
}

impl Row {
    /// Those that were asked for; all where none was.
    pub(crate) fn chosen(asked: &[Self]) -> Vec<Self> {
        use Row::{Backlog, Drain, Inbox, Latency, Process, Publish, Start, Tx};
        let all = [Drain, Publish, Latency, Backlog, Inbox, Start, Tx, Process];
        all.into_iter().filter(|row| asked.is_empty() || asked.contains(row)).collect()
    }

    /// Measures it.
    pub(crate) fn run(self, bench: &Bench, results: &mut Results) -> anyhow::Result<()> {
        match self {
            Self::Drain => drain::run(bench, results),
            Self::Publish => publish::run(bench, results),
            Self::Latency => latency::run(bench, results),
            Self::Backlog => backlog::run(bench, results),
            Self::Inbox => inbox::run(bench, results),
            Self::Start => start::run(bench, results),
            Self::Tx => tx::run(bench, results),
            Self::Process => process::run(bench, results),
        }
    }
}

/// Has a make with messages of its own load queues of its own with so many tasks, in chains of `steps`; returns who empties
/// them.
fn stranger(bench: &Bench, site: &Site<'_>, make: &str, count: u64, steps: u64) -> anyhow::Result<Command> {
    let queues: Vec<String> = (0..site.queues().len()).map(|n| format!("{make}.{n}")).collect();
    let of = |action: &str| {
        let mut command = peers::command(make, action);
        bench.describe(&mut command, site, count);
        command.env("BENCH_QUEUES", queues.join(",")).env("BENCH_STEPS", steps.to_string());
        command
    };
    let loaded = of("load").stdout(Stdio::null()).status()?;
    ensure!(loaded.success(), "it cannot load its queues: {loaded}");
    Ok(of("drain"))
}

/// Notes a run's figures and tells them.
fn note(results: &mut Results, row: &str, round: u32, figures: Figures) {
    let Figures { per_s, cpu_us, rss_mb } = figures;
    results.put(&format!("{row}.per_s"), round, per_s);
    results.put(&format!("{row}.cpu_us"), round, cpu_us);
    results.put(&format!("{row}.rss_mb"), round, rss_mb);
    crate::bench::say(&format!("{round:>2}  {row:<22} {per_s:>8.0}/s  {cpu_us:>6.1} µs  {rss_mb:>6.1} MB"));
}
