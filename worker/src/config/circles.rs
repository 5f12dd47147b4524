//! Circles: events that cause one another for ever, by `emit`, `gather` and processes, as far as the file shows them. What programs
//! and services emit only shows at work, where a limit ends it (`WARREN_HOP_LIMIT`).
use super::read::Mistakes;
use super::routes::{Kind, Route, Routes};
use crate::process::{Plan, Plans};
use warren_shared::process::wire::ENDS;

/// Who takes events: a route or a process, by its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taker {
    Route(usize),
    Process(usize),
}

/// A taker, and what it emits on the way.
type Hop = (Taker, String);

/// Notes every circle at a line of one of its members.
pub(super) fn find(routes: &Routes, plans: &Plans, lines: &[u64], mistakes: &Mistakes) {
    let graph = Graph { routes, plans };
    let takers = (0..routes.iter().count()).map(Taker::Route).chain((0..plans.len()).map(Taker::Process));
    let mut left: Vec<Taker> = Vec::new();
    for taker in takers {
        graph.walk(taker, &mut Vec::new(), &mut left, &mut |circle| {
            let line = circle.iter().find_map(|(taker, _)| match taker {
                Taker::Route(place) => routes.get(*place).map(|route| route.line),
                Taker::Process(place) => lines.get(*place).copied(),
            });
            if let Some(mistake) = graph.describe(circle) {
                mistakes.note(line.unwrap_or(1), mistake);
            }
        });
    }
}

struct Graph<'a> {
    routes: &'a Routes,
    plans: &'a Plans,
}

impl Graph<'_> {
    /// Follows what a taker emits. `path` has the takers on the way and what each of them emits next; who is `left` behind leads
    /// into no circle that is not noted.
    fn walk(&self, taker: Taker, path: &mut Vec<Hop>, left: &mut Vec<Taker>, note: &mut dyn FnMut(&[Hop])) {
        if left.contains(&taker) {
            return;
        }
        if let Some(begin) = path.iter().position(|(other, _)| *other == taker) {
            return note(&path[begin..]);
        }
        for kind in self.emitted(taker) {
            let Some(next) = self.taker(&kind) else { continue };
            path.push((taker, kind));
            self.walk(next, path, left, note);
            path.pop();
        }
        left.push(taker);
    }

    fn emitted(&self, taker: Taker) -> Vec<String> {
        match taker {
            Taker::Route(place) => match self.routes.get(place) {
                // A condition may end what would go round.
                Some(Route { condition: Some(_), .. }) | None => Vec::new(),
                Some(Route { kind: Kind::Emit(kind), .. }) => vec![kind.clone()],
                Some(Route { kind: Kind::Gather(gathering), .. }) => vec![gathering.emit.clone()],
                Some(_) => Vec::new(),
            },
            Taker::Process(place) => {
                let Plan { definition, .. } = &*self.plans[place];
                let asked = definition.steps.iter().flat_map(|step| [Some(step.action.clone()), step.undo.clone()]);
                let ends = ENDS.iter().map(|end| format!("{}.{end}", definition.name));
                asked.flatten().chain(ends).collect()
            }
        }
    }

    /// Who takes events of a type, here.
    fn taker(&self, kind: &str) -> Option<Taker> {
        let place = self.routes.find(kind)?;
        if !matches!(self.routes.get(place)?.kind, Kind::Process) {
            return Some(Taker::Route(place));
        }
        let starts = self.plans.iter().enumerate().filter(|(_, plan)| plan.definition.on.matches(kind));
        starts.max_by_key(|(_, plan)| plan.definition.on.rank()).map(|(place, _)| Taker::Process(place))
    }

    fn describe(&self, circle: &[Hop]) -> Option<String> {
        let name = |taker: &Taker| match taker {
            Taker::Route(place) => {
                self.routes.get(*place).map_or_else(String::new, |route| format!("route (on: {})", route.on))
            }
            Taker::Process(place) => format!("process '{}'", self.plans[*place].definition.name),
        };
        match circle {
            // It was noted with the route.
            [(Taker::Route(_), _)] => None,
            [(process, kind)] => Some(format!(
                "{}: it takes its own '{kind}', which would go round for ever: narrow 'on', or name another type",
                name(process)
            )),
            _ => {
                let way: Vec<String> =
                    circle.iter().map(|(taker, kind)| format!("{} → '{kind}'", name(taker))).collect();
                let first = circle.first().map(|(taker, _)| name(taker)).unwrap_or_default();
                Some(format!(
                    "these would go round for ever: {} → {first}: emit another type, narrow an 'on', or end it by a 'where'",
                    way.join(" → ")
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use warren_shared::env::Settings;

    fn mistakes(text: &str) -> Vec<String> {
        let environment = BTreeMap::from([("WARREN_ROUTES".to_owned(), text.to_owned())]);
        super::super::read(&Settings::read(&environment).expect("valid")).err().unwrap_or_default()
    }

    #[test]
    fn what_leads_back_to_itself_is_found() {
        let process = |name: &str, on: &str, action: &str, undo: &str| {
            format!("  - name: {name}\n    on: '{on}'\n    steps: {{a: {{do: {action}, undo: {undo}}}}}\n")
        };
        let own = |on: &str, action: &str, undo: &str| format!("processes:\n{}", process("order", on, action, undo));
        for (text, wanted) in [
            (own("order.*", "x.a", "x.b"), "3: process 'order': it takes its own 'order.completed'"),
            (own("#", "x.a", "x.b"), "3: process 'order': it takes its own 'x.a'"),
            (own("*.b", "x.a", "x.b"), "3: process 'order': it takes its own 'x.b'"),
            (own("order.stuck", "x.a", "x.b"), "3: process 'order': it takes its own 'order.stuck'"),
            (
                "routes:\n  - {on: a, emit: b}\n  - {on: b, emit: c}\n  - {on: c, gather: {emit: a, count: 2}}\n"
                    .into(),
                "2: these would go round for ever: route (on: a) → 'b' → route (on: b) → 'c' → route (on: c) → 'a' → route (on: a)",
            ),
            (
                format!("routes:\n  - {{on: x.a, emit: order.placed}}\n{}", own("order.placed", "x.a", "x.b")),
                "2: these would go round for ever: route (on: x.a) → 'order.placed' → process 'order' → 'x.a'",
            ),
            (
                format!("routes:\n  - {{on: x.b, emit: order.placed}}\n{}", own("order.placed", "x.a", "x.b")),
                "route (on: x.b) → 'order.placed' → process 'order' → 'x.b'",
            ),
            (
                format!(
                    "processes:\n{}{}",
                    process("one", "one.begun", "x.a", "x.b"),
                    process("two", "one.compensated", "one.begun", "x.c")
                ),
                "3: these would go round for ever: process 'one' → 'one.compensated' → process 'two' → 'one.begun'",
            ),
        ] {
            let found = mistakes(&text);
            assert!(found.iter().any(|found| found.contains(wanted)), "{wanted} is not in {found:#?} of\n{text}");
        }
        for text in [
            own("order.placed", "x.a", "x.b"),
            format!(
                "routes:\n  - {{on: order.completed, log: {{}}}}\n  - {{on: order.compensated, log: {{}}}}\n  - {{on: order.stuck, log: {{}}}}\n{}",
                own("order.*", "x.a", "x.b")
            ),
            "routes:\n  - {on: a, emit: b}\n  - {on: b, emit: a, where: .data.n > 0}\n".into(),
            "routes:\n  - {on: a, emit: b}\n  - {on: b, emit: c}\n  - {on: d, emit: b}\n".into(),
        ] {
            assert_eq!(mistakes(&text), Vec::<String>::new(), "{text}");
        }
    }
}
