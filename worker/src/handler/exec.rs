//! Handlers that are long-lived programs: an event is a line of JSON on stdin, its answer a line on stdout.
//!
//! A slot is a task that owns one process. Many events are in the program at once; only the oldest has a running clock,
//! so a program that takes one after the other is not blamed for its queue. Whoever is known to be at fault pays with an
//! attempt; where nobody knows, each suspect runs alone.
use super::line::{self, Answer, Named};
use super::program::{Held, Out, Program};
use super::{Call, Handler, Outcome, local, panicked};
use crate::config::Command;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};

/// Unanswered events a program holds.
const WINDOW: usize = 256;
/// Bytes that are read, or made ready before they are written: a batch, never a whole window of large events.
const BATCH: usize = 1 << 16;
/// The longest line that is read, beside the body that the call's limit allows: what stands around it.
const AROUND: usize = 64 << 10;
/// An answer may emit many events, each within the limit: a small one bounds no line.
const LEAST_LINE: usize = 16 << 20;
/// Back-off before a program is started again; doubles up to [`LONGEST`].
const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(10);
/// How long a program may take to end by itself once its pipes are closed.
const GRACE: Duration = Duration::from_secs(2);
/// After so many deaths in a row without an answer it is the program that is broken: its events fail at once.
const BROKEN: u32 = 6;

/// A long-lived program.
pub(super) struct Exec {
    doors: Arc<[Door]>,
    closing: Arc<watch::Sender<bool>>,
}

/// Where calls enter a slot.
struct Door {
    calls: mpsc::UnboundedSender<Asked>,
    gauge: Arc<Gauge>,
}

/// What the choice of a slot rests on.
#[derive(Default)]
struct Gauge {
    calls: AtomicUsize,
    /// Its program is down, or its suspects run alone.
    troubled: AtomicBool,
}

/// A call that waits for its answer.
struct Asked {
    call: Call,
    tell: oneshot::Sender<Outcome>,
    _load: Load,
}

impl Asked {
    /// Tells the caller, who may have left.
    fn tell(self, outcome: Outcome) {
        let _ = self.tell.send(outcome);
    }

    fn retry(self, why: &str) {
        self.tell(Outcome::Retry { error: why.into(), after: None });
    }
}

/// A call in a slot's gauge, for as long as it lives.
struct Load(Arc<Gauge>);

impl Load {
    fn on(gauge: &Arc<Gauge>) -> Self {
        gauge.calls.fetch_add(1, Relaxed);
        Self(gauge.clone())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Relaxed);
    }
}

impl Exec {
    /// Starts the programs. To be called inside a runtime.
    pub(super) fn start(command: Command) -> Self {
        let closing = Arc::new(watch::Sender::new(false));
        let name: Arc<str> = line::plain(&command.argv[..command.argv.len().min(2)].join(" "), 64).into();
        let open = |_| {
            let (calls, queue) = mpsc::unbounded_channel();
            let gauge = Arc::<Gauge>::default();
            let mut slot = Slot {
                argv: command.argv.clone(),
                name: name.clone(),
                calls: queue,
                closing: closing.subscribe(),
                gauge: gauge.clone(),
                held: Held::default(),
                again: VecDeque::new(),
                suspects: VecDeque::new(),
                alone: false,
                clock: (u64::MAX, Instant::now()),
                longest: LEAST_LINE,
                partial: Vec::new(),
                noise: [0; 2],
                deaths: 0,
            };
            tokio::spawn(async move {
                // Its calls fail, and those that come after them find it at work again.
                while let Err(panic) = AssertUnwindSafe(slot.run()).catch_unwind().await {
                    slot.held.take_all().into_values().for_each(|asked| asked.tell(panicked(&*panic)));
                    sleep(FIRST).await;
                }
            });
            Door { calls, gauge }
        };
        Self { doors: (0..command.processes).map(open).collect(), closing }
    }
}

impl Handler for Exec {
    fn handle(&self, call: Call) -> BoxFuture<'static, Outcome> {
        let (doors, closing) = (self.doors.clone(), self.closing.clone());
        Box::pin(async move {
            let burden = |door: &&Door| (door.gauge.troubled.load(Relaxed), door.gauge.calls.load(Relaxed));
            let (tell, answer) = oneshot::channel();
            if let Some(door) = doors.iter().min_by_key(burden) {
                // Where the slot has ended, `tell` is dropped with what could not be sent.
                let _ = door.calls.send(Asked { call, tell, _load: Load::on(&door.gauge) });
            }
            match answer.await {
                Ok(outcome) => outcome,
                Err(_) if *closing.borrow() => Outcome::Interrupted,
                Err(_) => Outcome::Retry { error: "the program's slot has ended".into(), after: None },
            }
        })
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        let closing = self.closing.clone();
        Box::pin(async move {
            closing.send_replace(true);
            closing.closed().await;
        })
    }
}

/// Why a program is no longer served.
enum End {
    /// The handler is closed.
    Closing,
    /// It ended, or closed a pipe.
    Ended,
    /// It wrote a line that does not end.
    Endless,
    /// This call, its oldest, was not answered in time.
    Late(u64),
}

/// What a program says that answers nothing.
#[derive(Clone, Copy)]
enum Noise {
    NoAnswer,
    Unasked,
}

/// One process, and the calls that are its.
struct Slot {
    argv: Vec<String>,
    name: Arc<str>,
    calls: mpsc::UnboundedReceiver<Asked>,
    closing: watch::Receiver<bool>,
    gauge: Arc<Gauge>,
    held: Held<Asked>,
    /// Taken from a program that was killed for another's sake: they come first.
    again: VecDeque<Asked>,
    /// One of them may have killed the program: each runs alone, before all others.
    suspects: VecDeque<Asked>,
    /// What the program holds was a suspect.
    alone: bool,
    /// The oldest call, and since when it is that.
    clock: (u64, Instant),
    /// Bytes of the longest line that is read.
    longest: usize,
    /// The beginning of a line.
    partial: Vec<u8>,
    /// How often each kind of [`Noise`] was heard.
    noise: [u64; 2],
    /// In a row, without an answer between them.
    deaths: u32,
}

impl Slot {
    async fn run(&mut self) {
        loop {
            match Program::start(&self.argv, &self.name) {
                Ok(mut program) => match self.serve(&mut program).await {
                    End::Closing => {
                        program.end(GRACE).await;
                        return;
                    }
                    end => self.bury(program, end).await,
                },
                // Who waits goes on waiting: the program may be all right.
                Err(trouble) if local::is_trouble(&trouble) => {
                    self.gauge.troubled.store(true, Relaxed);
                    let what = format!("cannot start '{}'", self.name);
                    tokio::select! {
                        () = local::wait_for_it_to_pass(&what, &trouble) => {}
                        () = closed(&mut self.closing) => return,
                    }
                }
                Err(error) => self.refuse(&error),
            }
            let doubled = FIRST.saturating_mul(1 << self.deaths.saturating_sub(1).min(16));
            tokio::select! {
                () = sleep(doubled.min(LONGEST)) => {}
                () = closed(&mut self.closing) => return,
            }
        }
    }

    /// Serves a program until it ends or must.
    async fn serve(&mut self, program: &mut Program) -> End {
        let mut out = Out::default();
        let mut heard = vec![0; BATCH];
        loop {
            self.fill(&mut out);
            let late = self.late();
            // In this order: who is dead is given nothing more. No branch starves another: what is written is bounded by
            // the window, and that by what is read.
            tokio::select! {
                biased;
                () = closed(&mut self.closing) => return End::Closing,
                _ = program.child.wait() => return End::Ended,
                () = sleep_until(late.map_or_else(Instant::now, |(_, at)| at)), if late.is_some() => {
                    return End::Late(late.map_or(0, |(place, _)| place));
                }
                asked = self.calls.recv(), if self.has_room(&out) => match asked {
                    Some(asked) => self.again.push_back(asked),
                    None => return End::Closing,
                },
                written = program.stdin.write(out.rest()), if !out.is_empty() => match written {
                    Ok(n) => out.advance(n),
                    Err(_) => return End::Ended,
                },
                // While it holds nothing, nothing that it says matters: the pipe fills, and a flood costs nothing.
                read = program.stdout.read(&mut heard), if !self.held.is_empty() => match read {
                    Ok(n @ 1..) => {
                        let before = self.noise;
                        if !self.hear(&heard[..n]) {
                            return End::Endless;
                        }
                        if self.noise != before {
                            tokio::task::yield_now().await;
                        }
                    }
                    _ => return End::Ended,
                },
            }
        }
    }

    /// Makes ready for the program what it may have.
    fn fill(&mut self, out: &mut Out) {
        while self.has_room(out) {
            let suspect = self.suspects.pop_front();
            self.alone = suspect.is_some();
            let Some(asked) = suspect.or_else(|| self.again.pop_front()).or_else(|| self.calls.try_recv().ok()) else {
                break;
            };
            // Its caller may have left.
            if asked.tell.is_closed() {
                continue;
            }
            self.longest = self.longest.max(asked.call.context.limits.body.saturating_add(AROUND));
            let (before, identity) = (out.lines().len(), asked.call.event.identity());
            match catch_unwind(AssertUnwindSafe(|| line::write(&asked.call, &identity, out.lines()))) {
                Ok(()) => self.held.push(identity, asked),
                Err(panic) => {
                    out.lines().truncate(before);
                    asked.tell(panicked(&*panic));
                }
            }
        }
        self.gauge.troubled.store(self.alone || !self.suspects.is_empty(), Relaxed);
    }

    fn has_room(&self, out: &Out) -> bool {
        let window = if self.alone || !self.suspects.is_empty() { 1 } else { WINDOW };
        self.held.len() < window && out.len() < BATCH
    }

    /// The oldest call, and when it is late.
    fn late(&mut self) -> Option<(u64, Instant)> {
        let (place, asked) = self.held.oldest()?;
        if self.clock.0 != place {
            self.clock = (place, Instant::now());
        }
        Some((place, self.clock.1 + asked.call.context.timeout))
    }

    /// Takes in what the program said. False: a line does not end.
    fn hear(&mut self, mut heard: &[u8]) -> bool {
        while let Some(end) = heard.iter().position(|byte| *byte == b'\n') {
            if self.partial.is_empty() {
                self.answer(&heard[..end]);
            } else {
                let mut whole = std::mem::take(&mut self.partial);
                whole.extend_from_slice(&heard[..end]);
                self.answer(&whole);
            }
            heard = &heard[end + 1..];
        }
        self.partial.extend_from_slice(heard);
        self.partial.len() <= self.longest
    }

    fn answer(&mut self, line: &[u8]) {
        if line.trim_ascii().is_empty() {
            return;
        }
        let Ok(answer) = Answer::read(line) else { return self.note(Noise::NoAnswer) };
        let Some(asked) = self.asked(&answer.named) else { return self.note(Noise::Unasked) };
        self.deaths = 0;
        let outcome = catch_unwind(AssertUnwindSafe(|| answer.outcome(&asked.call)));
        asked.tell(outcome.unwrap_or_else(|panic| panicked(&*panic)));
    }

    /// Takes the call that a line names.
    fn asked(&mut self, named: &Named) -> Option<Asked> {
        let identity = match named {
            Named::Event(identity) => *identity,
            Named::Id(id) => {
                let mut same = self.held.calls().map(|asked| &asked.call.event).filter(|event| event.id() == id);
                let identity = same.next()?.identity();
                // Of another source, with the same id: nobody can tell which is meant.
                if same.any(|event| event.identity() != identity) {
                    return None;
                }
                identity
            }
        };
        self.held.take(identity)
    }

    /// Says so once, then at the 10th, the 100th …: a program that floods must not flood the log.
    fn note(&mut self, noise: Noise) {
        let (place, what) = match noise {
            Noise::NoAnswer => (0, "a line on stdout that is no answer (an object with the strings 'id' and 'source')"),
            Noise::Unasked => (1, "an answer for an event that it does not hold (answered before, or another's name)"),
        };
        self.noise[place] += 1;
        let (name, count) = (&*self.name, self.noise[place]);
        if count == 10_u64.pow(count.ilog10()) {
            tracing::warn!(
                program = name,
                count,
                "{name} wrote {what}, {count} so far, ignored: its log goes to stderr"
            );
        }
    }

    /// Settles who pays for a program's end.
    async fn bury(&mut self, program: Program, end: End) {
        self.gauge.troubled.store(true, Relaxed);
        let grace = if let End::Ended = end { GRACE } else { Duration::ZERO };
        let (status, last_words) = program.end(grace).await;
        // Answers that were under way count.
        if !matches!(end, End::Endless) && self.hear(&last_words) {
            let last = std::mem::take(&mut self.partial);
            self.answer(&last);
        }
        let partial = std::mem::take(&mut self.partial);
        let longest = self.longest;
        let endless = if let End::Endless = end { Answer::read(&partial).ok() } else { None };
        if let Some(asked) = endless.and_then(|answer| self.asked(&answer.named)) {
            // It would write the same line again.
            let error = format!("the program's answer is wrong: it is a line of more than {longest} bytes");
            asked.tell(Outcome::Dead { error });
            self.deaths = 0;
            self.held.take_all().into_values().rev().for_each(|asked| self.again.push_front(asked));
        }
        drop(partial);

        let name = &*self.name;
        let mut held = self.held.take_all();
        let left = held.len();
        let why = match (&end, status) {
            (End::Late(place), _) => {
                if let Some(asked) = held.remove(place) {
                    let timeout = asked.call.context.timeout;
                    tracing::warn!(
                        program = name,
                        left,
                        "{name} gave no answer within {timeout:?} and was killed; it must flush each"
                    );
                    asked.retry(&format!("no answer within {timeout:?}"));
                }
                held.into_values().rev().for_each(|asked| self.again.push_front(asked));
                return;
            }
            (End::Endless, _) => format!("wrote a line of more than {longest} bytes"),
            (_, Some(status)) => format!("ended ({status})"),
            (_, None) => "closed its stdin or stdout".into(),
        };
        self.deaths += 1;
        tracing::warn!(program = name, left, "{name} {why}, {left} events were in it: it is started again");
        if self.deaths >= BROKEN {
            let all = held.into_values().chain(self.suspects.drain(..)).chain(self.again.drain(..));
            let why = format!("the program {why}, now {} times in a row without an answer", self.deaths);
            all.for_each(|asked| asked.retry(&why));
        } else if held.len() == 1 {
            let why = format!("the program {why} while it handled this event");
            for asked in held.into_values() {
                asked.retry(&why);
            }
        } else {
            self.suspects.extend(held.into_values());
        }
    }

    /// Fails what waits: the program cannot be started.
    fn refuse(&mut self, error: &std::io::Error) {
        self.gauge.troubled.store(true, Relaxed);
        self.deaths += 1;
        let program = line::plain(self.argv.first().map_or("", String::as_str), 255);
        let why = format!("cannot start '{program}': {error}: correct 'exec' in the routes");
        tracing::error!(program, "{why}");
        let waiting = std::iter::from_fn(|| self.calls.try_recv().ok());
        self.suspects.drain(..).chain(self.again.drain(..)).chain(waiting).for_each(|asked| asked.retry(&why));
    }
}

/// Resolves once the handler is closed or dropped.
async fn closed(closing: &mut watch::Receiver<bool>) {
    let _ = closing.wait_for(|closing| *closing).await;
}

#[cfg(test)]
#[path = "exec_tests.rs"]
mod tests;
