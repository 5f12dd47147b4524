//! Business processes at work: what is kept of an instance, and what an event makes of it.
//!
//! The law is `warren_shared::process`; here it meets the store, the wire and jq. An instance is a state in the store: who
//! handles one of its events reads it, asks the law, and commits the new state together with the events that follow.
mod draw;
mod instances;
mod record;
mod watch;

pub(crate) use draw::{Style, draw};
pub(crate) use instances::{Instances, Order, Shown};
pub(crate) use record::{Due, Record, Scene};
pub(crate) use watch::watch;

use crate::jq::{self, Jq, Limits, TIME};
use crate::store::{State, Store};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;
use warren_shared::pattern::Pattern;
use warren_shared::process::wire::{DONE, FAILED};
use warren_shared::process::{Definition, Draft, Mistake};

/// A process that can run: its definition, with what is written in jq compiled.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Derived from all that is written: a definition that changes gets another one.
    pub(crate) id: Uuid,
    pub(crate) definition: Definition,
    written: String,
    whens: Vec<Option<Jq>>,
    withs: Vec<Option<Jq>>,
    undo_withs: Vec<Option<Jq>>,
}

/// A definition as the store keeps it, for the instances that it began.
#[derive(Debug, Serialize, Deserialize)]
struct Written {
    name: String,
    on: String,
    steps: Vec<Draft>,
}

impl Plan {
    /// Checks a definition and compiles its expressions.
    ///
    /// # Errors
    /// Every mistake.
    pub(crate) fn new(name: &str, on: Pattern, steps: Vec<Draft>) -> Result<Self, Vec<Mistake>> {
        let written = Written { name: name.into(), on: on.to_string(), steps };
        let text = serde_json::to_string(&written).unwrap_or_default();
        let (mut mistakes, mut compiled) = (Vec::new(), HashMap::new());
        for step in &written.steps {
            let texts = [("when", &step.when), ("with", &step.with), ("undo.with", &step.undo_with)];
            for (field, text) in texts.into_iter().filter_map(|(field, text)| Some((field, text.as_deref()?))) {
                match Jq::compile(text) {
                    Ok(program) => drop(compiled.insert((step.name.clone(), field), program)),
                    Err(error) => {
                        let problem = format!("'{field}': {error}");
                        mistakes.push(Mistake { step: Some(step.name.clone()), problem });
                    }
                }
            }
        }
        let definition = match Definition::new(name, on, written.steps) {
            Ok(definition) if mistakes.is_empty() => definition,
            Ok(_) => return Err(mistakes),
            Err(more) => return Err([more, mistakes].concat()),
        };
        // In the definition's order of the steps.
        let mut programs =
            |field| definition.steps.iter().map(|step| compiled.remove(&(step.name.clone(), field))).collect();
        Ok(Self {
            id: Uuid::new_v5(&Uuid::NAMESPACE_OID, text.as_bytes()),
            whens: programs("when"),
            withs: programs("with"),
            undo_withs: programs("undo.with"),
            definition,
            written: text,
        })
    }

    /// The definition that the store keeps under this id.
    ///
    /// # Errors
    /// It does not keep it, or not now, or this version cannot read it.
    pub(crate) async fn load(store: &dyn Store, id: Uuid) -> Result<Self, String> {
        let kept = store.load(vec![id]).await.map_err(|error| error.to_string())?.pop().flatten();
        let kept = kept.ok_or_else(|| format!("the store does not hold its definition {id}"))?;
        Self::read(&kept.state).map_err(|error| format!("its definition {id} cannot be read: {error}"))
    }

    /// The definition that a state holds.
    pub(crate) fn read(state: &State) -> Result<Self, String> {
        let written: Written = serde_json::from_slice(&state.body).map_err(|error| error.to_string())?;
        let on = Pattern::parse(&written.on).map_err(|error| error.to_string())?;
        Self::new(&written.name, on, written.steps)
            .map_err(|mistakes| mistakes.into_iter().map(|mistake| mistake.problem).collect::<Vec<_>>().join("; "))
    }

    /// The state that holds the definition.
    pub(crate) fn state(&self) -> State {
        State {
            kind: "definition".into(),
            name: self.definition.name.clone(),
            status: String::new(),
            key: String::new(),
            ended: false,
            due: None,
            body: self.written.clone().into_bytes(),
        }
    }

    /// The types of the events that answer its steps.
    pub(crate) fn answers(&self) -> Vec<Pattern> {
        let asked = self.definition.steps.iter().flat_map(|step| [Some(&step.action), step.undo.as_ref()]).flatten();
        let both = asked.flat_map(|kind| [DONE, FAILED].map(|ending| format!("{kind}{ending}")));
        let mut answers: Vec<String> = both.collect();
        answers.sort_unstable();
        answers.dedup();
        answers.iter().filter_map(|kind| Pattern::parse(kind).ok()).collect()
    }

    /// Whether a decision may compute for long.
    pub(crate) fn computes(&self) -> bool {
        self.whens.iter().chain(&self.withs).chain(&self.undo_withs).any(Option::is_some)
    }
}

/// Whether a condition holds.
fn holds(when: &Jq, input: &[u8], output: usize) -> Result<bool, String> {
    let outputs = when.run(input, Limits { time: TIME, output }).map_err(|error| error.to_string())?;
    Ok(jq::holds(&outputs))
}

/// The one output that an expression has.
fn one(with: &Jq, input: &[u8], output: usize) -> Result<Vec<u8>, String> {
    let mut outputs = with.run(input, Limits { time: TIME, output }).map_err(|error| error.to_string())?;
    match (outputs.pop(), outputs.len()) {
        (Some(data), 0) => Ok(data),
        (None, _) => Err("it has no output, the event needs data".into()),
        (Some(_), more) => Err(format!("it has {} outputs, the event has one", more + 1)),
    }
}

/// A timer waits in the broker for so long at most: what is due later stands in the store until then, so that nothing of an
/// instance that has ended, or of one that moved on, hops through the delay queues for weeks.
fn last_hour() -> Duration {
    #[cfg(debug_assertions)]
    if let Some(seconds) = std::env::var("WARREN_TEST_LAST_HOUR").ok().and_then(|seconds| seconds.parse().ok()) {
        return Duration::from_secs(seconds);
    }
    Duration::from_secs(3600)
}

/// All processes of a pool.
pub(crate) type Plans = Vec<Arc<Plan>>;
