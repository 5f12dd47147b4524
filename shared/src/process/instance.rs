//! The state of one instance, and what follows from each fact.
//!
//! ```text
//! Forward ── every step settled ──────────────────────────────▶ Ended(Completed)
//!   ▲ │ └── a step fails, or a person cancels ───▶ Back ──────▶ Ended(Compensated)
//!   │ ▼                                             ▲ │ an undo fails for good, or nobody answers;
//!  Held: as Stuck, on the way forth      resumed ───┘ ▼ nothing else moves
//!                                                   Stuck
//!
//! a step:  Waiting ─▶ Running ─▶ Done ──────┬─▶ Undoing ─▶ Undone
//!             │         │  ▲                │      │  ▲
//!             ▼         ▼  └ Pausing        │      ▼  └ UndoPausing, Stuck
//!          Skipped    Failed, Unknown ──────┘
//!                     Late ─▶ Done | Failed | Unknown
//! ```
//!
//! What was done, or may have been done, is undone, children before parents, and nothing else is. Only a refusal is certain
//! (`Failed`); a step of which any attempt ended in another way is `Unknown`. A step that did not answer in time may still do its
//! work: it is `Late`, and nothing that it rests on is undone until it has answered, so an undo never overtakes what it takes
//! back. An answer that does not come for one more timeout is not waited for any longer: a person is called.
use super::definition::Definition;
use crate::retry::{Failure, Verdict};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Whether a step is asked for or taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Direction {
    /// It is asked for.
    Do,
    /// It is taken back.
    Undo,
}

/// Where a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Place {
    /// For the steps before it, or for ever where the process is taken back.
    Waiting,
    /// Its condition does not hold.
    Skipped,
    /// It was asked for.
    Running {
        /// For the how-many-th time.
        attempt: u32,
    },
    /// It failed and is asked for again after a pause.
    Pausing {
        /// The attempt that failed.
        attempt: u32,
    },
    /// It did not answer in time and is not asked again: it may still be done.
    Late,
    /// It is done.
    Done,
    /// It failed for good: it is certain that it is not done.
    Failed,
    /// It failed for good, and nobody can tell whether it is done: it is taken back as if it were, or a person has to look.
    Unknown,
    /// Its undo was asked for.
    Undoing {
        /// For the how-many-th time.
        attempt: u32,
    },
    /// Its undo failed and is asked for again after a pause.
    UndoPausing {
        /// The attempt that failed.
        attempt: u32,
    },
    /// It is taken back.
    Undone,
    /// Its undo failed for good: a person has to look.
    Stuck {
        /// The attempt that failed.
        attempt: u32,
    },
    /// A person gave it up as it is.
    Abandoned,
}

/// A step of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct State {
    /// Where it stands.
    pub place: Place,
    /// The attempts that were not answered, a bit each.
    open: u64,
    /// Whether an attempt ended in a way that does not tell whether it was done.
    #[serde(default)]
    unsure: bool,
    /// How long what is not answered is still waited for.
    #[serde(default)]
    grace: Grace,
}

/// How long what is not answered is still waited for, once nothing else is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Grace {
    /// As long as the step's timeout says.
    #[default]
    Unset,
    /// One more timeout.
    Set,
    /// No longer: a person has to look.
    Over,
}

impl State {
    /// Whether it is waited, for a time, for answers that are late.
    #[must_use]
    pub fn has_grace(&self) -> bool {
        self.grace == Grace::Set && self.open != 0 && matches!(self.place, Place::Late | Place::Done)
    }

    /// Whether a person has to look why nobody answers.
    #[must_use]
    pub fn is_overdue(&self) -> bool {
        self.grace == Grace::Over && self.open != 0 && matches!(self.place, Place::Late | Place::Done)
    }
}

/// How an instance ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum End {
    /// Every step is done, skipped, or failed and optional.
    Completed,
    /// What was done, or may have been, is undone.
    Compensated,
}

/// Which way an instance goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Going {
    /// Steps are asked for.
    Forward,
    /// Steps are taken back.
    Back,
    /// On the way back an undo failed for good, or somebody does not answer.
    Stuck,
    /// On the way forth, with an optional step, the same.
    Held,
    /// It is over.
    Ended(End),
}

/// Why an instance wants to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Wait {
    /// The step may not have answered by then.
    Timeout,
    /// The pause before the next attempt is over.
    Pause,
    /// An answer that is late is not waited for any longer.
    Grace,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fact {
    /// The starting event came.
    Begun,
    /// An attempt succeeded.
    Done {
        /// Of which step.
        step: usize,
        /// Which way.
        direction: Direction,
        /// Which one.
        attempt: u32,
    },
    /// An attempt failed.
    Failed {
        /// Of which step.
        step: usize,
        /// Which way.
        direction: Direction,
        /// Which one.
        attempt: u32,
        /// Whether trying again cannot help.
        permanent: bool,
        /// Whether it is certain that it did nothing.
        certain: bool,
    },
    /// The time of an attempt is over.
    Woken {
        /// Of which step.
        step: usize,
        /// Which way.
        direction: Direction,
        /// Which one.
        attempt: u32,
        /// Which time.
        wait: Wait,
    },
    /// A person has an instance that is stuck go on.
    Resumed,
    /// A person has it taken back; or, where it is taken back already, gives up what does not end.
    Cancelled,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Send the event that asks for a step, or takes it back.
    Send {
        /// Which step.
        step: usize,
        /// Which way.
        direction: Direction,
        /// Which attempt: part of the event's identity.
        attempt: u32,
    },
    /// Say so after a time.
    Wake {
        /// Of which step.
        step: usize,
        /// Which way.
        direction: Direction,
        /// Which attempt.
        attempt: u32,
        /// After so long.
        after: Duration,
        /// What for.
        wait: Wait,
    },
    /// Call a person.
    Stuck,
    /// Tell that it is over.
    Ended(End),
}

/// An instance of a process.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Instance {
    /// Which way it goes.
    pub going: Going,
    /// Its steps, in the definition's order.
    pub steps: Vec<State>,
}

impl Instance {
    /// An instance that has not begun.
    #[must_use]
    pub fn new(definition: &Definition) -> Self {
        let waiting = State { place: Place::Waiting, open: 0, unsure: false, grace: Grace::Unset };
        Self { going: Going::Forward, steps: vec![waiting; definition.steps.len()] }
    }

    /// Takes a fact; returns what is to be done, or nothing where the fact changes nothing: it was known, or came too late.
    /// `judge` says whether a step's condition holds, none where that cannot be told. `chance` in 0..1 is the jitter.
    #[must_use]
    pub fn take(
        &mut self,
        fact: Fact,
        definition: &Definition,
        judge: impl FnMut(usize) -> Option<bool>,
        chance: f64,
    ) -> Option<Vec<Command>> {
        if matches!(self.going, Going::Ended(_)) {
            return None;
        }
        let mut turn = Turn { instance: self, definition, chance, commands: Vec::new() };
        if !turn.take(fact) {
            return None;
        }
        turn.advance(judge);
        Some(turn.commands)
    }
}

struct Turn<'a> {
    instance: &'a mut Instance,
    definition: &'a Definition,
    chance: f64,
    commands: Vec<Command>,
}

impl Turn<'_> {
    /// Whether the fact changes anything.
    fn take(&mut self, fact: Fact) -> bool {
        match fact {
            Fact::Begun => {
                self.instance.steps.iter().all(|step| step.place == Place::Waiting) && self.is(Going::Forward)
            }
            Fact::Done { step, direction: Direction::Do, attempt } => self.done(step, attempt),
            Fact::Failed { step, direction: Direction::Do, attempt, permanent, certain } => {
                self.failed(step, attempt, permanent, certain)
            }
            Fact::Woken { step, direction: Direction::Do, attempt, wait: Wait::Timeout } => {
                self.at(step) == Place::Running { attempt } && self.again_or(step, attempt, false, Self::give_up)
            }
            Fact::Woken { step, direction: Direction::Do, attempt, wait: Wait::Pause } => {
                self.at(step) == Place::Pausing { attempt } && self.ask(step, Direction::Do, attempt + 1)
            }
            Fact::Done { step, direction: Direction::Undo, .. } => {
                let waits =
                    matches!(self.at(step), Place::Undoing { .. } | Place::UndoPausing { .. } | Place::Stuck { .. });
                if waits {
                    self.go(step, Place::Undone);
                    self.go_on();
                }
                waits
            }
            Fact::Failed { step, direction: Direction::Undo, attempt, permanent, .. } => {
                self.at(step) == Place::Undoing { attempt } && self.again_or(step, attempt, permanent, Self::call)
            }
            Fact::Woken { step, direction: Direction::Undo, attempt, wait: Wait::Timeout } => {
                self.at(step) == Place::Undoing { attempt } && self.again_or(step, attempt, false, Self::call)
            }
            Fact::Woken { step, direction: Direction::Undo, attempt, wait: Wait::Pause } => {
                self.at(step) == Place::UndoPausing { attempt } && self.ask(step, Direction::Undo, attempt + 1)
            }
            Fact::Woken { step, wait: Wait::Grace, .. } => self.lose_patience(step),
            Fact::Resumed => self.resume(),
            Fact::Cancelled => self.cancel(),
        }
    }

    fn done(&mut self, step: usize, attempt: u32) -> bool {
        let answered = self.answer(step, attempt);
        // A dead letter of it may have been replayed.
        let is_new =
            matches!(self.at(step), Place::Running { .. } | Place::Pausing { .. } | Place::Late | Place::Unknown);
        if is_new {
            self.go(step, Place::Done);
        }
        if answered || is_new {
            self.go_on();
        }
        answered || is_new
    }

    fn failed(&mut self, step: usize, attempt: u32, permanent: bool, certain: bool) -> bool {
        if !self.answer(step, attempt) {
            return false;
        }
        // Of a step that cannot be taken back, a refusal is believed even where an earlier run of it was cut off: a service that keeps
        // to its idempotency key would not refuse what it did, and a person can do no better.
        self.instance.steps[step].unsure |= !certain && (!permanent || self.definition.steps[step].undo.is_some());
        self.go_on();
        match self.at(step) {
            Place::Running { attempt: current } if current == attempt => {
                self.again_or(step, attempt, permanent, Self::give_up)
            }
            Place::Late => {
                self.leave(step);
                true
            }
            _ => true,
        }
    }

    /// Something moved: what was called stuck may be so no longer.
    fn go_on(&mut self) {
        self.instance.going = match self.instance.going {
            Going::Stuck => Going::Back,
            Going::Held => Going::Forward,
            going => going,
        };
    }

    fn lose_patience(&mut self, step: usize) -> bool {
        let state = &mut self.instance.steps[step];
        let loses = state.has_grace();
        if loses {
            state.grace = Grace::Over;
        }
        loses
    }

    /// What does not answer is taken for something that may be done.
    fn presume(&mut self, step: usize) {
        let state = &mut self.instance.steps[step];
        (state.open, state.unsure) = (0, true);
        if state.place == Place::Late {
            self.leave(step);
            self.accept(step);
        }
    }

    /// A person knows of it, and nothing else can be done about it.
    fn accept(&mut self, step: usize) -> bool {
        let accepts = self.is_open(step);
        if accepts {
            self.go(step, Place::Abandoned);
        }
        accepts
    }

    /// Whether it may be done and cannot be taken back, so that only a person can tell how to go on.
    fn is_open(&self, step: usize) -> bool {
        let defined = &self.definition.steps[step];
        self.at(step) == Place::Unknown && defined.undo.is_none() && !defined.optional
    }

    /// Notes that an attempt was answered; whether it was not before.
    fn answer(&mut self, step: usize, attempt: u32) -> bool {
        let open = &mut self.instance.steps[step].open;
        let was = *open;
        *open &= !bit(attempt);
        was != *open
    }

    /// Tries once more after a pause, or else what is given.
    fn again_or(&mut self, step: usize, attempt: u32, permanent: bool, or: fn(&mut Self, usize, u32)) -> bool {
        let forth = matches!(self.at(step), Place::Running { .. });
        let failure = if permanent { Failure::Permanent } else { Failure::Transient { after: None } };
        let verdict = self.definition.steps[step].retry.judge(attempt, failure, self.chance);
        match verdict {
            // What is taken back is not begun again.
            Verdict::Retry(after) if !forth || self.is(Going::Forward) => {
                let (place, direction) = if forth {
                    (Place::Pausing { attempt }, Direction::Do)
                } else {
                    (Place::UndoPausing { attempt }, Direction::Undo)
                };
                self.go(step, place);
                self.commands.push(Command::Wake { step, direction, attempt, after, wait: Wait::Pause });
            }
            _ => or(self, step, attempt),
        }
        true
    }

    fn give_up(&mut self, step: usize, _: u32) {
        self.leave(step);
        if !self.definition.steps[step].optional && self.is(Going::Forward) {
            self.turn_back();
        }
    }

    /// No more attempts; where one was not answered, it may still be done.
    fn leave(&mut self, step: usize) {
        let State { open, unsure, .. } = self.instance.steps[step];
        self.go(
            step,
            if open != 0 {
                Place::Late
            } else if unsure {
                Place::Unknown
            } else {
                Place::Failed
            },
        );
    }

    fn call(&mut self, step: usize, attempt: u32) {
        self.go(step, Place::Stuck { attempt });
    }

    fn turn_back(&mut self) {
        self.instance.going = Going::Back;
        for step in 0..self.instance.steps.len() {
            if matches!(self.at(step), Place::Pausing { .. }) {
                self.leave(step);
            }
        }
    }

    fn resume(&mut self) -> bool {
        if !self.is(Going::Stuck) && !self.is(Going::Held) {
            return false;
        }
        self.go_on();
        for step in 0..self.instance.steps.len() {
            if self.instance.steps[step].is_overdue() {
                self.presume(step);
            } else if let Place::Stuck { attempt } = self.at(step) {
                self.ask(step, Direction::Undo, attempt + 1);
            }
            self.accept(step);
        }
        true
    }

    fn cancel(&mut self) -> bool {
        if self.is(Going::Forward) || self.is(Going::Held) {
            self.turn_back();
            return true;
        }
        let mut gave_up = false;
        for step in 0..self.instance.steps.len() {
            if matches!(self.at(step), Place::Late | Place::Stuck { .. }) {
                self.go(step, Place::Abandoned);
                gave_up = true;
            } else if self.instance.steps[step].is_overdue() {
                // It is done: that it is not undone is no less than its undo has to say.
                self.presume(step);
                gave_up = true;
            }
            gave_up |= self.accept(step);
        }
        if gave_up {
            self.go_on();
        }
        gave_up
    }

    fn ask(&mut self, step: usize, direction: Direction, attempt: u32) -> bool {
        let state = &mut self.instance.steps[step];
        state.place = match direction {
            Direction::Do => {
                state.open |= bit(attempt);
                Place::Running { attempt }
            }
            Direction::Undo => Place::Undoing { attempt },
        };
        let after = self.definition.steps[step].timeout;
        self.commands.push(Command::Send { step, direction, attempt });
        self.commands.push(Command::Wake { step, direction, attempt, after, wait: Wait::Timeout });
        true
    }

    fn advance(&mut self, mut judge: impl FnMut(usize) -> Option<bool>) {
        // In the definition's order each step stands behind those before it: one pass is enough.
        for step in 0..self.instance.steps.len() {
            let defined = &self.definition.steps[step];
            // The process goes on without it, and what it may have done has to go.
            if self.is(Going::Forward) && self.at(step) == Place::Unknown && defined.undo.is_some() {
                self.ask(step, Direction::Undo, 1);
            }
            let ready = self.is(Going::Forward)
                && self.at(step) == Place::Waiting
                && defined.after.iter().all(|before| self.is_settled(*before));
            if !ready {
                continue;
            }
            match if defined.when.is_some() { judge(step) } else { Some(true) } {
                Some(true) => drop(self.ask(step, Direction::Do, 1)),
                Some(false) => self.go(step, Place::Skipped),
                None => self.give_up(step, 1),
            }
        }
        if self.is(Going::Forward) && (0..self.instance.steps.len()).all(|step| self.is_settled(step)) {
            self.complete();
        }
        if self.is(Going::Back) {
            self.take_back();
        }
        if !matches!(self.instance.going, Going::Ended(_)) {
            self.have_patience();
        }
    }

    /// Ends, once nothing of optional steps is left to take back.
    fn complete(&mut self) {
        let owed = |step: &usize| match self.at(*step) {
            Place::Late => self.definition.steps[*step].undo.is_some(),
            Place::Undoing { .. } | Place::UndoPausing { .. } | Place::Stuck { .. } => true,
            _ => false,
        };
        let owed: Vec<usize> = (0..self.instance.steps.len()).filter(owed).collect();
        if owed.is_empty() {
            self.end(End::Completed);
        } else if !owed.iter().any(|step| self.moves(*step)) {
            self.instance.going = Going::Held;
            self.commands.push(Command::Stuck);
        }
    }

    /// What is late is waited for, but not for ever.
    fn have_patience(&mut self) {
        for (step, defined) in self.definition.steps.iter().enumerate() {
            let state = &mut self.instance.steps[step];
            let waited_for = match state.place {
                Place::Late => true,
                Place::Done => state.open != 0 && self.instance.going == Going::Back,
                _ => false,
            };
            if waited_for && state.grace == Grace::Unset {
                state.grace = Grace::Set;
                let (direction, attempt, wait) = (Direction::Do, 1, Wait::Grace);
                self.commands.push(Command::Wake { step, direction, attempt, after: defined.timeout, wait });
            }
        }
    }

    /// Undoes what is done and has nothing left behind it.
    fn take_back(&mut self) {
        let count = self.instance.steps.len();
        let mut rests_behind = vec![true; count];
        for step in (0..count).rev() {
            let defined = &self.definition.steps[step];
            rests_behind[step] = defined.before.iter().all(|behind| rests_behind[*behind] && self.rests(*behind));
            let answered = self.instance.steps[step].open == 0;
            let is_there = matches!(self.at(step), Place::Done | Place::Unknown);
            if is_there && answered && defined.undo.is_some() && rests_behind[step] {
                self.ask(step, Direction::Undo, 1);
            }
        }
        if (0..count).all(|step| self.rests(step)) {
            self.end(End::Compensated);
        } else if !(0..count).any(|step| self.moves(step)) {
            self.instance.going = Going::Stuck;
            self.commands.push(Command::Stuck);
        }
    }

    fn end(&mut self, end: End) {
        self.instance.going = Going::Ended(end);
        self.commands.push(Command::Ended(end));
    }

    /// Whether the steps behind it may begin.
    fn is_settled(&self, step: usize) -> bool {
        match self.at(step) {
            Place::Done | Place::Skipped => true,
            Place::Waiting | Place::Running { .. } | Place::Pausing { .. } => false,
            _ => self.definition.steps[step].optional,
        }
    }

    /// Whether, on the way back, nothing is to be done about it any more.
    fn rests(&self, step: usize) -> bool {
        match self.at(step) {
            Place::Waiting | Place::Skipped | Place::Failed | Place::Undone | Place::Abandoned => true,
            Place::Done => self.definition.steps[step].undo.is_none() && self.instance.steps[step].open == 0,
            Place::Unknown => self.definition.steps[step].undo.is_none() && !self.is_open(step),
            _ => false,
        }
    }

    /// Whether something will come of it without a person, where it does not rest.
    fn moves(&self, step: usize) -> bool {
        let state = &self.instance.steps[step];
        match state.place {
            Place::Running { .. } | Place::Undoing { .. } | Place::UndoPausing { .. } => true,
            Place::Late | Place::Done => state.open != 0 && !state.is_overdue(),
            _ => false,
        }
    }

    fn is(&self, going: Going) -> bool {
        self.instance.going == going
    }

    fn at(&self, step: usize) -> Place {
        self.instance.steps[step].place
    }

    fn go(&mut self, step: usize, place: Place) {
        self.instance.steps[step].place = place;
    }
}

/// An attempt's bit; from the sixty-fourth on they share one.
fn bit(attempt: u32) -> u64 {
    1 << attempt.saturating_sub(1).min(63)
}

#[cfg(test)]
#[path = "instance_tests.rs"]
mod tests;
