//! Publishing that proves it: mandatory, confirmed, in a bounded window, with a deadline.
//!
//! One task owns the connection and its one channel (confirms go astray where two tasks publish on a channel). It
//! publishes in joined chunks, keeps each message until its outcome is known, and repeats what has none on the next
//! channel, in the same order and with the same id.
//!
//! The library attaches a returned message to some confirm near its own, so returns are matched by address and id,
//! over all confirms of the channel. A batch is reported only after every confirm that the broker's last answer
//! resolved has been looked at (see [`Wire::barrier`]).
use crate::broker::{Broker, Link, describe};
use crate::codec;
use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Confirmation, Error};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Wake, Waker};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use warren_shared::Message;

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

/// What publishing did.
pub type Outcome = Result<Confirmed, Refused>;

/// How a publisher behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Unconfirmed messages at most. More than a thousand buys nothing.
    pub window: usize,
    /// After this an unconfirmed message is repeated on a new connection.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { window: 1000, timeout: Duration::from_secs(30) }
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

/// Messages published at once, in one chunk: awaiting each publish before the next costs a thread hop a message.
const CHUNK: usize = 256;

/// Bytes of bodies in hand after which no more are taken: a window of large events must not fill the memory.
const BYTES: usize = 64 << 20;

/// How long the confirms of a channel that ended may take to say so.
const ENDING: Duration = Duration::from_secs(1);

struct Batch {
    messages: Vec<Message>,
    reply: oneshot::Sender<Vec<Outcome>>,
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
        let (sheets, queue) = (BTreeMap::new(), VecDeque::new());
        let desk = Desk { broker, options, tell, inbox, closed: false, sheets, next_sheet: 0, queue, bytes: 0 };
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

    /// Hands messages over, waiting while the window is full; the returned future waits for the outcomes.
    pub async fn submit(&self, messages: Vec<Message>) -> impl Future<Output = Vec<Outcome>> + Send + use<> {
        let count = messages.len();
        let (reply, outcomes) = oneshot::channel();
        // A closed inbox drops `reply`, and the outcomes are unknown.
        let _ = self.batches.send(Batch { messages, reply }).await;
        async move { outcomes.await.unwrap_or_else(|_| (0..count).map(|_| Err(Refused::Unknown)).collect()) }
    }

    /// What the connection is doing.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }
}

/// A batch whose outcomes are being collected.
struct Sheet {
    reply: oneshot::Sender<Vec<Outcome>>,
    outcomes: Vec<Option<Outcome>>,
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
    /// Not yet on the wire, or to be repeated; in order.
    queue: VecDeque<Entry>,
    /// Bytes of all bodies without an outcome.
    bytes: usize,
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
    /// The connection is gone, or silent beyond the deadline.
    Lost(String),
}

impl Desk {
    async fn run(mut self, link: Link) {
        let mut link = Some(link);
        // After a channel error the cause is among so many messages at the head of the queue. They go in windows of half
        // their number, so every further complaint halves them, until one names its cause.
        let mut suspects = 0;
        loop {
            let current = match link.take().filter(Link::is_alive) {
                Some(link) => link,
                None => {
                    self.tell.send_replace(Health::Connecting);
                    self.broker.connect_for_ever("publish").await
                }
            };
            self.tell.send_replace(Health::Open);
            match self.serve(&current, &mut suspects).await {
                End::Finished => return current.close().await,
                End::Accused { said, of: 1 } => {
                    if let Some(culprit) = self.queue.pop_front() {
                        self.settle(&culprit, Err(Refused::Forbidden(said)));
                    }
                    suspects = suspects.saturating_sub(1);
                    link = Some(current);
                }
                End::Accused { said, of } => {
                    tracing::debug!(
                        said,
                        of,
                        "the broker closed the publishing channel, looking for the message at fault"
                    );
                    suspects = of;
                    link = Some(current);
                }
                End::Lost(why) => {
                    tracing::warn!(why, repeated = self.queue.len(), "publishing connection lost, connecting again");
                    // Suspects stay suspects: what was still being written to the closed channel can end the connection too.
                    tokio::spawn(async move { current.close().await });
                }
            }
        }
    }

    /// Publishes on one channel until it ends; what has no outcome then is back in the queue, in order.
    async fn serve(&mut self, link: &Link, suspects: &mut usize) -> End {
        let mut wire = match Wire::open(link).await {
            Ok(wire) => wire,
            Err(error) => return End::Lost(describe(&error)),
        };
        let end = loop {
            let window = if *suspects > 0 { (*suspects / 2).max(1) } else { self.options.window };
            while wire.flying.len() < window && !self.queue.is_empty() && !wire.is_blocked() && wire.failure.is_none() {
                let chunk = CHUNK.min(window - wire.flying.len()).min(self.queue.len());
                let entries: Vec<Entry> = self.queue.drain(..chunk).collect();
                for (entry, refused) in self.write(&mut wire, entries).await {
                    self.settle(&entry, Err(refused));
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
                    for (entry, outcome) in wire.barrier() {
                        // One suspect of the accused is cleared.
                        *suspects = suspects.saturating_sub(1);
                        self.settle(&entry, outcome);
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
                    break End::Lost(format!("no confirm for {:?}", self.options.timeout));
                }
            }
        };
        for (_, flight) in std::mem::take(&mut wire.flying).into_iter().rev() {
            self.queue.push_front(flight.entry);
        }
        end
    }

    /// Writes a chunk, and tells if the broker blocks meanwhile: the rest of the chunk then waits until it clears.
    async fn write(&self, wire: &mut Wire, entries: Vec<Entry>) -> Vec<(Entry, Refused)> {
        let mut blocked = wire.blocked.clone();
        let mut writing = std::pin::pin!(wire.send(entries));
        loop {
            tokio::select! {
                biased;
                refused = &mut writing => return refused,
                changed = blocked.changed() => match changed {
                    Ok(()) => {
                        let health = blocked.borrow_and_update().clone().map_or(Health::Open, Health::Blocked);
                        self.tell.send_replace(health);
                    }
                    // The connection is gone, and the write fails with it.
                    Err(_) => return writing.await,
                }
            }
        }
    }

    fn accept(&mut self, batch: Batch) {
        let open = batch.messages.len();
        if open == 0 {
            let _ = batch.reply.send(Vec::new());
            return;
        }
        let sheet = self.next_sheet;
        self.next_sheet += 1;
        let outcomes = batch.messages.iter().map(|_| None).collect();
        self.sheets.insert(sheet, Sheet { reply: batch.reply, outcomes, open });
        self.bytes += batch.messages.iter().map(|m| m.body.len()).sum::<usize>();
        let entry = |(index, message)| Entry { message: Arc::new(message), sheet, index };
        self.queue.extend(batch.messages.into_iter().enumerate().map(entry));
    }

    fn settle(&mut self, entry: &Entry, outcome: Outcome) {
        let Some(sheet) = self.sheets.get_mut(&entry.sheet) else { return };
        if sheet.outcomes[entry.index].replace(outcome).is_none() {
            sheet.open -= 1;
            self.bytes = self.bytes.saturating_sub(entry.message.body.len());
        }
        if sheet.open == 0
            && let Some(sheet) = self.sheets.remove(&entry.sheet)
        {
            let outcomes = sheet.outcomes.into_iter().map(|o| o.unwrap_or(Err(Refused::Unknown))).collect();
            // Nobody may be waiting any more; the messages are on the broker all the same.
            let _ = sheet.reply.send(outcomes);
        }
    }
}

type Confirm = std::pin::Pin<Box<dyn Future<Output = (u64, lapin::Result<Confirmation>)> + Send>>;

/// A message between its publish and its outcome.
struct Flight {
    entry: Entry,
    since: Instant,
    confirmed: Option<Outcome>,
    returned: Option<Refused>,
}

/// One channel and what is in flight on it.
struct Wire {
    channel: Channel,
    blocked: watch::Receiver<Option<String>>,
    confirms: FuturesUnordered<Confirm>,
    /// In order of publishing.
    flying: BTreeMap<u64, Flight>,
    next: u64,
    failure: Option<Error>,
    /// Bytes of headers that a frame of this connection can hold.
    room: usize,
}

impl Wire {
    async fn open(link: &Link) -> Result<Self, Error> {
        let channel = link.connection().create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self {
            channel,
            blocked: link.blocked(),
            confirms: FuturesUnordered::new(),
            flying: BTreeMap::new(),
            next: 0,
            failure: None,
            room: codec::header_room(link.connection().configuration().frame_max()),
        })
    }

    fn is_blocked(&self) -> bool {
        self.blocked.borrow().is_some()
    }

    /// Publishes a chunk; returns what AMQP cannot carry.
    async fn send(&mut self, entries: Vec<Entry>) -> Vec<(Entry, Refused)> {
        let mut refused = Vec::new();
        let mut ready = Vec::with_capacity(entries.len());
        for entry in entries {
            match (codec::write(&entry.message, self.room), codec::address(&entry.message)) {
                (Ok(properties), Ok(address)) => {
                    ready.push((entry.message.clone(), properties, address));
                    let flight = Flight { entry, since: Instant::now(), confirmed: None, returned: None };
                    self.flying.insert(self.next, flight);
                    self.next += 1;
                }
                (Err(error), _) | (_, Err(error)) => refused.push((entry, error.into())),
            }
        }
        let first = self.next - ready.len() as u64;
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let publishes = ready.iter().map(|(message, properties, (exchange, key))| {
            let (exchange, key) = (exchange.clone(), key.clone());
            self.channel.basic_publish(exchange, key, options, &message.body, properties.clone())
        });
        for (sequence, published) in (first..).zip(join_all(publishes).await) {
            match published {
                Ok(confirm) => self.confirms.push(Box::pin(async move { (sequence, confirm.await) })),
                Err(error) => self.fail(error),
            }
        }
        refused
    }

    /// Why the channel ended, if it did. A write that meets the closed channel does not know: the confirms do, and all
    /// of them end with the channel.
    async fn verdict(&mut self) -> Option<Error> {
        if self.failure.as_ref()?.is_amqp_error() {
            return self.failure.take();
        }
        let ending = async {
            while let Some(confirm) = self.confirms.next().await {
                self.note(confirm);
            }
        };
        let _ = tokio::time::timeout(ENDING, ending).await;
        self.failure.take()
    }

    fn fail(&mut self, error: Error) {
        // The first error is the broker's; those after it only say that the channel is closed.
        if self.failure.as_ref().is_none_or(|first| !first.is_amqp_error()) {
            self.failure = Some(error);
        }
    }

    fn note(&mut self, (sequence, confirm): (u64, lapin::Result<Confirmation>)) {
        let (outcome, returned) = match confirm {
            Ok(Confirmation::Ack(returned)) => (Ok(Confirmed(())), returned),
            Ok(Confirmation::Nack(returned)) => (Err(Refused::Rejected), returned),
            Ok(Confirmation::NotRequested) => (Err(Refused::Unknown), None),
            Err(error) => return self.fail(error),
        };
        if let Some(flight) = self.flying.get_mut(&sequence) {
            flight.confirmed = Some(outcome);
        }
        let Some(message) = returned else { return };
        let id = message.properties.message_id().as_ref().map(|id| id.as_str());
        let (exchange, key) = (message.exchange.as_str(), message.routing_key.as_str());
        // Copies of one address and id share one fate: whichever the broker meant, all were returned.
        for flight in self.flying.values_mut() {
            let m = &flight.entry.message;
            if m.message_id.as_deref() == id && m.exchange == exchange && m.routing_key == key {
                flight.returned = Some(Refused::Returned {
                    exchange: exchange.to_owned(),
                    routing_key: key.to_owned(),
                    reply: message.reply_text.to_string(),
                });
            }
        }
    }

    /// Looks at every confirm that is resolved, then takes the outcomes that are certain, in order of publishing.
    ///
    /// A return precedes its own ack, and the library hands each return to the next confirm that it resolves. So once
    /// a message's own confirm is resolved, its return sits in a confirm resolved no later than by the same answer of
    /// the broker. That answer is applied under the library's lock: taking the lock once (`wait_for_confirms` does so
    /// before its first wait) makes sure that it is applied whole, and draining the ready confirms finds the return.
    fn barrier(&mut self) -> Vec<(Entry, Outcome)> {
        use futures_util::FutureExt;
        let mut outcomes = Vec::new();
        self.drain();
        // Draining may resolve more of them: again, until nothing at the head is resolved.
        while self.failure.is_none() {
            let certain = self.flying.values().take_while(|flight| flight.confirmed.is_some()).count();
            if certain == 0 {
                break;
            }
            let _ = self.channel.wait_for_confirms().now_or_never();
            self.drain();
            for _ in 0..certain {
                let Some((_, flight)) = self.flying.pop_first() else { break };
                let confirmed = flight.confirmed.unwrap_or(Err(Refused::Unknown));
                outcomes.push((flight.entry, flight.returned.map_or(confirmed, Err)));
            }
        }
        outcomes
    }

    fn drain(&mut self) {
        for confirm in ready(&mut self.confirms) {
            self.note(confirm);
        }
    }

    /// When the oldest message in flight has waited too long. While the broker blocks, nothing is on its way.
    fn deadline(&self, timeout: Duration) -> Instant {
        let now = Instant::now();
        let oldest = self.flying.values().find(|f| f.confirmed.is_none()).map_or(now, |f| f.since);
        if self.is_blocked() { now + Duration::from_secs(3600) } else { oldest + timeout }
    }

    /// Starts the wait anew for what is in flight: the broker did not look at it while it blocked.
    fn touch(&mut self) {
        let now = Instant::now();
        self.flying.values_mut().for_each(|flight| flight.since = now);
    }
}

/// Everything that is ready in a set of futures. A set gives way now and then although more of it is ready, and then
/// wakes its task: `now_or_never` alone would take that for the end.
fn ready<F: Future>(futures: &mut FuturesUnordered<F>) -> Vec<F::Output> {
    struct Woken(AtomicBool);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Release);
        }
    }
    let woken = Arc::new(Woken(AtomicBool::new(false)));
    let waker = Waker::from(woken.clone());
    let mut ready = Vec::new();
    loop {
        match futures.poll_next_unpin(&mut std::task::Context::from_waker(&waker)) {
            Poll::Ready(Some(output)) => ready.push(output),
            Poll::Ready(None) => return ready,
            Poll::Pending if woken.0.swap(false, Ordering::AcqRel) => {}
            Poll::Pending => return ready,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ready_is_found_behind_futures_that_give_way() {
        let futures = FuturesUnordered::new();
        for i in 0..10 {
            // Woken while polled, as by the library's thread.
            let mut polls = 0;
            futures.push(std::future::poll_fn(move |context| {
                polls += 1;
                if i < 9 && polls < 3 {
                    context.waker().wake_by_ref();
                }
                if i == 9 { Poll::Ready(i) } else { Poll::Pending }
            }));
        }
        let mut futures = futures;
        assert_eq!(ready(&mut futures), [9]);
    }
}
