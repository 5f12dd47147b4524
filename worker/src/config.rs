//! The routes: which event goes to which handler, under which law.
use crate::handler::{InTx, Rust};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use warren_shared::delivery::{Law, Wait};
use warren_shared::env::{Settings, duration};
use warren_shared::pattern::Pattern;
use warren_shared::retry::Policy;
use warren_shared::topology::{BUS, Subscription, Topology};

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

/// How long a call may take where the route does not say.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// The law of a route that says nothing.
#[must_use]
pub fn law(settings: &Settings) -> Law {
    Law { retry: Policy::default(), wait: Wait::InLadder, crash_limit: settings.crash_limit }
}

/// The mistake of a route that could hold a delivery longer than the broker lets it.
#[must_use]
pub fn too_long(law: &Law, timeout: Duration, settings: &Settings) -> Option<String> {
    let longest = if law.wait == Wait::InPlace { law.retry.longest(timeout) } else { timeout };
    (longest >= settings.consumer_timeout).then(|| {
        format!(
            "all attempts and waits in place can take {longest:?}, but the broker takes a delivery back after {:?} \
             (WARREN_CONSUMER_TIMEOUT): lower attempts, max or timeout, use order: relaxed, or raise it on the \
             broker and here",
            settings.consumer_timeout
        )
    })
}

/// The pool's topology: what the variables say, and bindings for what the routes want.
#[must_use]
pub fn topology(settings: &Settings, routes: &Routes) -> Topology {
    let wanted = routes.iter().map(|r| Subscription { exchange: BUS.into(), pattern: r.on.clone() });
    let mut subscriptions: Vec<Subscription> = Vec::new();
    for subscription in wanted.chain(settings.subscribe.iter().cloned()) {
        if !subscriptions.contains(&subscription) {
            subscriptions.push(subscription);
        }
    }
    Topology {
        pool: settings.pool.clone(),
        lanes: settings.lanes.clone(),
        partitions: settings.partitions,
        queue_type: settings.queue_type,
        order: settings.order,
        subscriptions,
    }
}

/// Reads the routes that the settings name.
///
/// # Errors
/// Every mistake.
pub fn routes(settings: &Settings) -> Result<Routes, Vec<String>> {
    let (origin, text) = match (&settings.config, &settings.routes) {
        (Some(path), _) => match std::fs::read_to_string(path) {
            Ok(text) => (format!("WARREN_CONFIG ({path})"), text),
            Err(error) => return Err(vec![format!("WARREN_CONFIG: cannot read '{path}': {error}")]),
        },
        (None, Some(text)) => ("WARREN_ROUTES".to_owned(), text.clone()),
        (None, None) => return Ok(Routes::default()),
    };
    parse(&text, settings).map_err(|mistakes| mistakes.iter().map(|m| format!("{origin}: {m}")).collect())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    routes: Vec<BTreeMap<String, serde_json::Value>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Retry {
    attempts: Option<u32>,
    backoff: Option<String>,
    max: Option<String>,
}

fn parse(text: &str, settings: &Settings) -> Result<Routes, Vec<String>> {
    let file: File = match serde_saphyr::from_str(text) {
        Ok(file) => file,
        Err(error) => return Err(vec![error.to_string()]),
    };
    let mut routes = Routes::default();
    let mut mistakes = Vec::new();
    for (i, fields) in file.routes.into_iter().enumerate() {
        let name = fields.get("on").and_then(|v| v.as_str()).map_or_else(String::new, |on| format!(" (on: {on})"));
        let mut read = Read { fields, mistakes: Vec::new() };
        let route = read.route(settings);
        mistakes.extend(read.mistakes.into_iter().map(|m| format!("route {}{name}: {m}", i + 1)));
        if let Some(route) = route {
            if routes.iter().any(|other| other.on == route.on) {
                mistakes.push(format!("route {}{name}: another route has the same pattern", i + 1));
            }
            routes.push(route);
        }
    }
    if mistakes.is_empty() { Ok(routes) } else { Err(mistakes) }
}

/// One route's fields, taken out one by one; what is left over is a mistake.
struct Read {
    fields: BTreeMap<String, serde_json::Value>,
    mistakes: Vec<String>,
}

impl Read {
    fn route(&mut self, settings: &Settings) -> Option<Route> {
        let mut kinds = Vec::new();
        if let Some(argv) = self.take::<Vec<String>>("exec", "a list of program and arguments") {
            let processes = self.take("processes", "a number from 1 to 256").unwrap_or(1);
            if argv.is_empty() {
                self.mistakes.push("'exec' is empty: name a program".into());
            }
            if !(1..=256).contains(&processes) {
                self.mistakes.push("'processes' is not a number from 1 to 256".into());
            }
            kinds.push(Kind::Exec(Command { argv, processes }));
        }
        if self.fields.remove("log").is_some() {
            kinds.push(Kind::Log);
        }
        let timeout = self.time("timeout").unwrap_or(TIMEOUT);
        let retry = self.take::<Retry>("retry", "a table of attempts, backoff and max");
        let policy = self.policy(retry);
        let wait = match self.take::<String>("order", "relaxed or strict").as_deref() {
            None | Some("relaxed") => Wait::InLadder,
            Some("strict") => Wait::InPlace,
            Some(other) => {
                self.mistakes.push(format!("'order' is '{other}', not one of: relaxed, strict"));
                Wait::InLadder
            }
        };
        let on = match self.take::<String>("on", "an event type or a pattern") {
            Some(text) => Pattern::parse(&text).map_err(|e| self.mistakes.push(format!("'on': {e}"))).ok(),
            None => {
                self.mistakes.push("'on' is missing: name an event type or a pattern".into());
                None
            }
        };
        for name in std::mem::take(&mut self.fields).into_keys() {
            let later = ["http", "where", "transform", "emit", "concurrency"].contains(&name.as_str());
            let what = if later { "is not supported by this version" } else { "is unknown" };
            self.mistakes.push(format!("'{name}' {what}; known are: on, exec, processes, log, timeout, retry, order"));
        }
        let law = Law { retry: policy, wait, crash_limit: settings.crash_limit };
        self.mistakes.extend(too_long(&law, timeout, settings));
        if kinds.len() != 1 {
            self.mistakes.push("a route has exactly one of: exec, log".into());
        }
        Some(Route { on: on?, kind: kinds.pop()?, timeout, law })
    }

    fn policy(&mut self, retry: Option<Retry>) -> Policy {
        let mut policy = Policy::default();
        let Some(Retry { attempts, backoff, max }) = retry else { return policy };
        match attempts {
            Some(0) => self.mistakes.push("'retry.attempts' is 0: the first attempt counts, so at least 1".into()),
            Some(attempts) => policy.attempts = attempts,
            None => {}
        }
        for (name, text, target) in [("backoff", backoff, &mut policy.backoff), ("max", max, &mut policy.max)] {
            match text.map(|text| duration(&text)) {
                Some(Ok(time)) => *target = time,
                Some(Err(error)) => self.mistakes.push(format!("'retry.{name}': {error}")),
                None => {}
            }
        }
        policy
    }

    fn time(&mut self, name: &str) -> Option<Duration> {
        let text = self.take::<String>(name, "a duration such as 10s")?;
        duration(&text).map_err(|error| self.mistakes.push(format!("'{name}': {error}"))).ok()
    }

    fn take<T: serde::de::DeserializeOwned>(&mut self, name: &str, what: &str) -> Option<T> {
        let value = self.fields.remove(name)?;
        serde_json::from_value(value).map_err(|e| self.mistakes.push(format!("'{name}' is not {what}: {e}"))).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Routes, Vec<String>> {
        let mut environment = BTreeMap::new();
        environment.insert("WARREN_ROUTES".to_owned(), text.to_owned());
        routes(&Settings::read(&environment).expect("valid"))
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
             - {on: a, log: {}, retri: {}}\n  - {on: s, log: {}, order: strict, retry: {attempts: 50}}\n  - {on: a, log: {}}\n",
        )
        .expect_err("mistakes");
        let text = mistakes.join("\n");
        for wanted in [
            "route 1 (on: order*): 'on'",
            "route 1 (on: order*): 'timeout'",
            "route 2: 'exec' is empty",
            "route 2: 'on' is missing",
            "route 3 (on: a.b): a route has exactly one of",
            "route 4 (on: a): 'retri' is unknown",
            "route 5 (on: s): all attempts",
            "route 6 (on: a): another route has the same pattern",
        ] {
            assert!(text.contains(wanted), "{wanted} is not in:\n{text}");
        }
        assert!(read("routes: [").is_err());
        assert!(read("rutes: []").is_err());
    }
}
