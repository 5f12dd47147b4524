//! A running program: its pipes, its process group, its end.
use super::line::plain;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Kept from programs: the first four are secrets, the last is the worker's own.
const WITHHELD: [&str; 5] = ["AMQP_URL", "AMQP_URL_FILE", "DATABASE_URL", "DATABASE_URL_FILE", "RUST_MIN_STACK"];

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
        let mut command = Command::new(program);
        command.args(arguments).process_group(0).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        WITHHELD.iter().for_each(|name| {
            command.env_remove(name);
        });
        let mut child = command.spawn()?;
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
