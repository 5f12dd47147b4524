//! States that outlive the events which change them: instances of processes, groups of results, definitions.
//!
//! An event reads a state, and its outcome commits together with the change: only if the state is still the one that was
//! read. So two events that meet at a state follow one another, wherever they are handled.
use std::time::Duration;
use uuid::Uuid;

/// A state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// A word for what it is, such as `process`.
    pub kind: String,
    /// Which of its kind, such as the name of the process.
    pub name: String,
    /// Where it stands, in a word for people.
    pub status: String,
    /// The key of its events.
    pub key: String,
    /// Whether nothing will change it any more: then it is forgotten after the retention.
    pub ended: bool,
    /// When something is due, in milliseconds since 1970: [`Store::due`](super::Store::due) finds it by that.
    pub due: Option<i64>,
    /// All of it.
    pub body: Vec<u8>,
}

/// A state as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Counts its changes, from 1.
    pub version: i64,
    /// When it was first kept, in milliseconds since 1970 by the store's clock.
    pub begun: i64,
    /// When it was changed last.
    pub changed: i64,
    /// The state.
    pub state: State,
}

/// What an event makes of a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Of which.
    pub id: Uuid,
    /// The version that the event read; 0 where there was none.
    pub found: i64,
    /// What it becomes.
    pub state: State,
}

/// A state that is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// Which.
    pub id: Uuid,
    /// Which of its kind.
    pub name: String,
    /// When, in milliseconds since 1970.
    pub at: i64,
}

/// How many states of a kind, a name and a status have not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// Which of its kind.
    pub name: String,
    /// Where they stand.
    pub status: String,
    /// How many.
    pub states: u64,
    /// For how long the one that was changed longest ago has not been changed, by the store's clock.
    pub oldest: Duration,
}

/// Which states to list.
#[derive(Clone, Debug, Default)]
pub struct Listed {
    /// Of this kind.
    pub kind: &'static str,
    /// Of this name.
    pub name: Option<String>,
    /// Of this status.
    pub status: Option<String>,
    /// So many at most.
    pub most: u32,
}
