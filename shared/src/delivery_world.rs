//! One event among crashes, lost channels, broken actions and second copies, with every action checked.
//!
//! [`World`] is what broker and store hold of the event; [`Life`] is what one delivery went through, kept beside the
//! law so that what the law asks for can be held against what happened.
use super::super::*;
use crate::explore::Oracle;

const EARLY: Duration = Duration::from_secs(7);
const TRANSIENT: Failure = Failure::Transient { after: None };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Dead,
}

/// A message of the event that the broker holds.
#[derive(Clone, Copy, Debug, Default)]
struct Copy {
    attempt: u32,
    again: bool,
    /// The worker that had it last, unless it gave it back.
    before: Option<u32>,
}

/// What the message is: an event with a route, one without, one of a circle, or no event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Routed,
    Unrouted,
    Looped,
    Garbage,
}

/// How often it may still go wrong: deaths of the process, lost channels and drains, broken actions, early arrivals, states
/// that change meanwhile.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Trouble {
    pub(super) crashes: u32,
    /// Lost channels and drains.
    pub(super) losses: u32,
    pub(super) breaks: u32,
    /// Arrivals before their time.
    pub(super) early: u32,
    /// Effects that rest on a state which another event changes.
    pub(super) outdated: u32,
    /// Effects that the store cannot hold, and copies that the broker will never take.
    pub(super) refused: u32,
    /// Looks at which another worker has a route for what has none here.
    pub(super) elsewhere: u32,
}

#[derive(Debug)]
pub(super) struct World {
    law: Law,
    content: Content,
    ready: Vec<Copy>,
    delayed: Vec<Copy>,
    pub(super) outcome: Option<Outcome>,
    /// Workers that may have died with it, and attempts that failed in place. Each delivery is another worker's.
    starts: Vec<u32>,
    failed: u32,
    /// Workers that died.
    dead: Vec<u32>,
    pub(super) effects: u32,
    pub(super) letters: u32,
    /// Runs and deliveries, each with the most that there may be.
    runs: (u32, u32),
    deliveries: (u32, u32),
    left: Trouble,
    nested: bool,
    /// The way taken so far.
    pub(super) path: Vec<(State, Fact)>,
}

/// What one delivery went through.
#[derive(Debug, Default)]
struct Life {
    copy: Copy,
    attempt: u32,
    /// Which worker it is.
    worker: u32,
    known: bool,
    recorded: bool,
    /// Workers that may have died with it, as was told last, and whether it is known who of them lives.
    met: u32,
    proven: bool,
    /// What the last run came to.
    result: Option<Fact>,
    released: bool,
    /// A start was recorded, and nobody heard of it.
    unsure: bool,
    /// The store cannot hold what its success would record, or the broker its copy.
    refused: bool,
    outcome: bool,
    proof: bool,
    acked: bool,
    excused: bool,
    gave_back: bool,
    /// A failure was noted, which ends the starts: to take one back then is harmless.
    noted: bool,
}

#[derive(PartialEq)]
enum End {
    Settled,
    /// The broker delivers it again; this worker had it, unless it gave it back.
    Returned(Option<u32>),
}

impl World {
    pub(super) fn new(law: Law, content: Content, copies: u32, left: Trouble) -> Self {
        // A chain of copies runs each attempt once; only what goes wrong can split a chain in two.
        let chains = copies + left.crashes + left.losses + left.breaks;
        World {
            law,
            content,
            ready: vec![Copy { attempt: 1, ..Copy::default() }; copies as usize],
            delayed: vec![],
            outcome: None,
            starts: vec![],
            failed: 0,
            dead: vec![],
            effects: 0,
            letters: 0,
            runs: (0, law.retry.attempts * chains + left.outdated),
            deliveries: (0, law.retry.attempts * chains + left.early),
            left,
            nested: false,
            path: vec![],
        }
    }

    fn spend(&mut self, oracle: &mut Oracle, trouble: fn(&mut Trouble) -> &mut u32) -> bool {
        let left = trouble(&mut self.left);
        let strikes = *left > 0 && oracle.choose(2) == 1;
        *left -= u32::from(strikes);
        strikes
    }

    /// Takes copies until the broker holds none.
    pub(super) fn live(mut self, oracle: &mut Oracle) -> Self {
        while !self.ready.is_empty() || !self.delayed.is_empty() {
            self.ready.append(&mut self.delayed);
            self.take(oracle);
        }
        self
    }

    fn take(&mut self, oracle: &mut Oracle) {
        self.deliveries.0 += 1;
        assert!(self.deliveries.0 <= self.deliveries.1, "no end: {self:?}");
        let copy = self.ready.remove(oracle.choose(self.ready.len()));
        if let End::Returned(before) = self.deliver(copy, oracle) {
            self.ready.push(Copy { again: true, before, ..copy });
        }
    }

    fn deliver(&mut self, copy: Copy, oracle: &mut Oracle) -> End {
        let worker = self.deliveries.0;
        let mut life = Life { copy, attempt: copy.attempt, worker, ..Life::default() };
        let mut state = State::Received;
        loop {
            let action = state.action();
            if action == Action::Stop {
                assert!(
                    !life.recorded || life.released || life.outcome || life.unsure,
                    "left a record behind: {life:?} {self:?}"
                );
                assert_eq!(state == State::Settled, life.acked, "{life:?} {self:?}");
                assert!(life.acked || life.excused, "abandoned without need: {life:?} {self:?}");
                // Who lost its connection gives nothing back in time.
                let before = (!life.gave_back).then_some(worker);
                return if life.acked { End::Settled } else { End::Returned(before) };
            }
            // A crash before an action is also the crash after the one before it, and the crash of a handler.
            if self.spend(oracle, |t| &mut t.crashes) {
                self.dead.push(worker);
                return End::Returned(Some(worker));
            }
            let fact = self.befall(action, &mut life, oracle);
            if matches!(action, Action::Run(_)) {
                life.result = Some(fact);
            }
            life.outcome |= matches!(fact, Fact::Committed | Fact::Superseded);
            life.proof |= matches!(fact, Fact::Known | Fact::Committed | Fact::Superseded | Fact::Confirmed);
            life.known |= fact == Fact::Known;
            life.acked |= fact == Fact::Acked;
            life.excused |= matches!(fact, Fact::Gone | Fact::Interrupted);
            life.gave_back |= fact == Fact::Interrupted;
            self.path.push((state, fact));
            let (to, todo) = next(state, fact, &self.law).expect("legal");
            assert!(todo == to.action() && (fact != Fact::Broken || to == state), "{state:?} {fact:?} {to:?} {todo:?}");
            state = to;
        }
    }

    /// What comes of an action: what it brings, or a lost channel, or nothing, or nothing that anyone heard of.
    fn befall(&mut self, action: Action, life: &mut Life, oracle: &mut Oracle) -> Fact {
        use Action as A;
        let kept = matches!(action, A::Run(_) | A::CommitDone | A::CommitDead(_) | A::Release);
        if !kept && self.spend(oracle, |t| &mut t.losses) {
            if matches!(action, A::Park { .. } | A::Hold(..) | A::Bury) && oracle.choose(2) == 1 {
                self.perform(action, life, oracle);
            }
            let drained = matches!(action, A::Hold(..) | A::Await | A::Prove) && oracle.choose(2) == 1;
            return if drained { Fact::Interrupted } else { Fact::Gone };
        }
        if !matches!(action, A::Run(_)) && self.spend(oracle, |t| &mut t.breaks) {
            let remote = matches!(action, A::Park { .. } | A::Bury | A::CommitDone | A::CommitDead(_) | A::Record(_));
            if remote && oracle.choose(2) == 1 {
                self.perform(action, life, oracle);
                life.unsure |= matches!(action, A::Record(_));
            }
            return Fact::Broken;
        }
        self.perform(action, life, oracle)
    }

    fn perform(&mut self, action: Action, life: &mut Life, oracle: &mut Oracle) -> Fact {
        match action {
            Action::Look if self.outcome.is_some() => Fact::Known,
            Action::Look if self.content == Content::Garbage => Fact::Unreadable,
            Action::Look if self.spend(oracle, |t| &mut t.early) => {
                Fact::Early { remaining: EARLY, attempt: life.attempt }
            }
            Action::Look if self.content == Content::Unrouted && self.spend(oracle, |t| &mut t.elsewhere) => {
                Fact::RoutedElsewhere
            }
            Action::Look if self.content == Content::Unrouted => Fact::Unrouted,
            Action::Look if self.content == Content::Looped => Fact::Looped,
            Action::Look if life.copy.again => Fact::Redelivered { attempt: life.attempt },
            Action::Look => Fact::Fresh { attempt: life.attempt },
            Action::Record(start) => {
                let mut known = self.starts.clone();
                if known.is_empty() {
                    known.extend(life.copy.before);
                }
                let others: Vec<u32> = known.iter().copied().filter(|worker| *worker != life.worker).collect();
                let kept = others.len() <= start.most as usize;
                if kept {
                    self.starts = [others.clone(), vec![life.worker]].concat();
                }
                life.recorded |= kept;
                life.attempt = life.attempt.max(self.failed + 1);
                let dead = others.iter().filter(|worker| self.dead.contains(worker)).count();
                let met = if life.proven { dead } else { others.len() } as u32;
                if start.company == Company::Shared {
                    life.met = met;
                }
                Fact::Recorded { kept, met, proven: life.proven, failed: self.failed }
            }
            Action::Prove => {
                life.proven = true;
                Fact::Waited
            }
            Action::Await => Fact::Waited,
            Action::Run(run) => self.run(run, life, oracle),
            Action::Hold(run, after) => {
                assert_eq!((run.attempt, after, self.law.wait), (life.attempt, wait_after(run.attempt), Wait::InPlace));
                (self.starts, self.failed) = (vec![], run.attempt);
                life.attempt += 1;
                life.recorded &= run.company == Company::Shared;
                life.noted = true;
                Fact::Waited
            }
            Action::CommitDone => {
                assert_eq!(life.result, Some(Fact::Succeeded), "done without success: {life:?}");
                if self.outcome.is_none() && self.spend(oracle, |t| &mut t.outdated) {
                    return Fact::Outdated;
                }
                if self.outcome.is_none() && self.spend(oracle, |t| &mut t.refused) {
                    life.refused = true;
                    return Fact::Refused;
                }
                self.commit(Outcome::Done)
            }
            Action::CommitDead(doom) => {
                life.check(doom, self);
                self.commit(Outcome::Dead)
            }
            Action::Park { after, attempt } => {
                let retry = (wait_after(life.attempt), life.attempt + 1);
                let ran = life.result.is_some();
                assert_eq!((after, attempt), if ran { retry } else { (EARLY, life.copy.attempt) }, "{life:?}");
                assert!(!ran || self.law.wait == Wait::InLadder, "a strict event left its place: {life:?}");
                if self.spend(oracle, |t| &mut t.refused) {
                    life.refused = true;
                    return Fact::Refused;
                }
                self.delayed.push(Copy { attempt, ..Copy::default() });
                Fact::Confirmed
            }
            Action::Bury => {
                assert_eq!(self.content, Content::Garbage, "only what is no event is buried as it is");
                self.letters += 1;
                Fact::Confirmed
            }
            Action::Release => {
                assert!(
                    (life.recorded || life.noted) && !life.released,
                    "took back what it had not recorded: {life:?}"
                );
                life.released = true;
                self.starts.retain(|worker| *worker != life.worker);
                Fact::Released
            }
            Action::Ack => {
                assert!(life.proof, "acked without proof: {life:?} {self:?}");
                let held = !self.ready.is_empty() || !self.delayed.is_empty();
                let safe = self.outcome.is_some() || held || self.content == Content::Garbage && self.letters > 0;
                assert!(safe, "acked the last copy of an event without outcome: {self:?}");
                Fact::Acked
            }
            Action::Stop => unreachable!("handled by the caller"),
        }
    }

    fn run(&mut self, run: Run, life: &mut Life, oracle: &mut Oracle) -> Fact {
        assert!(!life.known, "ran what was known to have an outcome: {life:?} {self:?}");
        assert_eq!(run.attempt, life.attempt, "{life:?} {self:?}");
        assert!(run.attempt <= self.law.retry.attempts, "ran beyond the limit: {self:?}");
        assert_eq!(run.record == Record::Present, life.recorded, "{life:?}");
        assert_eq!(life.recorded, life.copy.again, "what comes again is recorded first, what is new is not: {life:?}");
        let spared = life.met <= u32::from(self.law.crash_limit > 2);
        assert!(spared || run.company == Company::Alone, "{life:?}");
        assert!(life.met < self.law.crash_limit, "ran at the crash limit: {life:?}");
        self.runs.0 += 1;
        assert!(self.runs.0 <= self.runs.1, "too many runs: {self:?}");
        // A second copy may run meanwhile: a zombie and its successor.
        if !self.ready.is_empty() && !self.nested && oracle.choose(2) == 1 {
            self.nested = true;
            self.take(oracle);
            self.nested = false;
        }
        match oracle.choose(3 + usize::from(self.left.losses > 0)) {
            0 => Fact::Succeeded,
            1 => Fact::Failed { failure: TRANSIENT, chance: 0.5 },
            2 => Fact::Failed { failure: Failure::Permanent, chance: 0.5 },
            _ => {
                self.left.losses -= 1;
                Fact::Interrupted
            }
        }
    }

    fn commit(&mut self, outcome: Outcome) -> Fact {
        if self.outcome.is_some() {
            return Fact::Superseded;
        }
        self.outcome = Some(outcome);
        (self.starts, self.failed) = (vec![], 0);
        match outcome {
            Outcome::Done => self.effects += 1,
            Outcome::Dead => self.letters += 1,
        }
        Fact::Committed
    }
}

impl Life {
    /// A doom must be what happened.
    fn check(&self, doom: Doom, world: &World) {
        let after = |failure| matches!(self.result, Some(Fact::Failed { failure: last, .. }) if last == failure);
        let deserved = match doom {
            Doom::NoRoute => world.content == Content::Unrouted && self.result.is_none(),
            Doom::Loop => world.content == Content::Looped && self.result.is_none(),
            Doom::Permanent { attempts } => after(Failure::Permanent) && attempts == self.attempt,
            Doom::Exhausted { attempts } => after(TRANSIENT) && attempts == world.law.retry.attempts,
            Doom::Unsendable { attempts } => {
                let made = if self.result.is_some() { self.attempt } else { self.attempt - 1 };
                self.refused && attempts == made
            }
            Doom::Unstorable { attempts } => {
                self.refused && self.result == Some(Fact::Succeeded) && attempts == self.attempt
            }
            // Of each of them it is known, and each of them did.
            Doom::Crash { attempts } => {
                let dead = world.dead.len() as u32;
                self.proven && attempts == self.met && (world.law.crash_limit..=dead).contains(&attempts)
            }
        };
        assert!(deserved, "{doom:?} is not what happened: {self:?} {world:?}");
    }
}

/// What the policy of these tests makes of a chance of one half.
fn wait_after(attempt: u32) -> Duration {
    Duration::from_micros(500) * 2_u32.pow(attempt - 1)
}
