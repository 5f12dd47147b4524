//! What is kept of an instance, and its turns.
use super::{Plan, holds, last_hour, one};
use crate::store::{Change, Kept, State};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;
use uuid::Uuid;
use warren_shared::event::Value;
use warren_shared::process::wire::{Failed, INSTANCE, Name, STEP, TIMER, Try};
use warren_shared::process::{Command, Direction, End, Fact, Going, Instance, Place, Wait};
use warren_shared::{Event, Limits, Unreadable};

/// An instance, all of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The definition that it began under, whatever is deployed since.
    pub(crate) definition: Uuid,
    /// The key of its events.
    pub(crate) key: String,
    /// Extensions of the starting event that all its events have.
    carried: BTreeMap<String, String>,
    priority: Option<i64>,
    /// The data of the starting event.
    input: Box<RawValue>,
    results: BTreeMap<String, Box<RawValue>>,
    failures: BTreeMap<String, Failed>,
    pub(crate) instance: Instance,
    /// What it is to be woken for.
    waits: Vec<Waiting>,
    /// When timers that are on their way arrive.
    timers: BTreeSet<i64>,
    /// How many timers were set.
    set: u32,
    /// How often it was stuck.
    stuck: u32,
    /// Where what it waits for is more than an hour away: when that is. The store wakes it an hour before.
    #[serde(default)]
    due: Option<i64>,
    /// How many events caused one another until it began.
    #[serde(default)]
    hops: u32,
    pub(crate) history: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Waiting {
    due: i64,
    step: usize,
    direction: Direction,
    attempt: u32,
    wait: Wait,
}

/// Something that happened to an instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Milliseconds since 1970.
    pub(crate) at: i64,
    /// What, for people.
    pub(crate) what: String,
}

/// The input of expressions, and the data of questions.
#[derive(Serialize)]
struct Object<'a> {
    input: &'a RawValue,
    results: &'a BTreeMap<String, Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failures: Option<&'a BTreeMap<String, Failed>>,
}

/// What follows from an event.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    /// What is sent.
    pub(crate) emit: Vec<Event>,
    /// What comes back after a time.
    pub(crate) later: Option<(Duration, Event)>,
    /// Facts that sending brought about.
    facts: VecDeque<Fact>,
}

/// What surrounds a turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scene<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) name: &'a Name,
    pub(crate) pool: &'a str,
    pub(crate) limits: Limits,
    /// Milliseconds since 1970.
    pub(crate) now: i64,
    /// The jitter, 0..1.
    pub(crate) chance: f64,
}

/// Entries of a history; the oldest but the first go.
const HISTORY: usize = 1000;

impl Record {
    /// The instance that an event starts.
    pub(crate) fn new(plan: &Plan, event: &Event, hops: u32) -> Self {
        let text = |name: &&str| match event.extension(name) {
            Some(Value::Text(text)) => Some(((*name).to_owned(), text.clone())),
            _ => None,
        };
        Self {
            definition: plan.id,
            key: event.key().into_owned(),
            carried: ["traceparent", "tracestate"].iter().filter_map(text).collect(),
            priority: event.extension("priority").and_then(|value| match value {
                Value::Int(priority) => Some(*priority),
                _ => None,
            }),
            input: warren_shared::process::wire::result(event),
            results: BTreeMap::new(),
            failures: BTreeMap::new(),
            instance: Instance::new(&plan.definition),
            waits: Vec::new(),
            timers: BTreeSet::new(),
            set: 0,
            stuck: 0,
            due: None,
            hops,
            history: Vec::new(),
        }
    }

    /// The instance that a state holds.
    pub(crate) fn read(state: &State) -> Result<Self, String> {
        serde_json::from_slice(&state.body).map_err(|error| error.to_string())
    }

    /// What becomes of the state that held it.
    pub(crate) fn change(&self, name: &Name, kept: Option<&Kept>) -> Result<Change, String> {
        let body = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        let state = State {
            kind: "process".into(),
            name: name.process.clone(),
            status: self.status().into(),
            key: self.key.clone(),
            ended: matches!(self.instance.going, Going::Ended(_)),
            due: self.due,
            body,
        };
        Ok(Change { id: name.id, found: kept.map_or(0, |kept| kept.version), state })
    }

    /// Where it stands, in a word.
    pub(crate) fn status(&self) -> &'static str {
        match self.instance.going {
            Going::Forward => "running",
            Going::Back => "compensating",
            Going::Stuck | Going::Held => "stuck",
            Going::Ended(End::Completed) => "completed",
            Going::Ended(End::Compensated) => "compensated",
        }
    }

    /// What it waits for, step by step.
    pub(crate) fn waits_for(&self, plan: &Plan) -> Vec<String> {
        let step = |(state, step): (&warren_shared::process::State, &warren_shared::process::Step)| {
            let name = &step.name;
            Some(match state.place {
                _ if state.is_overdue() => format!("a person: {name} was never answered"),
                Place::Done if state.has_grace() => format!("{name}'s late answer"),
                Place::Running { attempt: 1 } => format!("{name} to be done"),
                Place::Running { attempt } => format!("{name} to be done (attempt {attempt})"),
                Place::Pausing { attempt } => format!("{name} to be asked for again after attempt {attempt}"),
                Place::Late => format!("{name}'s late answer"),
                Place::Undoing { .. } => format!("{name} to be undone"),
                Place::UndoPausing { attempt } => format!("{name} to be undone again after attempt {attempt}"),
                Place::Unknown if step.undo.is_none() && !step.optional => {
                    format!("a person: {name} may have been done and cannot be undone")
                }
                Place::Stuck { .. } => format!("a person: {name} could not be undone"),
                _ => return None,
            })
        };
        self.instance.steps.iter().zip(&plan.definition.steps).filter_map(step).collect()
    }

    /// What a timer that has come means; it was to come at `due`.
    pub(crate) fn woken(&mut self, due: i64, now: i64) -> Vec<Fact> {
        self.timers.remove(&due);
        // Whoever set it may have had a clock that is ahead of ours.
        let past = self.waits.iter().filter(|waiting| waiting.due <= now.max(due));
        past.map(|w| Fact::Woken { step: w.step, direction: w.direction, attempt: w.attempt, wait: w.wait }).collect()
    }

    /// Keeps what a step brought.
    pub(crate) fn answered(&mut self, step: &str, direction: Direction, answer: Result<Box<RawValue>, Failed>) {
        match (answer, direction) {
            // The first one counts: what follows may rest on it already.
            (Ok(result), Direction::Do) => drop(self.results.entry(step.into()).or_insert(result)),
            (Ok(_), Direction::Undo) => {}
            (Err(failed), Direction::Do) => drop(self.failures.insert(step.into(), failed)),
            (Err(failed), Direction::Undo) => drop(self.failures.insert(format!("undo.{step}"), failed)),
        }
    }

    /// How many events caused one another until the events that it sends.
    pub(crate) fn hops(&self) -> u32 {
        self.hops.saturating_add(1)
    }

    /// Why steps failed, by their names.
    pub(super) fn failures(&self) -> &BTreeMap<String, Failed> {
        &self.failures
    }

    /// Notes why a step cannot be asked for, or taken back.
    fn cannot(&mut self, step: &str, direction: Direction, error: String, now: i64) {
        self.note(
            now,
            format!(
                "{step} cannot be {}: {error}",
                match direction {
                    Direction::Do => "asked for",
                    Direction::Undo => "undone",
                }
            ),
        );
        self.answered(step, direction, Err(Failed::before("permanent", error)));
    }

    /// Notes what happened.
    pub(crate) fn note(&mut self, at: i64, what: String) {
        if self.history.len() >= HISTORY {
            self.history.remove(1);
        }
        self.history.push(Entry { at, what });
    }

    /// Takes facts, one after the other.
    ///
    /// # Errors
    /// An event cannot be made.
    pub(crate) fn take(&mut self, facts: Vec<Fact>, scene: &Scene<'_>) -> Result<Turn, Unreadable> {
        let mut turn = Turn { facts: facts.into(), ..Turn::default() };
        while let Some(fact) = turn.facts.pop_front() {
            let object = self.object(false);
            let mut faults = Vec::new();
            let judge = |step: usize| {
                let when = scene.plan.whens[step].as_ref()?;
                let holds = holds(when, &object, scene.limits.body);
                holds.map_err(|error| faults.push((step, error))).ok()
            };
            let commands = self.instance.take(fact, &scene.plan.definition, judge, scene.chance);
            for (step, error) in faults {
                let name = &scene.plan.definition.steps[step].name;
                tracing::warn!(instance = %scene.name, step = name, error, "the condition of step '{name}' fails");
                self.cannot(name, Direction::Do, format!("when: {error}"), scene.now);
            }
            if let (Some(_), Fact::Woken { step, direction, attempt, wait }) = (&commands, fact) {
                let step = scene.plan.definition.steps[step].name.clone();
                match wait {
                    Wait::Timeout => {
                        self.note(scene.now, format!("{}: no answer in time", Try { step, direction, attempt }))
                    }
                    Wait::Grace => self.note(scene.now, format!("{step}: still no answer, not waited for any longer")),
                    Wait::Pause => {}
                }
            }
            for command in commands.into_iter().flatten() {
                self.obey(command, scene, &mut turn)?;
            }
        }
        self.rearm(scene, &mut turn)?;
        Ok(turn)
    }

    fn obey(&mut self, command: Command, scene: &Scene<'_>, turn: &mut Turn) -> Result<(), Unreadable> {
        match command {
            Command::Send { step, direction, attempt } => match self.question(step, direction, attempt, scene)? {
                Ok(question) => {
                    let again = if attempt > 1 { format!(" (attempt {attempt})") } else { String::new() };
                    self.note(scene.now, format!("sent {}{again}", question.kind()));
                    turn.emit.push(question);
                }
                Err(error) => {
                    self.cannot(&scene.plan.definition.steps[step].name, direction, error, scene.now);
                    turn.facts.push_back(Fact::Failed { step, direction, attempt, permanent: true, certain: true });
                }
            },
            Command::Wake { step, direction, attempt, after, wait } => {
                let due = scene.now.saturating_add(i64::try_from(after.as_millis()).unwrap_or(i64::MAX));
                self.waits.push(Waiting { due, step, direction, attempt, wait });
            }
            Command::Stuck => {
                self.stuck += 1;
                self.note(scene.now, "stuck: a person has to look".into());
                let waits = self.waits_for(scene.plan).join(", ");
                tracing::error!(
                    instance = %scene.name,
                    key = self.key,
                    "process instance {} is stuck and waits for {waits}: see 'warren-worker process show {}'",
                    scene.name,
                    scene.name.id
                );
                turn.emit.push(self.told(scene, "stuck", &format!("stuck {}", self.stuck))?);
            }
            Command::Ended(_) => {
                let status = self.status();
                self.note(scene.now, status.into());
                turn.emit.push(self.told(scene, status, status)?);
            }
        }
        Ok(())
    }

    /// The event that asks for a step; or why its data cannot be made.
    fn question(
        &self,
        step: usize,
        direction: Direction,
        attempt: u32,
        scene: &Scene<'_>,
    ) -> Result<Result<Event, String>, Unreadable> {
        let defined = &scene.plan.definition.steps[step];
        let (kind, with) = match direction {
            Direction::Do => (&defined.action, scene.plan.withs[step].as_ref()),
            Direction::Undo => (defined.undo.as_ref().unwrap_or(&defined.action), scene.plan.undo_withs[step].as_ref()),
        };
        let object = self.object(false);
        let data = match with.map(|with| one(with, &object, scene.limits.body)) {
            None => object,
            Some(Ok(data)) => data,
            Some(Err(error)) => return Ok(Err(format!("with: {error}"))),
        };
        let asked = Try { step: defined.name.clone(), direction, attempt };
        let event = self.event(scene, kind, &format!("{asked}"))?.with(STEP, Value::Text(asked.to_string()))?;
        Ok(event.with_json(&data, scene.limits).map_err(|error| error.to_string()))
    }

    /// The event that tells the world.
    fn told(&self, scene: &Scene<'_>, word: &str, what: &str) -> Result<Event, Unreadable> {
        let kind = format!("{}.{word}", scene.plan.definition.name);
        let event = self.event(scene, &kind, what)?;
        // All that was gathered may be more than an event may hold.
        event.clone().with_json(&self.object(word != "completed"), scene.limits).or(Ok(event))
    }

    fn event(&self, scene: &Scene<'_>, kind: &str, what: &str) -> Result<Event, Unreadable> {
        let text = |text: &str| Value::Text(text.into());
        let time = jiff::Timestamp::from_millisecond(scene.now).unwrap_or_default().to_string();
        let event = Event::new(scene.name.derive(what), format!("/warren/{}", scene.pool), kind)?;
        let mut event = event.with("time", Value::Text(time))?.with("partitionkey", text(&self.key))?;
        event = event.with(INSTANCE, Value::Text(scene.name.to_string()))?;
        for (name, value) in &self.carried {
            event = event.with(name, text(value))?;
        }
        match self.priority {
            Some(priority) => event.with("priority", Value::Int(priority)),
            None => Ok(event),
        }
    }

    fn object(&self, failures: bool) -> Vec<u8> {
        let failures = failures.then_some(&self.failures);
        let object = Object { input: &self.input, results: &self.results, failures };
        serde_json::to_vec(&object).unwrap_or_default()
    }

    /// Has a timer come for the first of what is still waited for, unless one comes by then.
    fn rearm(&mut self, scene: &Scene<'_>, turn: &mut Turn) -> Result<(), Unreadable> {
        let Instance { going, steps } = &self.instance;
        self.waits.retain(|w| {
            let (Waiting { attempt, .. }, place) = (*w, steps[w.step].place);
            let wanted = match (w.direction, w.wait) {
                (_, Wait::Grace) => steps[w.step].has_grace(),
                (Direction::Do, Wait::Timeout) => place == Place::Running { attempt },
                (Direction::Do, Wait::Pause) => place == Place::Pausing { attempt },
                (Direction::Undo, Wait::Timeout) => place == Place::Undoing { attempt },
                (Direction::Undo, Wait::Pause) => place == Place::UndoPausing { attempt },
            };
            !matches!(going, Going::Ended(_)) && wanted
        });
        self.due = None;
        // A timer that never came is not waited for.
        self.timers.retain(|due| *due > scene.now);
        let Some(due) = self.waits.iter().map(|waiting| waiting.due).min() else { return Ok(()) };
        if self.timers.first().is_none_or(|first| due < *first) {
            let after = Duration::from_millis(u64::try_from(due.saturating_sub(scene.now)).unwrap_or(0));
            if after > last_hour() {
                self.due = Some(due);
                return Ok(());
            }
            self.timers.insert(due);
            self.set += 1;
            // Under a key of its own: the instance's key may be busy with the very step that takes too long.
            let timer = self.event(scene, TIMER, &format!("timer {}", self.set))?;
            let timer = timer.with("partitionkey", Value::Text(scene.name.to_string()))?;
            let data = serde_json::to_vec(&Due { due }).unwrap_or_default();
            turn.later = Some((after, timer.with_json(&data, scene.limits)?));
        }
        Ok(())
    }
}

/// The data of a timer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Due {
    /// When it was to come, in milliseconds since 1970.
    pub(crate) due: i64,
}
