//! What all rows share: the broker, a runtime for loading, how much to do, which peers there are.
use crate::Order;
use crate::broker::{self, Watch};
use crate::measure::{self, Run};
use crate::peers::Peers;
use crate::site::Site;
use anyhow::Context;
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use warren_tests::Rabbit;
use warren_tests::broker::root;

/// How much is done.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) rounds: u32,
    /// Events of a fast drain.
    pub(crate) drain: u64,
    pub(crate) publish: u64,
    /// Seconds at the fixed pace.
    pub(crate) latency: u64,
    pub(crate) backlog: u64,
    /// Known ids, few and many.
    pub(crate) inbox: [u64; 2],
    pub(crate) starts: u32,
    pub(crate) smoke: bool,
}

impl Plan {
    fn new(order: &Order) -> Self {
        let full = Self {
            rounds: 5,
            drain: 60_000,
            publish: 150_000,
            latency: 10,
            backlog: 1_000_000,
            inbox: [100_000, 10_000_000],
            starts: 10,
            smoke: false,
        };
        let smoke = Self {
            rounds: 1,
            drain: 2_000,
            publish: 5_000,
            latency: 2,
            backlog: 20_000,
            inbox: [1_000, 10_000],
            starts: 3,
            smoke: true,
        };
        let mut plan = if order.smoke { smoke } else { full };
        plan.rounds = order.rounds.unwrap_or(plan.rounds).max(1);
        plan.drain = order.count.unwrap_or(plan.drain).max(1);
        plan.publish = order.count.unwrap_or(plan.publish).max(1);
        plan
    }
}

/// What all rows share.
pub(crate) struct Bench {
    pub(crate) rabbit: Arc<Rabbit>,
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) plan: Plan,
    pub(crate) peers: Peers,
    only: Vec<String>,
    sites: Cell<u32>,
    /// Runs during which the broker was short of memory or disk, and held publishers back.
    pub(crate) disturbed: Cell<u32>,
}

/// No run takes longer, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(180);

impl Bench {
    /// With the broker of this checkout.
    pub(crate) fn new(order: &Order) -> anyhow::Result<Self> {
        let rabbit = Arc::new(Rabbit::shared()?);
        crate::site::sweep(&rabbit)?;
        Ok(Self {
            rabbit,
            runtime: tokio::runtime::Runtime::new()?,
            plan: Plan::new(order),
            peers: Peers::read(&dir().join("peers.txt")),
            only: order.only.clone(),
            sites: Cell::new(0),
            disturbed: Cell::new(0),
        })
    }

    /// Whether a row was asked for.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }

    /// A place for one run.
    pub(crate) fn site(&self) -> anyhow::Result<Site<'_>> {
        self.sites.set(self.sites.get() + 1);
        Site::new(self, self.sites.get())
    }

    /// Runs a client. A run in which the broker raised an alarm says nothing about the client: it is counted.
    pub(crate) fn run(&self, command: &Command) -> anyhow::Result<Run> {
        self.run_within(command, PATIENCE)
    }

    /// Runs a client that may take longer.
    pub(crate) fn run_within(&self, command: &Command, patience: Duration) -> anyhow::Result<Run> {
        let watch = Watch::start(self.rabbit.clone());
        let run = measure::run(command, patience)?;
        if watch.stop() {
            self.disturbed.set(self.disturbed.get() + 1);
            say("    the broker raised an alarm (memory or disk) during this run");
        }
        Ok(run)
    }

    /// Waits until the broker has no alarm.
    pub(crate) fn calm(&self) {
        let begun = std::time::Instant::now();
        while broker::has_alarm(&self.rabbit) && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// A client of ours.
    pub(crate) fn client(&self, name: &str, site: &Site<'_>, count: u64) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe().context("who am I?")?);
        command.args(["client", name]);
        self.describe(&mut command, site, count);
        Ok(command)
    }

    /// Tells a client what to do.
    pub(crate) fn describe(&self, command: &mut Command, site: &Site<'_>, count: u64) {
        command
            .env("BENCH_URL", site.url())
            .env("BENCH_QUEUES", site.queues().join(","))
            .env("BENCH_COUNT", count.to_string())
            .env("BENCH_STORE", site.store())
            .env("BENCH_DIR", peers_dir());
        if let Some(database) = site.database() {
            command.env("BENCH_DATABASE", database.url());
        }
    }
}

/// Files of the benchmark.
pub(crate) fn dir() -> PathBuf {
    root().join("target/bench")
}

fn peers_dir() -> PathBuf {
    dir().join("peers")
}

/// A binary of this workspace beside our own.
pub(crate) fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let path = warren_tests::process::binary(name);
    anyhow::ensure!(path.is_file(), "{} is not built: scripts/bench builds it", path.display());
    Ok(path)
}

/// A line of progress.
pub(crate) fn say(line: &str) {
    eprintln!("{line}");
}

/// Deletes a file or directory of ours that may not be there.
pub(crate) fn delete(path: &Path) {
    let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
}
