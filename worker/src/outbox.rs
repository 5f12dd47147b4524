//! The outbox's relay: publishes committed rows with confirms, each key's in order, and forgets them.
//!
//! A key has one row under way; the next one follows its confirm. What becomes of a row is its own affair: one that the broker
//! refuses for now holds its key and no other, and what can never be sent is dead-lettered with the cause. Confirmed rows are
//! forgotten together while others are under way; a crash before that repeats them with the same ids.
use crate::consumer::Subscriptions;
use crate::fault;
use crate::job::{answer, outgoing};
use crate::metrics::{self, names};
use crate::store::{Row, Store};
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use rustc_hash::FxHashMap;
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use warren_publisher::publish::{Outcome, Outcomes};
use warren_publisher::{Publisher, Refused};
use warren_shared::dead::{self, Cause, Scene, UNSENDABLE};
use warren_shared::process::wire::Failed;
use warren_shared::topology::BUS;
use warren_shared::{Incoming, Limits, Message};

/// Rows under way at most.
const WAVE: usize = 512;
/// Orders that are taken in before rows go out: more of them make larger chunks.
const TURN: usize = 64;
/// The pauses of a key whose row is refused: at first, doubling up to the last.
const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
/// How often it is said that rows wait: each key is tried for itself.
const QUIET: Duration = Duration::from_secs(10);
/// What a row weighs beside its body.
const ROW: usize = 512;

/// The way into the relay.
#[derive(Clone, Debug)]
pub struct Outbox {
    orders: mpsc::UnboundedSender<Order>,
    shared: Arc<Shared>,
}

/// What both sides know.
#[derive(Debug, Default)]
struct Shared {
    /// Rows that are not forgotten yet, and what they weigh.
    pending: AtomicUsize,
    bytes: AtomicUsize,
    pushes: Mutex<Pushes>,
    held: Mutex<Held>,
}

/// When rows came, until they have gone.
#[derive(Debug, Default)]
struct Pushes {
    /// Rows that ever came.
    rows: u64,
    /// Each push, and how many had come with it.
    at: VecDeque<(u64, Instant)>,
}

/// What waits for a destination that refuses.
#[derive(Clone, Debug, Default)]
struct Held {
    rows: usize,
    keys: usize,
    /// Where to, and what the broker said last.
    why: String,
}

impl Held {
    /// One key more, with so many rows.
    fn add(&mut self, rows: usize) {
        self.keys += 1;
        self.rows += rows;
    }
}

#[derive(Debug)]
enum Order {
    Publish(Vec<Row>),
    /// Tell when nothing of a partition is left.
    Tell(Arc<str>, oneshot::Sender<()>),
}

/// What the relay works with.
pub(crate) struct Parts {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) publisher: Publisher,
    pub(crate) subscriptions: Arc<Subscriptions>,
    pub(crate) pool: String,
    /// Where dead letters go.
    pub(crate) dead: String,
    pub(crate) worker: String,
    pub(crate) limits: Limits,
}

impl Outbox {
    /// Starts the relay.
    #[must_use]
    pub(crate) fn start(parts: Parts) -> Self {
        let (orders, inbox) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared::default());
        tokio::spawn(Relay::new(parts, shared.clone()).run(inbox));
        Self { orders, shared }
    }

    /// Hands committed rows over, in their order.
    pub fn push(&self, rows: Vec<Row>) {
        let mut pushes = lock(&self.shared.pushes);
        pushes.rows += rows.len() as u64;
        let push = (pushes.rows, Instant::now());
        pushes.at.push_back(push);
        self.shared.pending.fetch_add(rows.len(), Ordering::AcqRel);
        self.shared.bytes.fetch_add(rows.iter().map(weight).sum(), Ordering::AcqRel);
        drop(pushes);
        // The relay ends only when all handles are gone.
        let _ = self.orders.send(Order::Publish(rows));
    }

    /// Waits until everything of a partition that was pushed before is published and forgotten, or left to the next owner as its
    /// destination refuses it.
    pub async fn flushed(&self, partition: Arc<str>) {
        let (tell, told) = oneshot::channel();
        let _ = self.orders.send(Order::Tell(partition, tell));
        let _ = told.await;
    }

    /// How long the oldest row has waited. They go in the order in which they came, but for those that their key holds back.
    #[must_use]
    pub fn age(&self) -> Duration {
        let mut pushes = lock(&self.shared.pushes);
        let gone = pushes.rows - self.pending() as u64;
        while pushes.at.front().is_some_and(|(rows, _)| *rows <= gone) {
            pushes.at.pop_front();
        }
        pushes.at.front().map_or(Duration::ZERO, |(_, at)| at.elapsed())
    }

    /// Rows that are not yet confirmed and forgotten.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.shared.pending.load(Ordering::Acquire)
    }

    /// Rows whose destination refuses them for now.
    #[must_use]
    pub fn held(&self) -> usize {
        lock(&self.shared.held).rows
    }

    /// Whether there are more rows than these, without those that wait for a destination which refuses; or more bytes, of all.
    pub(crate) fn is_over(&self, rows: usize, bytes: usize) -> bool {
        self.pending().saturating_sub(self.held()) > rows || self.shared.bytes.load(Ordering::Acquire) > bytes
    }

    /// What waits and why, for a person.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        let Held { rows, keys, why, .. } = lock(&self.shared.held).clone();
        (rows > 0).then(|| format!("{rows} outgoing messages of {keys} keys wait, the others go on: {why}"))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code that holds one of these locks can panic half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The rows of a key, in order; the first one may be under way.
#[derive(Default)]
struct Key {
    rows: VecDeque<Row>,
    flying: bool,
    /// How long its first row waited last; none while the broker takes its rows.
    pause: Option<Duration>,
}

impl Key {
    /// Whether it waits for its destination, with nothing under way.
    fn rests(&self) -> bool {
        self.pause.is_some() && !self.flying
    }
}

/// A destination that takes nothing of anybody: one row asks it now and then.
struct Closed {
    pause: Duration,
    until: Instant,
    asked: bool,
}

/// What an outcome asks for.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Sent,
    /// Nobody subscribes to an event on the bus.
    Unheard,
    /// Only this key waits.
    Held(String),
    /// All that go there wait.
    Closed(String),
    /// It would be refused for ever.
    Never(String),
}

/// Rows that were handed to the publisher together, by key.
struct Wave {
    keys: Vec<u64>,
    outcomes: Outcomes,
}

/// A wave, and what of it is known now.
type Completion = (Wave, Option<Vec<(usize, Outcome)>>);

struct Forgetting {
    partitions: Vec<Arc<str>>,
    done: JoinHandle<()>,
}

struct Relay {
    parts: Parts,
    shared: Arc<Shared>,
    hasher: RandomState,
    keys: FxHashMap<u64, Key>,
    /// Keys whose first row may go.
    ready: VecDeque<u64>,
    /// Keys whose first row was refused, and when it is tried again.
    held: BTreeSet<(Instant, u64)>,
    closed: HashMap<String, Closed>,
    /// Rows at the publisher.
    flying: usize,
    under_way: FuturesUnordered<BoxFuture<'static, Completion>>,
    /// Confirmed rows that the store is not told of yet, and those that it is being told of.
    sent: Vec<Row>,
    forgetting: Option<Forgetting>,
    /// Who waits for a partition's last row.
    waiting: Vec<(Arc<str>, oneshot::Sender<()>)>,
    /// When it was said last that rows wait.
    said: Option<Instant>,
}

impl Relay {
    fn new(parts: Parts, shared: Arc<Shared>) -> Self {
        Self {
            parts,
            shared,
            hasher: RandomState::new(),
            keys: FxHashMap::default(),
            ready: VecDeque::new(),
            held: BTreeSet::new(),
            closed: HashMap::new(),
            flying: 0,
            under_way: FuturesUnordered::new(),
            sent: Vec::new(),
            forgetting: None,
            waiting: Vec::new(),
            said: None,
        }
    }

    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Order>) {
        let mut open = true;
        while open || !self.keys.is_empty() || self.forgetting.is_some() {
            let next = self.held.first().map(|(at, _)| *at);
            let forgotten = async {
                match &mut self.forgetting {
                    // It does not panic; and what stayed would be published again, which is harmless.
                    Some(forgetting) => drop((&mut forgetting.done).await),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                order = inbox.recv(), if open => match order {
                    Some(order) => self.obey(order),
                    None => open = false,
                },
                Some((wave, news)) = self.under_way.next(), if !self.under_way.is_empty() => self.learn(wave, news),
                () = forgotten => self.forgetting = None,
                () = sleep_until(next), if next.is_some() => {}
            }
            for _ in 0..TURN {
                let Ok(order) = inbox.try_recv() else { break };
                self.obey(order);
            }
            self.wake();
            self.publish();
            self.forget();
            self.tell();
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Publish(rows) => rows.into_iter().for_each(|row| self.enqueue(row)),
            Order::Tell(partition, tell) => self.waiting.push((partition, tell)),
        }
    }

    fn enqueue(&mut self, row: Row) {
        // Two keys of one hash follow one another, which does no harm.
        let key = self.hasher.hash_one(row.message.correlation_id.as_deref().unwrap_or_default());
        match self.keys.entry(key) {
            Entry::Vacant(vacant) => {
                vacant.insert(Key::default()).rows.push_back(row);
                self.ready.push_back(key);
            }
            Entry::Occupied(mut occupied) => {
                if occupied.get().pause.is_some() {
                    lock(&self.shared.held).rows += 1;
                }
                occupied.get_mut().rows.push_back(row);
            }
        }
    }

    /// Keys whose pause is over may try again.
    fn wake(&mut self) {
        let now = Instant::now();
        while let Some((at, key)) = self.held.first().copied()
            && at <= now
        {
            self.held.pop_first();
            self.ready.push_back(key);
        }
    }

    /// Hands the first row of each key that may go to the publisher.
    fn publish(&mut self) {
        let (mut keys, mut messages) = (Vec::new(), Vec::new());
        let now = Instant::now();
        while self.flying + keys.len() < WAVE
            && let Some(key) = self.ready.pop_front()
        {
            // One that was left to the next owner, and has come back since, may stand here twice.
            let Some(Key { rows, flying, pause }) = self.keys.get_mut(&key).filter(|key| !key.flying) else { continue };
            let Some(row) = rows.front() else { continue };
            if let Some(closed) = self.closed.get_mut(&row.message.exchange) {
                if closed.asked || closed.until > now {
                    self.held.insert((closed.until.max(now + PAUSES[0]), key));
                    if pause.is_none() {
                        *pause = Some(PAUSES[0]);
                        lock(&self.shared.held).add(rows.len());
                    }
                    continue;
                }
                closed.asked = true;
            }
            *flying = true;
            keys.push(key);
            messages.push(row.message.clone());
        }
        if keys.is_empty() {
            return;
        }
        self.flying += keys.len();
        let publisher = self.parts.publisher.clone();
        self.under_way.push(Box::pin(async move {
            let outcomes = publisher.submit(messages).await;
            next(Wave { keys, outcomes }).await
        }));
    }

    fn learn(&mut self, wave: Wave, news: Option<Vec<(usize, Outcome)>>) {
        let Some(news) = news else { return };
        fault::point("outbox-published");
        self.flying -= news.len();
        for (place, outcome) in news {
            self.settle(wave.keys[place], outcome);
        }
        self.under_way.push(Box::pin(next(wave)));
    }

    fn settle(&mut self, key: u64, outcome: Outcome) {
        let Some(Key { rows, flying, .. }) = self.keys.get_mut(&key) else { return };
        *flying = false;
        let Some(row) = rows.front() else { return };
        let on_bus = row.message.exchange == BUS;
        let verdict = verdict(outcome, on_bus);
        match &verdict {
            Verdict::Closed(_) => {
                let exchange = row.message.exchange.clone();
                self.close(exchange);
            }
            _ => drop(self.closed.remove(&row.message.exchange)),
        }
        match verdict {
            Verdict::Sent => {
                if on_bus {
                    metrics::count(names::EMITTED, 1);
                }
                self.gone(key);
            }
            Verdict::Unheard => self.unheard(key),
            Verdict::Held(why) | Verdict::Closed(why) => self.hold(key, why),
            Verdict::Never(why) => self.bury(key, &why),
        }
    }

    /// The first row of a key is where it should be: the next may go.
    fn gone(&mut self, key: u64) {
        self.release(key);
        let Entry::Occupied(mut entry) = self.keys.entry(key) else { return };
        if let Some(row) = entry.get_mut().rows.pop_front() {
            self.sent.push(row);
        }
        if entry.get().rows.is_empty() {
            entry.remove();
        } else {
            self.ready.push_back(key);
        }
    }

    /// The broker does not take the first row of a key for now.
    fn hold(&mut self, key: u64, why: String) {
        let Some(Key { rows, pause, .. }) = self.keys.get_mut(&key) else { return };
        let again = pause.map_or(PAUSES[0], |pause| (pause * 2).min(PAUSES[1]));
        let mut held = lock(&self.shared.held);
        if pause.replace(again).is_none() {
            held.add(rows.len());
        }
        self.held.insert((Instant::now() + again, key));
        if let Some(row) = rows.front() {
            held.why = format!("to '{}' with routing key '{}': {why}", row.message.exchange, row.message.routing_key);
            if self.said.is_none_or(|at| at.elapsed() > QUIET) {
                self.said = Some(Instant::now());
                tracing::error!(
                    id = row.message.message_id,
                    rows = held.rows,
                    keys = held.keys,
                    "outgoing messages are refused, trying again, the other keys go on: {}",
                    held.why
                );
            }
        }
    }

    /// A key is held no longer.
    fn release(&mut self, key: u64) {
        let Some(Key { rows, pause, .. }) = self.keys.get_mut(&key) else { return };
        if pause.take().is_some() {
            let mut held = lock(&self.shared.held);
            held.keys -= 1;
            held.rows -= rows.len();
        }
    }

    /// A destination takes nothing of anybody: one row asks again after a while. Somebody may have deleted it under us.
    fn close(&mut self, exchange: String) {
        let pause = self.closed.get(&exchange).map_or(PAUSES[0], |closed| (closed.pause * 2).min(PAUSES[1]));
        self.closed.insert(exchange, Closed { pause, until: Instant::now() + pause, asked: false });
        self.parts.subscriptions.repair_soon();
    }

    /// Nobody subscribes to an event: where it asks for a step of a process, the process is told instead.
    fn unheard(&mut self, key: u64) {
        metrics::count(names::UNHEARD, 1);
        let Some(message) = self.first(key) else { return };
        tracing::debug!(id = message.message_id, r#type = message.kind, "nobody subscribes to it");
        let kind = message.kind.as_deref().unwrap_or(&message.routing_key);
        let error = format!("nobody subscribes to '{kind}': add a route for it, here or in another pool");
        let told = self.failed(message, "unheard", error);
        match told {
            Some(answer) => self.replace(key, answer),
            None => self.gone(key),
        }
    }

    /// The broker will never take it: it becomes a dead letter. Where it asks for a step of a process, the process is told, too.
    fn bury(&mut self, key: u64, why: &str) {
        self.release(key);
        let Some(message) = self.first(key) else { return };
        let is_letter = message.exchange == self.parts.dead;
        let (exchange, size) = (message.exchange.clone(), message.body.len());
        let origin = message.header(dead::EXCHANGE).filter(|_| is_letter).map_or(exchange.clone(), ToString::to_string);
        if is_letter && size == 0 {
            // Nothing is left to leave out.
            return self.hold(key, format!("a dead letter is refused for good: {why}"));
        }
        tracing::error!(
            id = message.message_id,
            exchange,
            routing_key = message.routing_key,
            bytes = size,
            why,
            "dead-lettered an outgoing message: the broker will never take it"
        );
        let (mut letter, mut told) = (message.clone(), None);
        let error = if is_letter {
            letter.body.clear();
            format!("its body of {size} bytes is left out, as the broker refuses the dead letter, too: {why}")
        } else {
            let error = format!("it cannot be sent to '{exchange}' with routing key '{}': {why}", letter.routing_key);
            told = self.failed(message, UNSENDABLE, error.clone());
            error
        };
        let cause = Cause { reason: UNSENDABLE, error, attempts: 0, handler: String::new() };
        let scene = Scene { worker: self.parts.worker.clone(), at: jiff::Timestamp::now().to_string() };
        let mut letter = dead::of_message(letter, &cause, &scene, &self.parts.dead);
        letter.set(dead::EXCHANGE, origin);
        if let Some(answer) = told
            && let Some(rows) = self.keys.get_mut(&key).map(|key| &mut key.rows)
            && let Some(row) = rows.front().cloned()
        {
            // Under the same id: the row is forgotten with the first of the two, and made anew by neither.
            rows.insert(1, Row { message: answer, ..row });
            self.shared.pending.fetch_add(1, Ordering::AcqRel);
            self.shared.bytes.fetch_add(weight(&rows[1]), Ordering::AcqRel);
        }
        self.replace(key, letter);
    }

    fn first(&self, key: u64) -> Option<&Message> {
        Some(&self.keys.get(&key)?.rows.front()?.message)
    }

    /// The answer to a process whose question goes nowhere; none where it is no question.
    fn failed(&self, message: &Message, reason: &str, error: String) -> Option<Message> {
        let Incoming { event, hops, .. } = message.read(self.parts.limits, String::new).ok()?;
        let failed = Failed::before(reason, error);
        let answer = answer(&event, Err(&failed), &self.parts.pool, self.parts.limits)?;
        tracing::warn!(id = event.id(), r#type = event.kind(), "a step of a process fails: {}", failed.error);
        Some(outgoing(&answer).after_hops(hops + 1))
    }

    /// Sends another message in the place of a key's first row.
    fn replace(&mut self, key: u64, message: Message) {
        self.release(key);
        if let Some(row) = self.keys.get_mut(&key).and_then(|key| key.rows.front_mut()) {
            let before = weight(row);
            row.message = message;
            // The difference may be negative: the sum wraps, and comes out right.
            self.shared.bytes.fetch_add(weight(row).wrapping_sub(before), Ordering::AcqRel);
            self.ready.push_front(key);
        }
    }

    /// Until the store takes it: rows that stay would be published again by the next owner.
    fn forget(&mut self) {
        if self.sent.is_empty() || self.forgetting.is_some() {
            return;
        }
        let sent = std::mem::take(&mut self.sent);
        let bytes: usize = sent.iter().map(weight).sum();
        let (ids, partitions) = sent.into_iter().map(|row| (row.id, row.partition)).unzip::<_, _, Vec<i64>, Vec<_>>();
        let (store, shared) = (self.parts.store.clone(), self.shared.clone());
        let done = tokio::spawn(async move {
            let told = repeated(|| store.sent(ids.clone()), "published rows cannot be forgotten yet").await;
            fault::point("outbox-marked");
            shared.pending.fetch_sub(ids.len(), Ordering::AcqRel);
            shared.bytes.fetch_sub(bytes, Ordering::AcqRel);
            told
        });
        self.forgetting = Some(Forgetting { partitions, done });
    }

    fn tell(&mut self) {
        for (partition, tell) in std::mem::take(&mut self.waiting) {
            let forgetting = self.forgetting.iter().flat_map(|forgetting| &forgetting.partitions);
            let sent = self.sent.iter().map(|row| &row.partition);
            let flowing = self.keys.values().filter(|key| !key.rests()).flat_map(|key| &key.rows);
            let mut left = flowing.map(|row| &row.partition).chain(sent).chain(forgetting);
            if left.any(|other| *other == partition) {
                self.waiting.push((partition, tell));
            } else {
                self.leave(&partition, tell);
            }
        }
    }

    /// What of a partition waits for its destination is left to the next owner.
    fn leave(&mut self, partition: &Arc<str>, tell: oneshot::Sender<()>) {
        let (mut ids, mut bytes) = (Vec::new(), 0);
        let mut held = lock(&self.shared.held);
        self.keys.retain(|_, key| {
            let before = key.rows.len();
            key.rows.retain(|row| {
                let stays = row.partition != *partition;
                if !stays {
                    bytes += weight(row);
                    ids.push(row.id);
                }
                stays
            });
            held.rows -= before - key.rows.len();
            held.keys -= usize::from(key.rows.is_empty());
            !key.rows.is_empty()
        });
        drop(held);
        if ids.is_empty() {
            let _ = tell.send(());
            return;
        }
        tracing::info!(
            partition = &**partition,
            rows = ids.len(),
            "outgoing messages that wait are left to the partition's next owner"
        );
        self.shared.pending.fetch_sub(ids.len(), Ordering::AcqRel);
        self.shared.bytes.fetch_sub(bytes, Ordering::AcqRel);
        let store = self.parts.store.clone();
        tokio::spawn(async move {
            repeated(|| store.give_up(ids.clone()), "outgoing messages cannot be left to the next owner yet").await;
            let _ = tell.send(());
        });
    }
}

async fn next(mut wave: Wave) -> Completion {
    let news = wave.outcomes.next().await;
    (wave, news)
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Asks the store until it has done it.
async fn repeated(mut call: impl FnMut() -> crate::store::Reply<()>, trouble: &str) {
    let mut pause = Duration::from_millis(50);
    while let Err(error) = call().await {
        metrics::count(names::STORE_ERRORS, 1);
        tracing::warn!(%error, "{trouble}");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

fn weight(row: &Row) -> usize {
    row.message.body.len() + ROW
}

fn verdict(outcome: Outcome, on_bus: bool) -> Verdict {
    match outcome {
        Ok(_) => Verdict::Sent,
        Err(Refused::Returned { .. }) if on_bus => Verdict::Unheard,
        Err(refused @ (Refused::Rejected | Refused::Unknown)) => Verdict::Held(refused.to_string()),
        // Its queue, or the exchange, is gone, or not for us.
        Err(refused) if refused.is_passing() => Verdict::Closed(refused.to_string()),
        Err(refused) => Verdict::Never(refused.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_concerns_a_message_alone_is_never_sent() {
        let forbidden = |said: &str| verdict(Err(Refused::Forbidden(said.into())), true);
        let missing = "NOT_FOUND - no exchange 'warren.events' in vhost '/'";
        let closed = "ACCESS_REFUSED - access to exchange 'warren.events' in vhost '/' refused for user 'a'";
        for said in [missing, closed] {
            assert!(matches!(forbidden(said), Verdict::Closed(_)), "{said}");
        }
        let topic =
            "ACCESS_REFUSED - access to topic 'a.b' in exchange 'warren.events' in vhost '/' refused for user 'a'";
        let large = "PRECONDITION_FAILED - message size 9 is larger than configured max size 8";
        for said in [topic, large] {
            assert!(matches!(forbidden(said), Verdict::Never(_)), "{said}");
        }
        for refused in [Refused::Rejected, Refused::Unknown] {
            assert!(matches!(verdict(Err(refused), true), Verdict::Held(_)));
        }
        let returned = || {
            let [exchange, routing_key, reply] = ["x", "k", "NO_ROUTE"].map(str::to_owned);
            Err(Refused::Returned { exchange, routing_key, reply })
        };
        assert_eq!(verdict(returned(), true), Verdict::Unheard);
        assert!(matches!(verdict(returned(), false), Verdict::Closed(_)));
    }
}
