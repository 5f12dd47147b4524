//! The supervisor: hears the fleet, computes who takes what, and tells each subscription its place in the line.
//!
//! All that it decides is in `warren_shared::{assignment, fleet}`; here is when. Whoever leaves is replaced at once;
//! newcomers are waited for a moment, as they rarely come alone, and each move costs a hand-over.
mod gossip;
mod peers;

pub use peers::Peers;

use crate::admin::Vitals;
use crate::consumer::{Slot, Standing, Subscriptions, Want};
use crate::metrics::{self, names};
use gossip::{Gossip, Tiding};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use warren_publisher::pace::paced;
use warren_publisher::{Broker, BrokerError, Publisher, Refused};
use warren_shared::assignment::Member;
use warren_shared::fleet::{Clock, Conflict, Fleet, Heard, Held, Kind, Role, Step, View, Word, step};
use warren_shared::topology::{Order, Topology};

/// How often a worker says that it lives.
static BEAT: LazyLock<Duration> = LazyLock::new(|| paced(Duration::from_secs(1)));
/// After a newcomer's word another is waited for so long.
static CALM: LazyLock<Duration> = LazyLock::new(|| paced(Duration::from_secs(1)));
/// But no longer than this.
static RESTLESS: LazyLock<Duration> = LazyLock::new(|| paced(Duration::from_secs(4)));
/// What changes in so short a time is said at once.
const BREATH: Duration = Duration::from_millis(20);
/// An owner that has not subscribed after so long may not be able to.
static OVERDUE: LazyLock<Duration> = LazyLock::new(|| paced(Duration::from_secs(5)));
/// What is over sooner is no trouble for a person: every hand-over leaves a worker short of a subscription for a moment.
static PASSING: LazyLock<Duration> = LazyLock::new(|| paced(Duration::from_secs(10)));
/// Beats in which an owner says that it stands before us, while the broker serves us.
const SURE: u32 = 3;

/// Why a worker cannot join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The broker cannot be had.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The user lacks a permission.
    #[error(
        "the broker denies the worker its place in the fleet ({said}): grant its user configure on '^{pattern}\\.[0-9a-f]+$', \
         and write and read on '^{pattern}(\\.[0-9a-f]+)?$'"
    )]
    Denied {
        /// What the broker said.
        said: String,
        /// The exchange, as a regular expression.
        pattern: String,
    },
    /// Somebody of the pool cannot share it with us.
    #[error(transparent)]
    Conflict(#[from] Conflict),
}

/// A worker that has heard the fleet and takes nothing yet.
#[derive(Debug)]
pub struct Newcomer {
    gossip: Gossip,
    fleet: Fleet,
}

impl Newcomer {
    /// Says hello, and listens until everybody who is there has answered.
    ///
    /// # Errors
    /// The broker cannot be had, or somebody has another store.
    pub async fn join(
        broker: Broker,
        publisher: &Publisher,
        topology: &Topology,
        me: Word,
        clock: Arc<Clock>,
        patience: Duration,
    ) -> Result<Self, JoinError> {
        let hello = Word { kind: Kind::Join, ..me.clone() };
        // Before our own queue is bound: what comes back was heard by nobody. Under an alarm nothing comes at all.
        let heard = publisher.publish(gossip::message(&topology.fleet(), &hello));
        let alone = matches!(tokio::time::timeout(*CALM, heard).await, Ok(Err(Refused::Returned { .. })));
        let mut gossip = Gossip::open(broker, topology.fleet(), patience).await?;
        let mut fleet = Fleet::new(me, clock);
        let mut settled = alone;
        if !alone {
            gossip.say(hello);
            let (begun, mut quiet) = (Instant::now(), Instant::now() + *CALM);
            while let Ok(Some(tiding)) = tokio::time::timeout_at(quiet, gossip.tidings.recv()).await {
                let Tiding::Word(word) = tiding else { continue };
                match fleet.hear(*word) {
                    Heard::Stranger { conflict, yield_to: true } => return Err(conflict.into()),
                    Heard::Joined(_) => quiet = (Instant::now() + *CALM / 2).max(quiet).min(begun + *RESTLESS),
                    Heard::Echo(_) => settled = true,
                    _ => {}
                }
            }
        }
        fleet.me_mut().settled = settled;
        Ok(Self { gossip, fleet })
    }
}

/// Asks the workers of a pool how they are, and listens as long as each takes to speak by itself, or until so many have.
///
/// # Errors
/// The broker cannot be had.
pub async fn ask(
    broker: Broker,
    topology: &Topology,
    patience: Duration,
    enough: usize,
) -> Result<Vec<Word>, JoinError> {
    let mut gossip = Gossip::open(broker, topology.fleet(), patience).await?;
    gossip.say(Word::ask(uuid::Uuid::new_v4().simple().to_string()));
    let mut words = BTreeMap::new();
    let over = Instant::now() + *BEAT * 3 / 2;
    while words.len() < enough
        && let Ok(Some(tiding)) = tokio::time::timeout_at(over, gossip.tidings.recv()).await
    {
        if let Tiding::Word(word) = tiding {
            match word.kind {
                Kind::Ask => {}
                Kind::Leave => drop(words.remove(&word.member())),
                _ => drop(words.insert(word.member(), *word)),
            }
        }
    }
    gossip.close().await;
    Ok(words.into_values().collect())
}

/// The handle of a running supervisor.
#[derive(Debug)]
pub struct Supervisor {
    leave: oneshot::Sender<oneshot::Sender<()>>,
    conflict: oneshot::Receiver<Conflict>,
    task: JoinHandle<()>,
}

/// Which subscriptions a worker should have.
#[derive(Debug, Default)]
pub struct Seats(Mutex<Option<Dealt>>);

/// What was dealt to it last.
#[derive(Clone, Debug)]
struct Dealt {
    owned: Arc<Vec<String>>,
    standby: usize,
    /// All workers take events from all partitions.
    shared: bool,
}

impl Seats {
    /// Partitions that it owns or stands by for; none before the first assignment.
    #[must_use]
    pub fn wanted(&self) -> Option<usize> {
        self.dealt().map(|dealt| dealt.owned.len() + dealt.standby)
    }

    /// The queues that it is to take events from.
    #[must_use]
    pub fn owned(&self) -> Arc<Vec<String>> {
        self.dealt().map(|dealt| dealt.owned).unwrap_or_default()
    }

    /// Whether others take events from them, too.
    #[must_use]
    pub fn are_shared(&self) -> bool {
        self.dealt().is_some_and(|dealt| dealt.shared)
    }

    fn dealt(&self) -> Option<Dealt> {
        // No code that holds the lock can panic half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn deal(&self, dealt: Dealt) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(dealt);
    }
}

impl Supervisor {
    /// Starts it: from now on the slots are told what to do.
    #[must_use]
    pub fn start(
        newcomer: Newcomer,
        order: Order,
        subscriptions: Arc<Subscriptions>,
        slots: Vec<Slot>,
        vitals: Vitals,
        peers: Arc<Peers>,
    ) -> Self {
        let Newcomer { gossip, fleet } = newcomer;
        peers.learn(fleet.others());
        let (leave, leaving) = oneshot::channel();
        let (refuse, conflict) = oneshot::channel();
        let posts = slots.into_iter().map(Post::new).collect();
        let task = Task {
            gossip,
            fleet,
            order,
            subscriptions,
            posts,
            vitals,
            peers,
            strangers: BTreeMap::new(),
            ill: None,
            refuse: Some(refuse),
            echoed: false,
            turns: 0,
            told: (0, 0),
        };
        let task = tokio::spawn(task.run(leaving));
        Self { leave, conflict, task }
    }

    /// Waits for ever, but for a newcomer that could not hear the others when it came (an alarm silenced all): if it must
    /// go after all, this tells why.
    pub async fn conflict(&mut self) -> Conflict {
        match (&mut self.conflict).await {
            Ok(conflict) => conflict,
            Err(_) => std::future::pending().await,
        }
    }

    /// Tells the fleet that this worker takes nothing more, and hands all partitions over. The subscriptions' tasks end;
    /// the returned one does when the fleet was told: who is only missed is waited for.
    pub async fn leave(self) -> JoinHandle<()> {
        let (tell, told) = oneshot::channel();
        let _ = self.leave.send(tell);
        let _ = told.await;
        self.task
    }
}

/// A partition, and what this worker is to it.
struct Post {
    slot: Slot,
    role: Role,
    owner: Option<Member>,
    /// Since when it is that.
    since: Instant,
    /// Beats of an owner that stands before us, while the broker served us.
    contradictions: u32,
    /// Deliveries at the last beat of the owner, and settled ones at our last beat.
    received: u64,
    settled: u64,
    rate: f64,
}

impl Post {
    fn new(slot: Slot) -> Self {
        let since = Instant::now();
        Self { slot, role: Role::None, owner: None, since, contradictions: 0, received: 0, settled: 0, rate: 0.0 }
    }

    /// The place in the line, where it is the one that is wanted.
    fn standing(&self) -> Option<Standing> {
        let standing = self.slot.standing()?;
        matches!(self.slot.wanted(), Want::Here { turn, .. } if turn == standing.turn).then_some(standing)
    }

    /// Whether what is wanted and what is the case agree.
    fn is_still(&self) -> bool {
        match self.slot.wanted() {
            Want::Away => self.slot.standing().is_none(),
            Want::Here { turn, .. } => self.slot.standing().is_none_or(|standing| standing.turn == turn),
            Want::End => false,
        }
    }
}

/// What a word calls for.
enum Then {
    Nothing,
    /// Say how we are.
    Speak,
    /// Deal the partitions out again: some have no owner.
    DealSoon,
    /// Deal them out once nobody else joins.
    DealWhenCalm,
}

struct Task {
    gossip: Gossip,
    fleet: Fleet,
    order: Order,
    subscriptions: Arc<Subscriptions>,
    posts: Vec<Post>,
    vitals: Vitals,
    peers: Arc<Peers>,
    /// Those who take events and cannot share the pool with us: why, and when they last spoke.
    strangers: BTreeMap<Member, (Conflict, Instant)>,
    /// Since when something is wrong here.
    ill: Option<Instant>,
    /// Tells the worker that it must go.
    refuse: Option<oneshot::Sender<Conflict>>,
    /// Whether a word of ours came back.
    echoed: bool,
    turns: u64,
    /// Workers known of, and partitions owned, as last logged.
    told: (usize, usize),
}

impl Task {
    async fn run(mut self, mut leaving: oneshot::Receiver<oneshot::Sender<()>>) {
        let mut beat = tokio::time::interval(*BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // When the next assignment is due, and until when it may be put off.
        let (mut due, mut latest) = (Some(Instant::now()), None);
        let mut speak: Option<Instant> = None;
        loop {
            let (deal, tell) = (wait(due), wait(speak));
            tokio::select! {
                tell = &mut leaving => {
                    self.say(Kind::Leave);
                    self.posts.iter().for_each(|post| post.slot.want(Want::End));
                    let _ = tell.map(|tell| tell.send(()));
                    return self.gossip.close().await;
                }
                () = deal => {
                    (due, latest) = (None, None);
                    self.deal();
                }
                () = tell => {
                    speak = None;
                    self.say(Kind::Change);
                }
                _ = beat.tick() => {
                    // A beat after our word went round, everybody has spoken.
                    let settled = self.echoed;
                    self.fleet.me_mut().settled |= settled;
                    self.measure();
                    self.say(Kind::Beat);
                }
                () = self.subscriptions.changed() => speak = speak.or(Some(Instant::now() + BREATH)),
                () = self.peers.lacked() => {
                    self.fleet.me_mut().lacking = self.peers.lacking();
                    let soon = Instant::now() + BREATH;
                    (due, speak) = (Some(soon), speak.or(Some(soon)));
                }
                tiding = self.gossip.tidings.recv() => {
                    let Some(tiding) = tiding else { return };
                    let now = Instant::now();
                    match tiding {
                        Tiding::Back => self.say(Kind::Join),
                        Tiding::Word(word) => match self.hear(*word) {
                            Then::Nothing => {}
                            Then::Speak => speak = speak.or(Some(now + BREATH)),
                            Then::DealSoon => due = Some(now + BREATH),
                            Then::DealWhenCalm => {
                                speak = speak.or(Some(now + BREATH));
                                due = Some((now + *CALM).min(*latest.get_or_insert(now + *RESTLESS)));
                            }
                        },
                    }
                }
            }
            self.reconcile();
        }
    }

    fn hear(&mut self, word: Word) -> Then {
        let (kind, member, settled) = (word.kind, word.member(), word.settled);
        let asked = kind == Kind::Join && member.run != self.fleet.me().run;
        let heard = self.fleet.hear(word);
        if !matches!(heard, Heard::Known | Heard::Asked) {
            self.peers.learn(self.fleet.others());
        }
        match heard {
            Heard::Joined(member) => {
                tracing::info!(worker = member.name, "worker '{}' joined the pool", member.name);
                return Then::DealWhenCalm;
            }
            Heard::Left(member) => {
                tracing::info!(worker = member.name, "worker '{}' left the pool", member.name);
                return Then::DealSoon;
            }
            Heard::Echo(gone) if !gone.is_empty() => {
                for Member { name, .. } in gone {
                    tracing::warn!(worker = name, "worker '{name}' is silent: others take its place");
                }
                return Then::DealSoon;
            }
            Heard::Stranger { conflict, yield_to: true } => {
                if let Some(refuse) = self.refuse.take() {
                    let _ = refuse.send(conflict);
                }
            }
            Heard::Stranger { conflict, .. } if settled => {
                let known = self.strangers.insert(member, (conflict.clone(), Instant::now()));
                if known.is_none() {
                    tracing::error!("{conflict}");
                }
            }
            Heard::Stranger { conflict, .. } => tracing::warn!("told a newcomer to go: {conflict}"),
            Heard::Known => self.doubt(kind, &member),
            Heard::Changed if asked => return Then::DealWhenCalm,
            Heard::Changed => return Then::DealSoon,
            Heard::Asked => return Then::Speak,
            Heard::Echo(_) => self.echoed = true,
        }
        if asked { Then::Speak } else { Then::Nothing }
    }

    /// Computes who is what.
    fn deal(&mut self) {
        let me = self.fleet.me().member();
        let workers = self.fleet.size();
        let place = |post: &Post| post.slot.place.clone();
        let places: Vec<_> = self.posts.iter().map(place).collect();
        let partitions: Vec<(&str, &str)> = places.iter().map(|place| (&*place.lane_name, &*place.queue)).collect();
        let seats = match self.order {
            Order::Key => self.fleet.seats(&partitions),
            // All compete for all.
            Order::None => Vec::new(),
        };
        let now = Instant::now();
        for (n, post) in self.posts.iter_mut().enumerate() {
            let (owner, standby) = match seats.get(n) {
                Some(seat) => (seat.owner.clone(), seat.standby.as_ref()),
                None => (Some(me.clone()), None),
            };
            let role = match &owner {
                Some(owner) if *owner == me => Role::Owner,
                _ if standby == Some(&me) => Role::Standby,
                _ => Role::None,
            };
            let owner = owner.filter(|owner| *owner != me);
            if (role, &owner) != (post.role, &post.owner) {
                (post.role, post.owner, post.since, post.contradictions) = (role, owner, now, 0);
            }
        }
        let of = |role| self.posts.iter().filter(move |post| post.role == role);
        let queues = Arc::new(of(Role::Owner).map(|post| post.slot.place.queue.to_string()).collect::<Vec<_>>());
        let (owned, standby) = (queues.len(), of(Role::Standby).count());
        self.vitals.seats.deal(Dealt { owned: queues, standby, shared: self.order == Order::None });
        metrics::set(names::OWNED, owned as f64);
        metrics::set(names::WORKERS, workers as f64);
        let told = (workers, owned);
        if std::mem::replace(&mut self.told, told) != told {
            tracing::info!(
                workers,
                owned,
                standby,
                "the pool has {workers} workers: this one owns {owned} partitions and stands by for {standby}",
            );
        }
    }

    /// An owner that says that it stands before us while the broker serves us has another idea of the line.
    fn doubt(&mut self, kind: Kind, member: &Member) {
        if kind != Kind::Beat {
            return;
        }
        for post in self.posts.iter_mut().filter(|post| post.owner.as_ref() == Some(member)) {
            let Some(standing) = post.standing() else { continue };
            let received = standing.epoch.received();
            let served = std::mem::replace(&mut post.received, received) < received;
            let before = self.fleet.place(member, &post.slot.place.queue).is_some_and(|place| place < standing.stamp);
            post.contradictions = if served && before { post.contradictions + 1 } else { 0 };
        }
    }

    /// Brings what is wanted of each subscription in line with its role.
    fn reconcile(&mut self) {
        for post in &mut self.posts {
            let queue = &post.slot.place.queue;
            let owner = post.owner.as_ref().and_then(|owner| self.fleet.place(owner, queue));
            let standing = post.standing();
            let here = |turn| Want::Here { turn, first: false };
            // What was asked last is still under way.
            if !post.is_still() {
                continue;
            }
            let mine = match post.slot.wanted() {
                Want::Away | Want::End => None,
                // Not there yet: as good as there, for it cannot be given up twice.
                Want::Here { .. } => Some(standing.as_ref().map_or(u64::MAX, |standing| standing.stamp)),
            };
            let view = View {
                role: post.role,
                mine,
                owner,
                overdue: post.since.elapsed() > *OVERDUE,
                inverted: post.contradictions >= SURE,
            };
            match step(view) {
                Step::Subscribe => {
                    self.turns += 1;
                    post.slot.want(here(self.turns));
                }
                Step::Requeue => {
                    metrics::count(names::MOVES, 1);
                    self.turns += 1;
                    post.contradictions = 0;
                    post.slot.want(here(self.turns));
                }
                Step::Leave => {
                    if standing.as_ref().is_some_and(|standing| standing.epoch.received() > 0) {
                        metrics::count(names::MOVES, 1);
                    }
                    post.slot.want(Want::Away);
                }
                Step::Stay => {
                    if let (Want::Here { turn, .. }, Some(standing)) = (post.slot.wanted(), standing) {
                        let first = post.role == Role::Owner && !self.fleet.is_behind(queue, standing.stamp);
                        post.slot.want(Want::Here { turn, first: first || self.order == Order::None });
                    }
                }
            }
        }
    }

    /// How many events each subscription settled, a second.
    fn measure(&mut self) {
        for post in &mut self.posts {
            let settled = post.slot.standing().map_or(0, |standing| standing.epoch.settled());
            let since = settled.checked_sub(std::mem::replace(&mut post.settled, settled)).unwrap_or(settled);
            // A second between beats; half of it is remembered.
            post.rate = if settled == 0 { 0.0 } else { (post.rate + since as f64) / 2.0 };
        }
    }

    fn say(&mut self, kind: Kind) {
        let now = jiff::Timestamp::now().as_millisecond();
        let held = |post: &Post| {
            let standing = post.standing()?;
            Some(Held {
                queue: post.slot.place.queue.to_string(),
                stamp: standing.stamp,
                active: standing.epoch.received() > 0,
                unacked: standing.epoch.unacked(),
                rate: (post.rate * 10.0).round() / 10.0,
                oldest: standing.epoch.oldest().map(|at| u64::try_from(now - at).unwrap_or(0)),
            })
        };
        let held = self.posts.iter().filter_map(held).collect();
        let running = self.vitals.pulse.running.load(Ordering::Relaxed);
        let me = self.fleet.me_mut();
        me.held = held;
        me.running = u32::try_from(running).unwrap_or(u32::MAX);
        me.clock = self.subscriptions.clock().now();
        me.troubles = self.vitals.reasons();
        self.ill = if me.troubles.is_empty() { None } else { self.ill.or(Some(Instant::now())) };
        if self.ill.is_none_or(|since| since.elapsed() < *PASSING) {
            me.troubles.clear();
        }
        self.strangers.retain(|_, (_, at)| at.elapsed() < 5 * *BEAT);
        me.troubles.extend(self.vitals.outbox.trouble());
        me.troubles.extend(self.strangers.values().map(|(conflict, _)| conflict.to_string()));
        self.gossip.say(Word { kind, ..me.clone() });
    }
}

async fn wait(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}
