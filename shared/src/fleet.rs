//! The fleet as each worker sees it: who lives, who stands in which line, and what to do about one's own place there.
//!
//! Correctness never depends on it: the broker lets one consumer of a partition be active, the one that subscribed
//! first. The fleet only decides who stands in line, and that the owner stands first:
//!
//! ```text
//! role     own place   owner's place        step
//! owner    none        -                    Subscribe
//! owner    any         -                    Stay
//! standby  none        taken, or overdue    Subscribe     (behind the owner)
//! standby  none        not taken            Stay          (it will come)
//! standby  before      taken                Requeue       (drain, close, subscribe again: behind the owner)
//! standby  behind      taken                Stay
//! standby  any         not taken            Stay          (somebody has to serve)
//! none     any         taken                Leave
//! none     any         not taken            Stay
//! none     none        -                    Stay
//! ```
//!
//! Places are compared by stamps, a Lamport clock in the gossip. Two that subscribe at the same moment may be stamped
//! against the broker's order; then a standby is served although the owner says that it stands before it, and takes
//! that for `before`.
//!
//! Nobody is declared dead by a clock: a worker is, when several of our own words came back and none of its own. Who
//! hears nothing at all keeps everybody.
use crate::assignment::{Member, Seat, assign};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a worker says to the fleet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Word {
    /// Why it speaks.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Its run: a restart is another one.
    pub run: String,
    /// Milliseconds since 1970 of its start.
    pub since: i64,
    /// Whether it takes events already: a newcomer yields to those who do.
    pub settled: bool,
    /// Handlers that it may run at once.
    pub capacity: u32,
    /// Handlers that it runs.
    pub running: u32,
    /// Its store's identity.
    pub store: String,
    /// Partitions a lane.
    pub partitions: u16,
    /// Its lanes; none named: whichever there are.
    #[serde(default)]
    pub lanes: Vec<String>,
    /// The patterns of its routes.
    #[serde(default)]
    pub routes: Vec<String>,
    /// Queues that brought it events which another worker has a route for, and it has not.
    #[serde(default)]
    pub lacking: Vec<String>,
    /// Its version.
    pub version: String,
    /// Its Lamport clock.
    pub clock: u64,
    /// Its subscriptions.
    pub held: Vec<Held>,
    /// What keeps it from working, in words for a person.
    #[serde(default)]
    pub troubles: Vec<String>,
}

/// Why a worker speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It is new, and asks all others to speak.
    Join,
    /// It lives; said at fixed intervals.
    Beat,
    /// Something changed, or somebody asked.
    Change,
    /// Somebody who is no worker asks all to speak.
    Ask,
    /// It takes nothing more.
    Leave,
}

/// One subscription.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Held {
    /// The partition's queue.
    pub queue: String,
    /// When it was opened, in Lamport time.
    pub stamp: u64,
    /// Whether the broker delivered to it: it is the active one.
    pub active: bool,
    /// Deliveries that are not settled.
    pub unacked: usize,
    /// Deliveries settled, a second.
    pub rate: f64,
    /// Milliseconds since the oldest of them happened.
    pub oldest: Option<u64>,
}

impl Word {
    /// A question from somebody who is no worker.
    #[must_use]
    pub fn ask(run: String) -> Self {
        Self {
            kind: Kind::Ask,
            name: String::new(),
            run,
            since: 0,
            settled: false,
            capacity: 0,
            running: 0,
            store: String::new(),
            partitions: 0,
            lanes: Vec::new(),
            routes: Vec::new(),
            lacking: Vec::new(),
            version: String::new(),
            clock: 0,
            held: Vec::new(),
            troubles: Vec::new(),
        }
    }

    /// What of it the assignment rests on.
    fn serves(&self) -> (u32, &[String], &[String], &[String]) {
        (self.capacity, &self.lanes, &self.routes, &self.lacking)
    }

    /// Who speaks.
    #[must_use]
    pub fn member(&self) -> Member {
        Member { name: self.name.clone(), run: self.run.clone() }
    }
}

/// Why two workers cannot share a pool.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// What one records, the other does not see.
    #[error(
        "worker '{name}' of this pool keeps its records in another store ({theirs}, not {ours}): an event could be \
         handled twice. Give all workers of a pool the same DATABASE_URL (a SQLite file serves one machine), or this \
         one another WARREN_POOL"
    )]
    Store {
        /// The other worker.
        name: String,
        /// Our store.
        ours: String,
        /// Its store.
        theirs: String,
    },
    /// A key would be in two partitions.
    #[error(
        "worker '{name}' of this pool has WARREN_PARTITIONS={theirs}, this one {ours}: the number is fixed for a pool's \
         life, for keys change their partitions with it. Set the same number, or another WARREN_POOL"
    )]
    Partitions {
        /// The other worker.
        name: String,
        /// Our number.
        ours: u16,
        /// Its number.
        theirs: u16,
    },
}

/// What a word changed.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    /// Our own: the way to the others and back works. These are given up: they were silent meanwhile.
    Echo(Vec<Member>),
    /// Somebody new.
    Joined(Member),
    /// Somebody known.
    Known,
    /// Somebody known, who can serve other partitions than before.
    Changed,
    /// Somebody takes nothing more.
    Left(Member),
    /// Somebody wants to know, and is no member.
    Asked,
    /// Somebody who cannot share the pool with us; `yield_to` says whether it is we who must go.
    Stranger {
        /// Why.
        conflict: Conflict,
        /// Whether it was here before us.
        yield_to: bool,
    },
}

/// Own words that may come back without one of another worker, before it is given up.
pub const SILENCE: u32 = 4;

/// One worker's view of the fleet.
#[derive(Clone, Debug)]
pub struct Fleet {
    me: Word,
    clock: Arc<Clock>,
    others: BTreeMap<Member, Peer>,
}

/// A Lamport clock: what is stamped after a word was heard has a later stamp than all that the word tells.
#[derive(Debug, Default)]
pub struct Clock(AtomicU64);

impl Clock {
    /// A stamp later than all that were given or heard of.
    #[must_use]
    pub fn stamp(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Takes another clock's time in.
    pub fn hear(&self, other: u64) {
        self.0.fetch_max(other, Ordering::Relaxed);
    }

    /// The last stamp.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Clone, Debug)]
struct Peer {
    word: Word,
    missed: u32,
}

impl Fleet {
    /// The view of a worker that has heard nothing yet; `me` is what it will say of itself.
    #[must_use]
    pub fn new(me: Word, clock: Arc<Clock>) -> Self {
        Self { me, clock, others: BTreeMap::new() }
    }

    /// Takes a word in.
    pub fn hear(&mut self, word: Word) -> Heard {
        if word.run == self.me.run {
            let counts = word.kind == Kind::Beat;
            return Heard::Echo(if counts { self.give_up() } else { Vec::new() });
        }
        if word.kind == Kind::Ask {
            return Heard::Asked;
        }
        let member = word.member();
        if let Some(conflict) = self.conflict(&word) {
            self.others.remove(&member);
            // Clocks differ between machines: they decide only between two that are both new.
            let elder = (word.since, &word.run) < (self.me.since, &self.me.run);
            let yield_to = !self.me.settled && word.kind != Kind::Leave && (word.settled || elder);
            return Heard::Stranger { conflict, yield_to };
        }
        self.clock.hear(word.clock);
        if word.kind == Kind::Leave {
            return if self.others.remove(&member).is_some() { Heard::Left(member) } else { Heard::Known };
        }
        let serves = |word: &Word| self.others.get(&member).map(|known| known.word.serves() == word.serves());
        let heard = match serves(&word) {
            Some(true) => Heard::Known,
            Some(false) => Heard::Changed,
            None => Heard::Joined(member.clone()),
        };
        self.others.insert(member, Peer { word, missed: 0 });
        heard
    }

    fn give_up(&mut self) -> Vec<Member> {
        self.others.values_mut().for_each(|peer| peer.missed += 1);
        let silent = |(member, peer): (&Member, &Peer)| (peer.missed > SILENCE).then(|| member.clone());
        let gone: Vec<Member> = self.others.iter().filter_map(silent).collect();
        gone.iter().for_each(|member| drop(self.others.remove(member)));
        gone
    }

    fn conflict(&self, word: &Word) -> Option<Conflict> {
        let name = || word.name.clone();
        if word.store != self.me.store {
            return Some(Conflict::Store { name: name(), ours: self.me.store.clone(), theirs: word.store.clone() });
        }
        let (ours, theirs) = (self.me.partitions, word.partitions);
        (ours != theirs).then(|| Conflict::Partitions { name: name(), ours, theirs })
    }

    /// How many live, we too.
    #[must_use]
    pub fn size(&self) -> usize {
        self.others.len() + 1
    }

    /// What the others said last.
    pub fn others(&self) -> impl Iterator<Item = &Word> {
        self.others.values().map(|peer| &peer.word)
    }

    /// A seat for each of these partitions, each with its lane.
    #[must_use]
    pub fn seats(&self, partitions: &[(&str, &str)]) -> Vec<Seat> {
        seats(partitions, self.others().chain([&self.me]))
    }

    /// What we say of ourselves.
    #[must_use]
    pub fn me(&self) -> &Word {
        &self.me
    }

    /// What we say of ourselves, to be changed.
    pub fn me_mut(&mut self) -> &mut Word {
        &mut self.me
    }

    /// The stamp of another worker's subscription to a queue.
    #[must_use]
    pub fn place(&self, member: &Member, queue: &str) -> Option<u64> {
        let word = &self.others.get(member)?.word;
        word.held.iter().find(|held| held.queue == queue).map(|held| held.stamp)
    }

    /// Whether another worker is known to stand before a stamp in a queue's line.
    #[must_use]
    pub fn is_behind(&self, queue: &str, stamp: u64) -> bool {
        self.others.keys().filter_map(|member| self.place(member, queue)).any(|other| other < stamp)
    }
}

/// A seat for each partition, given as lane and queue, among the workers that can serve it: those that have its lane, but for
/// those whose routes did not suffice there, while somebody's may.
///
/// Every worker computes the same of the partitions that it can serve: what it knows nothing of plays no part there. While
/// a deploy is in progress, workers differ.
#[must_use]
pub fn seats<'a>(partitions: &[(&str, &str)], words: impl Iterator<Item = &'a Word>) -> Vec<Seat> {
    let words: Vec<&Word> = words.collect();
    // What the same workers can serve is dealt out together: then their shares of all of it are even.
    let mut groups: BTreeMap<Vec<usize>, Vec<usize>> = BTreeMap::new();
    for (p, (lane, queue)) in partitions.iter().enumerate() {
        groups.entry(able(&words, lane, queue)).or_default().push(p);
    }
    let mut seats = vec![Seat::default(); partitions.len()];
    for (able, group) in groups {
        let queues: Vec<String> = group.iter().map(|p| partitions[*p].1.to_owned()).collect();
        let members = able.iter().map(|w| (words[*w].member(), words[*w].capacity)).collect();
        group.into_iter().zip(assign(&queues, &members)).for_each(|(p, seat)| seats[p] = seat);
    }
    seats
}

fn able(words: &[&Word], lane: &str, queue: &str) -> Vec<usize> {
    let has_lane = |w: &usize| words[*w].lanes.is_empty() || words[*w].lanes.iter().any(|l| l == lane);
    let have: Vec<usize> = (0..words.len()).filter(has_lane).collect();
    // Whoever has the same routes would find the same.
    let poor: Vec<&[String]> = words
        .iter()
        .filter(|word| word.lacking.iter().any(|lacking| lacking == queue))
        .map(|word| word.routes.as_slice())
        .collect();
    let suffice = |w: &usize| !poor.contains(&words[*w].routes.as_slice());
    let able: Vec<usize> = have.iter().copied().filter(suffice).collect();
    if able.is_empty() { have } else { able }
}

/// A queue's line as these workers tell it: their places there, the first one first.
#[must_use]
pub fn line<'a>(words: &'a [Word], queue: &str) -> Vec<(&'a Held, &'a str)> {
    let places = words.iter().flat_map(|word| word.held.iter().map(move |held| (held, word.name.as_str())));
    let mut line: Vec<_> = places.filter(|(held, _)| held.queue == queue).collect();
    line.sort_by_key(|(held, _)| held.stamp);
    line
}

/// What a worker is to a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It takes the events.
    Owner,
    /// It is next in line.
    Standby,
    /// It has no business there.
    None,
}

/// What is known of one's own place in a partition's line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The role.
    pub role: Role,
    /// The own subscription's stamp.
    pub mine: Option<u64>,
    /// The owner's subscription's stamp, where the owner is another.
    pub owner: Option<u64>,
    /// Whether the owner had time enough to subscribe.
    pub overdue: bool,
    /// Whether the broker serves us although the owner says that it stands before us, and lives.
    pub inverted: bool,
}

/// What to do about one's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Stay,
    /// Subscribe.
    Subscribe,
    /// Hand over, and subscribe again.
    Requeue,
    /// Hand over.
    Leave,
}

/// The table above.
#[must_use]
pub fn step(view: View) -> Step {
    let View { role, mine, owner, overdue, inverted } = view;
    match (role, mine, owner) {
        (Role::Owner, None, _) => Step::Subscribe,
        (Role::Owner, Some(_), _) => Step::Stay,
        (Role::Standby, None, owner) if owner.is_some() || overdue => Step::Subscribe,
        (Role::Standby, Some(mine), Some(owner)) if mine <= owner || inverted => Step::Requeue,
        (Role::None, Some(_), Some(_)) => Step::Leave,
        _ => Step::Stay,
    }
}

#[cfg(test)]
#[path = "fleet_tests.rs"]
mod tests;
