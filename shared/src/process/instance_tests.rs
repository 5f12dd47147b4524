//! Every order of answers, timers, repeats, unknown ends and silences of two processes, state by state.
use super::super::definition::Draft;
use super::*;
use crate::pattern::Pattern;
use crate::retry::Policy;
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// A step that may be undone, after these.
fn draft(name: &str, after: &[&str]) -> Draft {
    Draft {
        name: name.into(),
        action: format!("{name}.do"),
        undo: Some(format!("{name}.undo")),
        after: after.iter().map(|name| (*name).to_owned()).collect(),
        ..Draft::default()
    }
}

/// a, then b and c side by side; d after b, and e when both ways are gone. b may be skipped, c is asked for twice at most and so
/// is its undo, e is optional and stays as it is.
fn definition() -> Definition {
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

/// a, then an optional o, which is asked for twice at most, then z; a and o may be undone.
fn optional() -> Definition {
    let retry = Some(Policy { attempts: 2, ..Policy::default() });
    let drafts = vec![
        draft("a", &[]),
        Draft { optional: true, retry, ..draft("o", &["a"]) },
        Draft { undo: None, last: true, ..draft("z", &["o"]) },
    ];
    Definition::new("three", Pattern::parse("begin").expect("valid"), drafts).expect("valid")
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
    /// Ends that do not say whether it was done.
    unknowns: u8,
    /// Events that are never answered, done or not.
    silences: u8,
}

/// What an answer says: done, or whether trying again could help and whether it is certain that nothing was done.
type Said = Result<(), (bool, bool)>;

/// An instance, and all that is on its way to or from it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    instance: Instance,
    /// Events that ask, not handled yet.
    asked: BTreeSet<Attempt>,
    /// Answers on their way.
    answers: BTreeMap<Attempt, Said>,
    /// Taken and never answered: their timeouts come for certain.
    silent: BTreeSet<Attempt>,
    /// Timers that run; one that fires late is a repeat of nothing.
    timers: BTreeSet<(Attempt, u8)>,
    /// Answered already: may come again.
    old: BTreeMap<Attempt, Said>,
    /// Whether a person had it go on although somebody had not answered.
    resumed: bool,
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
            silent: BTreeSet::new(),
            resumed: false,
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
                    self.timers.insert(((step, direction, attempt), wait as u8));
                }
                Command::Stuck => assert!(matches!(self.instance.going, Going::Stuck | Going::Held), "{self:?}"),
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
                let unsure = self.instance.steps[step].unsure;
                assert!(self.done.contains(&step) || unsure, "never done: {self:?}");
                let waiting = self.asked.iter().any(|(other, way, _)| *other == step && *way == Direction::Do);
                assert!(!waiting || self.resumed, "it may be done after its undo: {self:?}");
                // What an optional step may have done goes at once: nothing rests on it.
                for behind in behind(definition, step).into_iter().filter(|_| self.instance.going != Going::Forward) {
                    let taken_back = !self.done.contains(&behind)
                        || definition.steps[step].optional
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
                    let without = defined.optional
                        && (!done || undone || defined.undo.is_none() || self.at(step) == Place::Abandoned);
                    let counts = self.at(step) == Place::Done && done && !undone;
                    assert!(counts || skipped || without || self.resumed, "{step}: {self:?}");
                }
                End::Compensated => {
                    let kept = defined.undo.is_none() || self.at(step) == Place::Abandoned;
                    assert!(!done || undone || kept, "{step} is still there: {self:?}");
                    let open = self.at(step) == Place::Unknown && !defined.optional;
                    assert!(!open, "nobody was asked what became of {step}: {self:?}");
                    assert!(!undone || done || self.instance.steps[step].unsure, "{step} never was: {self:?}");
                    let may_be_done = self.asked.iter().any(|(other, way, _)| *other == step && *way == Direction::Do);
                    assert!(
                        !may_be_done || self.at(step) == Place::Abandoned || self.resumed,
                        "{step} may still be done: {self:?}"
                    );
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
            let Trouble { failures, unknowns, silences, .. } = self.trouble;
            // What is answered, if anything; whether it is done; and what trouble that is.
            let ends = [
                (Some(Ok(())), true, [0, 0, 0]),
                (Some(Err((true, true))), false, [1, 0, 0]),
                (Some(Err((false, true))), false, [1, 0, 0]),
                (Some(Err((false, false))), true, [0, 1, 0]),
                (Some(Err((false, false))), false, [0, 1, 0]),
                (Some(Err((true, false))), true, [0, 1, 0]),
                (None, true, [0, 0, 1]),
                (None, false, [0, 0, 1]),
            ];
            for (said, is_done, [failure, unknown, silence]) in ends {
                if failure > failures || unknown > unknowns || silence > silences {
                    continue;
                }
                let mut next = self.clone();
                next.asked.remove(attempt);
                next.trouble.failures -= failure;
                next.trouble.unknowns -= unknown;
                next.trouble.silences -= silence;
                if is_done {
                    let whose = if attempt.1 == Direction::Do { &mut next.done } else { &mut next.undone };
                    whose.insert(attempt.0);
                }
                match said {
                    Some(said) => drop(next.answers.insert(*attempt, said)),
                    None => drop(next.silent.insert(*attempt)),
                }
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
            let ((step, direction, attempt), wait) = *timer;
            // The end of a pause or a grace is waited for; a timeout is trouble, also one that fires as the answer comes.
            let is_trouble = !self.must_fire(timer);
            if is_trouble && self.trouble.timeouts == 0 {
                continue;
            }
            let mut next = self.clone();
            next.timers.remove(timer);
            next.trouble.timeouts -= u8::from(is_trouble);
            let waits = [Wait::Timeout, Wait::Pause, Wait::Grace];
            let wait = *waits.iter().find(|other| **other as u8 == wait).expect("one of them");
            next.tell(definition, Fact::Woken { step, direction, attempt, wait });
            all.push(next);
        }
        for fact in [Fact::Resumed, Fact::Cancelled].into_iter().filter(|_| self.trouble.persons > 0) {
            let mut next = self.clone();
            next.trouble.persons -= 1;
            next.resumed |= fact == Fact::Resumed || next.instance.going != Going::Forward;
            next.tell(definition, fact);
            all.push(next);
        }
        all
    }
}

impl World {
    fn must_fire(&self, (attempt, wait): &(Attempt, u8)) -> bool {
        *wait != Wait::Timeout as u8 || self.silent.contains(attempt)
    }
}

fn answer((step, direction, attempt): Attempt, said: Said) -> Fact {
    match said {
        Ok(()) => Fact::Done { step, direction, attempt },
        Err((permanent, certain)) => Fact::Failed { step, direction, attempt, permanent, certain },
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
fn walk(definition: &Definition, trouble: Trouble, holds: bool) -> (usize, BTreeMap<&'static str, usize>) {
    let first = World::new(definition, trouble, holds);
    let (mut seen, mut open) = (HashSet::from([first.clone()]), vec![first]);
    let mut ends = BTreeMap::new();
    while let Some(world) = open.pop() {
        let fires = world.timers.iter().any(|timer| world.must_fire(timer));
        let quiet = world.asked.is_empty() && world.answers.is_empty() && !fires;
        if quiet {
            let end = match world.instance.going {
                Going::Ended(End::Completed) => "completed",
                Going::Ended(End::Compensated) => "compensated",
                Going::Stuck => "stuck",
                Going::Held => "held",
                Going::Forward | Going::Back => panic!("it stands still: {world:?}"),
            };
            *ends.entry(end).or_default() += 1;
        }
        for next in world.next(definition) {
            if seen.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    (seen.len(), ends)
}

#[test]
fn every_world_ends_and_what_was_done_is_undone() {
    let trouble = |failures, timeouts, repeats, persons| Trouble {
        failures,
        timeouts,
        repeats,
        persons,
        unknowns: 0,
        silences: 0,
    };
    let unsure = |unknowns, silences, persons| Trouble { unknowns, silences, ..trouble(0, 0, 0, persons) };
    let (five, three) = (definition(), optional());
    let mut all: BTreeMap<&str, usize> = BTreeMap::new();
    for (definition, trouble, holds) in [
        (&five, trouble(0, 0, 1, 0), true),
        (&five, trouble(2, 0, 0, 0), true),
        (&five, trouble(1, 1, 0, 0), true),
        (&five, trouble(0, 2, 0, 0), false),
        (&five, trouble(1, 0, 1, 0), false),
        (&five, trouble(1, 0, 0, 1), true),
        (&five, trouble(0, 1, 0, 1), false),
        (&five, trouble(3, 0, 0, 1), true),
        (&five, trouble(2, 1, 1, 0), true),
        (&five, trouble(1, 1, 0, 1), false),
        (&five, unsure(1, 0, 0), true),
        (&five, unsure(0, 1, 0), true),
        (&five, Trouble { failures: 1, ..unsure(1, 0, 0) }, false),
        (&five, Trouble { failures: 1, ..unsure(0, 1, 0) }, false),
        (&three, Trouble { failures: 1, ..unsure(1, 1, 1) }, true),
        (&three, Trouble { timeouts: 1, repeats: 1, ..unsure(1, 1, 1) }, true),
        (&three, Trouble { timeouts: 2, ..unsure(0, 0, 2) }, true),
        (&three, Trouble { failures: 1, timeouts: 1, ..unsure(1, 0, 1) }, true),
    ] {
        let (worlds, ends) = walk(definition, trouble, holds);
        assert!(worlds > 30, "{trouble:?}: only {worlds} worlds");
        ends.into_iter().for_each(|(end, n)| *all.entry(end).or_default() += n);
    }
    assert_eq!(all.keys().copied().collect::<Vec<_>>(), ["compensated", "completed", "held", "stuck"]);
}

/// An instance of a single step, told these facts; the commands of each.
fn told(draft: Draft, facts: &[Fact]) -> (Instance, Vec<Vec<Command>>) {
    let draft = Draft { name: "charge".into(), action: "pay".into(), undo: Some("refund".into()), ..draft };
    let definition = Definition::new("one", Pattern::parse("begin").expect("valid"), vec![draft]).expect("valid");
    let mut instance = Instance::new(&definition);
    let mut take = |fact: &Fact| instance.take(*fact, &definition, |_| Some(true), 0.5).unwrap_or_default();
    let commands = [Fact::Begun].iter().chain(facts).map(&mut take).collect();
    (instance, commands)
}

const UNKNOWN: Fact = Fact::Failed { step: 0, direction: Direction::Do, attempt: 1, permanent: false, certain: false };
const LATE: Fact = Fact::Woken { step: 0, direction: Direction::Do, attempt: 1, wait: Wait::Timeout };
const PATIENCE_ENDED: Fact = Fact::Woken { step: 0, direction: Direction::Do, attempt: 1, wait: Wait::Grace };
const UNDO: Command = Command::Send { step: 0, direction: Direction::Undo, attempt: 1 };

#[test]
fn only_a_refusal_is_taken_for_not_done() {
    let (instance, commands) = told(Draft::default(), &[UNKNOWN]);
    assert_eq!((instance.going, commands[1].contains(&UNDO)), (Going::Back, true));
    let refused = Fact::Failed { step: 0, direction: Direction::Do, attempt: 1, permanent: true, certain: true };
    let (instance, commands) = told(Draft::default(), &[refused]);
    assert_eq!((instance.going, commands[1].contains(&UNDO)), (Going::Ended(End::Compensated), false));
    // The first attempt may have done it, whatever the second is told.
    let twice = Draft { retry: Some(Policy { attempts: 2, ..Policy::default() }), ..Draft::default() };
    let again = Fact::Woken { step: 0, direction: Direction::Do, attempt: 1, wait: Wait::Pause };
    let refused = Fact::Failed { step: 0, direction: Direction::Do, attempt: 2, permanent: true, certain: true };
    let (_, commands) = told(twice, &[UNKNOWN, again, refused]);
    assert!(commands[3].contains(&UNDO), "{commands:?}");
}

#[test]
fn an_answer_that_never_comes_calls_a_person_and_one_that_comes_after_that_still_counts() {
    let (instance, commands) = told(Draft::default(), &[LATE, PATIENCE_ENDED]);
    assert_eq!(instance.going, Going::Stuck);
    assert!(instance.steps[0].is_overdue() && commands[2].contains(&Command::Stuck), "{commands:?}");
    let done = Fact::Done { step: 0, direction: Direction::Do, attempt: 1 };
    let (instance, commands) = told(Draft::default(), &[LATE, PATIENCE_ENDED, done]);
    assert_eq!((instance.going, commands[3].contains(&UNDO)), (Going::Back, true));
    let (instance, commands) = told(Draft::default(), &[LATE, PATIENCE_ENDED, Fact::Resumed]);
    assert_eq!((instance.going, commands[3].contains(&UNDO)), (Going::Back, true));
    let (instance, _) = told(Draft::default(), &[LATE, PATIENCE_ENDED, Fact::Cancelled]);
    assert_eq!((instance.going, instance.steps[0].place), (Going::Ended(End::Compensated), Place::Abandoned));
}

#[test]
fn what_an_optional_step_may_have_done_goes_before_the_process_is_completed() {
    let optional = || Draft { optional: true, ..Draft::default() };
    let undone = Fact::Done { step: 0, direction: Direction::Undo, attempt: 1 };
    let (instance, commands) = told(optional(), &[UNKNOWN, undone]);
    assert!(commands[1].contains(&UNDO), "{commands:?}");
    assert_eq!((instance.going, instance.steps[0].place), (Going::Ended(End::Completed), Place::Undone));
    let (instance, _) = told(optional(), &[LATE, PATIENCE_ENDED]);
    assert_eq!(instance.going, Going::Held);
    let (instance, _) = told(optional(), &[LATE, PATIENCE_ENDED, Fact::Resumed, undone]);
    assert_eq!(instance.going, Going::Ended(End::Completed));
}

#[test]
fn what_cannot_be_taken_back_and_may_be_done_calls_a_person_before_anything_is_undone() {
    let last = |optional| Draft {
        undo: None,
        last: true,
        optional,
        name: "z".into(),
        action: "z".into(),
        after: vec!["a".into()],
        ..Draft::default()
    };
    let first = Draft { name: "a".into(), action: "a".into(), undo: Some("b".into()), ..Draft::default() };
    let on = || Pattern::parse("begin").expect("valid");
    let definition = Definition::new("two", on(), vec![first, last(false)]).expect("valid");
    let failed =
        |permanent, certain| Fact::Failed { step: 1, direction: Direction::Do, attempt: 1, permanent, certain };
    let undo = Command::Send { step: 0, direction: Direction::Undo, attempt: 1 };
    let told = |facts: &[Fact]| {
        let mut instance = Instance::new(&definition);
        let mut take = |fact: Fact| instance.take(fact, &definition, |_| Some(true), 0.5).unwrap_or_default();
        let _ = (take(Fact::Begun), take(Fact::Done { step: 0, direction: Direction::Do, attempt: 1 }));
        let commands = facts.iter().flat_map(|fact| take(*fact)).collect::<Vec<_>>();
        (instance.going, commands.contains(&undo))
    };
    assert_eq!(told(&[failed(false, false)]), (Going::Stuck, false));
    assert_eq!(told(&[failed(false, false), Fact::Resumed]), (Going::Back, true));
    assert_eq!(told(&[failed(false, false), Fact::Cancelled]), (Going::Back, true));
    assert_eq!(told(&[failed(true, false)]), (Going::Back, true), "it was refused in the end");
    assert_eq!(told(&[failed(true, true)]), (Going::Back, true));
}

#[test]
fn an_instance_of_an_earlier_version_is_read() {
    let old = r#"{"going":"Back","steps":[{"place":{"Running":{"attempt":1}},"open":1},{"place":"Late","open":2}]}"#;
    let instance: Instance = serde_json::from_str(old).expect("as it was written");
    assert!(!instance.steps[1].is_overdue() && instance.steps[1].open == 2);
}
