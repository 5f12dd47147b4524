//! What both binaries do before and after their work: environment, log, exit code.
use crate::broker;
use crate::log::{self, say};
use crate::postgres::Postgres;
use std::collections::BTreeMap;
use std::process::ExitCode;
use tokio::signal::unix::{Signal, SignalKind, signal};
use warren_shared::env::{Database, Given, Mistake, Reader, Settings, VARIABLES, Variable, unknown};
use warren_shared::secret::of_file;

/// Exit codes by sysexits(3): scripts rely on them.
pub mod exit {
    /// Something failed; the message says what.
    pub const FAILED: u8 = 1;
    /// Usage or configuration.
    pub const USAGE: u8 = 64;
    /// Broker or store unavailable.
    pub const UNAVAILABLE: u8 = 69;
}

/// The environment, with what the secrets' files hold.
fn environment() -> Result<BTreeMap<String, String>, Vec<Mistake>> {
    let mut mistakes = Vec::new();
    let mut map = BTreeMap::new();
    for (name, value) in std::env::vars_os() {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => {
                map.insert(name, value);
            }
            (Ok(name), Err(_)) if name.starts_with("WARREN_") || VARIABLES.iter().any(|v| v.name == name) => {
                mistakes.push(Mistake { variable: name, problem: "is not UTF-8".into() });
            }
            _ => {}
        }
    }
    for Variable { name, .. } in VARIABLES.iter().filter(|v| v.given == Given::OrByFile) {
        let variable = format!("{name}_FILE");
        let Some(path) = map.get(&variable).filter(|path| !path.is_empty()).cloned() else { continue };
        match std::fs::read_to_string(&path) {
            _ if map.contains_key(*name) => {
                mistakes.push(Mistake { variable, problem: format!("is set beside {name}: set only one of the two") });
            }
            Ok(text) => {
                map.insert((*name).into(), of_file(&text).to_owned());
            }
            Err(error) => mistakes.push(Mistake { variable, problem: format!("cannot read '{path}': {error}") }),
        }
    }
    if mistakes.is_empty() { Ok(map) } else { Err(mistakes) }
}

/// Reads the settings and starts the log; prints every mistake where there are some.
///
/// # Errors
/// The exit code for a wrong configuration.
pub fn settings(reader: Reader) -> Result<Settings, ExitCode> {
    settings_and(reader, &[])
}

/// The same for a command that also reads these variables of the worker's.
///
/// # Errors
/// The exit code for a wrong configuration.
pub fn settings_and(reader: Reader, also: &[&str]) -> Result<Settings, ExitCode> {
    let read = environment().and_then(|mut map| {
        keep_own(&mut map, reader, also);
        let settings = Settings::read(&map)?;
        let mut mistakes = broker::mistakes(&settings.amqp);
        if let Database::Postgres(url) = &settings.database
            && let Err(problem) = Postgres::parse(url)
        {
            mistakes.push(Mistake { variable: url.variable("DATABASE_URL"), problem });
        }
        if mistakes.is_empty() { Ok((map, settings)) } else { Err(mistakes) }
    });
    match read {
        Ok((map, settings)) => {
            log::start(&settings);
            for said in settings.amqp.ignored() {
                tracing::warn!(variable = "AMQP_URL", "AMQP_URL: {said}");
            }
            for name in unknown(&map) {
                tracing::warn!(variable = name, "{name} is not a variable of Warren, it changes nothing: see --help");
            }
            Ok(settings)
        }
        Err(mistakes) => {
            eprintln!("the configuration has {}:", count(mistakes.len(), "mistake"));
            for mistake in mistakes {
                eprintln!("  {mistake}");
            }
            eprintln!("nothing was changed; --help lists every variable");
            Err(ExitCode::from(exit::USAGE))
        }
    }
}

/// A publisher does not fail over a variable that only the worker reads.
fn keep_own(map: &mut BTreeMap<String, String>, reader: Reader, also: &[&str]) {
    let workers =
        |name: &str| !also.contains(&name) && VARIABLES.iter().any(|v| v.name == name && v.of == Reader::Worker);
    map.retain(|name, _| reader == Reader::Worker || !workers(name));
}

/// How many cores the runtime leaves to other threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spare {
    /// None: a publisher reads and parses beside what it sends.
    None,
    /// One, for those that read the sockets and write the store: on two cores a second thread for tasks costs a worker
    /// two microseconds more for each event.
    One,
}

/// Runs a command on a runtime of its own.
///
/// # Errors
/// The command's error, or that the operating system gives no threads.
pub fn run<F>(spare: Spare, command: F) -> anyhow::Result<ExitCode>
where
    F: Future<Output = anyhow::Result<ExitCode>>,
{
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.saturating_sub(usize::from(spare == Spare::One)).max(1);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    let result = runtime.block_on(command);
    // A thread that reads a terminal does not end by itself.
    runtime.shutdown_timeout(std::time::Duration::from_millis(200));
    log::flush();
    result
}

/// Prints an error with its causes; the exit code tells what kind it is.
#[must_use]
pub fn fail(error: &anyhow::Error) -> ExitCode {
    // `… | head` has seen enough: that is no failure.
    if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    fail_with(error, code(error))
}

/// Prints an error with its causes; the process ends with this code.
#[must_use]
pub fn fail_with(error: &anyhow::Error, code: u8) -> ExitCode {
    say(format_args!("error: {error:#}"));
    log::flush();
    ExitCode::from(code)
}

fn code(error: &anyhow::Error) -> u8 {
    use crate::broker::BrokerError;
    use crate::declare::DeclareError;
    use crate::relay::RelayError;
    if matches!(error.downcast_ref::<BrokerError>(), Some(BrokerError::Settings(_))) {
        exit::USAGE
    } else if error.is::<BrokerError>() || error.is::<RelayError>() {
        exit::UNAVAILABLE
    } else if let Some(declare) = error.downcast_ref::<DeclareError>() {
        match declare {
            DeclareError::Mismatch(_) => exit::USAGE,
            _ => exit::UNAVAILABLE,
        }
    } else {
        exit::FAILED
    }
}

/// Help and version are no mistakes; a wrong argument is one of usage.
#[must_use]
pub fn usage(error: &clap::Error) -> ExitCode {
    // The terminal may be gone; there is nobody to tell then.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(exit::USAGE) } else { ExitCode::SUCCESS }
}

/// The signals that ask a process to end.
#[derive(Debug)]
pub struct Requests {
    term: Signal,
    int: Signal,
    /// None where it was ignored when the process began, as `nohup` has it.
    hup: Option<Signal>,
    is_first: bool,
}

impl Requests {
    /// Listens to them; from here on none of them ends the process by itself.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn listen() -> std::io::Result<Self> {
        let hup = if ignores_hangup() { None } else { Some(signal(SignalKind::hangup())?) };
        let (term, int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self { term, int, hup, is_first: true })
    }

    /// Waits for the next SIGTERM or SIGINT, or for SIGHUP where nobody asked before: both the shell and the kernel send that
    /// where a terminal is closed, and it never means more than a first request.
    pub async fn next(&mut self) {
        loop {
            let Self { term, int, hup, is_first } = self;
            let hung_up = async {
                match hup {
                    Some(hup) => hup.recv().await,
                    None => std::future::pending().await,
                }
            };
            let counts = tokio::select! {
                _ = term.recv() => true,
                _ = int.recv() => true,
                _ = hung_up => *is_first,
            };
            *is_first = false;
            if counts {
                return;
            }
        }
    }
}

/// Whether SIGHUP was ignored when this process began.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}

/// Turns true at the first request to end; the second ends the process.
#[must_use]
pub fn interrupted() -> tokio::sync::watch::Receiver<bool> {
    let (tell, stop) = tokio::sync::watch::channel(false);
    // Before anything else is done: without them a signal ends the process wherever it is.
    let requests = Requests::listen();
    tokio::spawn(async move {
        let Ok(mut requests) = requests else {
            // A channel that is closed would look like one that has told.
            return std::mem::forget(tell);
        };
        requests.next().await;
        tell.send_replace(true);
        // The second one does not wait for answers.
        requests.next().await;
        log::flush();
        std::process::exit(i32::from(exit::FAILED));
    });
    stop
}

/// Prints a line of data to stdout.
///
/// # Errors
/// The reader of the pipe is gone.
pub fn print(line: &str) -> std::io::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// `1 mistake`, `2 mistakes`.
#[must_use]
pub fn count(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publisher_does_not_fail_over_what_only_the_worker_reads() {
        let read_and = |reader, name: &str, also: &[&str]| {
            let mut map = BTreeMap::from([(name.to_owned(), "wrong".to_owned())]);
            keep_own(&mut map, reader, also);
            Settings::read(&map).is_ok()
        };
        let read = |reader, name: &str| read_and(reader, name, &[]);
        assert!(read(Reader::Both, "WARREN_LANES") && !read(Reader::Worker, "WARREN_LANES"));
        assert!(!read(Reader::Both, "WARREN_PUBLISH_TIMEOUT"));
        assert!(read(Reader::Both, "DATABASE_URL") && !read_and(Reader::Both, "DATABASE_URL", &["DATABASE_URL"]));
    }
}
