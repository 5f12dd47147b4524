//! The one loop: news in, the law's decision, effects out. The only file that orders effects.
//!
//! Everything that waits (store, broker, handlers, clocks) comes back as `News`; the loop itself never waits for any
//! one of them. Work for the store and the broker gathers at stations while their last batch is under
//! way, so batches grow with the load and an idle worker answers at once.
mod ending;
mod intake;
mod places;
mod runs;
mod stations;
mod suspects;
mod tide;

use crate::config::Routes;
use crate::consumer::{self, Arrival, Subscriptions};
use crate::fault;
use crate::fleet::Peers;
use crate::handler::{self, Context, Handler};
use crate::job::{House, Job, Mark, Place};
use crate::metrics::{self, Meters, names};
use crate::outbox::Outbox;
use crate::store::{Committed, Effect, Kept, Recorded, Row, Start, Store, StoreError};
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use places::{Places, Urgency};
use rustc_hash::FxHashMap;
use stations::{Queue, STATIONS, Station};
use std::collections::{HashMap, VecDeque};
use std::hash::RandomState;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tide::{Level, Tide};
use tokio::sync::{mpsc, oneshot, watch};
use warren_publisher::Publisher;
use warren_publisher::publish::Outcome as Published;
use warren_shared::delivery::{self, Action, Company, Fact, Law};
use warren_shared::load::Count;
use warren_shared::schedule::Schedule;

type Id = u64;

/// Handled and not yet recorded, or recorded and not yet published: beyond this nothing more is taken.
const BACKLOG: usize = 4096;
/// News of a kind that one turn of the loop takes in, at most.
const TURN: usize = 64;
/// Copies at the publisher at most.
const COPIES: usize = 1024;
/// How often it is said that copies are refused, and the topology looked after.
const QUIET: Duration = Duration::from_secs(1);
/// Taken ahead of the places for handlers, at most.
const AHEAD: usize = 1024;

/// What the loop learns.
#[derive(Debug)]
enum News {
    Adopted(u64, Result<(Option<Arc<str>>, Vec<Row>), StoreError>),
    Looked(Vec<Id>, Result<Vec<Option<Committed>>, StoreError>),
    Loaded(Vec<Id>, Result<Vec<Option<Kept>>, StoreError>),
    Started(Vec<Id>, Result<Vec<Start>, StoreError>),
    Unstarted(Vec<Id>, Result<(), StoreError>),
    Committed(Vec<Id>, Arc<Vec<Effect>>, Instant, Result<Vec<Recorded>, StoreError>),
    Relayed(Vec<Id>, Result<Vec<Row>, StoreError>),
    Published(Vec<(Id, Published)>),
    /// Copies that were refused may be tried again.
    Again(Vec<Id>),
    Handled(Vec<(Id, handler::Outcome)>),
    Noted(Id),
    Waited(Id),
    Rested(Station),
}

/// What the worker orders.
#[derive(Debug)]
pub enum Order {
    /// Take nothing more; answer when all that runs has ended.
    Drain(oneshot::Sender<()>),
    /// End what still runs, uncounted.
    Interrupt,
    /// Say what was counted; the backlog in it is what is here.
    Count(oneshot::Sender<Count>),
}

/// What the loop is made of.
pub(crate) struct Parts {
    pub(crate) routes: Routes,
    /// One a route, in the order of the routes.
    pub(crate) handlers: Vec<Arc<dyn Handler>>,
    pub(crate) law: Law,
    pub(crate) house: House,
    pub(crate) context: Context,
    pub(crate) concurrency: usize,
    /// Bytes of what is on its way out, after which nothing more begins.
    pub(crate) memory: usize,
    pub(crate) peers: Arc<Peers>,
    /// How long an event waits that only another worker has a route for.
    pub(crate) unknown_grace: Duration,
    /// Whether each partition has one owner, who relays what its last owner left.
    pub(crate) owned: bool,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) publisher: Publisher,
    pub(crate) outbox: Outbox,
    pub(crate) subscriptions: Arc<Subscriptions>,
    pub(crate) pulse: Arc<Pulse>,
}

/// Signs of life for probes.
#[derive(Debug, Default)]
pub struct Pulse {
    turned: Mutex<Option<Instant>>,
    /// Handlers that run.
    pub running: AtomicUsize,
    /// Whether the store refused its last call.
    pub store_fails: AtomicBool,
    /// How often this worker told the store that it lives.
    pub beats: AtomicU64,
}

impl Pulse {
    /// The loop turns.
    pub(crate) fn turn(&self) {
        *self.turned.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// How long ago the loop last turned. Not by the clock of the day, which may be set.
    #[must_use]
    pub fn silence(&self) -> Duration {
        let turned = *self.turned.lock().unwrap_or_else(PoisonError::into_inner);
        turned.map_or(Duration::ZERO, |turned| turned.elapsed())
    }
}

/// The loop's state.
pub(crate) struct Pipeline {
    parts: Parts,
    inbox: mpsc::UnboundedReceiver<News>,
    tell: mpsc::UnboundedSender<News>,
    deliveries: mpsc::UnboundedReceiver<consumer::News>,
    orders: mpsc::UnboundedReceiver<Order>,
    /// What the store and the broker are asked.
    asked: FuturesUnordered<BoxFuture<'static, News>>,
    jobs: FxHashMap<Id, Job>,
    next: Id,
    schedule: Schedule<u64, Id>,
    /// Makes keys of the schedule; keyed anew in each process, so nobody can choose keys that collide.
    hasher: RandomState,
    stations: [Queue; STATIONS.len()],
    /// Copies at the publisher: each is settled by itself, so more may follow before all are.
    publishing: usize,
    /// Bytes of what handlers returned and the store has not recorded.
    replies: usize,
    /// When it was said last that copies are refused.
    said: Option<Instant>,
    /// Taken from the schedule, and asked for in the store or waiting for a place.
    ahead: usize,
    /// The places of routes that have a limit of their own.
    places: Places,
    /// Unknown to the store, and waiting for a place.
    ready: VecDeque<Id>,
    /// They hold a place: their handler runs, or their start is being recorded.
    active: usize,
    /// Ended since the store was last asked: twice as many may be taken ahead, as they will find a place in no time.
    pace: usize,
    /// Calls that the next turn starts.
    calls: Vec<runs::Started>,
    /// Turns true when handlers must end.
    interrupted: watch::Sender<bool>,
    /// May have killed the process: each runs alone.
    alone: VecDeque<Id>,
    solo: Option<Id>,
    /// Epochs whose partition is ours, and arrivals that wait until the last owner's rows are relayed.
    epochs: HashMap<u64, Option<Vec<Arrival>>>,
    /// Who had an epoch's partition before, where it did not give it back.
    before: HashMap<u64, Arc<str>>,
    drained: Option<oneshot::Sender<()>>,
    draining: bool,
    warned_anonymous: bool,
    warned_priority: bool,
    meters: Meters,
    tide: Tide,
    started: Instant,
}

/// The handles of a running loop.
pub(crate) struct Running {
    pub(crate) news: mpsc::UnboundedSender<consumer::News>,
    pub(crate) orders: mpsc::UnboundedSender<Order>,
}

/// Starts the loop.
pub(crate) fn start(parts: Parts) -> Running {
    let (tell, inbox) = mpsc::unbounded_channel();
    let (news, deliveries) = mpsc::unbounded_channel();
    let (give, orders) = mpsc::unbounded_channel();
    let weights: Vec<u32> = parts.house.topology.lanes.iter().map(|lane| lane.weight).collect();
    let places = Places::new(parts.routes.iter().map(|route| route.concurrency), &weights);
    let (meters, started) = (Meters::new(&parts.house.topology.lanes, &parts.routes), Instant::now());
    let pipeline = Pipeline {
        parts,
        places,
        inbox,
        tell,
        deliveries,
        orders,
        asked: FuturesUnordered::new(),
        jobs: FxHashMap::default(),
        next: 0,
        schedule: Schedule::new(weights),
        hasher: RandomState::new(),
        stations: Default::default(),
        publishing: 0,
        replies: 0,
        said: None,
        ahead: 0,
        ready: VecDeque::new(),
        active: 0,
        pace: 0,
        calls: Vec::new(),
        interrupted: watch::Sender::new(false),
        alone: VecDeque::new(),
        solo: None,
        epochs: HashMap::new(),
        before: HashMap::new(),
        drained: None,
        draining: false,
        warned_anonymous: false,
        warned_priority: false,
        meters,
        tide: Tide::new(started),
        started,
    };
    tokio::spawn(pipeline.run());
    Running { news, orders: give }
}

impl Pipeline {
    async fn run(mut self) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        loop {
            // What is under way goes before what is new.
            tokio::select! {
                biased;
                order = self.orders.recv() => match order {
                    Some(order) => self.obey(order),
                    // The worker is gone.
                    None => return,
                },
                Some(news) = self.asked.next() => self.learn(news),
                Some(news) = self.inbox.recv() => self.learn(news),
                Some(news) = self.deliveries.recv() => self.arrive(news),
                _ = tick.tick() => self.gauge(),
            }
            while let Some(Some(news)) = self.asked.next().now_or_never() {
                self.learn(news);
            }
            for _ in 0..TURN {
                let Ok(news) = self.inbox.try_recv() else { break };
                self.learn(news);
            }
            for _ in 0..TURN {
                let Ok(news) = self.deliveries.try_recv() else { break };
                self.arrive(news);
            }
            self.advance();
            self.tide.flow(self.level());
            if self.draining
                && self.jobs.is_empty()
                && self.quiet()
                && let Some(tell) = self.drained.take()
            {
                let _ = tell.send(());
            }
        }
    }

    fn arrive(&mut self, news: consumer::News) {
        match news {
            consumer::News::Arrived(arrivals) => self.arrived(arrivals),
            consumer::News::Leaving(epoch) => self.leaving(epoch),
            consumer::News::Ended(epoch) => self.ended(epoch),
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Drain(tell) => self.drain(tell),
            Order::Interrupt => self.interrupt(),
            Order::Count(tell) => {
                // Whoever asked may be gone.
                let _ = tell.send(Count { backlog: self.jobs.len() as u64, ..self.tide.count() });
            }
        }
    }

    fn learn(&mut self, news: News) {
        match news {
            News::Adopted(epoch, rows) => self.adopted(epoch, rows),
            News::Looked(ids, answer) => self.answered(Station::Look, ids, answer, Self::looked),
            News::Loaded(ids, answer) => self.answered(Station::Load, ids, answer, Self::loaded),
            News::Started(ids, answer) => {
                self.answered(Station::Start, ids, answer, Self::started);
            }
            News::Unstarted(ids, answer) => {
                let answer = answer.map(|()| ids.iter().map(|_| ()).collect());
                self.answered(Station::Unstart, ids, answer, |s, id, ()| s.unstarted(id));
            }
            News::Committed(ids, effects, since, answer) => self.committed(ids, effects, since, answer),
            News::Relayed(ids, answer) => self.relayed(ids, answer),
            News::Published(outcomes) => self.published(outcomes),
            News::Again(ids) => ids.into_iter().for_each(|id| self.enqueue(Station::Publish, id)),
            News::Handled(outcomes) => outcomes.into_iter().for_each(|(id, outcome)| self.handled(id, outcome)),
            News::Noted(id) => self.noted(id),
            News::Waited(id) => self.waited(id),
            News::Rested(station) => self.station_mut(station).busy = false,
        }
    }

    fn fact(&mut self, id: Id, fact: Fact) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let route = job.route();
        let law = route.and_then(|r| self.parts.routes.get(r)).map_or(&self.parts.law, |route| &route.law);
        let (was, sat) = (job.place(), job.holds_place());
        match delivery::next(job.state, fact, law) {
            Ok((state, action)) => {
                job.state = state;
                let (is, sits) = (job.place(), job.holds_place());
                if sat && !sits {
                    self.places.leave(route);
                }
                self.moved(was, is);
                self.perform(id, action);
            }
            // The job goes back to the broker with its channel; its key goes on.
            Err(illegal) => {
                debug_assert!(false, "{illegal}");
                tracing::error!(%illegal, "a fault in Warren: please report it");
                self.remove(id);
            }
        }
    }

    fn moved(&mut self, from: Place, to: Place) {
        self.ahead = self.ahead + usize::from(to == Place::Ahead) - usize::from(from == Place::Ahead);
        self.active = self.active + usize::from(to == Place::Active) - usize::from(from == Place::Active);
        if from == Place::Active && to == Place::Elsewhere {
            self.pace += 1;
            self.tide.called();
        }
    }

    fn perform(&mut self, id: Id, action: Action) {
        match action {
            Action::Look => self.enqueue(Station::Look, id),
            Action::Record(start) if start.company == Company::Shared => self.mark(id),
            // It would not begin in a drain.
            Action::Record(_) if self.draining => self.fact(id, Fact::Gone),
            Action::Record(_) => self.alone.push_back(id),
            Action::Release => match self.jobs.get(&id).map(|job| job.mark) {
                Some(Mark::Absent) => self.fact(id, Fact::Released),
                // Where the store was asked already, its answer leads on.
                _ => self.unmark(id),
            },
            Action::CommitDone | Action::CommitDead(_) => {
                match self.jobs.get_mut(&id).and_then(|job| job.recorded.take()) {
                    Some((recorded, out)) => self.recorded(id, recorded, out),
                    None => self.enqueue(Station::Commit, id),
                }
            }
            Action::Park { .. } | Action::Bury => self.enqueue(Station::Publish, id),
            Action::Run(_) => self.launch(id),
            // It would hold a drain up, or a hand-over.
            Action::Await | Action::Prove if self.draining || !self.may_begin(id) => self.fact(id, Fact::Interrupted),
            Action::Await => self.await_route(id),
            Action::Prove => self.await_life(id),
            Action::Hold(run, after) => self.hold(id, run.attempt, after),
            Action::Ack => {
                fault::point("before-ack");
                let Some(mut job) = self.remove(id) else { return };
                // Every way to `Safe` brings its proof; the type asks for it all the same.
                if let Some(proof) = job.proof.take() {
                    job.ticket.ack(proof);
                }
            }
            Action::Stop => {
                self.remove(id);
            }
        }
    }

    fn may_begin(&self, id: Id) -> bool {
        self.jobs.get(&id).is_some_and(|job| job.ticket.may_begin())
    }

    fn remove(&mut self, id: Id) -> Option<Job> {
        let job = self.jobs.remove(&id)?;
        self.tide.left(job.since);
        self.replies -= job.weight;
        self.moved(job.place(), Place::Elsewhere);
        if job.holds_place() {
            self.places.leave(job.route());
        }
        if let Some(key) = job.key {
            self.schedule.finish(&key);
        }
        if self.solo == Some(id) {
            self.solo = None;
        }
        Some(job)
    }

    fn advance(&mut self) {
        self.take();
        self.admit_ready();
        self.turn_of_the_suspects();
        self.start_calls();
        for station in STATIONS {
            self.serve(station);
        }
    }

    fn take(&mut self) {
        let room = BACKLOG.saturating_sub(self.station(Station::Commit).waiting.len());
        let over = self.replies > self.parts.memory || self.parts.outbox.is_over(room, self.parts.memory);
        if self.draining || !self.alone.is_empty() || self.solo.is_some() || over {
            return;
        }
        let most = (2 * self.pace).min(AHEAD).max(self.parts.concurrency);
        while self.active + self.ahead < most {
            let waited = self.places.next();
            let Some((key, id)) = waited.or_else(|| self.schedule.take()) else { return };
            let Some(job) = self.jobs.get_mut(&id) else {
                self.schedule.finish(&key);
                continue;
            };
            let route = job.route();
            if waited.is_none() && !self.places.take(route) {
                let since = millis(job.since.duration_since(self.started));
                let urgency = Urgency { lane: job.ticket.place().lane, priority: job.priority, since };
                self.places.wait(route, urgency, (key, id));
                continue;
            }
            job.key = Some(key);
            self.ahead += 1;
            if job.seen().is_some() {
                self.enqueue(Station::Look, id);
            } else {
                // Nothing can be known of it.
                self.ready.push_back(id);
            }
        }
    }

    fn level(&self) -> Level {
        let waiting = self.schedule.waiting() + self.places.waiting() + self.ready.len();
        Level { present: self.jobs.len(), active: self.active, waiting }
    }

    fn gauge(&self) {
        self.parts.pulse.turn();
        self.parts.pulse.running.store(self.active, Ordering::Relaxed);
        let level = self.level();
        metrics::set(names::RUNNING, level.active as f64);
        metrics::set(names::WAITING, level.waiting as f64);
        metrics::set(names::OUTBOX, self.parts.outbox.pending() as f64);
        metrics::set(names::OUTBOX_HELD, self.parts.outbox.held() as f64);
        metrics::set(names::OUTBOX_AGE, self.parts.outbox.age().as_secs_f64());
        metrics::set(names::CONSUMING, self.parts.subscriptions.consuming() as f64);
        let mut inside = vec![0_u32; self.meters.lanes().len()];
        self.jobs.values().for_each(|job| inside[job.ticket.place().lane] += 1);
        self.meters.lanes().iter().zip(inside).for_each(|(lane, n)| lane.in_flight.set(n));
        if let Some(oldest) = self.jobs.values().map(Job::age).max().filter(|age| *age > Duration::from_secs(60)) {
            tracing::debug!(?oldest, jobs = self.jobs.len(), "the oldest delivery here");
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Jitter, 0..1.
pub(crate) fn chance() -> f64 {
    let random = uuid::Uuid::new_v4().as_u128() as u32;
    f64::from(random) / f64::from(u32::MAX)
}
