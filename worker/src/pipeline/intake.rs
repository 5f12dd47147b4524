//! Deliveries on their way in: adoption before the first, then a job each, then the schedule.
use super::{Id, News, Pipeline, millis};
use crate::consumer::Arrival;
use crate::fault;
use crate::job::Job;
use crate::metrics::{self, names};
use crate::store::{Left, Row, StoreError};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::{Duration, Instant};
use warren_shared::delivery::Fact;
use warren_shared::retry::DUE;
use warren_shared::topology::QueueType;
use warren_shared::wire::{Identified, LANE};

/// What clients set where nobody chose a priority: nothing or 0 (Spring), 4 (JMS).
const USUAL: [u8; 2] = [0, 4];

impl Pipeline {
    pub(super) fn arrived(&mut self, arrivals: Vec<Arrival>) {
        let Some(first) = arrivals.first() else { return };
        let epoch = first.ticket.epoch();
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
                tracing::info!(
                    partition = &*partition,
                    "first delivery from {partition}: this worker is its active consumer"
                );
                self.epochs.insert(epoch, Some(arrivals));
                self.adopt(epoch, partition, Duration::ZERO);
            }
        }
    }

    pub(super) fn adopt(&self, epoch: u64, partition: Arc<str>, pause: Duration) {
        let (store, tell) = (self.parts.store.clone(), self.tell.clone());
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let adopted = async {
                // A store that can only be read holds nobody up: at worst one death more is needed to condemn an event.
                let unowned = |error: StoreError| {
                    tracing::warn!(%error, partition = &*partition, "the store does not take it that the partition is ours");
                    None
                };
                let before = store.own(partition.clone()).await.unwrap_or_else(unowned);
                Ok((before, store.adopt(Left::In(partition.clone())).await?))
            };
            let _ = tell.send(News::Adopted(epoch, adopted.await));
        });
    }

    pub(super) fn adopted(&mut self, epoch: u64, adopted: Result<(Option<Arc<str>>, Vec<Row>), StoreError>) {
        match adopted {
            Ok((before, rows)) => {
                if !rows.is_empty() {
                    tracing::info!(rows = rows.len(), "publishing what the partition's last owner left");
                    // They are ours even if the epoch has ended meanwhile: nobody else would publish them.
                    self.parts.outbox.push(rows);
                }
                let Some(waiting) = self.epochs.get_mut(&epoch) else { return };
                self.before.extend(before.map(|before| (epoch, before)));
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

    pub(super) fn admit(&mut self, arrivals: Vec<Arrival>) {
        let since = Instant::now();
        let monotonic = millis(since.duration_since(self.started));
        for Arrival { ticket, redelivered, content, born } in arrivals {
            fault::point("received");
            let id = self.next;
            self.next += 1;
            let incoming = match content {
                Err(message) => {
                    self.meters.of(ticket.place().lane, None).received.increment(1);
                    self.jobs.insert(id, Job::of_message(ticket, redelivered, message, since));
                    self.fact(id, Fact::Unreadable);
                    continue;
                }
                Ok(incoming) => incoming,
            };
            if incoming.identified == Identified::OnArrival {
                self.anonymous(&incoming);
            }
            if !USUAL.contains(&incoming.priority) {
                self.prioritised(&incoming);
            }
            let route = self.parts.routes.of(&incoming.event);
            let (lane, priority, attempt, remaining) =
                (ticket.place().lane, incoming.priority, incoming.attempt, incoming.left);
            self.meters.of(lane, route).received.increment(1);
            let job = Job { born, ..Job::of_event(ticket, redelivered, incoming, route, since) };
            let key = self.hasher.hash_one(job.turn());
            self.jobs.insert(id, job);
            if remaining > DUE {
                self.fact(id, Fact::Early { remaining, attempt });
            } else {
                self.schedule.push(key, lane, priority, monotonic, id);
            }
        }
    }

    /// On an ordered quorum queue an AMQP priority is a way past the key's other events.
    fn prioritised(&mut self, incoming: &warren_shared::Incoming) {
        let is_ordered = self.parts.owned && self.parts.house.topology.queue_type == QueueType::Quorum;
        if is_ordered && !std::mem::replace(&mut self.warned_priority, true) {
            tracing::warn!(
                r#type = incoming.event.kind(),
                source = incoming.event.source(),
                priority = incoming.priority,
                "an event came with the AMQP priority {}: RabbitMQ 4 lets it overtake events of its own key; have its publisher \
                 set no priority but the header {LANE} (said once)",
                incoming.priority
            );
        }
    }

    pub(super) fn anonymous(&mut self, incoming: &warren_shared::Incoming) {
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

    /// The partition is handed over: what has not begun is given back, what runs goes on to its end.
    pub(super) fn leaving(&mut self, epoch: u64) {
        self.give_back(epoch, Fact::Interrupted);
    }

    pub(super) fn ended(&mut self, epoch: u64) {
        self.give_back(epoch, Fact::Gone);
        // The next owner must not take a run for a death of this process: it is no longer counted.
        let running: Vec<Id> = self.jobs.keys().filter(|id| self.is_of(id, epoch)).copied().collect();
        running.into_iter().for_each(|id| self.unmark(id));
    }

    /// Lets go of an epoch's deliveries that have not begun, or wait in place.
    fn give_back(&mut self, epoch: u64, why: Fact) {
        self.epochs.remove(&epoch);
        self.before.remove(&epoch);
        let Self { schedule, jobs, places, tide, .. } = self;
        let mut drop = |jobs: &mut FxHashMap<Id, Job>, id| jobs.remove(&id).iter().for_each(|job| tide.left(job.since));
        for id in schedule.discard(|id| jobs.get(id).is_none_or(|job| job.ticket.epoch() == epoch)) {
            drop(jobs, id);
        }
        for (key, id) in places.discard(|id| jobs.get(&id).is_none_or(|job| job.ticket.epoch() == epoch)) {
            drop(jobs, id);
            schedule.finish(&key);
        }
        self.leave_holds(|job| job.ticket.epoch() == epoch, why);
        let (ready, staying) = std::mem::take(&mut self.ready).into_iter().partition(|id| self.is_of(id, epoch));
        self.ready = staying;
        VecDeque::into_iter(ready).for_each(|id| self.fact(id, Fact::Gone));
        let (alone, staying) = std::mem::take(&mut self.alone).into_iter().partition(|id| self.is_of(id, epoch));
        self.alone = staying;
        VecDeque::into_iter(alone).for_each(|id| self.fact(id, Fact::Gone));
    }

    fn is_of(&self, id: &Id, epoch: u64) -> bool {
        self.jobs.get(id).is_some_and(|job| job.ticket.epoch() == epoch)
    }
}
