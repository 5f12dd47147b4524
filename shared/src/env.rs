//! The environment: one table of variables makes the parser, `--help` and the README's section.
//!
//! The process' environment comes in as a map (reading it is I/O). Every mistake is reported at once, by variable
//! name; the value of a secret is never part of a message.
use crate::amqp::{self, Amqp};
use crate::event::Limits;
use crate::lane::Lanes;
use crate::pattern::Pattern;
use crate::retry::LONGEST;
use crate::seal::PayloadKeys;
use crate::secret::File;
pub use crate::secret::Secret;
use crate::topology::{BUS, Order, QueueType, Subscription};
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

/// One variable: a row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What holds where it is not set; empty = nothing.
    pub default: &'static str,
    /// What it does, in a line.
    pub help: &'static str,
    /// Who reads it.
    pub of: Reader,
    /// How it may be given.
    pub given: Given,
}

/// How a variable may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// By its value.
    Openly,
    /// A secret: by its value, or by the name of a file in the variable with `_FILE` behind its name.
    OrByFile,
}

/// Who reads a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Publisher and worker.
    Both,
    /// The worker alone.
    Worker,
}

const fn both(name: &'static str, default: &'static str, help: &'static str) -> Variable {
    Variable { name, default, help, of: Reader::Both, given: Given::Openly }
}

const fn worker(name: &'static str, default: &'static str, help: &'static str) -> Variable {
    Variable { name, default, help, of: Reader::Worker, given: Given::Openly }
}

const fn secret(variable: Variable) -> Variable {
    Variable { given: Given::OrByFile, ..variable }
}

/// All variables. What is not here does not exist.
#[rustfmt::skip]
pub const VARIABLES: &[Variable] = &[
    secret(both("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2f", "the broker, amqps:// for TLS; of a cluster all nodes, by comma")),
    both("AMQP_HOST", "", "in place of the host in AMQP_URL; of a cluster all nodes, by comma"),
    both("AMQP_PORT", "", "in place of the port in AMQP_URL"),
    both("AMQP_VHOST", "", "in place of the vhost in AMQP_URL; as it is, not percent-encoded"),
    secret(both("AMQP_USER", "", "in place of the user in AMQP_URL")),
    secret(both("AMQP_PASSWORD", "", "in place of the password in AMQP_URL; as it is, not percent-encoded")),
    secret(both("AMQP_CA", "", "the certificates of the only issuers that are trusted with amqps://, as PEM; empty: those that the system trusts")),
    secret(both("AMQP_CERT", "", "our certificate and its chain, as PEM, where the broker asks for one")),
    secret(both("AMQP_KEY", "", "the private key of AMQP_CERT, as PEM")),
    both("SSL_CERT_FILE", "", "the certificates that are trusted where no other variable names some, as a PEM file (or SSL_CERT_DIR, a directory); empty: the system's"),
    both("RUST_LOG", "info", "what is logged: error, warn, info, debug, trace, or per target"),
    both("WARREN_LOG_FORMAT", "text", "text or json"),
    both("WARREN_CONNECT_TIMEOUT", "10s", "how long to try to reach the broker at the start; later it is tried for ever"),
    both("WARREN_PUBLISH_TIMEOUT", "30s", "after this a publish without confirm is repeated with the same id"),
    both("WARREN_BODY_LIMIT", "16777216", "largest body in bytes; larger ones are refused or dead-lettered"),
    both("WARREN_JSON_DEPTH", "64", "deepest JSON, 1 to 120 levels"),
    secret(both("WARREN_PAYLOAD_KEYS", "", "AES-256 keys for the events' data, id:base64 by comma or line: the first seals what is published, all open; 'plain' first: nothing is sealed")),
    secret(worker("DATABASE_URL", "sqlite://warren.db", "the store: sqlite:///path/to/file for one machine, postgres://user:password@host/database?sslmode=… for a fleet")),
    worker("WARREN_DATABASE_CONNECTIONS", "8", "connections for handlers inside the store's transaction (PostgreSQL), at most; the store itself takes up to 4 more"),
    secret(worker("WARREN_MANAGEMENT_URL", "", "the broker's management interface, http://user:password@host:15672: 'check' looks there for bindings and policies, which AMQP does not show")),
    worker("WARREN_MEMORY", "", "bytes of event bodies that a worker holds at most, and as many of what is on its way out; nothing: an eighth of the container's memory, or of the machine's"),
    worker("WARREN_POOL", "default", "the pool of workers; part of every queue's name"),
    worker("WARREN_CONFIG", "", "YAML file with the routes"),
    worker("WARREN_ROUTES", "", "the same YAML inline; only one of the two may be set"),
    worker("WARREN_SUBSCRIBE", "", "more events than the routes name: pattern or exchange:pattern, by comma (orders-exchange:order.#); of a fanout exchange with the type of messages that bring none (Shop:OrderPlaced:#=order.placed)"),
    worker("WARREN_PARTITIONS", "16", "partitions a lane, 1 to 100; fixed for a pool's life"),
    worker("WARREN_LANES", "high:6,normal:3,low:1", "lanes and their weights"),
    worker("WARREN_ORDER", "key", "key: events of one key in order; none: all workers compete on all partitions"),
    worker("WARREN_QUEUE_TYPE", "quorum", "quorum, or classic with x-max-priority for upstream systems that set it"),
    worker("WARREN_CONCURRENCY", "64", "handlers that run at once"),
    worker("WARREN_PREFETCH", "200", "unacked events a partition"),
    worker("WARREN_CRASH_LIMIT", "3", "deaths of the process after which a redelivered event is dead-lettered, at least 2"),
    worker("WARREN_HOP_LIMIT", "100", "events that may cause one another, by emit, gather, processes or replies; the next one is dead-lettered (loop)"),
    worker("WARREN_UNKNOWN_GRACE", "10m", "how long an event waits that only another worker of the pool has a route for; then it is dead-lettered"),
    worker("WARREN_DECLARE", "auto", "auto: declare the topology at the start; never: only check that it is there"),
    worker("WARREN_DRAIN_TIMEOUT", "25s", "how long running handlers may finish after SIGTERM"),
    worker("WARREN_CONSUMER_TIMEOUT", "30m", "the broker's consumer_timeout; a route that could hold a delivery longer is refused"),
    worker("WARREN_WORK_OFF", "60s", "within which time a backlog should be worked off; the metric warren_workers_wanted counts with it"),
    worker("WARREN_RETENTION", "7d", "how long at least the store knows an event's id, 30h or more"),
    worker("WARREN_ADMIN_ADDR", "", "where /livez, /readyz, /startupz and /metrics are served, such as 0.0.0.0:9090; empty: nowhere"),
    worker("WARREN_WORKER_ID", "", "the worker's name in logs and dead letters; empty: host name and pid"),
];

impl Variable {
    /// What it does, and how it may be given.
    fn says(&self) -> String {
        let file = match self.given {
            Given::Openly => String::new(),
            Given::OrByFile => format!(" (secret; or {}_FILE)", self.name),
        };
        format!("{}{file}", self.help)
    }
}

/// The part of `--help` that lists the variables.
#[must_use]
pub fn help(reader: Reader) -> String {
    let mut text = String::from("Environment:\n");
    for v in VARIABLES.iter().filter(|v| reader == Reader::Worker || v.of == Reader::Both) {
        let default = if v.default.is_empty() { String::new() } else { format!(" [{}]", v.default) };
        let _ = writeln!(text, "  {:<24} {}{default}", v.name, v.says());
    }
    text
}

/// The table as the README shows it.
#[must_use]
pub fn markdown() -> String {
    let mut text = String::from("| variable | default | what it does | read by |\n|---|---|---|---|\n");
    for v in VARIABLES {
        let default = if v.default.is_empty() { String::new() } else { format!("`{}`", v.default) };
        let of = if v.of == Reader::Both { "both" } else { "worker" };
        let _ = writeln!(text, "| `{}` | {default} | {} | {of} |", v.name, v.says());
    }
    text
}

/// A mistake in one variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The variable.
    pub variable: String,
    /// What is wrong, and what to write instead.
    pub problem: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.variable, self.problem)
    }
}

/// Where the worker keeps its records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Database {
    /// A file, shared by the processes of one machine.
    Sqlite(String),
    /// PostgreSQL, shared by a fleet.
    Postgres(Secret),
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For a person.
    Text,
    /// For a machine.
    Json,
}

/// Whether the worker declares the topology.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declare {
    /// At its start.
    Auto,
    /// Never; it checks that all is there.
    Never,
}

/// The configuration, complete and valid. The fields are [`VARIABLES`]; their units are in the types.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "each field is the variable of its name, documented in the table")]
pub struct Settings {
    pub amqp: Amqp,
    pub rust_log: String,
    pub log_format: LogFormat,
    pub connect_timeout: Duration,
    pub publish_timeout: Duration,
    pub limits: Limits,
    pub payload_keys: PayloadKeys,
    /// Bytes of bodies; none: a share of what there is.
    pub memory: Option<usize>,
    pub database: Database,
    pub database_connections: usize,
    pub management: Option<Secret>,
    pub pool: String,
    pub config: Option<String>,
    pub routes: Option<String>,
    pub subscribe: Vec<Subscription>,
    pub partitions: u16,
    pub lanes: Lanes,
    pub order: Order,
    pub queue_type: QueueType,
    pub concurrency: usize,
    pub prefetch: u16,
    pub crash_limit: u32,
    /// Events that may cause one another.
    pub hop_limit: u32,
    pub unknown_grace: Duration,
    pub declare: Declare,
    pub drain_timeout: Duration,
    pub consumer_timeout: Duration,
    pub work_off: Duration,
    pub retention: Duration,
    pub admin_addr: Option<SocketAddr>,
    pub worker_id: Option<String>,
}

impl Settings {
    /// Reads the variables.
    ///
    /// # Errors
    /// Every mistake, in the order of the table.
    pub fn read(environment: &BTreeMap<String, String>) -> Result<Self, Vec<Mistake>> {
        let mut read = Read { environment, mistakes: Vec::new() };
        let settings = read.settings();
        match settings {
            Some(settings) if read.mistakes.is_empty() => Ok(settings),
            _ => Err(read.mistakes),
        }
    }
}

/// Names that look like ours and are not: a typo would otherwise be a default that nobody chose.
#[must_use]
pub fn unknown(environment: &BTreeMap<String, String>) -> Vec<&str> {
    let is = |v: &Variable, name: &str| match v.given {
        Given::OrByFile => name.strip_suffix("_FILE").unwrap_or(name) == v.name,
        Given::Openly => name == v.name,
    };
    let known = |name: &str| VARIABLES.iter().any(|v| is(v, name));
    // What only debug builds read.
    let of_tests = |name: &str| cfg!(debug_assertions) && name.starts_with("WARREN_TEST_");
    let ours = |name: &&str| name.starts_with("WARREN_") && !of_tests(name);
    environment.keys().map(String::as_str).filter(|name| ours(name) && !known(name)).collect()
}

struct Read<'a> {
    environment: &'a BTreeMap<String, String>,
    mistakes: Vec<Mistake>,
}

impl Read<'_> {
    fn settings(&mut self) -> Option<Settings> {
        // All are read before the first `?`, so that every mistake is seen.
        let amqp = self.amqp();
        let rust_log = self.get("RUST_LOG", |v| Ok(v.to_owned()));
        let log_format =
            self.get("WARREN_LOG_FORMAT", |v| choice(v, [("text", LogFormat::Text), ("json", LogFormat::Json)]));
        let connect_timeout = self.get("WARREN_CONNECT_TIMEOUT", duration);
        let publish_timeout = self.get("WARREN_PUBLISH_TIMEOUT", duration);
        let body = self.get("WARREN_BODY_LIMIT", |v| number(v, 1, 512 << 20));
        let depth = self.get("WARREN_JSON_DEPTH", |v| number(v, 1, crate::json::MAX_DEPTH));
        let memory =
            self.get("WARREN_MEMORY", |v| if v.is_empty() { Ok(None) } else { number(v, 1 << 20, 1 << 40).map(Some) });
        let payload_keys = self.get("WARREN_PAYLOAD_KEYS", PayloadKeys::parse);
        let file = self.file("DATABASE_URL");
        let database = self.get("DATABASE_URL", |v| database(v, file));
        let database_connections = self.get("WARREN_DATABASE_CONNECTIONS", |v| number(v, 1_usize, 1000));
        let management = self.secret("WARREN_MANAGEMENT_URL");
        let is_http = |url: &&Secret| ["http://", "https://"].iter().any(|scheme| url.reveal().starts_with(scheme));
        if let Some(url) = management.as_ref().filter(|url| !is_http(url)) {
            let variable = url.variable("WARREN_MANAGEMENT_URL");
            self.mistake(&variable, "is not a URL of the form http://user:password@host:15672");
        }
        let pool = self.get("WARREN_POOL", pool);
        let config = self.optional("WARREN_CONFIG");
        let routes = self.optional("WARREN_ROUTES");
        if config.is_some() && routes.is_some() {
            self.mistake("WARREN_ROUTES", "is set beside WARREN_CONFIG: set only one of the two");
        }
        let subscribe = self.get("WARREN_SUBSCRIBE", subscriptions);
        let partitions = self.get("WARREN_PARTITIONS", |v| number(v, 1_u16, 100));
        let lanes = self.get("WARREN_LANES", Lanes::parse);
        let order = self.get("WARREN_ORDER", |v| choice(v, [("key", Order::Key), ("none", Order::None)]));
        let queue_type = self
            .get("WARREN_QUEUE_TYPE", |v| choice(v, [("quorum", QueueType::Quorum), ("classic", QueueType::Classic)]));
        let concurrency = self.get("WARREN_CONCURRENCY", |v| number(v, 1_usize, 10_000));
        let prefetch = self.get("WARREN_PREFETCH", |v| number(v, 1_u16, 2000));
        let crash_limit = self.get("WARREN_CRASH_LIMIT", |v| number(v, 2_u32, 100));
        let hop_limit = self.get("WARREN_HOP_LIMIT", |v| number(v, 1_u32, 1_000_000));
        let unknown_grace = self.get("WARREN_UNKNOWN_GRACE", duration);
        let declare = self.get("WARREN_DECLARE", |v| choice(v, [("auto", Declare::Auto), ("never", Declare::Never)]));
        let drain_timeout = self.get("WARREN_DRAIN_TIMEOUT", duration);
        let consumer_timeout = self.get("WARREN_CONSUMER_TIMEOUT", duration);
        let work_off = self.get("WARREN_WORK_OFF", duration);
        let retention = self.get("WARREN_RETENTION", retention);
        let admin_addr = match self.optional("WARREN_ADMIN_ADDR") {
            None => Some(None),
            Some(_) => {
                self.get("WARREN_ADMIN_ADDR", |v| v.parse().map_err(|_| format!("'{v}' is not address:port"))).map(Some)
            }
        };
        let worker_id = self.optional("WARREN_WORKER_ID");
        Some(Settings {
            amqp: amqp?,
            rust_log: rust_log?,
            log_format: log_format?,
            connect_timeout: connect_timeout?,
            publish_timeout: publish_timeout?,
            limits: Limits { body: body?, depth: depth? },
            payload_keys: payload_keys?,
            memory: memory?,
            database: database?,
            database_connections: database_connections?,
            management,
            pool: pool?,
            config,
            routes,
            subscribe: subscribe?,
            partitions: partitions?,
            lanes: lanes?,
            order: order?,
            queue_type: queue_type?,
            concurrency: concurrency?,
            prefetch: prefetch?,
            crash_limit: crash_limit?,
            hop_limit: hop_limit?,
            unknown_grace: unknown_grace?,
            declare: declare?,
            drain_timeout: drain_timeout?,
            consumer_timeout: consumer_timeout?,
            work_off: work_off?,
            retention: retention?,
            admin_addr: admin_addr?,
            worker_id,
        })
    }

    fn amqp(&mut self) -> Option<Amqp> {
        let [user, password, ca, cert, key] =
            ["AMQP_USER", "AMQP_PASSWORD", "AMQP_CA", "AMQP_CERT", "AMQP_KEY"].map(|name| self.secret(name));
        // The default's guest is nobody's half.
        let nobody = "amqp://127.0.0.1:5672/%2f";
        let partial = user.is_some() || password.is_some();
        let file = self.file("AMQP_URL");
        let url = match self.optional("AMQP_URL") {
            None if partial => Secret::new(nobody),
            _ => self.get("AMQP_URL", |url| Ok(Secret::new(url).of(file)))?,
        };
        let vhost = self.optional("AMQP_VHOST");
        let hosts = self.get("AMQP_HOST", amqp::hosts);
        let port = match self.optional("AMQP_PORT") {
            None => Some(None),
            Some(_) => self.get("AMQP_PORT", |v| number(v, 1_u16, u16::MAX)).map(Some),
        };
        let amqp = Amqp { vhost, user, password, ca, cert, key, ..Amqp::from(url) };
        self.mistakes.extend(amqp.mistakes());
        Some(Amqp { hosts: hosts?, port: port?, ..amqp })
    }

    fn secret(&self, name: &str) -> Option<Secret> {
        self.optional(name).map(|value| Secret::new(value).of(self.file(name)))
    }

    /// The file that a variable's value was read from.
    fn file(&self, name: &str) -> Option<File> {
        let variable = format!("{name}_FILE");
        let path = self.optional(&variable).filter(|_| self.environment.contains_key(name))?;
        Some(File { variable, path })
    }

    fn get<T>(&mut self, name: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let default = VARIABLES.iter().find(|v| v.name == name).map_or("", |v| v.default);
        let value = self.environment.get(name).filter(|v| !v.is_empty()).map_or(default, String::as_str);
        parse(value).map_err(|problem| self.mistake(name, &problem)).ok()
    }

    fn optional(&self, name: &str) -> Option<String> {
        self.environment.get(name).filter(|value| !value.is_empty()).cloned()
    }

    fn mistake(&mut self, name: &str, problem: &str) {
        self.mistakes.push(Mistake { variable: name.into(), problem: problem.into() });
    }
}

fn choice<T: Copy, const N: usize>(value: &str, options: [(&str, T); N]) -> Result<T, String> {
    match options.iter().find(|(name, _)| *name == value) {
        Some((_, found)) => Ok(*found),
        None => Err(format!("'{value}' is not one of: {}", options.map(|(name, _)| name).join(", "))),
    }
}

fn number<T: std::str::FromStr + PartialOrd + fmt::Display>(value: &str, min: T, max: T) -> Result<T, String> {
    match value.parse() {
        Ok(n) if n >= min && n <= max => Ok(n),
        _ => {
            let unit = value.trim_start_matches(|c: char| c.is_ascii_digit());
            let has_unit = unit.len() < value.len() && unit.trim_start().starts_with(|c: char| c.is_alphabetic());
            let cure = if has_unit { ": write the number alone, without a unit" } else { "" };
            Err(format!("'{value}' is not a number from {min} to {max}{cure}"))
        }
    }
}

/// Reads a duration such as `250ms`, `10s`, `5m`, `1h30m` or `7d`: longer than zero, at most a year.
///
/// # Errors
/// Says how a duration is written.
pub fn duration(value: &str) -> Result<Duration, String> {
    let wrong = || match value.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => {
            format!("'{value}' has no unit: write {value}s for seconds, or ms, m, h or d in place of s")
        }
        _ => format!("'{value}' is not a duration such as 250ms, 10s, 5m, 1h or 7d"),
    };
    // jiff knows no days in absolute time: a day here is 24 hours.
    let parsed = match value.strip_suffix('d').map(str::parse::<u32>) {
        Some(Ok(days)) => Duration::from_secs(u64::from(days) * 86_400),
        _ => Duration::try_from(value.parse::<jiff::SignedDuration>().map_err(|_| wrong())?).map_err(|_| wrong())?,
    };
    if parsed.is_zero() || parsed > Duration::from_secs(366 * 86_400) { Err(wrong()) } else { Ok(parsed) }
}

/// A copy of an event may wait for [`LONGEST`] where a handler asks for that, and a fifth longer: the store still has to know
/// what became of the other one.
fn retention(value: &str) -> Result<Duration, String> {
    let (window, least) = (duration(value)?, LONGEST + LONGEST / 4);
    if window >= least {
        return Ok(window);
    }
    let hours = least.as_secs() / 3600;
    Err(format!(
        "'{value}' is shorter than {hours}h: a copy of an event may wait a day in the delay queues, and would run again"
    ))
}

fn database(value: &str, file: Option<File>) -> Result<Database, String> {
    let value = value.trim();
    match value.strip_prefix("sqlite://") {
        Some(path) if !path.is_empty() => Ok(Database::Sqlite(path.into())),
        _ if value.starts_with("postgres://") || value.starts_with("postgresql://") => {
            Ok(Database::Postgres(Secret::new(value).of(file)))
        }
        _ => {
            Err("is neither of the form sqlite:///path/to/file nor postgres://user:password@host:5432/database".into())
        }
    }
}

fn pool(value: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if value.len() <= 64 && value.chars().all(legal) && value != "events" {
        Ok(value.into())
    } else {
        Err(format!("'{value}' is not a name of a-z, 0-9 and -, at most 64 long, other than 'events'"))
    }
}

fn subscriptions(value: &str) -> Result<Vec<Subscription>, String> {
    let parts = value.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (from, kind) = part.split_once('=').map_or((part, None), |(from, kind)| (from, Some(kind)));
            // The last colon: names of exchanges hold some themselves (MassTransit).
            let (exchange, pattern) = from.rsplit_once(':').unwrap_or((BUS, from));
            if exchange.is_empty() || exchange.len() > 255 {
                return Err(format!("'{part}' names no exchange before its colon"));
            }
            let kind = kind.map(|kind| event_type(kind.trim(), part)).transpose()?;
            Ok(Subscription { exchange: exchange.into(), pattern: Pattern::parse(pattern.trim())?, kind })
        })
        .collect()
}

fn event_type(kind: &str, part: &str) -> Result<String, String> {
    match Pattern::parse(kind) {
        Ok(_) if !kind.contains(['*', '#']) => Ok(kind.to_owned()),
        _ => Err(format!("'{part}' names no event type after its '=', such as order.placed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Settings, Vec<Mistake>> {
        Settings::read(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn an_empty_environment_is_complete() {
        let settings = read(&[]).expect("the defaults are valid");
        assert_eq!((settings.partitions, settings.prefetch), (16, 200));
        assert_eq!(settings.retention, Duration::from_secs(7 * 86_400));
    }

    #[test]
    fn every_mistake_is_reported_at_once_and_no_secret_is_shown() {
        let mistakes = read(&[
            ("AMQP_URL", "http://user:hunter2@host"),
            ("DATABASE_URL", "mysql://root:hunter2@host"),
            ("WARREN_LANES", "high:6"),
            ("WARREN_PARTITIONS", "0"),
            ("WARREN_MANAGEMENT_URL", "amqp://user:hunter2@host"),
            ("WARREN_ORDER", "fifo"),
            ("WARREN_DRAIN_TIMEOUT", "25 parsecs"),
            ("WARREN_ADMIN_ADDR", "9090"),
            ("WARREN_CONFIG", "a"),
            ("WARREN_ROUTES", "b"),
            ("WARREN_CRASH_LIMIT", "1"),
        ])
        .expect_err("mistakes");
        assert_eq!(mistakes.len(), 10, "{mistakes:#?}");
        let text = mistakes.iter().map(ToString::to_string).collect::<String>();
        assert!(!text.contains("hunter2"), "{text}");
        assert!(text.contains("WARREN_ORDER: 'fifo' is not one of: key, none"), "{text}");
    }

    #[test]
    fn durations_are_written_as_people_write_them() {
        for (text, millis) in [("250ms", 250), ("10s", 10_000), ("1h30m", 5_400_000), ("7d", 604_800_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "0s", "-5s", "0", "-5", "inf", "nan", "d", "999999d"] {
            assert!(duration(text).expect_err(text).contains("not a duration such as 250ms"), "{text}");
        }
        for text in ["5", "90", "1.5"] {
            let error = duration(text).expect_err("no unit");
            assert!(error.starts_with(&format!("'{text}' has no unit: write {text}s for seconds")), "{error}");
        }
        for size in ["16MiB", "16 MB", "4k"] {
            let error = number(size, 1_usize, 9).expect_err("a unit");
            assert_eq!(error, format!("'{size}' is not a number from 1 to 9: write the number alone, without a unit"));
        }
        assert_eq!(number("x", 1_usize, 9), Err("'x' is not a number from 1 to 9".into()));
    }

    #[test]
    fn the_store_remembers_longer_than_a_copy_may_wait() {
        assert!(read(&[("WARREN_RETENTION", "30h")]).is_ok());
        let mistakes = read(&[("WARREN_RETENTION", "29h")]).expect_err("too short");
        assert!(mistakes[0].to_string().starts_with("WARREN_RETENTION: '29h' is shorter than 30h"), "{mistakes:?}");
    }

    #[test]
    fn a_subscription_names_the_bus_or_an_exchange() {
        let settings = read(&[("WARREN_SUBSCRIBE", "order.#, theirs:a.*")]).expect("valid");
        let pairs: Vec<_> = settings.subscribe.iter().map(|s| (s.exchange.as_str(), s.pattern.as_str())).collect();
        assert_eq!(pairs, [(BUS, "order.#"), ("theirs", "a.*")]);
    }

    #[test]
    fn a_subscription_names_the_type_of_messages_that_bring_none() {
        let settings = read(&[("WARREN_SUBSCRIBE", "Shop:OrderPlaced:# = order.placed, theirs:#")]).expect("valid");
        let first = &settings.subscribe[0];
        assert_eq!((&*first.exchange, first.pattern.as_str()), ("Shop:OrderPlaced", "#"));
        assert_eq!((first.kind.as_deref(), settings.subscribe[1].kind.as_deref()), (Some("order.placed"), None));
        for wrong in ["theirs:#=", "theirs:#=order.#", "theirs:#=a b"] {
            let mistakes = read(&[("WARREN_SUBSCRIBE", wrong)]).expect_err(wrong);
            assert!(mistakes[0].to_string().contains("names no event type"), "{mistakes:?}");
        }
    }

    #[test]
    fn a_name_like_ours_that_is_not_is_noticed() {
        let environment = BTreeMap::from([("WARREN_PREFECTH".to_owned(), "5".to_owned())]);
        assert_eq!(unknown(&environment), ["WARREN_PREFECTH"]);
        let names = ["WARREN_PAYLOAD_KEYS_FILE", "WARREN_POOL_FILE"].map(|name| (name.to_owned(), String::new()));
        assert_eq!(unknown(&BTreeMap::from(names)), ["WARREN_POOL_FILE"], "only secrets come by file");
    }
}
