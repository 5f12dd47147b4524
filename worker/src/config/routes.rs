//! `routes:`, one table each.
use super::read::{Mistakes, Node, Table};
use super::{TIMEOUT, too_long};
use crate::handler::{Endpoint, Gathering, Header, HttpService, InTx, RETRY_ON, Rust};
use crate::jq::Jq;
use serde_json::Value as Json;
use std::sync::Arc;
use std::time::Duration;
use warren_shared::Event;
use warren_shared::delivery::{Law, Wait};
use warren_shared::env::Settings;
use warren_shared::pattern::Pattern;
use warren_shared::process::wire;
use warren_shared::retry::Policy;
use warren_shared::secret::{File, Secret, of_file};

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
    /// Where it stands in the file; 0 where it does not.
    pub(crate) line: u64,
    /// So many calls of it run at once, at most.
    pub concurrency: Option<usize>,
    /// Which of the events are handled.
    pub(crate) condition: Option<Jq>,
    /// What becomes of their data.
    pub(crate) transform: Option<Jq>,
}

/// How a route's events are handled.
#[derive(Clone, Debug)]
pub enum Kind {
    /// By a long-lived program.
    Exec(Command),
    /// By an HTTP service.
    Http(HttpService),
    /// By a line in the log.
    Log,
    /// By an event of this type.
    Emit(String),
    /// By what becomes of its group.
    Gather(Arc<Gathering>),
    /// By a business process.
    Process,
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

    /// The place of the route that takes an event: answers to steps of processes go to the processes, whatever is defined today.
    #[must_use]
    pub fn of(&self, event: &Event) -> Option<usize> {
        let process = || self.0.iter().position(|route| matches!(route.kind, Kind::Process));
        wire::is_answer(event).then(process).flatten().or_else(|| self.find(event.kind()))
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
        let (mut routes, mut names) = (Self::default(), Vec::new());
        for (i, node) in list.list("'routes'", mistakes).into_iter().enumerate() {
            let name = node.peek("on").map_or_else(String::new, |on| format!(" (on: {on})"));
            let Some(mut table) = Table::of(node, format!("route {}{name}", i + 1), mistakes) else { continue };
            let line = table.line("on");
            let Some(route) = Route::read(&mut table, settings) else {
                table.finish();
                continue;
            };
            table.finish();
            let named = Named { route: format!("route {}{name}", i + 1), line };
            if let Some(place) = routes.rival(&route.on) {
                let Named { route: other, line: there }: &Named = &names[place];
                let cure = Self::cure(&route.on, &routes.0[place].on);
                mistakes.note(line, format!("{}: {other} in line {there} {cure}", named.route));
            }
            names.push(named);
            routes.push(route);
        }
        for (place, Named { route: name, line }) in names.iter().enumerate() {
            let emitted = match &routes.0[place].kind {
                Kind::Emit(kind) => Some(kind),
                Kind::Gather(gathering) => Some(&gathering.emit),
                _ => None,
            };
            if let Some(kind) = emitted.filter(|kind| routes.find(kind) == Some(place)) {
                let round = format!("{name}: it takes what it emits ('{kind}'), which would go round for ever");
                mistakes.note(*line, format!("{round}: emit another type, or narrow 'on'"));
            }
        }
        for (place, Named { route: name, line }) in names.iter().enumerate() {
            let Kind::Gather(gathering) = &routes.0[place].kind else { continue };
            let Ok(on) = Pattern::parse(&gathering.overdue()) else { continue };
            if routes.iter().any(|other| other.on == on) {
                let same = format!("{name}: another route gathers into '{}': name another type", gathering.emit);
                mistakes.note(*line, same);
                continue;
            }
            let Route { kind, timeout, law, .. } = routes.0[place].clone();
            routes.push(Route::new(on, kind, timeout, law));
        }
        routes
    }

    /// The place of a route that is as specific as this pattern and takes some of the same types: nobody could tell which
    /// of the two is meant.
    pub(crate) fn rival(&self, on: &Pattern) -> Option<usize> {
        self.0.iter().position(|other| other.on.rank() == on.rank() && other.on.overlaps(on))
    }

    /// What is wrong between two rivals, and what helps.
    pub(crate) fn cure(on: &Pattern, other: &Pattern) -> String {
        if on == other {
            return "has the same pattern: put both into one, or narrow one of them".into();
        }
        format!(
            "takes some types of this one as well ('{other}' and '{on}'), and neither is more specific: narrow one of them"
        )
    }
}

/// How messages name a route.
struct Named {
    route: String,
    line: u64,
}

impl Route {
    /// A route that takes every event of its pattern as it comes, as many at once as there are places.
    #[must_use]
    pub fn new(on: Pattern, kind: Kind, timeout: Duration, law: Law) -> Self {
        Self { on, kind, timeout, law, line: 0, concurrency: None, condition: None, transform: None }
    }

    fn read(table: &mut Table<'_>, settings: &Settings) -> Option<Self> {
        let on = pattern(table, "an event type or a pattern");
        let kind = Kind::read(table, settings);
        let timeout = table.time("timeout").unwrap_or(TIMEOUT);
        let retry = policy(table);
        let wait = table.word("order", &[("relaxed", Wait::InLadder), ("strict", Wait::InPlace)]);
        let law = Law { retry, wait: wait.unwrap_or(Wait::InLadder), crash_limit: settings.crash_limit };
        if let Some(problem) = too_long(&law, timeout, settings) {
            table.wrong(problem);
        }
        let (condition, transform) = (program(table, "where"), program(table, "transform"));
        let concurrency = table.number("concurrency", 1..=65_535).map(|n| n as usize);
        let line = table.line("on");
        Some(Self { on: on?, kind: kind?, timeout, law, line, concurrency, condition, transform })
    }
}

/// The field `on`, which has to be there.
pub(super) fn pattern(table: &mut Table<'_>, what: &str) -> Option<Pattern> {
    let text = table.need::<String>("on", what)?;
    Pattern::parse(&text).map_err(|error| table.mistake("on", format!("is no pattern: {error}"))).ok()
}

/// A field that holds a jq program.
fn program(table: &mut Table<'_>, name: &'static str) -> Option<Jq> {
    let text = match table.get::<Json>(name, "a jq program")? {
        Json::String(text) => text,
        // `where: true` is one as well.
        scalar @ (Json::Bool(_) | Json::Number(_)) => scalar.to_string(),
        _ => {
            table.mistake(name, "is not the text of a jq program: put it in quotes");
            return None;
        }
    };
    Jq::compile(&text).map_err(|error| table.mistake(name, format!("is no jq program: {error}"))).ok()
}

/// Of these a route has one.
const KINDS: [&str; 5] = ["exec", "http", "log", "emit", "gather"];

impl Kind {
    fn read(table: &mut Table<'_>, settings: &Settings) -> Option<Self> {
        if KINDS.iter().filter(|kind| table.has(kind)).count() != 1 {
            table.wrong(format!("a route has exactly one of: {}", KINDS.join(", ")));
        }
        if table.has("processes") && !table.has("exec") {
            table.mistake("processes", "is how many of the program of 'exec' run: it stands only beside that");
        }
        let argv = table.get::<Vec<String>>("exec", "a list of program and arguments");
        let processes = table.number("processes", 1..=256).map_or(1, |n| n as usize);
        let http = service(table).map(Self::Http);
        let log = table.take("log").map(|_| Self::Log);
        let emit = event_type(table).map(Self::Emit);
        let gather = gathering(table, settings).map(|gathering| Self::Gather(Arc::new(gathering)));
        match argv {
            Some(argv) if argv.is_empty() => {
                table.mistake("exec", "is empty: name a program");
                None
            }
            Some(argv) => Some(Self::Exec(Command { argv, processes })),
            None => http.or(log).or(emit).or(gather),
        }
    }
}

/// `http:` and what stands beside it.
fn service(table: &mut Table<'_>) -> Option<HttpService> {
    for name in ["retry_on", "headers"].into_iter().filter(|name| table.has(name) && !table.has("http")) {
        table.mistake(name, "is for HTTP services: it stands only beside 'http'");
    }
    let retry_on = table.get::<Vec<u16>>("retry_on", "a list of statuses, such as [404, 409]");
    if let Some(other) = retry_on.iter().flatten().find(|status| !(400..=499).contains(*status)) {
        table.mistake(
            "retry_on",
            format!("names {other}, and only 400 to 499 are to be chosen: 5xx is always tried again"),
        );
    }
    let headers = headers(table);
    let url = table.get::<String>("http", "a URL")?;
    let endpoint = Endpoint::parse(&url).map_err(|why| table.mistake("http", why)).ok()?;
    Some(HttpService { endpoint, retry_on: retry_on.unwrap_or_else(|| RETRY_ON.into()), headers })
}

/// The field `headers`: each has a value, or the file that holds it.
fn headers(table: &mut Table<'_>) -> Vec<Header> {
    let Some(node) = table.take("headers") else { return Vec::new() };
    let mut headers = Vec::new();
    for (name, line, node) in node.entries("'headers'", table.mistakes()) {
        let what = format!("{}: 'headers.{name}'", table.what());
        let wrong = |problem: String| table.mistakes().note(line, format!("{what} {problem}"));
        let secret = match node.scalar() {
            Ok(value) => Some(Secret::new(value)),
            Err(node) => Table::of(node, what.clone(), table.mistakes()).and_then(|mut inner| {
                let path = inner.need::<String>("file", "the file that holds the value");
                inner.finish();
                let path = path?;
                let read =
                    std::fs::read_to_string(&path).map_err(|error| wrong(format!("cannot read '{path}': {error}")));
                let file = File { variable: format!("headers.{name} ({path})"), path };
                Some(Secret::new(of_file(&read.ok()?)).of(Some(file)))
            }),
        };
        match secret.map(|secret| Header::new(&name, secret)) {
            Some(Ok(header)) => headers.push(header),
            Some(Err(problem)) => wrong(problem),
            None => {}
        }
    }
    headers
}

fn gathering(table: &mut Table<'_>, settings: &Settings) -> Option<Gathering> {
    let mut inner = table.table("gather")?;
    let emit = event_type(&mut inner);
    if !inner.has("emit") {
        inner.mistake("emit", "is missing: name the type of the event that a group becomes");
    }
    let (group, count, deadline) = (program(&mut inner, "group"), program(&mut inner, "count"), inner.time("deadline"));
    if deadline.is_some_and(|deadline| deadline > settings.retention) {
        let (kept, cure) = (settings.retention, "lower it, or raise the retention");
        let why = format!("the store remembers what was handled for {kept:?} only (WARREN_RETENTION)");
        inner.mistake("deadline", format!("is too long: {why}: {cure}"));
    }
    inner.finish();
    Some(Gathering { emit: emit?, group, count, deadline })
}

/// The field `emit`.
fn event_type(table: &mut Table<'_>) -> Option<String> {
    let kind = table.get::<String>("emit", "an event type")?;
    let legal = Event::new("id", "/", kind.clone());
    legal.map_err(|error| table.mistake("emit", format!("is no event type: {error}"))).ok().map(|_| kind)
}

pub(super) fn policy(table: &mut Table<'_>) -> Policy {
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
    fn filters_and_limits_are_read() {
        let text = "routes:\n  - on: order.viewed\n    where: .data.total > 100\n    transform: '{order: .data.id}'\n    emit: order.large\n  \
                    - {on: order.*, where: true, concurrency: 3, log: {}}\n";
        let routes = read(text).expect("valid");
        let all: Vec<&Route> = routes.iter().collect();
        assert!(matches!(&all[0].kind, Kind::Emit(kind) if kind == "order.large"));
        assert!(all[0].condition.is_some() && all[0].transform.is_some() && all[0].concurrency.is_none());
        assert!(all[1].condition.is_some() && all[1].transform.is_none() && all[1].concurrency == Some(3));
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
            "4: route 3 (on: a.b): a route has exactly one of: exec, http, log, emit, gather",
            "7: route 4 (on: a): 'retri' is unknown, did you mean 'retry'?",
            "8: route 5 (on: s): all attempts",
            "9: route 6 (on: a): route 4 (on: a) in line 5 has the same pattern",
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
        let wanted = [
            "2: route 1 (on: a): 'where' is no jq program: at 'foo' (column 5): there is no such filter",
            "3: route 2 (on: b): 'transform' is not the text of a jq program: put it in quotes",
            "4: route 3 (on: c): 'emit' is no event type: the attribute 'type' is empty",
            "5: route 4 (on: d): 'concurrency' is 0, not a number from 1 to 65535",
            "6: route 5 (on: e.*): it takes what it emits ('e.f'), which would go round for ever",
            "8: route 7 (on: *.e): route 5 (on: e.*) in line 6 takes some types of this one as well ('e.*' and '*.e')",
        ];
        let mistakes = read(
            "routes:\n  - {on: a, log: {}, where: . | foo}\n  - {on: b, log: {}, transform: {a: .b}}\n  - {on: c, emit: ''}\n  \
             - {on: d, log: {}, concurrency: 0}\n  - {on: e.*, emit: e.f}\n  - {on: e.g.*, emit: e.g}\n  - {on: '*.e', log: {}}\n",
        )
        .expect_err("mistakes");
        for (found, wanted) in mistakes.iter().zip(wanted) {
            assert!(found.starts_with(&format!("WARREN_ROUTES:{wanted}")), "{found} is not {wanted}");
        }
        assert_eq!(mistakes.len(), wanted.len(), "{mistakes:#?}");
        assert!(read("routes: {}").expect_err("no list")[0].contains("1: 'routes' is not a list"));
    }

    #[test]
    fn a_service_has_a_url_without_secrets() {
        let route = |url: &str| read(&format!("routes: [{{on: a.b, http: '{url}', timeout: 5s}}]"));
        for url in ["http://payments:8080/charge", "https://pay.example?team=7", "http://[::1]:80/"] {
            let routes = route(url).expect(url);
            let Some(Kind::Http(service)) = routes.get(0).map(|route| &route.kind) else { panic!("{url}") };
            let endpoint = &service.endpoint;
            assert!(!format!("{endpoint} {endpoint:?}").contains("team"), "a query may hold a secret");
        }
        for (url, wanted) in [
            ("payments:8080/charge", "'http' begins neither with http:// nor with https://: write it like"),
            ("/charge", "'http' is not a URL (relative URL without a base): write it like http://payments:8080/charge"),
            ("ftp://payments/charge", "'http' begins neither"),
            ("http://", "'http' is not a URL (empty host)"),
            ("http://me@payments/charge", "'http' holds a user or a password: take them out"),
            ("http://:hidden@payments/charge", "'http' holds a user or a password: take them out"),
            ("http://payments/charge#hidden", "'http' holds a fragment, which is never sent: take it out"),
        ] {
            let mistakes = route(url).expect_err(url);
            assert!(mistakes.len() == 1 && mistakes[0].contains(wanted), "{url}: {mistakes:?}");
            assert!(!mistakes[0].contains("hidden"), "{url}: {mistakes:?}");
        }
        let mistakes = read("routes: [{on: a, http: 5}]").expect_err("a number is no URL");
        assert!(mistakes.len() == 1 && mistakes[0].contains("'http' is not a URL: "), "{mistakes:?}");
    }

    #[test]
    fn a_group_that_waits_longer_than_the_store_remembers_is_a_mistake() {
        let read = |deadline: &str| {
            read(&format!("routes:\n  - on: a\n    gather: {{emit: x, deadline: {deadline}}}\n")).map(|_| ())
        };
        assert_eq!(read("7d"), Ok(()));
        let mistakes = read("169h").expect_err("longer than the default retention");
        assert!(
            mistakes.len() == 1
                && mistakes[0].starts_with("WARREN_ROUTES:3: route 1 (on: a): 'gather.deadline' is too long: ")
                && mistakes[0].contains("WARREN_RETENTION"),
            "{mistakes:?}"
        );
    }

    #[test]
    fn what_stands_beside_a_service_is_read_and_no_secret_is_told() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "Bearer hidden\n").expect("written");
        let path = file.path().display();
        let service = |fields: &str| -> Result<HttpService, Vec<String>> {
            let routes = read(&format!("routes:\n  - on: a.b\n    http: http://pay/\n    {fields}\n"))?;
            match routes.get(0).map(|route| route.kind.clone()) {
                Some(Kind::Http(service)) => Ok(service),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(service("timeout: 5s").expect("valid").retry_on, [409]);
        assert_eq!(service("retry_on: []").expect("valid").retry_on, [0; 0]);
        let all = format!(
            "retry_on: [404, 423]\n    headers: {{Authorization: {{file: '{path}'}}, X-Tenant: 7, x-team: blue}}"
        );
        let all = service(&all).expect("valid");
        assert_eq!((all.retry_on.as_slice(), all.headers.len()), (&[404, 423][..], 3));
        assert!(!format!("{all:?}").contains("hidden") && !format!("{all:?}").contains("blue"), "{all:?}");

        std::fs::write(file.path(), "hid\nden").expect("written");
        for (fields, wanted) in [
            (
                "retry_on: 409",
                "4: route 1 (on: a.b): 'retry_on' is not a list of statuses, such as [404, 409]: it is the number 409",
            ),
            ("retry_on: [200]", "4: route 1 (on: a.b): 'retry_on' names 200, and only 400 to 499 are"),
            (
                "retry_on: ['409']",
                "4: route 1 (on: a.b): 'retry_on' is not a list of statuses, such as [404, 409]: it is a list of text",
            ),
            ("retry_on: [4xx]", "4: route 1 (on: a.b): 'retry_on' is not a list of statuses"),
            ("headers: {ce-id: x}", "4: route 1 (on: a.b): 'headers.ce-id' is set by Warren"),
            ("headers: {Content-Length: 5}", "4: route 1 (on: a.b): 'headers.Content-Length' is set by Warren"),
            ("headers: {a b: x}", "4: route 1 (on: a.b): 'headers.a b' is no name of a header"),
            ("headers: {a: ''}", "4: route 1 (on: a.b): 'headers.a' has a value that no header can have"),
            ("headers: {a: {fil: x}}", "4: route 1 (on: a.b): 'headers.a': 'file' is missing: name the file"),
            (
                "headers: {a: {file: /no/such}}",
                "4: route 1 (on: a.b): 'headers.a' cannot read '/no/such': No such file",
            ),
            ("headers: {a: [x]}", "4: route 1 (on: a.b): 'headers.a' is not a table of fields"),
            ("headers: x", "4: 'headers' is not a table of fields"),
            (
                &format!("headers: {{a: {{file: '{path}'}}}}"),
                "4: route 1 (on: a.b): 'headers.a' has a value that no header",
            ),
        ] {
            let mistakes: Vec<String> = service(fields).expect_err(fields);
            assert!(mistakes[0].starts_with(&format!("WARREN_ROUTES:{wanted}")), "{fields}: {mistakes:?}");
            assert!(!mistakes[0].contains("den"), "{fields}: {mistakes:?}");
        }
        for name in ["retry_on: [409]", "headers: {a: b}"] {
            let mistakes = read(&format!("routes:\n  - on: a\n    log: {{}}\n    {name}\n")).expect_err(name);
            assert!(mistakes.len() == 1 && mistakes[0].contains("it stands only beside 'http'"), "{mistakes:?}");
        }
    }

    #[test]
    fn a_value_of_another_kind_is_told_with_what_helps_and_not_with_a_reader_s_words() {
        for (route, wanted) in [
            (
                "on: a, log: {}, timeout: 90",
                "'timeout' is wrong: '90' has no unit: write 90s for seconds, or ms, m, h or d",
            ),
            ("on: a, log: {}, timeout: 1.5", "'timeout' is wrong: '1.5' has no unit: write 1.5s"),
            ("on: a, log: {}, timeout: '90'", "'timeout' is wrong: '90' has no unit: write 90s"),
            ("on: a, log: {}, timeout: -5", "'timeout' is wrong: '-5' is not a duration such as 250ms, 10s"),
            ("on: a, log: {}, timeout: [5s]", "'timeout' is not a duration such as 10s: it is a list of text"),
            ("on: a, log: {}, timeout: ", "'timeout' is not a duration such as 10s: it is empty"),
            ("on: a, log: {}, retry: {backoff: 2}", "'retry.backoff' is wrong: '2' has no unit: write 2s"),
            ("on: a, gather: {emit: b, deadline: 30}", "'gather.deadline' is wrong: '30' has no unit: write 30s"),
            (
                "on: a, log: {}, concurrency: '4'",
                "'concurrency' is not a number from 1 to 65535: it is text (without quotes it would be a number)",
            ),
            ("on: a, log: {}, concurrency: -1", "'concurrency' is -1, not a number from 1 to 65535"),
            (
                "on: a, exec: [sleep, 5]",
                "'exec' is not a list of program and arguments: of its list, item 2: it is the number 5 (in quotes it would be text)",
            ),
            ("on: a, emit: true", "'emit' is not an event type: it is the flag true (in quotes it would be text)"),
            ("on: a, log: {}, concurrency: 99999999999", "'concurrency' is 99999999999, not a number from 1 to 65535"),
            ("on: a, log: {}, concurrency: 2.5", "'concurrency' is 2.5, not a number from 1 to 65535"),
            (
                "on: a, log: {}, retry: {attempts: many}",
                "'retry.attempts' is not a number from 1 to 1000000: it is text",
            ),
            ("on: a, http: {url: x}", "'http' is not a URL: it is a table of fields"),
        ] {
            let mistakes = read(&format!("routes: [{{{route}}}]")).expect_err(route);
            assert!(mistakes.iter().any(|mistake| mistake.contains(wanted)), "{route}: {mistakes:?}");
            assert!(mistakes.iter().all(|mistake| !mistake.contains("expected")), "{route}: {mistakes:?}");
        }
    }

    #[test]
    fn a_gathering_is_read_with_its_deadline_s_route() {
        let routes = read(
            "routes:\n  - on: parcel.weighed\n    where: .data.ok\n    gather: {emit: order.weighed, group: .data.order, count: 3, deadline: 30s}\n",
        )
        .expect("valid");
        let over = routes.find("warren.gather.order.weighed").and_then(|place| routes.get(place)).expect("a route");
        assert!(matches!(over.kind, Kind::Gather(_)) && over.condition.is_none());
        let mistakes = read(
            "routes:\n  - {on: a, gather: {emit: x}}\n  - {on: b, gather: {emit: x}}\n  - {on: c, gather: {grup: 1}}\n  - {on: d.e, gather: {emit: d.e}}\n",
        )
        .expect_err("mistakes");
        for (found, wanted) in mistakes.iter().zip([
            "3: route 2 (on: b): another route gathers into 'x'",
            "4: route 3 (on: c): 'gather.emit' is missing",
            "4: route 3 (on: c): 'gather.grup' is unknown, did you mean 'group'?",
            "5: route 4 (on: d.e): it takes what it emits",
        ]) {
            assert!(found.starts_with(&format!("WARREN_ROUTES:{wanted}")), "{found} is not {wanted}");
        }
        assert_eq!(mistakes.len(), 4, "{mistakes:#?}");
    }
}
