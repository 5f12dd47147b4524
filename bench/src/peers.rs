//! Other makes, installed by `bench/peers/setup`, and the PostgreSQL server: where one cannot be had, its rows say why.
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use warren_tests::broker::root;

/// The server's name among them.
pub(crate) const POSTGRES: &str = "postgres";

/// Which peers are there.
#[derive(Debug)]
pub(crate) struct Peers(BTreeMap<String, Result<String, String>>);

impl Peers {
    /// Reads what the set-up said: `ok NAME VERSION` or `absent NAME WHY` a line.
    pub(crate) fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let peer = |line: &str| {
            let (state, rest) = line.split_once(' ')?;
            let (name, more) = rest.split_once(' ').unwrap_or((rest, ""));
            let more = more.to_owned();
            Some((name.to_owned(), if state == "ok" { Ok(more) } else { Err(more) }))
        };
        Self(text.lines().filter_map(peer).collect())
    }

    /// Why a peer is absent, if it is.
    pub(crate) fn absent(&self, name: &str) -> Option<String> {
        match self.0.get(name) {
            Some(Ok(_)) => None,
            Some(Err(why)) => Some(why.clone()),
            None => Some("not set up: scripts/bench does it".into()),
        }
    }

    /// The versions of those that are there.
    pub(crate) fn versions(&self) -> BTreeMap<&str, &str> {
        self.0.iter().filter_map(|(name, found)| Some((name.as_str(), found.as_deref().ok()?))).collect()
    }
}

/// A peer's action.
pub(crate) fn command(name: &str, action: &str) -> Command {
    let mut command = Command::new(root().join("bench/peers/run"));
    command.args([name, action]);
    command
}
