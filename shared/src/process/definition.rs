//! A process as it was defined, checked before it runs.
use super::wire::{DONE, ENDS, FAILED};
use crate::pattern::Pattern;
use crate::retry::Policy;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long a step waits for its result where nothing is said.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// A step as it is written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Draft {
    /// Its name.
    pub name: String,
    /// The type of the event that asks for it.
    pub action: String,
    /// The type of the event that takes it back.
    pub undo: Option<String>,
    /// The steps that come before it.
    pub after: Vec<String>,
    /// How long it waits for its result.
    pub timeout: Option<Duration>,
    /// How often and when it is asked for again; once where nothing is said.
    pub retry: Option<Policy>,
    /// The condition that decides whether it runs, in jq.
    pub when: Option<String>,
    /// What makes the data of the event that asks for it, in jq.
    pub with: Option<String>,
    /// What makes the data of the event that takes it back, in jq.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo_with: Option<String>,
    /// Whether the process goes on without it where it fails.
    pub optional: bool,
    /// Whether it stays as it is when the process is taken back.
    pub last: bool,
}

/// A step of a process.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// The type of the event that asks for it.
    pub action: String,
    /// The type of the event that takes it back; a final step has none.
    pub undo: Option<String>,
    /// The steps that come before it, by place.
    pub after: Vec<usize>,
    /// The steps that come right after it, by place.
    pub before: Vec<usize>,
    /// How long it waits for its result.
    pub timeout: Duration,
    /// How often and when it is asked for again.
    pub retry: Policy,
    /// The condition that decides whether it runs, in jq.
    pub when: Option<String>,
    /// What makes the data of the event that asks for it, in jq.
    pub with: Option<String>,
    /// Whether the process goes on without it where it fails.
    pub optional: bool,
}

/// A process: its steps in an order in which each stands behind those it comes after.
#[derive(Clone, Debug, PartialEq)]
pub struct Definition {
    /// Its name.
    pub name: String,
    /// The events that start an instance.
    pub on: Pattern,
    /// Its steps.
    pub steps: Vec<Step>,
}

/// What is wrong with a definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// In which step; none for the process itself.
    pub step: Option<String>,
    /// What, and what to write instead.
    pub problem: String,
}

impl Definition {
    /// Checks a definition and brings its steps into order.
    ///
    /// # Errors
    /// Every mistake.
    pub fn new(name: &str, on: Pattern, drafts: Vec<Draft>) -> Result<Self, Vec<Mistake>> {
        let mut mistakes = Vec::new();
        let mut wrong = |step: Option<&str>, problem: String| {
            mistakes.push(Mistake { step: step.map(str::to_owned), problem });
        };
        if !is_name(name) {
            wrong(None, format!("'{name}' is not a name of a-z, 0-9, - and _, at most 64 long"));
        }
        if drafts.is_empty() {
            wrong(None, "it has no steps: a process needs at least one".into());
        }
        let names: BTreeSet<&str> = drafts.iter().map(|draft| draft.name.as_str()).collect();
        let mut seen = BTreeSet::new();
        for draft in &drafts {
            let step = Some(draft.name.as_str());
            if !is_name(&draft.name) {
                wrong(step, "its name is not one of a-z, 0-9, - and _, at most 64 long".into());
            }
            if !seen.insert(draft.name.as_str()) {
                wrong(step, "another step has the same name".into());
            }
            for (field, kind) in [("do", Some(&draft.action)), ("undo", draft.undo.as_ref())] {
                if let Some(problem) = kind.and_then(|kind| not_a_type(kind).or_else(|| is_taken(kind, name))) {
                    wrong(step, format!("'{field}': {problem}"));
                }
            }
            match (&draft.undo, draft.last) {
                (None, false) => {
                    wrong(step, "it has no 'undo': name one, or say 'final: true' where it cannot be taken back".into())
                }
                (Some(_), true) => wrong(step, "it has an 'undo' and is 'final': leave one of them out".into()),
                _ => {}
            }
            for other in &draft.after {
                if !names.contains(other.as_str()) {
                    wrong(step, format!("'after' names '{other}', which is no step of this process"));
                } else if *other == draft.name {
                    wrong(step, "it comes after itself".into());
                }
            }
        }
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        let order = order(&drafts).map_err(|circle| {
            let problem = format!("these steps wait for each other: {}", circle.join(" → "));
            vec![Mistake { step: None, problem }]
        })?;
        Ok(Self { name: name.into(), on, steps: arranged(drafts, &order) })
    }

    /// The place of a step.
    #[must_use]
    pub fn place(&self, name: &str) -> Option<usize> {
        self.steps.iter().position(|step| step.name == name)
    }
}

fn is_name(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
    !name.is_empty() && name.len() <= 64 && name.chars().all(legal)
}

/// Why an event type cannot be asked for.
fn not_a_type(kind: &str) -> Option<String> {
    if kind.is_empty() || kind.len() > 200 || kind.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Some(format!("'{kind}' is not an event type such as payment.charge"));
    }
    if kind.split('.').any(|word| word.is_empty() || word == "*" || word == "#") {
        return Some(format!("'{kind}' is a pattern or has empty words: a step asks for one type"));
    }
    None
}

/// Why an event of this type would not be taken for one that asks for a step.
fn is_taken(kind: &str, process: &str) -> Option<String> {
    if let Some(ending) = [DONE, FAILED].into_iter().find(|ending| kind.ends_with(ending)) {
        return Some(format!(
            "'{kind}' ends as an answer does ('{ending}') and would be taken for one: name another type"
        ));
    }
    if kind.starts_with("warren.") {
        return Some(format!("'{kind}' is one of Warren's own types: name another one"));
    }
    let end = kind.strip_prefix(process)?.strip_prefix('.')?;
    ENDS.contains(&end).then(|| format!("'{kind}' tells how the process ends: name another type"))
}

/// The drafts' places in an order in which each stands behind those it comes after; as written where that leaves a choice.
fn order(drafts: &[Draft]) -> Result<Vec<usize>, Vec<String>> {
    let places: BTreeMap<&str, usize> = drafts.iter().enumerate().map(|(n, draft)| (draft.name.as_str(), n)).collect();
    let (mut order, mut placed) = (Vec::with_capacity(drafts.len()), vec![false; drafts.len()]);
    let is_free = |n: usize, placed: &[bool]| drafts[n].after.iter().all(|other| placed[places[other.as_str()]]);
    while let Some(next) = (0..drafts.len()).find(|n| !placed[*n] && is_free(*n, &placed)) {
        placed[next] = true;
        order.push(next);
    }
    let Some(begin) = (0..drafts.len()).find(|n| !placed[*n]) else { return Ok(order) };
    // Whoever is left waits for one who is left: going back far enough runs in a circle.
    let (mut path, mut at) = (vec![begin], begin);
    loop {
        let waits = drafts[at].after.iter().map(|other| places[other.as_str()]).find(|other| !placed[*other]);
        at = waits.unwrap_or(begin);
        if let Some(first) = path.iter().position(|n| *n == at) {
            let mut circle: Vec<String> = path[first..].iter().rev().map(|n| drafts[*n].name.clone()).collect();
            circle.push(circle[0].clone());
            return Err(circle);
        }
        path.push(at);
    }
}

fn arranged(drafts: Vec<Draft>, order: &[usize]) -> Vec<Step> {
    let names: Vec<String> = order.iter().map(|n| drafts[*n].name.clone()).collect();
    let place = |name: &String| names.iter().position(|other| other == name);
    let afters: Vec<Vec<usize>> = order.iter().map(|n| drafts[*n].after.iter().filter_map(place).collect()).collect();
    let step = |(at, n): (usize, &usize)| {
        let draft = &drafts[*n];
        Step {
            name: draft.name.clone(),
            action: draft.action.clone(),
            undo: draft.undo.clone(),
            after: afters[at].clone(),
            before: (0..afters.len()).filter(|other| afters[*other].contains(&at)).collect(),
            timeout: draft.timeout.unwrap_or(TIMEOUT),
            retry: draft.retry.unwrap_or(Policy { attempts: 1, ..Policy::default() }),
            when: draft.when.clone(),
            with: draft.with.clone(),
            optional: draft.optional,
        }
    };
    order.iter().enumerate().map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(name: &str, after: &[&str]) -> Draft {
        Draft {
            name: name.into(),
            action: format!("{name}.do"),
            undo: Some(format!("{name}.undo")),
            after: after.iter().map(|name| (*name).to_owned()).collect(),
            ..Draft::default()
        }
    }

    fn define(drafts: Vec<Draft>) -> Result<Definition, Vec<Mistake>> {
        Definition::new("order", Pattern::parse("order.placed").expect("valid"), drafts)
    }

    #[test]
    fn steps_stand_behind_those_they_come_after() {
        let defined = define(vec![draft("d", &["b", "c"]), draft("b", &["a"]), draft("c", &["a"]), draft("a", &[])]);
        let steps = defined.expect("valid").steps;
        let names: Vec<&str> = steps.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c", "d"]);
        assert_eq!((&steps[0].before, &steps[3].after), (&vec![1, 2], &vec![1, 2]));
    }

    #[test]
    fn every_mistake_is_listed_with_its_step() {
        let mistakes = define(vec![
            draft("a", &["nowhere"]),
            draft("a", &["a"]),
            Draft { undo: None, ..draft("b", &[]) },
            Draft { last: true, ..draft("c", &[]) },
            Draft { action: "pay.*".into(), ..draft("D!", &[]) },
            Draft { action: "pay.failed".into(), undo: Some("pay.done".into()), ..draft("e", &[]) },
            Draft { action: "order.completed".into(), undo: Some("warren.process.timer".into()), ..draft("f", &[]) },
        ])
        .expect_err("mistakes");
        let text: Vec<String> =
            mistakes.iter().map(|m| format!("{}: {}", m.step.as_deref().unwrap_or("-"), m.problem)).collect();
        let text = text.join("\n");
        for wanted in [
            "a: 'after' names 'nowhere'",
            "a: another step has the same name",
            "a: it comes after itself",
            "b: it has no 'undo'",
            "c: it has an 'undo' and is 'final'",
            "D!: its name",
            "D!: 'do': 'pay.*' is a pattern",
            "e: 'do': 'pay.failed' ends as an answer does",
            "e: 'undo': 'pay.done' ends as an answer does",
            "f: 'do': 'order.completed' tells how the process ends",
            "f: 'undo': 'warren.process.timer' is one of Warren's own types",
        ] {
            assert!(text.contains(wanted), "{wanted} is not in:\n{text}");
        }
        assert!(define(Vec::new()).expect_err("empty")[0].problem.contains("no steps"));
    }

    #[test]
    fn a_circle_is_named_in_its_order() {
        let mistakes = define(vec![draft("z", &[]), draft("a", &["c", "z"]), draft("b", &["a"]), draft("c", &["b"])]);
        assert_eq!(mistakes.expect_err("a circle")[0].problem, "these steps wait for each other: b → c → a → b");
    }
}
