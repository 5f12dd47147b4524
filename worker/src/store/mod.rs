//! The store: what the fleet remembers. One trait, one exam (`exam.rs`), one directory an implementation.
//!
//! Architecture invariant: SQL stands in this directory only, and only this directory makes a [`Committed`].
mod postgres;
mod sqlite;
mod state;
mod time;

#[cfg(test)]
mod exam;

pub(crate) use postgres::{Ended, Entry};
pub use postgres::{Postgres, Transactions, Tx, TxError};
pub use sqlite::Sqlite;
pub use state::{Change, Count, Due, Kept, Listed, State};

use futures_util::future::BoxFuture;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;
use warren_shared::{Identity, Message};

/// Proof that an event's outcome is durable. Only the store makes one.
///
/// ```compile_fail
/// let forged = warren_worker::store::Committed(());
/// ```
#[derive(Debug)]
#[must_use]
pub struct Committed(());

/// Why the store did not do it. Nothing was changed; the same call is safe to repeat, which helps unless it is [`Refused`].
///
/// [`Refused`]: StoreError::Refused
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot be opened.
    #[error("the store '{path}' cannot be opened ({cause}): {cure}")]
    Open {
        /// Which.
        path: String,
        /// What it said.
        cause: String,
        /// What to do.
        cure: &'static str,
    },
    /// It was written by a newer version.
    #[error(
        "the store has schema {found}, this version knows up to {known}: start the newer version, or use another DATABASE_URL"
    )]
    Newer {
        /// What it has.
        found: i64,
        /// What this version knows.
        known: i64,
    },
    /// Its kind runs no handler inside its transactions.
    #[error("a handler that takes part in the store's transaction needs PostgreSQL: set DATABASE_URL to postgres://…")]
    NoTransactions,
    /// It works, and refuses what it was given: text that it cannot hold, a size beyond its limits, a constraint. To repeat the
    /// same call cannot help.
    #[error("the store cannot hold this: {0}")]
    Refused(String),
    /// It does not answer, or refuses to write (locked, full, gone).
    #[error("the store does not take it: {0}")]
    Unavailable(String),
}

/// A call's answer.
pub type Reply<T> = BoxFuture<'static, Result<T, StoreError>>;

/// Which outcome an event has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Handled.
    Done,
    /// Dead-lettered.
    Dead,
}

/// An event, as the inbox knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which.
    pub identity: Identity,
    /// How often it was replayed. A death counts up to its own replay: a later replay is a new chance.
    pub replayed: u32,
}

/// What one event's handling changes.
#[derive(Clone, Debug)]
pub struct Effect {
    /// The event; none where it cannot be told from its copies.
    pub seen: Option<Seen>,
    /// Its outcome.
    pub outcome: Outcome,
    /// The record of its start to take back.
    pub started: Option<Identity>,
    /// The partition that it came from: outgoing events keep its order.
    pub partition: Arc<str>,
    /// What it sends.
    pub out: Vec<Message>,
    /// The state that it changes.
    pub change: Option<Change>,
}

/// What became of an effect.
#[derive(Debug)]
pub enum Recorded {
    /// It is durable; the outbox rows have these ids, in the order of `out`.
    Fresh(Committed, Vec<i64>),
    /// It was durable already: an earlier call did it, whose answer was lost. These rows of the outbox are still to be published,
    /// as they stand there: what is recorded once more may look different (a dead letter says when).
    Recovered(Committed, Vec<Row>),
    /// Another copy's outcome was there first; this one was dropped whole.
    Superseded(Committed),
    /// The state that it changes is not the one that it rests on any more: nothing was recorded.
    Outdated,
}

/// A start to record.
#[derive(Clone, Debug)]
pub struct Begin {
    /// Of which event.
    pub event: Identity,
    /// The worker that had its partition before and did not give it back: it had the event, where nothing of it is recorded.
    pub before: Option<Arc<str>>,
    /// It is recorded where no more others are.
    pub most: u32,
}

/// What is known of an event's starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// Whether ours is recorded.
    pub kept: bool,
    /// The other workers that began it, did not finish it or give it back, and have not ended well.
    pub others: Vec<Other>,
    /// Attempts that failed in place.
    pub failed: u32,
}

/// A worker that began an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Other {
    /// Its run.
    pub run: String,
    /// When it beat last, in the store's time; none where it is not known to live.
    pub seen: Option<i64>,
}

/// A row of the outbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its id; ascending in the order of commits.
    pub id: i64,
    /// The partition that it belongs to.
    pub partition: Arc<str>,
    /// What to publish.
    pub message: Message,
}

/// What a row of the outbox publishes, but for its body. One that cannot be read stays where it is: it keeps no other row of its
/// partition from being published.
fn message(row: i64, envelope: &str) -> Option<Message> {
    let unreadable = |error: &serde_json::Error| {
        tracing::error!(row, %error, "row {row} of the outbox cannot be read and is left there: was it written by a newer version?");
    };
    serde_json::from_str(envelope).inspect_err(unreadable).ok()
}

/// Whose outbox rows to take over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// All of a partition, whoever wrote them: the broker made us its active consumer.
    In(Arc<str>),
    /// All of workers that were not heard of for so long.
    Silent(Duration),
}

/// What every store does. Calls that change something are atomic and may be repeated.
pub trait Store: Send + Sync + 'static {
    /// Which of these have an outcome.
    fn look(&self, asked: Vec<Seen>) -> Reply<Vec<Option<Committed>>>;
    /// Records our start of each, where not too many others are recorded; tells who they are.
    fn start(&self, events: Vec<Begin>) -> Reply<Vec<Start>>;
    /// Takes our start of each back.
    fn unstart(&self, events: Vec<Identity>) -> Reply<()>;
    /// Notes that so many attempts failed in place; the starts are over.
    fn note(&self, event: Identity, failed: u32) -> Reply<()>;
    /// Records effects in one transaction, in their order.
    fn commit(&self, effects: Arc<Vec<Effect>>) -> Reply<Vec<Recorded>>;
    /// States, where there are any.
    fn load(&self, ids: Vec<Uuid>) -> Reply<Vec<Option<Kept>>>;
    /// Keeps a state for ever, unless there is one with this id.
    fn keep(&self, id: Uuid, state: State) -> Reply<()>;
    /// States of a kind, those that changed last first.
    fn list(&self, listed: Listed) -> Reply<Vec<(Uuid, Kept)>>;
    /// States of a kind that are due before a time, in milliseconds since 1970, the soonest first; so many at most.
    fn due(&self, kind: &'static str, before: i64, most: u32) -> Reply<Vec<Due>>;
    /// How many states of a kind have not ended, by name and status.
    fn count(&self, kind: &'static str) -> Reply<Vec<Count>>;
    /// Makes outbox rows ours and returns them in order.
    fn adopt(&self, left: Left) -> Reply<Vec<Row>>;
    /// Gives rows of ours up, which were not published: whoever adopts their partition next, or looks for rows of the silent, has
    /// them.
    fn give_up(&self, rows: Vec<i64>) -> Reply<()>;
    /// Forgets rows that were published.
    fn sent(&self, rows: Vec<i64>) -> Reply<()>;
    /// Makes a partition ours; tells whose it was, if that is another who did not give it back.
    fn own(&self, partition: Arc<str>) -> Reply<Option<Arc<str>>>;
    /// Gives a partition back, if it is ours: whatever of it comes again was let go of in order.
    fn disown(&self, partition: Arc<str>) -> Reply<()>;
    /// Says that this worker lives.
    fn beat(&self) -> Reply<()>;
    /// Says that this worker ends well: its silence is no death.
    fn leave(&self) -> Reply<()>;
    /// Forgets a part of what is older than the window; called often, covers everything in turn.
    fn prune(&self, window: Duration) -> Reply<u64>;
    /// What tells this store from all others.
    fn identity(&self) -> &str;
    /// Transactions for handlers, at most so many at once.
    ///
    /// # Errors
    /// This kind of store has none.
    fn transactions(&self, _most: usize) -> Result<Transactions, StoreError> {
        Err(StoreError::NoTransactions)
    }
}
