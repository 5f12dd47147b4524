//! Every path of crash points × handler results × second copies × lost channels through the law.
use super::*;
use crate::explore::explore;
use std::collections::HashSet;
use std::mem::{Discriminant, discriminant};
use world::{Content, Outcome, Trouble, World};

#[path = "delivery_world.rs"]
mod world;

type Seen = HashSet<(Discriminant<State>, Discriminant<Fact>)>;

fn law(wait: Wait) -> Law {
    let retry = Policy { attempts: 2, backoff: Duration::from_millis(1), max: Duration::from_millis(8) };
    Law { retry, wait, crash_limit: 3 }
}

/// Runs every world of this kind; says how many there are.
fn explore_all(law: Law, content: Content, copies: u32, trouble: Trouble, seen: &mut Seen) -> usize {
    let failures = trouble.crashes + trouble.losses + trouble.breaks;
    explore(|oracle| {
        let world = World::new(law, content, copies, trouble).live(oracle);
        match world.outcome {
            Some(Outcome::Done) => assert_eq!((world.effects, world.letters), (1, 0), "{world:?}"),
            Some(Outcome::Dead) => assert_eq!((world.effects, world.letters), (0, 1), "{world:?}"),
            // What has no identity cannot be told from its copies.
            None if content == Content::Garbage => {
                assert!(world.effects == 0 && (1..=copies + failures).contains(&world.letters), "{world:?}");
            }
            None => panic!("lost: {world:?}"),
        }
        seen.extend(world.path.iter().map(|(state, fact)| names(state, fact)));
    })
}

#[test]
fn every_path_ends_in_one_effect_or_one_verdict() {
    let t = |crashes, losses, breaks, early| Trouble { crashes, losses, breaks, early, ..Trouble::default() };
    let r = |crashes, breaks| Trouble { refused: 1, ..t(crashes, 0, breaks, 0) };
    let other = |trouble| Trouble { elsewhere: 2, ..trouble };
    let o = |crashes, losses| Trouble { outdated: 2, ..t(crashes, losses, 0, 0) };
    let mut seen = Seen::new();
    for wait in [Wait::InLadder, Wait::InPlace] {
        let usual = law(wait);
        let harsh = Law { crash_limit: 2, ..usual };
        let patient = Law { retry: Policy { attempts: 3, ..usual.retry }, ..usual };
        for (name, law, content, copies, trouble) in [
            ("two crashes", usual, Content::Routed, 1, t(2, 0, 0, 0)),
            ("three crashes, which is one too many", usual, Content::Routed, 1, t(3, 0, 0, 0)),
            ("two crashes, which is one too many", harsh, Content::Routed, 1, t(2, 0, 0, 0)),
            ("two lost channels where two deaths condemn", harsh, Content::Routed, 1, t(0, 2, 0, 0)),
            ("two lost channels and a crash where two deaths condemn", harsh, Content::Routed, 1, t(1, 2, 0, 0)),
            ("two crashes and a broken action", harsh, Content::Routed, 1, t(2, 0, 1, 0)),
            ("three attempts and a crash", patient, Content::Routed, 1, t(1, 0, 0, 0)),
            ("three attempts and a drain", patient, Content::Routed, 1, t(0, 1, 0, 0)),
            ("a crash and a second copy", usual, Content::Routed, 2, t(1, 0, 0, 0)),
            ("a crash and a lost channel", usual, Content::Routed, 1, t(1, 1, 0, 0)),
            ("a broken action and a lost channel", usual, Content::Routed, 1, t(0, 1, 1, 0)),
            ("zombies and a lost channel", usual, Content::Routed, 2, t(0, 1, 0, 0)),
            ("zombies and a broken action", usual, Content::Routed, 2, t(0, 0, 1, 0)),
            ("a crash and a broken action", usual, Content::Routed, 1, t(1, 0, 1, 0)),
            ("three copies", usual, Content::Routed, 3, t(0, 0, 0, 0)),
            ("before its time, with a crash", usual, Content::Routed, 1, t(1, 0, 0, 1)),
            ("before its time, with a lost channel", usual, Content::Routed, 1, t(0, 1, 0, 1)),
            ("an outdated state, and a crash", usual, Content::Routed, 1, o(1, 0)),
            ("an outdated state, and a lost channel", usual, Content::Routed, 1, o(0, 1)),
            ("an outdated state, and a second copy", usual, Content::Routed, 2, o(0, 0)),
            ("what the store cannot hold, and a crash", usual, Content::Routed, 1, r(1, 0)),
            ("what the store cannot hold, and two broken actions", usual, Content::Routed, 1, r(0, 2)),
            ("what the store cannot hold, and a second copy", usual, Content::Routed, 2, r(0, 0)),
            ("before its time, and never taken", usual, Content::Routed, 1, Trouble { early: 1, ..r(1, 1) }),
            ("no route", usual, Content::Unrouted, 1, t(1, 1, 1, 0)),
            ("in a circle", usual, Content::Looped, 1, t(1, 1, 1, 0)),
            ("a route elsewhere", usual, Content::Unrouted, 2, other(t(1, 1, 1, 0))),
            ("no event", usual, Content::Garbage, 1, t(1, 1, 1, 0)),
        ] {
            let worlds = explore_all(law, content, copies, trouble, &mut seen);
            assert!(worlds > 50, "{wait:?}, {name}: only {worlds} worlds");
        }
    }
    let legal: Seen = pairs().filter(|(s, f)| can_bring(s.action(), *f)).map(|(s, f)| names(&s, &f)).collect();
    let missed: Vec<_> =
        pairs().filter(|(s, f)| legal.contains(&names(s, f)) && !seen.contains(&names(s, f))).collect();
    assert!(missed.is_empty(), "on no path: {missed:?}");
}

/// What each action can bring: the law must answer this, all of this and nothing else.
fn can_bring(action: Action, fact: Fact) -> bool {
    use {Action as A, Fact as F};
    match action {
        A::Look => {
            matches!(fact, F::Known | F::Unreadable | F::Early { .. } | F::Unrouted | F::Looped | F::RoutedElsewhere)
                || matches!(fact, F::Fresh { .. } | F::Redelivered { .. } | F::Gone | F::Broken)
        }
        A::Record(_) => matches!(fact, F::Recorded { .. } | F::Gone | F::Broken),
        // A handler runs on when its channel goes; a broken one has failed.
        A::Run(_) => matches!(fact, F::Succeeded | F::Failed { .. } | F::Interrupted),
        A::Prove | A::Await | A::Hold(..) => matches!(fact, F::Waited | F::Interrupted | F::Gone | F::Broken),
        A::CommitDone => matches!(fact, F::Committed | F::Superseded | F::Outdated | F::Refused | F::Broken),
        A::CommitDead(_) => matches!(fact, F::Committed | F::Superseded | F::Broken),
        A::Park { .. } => matches!(fact, F::Confirmed | F::Refused | F::Gone | F::Broken),
        A::Bury => matches!(fact, F::Confirmed | F::Gone | F::Broken),
        A::Release => matches!(fact, F::Released | F::Broken),
        A::Ack => matches!(fact, F::Acked | F::Gone | F::Broken),
        A::Stop => false,
    }
}

/// Each state with each fact.
fn pairs() -> impl Iterator<Item = (State, Fact)> {
    let run = Run { attempt: 1, company: Company::Shared, record: Record::Present };
    let (after, attempt) = (Duration::from_secs(1), 1);
    let states = [
        State::Received,
        State::Unroutable,
        State::Suspected { attempt, start: Start { most: 1, company: Company::Shared } },
        State::Suspected { attempt, start: Start { most: u32::MAX, company: Company::Alone } },
        State::Accused { attempt },
        State::Running(run),
        State::Holding { run, after },
        State::Succeeded(run),
        State::Condemned(Doom::NoRoute),
        State::Parking { after, attempt, record: Record::Present },
        State::Burying,
        State::Leaving(Exit::Safe),
        State::Leaving(Exit::Abandoned),
        State::Safe,
        State::Settled,
        State::Abandoned,
    ];
    let facts = [
        Fact::Unreadable,
        Fact::Early { remaining: after, attempt },
        Fact::Known,
        Fact::Unrouted,
        Fact::Looped,
        Fact::RoutedElsewhere,
        Fact::Fresh { attempt },
        Fact::Redelivered { attempt },
        Fact::Recorded { kept: true, met: 0, proven: false, failed: 0 },
        Fact::Succeeded,
        Fact::Failed { failure: Failure::Permanent, chance: 0.5 },
        Fact::Interrupted,
        Fact::Waited,
        Fact::Committed,
        Fact::Superseded,
        Fact::Outdated,
        Fact::Refused,
        Fact::Confirmed,
        Fact::Released,
        Fact::Acked,
        Fact::Gone,
        Fact::Broken,
    ];
    states.into_iter().flat_map(move |state| facts.map(|fact| (state, fact)))
}

fn names(state: &State, fact: &Fact) -> (Discriminant<State>, Discriminant<Fact>) {
    (discriminant(state), discriminant(fact))
}

#[test]
fn a_fact_is_taken_exactly_where_the_action_can_bring_it() {
    for (state, fact) in pairs() {
        let answer = next(state, fact, &law(Wait::InLadder));
        assert_eq!(answer.is_ok(), can_bring(state.action(), fact), "{state:?}, {fact:?}: {answer:?}");
        if let Err(illegal) = answer {
            assert_eq!(illegal, Illegal { state, fact });
        }
    }
}

#[test]
fn a_broken_action_repeats_the_same_action() {
    let mut repeated = 0;
    for (state, _) in pairs().filter(|(state, fact)| *fact == Fact::Broken && can_bring(state.action(), *fact)) {
        assert_eq!(next(state, Fact::Broken, &law(Wait::InLadder)), Ok((state, state.action())));
        repeated += 1;
    }
    assert_eq!(repeated, 13, "all but a run and the two ends");
}

/// An event that kills the process whenever it runs.
#[test]
fn a_poison_event_dies_after_the_crash_limit_and_never_shares_a_second_recorded_run() {
    let law = law(Wait::InLadder);
    let (mut deaths, mut proven) = (0, false);
    let doom = loop {
        let fact = if deaths > 0 { Fact::Redelivered { attempt: 1 } } else { Fact::Fresh { attempt: 1 } };
        let (mut state, mut action) = next(State::Received, fact, &law).expect("legal");
        loop {
            let fact = match action {
                // Each death is another worker's.
                Action::Record(start) => Fact::Recorded { kept: deaths <= start.most, met: deaths, proven, failed: 0 },
                Action::Prove => {
                    proven = true;
                    Fact::Waited
                }
                _ => break,
            };
            (state, action) = next(state, fact, &law).expect("legal");
        }
        match (state, action) {
            (State::Condemned(doom), _) => break doom,
            (_, Action::Run(run)) => {
                assert_eq!(run.company == Company::Alone, deaths > 1);
                deaths += 1;
                assert!(deaths <= law.crash_limit, "it kills for ever");
            }
            other => panic!("unexpected {other:?}"),
        }
    };
    assert_eq!((deaths, doom, proven), (3, Doom::Crash { attempts: 3 }, true));
}

/// A process that takes several events, some of which kill it: broker, store and pipeline, as far as they matter here.
#[derive(Clone, Debug)]
struct Crowd {
    law: Law,
    deaths: u32,
    members: Vec<Member>,
    /// Whose turn it is to be alone, until it is settled.
    solo: Option<usize>,
}

#[derive(Clone, Debug)]
struct Member {
    kills: bool,
    /// How many processes are recorded that died with it, and whether this one is recorded.
    met: u32,
    mine: bool,
    /// Whether a process had it before.
    again: bool,
    state: State,
    /// Whether its handler runs.
    runs: bool,
}

impl Crowd {
    fn new(law: Law, kills: &[bool]) -> Self {
        let member = |kills: &bool| Member {
            kills: *kills,
            met: 0,
            mine: false,
            again: false,
            state: State::Received,
            runs: false,
        };
        Self { law, deaths: 0, members: kills.iter().map(member).collect(), solo: None }
    }

    /// What may happen next to a member; nothing where it waits.
    fn after(&self, n: usize) -> Option<Self> {
        let waiting = |m: &Member| matches!(m.state.action(), Action::Record(Start { company: Company::Alone, .. }));
        let idle = |m: &Member| matches!(m.state, State::Received | State::Settled) || waiting(m);
        let me = &self.members[n];
        let action = me.state.action();
        let waits = match action {
            // Beside a suspect nothing more is taken.
            Action::Look => self.solo.is_some() || self.members.iter().any(waiting),
            Action::Record(Start { company: Company::Alone, .. }) => {
                self.solo.is_some() || !self.members.iter().all(idle)
            }
            Action::Stop => true,
            _ => false,
        };
        if waits {
            return None;
        }
        let mut next = self.clone();
        let me = &mut next.members[n];
        let fact = match action {
            Action::Look if me.again => Fact::Redelivered { attempt: 1 },
            Action::Look => Fact::Fresh { attempt: 1 },
            Action::Record(start) => {
                let met = if me.met == 0 && !me.mine { u32::from(me.again) } else { me.met };
                let kept = met <= start.most;
                if kept {
                    (me.met, me.mine) = (met, true);
                }
                // All of them died: here nobody loses a connection.
                let recorded = Fact::Recorded { kept, met, proven: true, failed: 0 };
                next.solo = next.solo.or((start.company == Company::Alone).then_some(n));
                recorded
            }
            Action::Run(_) if !me.runs => {
                me.runs = true;
                return Some(next);
            }
            Action::Run(_) if me.kills => {
                next.deaths += 1;
                for member in next.members.iter_mut().filter(|m| m.state != State::Settled) {
                    member.met += u32::from(member.mine);
                    (member.state, member.again, member.mine, member.runs) = (State::Received, true, false, false);
                }
                next.solo = None;
                return Some(next);
            }
            Action::Run(_) => Fact::Succeeded,
            Action::CommitDone => Fact::Committed,
            Action::CommitDead(doom) => {
                assert!(me.kills, "{doom:?}: an innocent pays: {self:?}");
                Fact::Committed
            }
            Action::Ack => {
                next.solo = next.solo.filter(|solo| *solo != n);
                Fact::Acked
            }
            other => panic!("{other:?} has no place here: {self:?}"),
        };
        me.state = super::next(me.state, fact, &next.law).expect("legal").0;
        Some(next)
    }
}

/// Every order in which several events can get on, with a death wherever a poison's handler runs.
#[test]
fn however_many_poisons_there_are_no_innocent_dies() {
    const NO: bool = false;
    const YES: bool = true;
    for crash_limit in [2, 3, 4] {
        let law = Law { crash_limit, ..law(Wait::InLadder) };
        for kills in [&[YES, NO, NO][..], &[YES, YES, NO], &[YES, YES, YES], &[YES, YES, NO, NO]] {
            let (mut seen, mut open) = (HashSet::new(), vec![Crowd::new(law, kills)]);
            let poisons = kills.iter().filter(|kills| **kills).count() as u32;
            while let Some(crowd) = open.pop() {
                assert!(crowd.deaths <= crash_limit * poisons, "too many deaths: {crowd:?}");
                let after = (0..kills.len()).filter_map(|n| crowd.after(n));
                let mut moves = 0;
                for crowd in after.inspect(|_| moves += 1) {
                    if seen.insert(format!("{crowd:?}")) {
                        open.push(crowd);
                    }
                }
                let ended = crowd.members.iter().all(|m| m.state == State::Settled);
                assert!(ended || moves > 0, "it stands still: {crowd:?}");
            }
            assert!(seen.len() > 50, "only {} situations", seen.len());
        }
    }
}

/// Events that were only near: their workers live.
#[test]
fn a_lost_channel_is_never_counted_as_a_crash() {
    for crash_limit in [2, 3] {
        let law = Law { crash_limit, ..law(Wait::InLadder) };
        // Handed over, or taken back in time: nobody is known to have had it.
        for _ in 0..50 {
            let (state, _) = next(State::Received, Fact::Redelivered { attempt: 1 }, &law).expect("legal");
            let none = Fact::Recorded { kept: true, met: 0, proven: false, failed: 0 };
            let (state, action) = next(state, none, &law).expect("legal");
            assert!(matches!(action, Action::Run(Run { company: Company::Shared, .. })), "{action:?}");
            let (state, action) = next(state, Fact::Interrupted, &law).expect("legal");
            assert_eq!(action, Action::Release);
            assert_eq!(next(state, Fact::Released, &law).expect("legal").0, State::Abandoned);
        }
        // Read before they take it back: they are waited for, and it runs.
        let (state, _) = next(State::Received, Fact::Redelivered { attempt: 1 }, &law).expect("legal");
        let read = Fact::Recorded { kept: false, met: crash_limit, proven: false, failed: 0 };
        let (state, action) = next(state, read, &law).expect("legal");
        assert_eq!(action, Action::Prove);
        let (state, action) = next(state, Fact::Waited, &law).expect("legal");
        assert!(matches!(action, Action::Record(Start { company: Company::Shared, .. })), "{action:?}");
        let alive = Fact::Recorded { kept: false, met: 0, proven: true, failed: 0 };
        let (_, action) = next(state, alive, &law).expect("legal");
        assert!(matches!(action, Action::Record(Start { company: Company::Alone, .. })), "{action:?}");
    }
}

#[test]
fn a_drained_delivery_is_left_to_the_broker_and_its_record_taken_back() {
    let after = Duration::from_secs(1);
    for (record, actions) in
        [(Record::Absent, vec![Action::Stop]), (Record::Present, vec![Action::Release, Action::Stop])]
    {
        let run = Run { attempt: 1, company: Company::Shared, record };
        for state in [State::Running(run), State::Holding { run, after }] {
            let (mut state, mut action) = next(state, Fact::Interrupted, &law(Wait::InPlace)).expect("legal");
            let mut asked = vec![action];
            while action != Action::Stop {
                (state, action) = next(state, Fact::Released, &law(Wait::InPlace)).expect("legal");
                asked.push(action);
            }
            assert_eq!((state, &asked), (State::Abandoned, &actions));
        }
    }
    let waiting = next(State::Received, Fact::RoutedElsewhere, &law(Wait::InLadder)).expect("legal");
    assert_eq!(waiting, (State::Unroutable, Action::Await));
    for fact in [Fact::Interrupted, Fact::Gone] {
        let left = next(waiting.0, fact, &law(Wait::InLadder));
        assert_eq!(left, Ok((State::Abandoned, Action::Stop)), "it comes to whoever has a route");
    }
}
