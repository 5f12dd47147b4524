//! Subscriptions: deliveries come in, proofs go out as acks.
//!
//! One task a partition, one channel a task. However a consumer ends (error, cancel, closed channel or connection, a
//! queue that is gone), the way on is the same: a new channel, a new epoch, consume again. A ticket belongs to the
//! epoch that it came from, so an ack can never reach another channel.
use crate::metrics::{self, names};
use crate::store::Committed;
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer, Error, ErrorKind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::MissedTickBehavior;
use warren_publisher::broker::describe;
use warren_publisher::declare::{self, DeclareError};
use warren_publisher::{Broker, Confirmed, Link, codec};
use warren_shared::acks::{Ack, Ledger, Span};
use warren_shared::env::Declare;
use warren_shared::event::Limits;
use warren_shared::topology::{Declaration, Topology};
use warren_shared::{Incoming, Message, Unreadable};

/// Why the broker may forget a delivery.
#[derive(Debug)]
pub enum Proof {
    /// The store has its outcome.
    Committed(Committed),
    /// The broker has another copy.
    Confirmed(Confirmed),
}

/// A partition's place in the topology.
#[derive(Debug)]
pub struct Place {
    /// The lane's place in the lanes.
    pub lane: usize,
    /// The lane's name.
    pub lane_name: String,
    /// The queue.
    pub queue: Arc<str>,
}

/// The duty to settle one delivery. Without an ack the broker delivers it again when the channel ends.
///
/// ```compile_fail
/// fn f(ticket: warren_worker::consumer::Ticket) {
///     ticket.ack(); // no proof, no ack
/// }
/// ```
#[derive(Debug)]
#[must_use]
pub struct Ticket {
    epoch: Arc<Epoch>,
    tag: u64,
}

impl Ticket {
    /// Acknowledges, with the next flush of its channel. A no-op where the channel has ended.
    pub fn ack(self, _proof: Proof) {
        self.epoch.ledger().settle(self.tag);
        self.epoch.flush.notify_one();
    }

    /// Whether the broker still waits for this delivery's ack.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.epoch.live.load(Ordering::Acquire)
    }

    /// The channel's number, unique in this process.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch.number
    }

    /// The partition.
    #[must_use]
    pub fn place(&self) -> &Arc<Place> {
        &self.epoch.place
    }
}

/// One channel's life.
#[derive(Debug)]
struct Epoch {
    number: u64,
    place: Arc<Place>,
    ledger: Mutex<Ledger>,
    live: AtomicBool,
    flush: Notify,
}

impl Epoch {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // No code that holds the lock can panic half-way through a change.
        self.ledger.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A delivery as it arrives.
#[derive(Debug)]
pub struct Arrival {
    /// The duty to settle it.
    pub ticket: Ticket,
    /// Whether the broker delivered it before.
    pub redelivered: bool,
    /// The event; or the message that is none, and why.
    pub content: Result<Incoming, Box<(Message, Unreadable)>>,
}

/// What subscriptions tell the pipeline.
#[derive(Debug)]
pub enum News {
    /// Deliveries of one epoch, in order.
    Arrived(Vec<Arrival>),
    /// An epoch ended; the broker delivers again what it held.
    Ended(u64),
}

/// What a subscription does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It takes deliveries.
    Taking,
    /// It takes no more, and still acks. Never `basic.cancel`: that would start the next consumer before these end.
    Holding,
    /// It sends its last acks and closes its channel.
    Closing,
}

/// What all subscriptions of a worker share.
#[derive(Debug)]
pub struct Subscriptions {
    broker: Broker,
    /// Each connection carries a few channels: the library walks over all of them at every frame.
    links: Vec<tokio::sync::Mutex<Option<Arc<Link>>>>,
    declarations: Vec<Declaration>,
    declare: Declare,
    declaring: tokio::sync::Mutex<()>,
    prefetch: u16,
    limits: Limits,
    consuming: AtomicUsize,
    epochs: AtomicU64,
}

const CHANNELS_A_CONNECTION: usize = 16;
/// How many deliveries are handed on at once.
const CHUNK: usize = 256;
/// A settled delivery behind a stuck one waits for its ack once to twice as long.
const GAP: Duration = Duration::from_millis(20);

impl Subscriptions {
    /// Prepares the subscriptions of a pool; nothing is opened yet.
    #[must_use]
    pub fn new(broker: Broker, topology: &Topology, declare: Declare, prefetch: u16, limits: Limits) -> Arc<Self> {
        let places = topology.lanes.iter().count() * usize::from(topology.partitions);
        Arc::new(Self {
            broker,
            links: (0..places.div_ceil(CHANNELS_A_CONNECTION)).map(|_| tokio::sync::Mutex::new(None)).collect(),
            declarations: topology.declarations(),
            declare,
            declaring: tokio::sync::Mutex::new(()),
            prefetch,
            limits,
            consuming: AtomicUsize::new(0),
            epochs: AtomicU64::new(0),
        })
    }

    /// Subscriptions that the broker has accepted.
    #[must_use]
    pub fn consuming(&self) -> usize {
        self.consuming.load(Ordering::Relaxed)
    }

    /// Starts one task a partition. Each ends after [`Phase::Closing`].
    #[must_use]
    pub fn start(
        self: &Arc<Self>,
        topology: &Topology,
        news: &mpsc::UnboundedSender<News>,
        phase: &watch::Receiver<Phase>,
    ) -> Vec<tokio::task::JoinHandle<()>> {
        let lanes = topology.lanes.iter().enumerate();
        let places = lanes.flat_map(|(lane, l)| {
            (0..topology.partitions).map(move |partition| Place {
                lane,
                lane_name: l.name.clone(),
                queue: topology.partition(&l.name, partition).into(),
            })
        });
        let start = |(i, place)| {
            let subscription = Subscription {
                shared: self.clone(),
                link: i / CHANNELS_A_CONNECTION,
                place: Arc::new(place),
                news: news.clone(),
                phase: phase.clone(),
            };
            tokio::spawn(subscription.run())
        };
        places.enumerate().map(start).collect()
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
        let link = self.link(0).await;
        declare::apply(&link, &self.declarations).await
    }

    /// Closes the connections.
    pub async fn close(&self) {
        for slot in &self.links {
            if let Some(link) = slot.lock().await.take() {
                link.close().await;
            }
        }
    }

    async fn link(&self, index: usize) -> Arc<Link> {
        // Whoever comes first connects, the others wait at the lock and find it done.
        let mut slot = self.links[index].lock().await;
        match slot.as_ref().filter(|link| link.is_alive()) {
            Some(link) => link.clone(),
            None => {
                let link = Arc::new(self.broker.connect_for_ever("consume").await);
                *slot = Some(link.clone());
                link
            }
        }
    }
}

struct Subscription {
    shared: Arc<Subscriptions>,
    link: usize,
    place: Arc<Place>,
    news: mpsc::UnboundedSender<News>,
    phase: watch::Receiver<Phase>,
}

enum Opened {
    Ready(Box<(Channel, Consumer)>),
    Failed(String),
    QueueMissing,
}

impl Subscription {
    async fn run(mut self) {
        let mut failures = 0_u32;
        while *self.phase.borrow() == Phase::Taking {
            let mut phase = self.phase.clone();
            let opened = tokio::select! {
                biased;
                // A drain does not wait for a broker that is away.
                _ = phase.wait_for(|phase| *phase != Phase::Taking) => return,
                opened = self.open() => opened,
            };
            match opened {
                Opened::Ready(opened) => {
                    let (channel, consumer) = *opened;
                    failures = 0;
                    let why = self.serve(channel, consumer).await;
                    if *self.phase.borrow() == Phase::Taking {
                        metrics::count(names::RECONNECTS, 1);
                        tracing::warn!(queue = &*self.place.queue, why, "the subscription ended, subscribing again");
                    }
                }
                Opened::Failed(why) => {
                    failures += 1;
                    tracing::warn!(queue = &*self.place.queue, why, failures, "cannot subscribe yet, trying again");
                }
                Opened::QueueMissing => {
                    failures += 1;
                    tracing::warn!(queue = &*self.place.queue, "the queue is missing");
                    if let Err(error) = self.shared.repair().await {
                        tracing::error!(%error, "the topology cannot be declared again");
                    }
                }
            }
            let pause = backoff(failures);
            tokio::select! {
                _ = self.phase.wait_for(|phase| *phase != Phase::Taking) => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn open(&self) -> Opened {
        let link = self.shared.link(self.link).await;
        let opened = async {
            let channel = link.connection().create_channel().await?;
            channel.basic_qos(self.shared.prefetch, BasicQosOptions::default()).await?;
            let (queue, options) = ((&*self.place.queue).into(), BasicConsumeOptions::default());
            let consumer = channel.basic_consume(queue, "".into(), options, FieldTable::default()).await?;
            Ok::<_, Error>((channel, consumer))
        };
        match tokio::time::timeout(Duration::from_secs(20), opened).await {
            Err(_) => Opened::Failed("the broker does not answer".into()),
            Ok(Ok(opened)) => Opened::Ready(Box::new(opened)),
            Ok(Err(error)) => match error.kind() {
                ErrorKind::ProtocolError(amqp) if *amqp.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => {
                    Opened::QueueMissing
                }
                _ => Opened::Failed(describe(&error)),
            },
        }
    }

    /// Takes and acks until the channel ends or the drain closes it; says why.
    async fn serve(&mut self, channel: Channel, mut consumer: Consumer) -> String {
        let epoch = Arc::new(Epoch {
            number: self.shared.epochs.fetch_add(1, Ordering::Relaxed),
            place: self.place.clone(),
            ledger: Mutex::default(),
            live: AtomicBool::new(true),
            flush: Notify::new(),
        });
        self.shared.consuming.fetch_add(1, Ordering::Relaxed);
        let why = self.exchange(&channel, &mut consumer, &epoch).await;
        self.shared.consuming.fetch_sub(1, Ordering::Relaxed);
        epoch.live.store(false, Ordering::Release);
        let close = channel.close(200, "handing over".into());
        // Where the channel is closed already this fails at once, which is as good.
        let _ = tokio::time::timeout(Duration::from_secs(5), close).await;
        // Only now: a consumer that is dropped is cancelled, and a cancel before the close would start the next consumer
        // with what comes after our unacked deliveries.
        drop(consumer);
        // The pipeline may have ended before us.
        let _ = self.news.send(News::Ended(epoch.number));
        why
    }

    async fn exchange(&mut self, channel: &Channel, consumer: &mut Consumer, epoch: &Arc<Epoch>) -> String {
        let mut sweep = tokio::time::interval(GAP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let phase = *self.phase.borrow_and_update();
            let waits = epoch.ledger().unacked() > 0;
            if phase == Phase::Closing && !waits {
                return "closed by the drain".into();
            }
            tokio::select! {
                biased;
                changed = self.phase.changed() => if changed.is_err() {
                    return "the worker ended".into();
                },
                () = epoch.flush.notified() => if let Err(error) = self.ack(channel, epoch).await {
                    return describe(&error);
                },
                _ = sweep.tick(), if waits => {
                    let acks = epoch.ledger().sweep();
                    if let Err(error) = send(channel, acks).await {
                        return describe(&error);
                    }
                }
                next = consumer.next(), if phase == Phase::Taking => {
                    let (deliveries, end) = gather(next, consumer);
                    let arrivals = self.arrivals(deliveries, epoch);
                    if !arrivals.is_empty() && self.news.send(News::Arrived(arrivals)).is_err() {
                        return "the worker ended".into();
                    }
                    if let Some(why) = end {
                        return why;
                    }
                }
            }
        }
    }

    /// Acks what is worth an ack; the next sweep takes what is not. A drain does not wait for more.
    async fn ack(&self, channel: &Channel, epoch: &Epoch) -> Result<(), Error> {
        let acks = {
            let mut ledger = epoch.ledger();
            let window = usize::from(self.shared.prefetch);
            if *self.phase.borrow() == Phase::Taking && !ledger.is_due(window) {
                return Ok(());
            }
            ledger.relieve(window)
        };
        send(channel, acks).await
    }

    fn arrivals(&self, deliveries: Vec<Delivery>, epoch: &Arc<Epoch>) -> Vec<Arrival> {
        {
            let mut ledger = epoch.ledger();
            deliveries.iter().for_each(|delivery| ledger.open(delivery.delivery_tag));
        }
        let arrival = |delivery: Delivery| {
            let (tag, redelivered) = (delivery.delivery_tag, delivery.redelivered);
            let fresh_id = || uuid::Uuid::new_v4().to_string();
            let content = codec::envelope(&delivery)
                .open(&delivery.data, self.shared.limits, fresh_id)
                .map_err(|why| Box::new((codec::read(delivery), why)));
            Arrival { ticket: Ticket { epoch: epoch.clone(), tag }, redelivered, content }
        };
        deliveries.into_iter().map(arrival).collect()
    }
}

/// All deliveries that are there, and why no more will come if none will.
fn gather(first: Option<Result<Delivery, Error>>, consumer: &mut Consumer) -> (Vec<Delivery>, Option<String>) {
    let (mut deliveries, mut next) = (Vec::new(), first);
    loop {
        match next {
            Some(Ok(delivery)) => deliveries.push(delivery),
            Some(Err(error)) => return (deliveries, Some(describe(&error))),
            None => return (deliveries, Some("the broker cancelled the consumer".to_owned())),
        }
        if deliveries.len() == CHUNK {
            return (deliveries, None);
        }
        next = match consumer.next().now_or_never() {
            Some(more) => more,
            None => return (deliveries, None),
        };
    }
}

async fn send(channel: &Channel, acks: Vec<Ack>) -> Result<(), Error> {
    let acks = acks.into_iter().map(|ack| {
        let options = BasicAckOptions { multiple: ack.span == Span::UpTo };
        channel.basic_ack(ack.tag, options)
    });
    futures_util::future::try_join_all(acks).await.map(|_| ())
}

/// 50 ms doubling to 3 s, jittered by a half: a fleet must not come back in step.
fn backoff(failures: u32) -> Duration {
    use backon::{BackoffBuilder, ExponentialBuilder};
    let delays = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_secs(2))
        .with_jitter()
        .without_max_times();
    delays.build().nth(failures.min(10) as usize).unwrap_or(Duration::from_secs(2))
}
