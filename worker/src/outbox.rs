//! The outbox's relay: publishes committed rows with confirms, in order per key, and forgets them.
//!
//! Rows are published in waves in which each key stands once: a row that the broker refuses is repeated before the
//! next row of its key goes out. A wave is forgotten while the next one is under way; a crash before that repeats rows with the
//! same ids.
use crate::consumer::Subscriptions;
use crate::fault;
use crate::job::{answer, outgoing};
use crate::metrics::{self, names};
use crate::store::{Row, Store};
use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use warren_publisher::{Publisher, Refused};
use warren_shared::process::wire::Failed;
use warren_shared::topology::BUS;
use warren_shared::wire::HOPS;
use warren_shared::{Limits, Message};

/// The way into the relay.
#[derive(Clone, Debug)]
pub struct Outbox {
    orders: mpsc::UnboundedSender<Order>,
    pending: Arc<AtomicUsize>,
    pushes: Arc<Mutex<Pushes>>,
}

/// When rows came, until they have gone.
#[derive(Debug, Default)]
struct Pushes {
    /// Rows that ever came.
    rows: u64,
    /// Each push, and how many had come with it.
    at: VecDeque<(u64, Instant)>,
}

#[derive(Debug)]
enum Order {
    Publish(Vec<Row>),
    /// Tell when nothing of a partition is left.
    Tell(Arc<str>, oneshot::Sender<()>),
}

/// Rows that are published at once.
const WAVE: usize = 512;

impl Outbox {
    /// Starts the relay.
    #[must_use]
    pub(crate) fn start(
        store: Arc<dyn Store>,
        publisher: Publisher,
        topology: Arc<Subscriptions>,
        pool: &str,
        limits: Limits,
    ) -> Self {
        let (orders, inbox) = mpsc::unbounded_channel();
        let pending = Arc::new(AtomicUsize::new(0));
        let relay = Relay {
            store,
            publisher,
            topology,
            pool: pool.to_owned(),
            limits,
            inbox,
            pending: pending.clone(),
            hasher: RandomState::new(),
            queue: VecDeque::new(),
            forgetting: None,
            waiting: Vec::new(),
        };
        tokio::spawn(relay.run());
        Self { orders, pending, pushes: Arc::default() }
    }

    /// Hands committed rows over, in their order.
    pub fn push(&self, rows: Vec<Row>) {
        let mut pushes = self.pushes();
        pushes.rows += rows.len() as u64;
        let push = (pushes.rows, Instant::now());
        pushes.at.push_back(push);
        self.pending.fetch_add(rows.len(), Ordering::AcqRel);
        drop(pushes);
        // The relay ends only when all handles are gone.
        let _ = self.orders.send(Order::Publish(rows));
    }

    /// Waits until everything of a partition that was pushed before is published and forgotten.
    pub async fn flushed(&self, partition: Arc<str>) {
        let (tell, told) = oneshot::channel();
        let _ = self.orders.send(Order::Tell(partition, tell));
        let _ = told.await;
    }

    /// How long the oldest row has waited. They go in the order in which they came, but for those that their key holds back.
    #[must_use]
    pub fn age(&self) -> Duration {
        let mut pushes = self.pushes();
        let gone = pushes.rows - self.pending() as u64;
        while pushes.at.front().is_some_and(|(rows, _)| *rows <= gone) {
            pushes.at.pop_front();
        }
        pushes.at.front().map_or(Duration::ZERO, |(_, at)| at.elapsed())
    }

    fn pushes(&self) -> MutexGuard<'_, Pushes> {
        // No code that holds the lock can panic half-way through a change.
        self.pushes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rows that are not yet confirmed and forgotten.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending.load(Ordering::Acquire)
    }
}

struct Relay {
    store: Arc<dyn Store>,
    publisher: Publisher,
    topology: Arc<Subscriptions>,
    pool: String,
    limits: Limits,
    inbox: mpsc::UnboundedReceiver<Order>,
    pending: Arc<AtomicUsize>,
    hasher: RandomState,
    queue: VecDeque<Row>,
    /// The last wave, until the store has forgotten it.
    forgetting: Option<Forgetting>,
    /// Who waits for a partition's last row.
    waiting: Vec<(Arc<str>, oneshot::Sender<()>)>,
}

struct Forgetting {
    partitions: Vec<Arc<str>>,
    done: JoinHandle<()>,
}

impl Relay {
    async fn run(mut self) {
        while let Some(order) = self.inbox.recv().await {
            self.obey(order);
            let mut failures = 0;
            while !self.queue.is_empty() || self.forgetting.is_some() {
                while self.queue.len() < WAVE
                    && let Ok(more) = self.inbox.try_recv()
                {
                    self.obey(more);
                }
                let complete = match &mut self.forgetting {
                    Some(wave) if self.queue.is_empty() => {
                        tokio::select! {
                            _ = &mut wave.done => self.forgetting = None,
                            Some(order) = self.inbox.recv() => self.obey(order),
                        }
                        true
                    }
                    _ => self.wave().await,
                };
                self.tell();
                if complete {
                    failures = 0;
                } else {
                    failures += 1;
                    tokio::time::sleep(Duration::from_millis(100 * (1 << failures.min(5)))).await;
                }
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Publish(rows) => self.queue.extend(rows),
            Order::Tell(partition, tell) => {
                self.waiting.push((partition, tell));
                self.tell();
            }
        }
    }

    fn tell(&mut self) {
        for (partition, tell) in std::mem::take(&mut self.waiting) {
            let forgetting = self.forgetting.iter().flat_map(|wave| &wave.partitions);
            if self.queue.iter().map(|row| &row.partition).chain(forgetting).any(|other| *other == partition) {
                self.waiting.push((partition, tell));
            } else {
                let _ = tell.send(());
            }
        }
    }

    /// Publishes the first row of each key; returns whether all of them went out.
    async fn wave(&mut self) -> bool {
        let (mut wave, mut later, mut keys) = (Vec::new(), Vec::new(), HashSet::new());
        while wave.len() < WAVE
            && let Some(row) = self.queue.pop_front()
        {
            // Two keys of one hash follow one another, which does no harm.
            let key = self.hasher.hash_one(row.message.correlation_id.as_deref().unwrap_or_default());
            if keys.insert(key) { wave.push(row) } else { later.push(row) }
        }
        let outcomes = self.publisher.publish_all(wave.iter().map(|row| row.message.clone()).collect()).await;
        fault::point("outbox-published");
        let (mut sent, mut kept, mut missing, mut unheard) = (Vec::new(), Vec::new(), false, Vec::new());
        for (row, outcome) in wave.into_iter().zip(outcomes) {
            match outcome {
                Ok(_) => {
                    if row.message.exchange == BUS {
                        metrics::count(names::EMITTED, 1);
                    }
                    sent.push(row);
                }
                Err(Refused::Returned { .. }) if row.message.exchange == BUS => {
                    metrics::count(names::UNHEARD, 1);
                    tracing::debug!(id = row.message.message_id, r#type = row.message.kind, "nobody subscribes to it");
                    match self.unheard(&row.message) {
                        Some(answer) => unheard.push((row, answer)),
                        None => sent.push(row),
                    }
                }
                Err(refused) => {
                    missing |= matches!(refused, Refused::Returned { .. } | Refused::Forbidden(_));
                    tracing::error!(
                        id = row.message.message_id,
                        exchange = row.message.exchange,
                        %refused,
                        "an outgoing message is refused, trying again"
                    );
                    kept.push(row);
                }
            }
        }
        if !unheard.is_empty() {
            let (rows, answers): (Vec<Row>, Vec<Message>) = unheard.into_iter().unzip();
            for (row, outcome) in rows.into_iter().zip(self.publisher.publish_all(answers).await) {
                match outcome {
                    Ok(_) | Err(Refused::Returned { .. }) => sent.push(row),
                    Err(_) => kept.push(row),
                }
            }
        }
        let complete = kept.is_empty();
        // Those of the wave came before what had to wait for them.
        later.into_iter().rev().for_each(|row| self.queue.push_front(row));
        kept.into_iter().rev().for_each(|row| self.queue.push_front(row));
        self.forgotten().await;
        if !sent.is_empty() {
            self.forgetting = Some(self.forget(sent));
        }
        if missing && let Err(error) = self.topology.repair().await {
            tracing::error!(%error, "the topology cannot be declared again");
        }
        complete
    }

    /// The answer to a process whose question nobody subscribes to.
    fn unheard(&self, message: &Message) -> Option<Message> {
        let event = message.read(self.limits, String::new).ok()?.event;
        let error = format!("nobody subscribes to '{}': add a route for it, here or in another pool", event.kind());
        let failed = Failed::before("unheard", error);
        let answer = answer(&event, Err(&failed), &self.pool, self.limits)?;
        tracing::warn!(id = event.id(), r#type = event.kind(), "a step of a process fails: {}", failed.error);
        let hops = message.number(HOPS).and_then(|hops| u32::try_from(hops).ok()).unwrap_or(0);
        Some(outgoing(&answer).after_hops(hops + 1))
    }

    /// Until the store takes it: rows that stay would be published again by the next owner.
    fn forget(&self, rows: Vec<Row>) -> Forgetting {
        let (ids, partitions) = rows.into_iter().map(|row| (row.id, row.partition)).unzip::<_, _, Vec<i64>, _>();
        let (store, pending) = (self.store.clone(), self.pending.clone());
        let done = tokio::spawn(async move {
            let mut pause = Duration::from_millis(50);
            while let Err(error) = store.sent(ids.clone()).await {
                metrics::count(names::STORE_ERRORS, 1);
                tracing::warn!(%error, "published rows cannot be forgotten yet");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(5));
            }
            fault::point("outbox-marked");
            pending.fetch_sub(ids.len(), Ordering::AcqRel);
        });
        Forgetting { partitions, done }
    }

    /// Waits until the last wave is forgotten.
    async fn forgotten(&mut self) {
        if let Some(wave) = self.forgetting.take() {
            // It does not panic; and what stayed would be published again, which is harmless.
            let _ = wave.done.await;
        }
    }
}
