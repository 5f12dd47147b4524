//! The clients under measure: this binary again, as a process of its own.
//!
//! The contract, which other makes keep too: BENCH_URL, BENCH_QUEUES and BENCH_COUNT say what to do; `first` is printed
//! at the first delivery, `mark N` after each tenth, `last` when all are handled and the broker has their acks.
pub(crate) mod exec;
pub(crate) mod latency;
pub(crate) mod raw;
pub(crate) mod steps;
pub(crate) mod tx;
pub(crate) mod warren;

use anyhow::Context;
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::watch;
use warren_publisher::process::{self, Spare};

/// What a client is to do.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) url: String,
    pub(crate) queues: Vec<String>,
    pub(crate) count: u64,
    /// The store's file.
    pub(crate) store: String,
    /// The URL of the run's PostgreSQL database, where it has one.
    pub(crate) database: Option<String>,
}

impl Task {
    fn from_environment() -> anyhow::Result<Self> {
        let read = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
        Ok(Self {
            url: read("BENCH_URL")?,
            queues: read("BENCH_QUEUES")?.split(',').filter(|queue| !queue.is_empty()).map(str::to_owned).collect(),
            count: read("BENCH_COUNT")?.parse().context("BENCH_COUNT is no number")?,
            store: std::env::var("BENCH_STORE").unwrap_or_default(),
            database: std::env::var("BENCH_DATABASE").ok(),
        })
    }

    pub(crate) fn database(&self) -> anyhow::Result<&str> {
        self.database.as_deref().context("BENCH_DATABASE is not set")
    }

    /// Where the store is, as DATABASE_URL has it: the file, where there is no database.
    pub(crate) fn store_url(&self) -> String {
        self.database.clone().unwrap_or_else(|| warren::file(&self.store))
    }
}

/// Runs a client to its end.
pub(crate) fn main(name: &str, rest: &[String]) -> anyhow::Result<ExitCode> {
    if name == "echo" {
        return exec::echo(rest);
    }
    // Whoever interrupts the harness means us too.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr);
    log.with_max_level(tracing_subscriber::filter::LevelFilter::WARN).init();
    let task = Task::from_environment()?;
    let work = async {
        match name {
            "raw_each" => raw::drain(task, raw::Acks::Each).await,
            "raw_multiple" => raw::drain(task, raw::Acks::Multiple { flush: None }).await,
            "warren_sqlite" | "warren_postgres" => warren::drain(task).await,
            "warren_exec" => exec::drain(task).await,
            "publish_raw" => raw::publish(task).await,
            "latency_raw" => latency::raw(task).await,
            "latency_warren" => latency::warren(task).await,
            "process_warren" => steps::warren(task).await,
            "tx_warren" => tx::warren(task).await,
            "tx_loop" => tx::by_hand(task).await,
            other => anyhow::bail!("there is no client '{other}'"),
        }?;
        Ok(ExitCode::SUCCESS)
    };
    if name.contains("warren") {
        // The runtime that the worker has.
        process::run(Spare::One, work)
    } else {
        // The library's default, which is the best for loops by hand.
        process::run(Spare::None, work)
    }
}

/// Says a line to the harness.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // The harness may have given up.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// How far a client is.
#[derive(Debug)]
pub(crate) struct Progress {
    handled: AtomicU64,
    count: u64,
    finished: watch::Sender<bool>,
}

impl Progress {
    pub(crate) fn new(count: u64) -> Self {
        Self { handled: AtomicU64::new(0), count, finished: watch::Sender::new(false) }
    }

    /// One more is handled.
    pub(crate) fn step(&self) {
        let handled = self.handled.fetch_add(1, Relaxed) + 1;
        if handled == 1 {
            say("first");
        }
        if self.count >= 10 && handled.is_multiple_of(self.count / 10) {
            say(&format!("mark {}", handled / (self.count / 10)));
        }
        if handled == self.count {
            self.finished.send_replace(true);
        }
    }

    /// Turns true when all are handled.
    pub(crate) fn finished(&self) -> watch::Receiver<bool> {
        self.finished.subscribe()
    }
}

/// The longest that a pending ack waits for others where latency is measured.
pub(crate) const FLUSH: Duration = Duration::from_millis(5);
