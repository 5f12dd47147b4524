//! The commands of `warren-worker`.
use crate::admin;
use crate::config;
use crate::dead::{Dead, Filter, Letter, Treatment, describe};
use crate::fleet::JoinError;
use crate::init;
use crate::management;
use crate::process::{Instances, Order, Shown, Style, draw};
use crate::shutdown;
use crate::status;
use crate::worker::{Builder, Worker, open, worker_name};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand};
use std::net::SocketAddr;
use std::process::ExitCode;
use warren_publisher::declare::{self, DeclareError, Found};
use warren_publisher::process::{self, Spare, count, exit};
use warren_publisher::{Broker, BrokerError};
use warren_shared::env::{Database, Declare, Reader, Settings, help};
use warren_shared::fleet::Conflict;
use warren_shared::topology::{Declaration, Topology};

/// Handles events from RabbitMQ: each once, in order for its key, urgent ones first.
#[derive(Parser)]
#[command(name = "warren-worker", version, after_help = help(Reader::Worker))]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the worker; SIGTERM, SIGINT or SIGHUP drains it, a second SIGTERM or SIGINT interrupts what runs
    Run,
    /// Check configuration, routes, processes, store, broker and topology; report all problems at once. Declares nothing; a store
    /// that is not there yet is made
    Check {
        #[command(flatten)]
        picture: Picture,
    },
    /// Show the topology and what the broker has of it
    Topology {
        /// Declare what is missing
        #[arg(long)]
        apply: bool,
    },
    /// Show the pool: workers, partitions with owner and standby, what waits; exit 1 where something needs a person
    Status {
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
    /// Dead letters
    #[command(subcommand)]
    Dead(DeadCommand),
    /// Instances of business processes
    #[command(subcommand)]
    Process(ProcessCommand),
    /// Ask the worker on this machine how it is, at WARREN_ADMIN_ADDR; exit 1 and the reasons where the answer is no
    Healthcheck {
        /// livez: the process works; readyz: it takes events; startupz: it has begun to
        #[arg(default_value = "readyz", value_parser = ["livez", "readyz", "startupz"])]
        probe: String,
    },
}

#[derive(Subcommand)]
enum ProcessCommand {
    /// List them, those that changed last first; exit 1 where one is stuck
    List {
        /// Only of this process
        #[arg(long)]
        name: Option<String>,
        /// Only of this status: running, compensating, stuck, completed or compensated
        #[arg(long)]
        status: Option<String>,
        /// So many at most
        #[arg(long, default_value_t = 100)]
        limit: u32,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Show one in full: its steps, what it waits for, and its history
    Show {
        /// Its id, as the list shows it, or as `processid` has it
        id: String,
        /// One JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        picture: Picture,
    },
    /// Have one that is stuck go on: it tries again to undo what it could not undo, and undoes what was never answered
    Resume {
        /// Its id
        id: String,
    },
    /// Have one taken back: what was done is undone. Once more, where that does not end: give up what is stuck or late
    Cancel {
        /// Its id
        id: String,
    },
}

/// In which language to draw, if at all.
#[derive(Args)]
#[group(multiple = false)]
struct Picture {
    /// Draw instead, for Mermaid
    #[arg(long)]
    mermaid: bool,
    /// Draw instead, for Graphviz
    #[arg(long)]
    dot: bool,
}

impl Picture {
    fn style(&self) -> Option<Style> {
        if self.mermaid { Some(Style::Mermaid) } else { self.dot.then_some(Style::Dot) }
    }
}

#[derive(Subcommand)]
enum DeadCommand {
    /// List them, oldest first
    List {
        #[command(flatten)]
        which: Which,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Show one in full, payload included
    Show {
        /// The event's id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        id: String,
    },
    /// Publish them to the pool again, in order; each is removed once the broker has confirmed it
    Replay {
        #[command(flatten)]
        which: Which,
        /// All of them
        #[arg(long)]
        all: bool,
    },
    /// Remove them for ever
    Drop {
        #[command(flatten)]
        which: Which,
        /// All of them
        #[arg(long)]
        all: bool,
    },
}

#[derive(Args)]
struct Which {
    /// Only of this reason
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    reason: Option<String>,
    /// Only of this event type
    #[arg(long = "type", value_parser = NonEmptyStringValueParser::new())]
    kind: Option<String>,
    /// Only of this event id; letters without one are found by their reason
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    id: Option<String>,
}

impl Which {
    fn filter(self) -> Filter {
        Filter { reason: self.reason, kind: self.kind, id: self.id }
    }

    fn is_empty(&self) -> bool {
        self.reason.is_none() && self.kind.is_none() && self.id.is_none()
    }
}

/// Runs a command line; what `main` does.
#[must_use]
pub fn main() -> ExitCode {
    main_with(|_, builder| Ok(builder))
}

/// The same, for a worker with handlers of its own: they are added to what the settings name, for every command that looks at
/// routes.
#[must_use]
pub fn main_with(add: impl FnOnce(&Settings, Builder) -> anyhow::Result<Builder>) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return process::usage(&error),
    };
    if matches!(cli.command, Command::Run) && init::is_due() {
        return init::run().unwrap_or_else(|error| process::fail(&error.into()));
    }
    let settings = match process::settings(Reader::Worker) {
        Ok(settings) => settings,
        Err(code) => return code,
    };
    // Before the routes are read: it asks another process, every few seconds.
    if let Command::Healthcheck { probe } = &cli.command {
        return end(process::run(Spare::One, healthcheck(settings.admin_addr, probe)));
    }
    let built = match add(&settings, Worker::builder(settings.clone())) {
        Ok(builder) => builder.build(),
        Err(error) => return process::fail(&error),
    };
    if let (Command::Check { .. }, Err(mistakes)) = (&cli.command, &built) {
        let topology = config::topology(&settings, &config::Routes::default());
        let mistakes = mistakes.clone();
        return end(process::run(Spare::One, async move { check(&settings, &topology, &mistakes).await }));
    }
    let worker = match built {
        Ok(worker) => worker,
        Err(mistakes) => {
            eprintln!("the routes have {}:", count(mistakes.len(), "mistake"));
            mistakes.iter().for_each(|mistake| eprintln!("  {mistake}"));
            return ExitCode::from(exit::USAGE);
        }
    };
    end(process::run(Spare::One, async move {
        let topology = worker.topology();
        match cli.command {
            Command::Run => worker.run(shutdown::signals()?).await.map(|()| ExitCode::SUCCESS),
            Command::Check { picture } => match picture.style() {
                Some(style) => sketch(&worker, style),
                None => check(&settings, &topology, &[]).await,
            },
            Command::Topology { apply } => plan(&settings, &topology, apply).await,
            Command::Status { json } => show_pool(&settings, &worker, &topology, json).await,
            Command::Dead(command) => dead(Dead::new(settings, topology), command).await,
            Command::Process(command) => instances(&settings, &topology, command).await,
            Command::Healthcheck { .. } => unreachable!("it was answered above"),
        }
    }))
}

fn end(ran: anyhow::Result<ExitCode>) -> ExitCode {
    match ran {
        Ok(code) => code,
        Err(error) if error.is::<crate::store::StoreError>() || error.is::<JoinError>() => {
            process::fail_with(&error, exit::UNAVAILABLE)
        }
        Err(error) if error.is::<Conflict>() => process::fail_with(&error, exit::USAGE),
        Err(error) => process::fail(&error),
    }
}

async fn healthcheck(address: Option<SocketAddr>, probe: &str) -> anyhow::Result<ExitCode> {
    let Some(address) = address else {
        eprintln!("WARREN_ADMIN_ADDR is not set: the worker serves no probes; set it for both, such as 0.0.0.0:9090");
        return Ok(ExitCode::from(exit::USAGE));
    };
    Ok(match admin::ask(address, probe).await {
        Ok(answer) => {
            println(&answer.body)?;
            ExitCode::from(if answer.good { 0 } else { exit::FAILED })
        }
        Err(error) => {
            eprintln!("no worker answers at {address} ({error}): start it, or correct WARREN_ADMIN_ADDR");
            ExitCode::from(exit::FAILED)
        }
    })
}

async fn check(settings: &Settings, topology: &Topology, mistakes: &[String]) -> anyhow::Result<ExitCode> {
    let mut worst = 0;
    let mut tell = |what: &str, result: Result<(), (u8, String)>| -> anyhow::Result<()> {
        match result {
            Ok(()) => println(&format!("ok       {what}")),
            Err((0, note)) => println(&format!("note     {what}: {note}")),
            Err((code, problem)) => {
                worst = worst.max(code);
                println(&format!("problem  {what}: {problem}"))
            }
        }
    };
    // The variables were read on the way here.
    if mistakes.is_empty() {
        tell("configuration and routes", Ok(()))?;
    }
    for mistake in mistakes {
        tell("routes", Err((exit::USAGE, mistake.clone())))?;
    }
    let store = open(settings, &worker_name(settings)).await;
    tell("store", store.map(|_| ()).map_err(|e| (exit::UNAVAILABLE, e.to_string())))?;
    let broker = Broker::new(settings.amqp.clone(), "warren-worker check");
    match broker.connect_within("check", settings.connect_timeout).await {
        Err(error) => {
            let code = if matches!(error, BrokerError::Settings(_)) { exit::USAGE } else { exit::UNAVAILABLE };
            tell("broker", Err((code, error.to_string())))?;
        }
        Ok(link) => {
            tell("broker", Ok(()))?;
            let declarations = topology.declarations();
            let found = declare::inspect(&link, &declarations).await;
            link.close().await;
            match found {
                Err(error) => tell("topology", Err((exit::UNAVAILABLE, error.to_string())))?,
                Ok(found) => {
                    let mut missing = Vec::new();
                    for (declaration, found) in declarations.iter().zip(found) {
                        match (declaration, found) {
                            (_, Found::Different(how)) => tell("topology", Err((exit::USAGE, how)))?,
                            (Declaration::Foreign { name }, Found::Missing) => {
                                let error = DeclareError::Foreign(name.clone());
                                tell("topology", Err((exit::UNAVAILABLE, error.to_string())))?;
                            }
                            (declaration, Found::Missing) => missing.extend(declare::name(declaration)),
                            _ => {}
                        }
                    }
                    match (missing.len(), settings.declare) {
                        (0, _) => tell("topology (all exchanges and queues are there)", Ok(()))?,
                        (n, Declare::Auto) => tell(&format!("topology ({n} to be declared)"), Ok(()))?,
                        (_, Declare::Never) => {
                            let error = DeclareError::Missing(missing.into_iter().map(str::to_owned).collect());
                            tell("topology", Err((exit::UNAVAILABLE, error.to_string())))?;
                        }
                    }
                }
            }
        }
    }
    for (what, result) in look_behind(settings, topology, &broker).await {
        tell(what, result)?;
    }
    for note in topology.notes() {
        tell("subscriptions", Err((0, note)))?;
    }
    Ok(ExitCode::from(worst))
}

type Answer = (&'static str, Result<(), (u8, String)>);

/// What only the management interface shows, or that it is not seen.
async fn look_behind(settings: &Settings, topology: &Topology, broker: &Broker) -> Vec<Answer> {
    let unseen = |why: &str| {
        vec![("bindings", Err((0, status::UNSEEN.into()))), ("policies", Err((0, format!("are not seen: {why}"))))]
    };
    let Some(url) = &settings.management else {
        return unseen("name the management interface in WARREN_MANAGEMENT_URL");
    };
    let seen = match management::look(url, &broker.vhost(), topology).await {
        Ok(seen) => seen,
        Err(why) => return unseen(&format!("WARREN_MANAGEMENT_URL: {why}")),
    };
    let bindings = match (seen.missing.is_empty(), settings.declare) {
        (true, _) => Ok(()),
        (false, Declare::Auto) => Err((0, format!("to be made: {}", seen.missing.join(", ")))),
        (false, Declare::Never) => {
            let cure = "run 'warren-worker topology --apply'";
            Err((exit::UNAVAILABLE, format!("missing on the broker: {}: {cure}", seen.missing.join(", "))))
        }
    };
    let mut all = vec![("bindings", bindings)];
    if seen.untold > 0 {
        let untold = count(seen.untold, "queue");
        all.push(("policies", Err((0, format!("are not told yet of {untold}: try again in some seconds")))));
    } else if seen.harmful.is_empty() {
        all.push(("policies", Ok(())));
    }
    let change = |said| format!("{said}; change it, or its pattern");
    all.extend(seen.harmful.into_iter().map(|said| ("policies", Err((exit::FAILED, change(said))))));
    all
}

async fn plan(settings: &Settings, topology: &Topology, apply: bool) -> anyhow::Result<ExitCode> {
    let broker = Broker::new(settings.amqp.clone(), "warren-worker topology");
    let link = broker.connect_within("topology", settings.connect_timeout).await?;
    let declarations = topology.declarations();
    if apply {
        declare::apply(&link, &declarations).await?;
    }
    let found = declare::inspect(&link, &declarations).await?;
    link.close().await;
    for (declaration, found) in declarations.iter().zip(&found) {
        let state = match found {
            Found::Same => "there",
            Found::Missing => "missing",
            Found::Different(_) => "DIFFERENT",
            Found::Unknown if apply => "bound",
            Found::Unknown => "binding",
        };
        let what = match declaration {
            Declaration::Exchange { name, kind, .. } => format!("exchange {name} ({})", kind.as_str()),
            Declaration::Foreign { name } => format!("exchange {name} (of another team)"),
            Declaration::Queue { name, .. } => format!("queue    {name}"),
            Declaration::Binding { source, destination, key, arguments } => {
                let by = match arguments.last() {
                    Some((name, value)) => format!("{name} = {value}"),
                    None => key.clone(),
                };
                format!("{source} -> {} ({by})", destination.name())
            }
        };
        let how = if let Found::Different(how) = found { format!(": {how}") } else { String::new() };
        println(&format!("{state:<9} {what}{how}"))?;
    }
    let (mut missing, mut different) = (0, 0);
    for pair in declarations.iter().zip(&found) {
        match pair {
            (Declaration::Foreign { name }, Found::Missing) => eprintln!("{}", DeclareError::Foreign(name.clone())),
            (_, Found::Missing) => missing += 1,
            (_, Found::Different(_)) => different += 1,
            _ => {}
        }
    }
    match (missing, different) {
        (0, 0) if apply => eprintln!("the broker has all of it"),
        (0, 0) => eprintln!("the broker has all of it, but for the bindings, which {}", status::UNSEEN),
        (missing, 0) => eprintln!("{missing} missing: 'warren-worker topology --apply' declares them"),
        (_, different) => eprintln!("{different} different: nothing can be declared until they are out of the way"),
    }
    Ok(if different > 0 { ExitCode::from(exit::USAGE) } else { ExitCode::SUCCESS })
}

async fn show_pool(settings: &Settings, worker: &Worker, topology: &Topology, json: bool) -> anyhow::Result<ExitCode> {
    let mut report = status::report(settings, topology).await?;
    if !worker.plans().is_empty() {
        report.needs.extend(stuck(settings).await);
    }
    println(&if json { serde_json::to_string(&report)? } else { report.table().trim_end().to_owned() })?;
    Ok(if report.needs.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(exit::FAILED) })
}

/// What the store says of processes that need a person.
async fn stuck(settings: &Settings) -> Vec<String> {
    // To look at a pool makes no store.
    if let Database::Sqlite(path) = &settings.database
        && !std::path::Path::new(path).exists()
    {
        return Vec::new();
    }
    let counted = match open(settings, &worker_name(settings)).await {
        Ok(store) => store.count("process").await,
        Err(error) => Err(error),
    };
    match counted {
        Ok(counts) => counts.iter().filter(|count| count.status == "stuck").map(status::stuck).collect(),
        Err(error) => vec![format!("whether a process is stuck cannot be told: {error}")],
    }
}

fn sketch(worker: &Worker, style: Style) -> anyhow::Result<ExitCode> {
    for plan in worker.plans() {
        println(draw(&plan.definition, None, style).trim_end())?;
    }
    if worker.plans().is_empty() {
        eprintln!("no processes are defined");
    }
    Ok(ExitCode::SUCCESS)
}

async fn instances(settings: &Settings, topology: &Topology, command: ProcessCommand) -> anyhow::Result<ExitCode> {
    let found = Instances::new(open(settings, &worker_name(settings)).await?);
    let (id, order) = match command {
        ProcessCommand::List { name, status, limit, json } => {
            // The limit hides nobody who waits for a person.
            let stuck = status.as_deref().is_none_or(|status| status == "stuck");
            let stuck = stuck && !found.list(name.clone(), Some("stuck".into()), 1).await?.is_empty();
            return list_instances(&found.list(name, status, limit).await?, limit, json, stuck);
        }
        ProcessCommand::Show { id, json, picture } => {
            let Some(shown) = found.find(&id).await? else { return Ok(unknown(&id)) };
            println(&match picture.style() {
                Some(style) => shown.picture(style).trim_end().to_owned(),
                None if json => shown.json().to_string(),
                None => shown.text().trim_end().to_owned(),
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        ProcessCommand::Resume { id } => (id, Order::Resume),
        ProcessCommand::Cancel { id } => (id, Order::Cancel),
    };
    let Some(shown) = found.find(&id).await? else { return Ok(unknown(&id)) };
    shown.order(order, settings, topology).await?;
    eprintln!("the pool has the order: 'process show {id}' tells what comes of it");
    Ok(ExitCode::SUCCESS)
}

fn unknown(id: &str) -> ExitCode {
    eprintln!("no instance has the id '{id}': it never began here, or ended longer ago than WARREN_RETENTION");
    ExitCode::from(exit::FAILED)
}

fn list_instances(all: &[Shown], limit: u32, json: bool, stuck: bool) -> anyhow::Result<ExitCode> {
    let widths = [12, 16, 36, 20, 19, 0];
    if !json {
        println(&cells(["STATUS", "PROCESS", "INSTANCE", "KEY", "CHANGED", "WAITS FOR"].map(str::to_owned), widths))?;
    }
    let mut by_status = std::collections::BTreeMap::<&str, u32>::new();
    for shown in all {
        *by_status.entry(shown.status()).or_default() += 1;
        println(&if json { serde_json::to_string(shown)? } else { cells(shown.cells(), widths) })?;
    }
    let parts: Vec<String> = by_status.iter().map(|(status, n)| format!("{n} {status}")).collect();
    eprintln!("{}", if parts.is_empty() { "no instances".into() } else { parts.join(", ") });
    if all.len() >= usize::try_from(limit).unwrap_or(usize::MAX) {
        eprintln!("there may be more: --limit shows them");
    }
    Ok(if stuck { ExitCode::from(exit::FAILED) } else { ExitCode::SUCCESS })
}

async fn dead(dead: Dead, command: DeadCommand) -> anyhow::Result<ExitCode> {
    let (which, all, treatment) = match command {
        DeadCommand::List { which, json } => return list(&dead, which.filter(), json).await,
        DeadCommand::Show { id } => return show(&dead, id).await,
        DeadCommand::Replay { which, all } => (which, all, Treatment::Replay),
        DeadCommand::Drop { which, all } => (which, all, Treatment::Drop),
    };
    if which.is_empty() != all {
        eprintln!("say which: --reason, --type or --id, or --all for every dead letter");
        return Ok(ExitCode::from(exit::USAGE));
    }
    let (done, forgotten) = dead.treat(&which.filter(), treatment).await?;
    if forgotten > 0 {
        eprintln!(
            "{forgotten} of them died longer ago than WARREN_RETENTION: the store knows nothing of them any more, so where another \
             copy was handled meanwhile, this one is handled as well"
        );
    }
    let verb = if treatment == Treatment::Replay { "replayed" } else { "dropped" };
    for (reason, n) in &done {
        eprintln!("{verb} {n} of reason {reason}");
    }
    println(&serde_json::json!({verb: done.values().sum::<u64>()}).to_string())?;
    Ok(ExitCode::SUCCESS)
}

async fn list(dead: &Dead, filter: Filter, json: bool) -> anyhow::Result<ExitCode> {
    let mut by_reason = std::collections::BTreeMap::<String, u64>::new();
    if !json {
        println(&row(["DIED", "REASON", "TYPE", "ID", "KEY", "ATTEMPTS", "ERROR"]))?;
    }
    let shown = dead.each(&filter, |letter, _| {
        *by_reason.entry(letter.reason.clone()).or_default() += 1;
        if json {
            return println(&serde_json::to_string(&letter)?);
        }
        let Letter { at, reason, kind, id, key, attempts, error, .. } = &letter;
        let at = at.get(..19).unwrap_or(at);
        println(&row([at, reason, kind, id, key, &attempts.to_string(), error]))
    });
    shown.await?;
    let parts: Vec<String> = by_reason.iter().map(|(reason, n)| format!("{n} {reason}")).collect();
    eprintln!("{}", if parts.is_empty() { "no dead letters".into() } else { parts.join(", ") });
    Ok(ExitCode::SUCCESS)
}

async fn show(dead: &Dead, id: String) -> anyhow::Result<ExitCode> {
    let mut found = 0;
    let filter = Filter { id: Some(id.clone()), ..Filter::default() };
    let shown = dead.each(&filter, |letter, message| {
        found += 1;
        println(&describe(&letter, &message))
    });
    shown.await?;
    if found == 0 {
        eprintln!("no dead letter has the id '{id}'");
        return Ok(ExitCode::from(exit::FAILED));
    }
    Ok(ExitCode::SUCCESS)
}

fn row(texts: [&str; 7]) -> String {
    cells(texts.map(str::to_owned), [19, 17, 24, 36, 16, 8, 0])
}

fn cells<const N: usize>(texts: [String; N], widths: [usize; N]) -> String {
    let cell = |(text, width): (String, usize)| {
        let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        format!("{text:<width$}")
    };
    texts.into_iter().zip(widths).map(cell).collect::<Vec<_>>().join("  ").trim_end().to_owned()
}

fn println(line: &str) -> anyhow::Result<()> {
    Ok(process::print(line)?)
}
