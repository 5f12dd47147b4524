//! Publishing that proves it: mandatory, confirmed, in a bounded window, with a deadline.
//!
//! One task owns the connection and its one channel (confirms go astray where two tasks publish on a channel). It
//! publishes in joined chunks, keeps each message until its outcome is known, and repeats what has none on the next
//! channel, in the same order and with the same id.
//!
//! The library attaches a returned message to some confirm near its own, so returns are matched by address and id,
//! over all confirms of the channel. A batch is reported only after every confirm that the broker's last answer
//! resolved has been looked at (see `Wire::barrier`).
mod wire;

use crate::broker::{Broker, Link, describe};
use crate::codec;
use crate::seal::Seal;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use warren_shared::Message;
use wire::{Ready, Wire};

/// Proof that the broker stored and routed a message. Only this file makes one.
///
/// ```compile_fail
/// let forged = warren_publisher::Confirmed(());
/// ```
#[derive(Debug)]
#[must_use]
pub struct Confirmed(());

/// Why a message is not proven to be on the broker.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No queue is bound for it.
    #[error("nobody subscribes: no queue takes routing key '{routing_key}' of exchange '{exchange}' ({reply})")]
    Returned {
        /// The exchange.
        exchange: String,
        /// The routing key.
        routing_key: String,
        /// What the broker said.
        reply: String,
    },
    /// The broker would not take it (a queue at its limit, or without a leader).
    #[error("the broker would not store it (basic.nack): a queue is at its limit or has no leader")]
    Rejected,
    /// The broker closed the channel over it: no such exchange, no permission, too large.
    #[error("the broker refuses it: {0}")]
    Forbidden(String),
    /// AMQP cannot carry it.
    #[error(transparent)]
    Unwritable(#[from] codec::Unwritable),
    /// The publisher was closed before the broker answered: it may be stored or not.
    #[error("the outcome is unknown: publishing stopped before the broker answered")]
    Unknown,
}

impl Refused {
    /// Whether the same message may be taken later: the broker, the queue or the topology is at fault, not the message.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Returned { .. } | Self::Rejected | Self::Unknown => true,
            Self::Forbidden(_) => self.is_of_the_exchange(),
            Self::Unwritable(_) => false,
        }
    }

    /// Whether the broker would say so of every message to that exchange: it is not there, or not for us. Permissions on topics,
    /// and sizes, are a message's own.
    #[must_use]
    pub fn is_of_the_exchange(&self) -> bool {
        let Self::Forbidden(said) = self else { return false };
        said.starts_with("NOT_FOUND") || said.starts_with("ACCESS_REFUSED") && !said.contains(" to topic ")
    }
}

/// What publishing did.
pub type Outcome = Result<Confirmed, Refused>;

/// How a publisher behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Unconfirmed messages at most. More than a thousand buys nothing.
    pub window: usize,
    /// After this an unconfirmed message is repeated on a new connection.
    pub timeout: Duration,
    /// What payloads are sealed with.
    pub seal: Seal,
}

impl Default for Options {
    fn default() -> Self {
        Self { window: 1000, timeout: Duration::from_secs(30), seal: Seal::default() }
    }
}

/// What the connection is doing, for progress, readiness and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It publishes.
    Open,
    /// It is being reached.
    Connecting,
    /// The broker takes nothing for now (memory or disk alarm).
    Blocked(String),
}

impl Health {
    /// Tells of every change, for as long as the publisher lives.
    pub(crate) async fn follow(mut health: watch::Receiver<Self>, mut tell: impl FnMut(&Self)) {
        let mut before = Self::Open;
        while health.changed().await.is_ok() {
            let now = health.borrow_and_update().clone();
            if now != before {
                tell(&now);
                before = now;
            }
        }
    }
}

/// Messages published at once, in one chunk: awaiting each publish before the next costs a thread hop a message.
const CHUNK: usize = 256;

/// Bytes of bodies in hand after which no more are taken: a window of large events must not fill the memory.
const BYTES: usize = 64 << 20;

/// How long a channel is used on that the broker refuses messages of, before another is tried: at first, doubling up to
/// the last. A channel can hold on to a queue's former leader (seen on 3.10, after two nodes of three had died in turn) and
/// refuse for ever what a new one takes.
const RENEWALS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// How long a channel may take to open.
const OPENING: Duration = Duration::from_secs(10);

struct Batch {
    messages: Vec<Message>,
    reply: Reply,
}

/// Tells outcomes, each with its message's place in the batch.
type Reply = mpsc::UnboundedSender<Vec<(usize, Outcome)>>;

/// The outcomes of a batch. Awaited, they are all of them, in the order of the messages.
#[derive(Debug)]
#[must_use]
pub struct Outcomes {
    news: mpsc::UnboundedReceiver<Vec<(usize, Outcome)>>,
    /// Which messages have their outcome, and how many have not.
    told: Vec<bool>,
    open: usize,
}

impl Outcomes {
    /// Those that are known by now, each with its message's place in the batch; none once all were told. One that the broker does
    /// not answer keeps no other back.
    pub async fn next(&mut self) -> Option<Vec<(usize, Outcome)>> {
        if self.open == 0 {
            return None;
        }
        let untold = || {
            // The publisher is gone.
            let places = self.told.iter().enumerate().filter(|(_, told)| !**told);
            places.map(|(place, _)| (place, Err(Refused::Unknown))).collect()
        };
        let news: Vec<(usize, Outcome)> = match self.news.recv().await {
            Some(news) => news,
            None => untold(),
        };
        news.iter().for_each(|(place, _)| self.told[*place] = true);
        self.open -= news.len();
        Some(news)
    }
}

impl IntoFuture for Outcomes {
    type Output = Vec<Outcome>;
    type IntoFuture = BoxFuture<'static, Vec<Outcome>>;

    fn into_future(mut self) -> Self::IntoFuture {
        Box::pin(async move {
            let mut outcomes: Vec<Outcome> = self.told.iter().map(|_| Err(Refused::Unknown)).collect();
            while let Some(news) = self.next().await {
                news.into_iter().for_each(|(place, outcome)| outcomes[place] = outcome);
            }
            outcomes
        })
    }
}

/// A handle to the publishing task; clones share it. The task ends when all are dropped.
#[derive(Clone, Debug)]
pub struct Publisher {
    batches: mpsc::Sender<Batch>,
    health: watch::Receiver<Health>,
}

impl Publisher {
    /// Starts the task. `link` is a connection of its own: an alarm blocks whatever else uses it.
    #[must_use]
    pub fn start(broker: Broker, link: Link, options: Options) -> Self {
        let (batches, inbox) = mpsc::channel(4);
        let (tell, health) = watch::channel(Health::Open);
        let (sheets, touched, queue) = (BTreeMap::new(), Vec::new(), VecDeque::new());
        let (closed, next_sheet, bytes, renewal) = (false, 0, 0, RENEWALS[0]);
        let desk = Desk { broker, options, tell, inbox, closed, sheets, next_sheet, touched, queue, bytes, renewal };
        tokio::spawn(desk.run(link));
        Self { batches, health }
    }

    /// Publishes one message and waits for its outcome.
    ///
    /// # Errors
    /// Says why it is not proven to be on the broker.
    pub async fn publish(&self, message: Message) -> Outcome {
        self.publish_all(vec![message]).await.pop().unwrap_or(Err(Refused::Unknown))
    }

    /// Publishes messages in their order; the outcomes have the same order.
    pub async fn publish_all(&self, messages: Vec<Message>) -> Vec<Outcome> {
        self.submit(messages).await.await
    }

    /// Hands messages over, waiting while the window is full; the outcomes follow.
    pub async fn submit(&self, messages: Vec<Message>) -> Outcomes {
        let (reply, news) = mpsc::unbounded_channel();
        let outcomes = Outcomes { news, told: vec![false; messages.len()], open: messages.len() };
        // A closed inbox drops `reply`, and the outcomes are unknown.
        let _ = self.batches.send(Batch { messages, reply }).await;
        outcomes
    }

    /// What the connection is doing.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }
}

/// A batch, until all of its outcomes are told.
struct Sheet {
    reply: Reply,
    /// Outcomes that are not told yet: those of one answer of the broker are told at once.
    news: Vec<(usize, Outcome)>,
    open: usize,
}

/// A message and its place in a batch.
struct Entry {
    message: Arc<Message>,
    sheet: u64,
    index: usize,
}

/// The publishing task: batches come in, sheets are filled.
struct Desk {
    broker: Broker,
    options: Options,
    tell: watch::Sender<Health>,
    inbox: mpsc::Receiver<Batch>,
    /// All handles are dropped: what is queued is finished, then the task ends.
    closed: bool,
    sheets: BTreeMap<u64, Sheet>,
    next_sheet: u64,
    /// Those with news.
    touched: Vec<u64>,
    /// Not yet on the wire, or to be repeated; in order.
    queue: VecDeque<Entry>,
    /// Bytes of all bodies without an outcome.
    bytes: usize,
    /// How old a channel must be to be replaced over a refusal.
    renewal: Duration,
}

/// How a channel ended.
enum End {
    /// Nobody publishes any more, and everything has its outcome.
    Finished,
    /// The broker closed the channel over one of so many messages in flight.
    Accused {
        /// What it said.
        said: String,
        /// Messages in flight.
        of: usize,
    },
    /// The broker confirmed some messages and not others within the deadline.
    Partly,
    /// The broker stored none of some messages: another channel may have more luck with the next.
    Refusing,
    /// The connection is gone, or silent beyond the deadline.
    Lost(String),
}

impl End {
    /// The node is there and does not do its work.
    fn mute(link: &Link, why: String) -> Self {
        link.give_up();
        Self::Lost(why)
    }
}

/// The search for the message that the broker closed a channel over, among so many at the head of the queue. They go
/// in windows of half their number, so every further complaint halves them, until one names its cause.
#[derive(Default)]
struct Search {
    suspects: usize,
    window: usize,
}

impl Search {
    fn among(suspects: usize) -> Self {
        Self { suspects, window: (suspects / 2).max(1) }
    }

    /// Messages in flight at most, while the search goes on.
    fn window(&self) -> Option<usize> {
        (self.suspects > 0).then_some(self.window)
    }

    /// One of the suspects has its outcome.
    fn cleared(&mut self) {
        self.suspects = self.suspects.saturating_sub(1);
    }

    /// What was still being written to a closed channel can end the connection before the broker names the cause: with
    /// fewer in flight it cannot go on for ever.
    fn narrow(&mut self) {
        self.window = (self.window / 2).max(1);
    }
}

impl Desk {
    async fn run(mut self, link: Link) {
        let mut link = Some(link);
        let mut search = Search::default();
        loop {
            let current = match link.take().filter(Link::is_alive) {
                Some(link) => link,
                None => {
                    self.tell.send_replace(Health::Connecting);
                    self.broker.connect_for_ever("publish").await
                }
            };
            self.tell.send_replace(Health::Open);
            match self.serve(&current, &mut search).await {
                End::Finished => return current.close().await,
                End::Accused { said, of: 1 } => {
                    if let Some(culprit) = self.queue.pop_front() {
                        self.settle(&culprit, Err(Refused::Forbidden(said)));
                        self.tell_outcomes();
                    }
                    search.cleared();
                    link = Some(current);
                }
                End::Accused { said, of } => {
                    tracing::debug!(
                        said,
                        of,
                        "the broker closed the publishing channel, looking for the message at fault"
                    );
                    search = Search::among(of);
                    link = Some(current);
                }
                End::Refusing => {
                    tracing::info!("the broker refuses messages (basic.nack): going on with a new channel");
                    link = Some(current);
                }
                End::Partly => {
                    tracing::warn!(
                        repeated = self.queue.len(),
                        "the broker confirms some messages and is silent about others for {:?}, publishing those again on a new \
                         channel: has a queue lost its leader?",
                        self.options.timeout
                    );
                    link = Some(current);
                }
                End::Lost(why) => {
                    tracing::warn!(why, repeated = self.queue.len(), "publishing connection lost, connecting again");
                    search.narrow();
                    tokio::spawn(async move { current.close().await });
                }
            }
        }
    }

    /// Publishes on one channel until it ends; what has no outcome then is back in the queue, in order.
    async fn serve(&mut self, link: &Link, search: &mut Search) -> End {
        let mut wire = match tokio::time::timeout(OPENING, Wire::open(link)).await {
            Ok(Ok(wire)) => wire,
            Ok(Err(error)) => return End::Lost(describe(&error)),
            Err(_) => return End::mute(link, format!("no channel was opened within {OPENING:?}")),
        };
        let opened = Instant::now();
        let end = 'channel: loop {
            while let room = search.window().unwrap_or(self.options.window).saturating_sub(wire.flying.len())
                && room > 0
                && !self.queue.is_empty()
                && !wire.is_blocked()
                && wire.failure.is_none()
            {
                let chunk = CHUNK.min(room).min(self.queue.len());
                let (ready, refused) = wire.take_on(self.queue.drain(..chunk), &self.options.seal);
                for (entry, refused) in refused {
                    self.settle(&entry, Err(refused));
                }
                self.tell_outcomes();
                if !self.write(&mut wire, ready).await {
                    break 'channel End::mute(link, format!("nothing could be written for {:?}", self.options.timeout));
                }
            }
            if let Some(error) = wire.verdict().await {
                let said = describe(&error);
                let of = wire.flying.len();
                break if error.is_amqp_soft_error() { End::Accused { said, of } } else { End::Lost(said) };
            }
            let room = self.queue.len() < self.options.window && self.bytes < BYTES;
            if self.closed && self.queue.is_empty() && wire.flying.is_empty() {
                return End::Finished;
            }
            let deadline = wire.deadline(self.options.timeout);
            tokio::select! {
                biased;
                confirm = wire.confirms.next(), if !wire.confirms.is_empty() => {
                    if let Some(confirm) = confirm {
                        wire.note(confirm);
                    }
                    let mut refused = false;
                    for (entry, outcome) in wire.barrier() {
                        search.cleared();
                        refused |= matches!(outcome, Err(Refused::Rejected));
                        self.settle(&entry, outcome);
                    }
                    self.tell_outcomes();
                    if refused && self.renews(opened.elapsed()) {
                        break End::Refusing;
                    }
                }
                changed = wire.blocked.changed() => {
                    if changed.is_err() && !link.is_alive() {
                        break End::Lost("the connection was closed".into());
                    }
                    let health = wire.blocked.borrow_and_update().clone().map_or(Health::Open, Health::Blocked);
                    self.tell.send_replace(health);
                    wire.touch();
                    if changed.is_err() {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
                batch = self.inbox.recv(), if room && !self.closed => match batch {
                    Some(batch) => self.accept(batch),
                    None => self.closed = true,
                },
                () = tokio::time::sleep_until(deadline), if !wire.flying.is_empty() => {
                    if wire.answers_others() {
                        break End::Partly;
                    }
                    break End::mute(link, format!("no confirm for {:?}", self.options.timeout));
                }
            }
        };
        for flight in std::mem::take(&mut wire.flying).into_values().rev() {
            self.queue.push_front(flight.entry);
        }
        end
    }

    /// Whether a channel of this age is replaced over a refusal.
    fn renews(&mut self, age: Duration) -> bool {
        let [first, last] = RENEWALS;
        if age > last {
            self.renewal = first;
        }
        let renews = age >= self.renewal;
        if renews {
            self.renewal = (self.renewal * 2).min(last);
        }
        renews
    }

    /// Writes a chunk; tells if the broker blocks meanwhile, as the rest of the chunk then waits until it clears.
    /// False if it took longer than the deadline.
    async fn write(&self, wire: &mut Wire, ready: Vec<Ready>) -> bool {
        let mut blocked = wire.blocked.clone();
        let mut told = true;
        let mut writing = std::pin::pin!(wire.send(ready));
        loop {
            let free = blocked.borrow().is_none();
            tokio::select! {
                biased;
                () = &mut writing => return true,
                changed = blocked.changed(), if told => match changed {
                    Ok(()) => {
                        let health = blocked.borrow_and_update().clone().map_or(Health::Open, Health::Blocked);
                        self.tell.send_replace(health);
                    }
                    // The connection is gone, and the write fails with it.
                    Err(_) => told = false,
                },
                () = tokio::time::sleep(self.options.timeout), if free || !told => return false,
            }
        }
    }

    fn accept(&mut self, batch: Batch) {
        let open = batch.messages.len();
        if open == 0 {
            return;
        }
        let sheet = self.next_sheet;
        self.next_sheet += 1;
        self.sheets.insert(sheet, Sheet { reply: batch.reply, news: Vec::new(), open });
        self.bytes += batch.messages.iter().map(|m| m.body.len()).sum::<usize>();
        let entry = |(index, message)| Entry { message: Arc::new(message), sheet, index };
        self.queue.extend(batch.messages.into_iter().enumerate().map(entry));
    }

    fn settle(&mut self, entry: &Entry, outcome: Outcome) {
        let Some(sheet) = self.sheets.get_mut(&entry.sheet) else { return };
        if sheet.news.is_empty() {
            self.touched.push(entry.sheet);
        }
        sheet.news.push((entry.index, outcome));
        sheet.open -= 1;
        self.bytes = self.bytes.saturating_sub(entry.message.body.len());
    }

    /// Tells what was settled since the last time.
    fn tell_outcomes(&mut self) {
        for number in self.touched.drain(..) {
            let Some(sheet) = self.sheets.get_mut(&number) else { continue };
            // Nobody may be waiting any more; the messages are on the broker all the same.
            let _ = sheet.reply.send(std::mem::take(&mut sheet.news));
            if sheet.open == 0 {
                self.sheets.remove(&number);
            }
        }
    }
}
