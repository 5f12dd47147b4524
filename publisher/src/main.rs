//! `warren-publisher`: events onto the bus, each proven to be there.
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use warren_publisher::lines::Reading;
use warren_publisher::log::say;
use warren_publisher::outbox::Table;
use warren_publisher::postgres::Postgres;
use warren_publisher::process::{self, Spare, exit};
use warren_publisher::relay::{self, Until};
use warren_publisher::send::{self, Order};
use warren_publisher::{Broker, declare};
use warren_shared::env::{Database, Reader, Settings, duration, help};
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
    /// Publish what other systems commit to their outbox, a table in PostgreSQL
    Relay(Relay),
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

#[derive(clap::Args)]
#[command(
    after_help = "DATABASE_URL names the database (or DATABASE_URL_FILE): postgres://user:password@host:5432/database.\n\
    A row is marked as sent once the broker has confirmed it; a row that can never be published gets its\n\
    reason in the column 'error'. Any number of relays may run: one publishes, the others stand by.\n\
    SIGTERM ends it after the rows on their way (exit 0), a second one at once.\n\
    --once ends when nothing waits; the last line on stdout is {\"published\":N,\"refused\":N,\"seconds\":S}, and\n\
    it exits 0 only when no row is left, be it for an error or for a broker that does not take it.\n\
    docs/outbox.md has the table and the fine print."
)]
struct Relay {
    /// The table: name or schema.name, unquoted
    #[arg(long, default_value_t = Table::default(), value_parser = Table::parse)]
    table: Table,
    /// How long sent rows are kept before they are deleted
    #[arg(long, default_value = "1h", value_parser = duration, value_name = "TIME")]
    keep: std::time::Duration,
    /// Publish what is there, and end
    #[arg(long, conflicts_with_all = ["ddl", "apply"])]
    once: bool,
    /// Print the SQL that makes the table, and end
    #[arg(long, conflicts_with = "apply")]
    ddl: bool,
    /// Make the table where it is missing, and end
    #[arg(long)]
    apply: bool,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return process::usage(&error),
    };
    // Before anything is read: it says what to do on another machine.
    if let Command::Relay(Relay { ddl: true, table, .. }) = &cli.command {
        return match process::print(table.ddl().trim_end()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => process::fail(&error.into()),
        };
    }
    let also: &[&str] = if matches!(cli.command, Command::Relay(_)) { &["DATABASE_URL"] } else { &[] };
    let settings = match process::settings_and(Reader::Both, also) {
        Ok(settings) => settings,
        Err(code) => return code,
    };
    match process::run(Spare::None, async move {
        match cli.command {
            Command::Send(send) => account(&settings, *send).await,
            Command::Declare => declare_bus(&settings).await,
            Command::Relay(relay) => run_relay(&settings, relay).await,
        }
    }) {
        Ok(code) => code,
        Err(error) => process::fail(&error),
    }
}

async fn declare_bus(settings: &Settings) -> anyhow::Result<ExitCode> {
    let broker = Broker::new(settings.amqp.clone(), "warren-publisher declare");
    let link = broker.connect_within("declare", settings.connect_timeout).await?;
    let declared = declare::apply(&link, &Topology::bus()).await;
    link.close().await;
    declared?;
    eprintln!("the exchange '{BUS}' is there");
    Ok(ExitCode::SUCCESS)
}

async fn run_relay(settings: &Settings, arguments: Relay) -> anyhow::Result<ExitCode> {
    let url = match &settings.database {
        Database::Postgres(url) => Postgres::parse(url),
        Database::Sqlite(_) => Err("names SQLite or nothing; the relay reads PostgreSQL: \
            postgres://user:password@host:5432/database"
            .into()),
    };
    let postgres = match url {
        Ok(postgres) => postgres,
        Err(problem) => {
            eprintln!("DATABASE_URL: {problem}");
            return Ok(ExitCode::from(exit::USAGE));
        }
    };
    let Relay { table, keep, once, apply, .. } = arguments;
    if apply {
        let made = relay::make(&postgres, &table, settings.connect_timeout).await?;
        let state = if made { "is made" } else { "was there already, and is left as it is" };
        eprintln!("the table {table} in {} {state}", postgres.at());
        return Ok(ExitCode::SUCCESS);
    }
    let until = if once { Until::Empty } else { Until::Stopped };
    let started = Instant::now();
    let account = relay::relay(settings, &postgres, relay::Order { table, keep, until }).await?;
    let seconds = (started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
    let (published, refused) = (account.published, account.refused);
    process::print(&serde_json::json!({"published": published, "refused": refused, "seconds": seconds}).to_string())?;
    if let Some(left @ 1..) = account.left {
        say(format_args!("left in the table: {}", process::count(left as usize, "row")));
    }
    let done = until == Until::Stopped || account.left == Some(0);
    Ok(if done { ExitCode::SUCCESS } else { ExitCode::from(exit::FAILED) })
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
