//! `processes:`: the definitions, checked, with a line for every mistake.
use super::read::{Mistakes, Node, Table};
use super::routes::{Kind, Route, Routes, pattern, policy};
use super::{TIMEOUT, law};
use crate::process::{Plan, Plans};
use std::collections::BTreeMap;
use std::sync::Arc;
use warren_shared::env::Settings;
use warren_shared::pattern::Pattern;
use warren_shared::process::Draft;
use warren_shared::process::wire::OWN;

/// Reads the list, with the line of each, and adds the routes that it needs.
pub(super) fn read(list: Node, routes: &mut Routes, settings: &Settings, mistakes: &Mistakes) -> (Plans, Vec<u64>) {
    let (mut plans, mut lines) = (Plans::new(), Vec::new());
    for (i, node) in list.list("'processes'", mistakes).into_iter().enumerate() {
        let what = node.peek("name").map_or_else(|| format!("process {}", i + 1), |name| format!("process '{name}'"));
        let Some(mut table) = Table::of(node, what, mistakes) else { continue };
        let (line, on) = (table.line("name"), table.line("on"));
        if let Some(plan) = process(&mut table, mistakes) {
            if plans.iter().any(|other| other.definition.name == plan.definition.name) {
                mistakes.note(
                    line,
                    format!("another process is called '{}': give each a name of its own", plan.definition.name),
                );
            }
            let conflict =
                |problem: String| mistakes.note(on, format!("process '{}': {problem}", plan.definition.name));
            add(&plan, routes, settings, conflict);
            plans.push(Arc::new(plan));
            lines.push(on);
        }
        table.finish();
    }
    (plans, lines)
}

fn process(table: &mut Table<'_>, mistakes: &Mistakes) -> Option<Plan> {
    let name = table.need::<String>("name", "the process");
    let on = pattern(table, "the event type that starts it, or a pattern");
    let what = table.what().to_owned();
    let Some(steps) = table.take("steps") else {
        table.wrong("it has no 'steps': name at least one, such as charge: {do: payment.charge, undo: payment.refund}");
        return None;
    };
    let (mut drafts, mut lines, mut whole) = (Vec::new(), BTreeMap::new(), true);
    for (step, line, node) in steps.entries(&format!("{what}: 'steps'"), mistakes) {
        lines.entry(step.clone()).or_insert(line);
        let Some(mut table) = Table::of(node, format!("{what}, step '{step}'"), mistakes) else {
            whole = false;
            continue;
        };
        let (draft, is_whole) = draft(step, &mut table);
        whole &= is_whole;
        drafts.push(draft);
        table.finish();
    }
    // What is missing was noted: the rest is looked at all the same.
    whole &= name.is_some() && on.is_some();
    let name = name.unwrap_or_else(|| "unnamed".into());
    let made = Plan::new(&name, on.or_else(|| Pattern::parse("unknown").ok())?, drafts);
    let made = made.map_err(|found| {
        for mistake in found {
            match mistake.step.as_ref() {
                Some(step) => {
                    let line = lines.get(step).copied().unwrap_or_else(|| table.line("steps"));
                    mistakes.note(line, format!("{what}, step '{step}': {}", mistake.problem));
                }
                None => table.wrong(mistake.problem),
            }
        }
    });
    made.ok().filter(|_| whole)
}

/// A step, and whether nothing of it is missing.
fn draft(name: String, table: &mut Table<'_>) -> (Draft, bool) {
    let action = table.need::<String>("do", "the type of the event that asks for it");
    let (has_retry, retry) = (table.has("retry"), policy(table));
    let whole = action.is_some();
    let (undo, undo_with) = undo(table);
    let draft = Draft {
        name,
        action: action.unwrap_or_else(|| "unknown".into()),
        undo,
        undo_with,
        after: table.get("after", "a list of steps").unwrap_or_default(),
        timeout: table.time("timeout"),
        retry: has_retry.then_some(retry),
        when: table.get("when", "a condition in jq"),
        with: table.get("with", "an expression in jq"),
        optional: table.get("optional", "true or false").unwrap_or(false),
        last: table.get("final", "true or false").unwrap_or(false),
    };
    (draft, whole)
}

/// The type of the event that takes a step back, alone or with what makes its data: `undo: {do: payment.refund, with: …}`.
fn undo(table: &mut Table<'_>) -> (Option<String>, Option<String>) {
    if !table.is_table("undo") {
        return (table.get("undo", "the type of the event that takes it back"), None);
    }
    let Some(mut inner) = table.table("undo") else { return (None, None) };
    let both = (
        inner.need::<String>("do", "the type of the event that takes it back"),
        inner.get("with", "an expression in jq"),
    );
    inner.finish();
    both
}

/// Adds the routes of a process: what starts it, what answers its steps, and what it tells itself.
fn add(plan: &Plan, routes: &mut Routes, settings: &Settings, conflict: impl Fn(String)) {
    let starts = [(plan.definition.on.clone(), true)];
    let others = plan.answers().into_iter().chain(Pattern::parse(OWN).ok());
    for (on, starts) in starts.into_iter().chain(others.map(|on| (on, false))) {
        let taker = routes.iter().find(|route| route.on == on).map(|route| matches!(route.kind, Kind::Process));
        match taker {
            Some(true) if !starts => {}
            Some(true) => {
                conflict(format!("another process begins on '{on}' or waits for it: an event has one taker"));
            }
            Some(false) => conflict(format!("a route takes '{on}', too: an event has one taker")),
            None if let Some(other) = routes.rival(&on).and_then(|place| routes.get(place)) => {
                conflict(format!("'{}' {}", other.on, Routes::cure(&on, &other.on)));
            }
            None => routes.push(Route::new(on, Kind::Process, TIMEOUT, law(settings))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<super::super::File, Vec<String>> {
        let environment = BTreeMap::from([("WARREN_ROUTES".to_owned(), text.to_owned())]);
        super::super::read(&Settings::read(&environment).expect("valid"))
    }

    const ORDER: &str = "
processes:
  - name: order
    on: order.placed
    steps:
      reserve: { do: inventory.reserve, undo: inventory.release }
      charge:  { do: payment.charge, undo: payment.refund, after: [reserve], timeout: 30s }
      ship:    { do: shipping.create, after: [charge], when: .input.physical, undo: shipping.cancel }
      notify:  { do: email.send, after: [ship], optional: true, final: true, retry: {attempts: 3}, with: '{to: .input.email}' }
";

    #[test]
    fn a_process_takes_what_starts_it_what_answers_it_and_its_own_events() {
        let file = read(ORDER).expect("valid");
        let plan = &file.processes[0];
        assert_eq!((plan.definition.name.as_str(), plan.definition.steps.len()), ("order", 4));
        assert!(plan.computes());
        let taken = |kind: &str| file.routes.find(kind).is_some();
        for kind in
            ["order.placed", "payment.charge.done", "payment.refund.failed", "email.send.done", "warren.process.timer"]
        {
            assert!(taken(kind), "{kind}");
        }
        assert!(!taken("payment.charge") && !taken("order.paid"));
    }

    #[test]
    fn a_changed_definition_has_another_id() {
        let id = |text: &str| read(text).expect("valid").processes[0].id;
        assert_eq!(id(ORDER), id(ORDER));
        assert_ne!(id(ORDER), id(&ORDER.replace(".input.physical", ".input.weight > 0")));
    }

    #[test]
    fn a_definition_is_read_back_as_it_was_written() {
        let file = read(ORDER).expect("valid");
        let again = Plan::read(&file.processes[0].state()).expect("valid");
        assert_eq!((again.id, &again.definition), (file.processes[0].id, &file.processes[0].definition));
    }

    #[test]
    fn every_mistake_of_every_process_is_listed_with_its_line() {
        let text = "\
routes:
  - {on: order.placed, log: {}}
processes:
  - name: order
    on: order.placed
    steps:
      a: {do: x.a, undo: x.b, after: [c]}
      b: {do: x.c, after: [a]}
      c: {do: x.d, undo: x.e, after: [nowhere], when: '.a |'}
      d: {do: x.*, final: true, timeout: soon}
      e: {undo: x.f, aftr: [a]}
  - name: circle
    on: circle.begun
    steps:
      a: {do: x.a, undo: x.b, after: [b]}
      b: {do: x.c, undo: x.d, after: [a]}
  - on: nothing
    steps: {}
  - name: empty
    on: empty*
";
        let found = read(text).expect_err("mistakes");
        for wanted in [
            "8: process 'order', step 'b': it has no 'undo'",
            "9: process 'order', step 'c': 'when': ",
            "9: process 'order', step 'c': 'after' names 'nowhere'",
            "10: process 'order', step 'd': 'do': 'x.*' is a pattern",
            "10: process 'order', step 'd': 'timeout' is wrong",
            "11: process 'order', step 'e': 'aftr' is unknown, did you mean 'after'?",
            "11: process 'order', step 'e': 'do' is missing",
            "12: process 'circle': these steps wait for each other: b → a → b",
            "17: process 3: 'name' is missing",
            "20: process 'empty': 'on' is no pattern",
            "19: process 'empty': it has no 'steps'",
        ] {
            assert!(
                found.iter().any(|found| found.starts_with(&format!("WARREN_ROUTES:{wanted}"))),
                "{wanted} is not in {found:#?}"
            );
        }
    }

    #[test]
    fn an_undo_has_data_of_its_own() {
        let with = |undo: &str| read(&ORDER.replacen("undo: payment.refund", undo, 1));
        let file = with("undo: {do: payment.refund, with: '{id: .results.charge.id}'}").expect("valid");
        let charge = &file.processes[0].definition.steps[1];
        assert_eq!(charge.undo.as_deref(), Some("payment.refund"));
        let again = Plan::read(&file.processes[0].state()).expect("valid");
        assert_eq!(again.id, file.processes[0].id);
        assert_ne!(again.id, with("undo: payment.refund").expect("valid").processes[0].id);
        for (undo, wanted) in [
            ("undo: {do: payment.refund, with: '.a |'}", "'undo.with': "),
            ("undo: {with: '.a'}", "'undo.do' is missing"),
            ("undo: {do: payment.refund, wiht: '.a'}", "'undo.wiht' is unknown"),
            ("undo: {do: payment.refund.done}", "'undo': 'payment.refund.done' ends as an answer does"),
            ("undo: [payment.refund]", "'undo' is not the type"),
        ] {
            let found = with(undo).expect_err(undo);
            assert!(found.iter().any(|found| found.contains(wanted)), "{wanted} is not in {found:#?}");
        }
    }

    #[test]
    fn patterns_of_which_neither_is_more_specific_have_no_taker_in_common() {
        for route in ["*.placed", "order.*"] {
            let on = if route == "*.placed" { "order.*" } else { "*.placed" };
            let text = ORDER.replacen("on: order.placed", &format!("on: '{on}'"), 1).replacen(
                "name: order",
                "name: purchase",
                1,
            );
            let found = read(&format!("routes:\n  - {{on: '{route}', log: {{}}}}\n{}", text.trim_start()));
            let found = found.map(|_| ()).expect_err("two takers");
            assert!(
                found[0].contains(&format!("process 'purchase': '{route}' takes some types of this one as well")),
                "{found:?}"
            );
            let other = "  - {name: other, on: 'X', steps: {a: {do: o.a, final: true}}}\n".replace('X', route);
            let found = read(&format!("{}{other}", text.trim_start())).map(|_| ()).expect_err("two takers");
            assert!(found.iter().any(|found| found.contains("process 'other': '")), "{found:?}");
        }
    }

    #[test]
    fn an_event_has_one_taker() {
        let both = format!("routes:\n  - {{on: order.placed, log: {{}}}}\n{}", ORDER.trim_start());
        let found = read(&both).expect_err("a mistake");
        assert!(found[0].contains("WARREN_ROUTES:5: process 'order': a route takes 'order.placed', too"), "{found:?}");
        assert!(read(&format!("routes:\n  - {{on: 'order.*', log: {{}}}}\n{}", ORDER.trim_start())).is_ok());
    }
}
