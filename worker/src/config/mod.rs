//! What the file says, `WARREN_CONFIG` or `WARREN_ROUTES`: which event goes to which handler, under which law.
//!
//! A new top-level field is a field of [`File`], a line in `parse` and a file here that reads it from its `read::Node`.
mod circles;
mod processes;
mod read;
mod routes;

pub use routes::{Command, Kind, Route, Routes};

use crate::handler::OVERDUE;
use crate::process::Plans;
use read::{Mistakes, Node, Table};
use std::time::Duration;
use warren_shared::delivery::{Law, Wait};
use warren_shared::env::Settings;
use warren_shared::process::wire::OWN;
use warren_shared::retry::Policy;
use warren_shared::topology::{BUS, Subscription, Topology};

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
    // What processes and groups tell themselves comes by the pool's own door.
    let heard = |route: &&Route| route.on.as_str() != OWN && !route.on.as_str().starts_with(OVERDUE);
    let wanted =
        routes.iter().filter(heard).map(|r| Subscription { exchange: BUS.into(), pattern: r.on.clone(), kind: None });
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

/// What the file says.
#[derive(Debug, Default)]
pub struct File {
    /// `routes:`.
    pub routes: Routes,
    /// `processes:`.
    pub(crate) processes: Plans,
}

/// Reads the file that the settings name.
///
/// # Errors
/// Every mistake, as `<origin>:<line>: <what is wrong, and the cure>`; the origin is the path, or `WARREN_ROUTES`.
pub fn read(settings: &Settings) -> Result<File, Vec<String>> {
    match (&settings.config, &settings.routes) {
        (Some(path), _) => match std::fs::read_to_string(path) {
            Ok(text) => parse(path, &text, settings),
            Err(error) => Err(vec![format!("WARREN_CONFIG: cannot read '{path}': {error}")]),
        },
        (None, Some(text)) => parse("WARREN_ROUTES", text, settings),
        (None, None) => Ok(File::default()),
    }
}

fn parse(origin: &str, text: &str, settings: &Settings) -> Result<File, Vec<String>> {
    let (mistakes, mut file) = (Mistakes::default(), File::default());
    if let Some(mut table) = Node::read(text, &mistakes).and_then(|node| Table::of(node, "", &mistakes)) {
        if let Some(node) = table.take("routes") {
            file.routes = Routes::read(node, settings, &mistakes);
        }
        let mut lines = Vec::new();
        if let Some(node) = table.take("processes") {
            (file.processes, lines) = processes::read(node, &mut file.routes, settings, &mistakes);
        }
        circles::find(&file.routes, &file.processes, &lines, &mistakes);
        table.finish();
    }
    let mistakes = mistakes.list(origin);
    if mistakes.is_empty() { Ok(file) } else { Err(mistakes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn settings(name: &str, value: &str) -> Settings {
        Settings::read(&BTreeMap::from([(name.to_owned(), value.to_owned())])).expect("valid")
    }

    #[test]
    fn mistakes_are_told_with_the_files_name_and_their_lines() {
        let text = "rutes: []\n";
        let told = "1: 'rutes' is unknown, did you mean 'routes'?; known are: routes, processes";
        assert_eq!(read(&settings("WARREN_ROUTES", text)).expect_err("a mistake"), [format!("WARREN_ROUTES:{told}")]);
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("written");
        let path = file.path().to_str().expect("UTF-8");
        assert_eq!(read(&settings("WARREN_CONFIG", path)).expect_err("a mistake"), [format!("{path}:{told}")]);
        let gone = read(&settings("WARREN_CONFIG", "/no/such/file")).expect_err("no file");
        assert!(gone[0].starts_with("WARREN_CONFIG: cannot read '/no/such/file': "), "{gone:?}");
    }

    #[test]
    fn a_file_without_routes_has_none() {
        for text in ["routes:\n", "routes: []\n", "# nothing\n", "\u{feff}routes: []\n"] {
            let file = read(&settings("WARREN_ROUTES", text)).expect("valid");
            assert_eq!(file.routes.iter().count(), 0, "{text}");
        }
    }
}
