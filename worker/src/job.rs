//! A delivery on its way through the worker: what it is, and what its outcome writes.
use crate::consumer::{Proof, Ticket};
use crate::handler::Reply;
use crate::store::{Effect, Entry, Kept, Other, Outcome, Recorded, Seen};
use std::borrow::Cow;
use std::time::{Duration, Instant};
use uuid::Uuid;
use warren_shared::dead::{self, Cause, Scene};
use warren_shared::delivery::{Action, Doom, Fact, State};
use warren_shared::json::Json;
use warren_shared::process::wire::{self, Failed};
use warren_shared::retry::Step;
use warren_shared::seal::SEAL;
use warren_shared::topology::{BUS, Topology};
use warren_shared::wire::{ATTEMPT, HOPS, Identified, LANE, LEFT, REPLAYED, UNTOUCHED};
use warren_shared::{Event, Identity, Incoming, Limits, Message, Unreadable};

/// What a delivery holds.
#[derive(Debug)]
pub(crate) enum Content {
    /// An event.
    Event {
        event: Event,
        identity: Identity,
        identified: Identified,
        attempt: u32,
        replayed: u32,
        /// The route that takes it.
        route: Option<usize>,
    },
    /// No event.
    Message(Box<(Message, Unreadable)>),
}

/// A delivery and where it stands.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) ticket: Ticket,
    pub(crate) redelivered: bool,
    pub(crate) content: Content,
    pub(crate) state: State,
    /// Whether the store counts its start.
    pub(crate) mark: Mark,
    /// Whether the store was told of an attempt that failed in place.
    pub(crate) noted: bool,
    /// What is known of it, and waits until what another worker left is relayed.
    pub(crate) known: Option<Fact>,
    /// The hash of its key, where the schedule handed it out.
    pub(crate) key: Option<u64>,
    /// How urgent it is in its lane.
    pub(crate) priority: u8,
    /// Who may have died with it, when that was asked first.
    pub(crate) accusation: Option<Accusation>,
    /// What the handler returned.
    pub(crate) reply: Reply,
    /// The state that its handler waits for.
    pub(crate) needs: Option<Uuid>,
    /// The state that its handler was given.
    pub(crate) kept: Option<(Uuid, Option<Kept>)>,
    /// What its handler's transaction recorded, and what the rows of that send.
    pub(crate) recorded: Option<(Recorded, Vec<Message>)>,
    /// What the handler complained about last.
    pub(crate) error: String,
    /// Bytes of what its handler returned.
    pub(crate) weight: usize,
    /// How often the broker refused its copy.
    pub(crate) refusals: u32,
    /// Whether its handler's last answer could not be understood.
    pub(crate) unclear: bool,
    /// Whether none of its attempts can have done anything.
    pub(crate) untouched: bool,
    /// How many events caused one another until it.
    pub(crate) hops: u32,
    /// Why it may be acked.
    pub(crate) proof: Option<Proof>,
    /// Ends the handler, or the wait in place.
    pub(crate) abort: Option<tokio::task::AbortHandle>,
    pub(crate) since: Instant,
    /// When its event happened, in milliseconds since 1970.
    pub(crate) born: Option<i64>,
}

/// Who may have died with an event, and when that was told.
#[derive(Debug)]
pub(crate) struct Accusation {
    /// Beats of this worker until then.
    pub(crate) beats: u64,
    pub(crate) others: Vec<Other>,
}

impl Accusation {
    /// How many of those that are named now may have died, and whether all of them did: who beat since lives, and who did not
    /// after so long is dead.
    pub(crate) fn judge(&self, now: &[Other], long: bool) -> (usize, bool) {
        let lives = |other: &&Other| self.known(other).is_some_and(|known| other.seen > known.seen);
        let met = now.iter().filter(|other| !lives(other)).count();
        (met, long && self.names(now))
    }

    /// Whether all of these were named.
    pub(crate) fn names(&self, now: &[Other]) -> bool {
        now.iter().all(|other| self.known(other).is_some())
    }

    fn known(&self, other: &Other) -> Option<&Other> {
        self.others.iter().find(|known| known.run == other.run)
    }
}

/// What is handled one after the other.
#[derive(Debug, Hash)]
pub(crate) enum Turn<'a> {
    /// Events of a key.
    Key(Cow<'a, str>),
    /// Events that cannot be told apart.
    Alike(Identity),
}

/// Where a job stands towards the places for handlers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Taken from the schedule, without a place yet.
    Ahead,
    /// It holds one.
    Active,
    /// Before or after all that.
    Elsewhere,
}

/// Whether the store counts a start of a delivery: while it does, a death of the process is laid at its door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// It does not.
    Absent,
    /// It was asked to.
    Coming,
    /// It does.
    Present,
    /// It was asked to take it back.
    Going,
}

/// What all jobs of a worker share.
#[derive(Debug)]
pub(crate) struct House {
    pub(crate) topology: Topology,
    pub(crate) worker: String,
    pub(crate) limits: Limits,
    /// So many events may cause one another.
    pub(crate) hop_limit: u32,
}

impl Job {
    pub(crate) fn of_event(
        ticket: Ticket,
        redelivered: bool,
        incoming: Incoming,
        route: Option<usize>,
        since: Instant,
    ) -> Self {
        let Incoming { event, identity, identified, attempt, replayed, priority, hops, untouched, .. } = incoming;
        let content = Content::Event { event, identity, identified, attempt, replayed, route };
        // One that is delivered again may have run, and died with its process.
        let untouched = untouched && !redelivered;
        Self { priority, hops, untouched, ..Self::new(ticket, redelivered, content, since) }
    }

    pub(crate) fn of_message(
        ticket: Ticket,
        redelivered: bool,
        message: Box<(Message, Unreadable)>,
        since: Instant,
    ) -> Self {
        Self::new(ticket, redelivered, Content::Message(message), since)
    }

    fn new(ticket: Ticket, redelivered: bool, content: Content, since: Instant) -> Self {
        Self {
            ticket,
            redelivered,
            content,
            state: State::Received,
            mark: Mark::Absent,
            noted: false,
            known: None,
            key: None,
            priority: 0,
            accusation: None,
            reply: Reply::default(),
            needs: None,
            kept: None,
            recorded: None,
            error: String::new(),
            weight: 0,
            refusals: 0,
            unclear: false,
            untouched: false,
            hops: 0,
            proof: None,
            abort: None,
            since,
            born: None,
        }
    }

    /// Seconds since its event happened, if it says when; clocks that differ make nothing negative.
    pub(crate) fn lag(&self) -> Option<f64> {
        let lag = jiff::Timestamp::now().as_millisecond() - self.born?;
        Some(lag.max(0) as f64 / 1000.0)
    }

    pub(crate) fn event(&self) -> Option<&Event> {
        match &self.content {
            Content::Event { event, .. } => Some(event),
            Content::Message(_) => None,
        }
    }

    pub(crate) fn identity(&self) -> Option<&Identity> {
        match &self.content {
            Content::Event { identity, .. } => Some(identity),
            Content::Message(_) => None,
        }
    }

    pub(crate) fn route(&self) -> Option<usize> {
        match &self.content {
            Content::Event { route, .. } => *route,
            Content::Message(_) => None,
        }
    }

    pub(crate) fn attempt(&self) -> u32 {
        match &self.content {
            Content::Event { attempt, .. } => *attempt,
            Content::Message(_) => 1,
        }
    }

    /// How the inbox knows it; none where it cannot be told from its copies.
    pub(crate) fn seen(&self) -> Option<Seen> {
        match &self.content {
            Content::Event { identity, identified: Identified::ByItself, replayed, .. } => {
                Some(Seen { identity: *identity, replayed: *replayed })
            }
            _ => None,
        }
    }

    /// What starts are counted under. An event without an id of its own is known by its content, key and partition: it
    /// gets another id at every delivery, and would otherwise kill the process for ever.
    pub(crate) fn suspect(&self) -> Option<Identity> {
        match &self.content {
            Content::Event { identity, identified: Identified::ByItself, .. } => Some(*identity),
            Content::Event { event, .. } => {
                let body = event.data().map(|data| data.as_bytes()).unwrap_or_default();
                let digest = Uuid::new_v5(&Uuid::NAMESPACE_OID, body).to_string();
                let key = if event.key() == event.id() { "".into() } else { event.key() };
                let queue = &self.ticket.place().queue;
                Some(Identity::of(&format!("{}\0{}\0{key}\0{queue}", event.source(), event.kind()), &digest))
            }
            Content::Message(_) => None,
        }
    }

    /// What is handled one after the other: its key; for a redelivered event with neither key nor id, all that look like
    /// it. They share one count of starts, so each has to end before the next begins.
    pub(crate) fn turn(&self) -> Option<Turn<'_>> {
        let event = self.event()?;
        Some(match self.seen() {
            None if self.redelivered && event.key() == event.id() => Turn::Alike(self.suspect()?),
            _ => Turn::Key(event.key()),
        })
    }

    /// What the commit of its outcome writes.
    pub(crate) fn effect(&self, house: &House, handler: impl Fn() -> String) -> Option<Effect> {
        let event = self.event()?;
        let (outcome, out) = match self.state.action() {
            Action::CommitDone => (Outcome::Done, self.sent(event, house)),
            Action::CommitDead(doom) => {
                let cause = self.cause(doom, handler());
                let replayed = self.seen().map_or(0, |seen| seen.replayed);
                let lane = &self.ticket.place().lane_name;
                let letter = dead::of_event(event, replayed, lane, &cause, &house.scene(), &house.topology.dead());
                // What ran and timed out may have done it, whatever a repeat of it is told.
                let certain = Some(self.untouched);
                // It was not refused.
                let reason = if self.unclear { "unclear" } else { cause.reason };
                let failed = Failed { reason: reason.into(), error: cause.error, certain };
                let answer = answer(event, Err(&failed), &house.topology.pool, house.limits);
                let answer = answer.map(|answer| outgoing(&answer).after_hops(self.hops + 1));
                (Outcome::Dead, [letter].into_iter().chain(answer).collect())
            }
            _ => return None,
        };
        let partition = self.ticket.place().queue.clone();
        let change = if outcome == Outcome::Done { self.reply.change.clone() } else { None };
        Some(Effect { seen: self.seen(), outcome, started: self.started(), partition, out, change })
    }

    /// What its success sends: what the handler emits, the answer to a process, and what this pool gets after a time.
    fn sent(&self, event: &Event, house: &House) -> Vec<Message> {
        let Reply { emit, later, result, looked_on, hops, .. } = &self.reply;
        let mut sent: Vec<Message> = emit.iter().map(outgoing).collect();
        if !looked_on {
            let answer = answer(event, Ok(result.as_ref()), &house.topology.pool, house.limits);
            sent.extend(answer.as_ref().map(outgoing));
        }
        sent.extend(later.iter().map(|(after, event)| {
            let lane = event.lane().map(str::to_owned);
            delayed(house, event, *after, 1, lane.as_deref())
        }));
        let hops = hops.unwrap_or(self.hops + 1);
        sent.into_iter().map(|message| message.after_hops(hops)).collect()
    }

    /// The answer to a process whose question cannot be read: it would wait for one in vain. What the question is stands in its
    /// headers, which are read without its body.
    pub(crate) fn unread(&self, house: &House) -> Option<Message> {
        let Content::Message(message) = &self.content else { return None };
        let (message, why) = message.as_ref();
        let mut head = Message {
            headers: message.headers.clone(),
            content_type: message.content_type.clone(),
            ..Message::default()
        };
        head.strip();
        head.headers.retain(|(name, _)| name != SEAL);
        let incoming = head.open(&[], house.limits, String::new).ok()?;
        let certain = Some(incoming.untouched && !self.redelivered);
        let failed = Failed { reason: why.reason().into(), error: format!("it cannot be read: {why}"), certain };
        let answer = answer(&incoming.event, Err(&failed), &house.topology.pool, house.limits)?;
        Some(outgoing(&answer).after_hops(incoming.hops + 1))
    }

    /// What a transaction of its handler records.
    pub(crate) fn entry(&self) -> Entry {
        Entry { seen: self.seen(), started: self.started(), partition: self.ticket.place().queue.clone() }
    }

    /// Whose record of starts its outcome ends. A first delivery of a first attempt has none, until it fails in place; a later
    /// attempt may have what an earlier one left, when the process died in it.
    fn started(&self) -> Option<Identity> {
        if self.redelivered || self.attempt() > 1 || self.noted { self.suspect() } else { None }
    }

    /// The broker will never take its copy: of what is no event the letter goes without the body.
    pub(crate) fn leave_body_out(&mut self) {
        if let Content::Message(message) = &mut self.content {
            message.0.body.clear();
        }
    }

    pub(crate) fn cause(&self, doom: Doom, handler: String) -> Cause {
        let (reason, attempts, error) = match doom {
            Doom::NoRoute => {
                let kind = self.event().map(|e| e.kind().to_owned()).unwrap_or_default();
                ("no-route", 0, format!("no route takes the type '{kind}': add one, then replay"))
            }
            Doom::Loop => {
                let error = format!(
                    "{} events caused one another until this one: find out which routes or processes lead back to one another, or \
                     raise WARREN_HOP_LIMIT",
                    self.hops
                );
                ("loop", 0, error)
            }
            Doom::Permanent { attempts } => ("permanent", attempts, self.error.clone()),
            Doom::Exhausted { attempts } => ("exhausted", attempts, self.error.clone()),
            Doom::Unsendable { attempts } => ("unsendable", attempts, self.error.clone()),
            Doom::Unstorable { attempts } => ("unstorable", attempts, self.error.clone()),
            Doom::Crash { attempts } => {
                ("crash", attempts, "the worker's process died whenever it handled this event".to_owned())
            }
        };
        Cause { reason, error, attempts, handler }
    }

    /// The copy that waits in a delay queue, or the dead letter of what is no event.
    pub(crate) fn copy(&self, house: &House) -> Option<Message> {
        match (self.state.action(), &self.content) {
            (Action::Park { after, attempt }, Content::Event { event, replayed, .. }) => {
                let mut message = delayed(house, event, after, attempt, Some(&self.ticket.place().lane_name));
                if *replayed > 0 {
                    message.set(REPLAYED, *replayed);
                }
                if self.hops > 0 {
                    message.set(HOPS, self.hops);
                }
                if self.untouched {
                    message.set(UNTOUCHED, true);
                }
                Some(message)
            }
            (Action::Bury, Content::Message(message)) => {
                let (message, why) = message.as_ref();
                let cause = Cause { reason: why.reason(), error: why.to_string(), attempts: 0, handler: String::new() };
                let mut letter = dead::of_message(message.clone(), &cause, &house.scene(), &house.topology.dead());
                letter.set(LANE, self.ticket.place().lane_name.as_str());
                Some(letter)
            }
            _ => None,
        }
    }

    /// Where it stands towards the places for handlers.
    pub(crate) fn place(&self) -> Place {
        match (self.key, self.state) {
            (Some(_), State::Received) => Place::Ahead,
            (Some(_), State::Suspected { .. } | State::Running(_)) => Place::Active,
            _ => Place::Elsewhere,
        }
    }

    /// Whether it holds one of its route's places. A wait in place holds it too: what follows does not ask again.
    pub(crate) fn holds_place(&self) -> bool {
        let waits = matches!(self.state, State::Holding { .. } | State::Accused { .. });
        self.place() != Place::Elsewhere || self.key.is_some() && waits
    }

    /// Whether it waits in place.
    pub(crate) fn waits(&self) -> bool {
        matches!(self.state, State::Holding { .. } | State::Unroutable | State::Accused { .. })
    }

    /// How long it has been here.
    pub(crate) fn age(&self) -> Duration {
        self.since.elapsed()
    }
}

/// An event that comes to the pool after a time.
fn delayed(house: &House, event: &Event, after: Duration, attempt: u32, lane: Option<&str>) -> Message {
    let (step, left) = Step::toward(after);
    let mut message = Message::to_lane(event, &house.topology.delay(step), lane);
    message.set(ATTEMPT, attempt);
    if !left.is_zero() {
        message.set(LEFT, i64::try_from(left.as_millis()).unwrap_or(i64::MAX));
    }
    message
}

/// The answer to a process, where the event asks for a step of one.
pub(crate) fn answer(
    event: &Event,
    outcome: Result<Option<&Json>, &Failed>,
    pool: &str,
    limits: Limits,
) -> Option<Event> {
    if !wire::asks(event) {
        return None;
    }
    let (source, time) = (format!("/warren/{pool}"), jiff::Timestamp::now().to_string());
    let answer = wire::answer(event, outcome, &source, &time, limits);
    // The step is done, whatever its result looks like.
    let bare = |error: Unreadable| {
        tracing::warn!(id = event.id(), r#type = event.kind(), %error, "the result of event '{}' is left out", event.id());
        wire::answer(event, outcome.map(|_| None), &source, &time, limits).ok()
    };
    answer.map_or_else(bare, Some)
}

/// An event on its way to the bus.
pub(crate) fn outgoing(event: &Event) -> Message {
    Message::to_lane(event, BUS, None)
}

impl House {
    pub(crate) fn scene(&self) -> Scene {
        Scene { worker: self.worker.clone(), at: jiff::Timestamp::now().to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_beat_since_lives_and_who_did_not_for_so_long_is_dead() {
        let other = |run: &str, seen| Other { run: run.into(), seen };
        let first = vec![other("a", Some(5)), other("b", Some(7)), other("c", None)];
        let accusation = Accusation { beats: 0, others: first.clone() };
        assert_eq!(accusation.judge(&first, false), (3, false), "it is too early to tell");
        assert_eq!(accusation.judge(&first, true), (3, true));
        // One beat; one was forgotten for its silence; one is known again.
        let now = [other("a", Some(6)), other("b", None), other("c", Some(1))];
        assert_eq!(accusation.judge(&now, false), (1, false));
        assert_eq!(accusation.judge(&now, true), (1, true));
        assert_eq!(accusation.judge(&[], false), (0, false));
        assert_eq!(accusation.judge(&[other("new", Some(1))], true), (1, false), "it was not watched");
    }
}
