//! Where work for the store and the broker gathers, and what their answers mean.
//!
//! A station has one batch under way; what comes meanwhile makes the next. A batch that fails is repeated after a pause. Copies for
//! the broker are settled one by one, so several batches of them may be under way.
use super::{COPIES, Id, News, Pipeline, QUIET};
use crate::consumer::Proof;
use crate::dead::Letter;
use crate::fault;
use crate::job::{Content, Job, Mark};
use crate::metrics::{self, names};
use crate::store::{Committed, Effect, Left, Recorded, Row, Seen, StoreError};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use uuid::Uuid;
use warren_publisher::publish::Outcome as Published;
use warren_publisher::{Publisher, Refused};
use warren_shared::delivery::{self, Action, Fact, State};
use warren_shared::{Event, Identity, Message};

/// Where work gathers for a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Station {
    Look,
    Load,
    Start,
    Unstart,
    Commit,
    Relay,
    Publish,
}

pub(super) const STATIONS: [Station; 7] =
    [Station::Look, Station::Load, Station::Start, Station::Unstart, Station::Commit, Station::Relay, Station::Publish];
/// A transaction, a read or a chunk of publishes holds so many events at most.
pub(super) const BATCH: usize = 256;

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) waiting: VecDeque<Id>,
    pub(super) busy: bool,
    failures: u32,
    /// How many the next batch holds at most: half of one that failed, so that whoever is at fault ends up alone in one;
    /// twice one that went well.
    most: usize,
}

impl Default for Queue {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), busy: false, failures: 0, most: BATCH }
    }
}

impl Pipeline {
    pub(super) fn looked(&mut self, id: Id, known: Option<Committed>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(proof) = known else {
            // It may have lost its right to begin while the store was asked.
            return if job.ticket.may_begin() { self.ready.push_back(id) } else { self.fact(id, Fact::Gone) };
        };
        job.proof = Some(Proof::Committed(proof));
        self.duplicate(id);
        self.known(id, Fact::Known);
    }

    /// Gives the places for handlers to those that wait for one; not beside a suspect, and not in a drain, as they have
    /// not begun.
    pub(super) fn admit_ready(&mut self) {
        if self.draining {
            std::mem::take(&mut self.ready).into_iter().for_each(|id| self.fact(id, Fact::Gone));
        }
        while self.active < self.parts.concurrency
            && self.alone.is_empty()
            && self.solo.is_none()
            && let Some(id) = self.ready.pop_front()
        {
            self.unknown(id);
        }
    }

    /// The store knows nothing of it, and there is a place for it.
    fn unknown(&mut self, id: Id) {
        let Some(job) = self.jobs.get(&id) else { return };
        let attempt = job.attempt();
        let fact = if !job.ticket.may_begin() {
            Fact::Gone
        } else if job.hops > self.parts.house.hop_limit {
            Fact::Looped
        } else if job.route().is_none() {
            let elsewhere = job.event().is_some_and(|event| self.parts.peers.take(event.kind()));
            if elsewhere { Fact::RoutedElsewhere } else { Fact::Unrouted }
        } else if job.redelivered {
            Fact::Redelivered { attempt }
        } else {
            Fact::Fresh { attempt }
        };
        self.fact(id, fact);
    }

    pub(super) fn committed(
        &mut self,
        ids: Vec<Id>,
        effects: Arc<Vec<Effect>>,
        since: Instant,
        answer: Result<Vec<Recorded>, StoreError>,
    ) {
        fault::point("after-commit");
        self.meters.commit_seconds.record(since.elapsed().as_secs_f64());
        self.meters.commit_events.record(ids.len() as f64);
        let effects = Arc::try_unwrap(effects).unwrap_or_else(|shared| (*shared).clone());
        let mut relay = Vec::new();
        let ended = |(recorded, effect): (Recorded, Effect)| ended(recorded, &effect.partition, effect.out, &mut relay);
        let answer = answer.map(|all| all.into_iter().zip(effects).map(ended).collect());
        self.relay(relay);
        match answer {
            Err(StoreError::Refused(why)) => self.refused(ids, why),
            answer => self.answered(Station::Commit, ids, answer, Self::settle),
        }
    }

    /// The store works, and cannot hold one of these effects at least. Alone in a batch, it is the one.
    fn refused(&mut self, ids: Vec<Id>, why: String) {
        let [id] = ids[..] else {
            // Again in halves, at once.
            let queue = self.station_mut(Station::Commit);
            (queue.busy, queue.most) = (false, (ids.len() / 2).max(1));
            return ids.into_iter().rev().for_each(|id| queue.waiting.push_front(id));
        };
        match self.jobs.get_mut(&id) {
            Some(job) if matches!(job.state, State::Succeeded(_)) => {
                job.error = why;
                self.rested(Station::Commit);
                self.fact(id, Fact::Refused);
            }
            // It gives way to the others.
            _ => {
                tracing::error!(why, "a dead letter cannot be recorded, trying again: the other events go on");
                self.enqueue(Station::Commit, id);
                self.rest(Station::Commit);
            }
        }
    }

    /// The handler's transaction recorded it.
    pub(super) fn recorded(&mut self, id: Id, recorded: Recorded, out: Vec<Message>) {
        fault::point("after-commit");
        let Some(job) = self.jobs.get(&id) else { return };
        let mut relay = Vec::new();
        let ended = ended(recorded, &job.ticket.place().queue, out, &mut relay);
        self.relay(relay);
        self.settle(id, ended);
    }

    /// Before any ack: a hand-over that sees the last one waits for these rows.
    fn relay(&self, rows: Vec<Row>) {
        if !rows.is_empty() {
            self.parts.outbox.push(rows);
        }
    }

    fn settle(&mut self, id: Id, (proof, fact): (Option<Committed>, Fact)) {
        if let Some(job) = self.jobs.get_mut(&id) {
            job.proof = proof.map(Proof::Committed);
            job.kept = None;
        }
        match fact {
            Fact::Committed => {
                self.tally(id);
                self.fact(id, fact);
            }
            Fact::Superseded => {
                self.duplicate(id);
                self.known(id, fact);
            }
            _ => self.fact(id, fact),
        }
    }

    fn duplicate(&self, id: Id) {
        if let Some(job) = self.jobs.get(&id) {
            self.meters.of(job.ticket.place().lane, job.route()).duplicates.increment(1);
        }
    }

    /// An outcome was there first. Where a worker that lost this partition recorded it after we took over, it may not
    /// have published what the event sent: that goes out before the key goes on. The broker need not call such an event
    /// redelivered: 4.3 does not, where it gave up the other's node.
    pub(super) fn known(&mut self, id: Id, fact: Fact) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if self.parts.owned {
            job.known = Some(fact);
            self.enqueue(Station::Relay, id);
        } else {
            self.fact(id, fact);
        }
    }

    pub(super) fn relayed(&mut self, ids: Vec<Id>, answer: Result<Vec<Row>, StoreError>) {
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

    /// Counts a recorded outcome; logs a death.
    pub(super) fn tally(&self, id: Id) {
        let Some(job) = self.jobs.get(&id) else { return };
        let lane = job.ticket.place().lane;
        if let Some(lag) = job.lag() {
            self.meters.lane(lane).end_to_end.record(lag);
        }
        match job.state.action() {
            Action::CommitDead(doom) => {
                let cause = job.cause(doom, self.handler_name(job));
                self.buried(job, cause.reason, &cause.error, cause.attempts);
            }
            _ => {
                let meters = self.meters.of(lane, job.route());
                meters.handled.increment(1);
                if job.reply.filtered {
                    meters.filtered.increment(1);
                }
            }
        }
    }

    pub(super) fn buried(&self, job: &Job, reason: &'static str, error: &str, attempts: u32) {
        self.meters.dead(job.ticket.place().lane, job.route(), reason);
        let seen;
        let (id, kind, key) = match &job.content {
            Content::Event { event, .. } => (event.id(), event.kind(), event.key()),
            // What could not be read may still tell who it is.
            Content::Message(message) => {
                seen = Letter::of(&message.0);
                (seen.id.as_str(), seen.kind.as_str(), seen.key.as_str().into())
            }
        };
        let error: String = error.chars().take(200).collect();
        let (partition, trace_id) = (&*job.ticket.place().queue, job.event().and_then(Event::trace_id));
        tracing::warn!(
            id,
            r#type = kind,
            %key,
            partition,
            reason,
            attempts,
            trace_id,
            error,
            "dead-lettered event '{id}': {reason}"
        );
    }

    pub(super) fn published(&mut self, outcomes: Vec<(Id, Published)>) {
        self.publishing -= outcomes.len();
        let (mut failed, mut first) = (BTreeMap::<Duration, Vec<Id>>::new(), None);
        for (id, outcome) in outcomes {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            match outcome {
                Ok(proof) => {
                    job.proof = Some(Proof::Confirmed(proof));
                    if let (Action::Bury, Content::Message(message)) = (job.state.action(), &job.content) {
                        let (reason, error) = (message.1.reason(), message.1.to_string());
                        let job = &self.jobs[&id];
                        self.buried(job, reason, &error, 0);
                    }
                    self.fact(id, Fact::Confirmed);
                }
                Err(refused) => {
                    let passes = refused.is_passing();
                    if !passes && matches!(job.state, State::Parking { .. }) {
                        job.error = format!("it cannot wait for its next attempt: {refused}");
                        self.fact(id, Fact::Refused);
                        continue;
                    }
                    if !passes {
                        job.leave_body_out();
                    }
                    job.refusals += 1;
                    failed.entry(Duration::from_millis(50 << job.refusals.min(6))).or_default().push(id);
                    first.get_or_insert(refused);
                }
            }
        }
        // Each waits for itself: a queue that refuses keeps no other's copies back.
        for (pause, ids) in failed {
            let tell = self.tell.clone();
            tokio::spawn(async move {
                tokio::time::sleep(pause).await;
                let _ = tell.send(News::Again(ids));
            });
        }
        let Some(refused) = first.filter(|_| self.said.is_none_or(|at| at.elapsed() > QUIET)) else { return };
        self.said = Some(Instant::now());
        tracing::error!(%refused, "retries or dead letters are refused, trying again");
        // Somebody may have deleted the queue under us.
        self.parts.subscriptions.repair_soon();
    }

    pub(super) fn answered<T>(
        &mut self,
        station: Station,
        ids: Vec<Id>,
        answer: Result<Vec<T>, StoreError>,
        mut each: impl FnMut(&mut Self, Id, T),
    ) {
        match answer {
            Ok(values) => {
                // A full disk can still be read.
                if !matches!(station, Station::Look | Station::Load) {
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

    pub(super) fn store_failed(&self, error: &StoreError) {
        self.parts.pulse.store_fails.store(true, Ordering::Relaxed);
        metrics::count(names::STORE_ERRORS, 1);
        tracing::error!(%error, "the store refuses, trying again: nothing is acked meanwhile");
    }

    pub(super) fn rested(&mut self, station: Station) {
        let queue = self.station_mut(station);
        (queue.busy, queue.failures, queue.most) = (false, 0, (2 * queue.most).min(BATCH));
    }

    /// The batch is repeated after a pause; the station stays busy until then.
    pub(super) fn broke(&mut self, station: Station, ids: Vec<Id>) {
        let most = (ids.len() / 2).max(1);
        for id in ids.into_iter().rev() {
            if let Some(job) = self.jobs.get(&id) {
                // What is only marked goes on meanwhile.
                if !matches!(job.state, State::Running(_)) {
                    let again = delivery::next(job.state, Fact::Broken, &self.parts.law);
                    debug_assert!(again.is_ok_and(|(state, _)| state == job.state), "a broken action repeats itself");
                }
                self.station_mut(station).waiting.push_front(id);
            }
        }
        self.station_mut(station).most = most;
        self.rest(station);
    }

    /// The station does nothing for a while, longer each time until a batch goes well.
    fn rest(&mut self, station: Station) {
        let queue = self.station_mut(station);
        queue.failures += 1;
        let pause = Duration::from_millis(50 << queue.failures.min(6));
        let tell = self.tell.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let _ = tell.send(News::Rested(station));
        });
    }

    pub(super) fn enqueue(&mut self, station: Station, id: Id) {
        self.station_mut(station).waiting.push_back(id);
    }

    pub(super) fn station(&self, station: Station) -> &Queue {
        &self.stations[station as usize]
    }

    pub(super) fn station_mut(&mut self, station: Station) -> &mut Queue {
        &mut self.stations[station as usize]
    }

    pub(super) fn quiet(&self) -> bool {
        self.stations.iter().all(|queue| queue.waiting.is_empty())
    }

    /// Starts the station's next batch, if none is under way.
    pub(super) fn serve(&mut self, station: Station) {
        let queue = self.station_mut(station);
        if queue.busy || queue.waiting.is_empty() || station == Station::Publish && self.publishing >= COPIES {
            return;
        }
        let queue = self.station_mut(station);
        let count = queue.waiting.len().min(queue.most);
        let mut ids: Vec<Id> = queue.waiting.drain(..count).collect();
        ids.retain(|id| self.jobs.contains_key(id));
        // A delivery whose channel ended comes again: neither looked up nor copied. Outcomes are recorded all the same.
        if matches!(station, Station::Look | Station::Start | Station::Publish) {
            let keeps = |job: &Job| match station {
                Station::Look => job.ticket.may_begin(),
                _ => job.ticket.is_live(),
            };
            let gone = |id: &Id| self.jobs.get(id).is_none_or(|job| !keeps(job));
            let (dead, live): (Vec<Id>, Vec<Id>) = ids.into_iter().partition(gone);
            ids = live;
            dead.into_iter().for_each(|id| self.gone(id));
        }
        if ids.is_empty() {
            return;
        }
        self.station_mut(station).busy = station != Station::Publish;
        let store = self.parts.store.clone();
        match station {
            Station::Look => {
                self.pace = 0;
                let asked: Vec<Seen> = ids.iter().filter_map(|id| self.jobs.get(id)?.seen()).collect();
                self.ask(async move { News::Looked(ids, store.look(asked).await) });
            }
            Station::Load => {
                let wanted = |id: &Id| self.jobs.get(id)?.needs;
                let states: Vec<Uuid> = ids.iter().filter_map(wanted).collect();
                self.ask(async move { News::Loaded(ids, store.load(states).await) });
            }
            Station::Start => {
                let events = ids.iter().filter_map(|id| self.begins(id)).collect();
                self.ask(async move { News::Started(ids, store.start(events).await) });
            }
            Station::Unstart => {
                let events = self.suspects(&ids);
                self.ask(async move { News::Unstarted(ids, store.unstart(events).await) });
            }
            Station::Commit => {
                let effect = |id: &Id| {
                    let job = self.jobs.get(id)?;
                    job.effect(&self.parts.house, || self.handler_name(job))
                };
                let effects: Arc<Vec<Effect>> = Arc::new(ids.iter().filter_map(effect).collect());
                fault::point("before-commit");
                let since = Instant::now();
                self.ask(async move {
                    let answer = store.commit(effects.clone()).await;
                    News::Committed(ids, effects, since, answer)
                });
            }
            Station::Relay => {
                let mut partitions: BTreeMap<Arc<str>, Vec<Id>> = BTreeMap::new();
                for id in ids {
                    if let Some(job) = self.jobs.get(&id) {
                        partitions.entry(job.ticket.place().queue.clone()).or_default().push(id);
                    }
                }
                // One answer each: rows that are ours now must reach the outbox, whatever becomes of the others.
                for (partition, ids) in partitions {
                    let store = store.clone();
                    self.ask(async move { News::Relayed(ids, store.adopt(Left::In(partition)).await) });
                }
            }
            Station::Publish => {
                let copy = |id: Id| Some((id, self.jobs.get(&id)?.copy(&self.parts.house)?));
                let (ids, copies): (Vec<Id>, Vec<Message>) = ids.into_iter().filter_map(copy).unzip();
                self.publishing += ids.len();
                let unread = |(n, id): (usize, &Id)| Some((n, self.jobs.get(id)?.unread(&self.parts.house)?));
                let answers: Vec<(usize, Message)> = ids.iter().enumerate().filter_map(unread).collect();
                let (publisher, tell) = (self.parts.publisher.clone(), self.tell.clone());
                tokio::spawn(async move {
                    let mut refused = answer(&publisher, answers).await;
                    let mut outcomes = publisher.submit(copies).await;
                    while let Some(known) = outcomes.next().await {
                        let outcome = |(place, outcome)| (ids[place], refused.remove(&place).map_or(outcome, Err));
                        let known = known.into_iter().map(outcome).collect();
                        let _ = tell.send(News::Published(known));
                    }
                });
            }
        }
    }

    fn ask(&self, question: impl Future<Output = News> + Send + 'static) {
        self.asked.push(Box::pin(question));
    }

    pub(super) fn gone(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        // What was to be counted is not.
        job.mark = if job.mark == Mark::Coming { Mark::Absent } else { job.mark };
        self.fact(id, Fact::Gone);
    }

    pub(super) fn suspects(&self, ids: &[Id]) -> Vec<Identity> {
        ids.iter().filter_map(|id| self.jobs.get(id)?.suspect()).collect()
    }

    pub(super) fn handler_name(&self, job: &Job) -> String {
        let route = job.route().and_then(|route| self.parts.routes.get(route));
        route.map(|route| route.on.to_string()).unwrap_or_default()
    }
}

/// Answers processes; returns which answers the broker did not take now: what they answer must not be acked. What it never takes
/// holds up nothing: the process calls a person.
async fn answer(publisher: &Publisher, answers: Vec<(usize, Message)>) -> BTreeMap<usize, Refused> {
    if answers.is_empty() {
        return BTreeMap::new();
    }
    let (places, messages): (Vec<usize>, Vec<Message>) = answers.into_iter().unzip();
    let outcomes = publisher.publish_all(messages).await;
    let refused = |(n, outcome): (usize, Published)| match outcome {
        Err(refused @ (Refused::Rejected | Refused::Unknown)) => Some((n, refused)),
        Ok(_) | Err(_) => None,
    };
    places.into_iter().zip(outcomes).filter_map(refused).collect()
}

/// What a record means for its event; the rows of the outbox that it made are added to those to relay.
fn ended(
    recorded: Recorded,
    partition: &Arc<str>,
    out: Vec<Message>,
    relay: &mut Vec<Row>,
) -> (Option<Committed>, Fact) {
    match recorded {
        Recorded::Fresh(proof, ids) => {
            let row = |(id, message)| Row { id, partition: partition.clone(), message };
            relay.extend(ids.into_iter().zip(out).map(row));
            (Some(proof), Fact::Committed)
        }
        Recorded::Recovered(proof, mut rows) => {
            relay.append(&mut rows);
            (Some(proof), Fact::Committed)
        }
        Recorded::Superseded(proof) => (Some(proof), Fact::Superseded),
        Recorded::Outdated => (None, Fact::Outdated),
    }
}
