//! A running program: its pipes, its process group, what it holds, its end.
use super::line::plain;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use warren_shared::Identity;

/// A line of stderr is cut here.
const LOG_LINE: usize = 4096;

/// So much of what a program said last is kept; a full pipe holds less.
const LAST_WORDS: usize = 1 << 20;

/// What a killed program's pipes and its entry in the process table take to go.
const LAST_BREATH: Duration = Duration::from_secs(1);

/// A program that runs.
pub(super) struct Program {
    pub(super) child: Child,
    pub(super) stdin: ChildStdin,
    pub(super) stdout: ChildStdout,
    log: JoinHandle<()>,
    group: Group,
}

/// The program and whatever it started and did not detach. Killed when dropped.
struct Group(Option<rustix::process::Pid>);

impl Group {
    fn kill(&mut self) {
        if let Some(leader) = self.0.take() {
            // What fails is that nobody is left.
            let _ = rustix::process::kill_process_group(leader, rustix::process::Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Program {
    /// Starts it, in a process group of its own: a signal from the terminal is the worker's business, and a kill
    /// reaches what the program started.
    pub(super) fn start(argv: &[String], name: &Arc<str>) -> io::Result<Self> {
        let (program, arguments) = argv.split_first().ok_or_else(|| io::Error::other("no program is named"))?;
        let mut child = command(program, arguments).spawn()?;
        let pid = child.id().unwrap_or_default();
        let pipe = || io::Error::other("a pipe is missing");
        let stderr = child.stderr.take().ok_or_else(pipe)?;
        Ok(Self {
            stdin: child.stdin.take().ok_or_else(pipe)?,
            stdout: child.stdout.take().ok_or_else(pipe)?,
            group: Group(pid.try_into().ok().and_then(rustix::process::Pid::from_raw)),
            log: tokio::spawn(log(stderr, name.clone(), pid)),
            child,
        })
    }

    /// Closes its stdin, lets it end for so long and kills what is left. Returns its exit status, none where it had to
    /// be killed, and what it still said.
    pub(super) async fn end(self, grace: Duration) -> (Option<ExitStatus>, Vec<u8>) {
        let Self { mut child, stdin, mut stdout, mut log, mut group } = self;
        drop(stdin);
        let mut words = Vec::new();
        let mut chunk = vec![0; 1 << 16];
        // Read on: it could not end while a full pipe holds it.
        let listen = async {
            while let Ok(n @ 1..) = stdout.read(&mut chunk).await {
                words.extend_from_slice(&chunk[..n.min(LAST_WORDS - words.len())]);
            }
        };
        let wait = async {
            let status = timeout(grace, child.wait()).await;
            group.kill();
            if status.is_err() {
                let _ = timeout(LAST_BREATH, child.wait()).await;
            }
            status.ok().and_then(Result::ok)
        };
        // Bounded: what left the group may hold the pipe for ever.
        let (status, _) = tokio::join!(wait, timeout(grace + LAST_BREATH, listen));
        let _ = timeout(LAST_BREATH, &mut log).await;
        log.abort();
        (status, words)
    }
}

fn command(program: &str, arguments: &[String]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).process_group(0).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_ours(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    command
}

/// Our settings, secrets above all and the way to them, are none of a handler's business; what else stands in the environment was
/// put there for it.
fn is_ours(name: &str) -> bool {
    ["WARREN_", "AMQP_", "DATABASE_", "OTEL_"].iter().any(|prefix| name.starts_with(prefix))
}

/// Writes its stderr to the log, line by line.
async fn log(stderr: ChildStderr, program: Arc<str>, pid: u32) {
    let mut stderr = BufReader::new(stderr);
    let mut line = Vec::new();
    let say = |line: &mut Vec<u8>| {
        let text = plain(&String::from_utf8_lossy(line), LOG_LINE);
        tracing::info!(program = &*program, pid, "{program}: {}", text.trim_end());
        line.clear();
    };
    while let Ok(heard) = stderr.fill_buf().await
        && !heard.is_empty()
    {
        let end = heard.iter().position(|byte| *byte == b'\n');
        let part = &heard[..end.unwrap_or(heard.len())];
        line.extend_from_slice(&part[..part.len().min(LOG_LINE - line.len())]);
        let taken = part.len() + usize::from(end.is_some());
        stderr.consume(taken);
        if end.is_some() {
            say(&mut line);
        }
    }
    if !line.is_empty() {
        say(&mut line);
    }
}

/// The calls that a program holds, in the order in which it got them.
pub(super) struct Held<T> {
    next: u64,
    calls: BTreeMap<u64, T>,
    /// An event can be in the program twice: its first call was dropped, and the program cannot be told.
    places: HashMap<Identity, VecDeque<u64>>,
}

impl<T> Default for Held<T> {
    fn default() -> Self {
        Self { next: 0, calls: BTreeMap::new(), places: HashMap::new() }
    }
}

impl<T> Held<T> {
    pub(super) fn len(&self) -> usize {
        self.calls.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    pub(super) fn push(&mut self, identity: Identity, call: T) {
        self.places.entry(identity).or_default().push_back(self.next);
        self.calls.insert(self.next, call);
        self.next += 1;
    }

    /// The oldest call and its place, which no other call ever has.
    pub(super) fn oldest(&self) -> Option<(u64, &T)> {
        self.calls.first_key_value().map(|(place, call)| (*place, call))
    }

    /// All calls, the oldest first.
    pub(super) fn calls(&self) -> impl Iterator<Item = &T> {
        self.calls.values()
    }

    /// Takes the oldest call of an event.
    pub(super) fn take(&mut self, identity: Identity) -> Option<T> {
        let places = self.places.get_mut(&identity)?;
        let place = places.pop_front();
        if places.is_empty() {
            self.places.remove(&identity);
        }
        self.calls.remove(&place?)
    }

    /// Takes all, by their places.
    pub(super) fn take_all(&mut self) -> BTreeMap<u64, T> {
        self.places.clear();
        std::mem::take(&mut self.calls)
    }
}

/// Lines on their way to a program.
#[derive(Default)]
pub(super) struct Out {
    lines: Vec<u8>,
    written: usize,
}

impl Out {
    pub(super) fn len(&self) -> usize {
        self.lines.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Where more lines are appended.
    pub(super) fn lines(&mut self) -> &mut Vec<u8> {
        &mut self.lines
    }

    /// What is not written yet.
    pub(super) fn rest(&self) -> &[u8] {
        &self.lines[self.written..]
    }

    /// Notes that so many bytes were written.
    pub(super) fn advance(&mut self, written: usize) {
        self.written += written;
        if self.written == self.lines.len() {
            self.written = 0;
            self.lines.clear();
            // One large event must not cost its size for ever.
            self.lines.shrink_to(1 << 18);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variable_of_ours_is_withheld_and_nothing_else() {
        use warren_shared::env::VARIABLES;
        // The log's level and the trusted certificates are everybody's.
        let everybodys = ["RUST_LOG", "SSL_CERT_FILE"];
        let ours = VARIABLES.iter().map(|variable| variable.name).filter(|name| !everybodys.contains(name));
        for name in ours.chain(["AMQP_PASSWORD_FILE", "OTEL_EXPORTER_OTLP_HEADERS"]) {
            assert!(is_ours(name), "{name}");
        }
        assert!(["PATH", "HOME", "LANG", "ORDER_DIR"].iter().chain(&everybodys).all(|name| !is_ours(name)));
    }

    #[test]
    fn the_calls_of_one_event_are_taken_in_their_order() {
        let mut held = Held::default();
        let [a, b] = ["a", "b"].map(|id| Identity::of("/tests", id));
        for (identity, call) in [(a, 1), (b, 2), (a, 3)] {
            held.push(identity, call);
        }
        assert_eq!(held.oldest(), Some((0, &1)));
        assert_eq!(held.take(a), Some(1));
        assert_eq!(held.oldest(), Some((1, &2)));
        assert_eq!((held.take(a), held.take(a), held.len()), (Some(3), None, 1));
        assert_eq!(held.take_all().into_values().collect::<Vec<_>>(), [2]);
        held.push(b, 4);
        assert_eq!(held.oldest(), Some((3, &4)), "no place is used again");
        assert_eq!((held.take(b), held.is_empty()), (Some(4), true));
    }

    #[test]
    fn what_is_written_goes_and_its_space_with_it() {
        let mut out = Out::default();
        out.lines().extend_from_slice(&vec![b'x'; 1 << 22]);
        out.advance(1);
        assert_eq!((out.rest().len(), out.is_empty()), ((1 << 22) - 1, false));
        out.lines().push(b'y');
        out.advance(1 << 22);
        assert!(out.is_empty() && out.rest().is_empty() && out.lines().capacity() < 1 << 20);
    }
}
