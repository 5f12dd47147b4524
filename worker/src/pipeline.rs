//! The one loop: news in, the law's decision, effects out. The only file that orders effects.
//!
//! Everything that waits (store, broker, handlers, clocks) runs in tasks of its own and comes back as [`News`]; the
//! loop itself never waits. Work for the store and the broker gathers at stations while their last batch is under
//! way, so batches grow with the load and an idle worker answers at once.
use crate::consumer::{self, Arrival, Subscriptions};
use crate::fault;
use crate::handler::{self, Call, Context, Handler};
use crate::job::{House, Job, Mark};
use crate::metrics::{self, names};
use crate::outbox::Outbox;
use crate::store::{Effect, Left, Recorded, Row, Seen, Start, Store, StoreError};
use crate::{config::Route, consumer::Proof};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use warren_publisher::Publisher;
use warren_publisher::publish::Outcome as Published;
use warren_shared::delivery::{self, Action, Company, Fact, Law, State};
use warren_shared::retry::{DUE, Failure};
use warren_shared::schedule::Schedule;
use warren_shared::wire::Identified;
use warren_shared::{Identity, Message};

type Id = u64;

/// What the loop learns.
#[derive(Debug)]
enum News {
    Subscription(consumer::News),
    Adopted(u64, Result<Vec<Row>, StoreError>),
    Looked(Vec<Id>, Result<Vec<Option<crate::store::Committed>>, StoreError>),
    Started(Vec<Id>, Result<Vec<Start>, StoreError>),
    Unstarted(Vec<Id>, Result<(), StoreError>),
    Committed(Vec<Id>, Arc<Vec<Effect>>, Instant, Result<Vec<Recorded>, StoreError>),
    Relayed(Vec<Id>, Result<Vec<Row>, StoreError>),
    Published(Vec<Id>, Vec<Published>),
    Handled(Id, handler::Outcome),
    Waited(Id),
    Rested(Station),
    Order(Order),
}

/// What the worker orders.
#[derive(Debug)]
pub enum Order {
    /// Take nothing more; answer when all that runs has ended.
    Drain(oneshot::Sender<()>),
    /// End what still runs, uncounted.
    Interrupt,
}

/// Where work gathers for a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Station {
    Look,
    Start,
    Unstart,
    Commit,
    Relay,
    Publish,
}

const STATIONS: [Station; 6] =
    [Station::Look, Station::Start, Station::Unstart, Station::Commit, Station::Relay, Station::Publish];
/// A transaction, a read or a chunk of publishes holds so many events at most.
const BATCH: usize = 256;
/// Handled and not yet recorded, or recorded and not yet published: beyond this nothing more is taken.
const BACKLOG: usize = 4096;

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Id>,
    busy: bool,
    failures: u32,
}

/// What the loop is made of.
pub(crate) struct Parts {
    pub(crate) routes: Vec<(Route, Arc<dyn Handler>)>,
    pub(crate) find: Box<dyn Fn(&str) -> Option<usize> + Send>,
    pub(crate) law: Law,
    pub(crate) house: House,
    pub(crate) context: Context,
    pub(crate) concurrency: usize,
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
    /// Milliseconds since 1970 of the loop's last turn.
    pub turned: AtomicI64,
    /// Whether the store refused its last call.
    pub store_fails: AtomicBool,
}

/// The loop's state.
pub(crate) struct Pipeline {
    parts: Parts,
    inbox: mpsc::UnboundedReceiver<News>,
    tell: mpsc::UnboundedSender<News>,
    jobs: HashMap<Id, Job>,
    next: Id,
    schedule: Schedule<u64, Id>,
    stations: HashMap<Station, Queue>,
    /// Taken from the schedule and not yet through their handler.
    active: usize,
    /// May have killed the process: each runs alone.
    alone: VecDeque<Id>,
    solo: Option<Id>,
    /// Epochs whose partition is ours, and arrivals that wait until the last owner's rows are relayed.
    epochs: HashMap<u64, Option<Vec<Arrival>>>,
    drained: Option<oneshot::Sender<()>>,
    draining: bool,
    warned_anonymous: bool,
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
    let (news, mut subscription_news) = mpsc::unbounded_channel();
    let (orders, mut order_box) = mpsc::unbounded_channel();
    let forward = tell.clone();
    tokio::spawn(async move {
        while let Some(news) = subscription_news.recv().await {
            let _ = forward.send(News::Subscription(news));
        }
    });
    let forward = tell.clone();
    tokio::spawn(async move {
        while let Some(order) = order_box.recv().await {
            let _ = forward.send(News::Order(order));
        }
    });
    let weights: Vec<u32> = parts.house.topology.lanes.iter().map(|lane| lane.weight).collect();
    let pipeline = Pipeline {
        parts,
        inbox,
        tell,
        jobs: HashMap::new(),
        next: 0,
        schedule: Schedule::new(weights),
        stations: STATIONS.into_iter().map(|s| (s, Queue::default())).collect(),
        active: 0,
        alone: VecDeque::new(),
        solo: None,
        epochs: HashMap::new(),
        drained: None,
        draining: false,
        warned_anonymous: false,
        started: Instant::now(),
    };
    tokio::spawn(pipeline.run());
    Running { news, orders }
}

impl Pipeline {
    async fn run(mut self) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                biased;
                news = self.inbox.recv() => {
                    let Some(news) = news else { return };
                    self.learn(news);
                    for _ in 0..BATCH {
                        match self.inbox.try_recv() {
                            Ok(news) => self.learn(news),
                            Err(_) => break,
                        }
                    }
                }
                _ = tick.tick() => self.gauge(),
            }
            self.advance();
            if self.draining
                && self.jobs.is_empty()
                && self.quiet()
                && let Some(tell) = self.drained.take()
            {
                let _ = tell.send(());
            }
        }
    }

    fn learn(&mut self, news: News) {
        match news {
            News::Subscription(consumer::News::Arrived(arrivals)) => self.arrived(arrivals),
            News::Subscription(consumer::News::Ended(epoch)) => self.ended(epoch),
            News::Adopted(epoch, rows) => self.adopted(epoch, rows),
            News::Looked(ids, answer) => self.answered(Station::Look, ids, answer, Self::looked),
            News::Started(ids, answer) => {
                self.answered(Station::Start, ids, answer, Self::started);
            }
            News::Unstarted(ids, answer) => {
                let answer = answer.map(|()| ids.iter().map(|_| ()).collect());
                self.answered(Station::Unstart, ids, answer, |s, id, ()| s.unstarted(id));
            }
            News::Committed(ids, effects, since, answer) => self.committed(ids, effects, since, answer),
            News::Relayed(ids, answer) => self.relayed(ids, answer),
            News::Published(ids, outcomes) => self.published(ids, outcomes),
            News::Handled(id, outcome) => self.handled(id, outcome),
            News::Waited(id) => self.fact(id, Fact::Waited),
            News::Rested(station) => self.station(station).busy = false,
            News::Order(Order::Drain(tell)) => self.drain(tell),
            News::Order(Order::Interrupt) => self.interrupt(),
        }
    }

    // ---- deliveries in

    fn arrived(&mut self, arrivals: Vec<Arrival>) {
        let Some(first) = arrivals.first() else { return };
        let epoch = first.ticket.epoch();
        metrics::count_by(names::RECEIVED, "lane", first.ticket.place().lane_name.clone(), arrivals.len() as u64);
        if self.draining {
            return;
        }
        if !self.parts.owned {
            return self.admit(arrivals);
        }
        match self.epochs.get_mut(&epoch) {
            Some(None) => self.admit(arrivals),
            Some(Some(waiting)) => waiting.extend(arrivals),
            None => {
                // The broker made us this partition's consumer: what its last owner left goes out before our own.
                let partition = first.ticket.place().queue.clone();
                tracing::info!(partition, "first delivery from {partition}: this worker is its active consumer");
                self.epochs.insert(epoch, Some(arrivals));
                self.adopt(epoch, partition, Duration::ZERO);
            }
        }
    }

    fn adopt(&self, epoch: u64, partition: String, pause: Duration) {
        let (store, tell) = (self.parts.store.clone(), self.tell.clone());
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let rows = store.adopt(Left::In(partition)).await;
            let _ = tell.send(News::Adopted(epoch, rows));
        });
    }

    fn adopted(&mut self, epoch: u64, rows: Result<Vec<Row>, StoreError>) {
        match rows {
            Ok(rows) => {
                if !rows.is_empty() {
                    tracing::info!(rows = rows.len(), "publishing what the partition's last owner left");
                    // They are ours even if the epoch has ended meanwhile: nobody else would publish them.
                    self.parts.outbox.push(rows);
                }
                let Some(waiting) = self.epochs.get_mut(&epoch) else { return };
                let arrivals = waiting.take().unwrap_or_default();
                self.admit(arrivals);
            }
            Err(error) => {
                self.store_failed(&error);
                let first = self.epochs.get(&epoch).and_then(|waiting| waiting.as_ref()?.first());
                if let Some(partition) = first.map(|arrival| arrival.ticket.place().queue.clone()) {
                    self.adopt(epoch, partition, Duration::from_secs(1));
                }
            }
        }
    }

    fn admit(&mut self, arrivals: Vec<Arrival>) {
        let (now, monotonic) = (now_ms(), millis(self.started.elapsed()));
        for Arrival { ticket, redelivered, content } in arrivals {
            fault::point("received");
            let id = self.next;
            self.next += 1;
            let incoming = match content {
                Err(message) => {
                    self.jobs.insert(id, Job::of_message(ticket, redelivered, message));
                    self.fact(id, Fact::Unreadable);
                    continue;
                }
                Ok(incoming) => incoming,
            };
            if incoming.identified == Identified::OnArrival {
                self.anonymous(&incoming);
            }
            let route = (self.parts.find)(incoming.event.kind());
            let (lane, priority, attempt, due) =
                (ticket.place().lane, incoming.priority, incoming.attempt, incoming.due.unwrap_or(0));
            let job = Job::of_event(ticket, redelivered, incoming, route);
            let key = hash(&job.turn());
            self.jobs.insert(id, job);
            let remaining = Duration::from_millis(u64::try_from(due.saturating_sub(now)).unwrap_or(0));
            if remaining > DUE {
                self.fact(id, Fact::Early { remaining, attempt });
            } else {
                self.schedule.push(key, lane, priority, monotonic, id);
            }
        }
    }

    fn anonymous(&mut self, incoming: &warren_shared::Incoming) {
        metrics::count(names::ANONYMOUS, 1);
        if !std::mem::replace(&mut self.warned_anonymous, true) {
            tracing::warn!(
                r#type = incoming.event.kind(),
                source = incoming.event.source(),
                "a message came without message_id: it is handled, but a repeated delivery cannot be recognised; \
                 have its publisher set message_id (said once, counted in {})",
                names::ANONYMOUS
            );
        }
    }

    fn ended(&mut self, epoch: u64) {
        self.epochs.remove(&epoch);
        let Self { schedule, jobs, .. } = self;
        for id in schedule.discard(|id| jobs.get(id).is_none_or(|job| job.ticket.epoch() == epoch)) {
            jobs.remove(&id);
        }
        self.leave_holds(|job| job.ticket.epoch() == epoch, Fact::Gone);
        // The next owner must not take a run for a death of this process: what waits for its turn leaves, what runs is
        // no longer counted.
        let of = |s: &Self, id: &Id| s.jobs.get(id).is_some_and(|job| job.ticket.epoch() == epoch);
        let (leaving, staying) = std::mem::take(&mut self.alone).into_iter().partition(|id| of(self, id));
        self.alone = staying;
        VecDeque::into_iter(leaving).for_each(|id| self.fact(id, Fact::Interrupted));
        let running: Vec<Id> = self.jobs.keys().filter(|id| of(self, id)).copied().collect();
        running.into_iter().for_each(|id| self.unmark(id));
    }

    /// Ends waits in place.
    fn leave_holds(&mut self, which: impl Fn(&Job) -> bool, fact: Fact) {
        let holding = |job: &Job| matches!(job.state, State::Holding { .. });
        let held: Vec<Id> = self.jobs.iter().filter(|(_, j)| holding(j) && which(j)).map(|(id, _)| *id).collect();
        for id in held {
            if let Some(abort) = self.jobs.get_mut(&id).and_then(|job| job.abort.take()) {
                abort.abort();
            }
            self.fact(id, fact);
        }
    }

    // ---- answers of store and broker

    fn looked(&mut self, id: Id, known: Option<crate::store::Committed>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let attempt = job.attempt();
        let fact = if let Some(proof) = known {
            job.proof = Some(Proof::Committed(proof));
            metrics::count(names::DUPLICATES, 1);
            return self.known(id, Fact::Known);
        } else if job.route().is_none() {
            Fact::Unrouted
        } else if job.redelivered {
            Fact::Redelivered { attempt }
        } else {
            Fact::Fresh { attempt }
        };
        self.fact(id, fact);
    }

    fn started(&mut self, id: Id, start: Start) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.mark = Mark::Present;
        match job.state {
            // Its turn has come: what the store knew was told before.
            State::Running(_) => self.launch(id),
            // It was interrupted meanwhile.
            State::Leaving(_) => self.unmark(id),
            _ => self.fact(id, Fact::Recorded { unfinished: start.unfinished, failed: start.failed }),
        }
        if self.jobs.get(&id).is_some_and(|job| !job.ticket.is_live()) {
            self.unmark(id);
        }
    }

    fn unstarted(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.mark = Mark::Absent;
        if matches!(job.state, State::Leaving(_)) {
            self.fact(id, Fact::Released);
        }
    }

    /// Takes the record of a start back, whatever becomes of the job.
    fn unmark(&mut self, id: Id) {
        if let Some(job) = self.jobs.get_mut(&id).filter(|job| job.mark == Mark::Present) {
            job.mark = Mark::Going;
            self.enqueue(Station::Unstart, id);
        }
    }

    fn committed(
        &mut self,
        ids: Vec<Id>,
        effects: Arc<Vec<Effect>>,
        since: Instant,
        answer: Result<Vec<Recorded>, StoreError>,
    ) {
        fault::point("after-commit");
        metrics::observe(names::COMMIT_SECONDS, since.elapsed().as_secs_f64());
        metrics::observe(names::COMMIT_EVENTS, ids.len() as f64);
        let effects = Arc::try_unwrap(effects).unwrap_or_else(|shared| (*shared).clone());
        let mut effects = VecDeque::from(effects);
        let mut relay = Vec::new();
        let recorded = |s: &mut Self, id: Id, recorded: Recorded| {
            let effect = effects.pop_front();
            let (proof, fact) = match recorded {
                Recorded::Fresh(proof, rows) => {
                    if let Some(Effect { partition, out, .. }) = effect {
                        let row = |(id, message)| Row { id, partition: partition.clone(), message };
                        relay.extend(rows.into_iter().zip(out).map(row));
                    }
                    s.tally(id);
                    (proof, Fact::Committed)
                }
                Recorded::Superseded(proof) => {
                    metrics::count(names::DUPLICATES, 1);
                    (proof, Fact::Superseded)
                }
            };
            if let Some(job) = s.jobs.get_mut(&id) {
                job.proof = Some(Proof::Committed(proof));
            }
            if fact == Fact::Superseded { s.known(id, fact) } else { s.fact(id, fact) }
        };
        self.answered(Station::Commit, ids, answer, recorded);
        if !relay.is_empty() {
            self.parts.outbox.push(relay);
        }
    }

    /// An outcome was there first. Where a worker that lost this partition recorded it after we took over, it may not
    /// have published what the event sent: that goes out before the key goes on.
    fn known(&mut self, id: Id, fact: Fact) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if self.parts.owned && job.redelivered {
            job.known = Some(fact);
            self.enqueue(Station::Relay, id);
        } else {
            self.fact(id, fact);
        }
    }

    fn relayed(&mut self, ids: Vec<Id>, answer: Result<Vec<Row>, StoreError>) {
        let known = |s: &mut Self, id: Id, ()| {
            if let Some(fact) = s.jobs.get_mut(&id).and_then(|job| job.known.take()) {
                s.fact(id, fact);
            }
        };
        let answer = answer.map(|rows| {
            if !rows.is_empty() {
                tracing::info!(rows = rows.len(), "publishing what a former owner recorded after us");
                self.parts.outbox.push(rows);
            }
            ids.iter().map(|_| ()).collect()
        });
        self.answered(Station::Relay, ids, answer, known);
    }

    /// Counts and logs a recorded outcome.
    fn tally(&self, id: Id) {
        let Some(job) = self.jobs.get(&id) else { return };
        match job.state.action() {
            Action::CommitDead(doom) => {
                let cause = job.cause(doom, &self.handler_name(job));
                self.buried(job, cause.reason, &cause.error, cause.attempts);
            }
            _ => metrics::count_by(names::HANDLED, "lane", job.ticket.place().lane_name.clone(), 1),
        }
    }

    fn buried(&self, job: &Job, reason: &'static str, error: &str, attempts: u32) {
        metrics::count_by(names::DEAD, "reason", reason, 1);
        let (id, kind, key) = match job.event() {
            Some(event) => (event.id(), event.kind(), event.key()),
            None => ("", "", "".into()),
        };
        let error: String = error.chars().take(200).collect();
        tracing::warn!(id, r#type = kind, %key, reason, attempts, error, "dead-lettered event '{id}': {reason}");
    }

    fn published(&mut self, ids: Vec<Id>, outcomes: Vec<Published>) {
        let (mut failed, mut first) = (Vec::new(), None);
        for (id, outcome) in ids.into_iter().zip(outcomes) {
            match outcome {
                Ok(proof) => {
                    let Some(job) = self.jobs.get_mut(&id) else { continue };
                    job.proof = Some(Proof::Confirmed(proof));
                    if let (Action::Bury, crate::job::Content::Message(message)) = (job.state.action(), &job.content) {
                        let (reason, error) = (message.1.reason(), message.1.to_string());
                        let job = &self.jobs[&id];
                        self.buried(job, reason, &error, 0);
                    }
                    self.fact(id, Fact::Confirmed);
                }
                Err(refused) => {
                    first.get_or_insert(refused);
                    failed.push(id);
                }
            }
        }
        let Some(refused) = first else { return self.rested(Station::Publish) };
        tracing::error!(%refused, events = failed.len(), "retries or dead letters are refused, trying again");
        // Somebody may have deleted the queue under us.
        let subscriptions = self.parts.subscriptions.clone();
        tokio::spawn(async move {
            if let Err(error) = subscriptions.repair().await {
                tracing::error!(%error, "the topology cannot be declared again");
            }
        });
        self.broke(Station::Publish, failed);
    }

    fn answered<T>(
        &mut self,
        station: Station,
        ids: Vec<Id>,
        answer: Result<Vec<T>, StoreError>,
        mut each: impl FnMut(&mut Self, Id, T),
    ) {
        match answer {
            Ok(values) => {
                // A full disk can still be read.
                if station != Station::Look {
                    self.parts.pulse.store_fails.store(false, Ordering::Relaxed);
                }
                self.rested(station);
                ids.into_iter().zip(values).for_each(|(id, value)| each(self, id, value));
            }
            Err(error) => {
                self.store_failed(&error);
                self.broke(station, ids);
            }
        }
    }

    fn store_failed(&self, error: &StoreError) {
        self.parts.pulse.store_fails.store(true, Ordering::Relaxed);
        metrics::count(names::STORE_ERRORS, 1);
        tracing::error!(%error, "the store refuses, trying again: nothing is acked meanwhile");
    }

    fn rested(&mut self, station: Station) {
        let queue = self.station(station);
        (queue.busy, queue.failures) = (false, 0);
    }

    /// The batch is repeated after a pause; the station stays busy until then.
    fn broke(&mut self, station: Station, ids: Vec<Id>) {
        for id in ids.into_iter().rev() {
            if let Some(job) = self.jobs.get(&id) {
                // What is only marked goes on meanwhile.
                if !matches!(job.state, State::Running(_)) {
                    let again = delivery::next(job.state, Fact::Broken, &self.parts.law);
                    debug_assert!(again.is_ok_and(|(state, _)| state == job.state), "a broken action repeats itself");
                }
                self.station(station).waiting.push_front(id);
            }
        }
        let queue = self.station(station);
        queue.failures += 1;
        let pause = Duration::from_millis(50 << queue.failures.min(6));
        let tell = self.tell.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let _ = tell.send(News::Rested(station));
        });
    }

    // ---- handlers

    fn launch(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let (Action::Run(run), Some(event), Some(route)) = (job.state.action(), job.event().cloned(), job.route())
        else {
            return;
        };
        let (route, handler) = &self.parts.routes[route];
        let context = Context { timeout: route.timeout, ..self.parts.context.clone() };
        let call = handler.handle(Call { event, attempt: run.attempt, context });
        let (tell, since) = (self.tell.clone(), Instant::now());
        let task = tokio::spawn(async move {
            let outcome = call.await;
            metrics::observe(names::HANDLER_SECONDS, since.elapsed().as_secs_f64());
            let _ = tell.send(News::Handled(id, outcome));
        });
        job.abort = Some(task.abort_handle());
    }

    fn handled(&mut self, id: Id, outcome: handler::Outcome) {
        fault::point("handled");
        // An interrupt and the answer may cross.
        let Some(job) = self.jobs.get_mut(&id).filter(|job| matches!(job.state, State::Running(_))) else { return };
        let failed = |failure| Fact::Failed { failure, chance: chance() };
        let fact = match outcome {
            handler::Outcome::Done(reply) => {
                job.reply = reply;
                Fact::Succeeded
            }
            handler::Outcome::Retry { error, after } => {
                job.error = error;
                failed(Failure::Transient { after })
            }
            handler::Outcome::Dead { error } => {
                job.error = error;
                failed(Failure::Permanent)
            }
            handler::Outcome::Interrupted => Fact::Interrupted,
        };
        self.fact(id, fact);
        let Some(job) = self.jobs.get(&id) else { return };
        if let (Action::Park { after, .. } | Action::Hold(_, after), Some(event)) = (job.state.action(), job.event()) {
            metrics::count(names::RETRIED, 1);
            let error: String = job.error.chars().take(200).collect();
            tracing::info!(
                id = event.id(),
                r#type = event.kind(),
                error,
                "event '{}' failed, next attempt in {after:.1?}",
                event.id()
            );
        }
    }

    // ---- the law

    fn fact(&mut self, id: Id, fact: Fact) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let route = job.route();
        let law = route.and_then(|r| self.parts.routes.get(r)).map_or(&self.parts.law, |(route, _)| &route.law);
        let was = is_active(job);
        match delivery::next(job.state, fact, law) {
            Ok((state, action)) => {
                job.state = state;
                let is = is_active(job);
                self.active = self.active + usize::from(is) - usize::from(was);
                self.perform(id, action);
            }
            // The job goes back to the broker with its channel; its key goes on.
            Err(illegal) => {
                debug_assert!(false, "{illegal}");
                tracing::error!(%illegal, "a fault in Warren: please report it");
                self.active -= usize::from(was);
                self.remove(id);
            }
        }
    }

    fn perform(&mut self, id: Id, action: Action) {
        match action {
            Action::Look => self.enqueue(Station::Look, id),
            Action::Record => self.mark(id),
            Action::Release => match self.jobs.get(&id).map(|job| job.mark) {
                Some(Mark::Absent) => self.fact(id, Fact::Released),
                // Where the store was asked already, its answer leads on.
                _ => self.unmark(id),
            },
            Action::CommitDone | Action::CommitDead(_) => self.enqueue(Station::Commit, id),
            Action::Park { .. } | Action::Bury => self.enqueue(Station::Publish, id),
            // Its start counts when its turn comes: whoever waits is not to blame for a death before that.
            Action::Run(run) if run.company == Company::Alone => {
                self.alone.push_back(id);
                self.unmark(id);
            }
            Action::Run(_) => self.launch(id),
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

    fn hold(&mut self, id: Id, failed: u32, after: Duration) {
        if self.solo == Some(id) {
            self.solo = None;
        }
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let (store, tell, suspect) = (self.parts.store.clone(), self.tell.clone(), job.suspect());
        let task = tokio::spawn(async move {
            // A note that is lost costs repeated attempts after a crash, not the event.
            if let Some(suspect) = suspect
                && let Err(error) = store.note(suspect, failed).await
            {
                tracing::warn!(%error, "a failed attempt cannot be noted");
            }
            tokio::time::sleep(after).await;
            let _ = tell.send(News::Waited(id));
        });
        job.abort = Some(task.abort_handle());
    }

    fn remove(&mut self, id: Id) -> Option<Job> {
        let job = self.jobs.remove(&id)?;
        if let Some(key) = job.key {
            self.schedule.finish(&key);
        }
        if self.solo == Some(id) {
            self.solo = None;
        }
        Some(job)
    }

    // ---- what to do next

    fn advance(&mut self) {
        self.take();
        self.turn_of_the_suspects();
        for station in STATIONS {
            self.serve(station);
        }
    }

    fn take(&mut self) {
        let backlog = self.stations[&Station::Commit].waiting.len() + self.parts.outbox.pending();
        if self.draining || !self.alone.is_empty() || self.solo.is_some() || backlog > BACKLOG {
            return;
        }
        while self.active < self.parts.concurrency {
            let Some((key, id)) = self.schedule.take() else { return };
            let Some(job) = self.jobs.get_mut(&id) else {
                self.schedule.finish(&key);
                continue;
            };
            job.key = Some(key);
            self.active += 1;
            if job.seen().is_some() {
                self.enqueue(Station::Look, id);
            } else {
                // Nothing can be known of it.
                self.looked(id, None);
            }
        }
    }

    /// A suspect runs when nothing else does, nothing handled is unrecorded and no other's start is counted: a crash
    /// then has one possible cause.
    fn turn_of_the_suspects(&mut self) {
        let unrecorded = |s: &Queue| s.busy || !s.waiting.is_empty();
        let before = [Station::Commit, Station::Publish, Station::Start, Station::Unstart];
        let busy = before.iter().any(|s| unrecorded(&self.stations[s]));
        if self.solo.is_none()
            && self.active == self.alone.len()
            && !busy
            && let Some(id) = self.alone.pop_front()
        {
            self.solo = Some(id);
            self.mark(id);
        }
    }

    /// Has the store count a start.
    fn mark(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.mark = Mark::Coming;
        self.enqueue(Station::Start, id);
    }

    fn enqueue(&mut self, station: Station, id: Id) {
        self.station(station).waiting.push_back(id);
    }

    fn station(&mut self, station: Station) -> &mut Queue {
        self.stations.entry(station).or_default()
    }

    fn quiet(&self) -> bool {
        self.stations.values().all(|queue| queue.waiting.is_empty())
    }

    /// Starts the station's next batch, if none is under way.
    fn serve(&mut self, station: Station) {
        let queue = self.station(station);
        if queue.busy || queue.waiting.is_empty() {
            return;
        }
        let count = queue.waiting.len().min(BATCH);
        let mut ids: Vec<Id> = queue.waiting.drain(..count).collect();
        ids.retain(|id| self.jobs.contains_key(id));
        // A delivery whose channel ended comes again: neither looked up nor copied. Outcomes are recorded all the same.
        if matches!(station, Station::Look | Station::Start | Station::Publish) {
            let gone = |id: &Id| self.jobs.get(id).is_none_or(|job| !job.ticket.is_live());
            let (dead, live): (Vec<Id>, Vec<Id>) = ids.into_iter().partition(gone);
            ids = live;
            dead.into_iter().for_each(|id| self.gone(id));
        }
        if ids.is_empty() {
            return;
        }
        self.station(station).busy = true;
        let (store, tell) = (self.parts.store.clone(), self.tell.clone());
        match station {
            Station::Look => {
                let asked: Vec<Seen> = ids.iter().filter_map(|id| self.jobs.get(id)?.seen()).collect();
                tokio::spawn(async move {
                    let answer = store.look(asked).await;
                    let _ = tell.send(News::Looked(ids, answer));
                });
            }
            Station::Start => {
                let events = self.suspects(&ids);
                tokio::spawn(async move {
                    let answer = store.start(events).await;
                    let _ = tell.send(News::Started(ids, answer));
                });
            }
            Station::Unstart => {
                let events = self.suspects(&ids);
                tokio::spawn(async move {
                    let answer = store.unstart(events).await;
                    let _ = tell.send(News::Unstarted(ids, answer));
                });
            }
            Station::Commit => {
                let names: Vec<String> =
                    ids.iter().map(|id| self.jobs.get(id).map(|j| self.handler_name(j)).unwrap_or_default()).collect();
                let Self { jobs, parts, .. } = self;
                let effect = |(id, name): (&Id, &String)| jobs.get_mut(id)?.effect(&parts.house, name);
                let effects: Arc<Vec<Effect>> = Arc::new(ids.iter().zip(&names).filter_map(effect).collect());
                fault::point("before-commit");
                tokio::spawn(async move {
                    let since = Instant::now();
                    let answer = store.commit(effects.clone()).await;
                    let _ = tell.send(News::Committed(ids, effects, since, answer));
                });
            }
            Station::Relay => {
                let mut partitions: BTreeMap<String, Vec<Id>> = BTreeMap::new();
                for id in ids {
                    if let Some(job) = self.jobs.get(&id) {
                        partitions.entry(job.ticket.place().queue.clone()).or_default().push(id);
                    }
                }
                tokio::spawn(async move {
                    // One answer each: rows that are ours now must reach the outbox, whatever becomes of the others.
                    for (partition, ids) in partitions {
                        let rows = store.adopt(Left::In(partition)).await;
                        let _ = tell.send(News::Relayed(ids, rows));
                    }
                });
            }
            Station::Publish => {
                let now = now_ms();
                let copy = |id: &Id| self.jobs.get(id)?.copy(&self.parts.house, now);
                let copies: Vec<Message> = ids.iter().filter_map(copy).collect();
                let publisher = self.parts.publisher.clone();
                tokio::spawn(async move {
                    let outcomes = publisher.publish_all(copies).await;
                    let _ = tell.send(News::Published(ids, outcomes));
                });
            }
        }
    }

    fn gone(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        // What was to be counted is not.
        job.mark = if job.mark == Mark::Coming { Mark::Absent } else { job.mark };
        let fact = if matches!(job.state, State::Running(_)) { Fact::Interrupted } else { Fact::Gone };
        self.fact(id, fact);
    }

    fn suspects(&self, ids: &[Id]) -> Vec<Identity> {
        ids.iter().filter_map(|id| self.jobs.get(id)?.suspect()).collect()
    }

    fn handler_name(&self, job: &Job) -> String {
        let route = job.route().and_then(|route| self.parts.routes.get(route));
        route.map(|(route, _)| route.on.to_string()).unwrap_or_default()
    }

    // ---- the end

    fn drain(&mut self, tell: oneshot::Sender<()>) {
        self.draining = true;
        self.drained = Some(tell);
        self.epochs.clear();
        for id in self.schedule.discard(|_| true) {
            self.jobs.remove(&id);
        }
        self.leave_holds(|_| true, Fact::Interrupted);
        for id in std::mem::take(&mut self.alone) {
            self.fact(id, Fact::Interrupted);
        }
    }

    fn interrupt(&mut self) {
        let running = |job: &Job| matches!(job.state, State::Running(_));
        let ids: Vec<Id> = self.jobs.iter().filter(|(_, job)| running(job)).map(|(id, _)| *id).collect();
        self.alone.clear();
        if !ids.is_empty() {
            tracing::warn!(events = ids.len(), "the drain is over: handlers are interrupted, their events come again");
        }
        for id in ids {
            if let Some(abort) = self.jobs.get_mut(&id).and_then(|job| job.abort.take()) {
                abort.abort();
            }
            self.fact(id, Fact::Interrupted);
        }
    }

    fn gauge(&self) {
        self.parts.pulse.turned.store(now_ms(), Ordering::Relaxed);
        metrics::set(names::RUNNING, self.active);
        metrics::set(names::WAITING, self.schedule.waiting());
        metrics::set(names::OUTBOX, self.parts.outbox.pending());
        metrics::set(names::CONSUMING, self.parts.subscriptions.consuming());
        if let Some(oldest) = self.jobs.values().map(Job::age).max().filter(|age| *age > Duration::from_secs(60)) {
            tracing::debug!(?oldest, jobs = self.jobs.len(), "the oldest delivery here");
        }
    }
}

/// Whether a job holds one of the places for handlers.
fn is_active(job: &Job) -> bool {
    job.key.is_some() && matches!(job.state, State::Received | State::Suspected { .. } | State::Running(_))
}

fn hash(key: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Jitter, 0..1.
fn chance() -> f64 {
    let random = uuid::Uuid::new_v4().as_u128() as u32;
    f64::from(random) / f64::from(u32::MAX)
}
