//! Every path of crash points × handler results × second copies × lost channels through the law.
use super::*;
use crate::explore::{Oracle, explore};

fn law(wait: Wait) -> Law {
    let retry = Policy { attempts: 2, backoff: Duration::from_millis(1), max: Duration::from_millis(8) };
    Law { retry, wait, crash_limit: 3 }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Dead,
}

/// A message of the event that the broker holds.
#[derive(Clone, Copy, Debug)]
struct Copy {
    attempt: u32,
    again: bool,
}

/// One event: what the broker and the store hold of it.
#[derive(Debug)]
struct World {
    law: Law,
    ready: Vec<Copy>,
    delayed: Vec<Copy>,
    outcome: Option<Outcome>,
    /// Recorded starts that never finished, and attempts that failed in place.
    starts: u32,
    failed: u32,
    effects: u32,
    letters: u32,
    /// What may still go wrong.
    crashes: u32,
    breaks: u32,
    losses: u32,
    depth: u32,
}

enum End {
    Settled,
    /// The process lives, the broker delivers again.
    Returned,
    Crashed,
}

impl World {
    fn new(law: Law, crashes: u32) -> Self {
        World {
            law,
            ready: vec![Copy { attempt: 1, again: false }],
            delayed: vec![],
            outcome: None,
            starts: 0,
            failed: 0,
            effects: 0,
            letters: 0,
            crashes,
            breaks: 1,
            losses: 1,
            depth: 0,
        }
    }

    fn spend(oracle: &mut Oracle, budget: fn(&mut Self) -> &mut u32, world: &mut Self) -> bool {
        if *budget(world) == 0 || oracle.choose(2) == 0 {
            return false;
        }
        *budget(world) -= 1;
        true
    }

    fn take(&mut self, oracle: &mut Oracle) {
        let copy = self.ready.remove(oracle.choose(self.ready.len()));
        match self.deliver(copy, oracle) {
            End::Settled => {}
            End::Returned | End::Crashed => self.ready.push(Copy { again: true, ..copy }),
        }
    }

    fn deliver(&mut self, copy: Copy, oracle: &mut Oracle) -> End {
        let mut state = State::Received;
        let mut proof = false;
        loop {
            let action = state.action();
            if action == Action::Stop {
                return if state == State::Settled { End::Settled } else { End::Returned };
            }
            if Self::spend(oracle, |w| &mut w.crashes, self) {
                return End::Crashed;
            }
            let lost = !matches!(action, Action::Run(_) | Action::CommitDone | Action::CommitDead(_) | Action::Release)
                && Self::spend(oracle, |w| &mut w.losses, self);
            let broken = !lost && !matches!(action, Action::Run(_)) && Self::spend(oracle, |w| &mut w.breaks, self);
            let fact = if lost {
                Fact::Gone
            } else if broken {
                Fact::Broken
            } else {
                match self.perform(action, copy, proof, oracle) {
                    Some(fact) => fact,
                    None => return End::Crashed,
                }
            };
            proof |= matches!(fact, Fact::Known | Fact::Committed | Fact::Superseded | Fact::Confirmed);
            if action != Action::Ack && Self::spend(oracle, |w| &mut w.crashes, self) {
                return End::Crashed;
            }
            (state, _) = next(state, fact, &self.law).expect("legal");
        }
    }

    fn perform(&mut self, action: Action, copy: Copy, proof: bool, oracle: &mut Oracle) -> Option<Fact> {
        Some(match action {
            Action::Look if self.outcome.is_some() => Fact::Known,
            Action::Look if copy.again => Fact::Redelivered { attempt: copy.attempt },
            Action::Look => Fact::Fresh { attempt: copy.attempt },
            Action::Record => {
                self.starts += 1;
                Fact::Recorded { unfinished: self.starts - 1, failed: self.failed }
            }
            Action::Run(run) => {
                assert!(run.attempt <= self.law.retry.attempts, "ran beyond the limit: {self:?}");
                assert!((run.company == Company::Alone) <= (run.record == Record::Present));
                // A second copy may run meanwhile: a zombie and its successor.
                if !self.ready.is_empty() && self.depth == 0 && oracle.choose(2) == 1 {
                    self.depth += 1;
                    self.take(oracle);
                    self.depth -= 1;
                }
                match oracle.choose(4) {
                    0 => Fact::Succeeded,
                    1 => Fact::Failed { failure: Failure::Transient { after: None }, chance: 0.5 },
                    2 => Fact::Failed { failure: Failure::Permanent, chance: 0.5 },
                    _ => {
                        if !Self::spend(oracle, |w| &mut w.losses, self) {
                            return Some(Fact::Succeeded);
                        }
                        Fact::Interrupted
                    }
                }
            }
            Action::Hold(run, _) => {
                (self.starts, self.failed) = (0, run.attempt);
                Fact::Waited
            }
            Action::CommitDone | Action::CommitDead(_) if self.outcome.is_some() => Fact::Superseded,
            Action::CommitDone => {
                self.outcome = Some(Outcome::Done);
                self.effects += 1;
                (self.starts, self.failed) = (0, 0);
                Fact::Committed
            }
            Action::CommitDead(_) => {
                self.outcome = Some(Outcome::Dead);
                self.letters += 1;
                (self.starts, self.failed) = (0, 0);
                Fact::Committed
            }
            Action::Park { attempt, .. } => {
                self.delayed.push(Copy { attempt, again: false });
                Fact::Confirmed
            }
            Action::Bury => unreachable!("only for what is no event"),
            Action::Release => {
                self.starts = self.starts.saturating_sub(1);
                Fact::Released
            }
            Action::Ack => {
                assert!(proof, "acked without proof: {self:?}");
                let safe = self.outcome.is_some() || !self.ready.is_empty() || !self.delayed.is_empty();
                assert!(safe, "acked the last copy of an event without outcome: {self:?}");
                Fact::Acked
            }
            Action::Stop => unreachable!("handled by the caller"),
        })
    }
}

fn explore_all(wait: Wait, crashes: u32, copies: usize) -> usize {
    explore(|oracle| {
        let mut world = World::new(law(wait), crashes);
        world.ready = vec![Copy { attempt: 1, again: false }; copies];
        let mut turns = 0;
        while !world.ready.is_empty() || !world.delayed.is_empty() {
            world.ready.append(&mut world.delayed);
            world.take(oracle);
            turns += 1;
            assert!(turns < 100, "no end: {world:?}");
        }
        match world.outcome {
            Some(Outcome::Done) => assert_eq!((world.effects, world.letters), (1, 0), "{world:?}"),
            Some(Outcome::Dead) => assert_eq!((world.effects, world.letters), (0, 1), "{world:?}"),
            None => panic!("lost: {world:?}"),
        }
    })
}

#[test]
fn every_path_ends_in_one_effect_or_one_verdict() {
    for wait in [Wait::InLadder, Wait::InPlace] {
        for (crashes, copies) in [(2, 1), (1, 2), (0, 3)] {
            let worlds = explore_all(wait, crashes, copies);
            println!("{wait:?}, {crashes} crashes, {copies} copies: {worlds} worlds");
            assert!(worlds > 500);
        }
    }
}

/// An event that kills the process whenever it runs.
#[test]
fn a_poison_event_dies_after_the_crash_limit_and_never_shares_a_second_recorded_run() {
    let law = law(Wait::InLadder);
    let (mut starts, mut deaths, mut copy) = (0, 0, Copy { attempt: 1, again: false });
    let doom = loop {
        let fact = if copy.again { Fact::Redelivered { attempt: 1 } } else { Fact::Fresh { attempt: 1 } };
        let (mut state, mut action) = next(State::Received, fact, &law).expect("legal");
        if action == Action::Record {
            let recorded = Fact::Recorded { unfinished: starts, failed: 0 };
            starts += 1;
            (state, action) = next(state, recorded, &law).expect("legal");
        }
        match (state, action) {
            (State::Condemned(doom), _) => break doom,
            (_, Action::Run(run)) => {
                assert_eq!(run.company == Company::Alone, starts > 1);
                deaths += 1;
                copy.again = true;
            }
            other => panic!("unexpected {other:?}"),
        }
    };
    assert_eq!((deaths, doom), (3, Doom::Crash { attempts: 3 }));
}

/// A thousand events that were only near: their process lived, so nothing may add up against them.
#[test]
fn a_lost_channel_is_never_counted_as_a_crash() {
    let law = law(Wait::InLadder);
    let mut starts = 0;
    for _ in 0..50 {
        let (state, _) = next(State::Received, Fact::Redelivered { attempt: 1 }, &law).expect("legal");
        let (state, action) = next(state, Fact::Recorded { unfinished: starts, failed: 0 }, &law).expect("legal");
        starts += 1;
        assert!(matches!(action, Action::Run(Run { company: Company::Shared, .. })), "{action:?}");
        let (state, action) = next(state, Fact::Interrupted, &law).expect("legal");
        assert_eq!(action, Action::Release);
        starts -= 1;
        assert_eq!(next(state, Fact::Released, &law).expect("legal").0, State::Abandoned);
    }
}

#[test]
fn the_table_is_total_and_the_end_is_the_end() {
    for state in [State::Settled, State::Abandoned] {
        assert!(next(state, Fact::Acked, &law(Wait::InLadder)).is_err());
        assert!(next(state, Fact::Broken, &law(Wait::InLadder)).is_err());
    }
}
