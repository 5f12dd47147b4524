//! `send`: lines in, confirmed messages out, and an account of every line. Memory stays flat for any size of input.
use crate::broker::Broker;
use crate::lines::{self, Line, Reading};
use crate::log::say;
use crate::publish::{Health, Options, Outcome, Publisher, Refused};
use crate::seal::Seal;
use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{BufReader, Read, Write};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use warren_shared::Message;
use warren_shared::env::Settings;
use warren_shared::event::Unreadable;

/// What to send and how.
#[derive(Clone, Debug)]
pub struct Order {
    /// The file; none = standard input.
    pub file: Option<PathBuf>,
    /// How lines become events.
    pub reading: Reading,
    /// The exchange.
    pub exchange: String,
    /// The lane of all, instead of each event's own.
    pub lane: Option<String>,
    /// Events a second at most.
    pub rate: Option<u32>,
    /// Unconfirmed events at most.
    pub window: usize,
    /// Where refused lines go.
    pub rejects: Option<PathBuf>,
}

/// The account: every line that was read is in exactly one of the other three.
#[derive(Clone, Copy, Debug, Default)]
pub struct Account {
    /// Lines read.
    pub read: u64,
    /// On the broker, for certain.
    pub confirmed: u64,
    /// Not on the broker, for certain.
    pub refused: u64,
    /// May be on the broker: sending stopped before it answered.
    pub unknown: u64,
    /// Whether the input was read to its end, and not only to an interrupt.
    pub ended: bool,
}

impl Account {
    /// Whether the whole input is on the broker.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.ended && self.read == self.confirmed
    }
}

/// A line, and its share of the memory that lines may take from their reading to their outcome.
struct Held {
    line: Line,
    _share: OwnedSemaphorePermit,
}

/// Bytes of lines that are on their way at once. Each exists as line, as message and as frames.
const BYTES: usize = 32 << 20;

/// A chunk of lines on its way.
struct Chunk {
    lines: Vec<Held>,
    outcomes: Pin<Box<dyn Future<Output = Vec<Outcome>> + Send>>,
}

/// What a line is refused for.
enum Refusal {
    Line(Unreadable),
    Broker(Refused),
}

enum Item {
    Chunk(Chunk),
    Bad(Held, Unreadable),
    Broken(std::io::Error),
    End,
}

const CHUNK: usize = 256;
const CHUNK_BYTES: usize = 4 << 20;

/// Sends everything, or as much as could be sent before an interrupt.
///
/// # Errors
/// The input or the rejects file cannot be opened, or the broker cannot be reached at the start.
pub async fn send(settings: &Settings, order: Order) -> anyhow::Result<Account> {
    let (input, size): (Box<dyn Read + Send>, Option<u64>) = match &order.file {
        None => (Box::new(std::io::stdin()), None),
        Some(path) => {
            let file = std::fs::File::open(path).with_context(|| format!("cannot open '{}'", path.display()))?;
            let size = file.metadata().ok().map(|m| m.len()).filter(|size| *size > 0);
            (Box::new(file), size)
        }
    };
    let rejects = match &order.rejects {
        None => None,
        Some(path) => {
            let file = std::fs::File::create(path).with_context(|| format!("cannot write '{}'", path.display()))?;
            Some(std::io::BufWriter::new(file))
        }
    };
    let broker = Broker::new(settings.amqp.clone(), "warren-publisher send");
    let link = broker.connect_within("publish", settings.connect_timeout).await?;
    let options =
        Options { window: order.window, timeout: settings.publish_timeout, seal: Seal::new(&settings.payload_keys) };
    let publisher = Publisher::start(broker, link, options);
    let screen = Screen::new(size);
    tokio::spawn(report(publisher.health(), screen.bar.clone()));

    let stop = crate::process::interrupted();
    let (feed, items) = mpsc::channel(8);
    let feeder = Feeder { publisher, order: order.clone(), settings: settings.clone(), feed, stop: stop.clone() };
    // Reading a terminal or a pipe blocks a thread of its own; the process does not wait for it at the end.
    let (lines, read) = mpsc::channel(2);
    let limit = settings.limits.body;
    let runtime = tokio::runtime::Handle::current();
    let input = BufReader::with_capacity(1 << 18, input);
    std::thread::spawn(move || read_lines(input, limit, &lines, &runtime));
    tokio::spawn(feeder.run(read));
    Collector { account: Account::default(), rejects, screen, shown: 0 }.run(items, stop).await
}

/// Hands on what one read of the input brought, in chunks: a line that comes alone waits for no other.
fn read_lines(
    mut input: BufReader<impl Read>,
    limit: usize,
    chunks: &mpsc::Sender<Vec<std::io::Result<Held>>>,
    runtime: &tokio::runtime::Handle,
) {
    let room = Arc::new(Semaphore::new(BYTES));
    let (mut number, mut chunk, mut ended) = (0, Vec::new(), false);
    while !ended {
        match lines::next(&mut input, &mut number, limit.saturating_add(1)) {
            Ok(None) => ended = true,
            Ok(Some(line)) => {
                let size = line.text.len().clamp(1, BYTES) as u32;
                let share = match room.clone().try_acquire_many_owned(size) {
                    Ok(share) => share,
                    Err(_) => {
                        // What is held here must be on its way before more room can be waited for.
                        if chunks.blocking_send(std::mem::take(&mut chunk)).is_err() {
                            return;
                        }
                        // The semaphore is never closed.
                        let Ok(share) = runtime.block_on(room.clone().acquire_many_owned(size)) else { return };
                        share
                    }
                };
                chunk.push(Ok(Held { line, _share: share }));
            }
            Err(error) => {
                chunk.push(Err(error));
                ended = true;
            }
        }
        let is_due = ended || chunk.len() == CHUNK || !input.buffer().contains(&b'\n');
        if is_due && chunks.blocking_send(std::mem::take(&mut chunk)).is_err() {
            return;
        }
    }
}

struct Feeder {
    publisher: Publisher,
    order: Order,
    settings: Settings,
    feed: mpsc::Sender<Item>,
    stop: tokio::sync::watch::Receiver<bool>,
}

impl Feeder {
    async fn run(mut self, mut read: mpsc::Receiver<Vec<std::io::Result<Held>>>) {
        let started = Instant::now();
        let mut sent = 0_u64;
        let most = self.order.rate.map_or(CHUNK, |rate| (rate as usize / 20).clamp(1, CHUNK));
        let mut waiting = Vec::new().into_iter();
        loop {
            let mut next = waiting.next();
            if next.is_none() {
                let chunk = tokio::select! {
                    biased;
                    _ = self.stop.wait_for(|stop| *stop) => return,
                    chunk = read.recv() => chunk,
                };
                let Some(chunk) = chunk else {
                    let _ = self.feed.send(Item::End).await;
                    return;
                };
                waiting = chunk.into_iter();
                next = waiting.next();
            }
            let (mut lines, mut messages, mut bytes) = (Vec::new(), Vec::new(), 0);
            // What is waiting makes a chunk; what is slow to come is not waited for.
            while let Some(held) = next.take() {
                let held = match held {
                    Ok(held) => held,
                    Err(error) => {
                        let _ = self.feed.send(Item::Broken(error)).await;
                        break;
                    }
                };
                match self.message(&held.line) {
                    Ok(message) => {
                        bytes += held.line.text.len();
                        lines.push(held);
                        messages.push(message);
                    }
                    Err(error) => {
                        if self.feed.send(Item::Bad(held, error)).await.is_err() {
                            return;
                        }
                    }
                }
                if lines.len() < most && bytes < CHUNK_BYTES {
                    next = waiting.next();
                }
            }
            if let Some(rate) = self.order.rate {
                let due = started + Duration::from_secs_f64(sent as f64 / f64::from(rate));
                tokio::time::sleep_until(due.into()).await;
            }
            if lines.is_empty() {
                continue;
            }
            sent += lines.len() as u64;
            let outcomes = tokio::select! {
                biased;
                _ = self.stop.wait_for(|stop| *stop) => return,
                outcomes = self.publisher.submit(messages) => outcomes,
            };
            if self.feed.send(Item::Chunk(Chunk { lines, outcomes: outcomes.into_future() })).await.is_err() {
                return;
            }
        }
    }

    fn message(&self, line: &Line) -> Result<Message, Unreadable> {
        let event = self.order.reading.event(line, self.settings.limits)?;
        Ok(Message::to_lane(&event, &self.order.exchange, self.order.lane.as_deref()))
    }
}

struct Collector {
    account: Account,
    rejects: Option<std::io::BufWriter<std::fs::File>>,
    screen: Screen,
    shown: u32,
}

/// Refused lines that are shown one by one.
const SHOWN: u32 = 10;

impl Collector {
    async fn run(
        mut self,
        mut items: mpsc::Receiver<Item>,
        mut stop: tokio::sync::watch::Receiver<bool>,
    ) -> anyhow::Result<Account> {
        let mut broken = None;
        while let Some(item) = items.recv().await {
            match item {
                Item::Bad(held, error) => {
                    self.account.read += 1;
                    self.refuse(&held.line, &Refusal::Line(error))?;
                }
                Item::Broken(error) => broken = Some(error),
                Item::End => self.account.ended = true,
                Item::Chunk(mut chunk) => {
                    self.account.read += chunk.lines.len() as u64;
                    let stopped = async {
                        let _ = stop.wait_for(|stop| *stop).await;
                        // An interrupt waits this long for answers: most come in milliseconds.
                        tokio::time::sleep(Duration::from_secs(3)).await;
                    };
                    let outcomes = tokio::select! {
                        biased;
                        outcomes = &mut chunk.outcomes => outcomes,
                        () = stopped => chunk.lines.iter().map(|_| Err(Refused::Unknown)).collect(),
                    };
                    for (Held { line, .. }, outcome) in chunk.lines.iter().zip(outcomes) {
                        self.screen.bar.inc(line.length as u64 + 1);
                        match outcome {
                            Ok(_) => self.account.confirmed += 1,
                            Err(Refused::Unknown) => self.account.unknown += 1,
                            Err(refused) => self.refuse(line, &Refusal::Broker(refused))?,
                        }
                    }
                    self.screen.show(&self.account);
                }
            }
        }
        self.screen.bar.finish_and_clear();
        if let Some(mut rejects) = self.rejects {
            rejects.flush().context("cannot write the rejects")?;
        }
        if !self.account.ended && *stop.borrow() {
            say(format_args!(
                "interrupted after {} lines: sending the same input again is harmless",
                self.account.read
            ));
        }
        match broken {
            Some(error) => Err(error).context("the input cannot be read any further"),
            None => Ok(self.account),
        }
    }

    fn refuse(&mut self, line: &Line, refusal: &Refusal) -> anyhow::Result<()> {
        self.account.refused += 1;
        let (reason, error) = match refusal {
            Refusal::Line(error) => (error.reason(), error.to_string()),
            Refusal::Broker(refused @ Refused::Returned { .. }) => ("returned", refused.to_string()),
            Refusal::Broker(refused @ Refused::Rejected) => ("rejected", refused.to_string()),
            Refusal::Broker(refused) => ("refused", refused.to_string()),
        };
        self.shown += 1;
        if self.shown <= SHOWN {
            self.screen.bar.suspend(|| say(format_args!("line {}: {error}", line.number)));
        } else if self.shown == SHOWN + 1 {
            let hint = if self.rejects.is_some() { "" } else { " (--rejects FILE keeps them all)" };
            self.screen.bar.suspend(|| say(format_args!("more lines are refused{hint}")));
        }
        if let Some(rejects) = &mut self.rejects {
            let input = String::from_utf8_lossy(&line.text);
            let record = serde_json::json!({"line": line.number, "reason": reason, "error": error, "input": input});
            writeln!(rejects, "{record}").context("cannot write the rejects")?;
        }
        Ok(())
    }
}

/// A bar on a terminal, nothing elsewhere.
struct Screen {
    bar: ProgressBar,
}

impl Screen {
    fn new(size: Option<u64>) -> Self {
        let (bar, template) = match size {
            Some(size) => (ProgressBar::new(size), "{bar:40} {percent:>3}% {msg} {eta} left"),
            None => (ProgressBar::new_spinner(), "{spinner} {msg}"),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self { bar }
    }

    fn show(&self, account: &Account) {
        let seconds = self.bar.elapsed().as_secs_f64().max(0.001);
        let rate = account.confirmed as f64 / seconds;
        self.bar.set_message(format!("{} confirmed, {} refused, {rate:.0}/s", account.confirmed, account.refused));
    }
}

/// Says once when publishing stalls and why, and once when it goes on.
async fn report(health: tokio::sync::watch::Receiver<Health>, bar: ProgressBar) {
    let tell = |now: &Health| match now {
        Health::Open => say("publishing goes on"),
        Health::Connecting => say("the connection is lost: connecting again, nothing is lost meanwhile"),
        Health::Blocked(why) => say(format_args!("the broker blocks publishing ({why}): waiting until it clears")),
    };
    Health::follow(health, |now| bar.suspend(|| tell(now))).await;
}
