//! The log: lines wait in a bounded buffer, and a thread of their own writes them to stderr.
//!
//! stderr may be a pipe that nobody reads, or a disk that hangs: whoever wrote to it directly would stop there, heartbeats and
//! all. What does not fit into the buffer is dropped and counted. What is in it when the process is killed is lost.
use std::any::Any;
use std::io::{IsTerminal, Write};
use std::panic::PanicHookInfo;
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use warren_shared::env::{LogFormat, Settings};

/// Bytes that wait for stderr; as many again may be on their way to it.
const LIMIT: usize = 4 << 20;
/// How long the end of the process waits for stderr.
const PATIENCE: Duration = Duration::from_secs(1);

/// The AMQP library prints returned messages, bodies and all, that of PostgreSQL parameters: what begins so is never logged.
const SILENT: [&str; 5] = ["lapin", "amq_protocol", "async_rs", "tokio_postgres", "deadpool"];

static STDERR: LazyLock<Lines> = LazyLock::new(|| Lines::to(std::io::stderr(), LIMIT, told));

/// Starts the log as the settings say. A panic is a line of it, too.
pub(crate) fn start(settings: &Settings) {
    use tracing_subscriber::filter::filter_fn;
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    use tracing_subscriber::{EnvFilter, fmt, registry};
    let filter = EnvFilter::try_new(&settings.rust_log).unwrap_or_else(|_| EnvFilter::new("info"));
    // Not as directives, of which the most special one holds: `lapin::channel=trace` would be heard.
    let heard = filter_fn(|metadata| !SILENT.iter().any(|silent| metadata.target().starts_with(silent)));
    let registry = registry().with(filter).with(heard);
    let layer = fmt::layer().with_writer(|| STDERR.clone());
    // A second start in one process (tests) keeps the first.
    let _ = match settings.log_format {
        LogFormat::Json => registry.with(layer.json().flatten_event(true).with_current_span(false)).try_init(),
        LogFormat::Text => {
            let ansi = std::io::stderr().is_terminal();
            registry.with(layer.with_target(false).with_ansi(ansi)).try_init()
        }
    };
    // The standard library's own hook writes to stderr itself, and would wait there.
    std::panic::set_hook(Box::new(panicked));
}

fn panicked(info: &PanicHookInfo<'_>) {
    let text = panic_text(info.payload());
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let trace = std::backtrace::Backtrace::capture();
    if let std::backtrace::BacktraceStatus::Captured = trace.status() {
        tracing::error!(place, "panicked at {place}: {text}\n{trace}");
    } else {
        tracing::error!(place, "panicked at {place}: {text}");
    }
    // Where that ends the process, nobody else waits for it.
    if std::thread::current().name() == Some("main") {
        flush();
    }
}

/// What a panic says; nothing where it is no text.
#[must_use]
pub fn panic_text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&'static str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or_default()
}

fn told(dropped: u64) {
    tracing::warn!(dropped, "{dropped} log lines were dropped: nobody read stderr as fast as they came");
}

/// Prints a line for a person to stderr, behind what was logged before it. Never waits for long.
pub fn say(line: impl std::fmt::Display) {
    STDERR.push(format!("{line}\n").as_bytes());
    // A progress bar is drawn around it.
    if std::io::stderr().is_terminal() {
        flush();
    }
}

/// Waits until what was logged is written, a second at most.
pub fn flush() {
    STDERR.flush(PATIENCE);
}

/// How many lines of this process were dropped.
#[must_use]
pub fn dropped() -> u64 {
    STDERR.state().dropped
}

/// Lines on their way to where they are written.
#[derive(Clone)]
struct Lines(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// There is something to write, or nothing any more.
    changed: Condvar,
    limit: usize,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// What was taken out is being written.
    writing: bool,
    dropped: u64,
}

impl Lines {
    /// Has a thread write to `out`, and say how many lines were dropped once it can write again.
    fn to(out: impl Write + Send + 'static, limit: usize, tell: impl Fn(u64) + Send + 'static) -> Self {
        let lines = Self(Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), limit }));
        let writer = lines.clone();
        // Without a thread the lines are counted as dropped, and the process has worse to tell by its exit.
        let _ = std::thread::Builder::new().name("log".into()).spawn(move || writer.write_on(out, tell));
        lines
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.state();
        if state.waiting.len() + line.len() > self.0.limit {
            state.dropped += 1;
            return;
        }
        state.waiting.extend_from_slice(line);
        drop(state);
        self.0.changed.notify_all();
    }

    fn write_on(self, mut out: impl Write, tell: impl Fn(u64)) {
        let (mut told, mut taken) = (0, Vec::new());
        loop {
            let mut state = self.state();
            state.writing = false;
            self.0.changed.notify_all();
            state = self
                .0
                .changed
                .wait_while(state, |state| state.waiting.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            state.writing = true;
            std::mem::swap(&mut state.waiting, &mut taken);
            drop(state);
            let lost = out.write_all(&taken).is_err();
            let mut state = self.state();
            if lost {
                state.dropped += taken.iter().filter(|byte| **byte == b'\n').count() as u64;
            }
            let dropped = state.dropped;
            drop(state);
            // Where it cannot be written, neither can that.
            if dropped > told && !lost {
                tell(dropped - told);
                told = dropped;
            }
            taken.clear();
        }
    }

    fn flush(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut state = self.state();
        while state.writing || !state.waiting.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn lines_are_written_in_their_order_and_a_flush_waits_for_them() {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let lines = Lines::to(writer, 1000, |_| {});
        for n in 0..50 {
            lines.push(format!("line {n}\n").as_bytes());
        }
        lines.flush(LONG);
        let mut heard = vec![0; 4096];
        let heard_bytes = reader.read(&mut heard).expect("written");
        let wanted: String = (0..50).map(|n| format!("line {n}\n")).collect();
        assert_eq!(String::from_utf8_lossy(&heard[..heard_bytes]), wanted);
    }

    #[test]
    fn who_writes_to_a_pipe_that_nobody_reads_goes_on_and_the_loss_is_told() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let (tell, told) = std::sync::mpsc::channel();
        let lines = Lines::to(writer, 1 << 16, move |dropped| tell.send(dropped).expect("heard"));
        let line = [b"x".repeat(1023), b"\n".to_vec()].concat();
        // A pipe holds 64 KiB, the buffer as much, and as much is on its way.
        for _ in 0..1000 {
            lines.push(&line);
        }
        let begun = Instant::now();
        lines.flush(Duration::from_millis(50));
        assert!(begun.elapsed() < LONG / 2, "the end waits for it a moment, and no longer");
        let dropped = lines.state().dropped;
        assert!((800..=936).contains(&dropped), "{dropped}");
        // Somebody reads again.
        let read = std::thread::spawn(move || {
            std::io::BufReader::new(reader).bytes().map_while(Result::ok).take((1000 - dropped as usize) << 10).count()
        });
        assert_eq!(told.recv_timeout(LONG), Ok(dropped));
        assert_eq!(read.join().expect("no panic") as u64, (1000 - dropped) << 10, "what was kept is whole");
    }

    #[test]
    fn what_a_reader_that_is_gone_does_not_get_is_dropped() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let lines = Lines::to(writer, 1 << 16, |_| {});
        lines.push(b"one\ntwo\n");
        lines.flush(LONG);
        assert_eq!(lines.state().dropped, 2);
    }
}
