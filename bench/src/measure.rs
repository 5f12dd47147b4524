//! A client runs: when it said what, and what it had cost by then.
use crate::process::Session;
use anyhow::{Context, bail, ensure};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How often memory is looked at.
const POLL: Duration = Duration::from_millis(50);

/// A line of the client, and what it had cost when the line came.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) text: String,
    pub(crate) at: Instant,
    cpu: Duration,
    /// Resident bytes.
    pub(crate) memory: u64,
}

/// A run from the start of the process to its end.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) started: Instant,
    pub(crate) ended: Instant,
    pub(crate) lines: Vec<Line>,
    /// Processor time of the whole life.
    cpu: Duration,
    /// Resident bytes at most.
    pub(crate) peak: u64,
}

/// What a run comes to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    pub(crate) per_s: f64,
    pub(crate) cpu_us: f64,
    pub(crate) rss_mb: f64,
}

impl Run {
    /// The line with this text.
    pub(crate) fn line(&self, text: &str) -> anyhow::Result<&Line> {
        self.lines.iter().find(|line| line.text == text).with_context(|| format!("the client never said '{text}'"))
    }

    /// From the first delivery to the last ack.
    pub(crate) fn between(&self, count: u64) -> anyhow::Result<Figures> {
        let (first, last) = (self.line("first")?, self.line("last")?);
        Ok(self.figures(count, last.at - first.at, last.cpu.saturating_sub(first.cpu)))
    }

    /// From the start of the process to its end.
    pub(crate) fn whole(&self, count: u64) -> Figures {
        self.figures(count, self.ended - self.started, self.cpu)
    }

    fn figures(&self, count: u64, time: Duration, cpu: Duration) -> Figures {
        let count = count as f64;
        Figures {
            per_s: count / time.as_secs_f64().max(1e-6),
            cpu_us: cpu.as_secs_f64() * 1e6 / count,
            rss_mb: megabytes(self.peak),
        }
    }
}

pub(crate) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// The child and whatever it starts; killed when dropped.
struct Running {
    child: Child,
    session: Session,
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.session.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs a command to its end.
pub(crate) fn run(command: &Command, patience: Duration) -> anyhow::Result<Run> {
    // A session of its own, and still our child with its own pid: setsid becomes the command.
    let mut own = Command::new("setsid");
    own.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => own.env(name, value),
            None => own.env_remove(name),
        };
    }
    own.stdin(Stdio::null()).stdout(Stdio::piped());
    let started = Instant::now();
    let child = own.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let session = Session::of(child.id());
    let mut running = Running { child, session };
    let stdout = running.child.stdout.take().context("its output is a pipe")?;
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if tell.send((Instant::now(), line)).is_err() {
                return;
            }
        }
    });
    let (mut lines, mut peak): (Vec<Line>, u64) = (Vec::new(), 0);
    loop {
        let Some(left) = patience.checked_sub(started.elapsed()) else {
            bail!("the client does not end within {patience:?}; it said {:?}", lines.last().map(|line| &line.text));
        };
        match told.recv_timeout(POLL.min(left)) {
            Ok((at, text)) => {
                let cpu = running.session.cpu();
                let memory = running.session.memory();
                peak = peak.max(memory).max(running.session.peak().unwrap_or(0));
                lines.push(Line { text, at, cpu, memory });
            }
            Err(RecvTimeoutError::Timeout) => peak = peak.max(running.session.memory()),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    exited(running.child.id(), patience)?;
    let ended = Instant::now();
    // A zombie: its processor time can still be read.
    let cpu = running.session.cpu();
    let status = running.child.wait()?;
    ensure!(status.success(), "{:?} ended with {status}", command.get_program());
    Ok(Run { started, ended, lines, cpu, peak })
}

/// Waits until a child has ended, and leaves it unreaped.
fn exited(pid: u32, patience: Duration) -> anyhow::Result<()> {
    use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
    let pid = Pid::from_raw(pid.cast_signed()).context("a pid")?;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    let begun = Instant::now();
    while waitid(WaitId::Pid(pid), options)?.is_none() {
        ensure!(begun.elapsed() < patience, "the client closed its output and does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
