//! What all subscriptions of a worker share: the connections, and the repair of a topology that somebody deleted.
use super::subscription::{Slot, Subscription};
use super::{News, Place};
use crate::outbox::Outbox;
use crate::store::Store;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use warren_publisher::budget::Budget;
use warren_publisher::declare::{self, DeclareError, Depth};
use warren_publisher::pace::paced;
use warren_publisher::{Broker, Link, Seal};
use warren_shared::env::Declare;
use warren_shared::event::Limits;
use warren_shared::fleet::Clock;
use warren_shared::topology::{Declaration, Topology};

const CHANNELS_A_CONNECTION: usize = 16;
/// How often bindings are made again.
const REBIND: Duration = Duration::from_secs(60);
/// How long the broker may take for that.
const ANSWER: Duration = Duration::from_secs(10);

/// What all subscriptions of a worker share.
#[derive(Debug)]
pub struct Subscriptions {
    broker: Broker,
    /// Each connection carries a few channels: the library walks over all of them at every frame. Whoever uses one holds
    /// it.
    links: tokio::sync::Mutex<Vec<Arc<Link>>>,
    declarations: Vec<Declaration>,
    pub(super) subscribed: Vec<warren_shared::topology::Subscription>,
    declare: Declare,
    declaring: tokio::sync::Mutex<()>,
    pub(super) prefetch: u16,
    /// For the bodies that are held.
    pub(super) budget: Arc<Budget>,
    pub(super) limits: Limits,
    pub(super) seal: Seal,
    pub(super) consuming: AtomicUsize,
    pub(super) epochs: AtomicU64,
    /// Stamps subscriptions: their order in each queue's line.
    pub(super) clock: Arc<Clock>,
    /// A subscription began or ended.
    pub(super) changed: Notify,
    /// When a delivery came, or a queue was seen empty: milliseconds since 1970.
    proved: AtomicI64,
}

impl Subscriptions {
    /// Prepares the subscriptions of a pool; nothing is opened yet.
    #[must_use]
    pub fn new(
        broker: Broker,
        topology: &Topology,
        declare: Declare,
        prefetch: u16,
        budget: Arc<Budget>,
        limits: Limits,
        seal: Seal,
    ) -> Arc<Self> {
        Arc::new(Self {
            broker: broker.within(budget.clone()),
            links: tokio::sync::Mutex::default(),
            declarations: topology.declarations(),
            subscribed: topology.subscriptions.clone(),
            declare,
            declaring: tokio::sync::Mutex::new(()),
            prefetch,
            budget,
            limits,
            seal,
            consuming: AtomicUsize::new(0),
            epochs: AtomicU64::new(0),
            clock: Arc::default(),
            changed: Notify::new(),
            proved: AtomicI64::new(0),
        })
    }

    /// Subscriptions that the broker has accepted.
    #[must_use]
    pub fn consuming(&self) -> usize {
        self.consuming.load(Ordering::Relaxed)
    }

    /// The broker's answer; none where it does not come in time. While the budget is used up nothing is read, the answer neither.
    pub(super) async fn answer<T>(&self, patience: Duration, asked: impl Future<Output = T>) -> Option<T> {
        let mut asked = std::pin::pin!(asked);
        loop {
            match tokio::time::timeout(patience, &mut asked).await {
                Ok(answer) => return Some(answer),
                Err(_) if self.budget.is_full() => {}
                Err(_) => return None,
            }
        }
    }

    pub(super) fn prove(&self) {
        self.proved.store(jiff::Timestamp::now().as_millisecond(), Ordering::Relaxed);
    }

    /// When this worker last had proof that it consumes, in milliseconds since 1970; 0 before the first.
    #[must_use]
    pub fn proved(&self) -> i64 {
        self.proved.load(Ordering::Relaxed)
    }

    /// What waits in some queues, and who consumes them; none where there is no such queue.
    ///
    /// # Errors
    /// The broker cannot be asked.
    pub async fn depths(&self, queues: &[String]) -> Result<Vec<Option<Depth>>, DeclareError> {
        // One channel more for a moment, wherever it is: no connection is opened for that.
        let open = self.links.lock().await.iter().find(|link| link.is_alive()).cloned();
        let link = match open {
            Some(link) => link,
            None => self.link().await,
        };
        declare::depths(&link, queues).await
    }

    /// The clock that stamps subscriptions.
    #[must_use]
    pub fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    /// Waits until a subscription began or ended.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Starts one task a partition; none subscribes before its slot is told to. Each ends after [`super::Want::End`].
    #[must_use]
    pub fn start(
        self: &Arc<Self>,
        topology: &Topology,
        news: &mpsc::UnboundedSender<News>,
        outbox: &Outbox,
        store: &Arc<dyn Store>,
    ) -> (Vec<Slot>, Vec<JoinHandle<()>>) {
        let lanes = topology.lanes.iter().enumerate();
        let places = lanes.flat_map(|(lane, l)| {
            (0..topology.partitions).map(move |partition| Place {
                lane,
                lane_name: l.name.clone(),
                queue: topology.partition(&l.name, partition).into(),
            })
        });
        let start = |place: Place| {
            let place = Arc::new(place);
            let (slot, want) = Slot::new(place.clone());
            let subscription = Subscription {
                shared: self.clone(),
                place,
                news: news.clone(),
                outbox: outbox.clone(),
                store: store.clone(),
                want,
                standing: slot.standing.clone(),
            };
            (slot, tokio::spawn(subscription.run()))
        };
        places.map(start).unzip()
    }

    /// Declares what is missing again: somebody deleted it under us.
    ///
    /// # Errors
    /// Why it cannot be declared.
    pub async fn repair(&self) -> Result<(), DeclareError> {
        let _one_at_a_time = self.declaring.lock().await;
        if self.declare == Declare::Never {
            return Ok(());
        }
        let link = self.link().await;
        declare::apply(&link, &self.declarations).await
    }

    /// The same for who cannot wait for it; says why where it cannot be done.
    pub(crate) fn repair_soon(self: &Arc<Self>) {
        let subscriptions = self.clone();
        tokio::spawn(async move {
            if let Err(error) = subscriptions.repair().await {
                tracing::error!(%error, "the topology cannot be declared again");
            }
        });
    }

    /// Makes the bindings again that somebody may have taken away, from time to time and for as long as the worker runs: AMQP
    /// cannot be asked whether they are there, and making them twice is harmless.
    pub async fn keep_bound(&self) {
        let pause = paced(REBIND);
        if self.declare == Declare::Never {
            return;
        }
        loop {
            tokio::time::sleep(pause).await;
            let link = self.link().await;
            let bound = tokio::time::timeout(ANSWER, declare::bind(&link, &self.declarations)).await;
            drop(link);
            if !matches!(bound, Ok(Ok(true)))
                && let Err(error) = self.repair().await
            {
                tracing::warn!(%error, "the bindings cannot be made again now: {error}");
            }
        }
    }

    /// A connection that can bear one more channel.
    pub(super) async fn link(&self) -> Arc<Link> {
        // Whoever comes first connects, the others wait at the lock and find it done.
        let mut links = self.links.lock().await;
        links.retain(|link| link.is_alive());
        let users = |link: &Arc<Link>| Arc::strong_count(link) - 1;
        if let Some(link) = links.iter().find(|link| users(link) < CHANNELS_A_CONNECTION) {
            return link.clone();
        }
        let link = Arc::new(self.broker.connect_for_ever("consume").await);
        links.push(link.clone());
        link
    }

    /// Gives a connection back; one that nobody uses any more is closed, but for the last.
    pub(super) async fn give_back(&self, link: Arc<Link>) {
        let mut links = self.links.lock().await;
        if links.len() > 1 && Arc::strong_count(&link) == 2 {
            links.retain(|other| !Arc::ptr_eq(other, &link));
            drop(links);
            link.close().await;
        }
    }

    /// Closes the connections.
    pub async fn close(&self) {
        let links = std::mem::take(&mut *self.links.lock().await);
        futures_util::future::join_all(links.iter().map(|link| link.close())).await;
    }
}
