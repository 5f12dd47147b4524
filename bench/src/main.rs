//! `warren-bench`: Warren beside hand-written loops and other makes, on one broker, interleaved.
//!
//! The harness loads queues, runs a client as a process of its own (mostly this binary again), and takes its time, its
//! processor time and its memory. Every run has a vhost and a store of its own.
#![warn(clippy::print_stdout)]

mod bench;
mod broker;
mod clients;
mod events;
mod load;
mod measure;
mod peers;
mod process;
mod profile;
mod report;
mod results;
mod rows;
mod site;
mod targets;

use clap::{Parser, Subcommand};
use rows::Row;
use std::path::PathBuf;
use std::process::ExitCode;

/// Measures Warren beside hand-written loops and other makes
#[derive(Parser)]
#[command(name = "warren-bench", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    order: Order,
}

/// What to measure.
#[derive(clap::Args)]
struct Order {
    /// Which groups of rows [default: all]
    #[arg(long, value_delimiter = ',', value_enum)]
    rows: Vec<Row>,
    /// Which rows of drain, publish, latency, tx and process, such as warren_sqlite,raw_multiple [default: all]
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Rounds, each with one run of every row
    #[arg(long)]
    rounds: Option<u32>,
    /// Events of a run of a fast row in drain and publish; slow ones get a share of it
    #[arg(long)]
    count: Option<u64>,
    /// One round with few events: shows that everything works, measures nothing
    #[arg(long)]
    smoke: bool,
    /// Where the figures go [default: target/bench.json; target/bench-smoke.json for a smoke run]
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Load the queues and run one client on them, under perf if asked
    Profile {
        /// Which client, such as warren_sqlite
        client: String,
        /// Events
        #[arg(long, default_value_t = 300_000)]
        count: u64,
        /// Record with perf into this file, if perf is installed
        #[arg(long)]
        perf: Option<PathBuf>,
    },
    /// Be a client (what the harness starts)
    #[command(hide = true)]
    Client {
        /// Which
        name: String,
        /// Its arguments
        rest: Vec<String>,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Client { name, rest }) => clients::main(&name, &rest),
        Some(Command::Profile { client, count, perf }) => profile::run(&client, count, perf.as_deref()),
        None => measure(&cli.order),
    }
}

fn measure(order: &Order) -> anyhow::Result<ExitCode> {
    let bench = bench::Bench::new(order)?;
    let mut results = results::Results::default();
    for row in Row::chosen(&order.rows) {
        row.run(&bench, &mut results)?;
    }
    results.compare();
    // Figures that mean nothing do not replace some that do.
    let name = if order.smoke { "target/bench-smoke.json" } else { "target/bench.json" };
    let json = order.json.clone().unwrap_or_else(|| warren_tests::broker::root().join(name));
    report::write(&bench, &results, &json)?;
    report::print(&bench, &results)?;
    Ok(ExitCode::SUCCESS)
}
