//! The store in PostgreSQL, for fleets: a schema a pool, one transaction a batch. Age is told by the store's time
//! (`../time.rs`), the server's clock is for people.
//!
//! A batch is one statement in one transaction, sent in one flight; the statement says which effects are fresh
//! (`record.rs`). The inbox is a table a period (`periods.rs`). A commit whose answer was lost is resolved by the inbox when
//! its batch is repeated. Nothing is kept in the session, so a pooler that deals out connections by transaction may stand
//! between.
mod periods;
mod record;
mod schema;
mod session;
mod start;
mod state;
mod tx;

pub(crate) use self::tx::{Ended, Entry};
pub use self::tx::{Transactions, Tx, TxError};

use self::periods::Periods;
use self::record::{Batch, chunks, uuid};
use self::session::{Lease, PATIENCE, Sessions, Values, begin, in_time};
use super::time::StoreTime;
use super::{
    Begin, Committed, Count, Due, Effect, Kept, Left, Listed, Recorded, Reply, Row, Seen, Start, State, Store,
    StoreError,
};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;
use warren_publisher::postgres::Postgres as Server;
use warren_shared::Identity;

/// Connections for the store's own calls: a batch of each kind may be under way.
const OWN: usize = 4;

/// The store in a database.
#[derive(Clone, Debug)]
pub struct Postgres(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    server: Server,
    sessions: Sessions,
    schema: String,
    class: i32,
    worker: String,
    identity: String,
    time: StoreTime,
    periods: Mutex<Arc<Periods>>,
    /// Events whose last commit may have happened although its answer never came.
    uncertain: Mutex<HashSet<Identity>>,
}

/// What a transaction made of an effect.
enum Written {
    /// It is new: the ids of its outgoing rows.
    Fresh(Vec<i64>),
    /// It was there.
    Known,
    /// Nothing: the state is another one.
    Outdated,
}

impl Postgres {
    /// Connects, and brings the pool's schema up to date. A server that is not there yet is waited for. `worker` must be unique
    /// to this run of the process: outbox rows belong to it.
    ///
    /// # Errors
    /// Says why it cannot be used and what to do.
    pub async fn open(server: &Server, pool: &str, worker: &str, patience: Duration) -> Result<Self, StoreError> {
        let sessions = Sessions::new(server.clone(), OWN)?;
        let schema = schema::name(pool);
        let deadline = Instant::now() + patience;
        let (identity, time, periods) = loop {
            let opened = async {
                let lease = sessions.lease().await?;
                let identity = schema::migrate(&lease, &schema, pool).await?;
                let time = StoreTime::from(schema::time(&lease, &schema).await?);
                let periods = Periods::read(&lease, &schema).await?;
                lease.keep();
                Ok((identity, time, periods))
            };
            match tokio::time::timeout(patience.max(*PATIENCE), opened).await {
                Ok(Ok(opened)) => break opened,
                Ok(Err(StoreError::Unavailable(why))) if Instant::now() < deadline => {
                    tracing::warn!("the store is not there yet, trying again: {why}");
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    return Err(StoreError::Unavailable(format!("PostgreSQL at {} does not answer", server.at())));
                }
            }
        };
        Ok(Self(Arc::new(Inner {
            class: schema::class(&schema),
            server: server.clone(),
            sessions,
            schema,
            worker: worker.into(),
            identity,
            time,
            periods: Mutex::new(Arc::new(periods)),
            uncertain: Mutex::default(),
        })))
    }

    /// Runs a call to its end, whatever becomes of who asked.
    fn call<T, F, Fut>(&self, work: F) -> Reply<T>
    where
        T: Send + 'static,
        F: FnOnce(Arc<Inner>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, StoreError>> + Send,
    {
        let inner = self.0.clone();
        let task = tokio::spawn(async move { in_time(work(inner)).await });
        Box::pin(async move { task.await.map_err(|_| StoreError::Unavailable("the call was broken off".into()))? })
    }
}

impl Inner {
    fn periods(&self) -> Arc<Periods> {
        self.periods.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The store's time now, in SQL.
    fn now(&self) -> String {
        moment(self.time.now())
    }

    /// A transaction of a phase holds its lock: what its beginning selects.
    fn lock(&self, periods: &Periods) -> String {
        format!(", pg_advisory_xact_lock_shared({}, {})", self.class, periods.phase)
    }

    /// Reads the periods again: the phase was over.
    async fn reread(&self) -> Result<(), StoreError> {
        let lease = self.sessions.lease().await?;
        let read = Periods::read(&lease, &self.schema).await?;
        lease.keep();
        *self.periods.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(read);
        Ok(())
    }

    /// One statement in a transaction of its own.
    async fn write(&self, sql: &str, values: Values<'_>) -> Result<Vec<tokio_postgres::Row>, StoreError> {
        let lease = self.sessions.lease().await?;
        let rows = lease.transact(&begin(""), sql, values).await?;
        lease.keep();
        Ok(rows)
    }

    async fn look(&self, asked: &[Seen]) -> Result<Vec<Option<Committed>>, StoreError> {
        let s = &self.schema;
        let identities: Vec<Uuid> = asked.iter().map(|seen| uuid(&seen.identity)).collect();
        loop {
            let periods = self.periods();
            // A row without identity tells the phase.
            let sql = format!(
                "SELECT k.identity, d.replayed, (SELECT phase FROM {s}.phase)
                 FROM (SELECT NULL::uuid AS identity UNION ALL {}) k LEFT JOIN {s}.dead d USING (identity)",
                periods.known(s, 1)
            );
            let lease = self.sessions.lease().await?;
            let rows = lease.transact(&begin(""), &sql, &[(&identities, Type::UUID_ARRAY)]).await;
            let Some(rows) = current(rows, &periods, 2)? else {
                self.reread().await?;
                continue;
            };
            lease.keep();
            let death =
                |row: &tokio_postgres::Row| Some((row.get::<_, Option<Uuid>>(0)?, row.get::<_, Option<i32>>(1)));
            let known: HashMap<Uuid, Option<i32>> = rows.iter().filter_map(death).collect();
            let stands = |seen: &Seen| {
                let death = known.get(&uuid(&seen.identity))?;
                let stands = death.is_none_or(|until| u32::try_from(until).unwrap_or(0) >= seen.replayed);
                stands.then_some(Committed(()))
            };
            return Ok(asked.iter().map(stands).collect());
        }
    }

    async fn commit(&self, effects: &[Effect]) -> Result<Vec<Recorded>, StoreError> {
        loop {
            let periods = self.periods();
            let lease = self.sessions.lease().await?;
            let Some(recorded) = self.record(&lease, &periods, effects).await? else {
                self.reread().await?;
                continue;
            };
            let answer = self.resolve(&lease, recorded).await?;
            lease.keep();
            return Ok(answer);
        }
    }

    /// Records effects in one transaction. None: the phase is over.
    async fn record<'e>(
        &self,
        lease: &Lease,
        periods: &Periods,
        effects: &'e [Effect],
    ) -> Result<Option<Vec<(&'e Effect, Written)>>, StoreError> {
        let (begin, chunks) = (begin(&self.lock(periods)), chunks(effects));
        let mut recorded = Vec::with_capacity(effects.len());
        // Mostly there is but one chunk, and no state: then all of it goes in one flight.
        let many = chunks.len() > 1 || effects.iter().any(|effect| effect.change.is_some());
        if many {
            lease.batch_execute(&begin).await?;
        }
        for chunk in chunks {
            let may = if many { state::current(lease, &self.schema, chunk).await? } else { Vec::new() };
            let batch = Batch::of(chunk, &may, &self.worker).map_err(unwritable)?;
            let (sql, values) = (batch.statement(&self.schema, periods, &self.now(), ""), batch.values());
            let rows =
                if many { lease.query_typed(&sql, &values).await } else { lease.transact(&begin, &sql, &values).await };
            let Some(rows) = current(rows, periods, 0)? else { return Ok(None) };
            let fresh: HashSet<i32> = rows.iter().flat_map(|row| row.get::<_, Vec<i32>>(1)).collect();
            let mut ids = batch.rows(rows.first().map_or(0, |row| row.get(2)));
            for (n, effect) in (0..).zip(chunk) {
                let written = match may.get(n as usize) {
                    Some(false) => Written::Outdated,
                    _ if fresh.contains(&n) => Written::Fresh(ids.remove(&n).unwrap_or_default()),
                    _ => Written::Known,
                };
                recorded.push((effect, written));
            }
        }
        if many {
            lease.batch_execute("COMMIT").await?;
        }
        Ok(Some(recorded))
    }

    /// What was superseded may have been so by our own commit, whose answer was lost: its outgoing rows are still to be
    /// published by us.
    async fn resolve(&self, lease: &Lease, recorded: Vec<(&Effect, Written)>) -> Result<Vec<Recorded>, StoreError> {
        let mut answer = Vec::with_capacity(recorded.len());
        for (effect, written) in recorded {
            let doubtful = effect.seen.map(|seen| seen.identity).filter(|identity| self.doubts(identity));
            answer.push(match (written, doubtful) {
                (Written::Fresh(rows), doubtful) => {
                    doubtful.inspect(|identity| self.trust(identity));
                    Recorded::Fresh(Committed(()), rows)
                }
                (Written::Known, Some(identity)) => self.recover(lease, &identity).await?,
                (Written::Known, None) => Recorded::Superseded(Committed(())),
                (Written::Outdated, _) => Recorded::Outdated,
            });
        }
        Ok(answer)
    }

    /// An outcome that may be our own: its rows, if they are still there, are made ours again. Who took us for dead may have
    /// adopted them, and the key's next event is to come after them. Where it was another's after all, its rows go out twice
    /// under the same ids.
    async fn recover(&self, lease: &Lease, cause: &Identity) -> Result<Recorded, StoreError> {
        let sql = format!(
            "UPDATE {}.outbox SET worker = $1 WHERE cause = $2 RETURNING id, partition, envelope, body",
            self.schema
        );
        let values: Values<'_> = &[(&self.worker, Type::TEXT), (&uuid(cause), Type::UUID)];
        let rows = lease.query_typed(&sql, values).await?;
        let mut rows: Vec<Row> = rows.iter().filter_map(row).collect();
        rows.sort_unstable_by_key(|row| row.id);
        self.trust(cause);
        let proof = Committed(());
        Ok(if rows.is_empty() { Recorded::Superseded(proof) } else { Recorded::Recovered(proof, rows) })
    }

    fn uncertain(&self) -> MutexGuard<'_, HashSet<Identity>> {
        self.uncertain.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an event's commit may have happened although its answer never came.
    fn doubts(&self, identity: &Identity) -> bool {
        self.uncertain().contains(identity)
    }

    fn doubt(&self, identity: Identity) {
        self.uncertain().insert(identity);
    }

    fn trust(&self, identity: &Identity) {
        self.uncertain().remove(identity);
    }

    async fn adopt(&self, left: &Left) -> Result<Vec<Row>, StoreError> {
        let s = &self.schema;
        let now = self.now();
        let silent = format!("NOT IN (SELECT id FROM {s}.workers WHERE seen >= {now} - make_interval(secs => $2))");
        let (which, name, age);
        let value: (&(dyn ToSql + Sync), Type) = match left {
            Left::In(partition) => {
                which = "partition = $2".to_owned();
                name = &**partition;
                (&name, Type::TEXT)
            }
            Left::Silent(silence) => {
                age = silence.as_secs_f64();
                which = format!("worker {silent}");
                (&age, Type::FLOAT8)
            }
        };
        let values: Values<'_> = &[(&self.worker, Type::TEXT), value];
        // Mostly there is nothing: then nothing is written.
        let any = format!("SELECT EXISTS (SELECT FROM {s}.outbox WHERE worker <> $1 AND {which})");
        let mut rows = Vec::new();
        if self.write(&any, values).await?.first().is_some_and(|row| row.get(0)) {
            let take = format!(
                "UPDATE {s}.outbox SET worker = $1 WHERE worker <> $1 AND {which} RETURNING id, partition, envelope, body"
            );
            rows.extend(self.write(&take, values).await?.iter().filter_map(row));
            rows.sort_unstable_by_key(|row: &Row| row.id);
        }
        if let Left::Silent(_) = left {
            let gone = format!("DELETE FROM {s}.workers WHERE id <> $1 AND NOT ended AND id {silent}");
            self.write(&gone, values).await?;
        }
        Ok(rows)
    }

    async fn note(&self, event: Identity, failed: u32) -> Result<(), StoreError> {
        let sql = format!(
            "INSERT INTO {}.starts VALUES ($1, 0, $2, {}) ON CONFLICT (identity)
             DO UPDATE SET runs = '{{}}', failed = excluded.failed, at = excluded.at",
            self.schema,
            self.now()
        );
        let failed = i32::try_from(failed).unwrap_or(i32::MAX);
        self.write(&sql, &[(&uuid(&event), Type::UUID), (&failed, Type::INT4)]).await.map(drop)
    }

    async fn prune(&self, window: Duration) -> Result<u64, StoreError> {
        let lease = self.sessions.lease().await?;
        let gone = periods::turn(&lease, &self.schema, self.class, window, &self.now()).await?;
        lease.keep();
        self.reread().await?;
        let sql = format!(
            "WITH gone AS (DELETE FROM {}.starts WHERE at < {} - make_interval(secs => $1) RETURNING 1)
             SELECT count(*) FROM gone",
            self.schema,
            self.now()
        );
        let starts = self.write(&sql, &[(&window.as_secs_f64(), Type::FLOAT8)]).await?;
        let ended = format!(
            "DELETE FROM {}.workers WHERE ended AND seen < {} - make_interval(secs => $1)",
            self.schema,
            self.now()
        );
        self.write(&ended, &[(&window.as_secs_f64(), Type::FLOAT8)]).await?;
        let states =
            self.write(&state::prune(&self.schema, &self.now()), &[(&window.as_secs_f64(), Type::FLOAT8)]).await?;
        Ok(gone
            + states.len() as u64
            + starts.first().map_or(0, |row| u64::try_from(row.get::<_, i64>(0)).unwrap_or(0)))
    }
}

impl Store for Postgres {
    fn look(&self, asked: Vec<Seen>) -> Reply<Vec<Option<Committed>>> {
        self.call(|inner| async move { inner.look(&asked).await })
    }

    fn start(&self, events: Vec<Begin>) -> Reply<Vec<Start>> {
        self.call(|inner| async move { inner.start(&events).await })
    }

    fn unstart(&self, events: Vec<Identity>) -> Reply<()> {
        self.call(|inner| async move { inner.unstart(&events).await })
    }

    fn note(&self, event: Identity, failed: u32) -> Reply<()> {
        self.call(move |inner| async move { inner.note(event, failed).await })
    }

    fn commit(&self, effects: Arc<Vec<Effect>>) -> Reply<Vec<Recorded>> {
        let (inner, asked) = (self.0.clone(), effects.clone());
        let answer = self.call(|inner| async move { inner.commit(&effects).await });
        Box::pin(async move {
            answer.await.inspect_err(|error| {
                // What is refused was rolled back for certain.
                if matches!(error, StoreError::Refused(_)) {
                    return;
                }
                let sending = asked.iter().filter(|effect| !effect.out.is_empty());
                sending.filter_map(|effect| effect.seen).for_each(|seen| inner.doubt(seen.identity));
            })
        })
    }

    fn load(&self, ids: Vec<Uuid>) -> Reply<Vec<Option<Kept>>> {
        self.call(|inner| async move {
            let rows = inner.write(&state::load(&inner.schema), &[(&ids, Type::UUID_ARRAY)]).await?;
            let found: HashMap<Uuid, Kept> = rows.iter().map(state::kept).collect();
            Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
        })
    }

    fn keep(&self, id: Uuid, state: State) -> Reply<()> {
        self.call(move |inner| async move {
            let State { kind, name, status, key, ended, body, .. } = &state;
            let values: Values<'_> = &[
                (&id, Type::UUID),
                (kind, Type::TEXT),
                (name, Type::TEXT),
                (status, Type::TEXT),
                (key, Type::TEXT),
                (ended, Type::BOOL),
                (body, Type::BYTEA),
            ];
            inner.write(&state::keep(&inner.schema, &inner.now()), values).await.map(drop)
        })
    }

    fn list(&self, listed: Listed) -> Reply<Vec<(Uuid, Kept)>> {
        self.call(move |inner| async move {
            let most = i64::from(listed.most);
            let rows = inner.write(&state::list(&inner.schema), &state::listed(&listed, &most)).await?;
            Ok(rows.iter().map(state::kept).collect())
        })
    }

    fn due(&self, kind: &'static str, before: i64, most: u32) -> Reply<Vec<Due>> {
        self.call(move |inner| async move {
            let most = i64::from(most);
            let values: Values<'_> = &[(&kind, Type::TEXT), (&before, Type::INT8), (&most, Type::INT8)];
            let rows = inner.write(&state::due(&inner.schema), values).await?;
            Ok(rows.iter().map(|row| Due { id: row.get(0), name: row.get(1), at: row.get(2) }).collect())
        })
    }

    fn count(&self, kind: &'static str) -> Reply<Vec<Count>> {
        self.call(move |inner| async move {
            let rows = inner.write(&state::count(&inner.schema), &[(&kind, Type::TEXT)]).await?;
            Ok(rows.iter().map(state::counted).collect())
        })
    }

    fn adopt(&self, left: Left) -> Reply<Vec<Row>> {
        self.call(|inner| async move { inner.adopt(&left).await })
    }

    fn give_up(&self, rows: Vec<i64>) -> Reply<()> {
        self.call(|inner| async move {
            let sql = format!("UPDATE {}.outbox SET worker = '' WHERE id = ANY($1)", inner.schema);
            inner.write(&sql, &[(&rows, Type::INT8_ARRAY)]).await.map(drop)
        })
    }

    fn sent(&self, rows: Vec<i64>) -> Reply<()> {
        self.call(|inner| async move {
            let sql = format!("DELETE FROM {}.outbox WHERE id = ANY($1)", inner.schema);
            inner.write(&sql, &[(&rows, Type::INT8_ARRAY)]).await.map(drop)
        })
    }

    fn own(&self, partition: Arc<str>) -> Reply<Option<Arc<str>>> {
        self.call(move |inner| async move {
            let s = &inner.schema;
            let sql = format!(
                "WITH owned AS (INSERT INTO {s}.owners AS o VALUES ($2, $1) ON CONFLICT (partition)
                     DO UPDATE SET worker = excluded.worker WHERE o.worker <> excluded.worker)
                 SELECT worker FROM {s}.owners WHERE partition = $2 AND worker <> $1"
            );
            let values: Values<'_> = &[(&inner.worker, Type::TEXT), (&&*partition, Type::TEXT)];
            let rows = inner.write(&sql, values).await?;
            Ok(rows.first().map(|row| row.get::<_, &str>(0).into()))
        })
    }

    fn disown(&self, partition: Arc<str>) -> Reply<()> {
        self.call(move |inner| async move {
            let sql = format!("DELETE FROM {}.owners WHERE partition = $2 AND worker = $1", inner.schema);
            let values: Values<'_> = &[(&inner.worker, Type::TEXT), (&&*partition, Type::TEXT)];
            inner.write(&sql, values).await.map(drop)
        })
    }

    fn leave(&self) -> Reply<()> {
        self.call(|inner| async move {
            let s = &inner.schema;
            let sql = format!(
                "WITH gone AS (DELETE FROM {s}.owners WHERE worker = $1)
                 UPDATE {s}.workers SET ended = true WHERE id = $1"
            );
            inner.write(&sql, &[(&inner.worker, Type::TEXT)]).await.map(drop)
        })
    }

    fn beat(&self) -> Reply<()> {
        self.call(|inner| async move {
            let (s, now) = (&inner.schema, inner.time.now());
            let sql = format!(
                "WITH beat AS (INSERT INTO {s}.workers (id, seen) VALUES ($1, {}) ON CONFLICT (id) DO UPDATE SET seen = excluded.seen)
                 UPDATE {s}.meta SET value = greatest(value::bigint, {now})::text WHERE name = 'time' RETURNING value::bigint",
                moment(now)
            );
            let kept = inner.write(&sql, &[(&inner.worker, Type::TEXT)]).await?;
            kept.iter().for_each(|row| inner.time.hear(row.get(0)));
            Ok(())
        })
    }

    fn prune(&self, window: Duration) -> Reply<u64> {
        self.call(move |inner| async move { inner.prune(window).await })
    }

    fn identity(&self) -> &str {
        &self.0.identity
    }

    fn transactions(&self, most: usize) -> Result<Transactions, StoreError> {
        Ok(Transactions::new(self.0.clone(), Sessions::new(self.0.server.clone(), most)?))
    }
}

/// A moment of the store's time, in SQL.
fn moment(millis: i64) -> String {
    format!("to_timestamp({millis}::float8 / 1000)")
}

/// The answer, if its phase still holds; the phase stands in this column of the first row.
fn current(
    rows: Result<Vec<tokio_postgres::Row>, tokio_postgres::Error>,
    periods: &Periods,
    column: usize,
) -> Result<Option<Vec<tokio_postgres::Row>>, StoreError> {
    match rows {
        Ok(rows) if rows.first().is_some_and(|row| row.get::<_, i32>(column) == periods.phase) => Ok(Some(rows)),
        Ok(_) => Ok(None),
        // The table of a period that was dropped since.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn row(row: &tokio_postgres::Row) -> Option<Row> {
    let (id, partition, envelope): (i64, &str, &str) = (row.get(0), row.get(1), row.get(2));
    let mut message = super::message(id, envelope)?;
    message.body = row.get(3);
    Some(Row { id, partition: partition.into(), message })
}

fn unwritable(error: serde_json::Error) -> StoreError {
    StoreError::Refused(format!("an outgoing event cannot be written: {error}"))
}

#[cfg(test)]
mod tests;
