//! Every order of answers, timers, repeats and crashes of a process with five steps, state by state.
use super::super::definition::Draft;
use super::*;
use crate::pattern::Pattern;
use crate::retry::Policy;
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// a, then b and c side by side; d after b, and e when both ways are gone. b may be skipped, c is asked for twice at most and so
/// is its undo, e is optional and stays as it is.
fn definition() -> Definition {
    let draft = |name: &str, after: &[&str]| Draft {
        name: name.into(),
        action: format!("{name}.do"),
        undo: Some(format!("{name}.undo")),
        after: after.iter().map(|name| (*name).to_owned()).collect(),
        ..Draft::default()
    };
    let retry = Some(Policy { attempts: 2, ..Policy::default() });
    let drafts = vec![
        draft("a", &[]),
        Draft { when: Some("true".into()), ..draft("b", &["a"]) },
        Draft { retry, ..draft("c", &["a"]) },
        draft("d", &["b"]),
        Draft { optional: true, undo: None, last: true, ..draft("e", &["c", "d"]) },
    ];
    Definition::new("five", Pattern::parse("begin").expect("valid"), drafts).expect("valid")
}

/// An attempt of a step, one way or the other.
type Attempt = (usize, Direction, u32);

/// What else is still to happen in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Trouble {
    failures: u8,
    timeouts: u8,
    repeats: u8,
    persons: u8,
}

/// An instance, and all that is on its way to or from it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    instance: Instance,
    /// Events that ask, not handled yet.
    asked: BTreeSet<Attempt>,
    /// Answers on their way: whether it is done, and else whether trying again could help.
    answers: BTreeMap<Attempt, Result<(), bool>>,
    /// Timers that run; one that fires late is a repeat of nothing.
    timers: BTreeSet<(Attempt, bool)>,
    /// Answered already: may come again.
    old: BTreeMap<Attempt, Result<(), bool>>,
    /// Steps whose work was done, and undone.
    done: BTreeSet<usize>,
    undone: BTreeSet<usize>,
    trouble: Trouble,
    holds: bool,
}

impl World {
    fn new(definition: &Definition, trouble: Trouble, holds: bool) -> Self {
        let mut world = Self {
            instance: Instance::new(definition),
            asked: BTreeSet::new(),
            answers: BTreeMap::new(),
            timers: BTreeSet::new(),
            old: BTreeMap::new(),
            done: BTreeSet::new(),
            undone: BTreeSet::new(),
            trouble,
            holds,
        };
        world.tell(definition, Fact::Begun);
        world
    }

    /// The instance takes a fact. A crash before its commit changes nothing and repeats the fact; one after it is a repeat.
    fn tell(&mut self, definition: &Definition, fact: Fact) {
        let over = matches!(self.instance.going, Going::Ended(_));
        let holds = self.holds;
        let Some(commands) = self.instance.take(fact, definition, |_| Some(holds), 0.5) else { return };
        assert!(!over, "{fact:?} changes what is over: {self:?}");
        for command in commands {
            match command {
                Command::Send { step, direction, attempt } => {
                    let new = self.asked.insert((step, direction, attempt));
                    assert!(new && !self.old.contains_key(&(step, direction, attempt)), "asked twice: {self:?}");
                    self.may_ask(definition, step, direction);
                }
                Command::Wake { step, direction, attempt, wait, .. } => {
                    self.timers.insert(((step, direction, attempt), wait == Wait::Pause));
                }
                Command::Stuck => assert_eq!(self.instance.going, Going::Stuck),
                Command::Ended(end) => self.is_over(definition, end),
            }
        }
    }

    /// What must hold when something is asked for.
    fn may_ask(&self, definition: &Definition, step: usize, direction: Direction) {
        let defined = &definition.steps[step];
        match direction {
            Direction::Do => {
                assert_eq!(self.instance.going, Going::Forward, "begun on the way back: {self:?}");
                let optional = |before: &usize| definition.steps[*before].optional;
                let settled = |before: &usize| {
                    self.done.contains(before) || optional(before) || self.at(*before) == Place::Skipped
                };
                assert!(defined.after.iter().all(settled), "before its turn: {self:?}");
            }
            Direction::Undo => {
                assert!(self.done.contains(&step), "never done: {self:?}");
                let waiting = self.asked.iter().any(|(other, way, _)| *other == step && *way == Direction::Do);
                assert!(!waiting, "it may be done after its undo: {self:?}");
                for behind in behind(definition, step) {
                    let taken_back = !self.done.contains(&behind)
                        || self.undone.contains(&behind)
                        || definition.steps[behind].undo.is_none()
                        || self.at(behind) == Place::Abandoned;
                    assert!(taken_back, "what rests on it is still there: {self:?}");
                }
            }
        }
    }

    fn is_over(&self, definition: &Definition, end: End) {
        for (step, defined) in definition.steps.iter().enumerate() {
            let (done, undone) = (self.done.contains(&step), self.undone.contains(&step));
            match end {
                End::Completed => {
                    let skipped = self.at(step) == Place::Skipped && !done;
                    assert!((done || skipped || defined.optional) && !undone, "{step}: {self:?}");
                }
                End::Compensated => {
                    let kept = defined.undo.is_none() || self.at(step) == Place::Abandoned;
                    assert!(done == undone || done && kept, "{step}: {self:?}");
                    let may_be_done = self.asked.iter().any(|(other, way, _)| *other == step && *way == Direction::Do);
                    assert!(!may_be_done || self.at(step) == Place::Abandoned, "{step} may still be done: {self:?}");
                }
            }
        }
    }

    fn at(&self, step: usize) -> Place {
        self.instance.steps[step].place
    }

    /// Every world that may come next.
    fn next(&self, definition: &Definition) -> Vec<Self> {
        let mut all = Vec::new();
        for attempt in &self.asked {
            let results = [
                Some(Ok(())),
                (self.trouble.failures > 0).then_some(Err(true)),
                (self.trouble.failures > 0).then_some(Err(false)),
            ];
            for result in results.into_iter().flatten() {
                let mut next = self.clone();
                next.asked.remove(attempt);
                if result.is_ok() {
                    if attempt.1 == Direction::Do {
                        next.done.insert(attempt.0)
                    } else {
                        next.undone.insert(attempt.0)
                    };
                } else {
                    next.trouble.failures -= 1;
                }
                next.answers.insert(*attempt, result);
                all.push(next);
            }
        }
        for (attempt, result) in &self.answers {
            let mut next = self.clone();
            next.answers.remove(attempt);
            next.old.insert(*attempt, *result);
            next.tell(definition, answer(*attempt, *result));
            all.push(next);
        }
        for (attempt, result) in self.old.iter().filter(|_| self.trouble.repeats > 0) {
            let mut next = self.clone();
            next.trouble.repeats -= 1;
            next.tell(definition, answer(*attempt, *result));
            all.push(next);
        }
        for timer in &self.timers {
            let ((step, direction, attempt), pause) = *timer;
            // The end of a pause is waited for; a timeout is trouble, also one that fires as the answer comes.
            if !pause && self.trouble.timeouts == 0 {
                continue;
            }
            let mut next = self.clone();
            next.timers.remove(timer);
            next.trouble.timeouts -= u8::from(!pause);
            let wait = if pause { Wait::Pause } else { Wait::Timeout };
            next.tell(definition, Fact::Woken { step, direction, attempt, wait });
            all.push(next);
        }
        for fact in [Fact::Resumed, Fact::Cancelled].into_iter().filter(|_| self.trouble.persons > 0) {
            let mut next = self.clone();
            next.trouble.persons -= 1;
            next.tell(definition, fact);
            all.push(next);
        }
        all
    }
}

fn answer((step, direction, attempt): Attempt, result: Result<(), bool>) -> Fact {
    match result {
        Ok(()) => Fact::Done { step, direction, attempt },
        Err(permanent) => Fact::Failed { step, direction, attempt, permanent },
    }
}

/// All that rests on a step.
fn behind(definition: &Definition, step: usize) -> BTreeSet<usize> {
    let mut all = BTreeSet::new();
    let mut next = vec![step];
    while let Some(step) = next.pop() {
        next.extend(definition.steps[step].before.iter().filter(|behind| all.insert(**behind)));
    }
    all
}

/// Goes through every world; returns how many there are, and how those ended in which nothing more comes.
fn walk(trouble: Trouble, holds: bool) -> (usize, BTreeMap<&'static str, usize>) {
    let definition = definition();
    let first = World::new(&definition, trouble, holds);
    let (mut seen, mut open) = (HashSet::from([first.clone()]), vec![first]);
    let mut ends = BTreeMap::new();
    while let Some(world) = open.pop() {
        let quiet = world.asked.is_empty() && world.answers.is_empty() && !world.timers.iter().any(|timer| timer.1);
        if quiet {
            let end = match world.instance.going {
                Going::Ended(End::Completed) => "completed",
                Going::Ended(End::Compensated) => "compensated",
                Going::Stuck => "stuck",
                Going::Forward | Going::Back => panic!("it stands still: {world:?}"),
            };
            *ends.entry(end).or_default() += 1;
        }
        for next in world.next(&definition) {
            if seen.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    (seen.len(), ends)
}

#[test]
fn every_world_ends_and_what_was_done_is_undone() {
    let trouble = |failures, timeouts, repeats, persons| Trouble { failures, timeouts, repeats, persons };
    let mut all: BTreeMap<&str, usize> = BTreeMap::new();
    for (trouble, holds) in [
        (trouble(0, 0, 1, 0), true),
        (trouble(2, 0, 0, 0), true),
        (trouble(1, 1, 0, 0), true),
        (trouble(0, 2, 0, 0), false),
        (trouble(1, 0, 1, 0), false),
        (trouble(1, 0, 0, 1), true),
        (trouble(0, 1, 0, 1), false),
        (trouble(3, 0, 0, 1), true),
        (trouble(2, 1, 1, 0), true),
        (trouble(1, 1, 0, 1), false),
    ] {
        let (worlds, ends) = walk(trouble, holds);
        assert!(worlds > 30, "{trouble:?}: only {worlds} worlds");
        ends.into_iter().for_each(|(end, n)| *all.entry(end).or_default() += n);
    }
    assert_eq!(all.keys().copied().collect::<Vec<_>>(), ["compensated", "completed", "stuck"]);
}
