//! `warren-publisher`: events onto the bus, each proven to be there.
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use warren_publisher::lines::Reading;
use warren_publisher::process::{self, Spare, exit};
use warren_publisher::send::{self, Order};
use warren_publisher::{Broker, declare};
use warren_shared::env::{Reader, Settings, help};
use warren_shared::topology::{BUS, Topology};

/// Puts events on the bus and proves that the broker has them.
#[derive(Parser)]
#[command(name = "warren-publisher", version, after_help = help(Reader::Both))]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Send JSON lines as events; the last line on stdout is the account, as JSON
    Send(Box<Send>),
    /// Declare the bus (the topic exchange 'warren.events')
    Declare,
}

#[derive(clap::Args)]
#[command(after_help = "Each line is a CloudEvent; with --type it is any JSON, and becomes the event's data.\n\
    Exit 0 only when every line that was read is confirmed.")]
struct Send {
    /// The file; '-' or nothing is standard input
    file: Option<PathBuf>,
    /// Type of the events, where the lines are not CloudEvents
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Source of the events [default: /send/<file>]
    #[arg(long, requires = "kind")]
    source: Option<String>,
    /// JSON pointer to each line's id; without it the id is derived from source, line number and content
    #[arg(long, requires = "kind", value_name = "/PTR")]
    id: Option<String>,
    /// JSON pointer to each line's key, for which order is kept
    #[arg(long, requires = "kind", value_name = "/PTR")]
    key: Option<String>,
    /// Lane of all events, instead of the one that each event's priority asks for
    #[arg(long)]
    lane: Option<String>,
    /// Events a second, at most
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Unconfirmed events, at most
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u16).range(1..=2000))]
    window: u16,
    /// Exchange to publish to
    #[arg(long, default_value = BUS)]
    exchange: String,
    /// File for the refused lines, each with its reason, as JSON lines
    #[arg(long, value_name = "FILE")]
    rejects: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return process::usage(&error),
    };
    let settings = match process::settings(Reader::Both) {
        Ok(settings) => settings,
        Err(code) => return code,
    };
    match process::run(Spare::None, async move {
        match cli.command {
            Command::Send(send) => account(&settings, *send).await,
            Command::Declare => declare_bus(&settings).await,
        }
    }) {
        Ok(code) => code,
        Err(error) => process::fail(&error),
    }
}

async fn declare_bus(settings: &Settings) -> anyhow::Result<ExitCode> {
    let broker = Broker::new(settings.amqp_url.clone(), "warren-publisher declare");
    let link = broker.connect_within("declare", settings.connect_timeout).await?;
    let declared = declare::apply(&link, &Topology::bus()).await;
    link.close().await;
    declared?;
    eprintln!("the exchange '{BUS}' is there");
    Ok(ExitCode::SUCCESS)
}

async fn account(settings: &Settings, send: Send) -> anyhow::Result<ExitCode> {
    let file = send.file.filter(|path| path.as_os_str() != "-");
    if let Some(path) = file.as_deref().filter(|path| !path.is_file() && !path.exists()) {
        eprintln!("'{}' does not exist", path.display());
        return Ok(ExitCode::from(exit::USAGE));
    }
    let name = file.as_deref().and_then(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned());
    let source = send.source.unwrap_or_else(|| format!("/send/{}", name.as_deref().unwrap_or("stdin")));
    let reading = match send.kind {
        None => Reading::CloudEvents,
        Some(kind) => Reading::Any { kind, source, id: send.id, key: send.key },
    };
    let order = Order {
        file,
        reading,
        exchange: send.exchange,
        lane: send.lane,
        rate: send.rate,
        window: send.window.into(),
        rejects: send.rejects,
    };
    let started = Instant::now();
    let account = send::send(settings, order).await?;
    let seconds = (started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
    let line = serde_json::json!({
        "read": account.read,
        "confirmed": account.confirmed,
        "refused": account.refused,
        "unknown": account.unknown,
        "seconds": seconds,
    });
    process::print(&line.to_string())?;
    Ok(if account.is_complete() { ExitCode::SUCCESS } else { ExitCode::from(exit::FAILED) })
}
