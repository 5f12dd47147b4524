//! `routes:`, one table each.
use super::read::{Mistakes, Node, Table};
use super::{TIMEOUT, too_long};
use crate::handler::{InTx, Rust};
use std::sync::Arc;
use std::time::Duration;
use warren_shared::delivery::{Law, Wait};
use warren_shared::env::Settings;
use warren_shared::pattern::Pattern;
use warren_shared::retry::Policy;

/// A route.
#[derive(Clone, Debug)]
pub struct Route {
    /// Which events.
    pub on: Pattern,
    /// How they are handled.
    pub kind: Kind,
    /// How long a call may take.
    pub timeout: Duration,
    /// What bounds a delivery's life.
    pub law: Law,
}

/// How a route's events are handled.
#[derive(Clone, Debug)]
pub enum Kind {
    /// By a long-lived program.
    Exec(Command),
    /// By a line in the log.
    Log,
    /// By a Rust function.
    Rust(Arc<Rust>),
    /// By a Rust function inside the store's transaction.
    InTx(Arc<InTx>),
}

/// A long-lived program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Program and arguments; no shell.
    pub argv: Vec<String>,
    /// How many of it run.
    pub processes: usize,
}

/// The table of routes.
#[derive(Clone, Debug, Default)]
pub struct Routes(Vec<Route>);

impl Routes {
    /// Adds a route.
    pub fn push(&mut self, route: Route) {
        self.0.push(route);
    }

    /// The route that was added last.
    pub fn last_mut(&mut self) -> Option<&mut Route> {
        self.0.last_mut()
    }

    /// The routes.
    pub fn iter(&self) -> impl Iterator<Item = &Route> {
        self.0.iter()
    }

    /// The route at a place.
    #[must_use]
    pub fn get(&self, place: usize) -> Option<&Route> {
        self.0.get(place)
    }

    /// The place of the most specific route that takes a type.
    #[must_use]
    pub fn find(&self, kind: &str) -> Option<usize> {
        let takes = self.0.iter().enumerate().filter(|(_, route)| route.on.matches(kind));
        takes.max_by_key(|(i, route)| (route.on.rank(), std::cmp::Reverse(*i))).map(|(i, _)| i)
    }
}

impl Routes {
    /// Reads the list.
    pub(super) fn read(list: Node, settings: &Settings, mistakes: &Mistakes) -> Self {
        let mut routes = Self::default();
        for (i, node) in list.list("'routes'", mistakes).into_iter().enumerate() {
            let name = node.peek("on").map_or_else(String::new, |on| format!(" (on: {on})"));
            let Some(mut table) = Table::of(node, format!("route {}{name}", i + 1), mistakes) else { continue };
            let line = table.line("on");
            let Some(route) = Route::read(&mut table, settings) else {
                table.finish();
                continue;
            };
            if routes.iter().any(|other| other.on == route.on) {
                mistakes.note(line, format!("route {}{name}: another route has the same pattern", i + 1));
            }
            table.finish();
            routes.push(route);
        }
        routes
    }
}

impl Route {
    fn read(table: &mut Table<'_>, settings: &Settings) -> Option<Self> {
        let on = table.need::<String>("on", "an event type or a pattern").and_then(|text| {
            Pattern::parse(&text).map_err(|error| table.mistake("on", format!("is no pattern: {error}"))).ok()
        });
        let kind = Kind::read(table);
        let timeout = table.time("timeout").unwrap_or(TIMEOUT);
        let retry = policy(table);
        let wait = table.word("order", &[("relaxed", Wait::InLadder), ("strict", Wait::InPlace)]);
        let law = Law { retry, wait: wait.unwrap_or(Wait::InLadder), crash_limit: settings.crash_limit };
        if let Some(problem) = too_long(&law, timeout, settings) {
            table.wrong(problem);
        }
        Some(Self { on: on?, kind: kind?, timeout, law })
    }
}

/// Of these a route has one.
const KINDS: [&str; 2] = ["exec", "log"];

impl Kind {
    fn read(table: &mut Table<'_>) -> Option<Self> {
        if KINDS.iter().filter(|kind| table.has(kind)).count() != 1 {
            table.wrong(format!("a route has exactly one of: {}", KINDS.join(", ")));
        }
        if table.has("processes") && !table.has("exec") {
            table.mistake("processes", "is how many of the program of 'exec' run: it stands only beside that");
        }
        let argv = table.get::<Vec<String>>("exec", "a list of program and arguments");
        let processes = table.number("processes", 1..=256).map_or(1, |n| n as usize);
        let log = table.take("log").map(|_| Self::Log);
        match argv {
            Some(argv) if argv.is_empty() => {
                table.mistake("exec", "is empty: name a program");
                None
            }
            Some(argv) => Some(Self::Exec(Command { argv, processes })),
            None => log,
        }
    }
}

fn policy(table: &mut Table<'_>) -> Policy {
    let mut policy = Policy::default();
    let Some(mut retry) = table.table("retry") else { return policy };
    policy.attempts = retry.number("attempts", 1..=1_000_000).unwrap_or(policy.attempts);
    policy.backoff = retry.time("backoff").unwrap_or(policy.backoff);
    policy.max = retry.time("max").unwrap_or(policy.max);
    retry.finish();
    policy
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn read(text: &str) -> Result<Routes, Vec<String>> {
        let environment = BTreeMap::from([("WARREN_ROUTES".to_owned(), text.to_owned())]);
        super::super::read(&Settings::read(&environment).expect("valid")).map(|file| file.routes)
    }

    #[test]
    fn the_most_specific_route_takes_an_event() {
        let routes = read(
            "routes:\n  - {on: '#', log: {}}\n  - {on: order.*, log: {}}\n  - {on: order.placed, exec: [cat], processes: 2}\n",
        )
        .expect("valid");
        assert_eq!(routes.find("order.placed"), Some(2));
        assert_eq!(routes.find("order.paid"), Some(1));
        assert_eq!(routes.find("payment"), Some(0));
        assert!(read("routes: []").expect("valid").find("order.placed").is_none());
    }

    #[test]
    fn every_mistake_of_every_route_is_listed() {
        let mistakes = read(
            "routes:\n  - {on: order*, log: {}, timeout: 5 parsecs}\n  - {exec: []}\n  - {on: a.b, log: {}, exec: [cat]}\n  \
             - on: a\n    log: {}\n    retri: {}\n  - {on: s, log: {}, order: strict, retry: {attempts: 50}}\n  - {on: a, log: {}}\n  \
             - {on: p, log: {}, processes: 2}\n  - {on: [], exec: cat}\n  - what\n  - {on: r, log: {}, retry: {atempts: 1}}\n",
        )
        .expect_err("mistakes");
        let wanted = [
            "2: route 1 (on: order*): 'on' is no pattern",
            "2: route 1 (on: order*): 'timeout' is wrong",
            "3: route 2: 'on' is missing",
            "3: route 2: 'exec' is empty",
            "4: route 3 (on: a.b): a route has exactly one of: exec, log",
            "7: route 4 (on: a): 'retri' is unknown, did you mean 'retry'?",
            "8: route 5 (on: s): all attempts",
            "9: route 6 (on: a): another route has the same pattern",
            "10: route 7 (on: p): 'processes' is how many",
            "11: route 8: 'on' is not an event type or a pattern",
            "11: route 8: 'exec' is not a list of program and arguments",
            "12: route 9 is not a table",
            "13: route 10 (on: r): 'retry.atempts' is unknown, did you mean 'attempts'?",
        ];
        for (found, wanted) in mistakes.iter().zip(wanted) {
            assert!(found.starts_with(&format!("WARREN_ROUTES:{wanted}")), "{found} is not {wanted}");
        }
        assert_eq!(mistakes.len(), wanted.len(), "{mistakes:#?}");
        assert!(read("routes: {}").expect_err("no list")[0].contains("1: 'routes' is not a list"));
    }
}
