//! One partition's subscription: a channel while a place in the queue's line is wanted, handed over when it is not.
//!
//! Hand-over: take nothing more, let what runs end, publish what it sent, ack, close the channel. Never `basic.cancel`:
//! that would start the next consumer while our deliveries are out.
use super::{Arrival, Epoch, News, Place, Subscriptions, Ticket, lock};
use crate::metrics::{self, names};
use crate::outbox::Outbox;
use crate::store::Store;
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer, Error, ErrorKind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use warren_publisher::broker::describe;
use warren_publisher::pace::paced;
use warren_publisher::{Link, codec};
use warren_shared::Event;
use warren_shared::acks::{Ack, Ledger, Span};
use warren_shared::event::seconds_of;
use warren_shared::topology::give_type;

/// What is wanted of a subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// No place in the line.
    Away,
    /// A place, taken in this turn: another turn means to hand over and to stand at the end of the line again.
    Here {
        /// The turn.
        turn: u64,
        /// Whether the broker ought to serve us: then silence is a fault.
        first: bool,
    },
    /// To end.
    End,
}

impl Want {
    fn turn(self) -> Option<u64> {
        match self {
            Self::Here { turn, .. } => Some(turn),
            Self::Away | Self::End => None,
        }
    }
}

/// A place in the line of a queue's consumers.
#[derive(Clone, Debug)]
pub struct Standing {
    /// The turn in which it was wanted.
    pub turn: u64,
    /// When it was taken, in Lamport time.
    pub stamp: u64,
    /// The channel's life.
    pub epoch: Arc<Epoch>,
}

/// How the fleet holds a subscription.
#[derive(Debug)]
pub struct Slot {
    /// The partition.
    pub place: Arc<Place>,
    want: watch::Sender<Want>,
    pub(super) standing: Arc<Mutex<Option<Standing>>>,
}

impl Slot {
    pub(super) fn new(place: Arc<Place>) -> (Self, watch::Receiver<Want>) {
        let (want, wanted) = watch::channel(Want::Away);
        (Self { place, want, standing: Arc::default() }, wanted)
    }

    /// What is wanted.
    #[must_use]
    pub fn wanted(&self) -> Want {
        *self.want.borrow()
    }

    /// Wants something else.
    pub fn want(&self, want: Want) {
        self.want.send_if_modified(|wanted| std::mem::replace(wanted, want) != want);
    }

    /// The place that the broker gave us.
    #[must_use]
    pub fn standing(&self) -> Option<Standing> {
        lock(&self.standing).clone()
    }
}

/// How many deliveries are handed on at once.
const CHUNK: usize = 256;
/// A settled delivery behind a stuck one waits for its ack once to twice as long.
const GAP: Duration = Duration::from_millis(20);
/// How often a silent queue is looked at.
static LOOK: LazyLock<Duration> = LazyLock::new(|| paced(Duration::from_secs(5)));
/// How long the broker may take for an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a hand-over waits for the confirms of what was sent; the next owner publishes what is left.
const FLUSH: Duration = Duration::from_secs(3);

pub(super) struct Subscription {
    pub(super) shared: Arc<Subscriptions>,
    pub(super) place: Arc<Place>,
    pub(super) news: mpsc::UnboundedSender<News>,
    pub(super) outbox: Outbox,
    pub(super) store: Arc<dyn Store>,
    pub(super) want: watch::Receiver<Want>,
    pub(super) standing: Arc<Mutex<Option<Standing>>>,
}

/// A subscription that the broker accepted.
struct Opened {
    channel: Channel,
    consumer: Consumer,
    stamp: u64,
}

enum Failed {
    Why(String),
    QueueMissing,
}

/// How a channel's life ended.
enum Ending {
    /// As it was wanted.
    HandedOver,
    /// By itself.
    Lost(String),
    /// The broker gave nothing to the consumer that it ought to serve.
    Silent,
}

impl Subscription {
    pub(super) async fn run(mut self) {
        let (mut failures, mut silences) = (0_u32, 0_u32);
        loop {
            // The supervisor is gone: nobody would tell us to end.
            if self.want.has_changed().is_err() {
                return;
            }
            let want = *self.want.borrow_and_update();
            let turn = match want {
                Want::End => return,
                Want::Here { turn, .. } => turn,
                Want::Away => {
                    if self.want.changed().await.is_err() {
                        return;
                    }
                    continue;
                }
            };
            let mut wanted = self.want.clone();
            let link = tokio::select! {
                biased;
                // Neither a drain nor a change of mind waits for a broker that is away.
                _ = wanted.wait_for(|want| want.turn() != Some(turn)) => continue,
                link = self.shared.link() => link,
            };
            // This is not broken off: a consumer that nobody holds would be cancelled before its channel is closed.
            match self.open(&link).await {
                Ok(opened) => {
                    failures = 0;
                    match self.serve(opened, turn).await {
                        Ending::HandedOver => {
                            silences = 0;
                            self.shared.give_back(link).await;
                            continue;
                        }
                        Ending::Lost(_) if self.want.borrow().turn() != Some(turn) => continue,
                        Ending::Lost(why) => {
                            silences = 0;
                            metrics::count(names::RECONNECTS, 1);
                            tracing::warn!(
                                queue = &*self.place.queue,
                                why,
                                "the subscription ended, subscribing again"
                            );
                        }
                        Ending::Silent => {
                            silences += 1;
                            metrics::count(names::SILENCES, 1);
                            tracing::warn!(
                                queue = &*self.place.queue,
                                "events wait in {} and the broker delivers none to its first consumer: subscribing again",
                                self.place.queue
                            );
                            // A new channel did not help (rabbitmq-server 17317): the broker may forget with the connection.
                            if silences.is_multiple_of(2) {
                                link.close().await;
                            }
                        }
                    }
                }
                Err(Failed::Why(why)) => {
                    failures += 1;
                    tracing::warn!(queue = &*self.place.queue, why, failures, "cannot subscribe yet, trying again");
                }
                Err(Failed::QueueMissing) => {
                    failures += 1;
                    tracing::warn!(queue = &*self.place.queue, "the queue is missing");
                    if let Err(error) = self.shared.repair().await {
                        tracing::error!(%error, "the topology cannot be declared again");
                    }
                }
            }
            let pause = backoff(failures + silences);
            tokio::select! {
                _ = self.want.wait_for(|want| want.turn() != Some(turn)) => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn open(&self, link: &Link) -> Result<Opened, Failed> {
        let opened = async {
            let channel = link.connection().create_channel().await?;
            channel.basic_qos(self.shared.prefetch, BasicQosOptions::default()).await?;
            let stamp = self.shared.clock.stamp();
            let (queue, options) = ((&*self.place.queue).into(), BasicConsumeOptions::default());
            let consumer = channel.basic_consume(queue, "".into(), options, FieldTable::default()).await?;
            Ok::<_, Error>((channel, consumer, stamp))
        };
        match self.shared.answer(2 * ANSWER, opened).await {
            None => {
                // Whoever else uses it waits in vain, too.
                link.give_up();
                link.close().await;
                Err(Failed::Why("the broker does not answer".into()))
            }
            Some(Ok((channel, consumer, stamp))) => Ok(Opened { channel, consumer, stamp }),
            Some(Err(error)) => match error.kind() {
                ErrorKind::ProtocolError(amqp) if *amqp.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => {
                    Err(Failed::QueueMissing)
                }
                _ => Err(Failed::Why(describe(&error))),
            },
        }
    }

    /// Takes and acks until the channel ends or is handed over.
    async fn serve(&mut self, opened: Opened, turn: u64) -> Ending {
        let Opened { channel, mut consumer, stamp } = opened;
        let epoch = Arc::new(Epoch::new(self.shared.epochs.fetch_add(1, Ordering::Relaxed), self.place.clone()));
        self.shared.consuming.fetch_add(1, Ordering::Relaxed);
        *lock(&self.standing) = Some(Standing { turn, stamp, epoch: epoch.clone() });
        self.shared.changed.notify_one();

        let mut ending = self.take(&channel, &mut consumer, &epoch, turn).await;
        epoch.leaving.store(true, Ordering::Release);
        if matches!(ending, Ending::HandedOver)
            && let Err(why) = self.hand_over(&channel, &epoch).await
        {
            ending = Ending::Lost(why);
        }
        epoch.live.store(false, Ordering::Release);
        let close = channel.close(200, "handing over".into());
        // Where the channel is closed already this fails at once, which is as good.
        let _ = tokio::time::timeout(Duration::from_secs(5), close).await;
        // Only now: a consumer that is dropped is cancelled, and a cancel before the close would start the next consumer
        // with what comes after our unacked deliveries.
        drop(consumer);
        // The pipeline may have ended before us.
        let _ = self.news.send(News::Ended(epoch.number));
        self.shared.consuming.fetch_sub(1, Ordering::Relaxed);
        *lock(&self.standing) = None;
        self.shared.changed.notify_one();
        ending
    }

    async fn take(&mut self, channel: &Channel, consumer: &mut Consumer, epoch: &Arc<Epoch>, turn: u64) -> Ending {
        let mut sweep = tokio::time::interval(GAP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + *LOOK, *LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ear = Ear::default();
        loop {
            let want = *self.want.borrow_and_update();
            if want.turn() != Some(turn) {
                return Ending::HandedOver;
            }
            let waits = epoch.ledger().unacked() > 0;
            tokio::select! {
                biased;
                changed = self.want.changed() => if changed.is_err() {
                    return Ending::Lost("the worker ended".into());
                },
                () = epoch.flush.notified() => if let Err(error) = self.ack(channel, epoch).await {
                    return Ending::Lost(describe(&error));
                },
                _ = sweep.tick(), if waits => {
                    let acks = due(epoch, Ledger::sweep);
                    if let Err(error) = send(channel, acks).await {
                        return Ending::Lost(describe(&error));
                    }
                }
                next = consumer.next() => {
                    let (deliveries, end) = gather(next, consumer);
                    let arrivals = self.arrivals(deliveries, epoch);
                    if !arrivals.is_empty() && self.news.send(News::Arrived(arrivals)).is_err() {
                        return Ending::Lost("the worker ended".into());
                    }
                    if let Some(why) = end {
                        return Ending::Lost(why);
                    }
                }
                _ = look.tick() => match self.listen(channel, epoch, &mut ear, want).await {
                    Ok(true) => {}
                    Ok(false) => return Ending::Silent,
                    Err(why) => return Ending::Lost(why),
                },
            }
        }
    }

    /// The watchdog: whether all is well with a queue from which nothing comes. The question also finds a connection
    /// that the broker has forgotten.
    async fn listen(&self, channel: &Channel, epoch: &Epoch, ear: &mut Ear, want: Want) -> Result<bool, String> {
        let received = epoch.received();
        // Whether it is that nothing comes, or that nothing is read.
        let full = self.shared.budget.is_full();
        let idle = std::mem::replace(&mut ear.received, received) == received && epoch.unacked() == 0 && !full;
        if !idle {
            ear.waiting = 0;
            return Ok(true);
        }
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let asked = channel.queue_declare((&*self.place.queue).into(), options, FieldTable::default());
        let ready = match self.shared.answer(ANSWER, asked).await {
            Some(Ok(queue)) => queue.message_count(),
            Some(Err(error)) => return Err(describe(&error)),
            None => return Err("the broker does not answer".into()),
        };
        if ready == 0 {
            self.shared.prove();
        }
        let overlooked = ready > 0 && matches!(want, Want::Here { first: true, .. });
        ear.waiting = if overlooked { ear.waiting + 1 } else { 0 };
        // Once may be an event that came this moment.
        Ok(ear.waiting < 2)
    }

    /// Until no delivery is out, and all that they sent is published.
    async fn hand_over(&self, channel: &Channel, epoch: &Arc<Epoch>) -> Result<(), String> {
        // The pipeline may have ended before us.
        let _ = self.news.send(News::Leaving(epoch.number));
        loop {
            // Before the acks: whoever gives its ticket back has settled by then.
            let held = epoch.tickets.load(Ordering::Acquire);
            // What is given back stays between what is settled: the second sweep acks one by one.
            let acks = due(epoch, |ledger| {
                if held == 0 { [ledger.sweep(), ledger.sweep()].concat() } else { ledger.flush().into_iter().collect() }
            });
            send(channel, acks).await.map_err(|error| describe(&error))?;
            if held == 0 {
                break;
            }
            tokio::select! {
                () = epoch.flush.notified() => {}
                // A channel that ends meanwhile gives everything back by itself.
                () = tokio::time::sleep(Duration::from_secs(1)) => if !channel.status().connected() {
                    return Err("the channel ended before the hand-over".into());
                }
            }
        }
        if tokio::time::timeout(FLUSH, self.outbox.flushed(self.place.queue.clone())).await.is_err() {
            tracing::warn!(
                queue = &*self.place.queue,
                "what was sent is not confirmed yet: the next owner sends it again"
            );
        }
        // Before the channel is closed: the next owner is not to take for a death what was handed over.
        let disowned = self.store.disown(self.place.queue.clone());
        if epoch.received() > 0 && !matches!(tokio::time::timeout(FLUSH, disowned).await, Ok(Ok(()))) {
            tracing::warn!(queue = &*self.place.queue, "the store does not take it that the partition is handed over");
        }
        Ok(())
    }

    /// Acks what is worth an ack; the next sweep takes what is not.
    async fn ack(&self, channel: &Channel, epoch: &Epoch) -> Result<(), Error> {
        let window = usize::from(self.shared.prefetch);
        let acks = due(epoch, |ledger| if ledger.is_due(window) { ledger.relieve(window) } else { Vec::new() });
        send(channel, acks).await
    }

    fn arrivals(&self, deliveries: Vec<Delivery>, epoch: &Arc<Epoch>) -> Vec<Arrival> {
        let Some(first) = deliveries.first().map(|delivery| delivery.delivery_tag) else { return Vec::new() };
        {
            let mut ledger = epoch.ledger();
            deliveries.iter().for_each(|delivery| ledger.open(delivery.delivery_tag));
        }
        epoch.received.fetch_add(deliveries.len() as u64, Ordering::Relaxed);
        epoch.tickets.fetch_add(deliveries.len(), Ordering::AcqRel);
        let arrival = |delivery: Delivery| {
            let (tag, redelivered) = (delivery.delivery_tag, delivery.redelivered);
            let fresh_id = || uuid::Uuid::new_v4().to_string();
            let Subscriptions { seal, limits, subscribed, .. } = &*self.shared;
            let size = delivery.data.len();
            let mut envelope = codec::envelope(&delivery);
            give_type(subscribed, &mut envelope);
            let content = seal.open(envelope, &delivery.data, *limits, fresh_id).map_err(|why| {
                let mut message = codec::read(delivery);
                give_type(subscribed, &mut message);
                Box::new((message, why))
            });
            // A body that came compressed is larger now.
            let data = content.as_ref().ok().and_then(|incoming| Some(incoming.event.data()?.as_bytes().len()));
            let _share = self.shared.budget.take(data.unwrap_or(0).max(size));
            let born = content.as_ref().ok().and_then(|incoming| happened(&incoming.event));
            Arrival { ticket: Ticket { epoch: epoch.clone(), tag, _share }, redelivered, content, born }
        };
        let arrivals: Vec<Arrival> = deliveries.into_iter().map(arrival).collect();
        let now = || jiff::Timestamp::now().as_millisecond();
        let at = arrivals.first().and_then(|arrival| arrival.born).unwrap_or_else(now);
        lock(&epoch.ages).push_back((first, at));
        self.shared.prove();
        arrivals
    }
}

fn happened(event: &Event) -> Option<i64> {
    let time = event.time()?;
    let exact = time.parse::<jiff::Timestamp>().ok().map(|time| time.as_millisecond());
    // It reads nine digits behind the point, and not the last day of the year 9999.
    exact.or_else(|| seconds_of(time)?.checked_mul(1000))
}

/// What the watchdog has noticed.
#[derive(Default)]
struct Ear {
    received: u64,
    waiting: u32,
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

/// Acks to send now, counted by how many deliveries each covers.
fn due(epoch: &Epoch, ask: impl FnOnce(&mut Ledger) -> Vec<Ack>) -> Vec<Ack> {
    let (acks, covered) = {
        let mut ledger = epoch.ledger();
        let before = ledger.unacked();
        let acks = ask(&mut ledger);
        (acks, before - ledger.unacked())
    };
    // At most one covers several.
    let alone = acks.iter().filter(|ack| ack.span == Span::One).count();
    for ack in &acks {
        metrics::observe(names::ACK_EVENTS, if ack.span == Span::One { 1.0 } else { (covered - alone) as f64 });
    }
    acks
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
