//! Handlers inside the store's transaction: their SQL, the inbox row and what they send commit or roll back together.
//!
//! Each event has a transaction of its own; several run side by side and share the flush of the server's log. Batches with
//! savepoints were measured too (docs/performance.md): faster on one connection, where handlers wait for each other; on several
//! they deadlock, and a slow or failing event would hold or undo its neighbours.
//!
//! The inbox row comes first: where two workers hold the same event, the second waits for the first one's end and finds it
//! done.
use super::Inner;
use super::periods::Periods;
use super::record::{Batch, Out, plain};
use super::session::{Lease, Sessions, begin_within, in_time};
use crate::store::{Committed, Effect, Outcome, Recorded, Seen, StoreError};
use futures_util::future::join;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::RwLock;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Row, SimpleQueryMessage};
use warren_publisher::postgres::problem;
use warren_shared::{Identity, Message};

/// A connection that does not roll back in this time is closed.
const ROLLBACK: Duration = Duration::from_secs(5);

/// Why a statement of a handler was not done.
#[derive(Debug, thiserror::Error)]
pub enum TxError {
    /// The server refused it, or the connection is lost.
    #[error("{}", problem(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// The handler has returned, or ran out of time.
    #[error("the transaction has ended: a handler's transaction is only for the time of its call")]
    Ended,
}

impl TxError {
    /// PostgreSQL's code, such as a violated constraint.
    #[must_use]
    pub fn code(&self) -> Option<&SqlState> {
        match self {
            Self::Sql(error) => error.code(),
            Self::Ended => None,
        }
    }
}

/// The transaction of a handler's call. Statements of one call may run at the same time; they reach the server in the order in
/// which they were first polled. `BEGIN`, `COMMIT` and `ROLLBACK` are Warren's: a handler rolls back by failing.
#[derive(Debug)]
pub struct Tx(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    lease: RwLock<Option<Lease>>,
    /// What the event is not to blame for.
    trouble: Mutex<Option<String>>,
}

impl Tx {
    /// Runs a statement; returns how many rows it touched.
    ///
    /// # Errors
    /// The server refused it.
    pub async fn execute(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<u64, TxError> {
        self.run(async |lease| lease.execute(&lease.prepare_cached(sql).await?, values).await).await
    }

    /// Runs a query.
    ///
    /// # Errors
    /// The server refused it.
    pub async fn query(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, TxError> {
        self.run(async |lease| lease.query(&lease.prepare_cached(sql).await?, values).await).await
    }

    /// Runs a query that has at most one row.
    ///
    /// # Errors
    /// The server refused it, or there are more.
    pub async fn query_opt(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Option<Row>, TxError> {
        self.run(async |lease| lease.query_opt(&lease.prepare_cached(sql).await?, values).await).await
    }

    /// Runs a query that has one row.
    ///
    /// # Errors
    /// The server refused it, or there are more or none.
    pub async fn query_one(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Row, TxError> {
        self.run(async |lease| lease.query_one(&lease.prepare_cached(sql).await?, values).await).await
    }

    /// Runs a query whose parameters' types are named, without preparing it: also where a pooler deals out connections by
    /// transaction.
    ///
    /// # Errors
    /// The server refused it.
    pub async fn query_typed(&self, sql: &str, values: &[(&(dyn ToSql + Sync), Type)]) -> Result<Vec<Row>, TxError> {
        self.run(async |lease| lease.query_typed(sql, values).await).await
    }

    async fn run<T>(&self, work: impl AsyncFnOnce(&Lease) -> Result<T, tokio_postgres::Error>) -> Result<T, TxError> {
        let lease = self.0.lease.read().await;
        let done = work(lease.as_ref().ok_or(TxError::Ended)?).await;
        done.map_err(|error| {
            if passes(&error) {
                let trouble = problem(&error);
                self.0.trouble.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(trouble);
            }
            error.into()
        })
    }
}

/// Whether the same transaction may well succeed when it is run again: the server or the way to it fails, or another
/// transaction was in the way.
fn passes(error: &tokio_postgres::Error) -> bool {
    let Some(code) = error.code() else { return error.is_closed() || error.as_db_error().is_none() };
    let class = &code.code()[..2];
    matches!(class, "08" | "53" | "57" | "58") && *code != SqlState::QUERY_CANCELED
        || [SqlState::T_R_SERIALIZATION_FAILURE, SqlState::T_R_DEADLOCK_DETECTED, SqlState::LOCK_NOT_AVAILABLE]
            .contains(code)
}

/// What a transaction records beside the handler's own work.
#[derive(Clone, Debug, Default)]
pub(crate) struct Entry {
    pub(crate) seen: Option<Seen>,
    pub(crate) started: Option<Identity>,
    pub(crate) partition: Arc<str>,
}

/// How a transaction ended.
#[derive(Debug)]
pub(crate) enum Ended<E> {
    /// It is durable, or another's is; with what its rows of the outbox send.
    Recorded(Recorded, Vec<Message>),
    /// The handler failed; nothing was changed.
    Failed(E),
}

/// Transactions for handlers: connections of their own, so that no slow handler keeps the store from its work.
#[derive(Clone, Debug)]
pub struct Transactions {
    inner: Arc<Inner>,
    sessions: Sessions,
}

impl Transactions {
    pub(super) fn new(inner: Arc<Inner>, sessions: Sessions) -> Self {
        Self { inner, sessions }
    }

    /// Runs a handler's work in a transaction. `Ok` of the work says what it sends. The caller may drop this future: the
    /// transaction is rolled back then.
    ///
    /// # Errors
    /// The store, or another transaction, was in the way: run it again.
    pub(crate) async fn run<E, Fut>(
        &self,
        entry: &Entry,
        timeout: Duration,
        work: impl FnOnce(Tx) -> Fut,
    ) -> Result<Ended<E>, StoreError>
    where
        Fut: Future<Output = Result<Vec<Message>, E>>,
        E: From<String>,
    {
        let effect = Effect {
            seen: entry.seen,
            outcome: Outcome::Done,
            started: entry.started,
            partition: entry.partition.clone(),
            out: Vec::new(),
            change: None,
        };
        // All connections may be with handlers that take their time: that is no fault of the database.
        let lease = self.sessions.lease().await?;
        let (lease, transaction) = match in_time(self.claim(lease, &effect, timeout)).await? {
            (lease, Some(transaction)) => (lease, transaction),
            (lease, None) => return in_time(self.known(lease, &effect)).await,
        };

        let shared = Arc::new(Shared { lease: RwLock::new(Some(lease)), trouble: Mutex::default() });
        let worked = work(Tx(shared.clone())).await;
        // Whatever the handler left running ends first.
        let lease = shared.lease.write().await.take().ok_or_else(|| StoreError::Unavailable("no connection".into()))?;
        let trouble = shared.trouble.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(trouble) = trouble {
            return Err(StoreError::Unavailable(format!("PostgreSQL: {trouble}")));
        }
        let out = match worked {
            Ok(out) => out,
            Err(failed) => {
                // Where that fails the connection is closed, which ends it as well.
                if matches!(tokio::time::timeout(ROLLBACK, lease.batch_execute("ROLLBACK")).await, Ok(Ok(()))) {
                    lease.keep();
                }
                return Ok(Ended::Failed(failed));
            }
        };
        let finished = in_time(self.finish(lease, &effect, &transaction, out)).await;
        finished.inspect_err(|_| {
            // It may have happened all the same.
            if let Some(seen) = effect.seen {
                self.inner.doubt(seen.identity);
            }
        })
    }

    /// Begins a transaction, and records the event as done in it; tells its name. None where the event is known.
    async fn claim(
        &self,
        lease: Lease,
        effect: &Effect,
        timeout: Duration,
    ) -> Result<(Lease, Option<String>), StoreError> {
        let inner = &self.inner;
        let effects = std::slice::from_ref(effect);
        let batch = Batch::of(effects, &[], &inner.worker).map_err(super::unwritable)?;
        loop {
            let periods = inner.periods();
            let (begin, xid) = (begin_within(timeout, &inner.lock(&periods)), ", pg_current_xact_id()::text");
            if let Some(sql) = plain(effect, &inner.schema, &periods, xid) {
                // One message for all of it.
                let said = lease.simple_query(&format!("{begin}; {sql}")).await;
                match claimed(said, &periods)? {
                    None => {
                        lease.batch_execute("ROLLBACK").await?;
                        inner.reread().await?;
                        continue;
                    }
                    Some(Some(transaction)) => return Ok((lease, Some(transaction))),
                    Some(None) => {
                        lease.batch_execute("ROLLBACK").await?;
                        return Ok((lease, None));
                    }
                }
            }
            let (sql, values) = (batch.statement(&inner.schema, &periods, &inner.now(), xid), batch.values());
            let (begun, rows) = join(lease.batch_execute(&begin), lease.query_typed(&sql, &values)).await;
            begun?;
            let Some(rows) = super::current(rows, &periods, 0)? else {
                lease.batch_execute("ROLLBACK").await?;
                inner.reread().await?;
                continue;
            };
            if let Some(row) = rows.first().filter(|row| !row.get::<_, Vec<i32>>(1).is_empty()) {
                let transaction = row.get(3);
                return Ok((lease, Some(transaction)));
            }
            lease.batch_execute("ROLLBACK").await?;
            return Ok((lease, None));
        }
    }

    /// The event has an outcome: another's, or our own whose answer was lost. Then its rows are still ours to publish.
    async fn known<E>(&self, lease: Lease, effect: &Effect) -> Result<Ended<E>, StoreError> {
        let mut recorded = Recorded::Superseded(Committed(()));
        if let Some(Seen { identity, .. }) = effect.seen
            && self.inner.doubts(&identity)
        {
            recorded = self.inner.recover(&lease, &identity).await?;
        }
        lease.keep();
        Ok(Ended::Recorded(recorded, Vec::new()))
    }

    /// Records what it sends, and commits.
    async fn finish<E: From<String>>(
        &self,
        lease: Lease,
        effect: &Effect,
        transaction: &str,
        out: Vec<Message>,
    ) -> Result<Ended<E>, StoreError> {
        let inner = &self.inner;
        let cause = effect.seen.map(|seen| super::uuid(&seen.identity));
        let mut rows = Out::of(&inner.worker);
        for message in &out {
            rows.push(0, &effect.partition, cause, message).map_err(super::unwritable)?;
        }
        // Done only in the transaction that recorded the event. It fails where the handler went on after a failed statement:
        // COMMIT alone would roll back and say nothing.
        let sent = if rows.is_empty() {
            // One message for both.
            let sql = format!("SELECT 0 WHERE {}; COMMIT", same(&format!("'{transaction}'")));
            let sent = lease.simple_query(&sql).await;
            sent.map(|sent| sent.iter().any(|message| matches!(message, SimpleQueryMessage::Row(_))).then_some(0))
        } else {
            let (sql, mut values) = (rows.statement(&inner.schema, &same("$8")), rows.values().to_vec());
            values.push((&transaction, Type::TEXT));
            let (sent, ended) = join(lease.query_typed(&sql, &values), lease.batch_execute("COMMIT")).await;
            sent.and_then(|sent| ended.map(|()| sent.first().map(|row| row.get(0))))
        };
        let why = match sent {
            Ok(None) => "the handler ended the store's transaction: BEGIN, COMMIT and ROLLBACK are not its own".into(),
            Ok(Some(base)) => {
                lease.keep();
                if let Some(seen) = effect.seen {
                    inner.trust(&seen.identity);
                }
                let recorded = Recorded::Fresh(Committed(()), rows.ids(base));
                return Ok(Ended::Recorded(recorded, out));
            }
            Err(error) if passes(&error) => return Err(error.into()),
            Err(error) if error.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => {
                "the handler returned success although a statement of its transaction had failed".into()
            }
            // Such as a constraint that is checked at the end.
            Err(error) => problem(&error),
        };
        Ok(Ended::Failed(E::from(why)))
    }
}

/// The transaction that recorded its event; none within where the event is known, none at all where the phase is over.
fn claimed(
    said: Result<Vec<SimpleQueryMessage>, tokio_postgres::Error>,
    periods: &Periods,
) -> Result<Option<Option<String>>, StoreError> {
    let said = match said {
        Ok(said) => said,
        // The table of a period that was dropped since.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // The row before it is that of the beginning.
    let row = said.iter().rev().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let current = row.filter(|row| row.get(0) == Some(&periods.phase.to_string()));
    Ok(current.map(|row| row.get(2).filter(|_| row.get(1) == Some("t")).map(str::to_owned)))
}

/// Whether the transaction is still the one that is named here.
fn same(name: &str) -> String {
    format!("pg_current_xact_id_if_assigned()::text = {name}")
}
