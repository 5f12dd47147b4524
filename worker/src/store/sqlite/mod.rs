//! The store in a file: SQLite in WAL mode with `synchronous=FULL`, shared by the processes of one machine.
//!
//! One thread owns the connection and does one call after the other; a batch is a call, a call is a transaction.
mod filter;
mod inbox;
mod start;
mod state;

use self::inbox::{Fresh, Inbox};
use super::time::StoreTime;
use super::{
    Begin, Committed, Count, Due, Effect, Kept, Left, Listed, Recorded, Reply, Row, Seen, Start, State, Store,
    StoreError,
};
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;
use uuid::Uuid;
use warren_shared::Identity;

/// The schema, a step an entry; a store remembers how many it has.
const SCHEMA: [&str; 6] = [inbox::TABLES, "
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE starts (identity BLOB PRIMARY KEY, starts INTEGER NOT NULL, failed INTEGER NOT NULL, at INTEGER NOT NULL)
        WITHOUT ROWID;
    CREATE TABLE outbox (id INTEGER PRIMARY KEY AUTOINCREMENT, worker TEXT NOT NULL, partition TEXT NOT NULL,
        envelope TEXT NOT NULL, body BLOB NOT NULL);
    CREATE TABLE workers (id TEXT PRIMARY KEY, seen INTEGER NOT NULL) WITHOUT ROWID;
", state::TABLE, state::DUE, "
    INSERT INTO meta VALUES ('time', CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER));
    ALTER TABLE states ADD COLUMN at INTEGER NOT NULL DEFAULT 0;
    UPDATE states SET at = changed;
", "
    ALTER TABLE starts ADD COLUMN runs TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE workers ADD COLUMN ended INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE owners (partition TEXT PRIMARY KEY, worker TEXT NOT NULL) WITHOUT ROWID;
"];

/// How long a lock of another process is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at such a lock, at most, in milliseconds.
const PAUSE: u64 = 5;

type Job = Box<dyn FnOnce(&mut Desk) + Send>;

/// What the store's thread owns.
#[derive(Debug)]
struct Desk {
    connection: Connection,
    inbox: Inbox,
}

impl Desk {
    fn write(&mut self) -> rusqlite::Result<(Transaction<'_>, &mut Inbox)> {
        Ok((self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?, &mut self.inbox))
    }
}

/// The store in a file.
#[derive(Debug)]
pub struct Sqlite {
    jobs: mpsc::Sender<Job>,
    path: String,
    worker: String,
    identity: String,
    time: Arc<StoreTime>,
    slice: std::sync::atomic::AtomicU8,
}

impl Sqlite {
    /// Opens the file, makes it where it is missing, and brings its schema up to date. `worker` must be unique to this
    /// run of the process: outbox rows belong to it.
    ///
    /// # Errors
    /// Says why it cannot be used and what to do.
    pub fn open(path: &Path, worker: &str) -> Result<Self, StoreError> {
        let refuse = |error: rusqlite::Error| {
            let cure = match error.sqlite_error_code() {
                Some(rusqlite::ErrorCode::DiskFull) => "make room on the disk, or set DATABASE_URL to another place",
                Some(rusqlite::ErrorCode::NotADatabase) => "the file is something else, set DATABASE_URL to another",
                Some(rusqlite::ErrorCode::DatabaseBusy) => "another process holds it locked, stop that first",
                Some(rusqlite::ErrorCode::CannotOpen) => "create its directory, or set DATABASE_URL to another place",
                _ => "make file and directory writable for this user, or set DATABASE_URL to another place",
            };
            StoreError::Open { path: path.display().to_string(), cause: error.to_string(), cure }
        };
        create(path);
        let mut connection = connect(path).map_err(refuse)?;
        migrate(&mut connection, refuse)?;
        let identity = identity(&mut connection).map_err(refuse)?;
        let time = Arc::new(StoreTime::from(connection.query_row(TIME, [], |row| row.get(0)).map_err(refuse)?));

        let mut desk = Desk { connection, inbox: Inbox::default() };
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || queue.into_iter().for_each(|job| job(&mut desk)))
            .map_err(|e| StoreError::Unavailable(e.to_string()))?;
        Ok(Self { jobs, path: path.display().to_string(), worker: worker.into(), identity, time, slice: 0.into() })
    }

    /// The same store, if it is this pool's or nobody's yet: what one pool has handled another would take for done.
    ///
    /// # Errors
    /// It is another pool's.
    pub async fn of_pool(self, pool: &str) -> Result<Self, StoreError> {
        let (ours, path) = (pool.to_owned(), self.path.clone());
        let claim = self.run(move |tx| {
            tx.execute("INSERT OR IGNORE INTO meta VALUES ('pool', ?1)", [ours])?;
            tx.query_row("SELECT value FROM meta WHERE name = 'pool'", [], |row| row.get::<_, String>(0))
        });
        let owner = claim.await?;
        if owner == pool {
            return Ok(self);
        }
        let cause = format!("it is the store of the pool '{owner}', not of '{pool}'");
        Err(StoreError::Open { path, cause, cure: "give each pool a DATABASE_URL of its own" })
    }

    /// Runs a transaction on the store's thread.
    fn run<T, F>(&self, work: F) -> Reply<T>
    where
        T: Send + 'static,
        F: FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    {
        self.call(move |desk| {
            let (tx, _) = desk.write()?;
            let value = work(&tx)?;
            tx.commit().map(|()| value)
        })
    }

    /// Runs work on the store's thread.
    fn call<T, F>(&self, work: F) -> Reply<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut Desk) -> rusqlite::Result<T> + Send + 'static,
    {
        let (tell, answer) = oneshot::channel();
        let job: Job = Box::new(move |desk| {
            // The caller may have been dropped by a drain.
            let _ = tell.send(work(desk).map_err(refusal));
        });
        let sent = self.jobs.send(job);
        Box::pin(async move {
            let gone = || StoreError::Unavailable("its thread has ended".into());
            sent.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?
        })
    }
}

/// What an error of a call means: the same values would be refused again, or the file cannot be used now.
fn refusal(error: rusqlite::Error) -> StoreError {
    use rusqlite::ErrorCode::{ConstraintViolation, TooBig, TypeMismatch};
    let of_the_data = matches!(error.sqlite_error_code(), Some(ConstraintViolation | TooBig | TypeMismatch))
        || matches!(error, rusqlite::Error::ToSqlConversionFailure(_));
    if of_the_data { StoreError::Refused(error.to_string()) } else { StoreError::Unavailable(error.to_string()) }
}

/// Makes a new file that nobody but this user reads: it holds payloads. SQLite gives the files beside it (`-wal`, `-shm`) the same
/// mode. What is there already stays as it is, and what cannot be made SQLite will name.
fn create(path: &Path) {
    let name = path.as_os_str().as_encoded_bytes();
    if !name.starts_with(b":") && !name.starts_with(b"file:") {
        let _ = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    }
}

/// Who switches a new file to WAL while another does is told at once that it is locked, whatever the timeout says: it
/// is tried again here.
fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let begun = Instant::now();
    loop {
        let result = Connection::open(path).and_then(|mut connection| prepare(&mut connection).map(|()| connection));
        let busy = |e: &rusqlite::Error| e.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy);
        if begun.elapsed() > PATIENCE || !result.as_ref().is_err_and(busy) {
            return result;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn prepare(connection: &mut Connection) -> rusqlite::Result<()> {
    connection.busy_handler(Some(wait))?;
    // Before anything is written: a slip in DATABASE_URL must not change another program's data.
    let is_foreign = "SELECT count(*) > 0 AND NOT sum(name = 'inbox') FROM sqlite_master WHERE type = 'table'";
    if connection.query_row(is_foreign, [], |row| row.get(0))? {
        let error = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_NOTADB);
        return Err(rusqlite::Error::SqliteFailure(error, Some("it holds another program's tables".into())));
    }
    connection.set_prepared_statement_cache_capacity(64);
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "cache_size", -4_000)
}

/// Waits for another process' transaction. SQLite's own handler soon sleeps for a tenth of a second at a time, in which
/// busier processes take the lock over and over: a partition's new owner would start late.
fn wait(attempt: i32) -> bool {
    let pause = u64::try_from(1 + attempt / 8).unwrap_or(1).min(PAUSE);
    std::thread::sleep(Duration::from_millis(pause));
    u128::try_from(attempt).unwrap_or(0) * u128::from(PAUSE) < PATIENCE.as_millis()
}

/// Under one write lock: eight workers that start at once make the schema once.
fn migrate(connection: &mut Connection, refuse: impl Fn(rusqlite::Error) -> StoreError) -> Result<(), StoreError> {
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(&refuse)?;
    let found: i64 = tx.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(&refuse)?;
    let known = SCHEMA.len() as i64;
    if found > known {
        return Err(StoreError::Newer { found, known });
    }
    for step in SCHEMA.iter().skip(usize::try_from(found).unwrap_or(0)) {
        tx.execute_batch(step).map_err(&refuse)?;
    }
    tx.pragma_update(None, "user_version", known).map_err(&refuse)?;
    tx.commit().map_err(&refuse)
}

fn identity(connection: &mut Connection) -> rusqlite::Result<String> {
    let fresh = uuid::Uuid::new_v4().to_string();
    connection.execute("INSERT OR IGNORE INTO meta VALUES ('identity', ?1)", [&fresh])?;
    connection.query_row("SELECT value FROM meta WHERE name = 'identity'", [], |row| row.get(0))
}

/// The store's time as it was told last.
const TIME: &str = "SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'time'";

/// The clock of the day, for people: nothing is decided by it.
fn today() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

fn record(
    tx: &Transaction<'_>,
    inbox: &Inbox,
    fresh: &mut Fresh,
    worker: &str,
    effect: &Effect,
    at: i64,
) -> rusqlite::Result<Recorded> {
    if let Some(change) = &effect.change
        && state::version(tx, &change.id)? != change.found
    {
        return Ok(Recorded::Outdated);
    }
    if let Some(identity) = effect.started {
        tx.prepare_cached("DELETE FROM starts WHERE identity = ?1")?.execute([identity.as_bytes()])?;
    }
    if let Some(seen) = &effect.seen
        && !inbox.claim(tx, fresh, seen, effect.outcome, at)?
    {
        return Ok(Recorded::Superseded(Committed(())));
    }
    if let Some(change) = &effect.change {
        state::write(tx, change, today(), at)?;
    }
    let mut rows = Vec::with_capacity(effect.out.len());
    for message in &effect.out {
        let envelope = serde_json::to_string(message).map_err(|e| rusqlite::Error::ToSqlConversionFailure(e.into()))?;
        tx.prepare_cached("INSERT INTO outbox (worker, partition, envelope, body) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![worker, effect.partition, envelope, message.body])?;
        rows.push(tx.last_insert_rowid());
    }
    Ok(Recorded::Fresh(Committed(()), rows))
}

fn prune(desk: &mut Desk, slice: u8, before: i64) -> rusqlite::Result<u64> {
    let (tx, inbox) = desk.write()?;
    let from = vec![slice];
    let to = if slice == u8::MAX { vec![u8::MAX; 17] } else { vec![slice + 1] };
    let starts = tx
        .prepare_cached("DELETE FROM starts WHERE identity >= ?1 AND identity < ?2 AND at < ?3")?
        .execute(params![from, to, before])?;
    let states = tx
        .prepare_cached("DELETE FROM states WHERE id >= ?1 AND id < ?2 AND ended AND at < ?3")?
        .execute(params![from, to, before])?;
    tx.prepare_cached("DELETE FROM workers WHERE ended AND seen < ?1")?.execute([before])?;
    let gone = (starts + states) as u64 + u64::try_from(inbox.prune(&tx, before)?).unwrap_or(0);
    tx.commit().map(|()| gone)
}

fn row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Option<Row>> {
    let (id, envelope): (i64, String) = (row.get(0)?, row.get(2)?);
    let Some(mut message) = super::message(id, &envelope) else { return Ok(None) };
    message.body = row.get(3)?;
    Ok(Some(Row { id, partition: row.get(1)?, message }))
}

impl Store for Sqlite {
    fn look(&self, asked: Vec<Seen>) -> Reply<Vec<Option<Committed>>> {
        // A read: no write lock, so that it never waits for another process that writes.
        self.call(move |Desk { connection, inbox }| {
            let tx = connection.unchecked_transaction()?;
            inbox.refresh(&tx)?;
            asked.iter().map(|seen| Ok(inbox.knows(&tx, seen)?.then_some(Committed(())))).collect()
        })
    }

    fn start(&self, events: Vec<Begin>) -> Reply<Vec<Start>> {
        let (worker, now) = (self.worker.clone(), self.time.now());
        self.run(move |tx| events.iter().map(|event| start::begin(tx, event, &worker, now)).collect())
    }

    fn unstart(&self, events: Vec<Identity>) -> Reply<()> {
        let worker = self.worker.clone();
        self.run(move |tx| events.iter().try_for_each(|event| start::take_back(tx, event, &worker)))
    }

    fn note(&self, event: Identity, failed: u32) -> Reply<()> {
        let now = self.time.now();
        self.run(move |tx| {
            tx.prepare_cached(
                "INSERT INTO starts (identity, starts, failed, at) VALUES (?1, 0, ?2, ?3)
                 ON CONFLICT (identity) DO UPDATE SET runs = '[]', failed = excluded.failed, at = excluded.at",
            )?
            .execute(params![event.as_bytes(), failed, now])?;
            Ok(())
        })
    }

    fn commit(&self, effects: Arc<Vec<Effect>>) -> Reply<Vec<Recorded>> {
        let (worker, at) = (self.worker.clone(), self.time.now());
        self.call(move |desk| {
            let (tx, inbox) = desk.write()?;
            inbox.refresh(&tx)?;
            let mut fresh = Fresh::default();
            let record = |effect: &Effect| record(&tx, inbox, &mut fresh, &worker, effect, at);
            let recorded = effects.iter().map(record).collect::<rusqlite::Result<Vec<_>>>()?;
            inbox.write(&tx, &mut fresh, at)?;
            tx.commit()?;
            inbox.remember(fresh);
            Ok(recorded)
        })
    }

    fn load(&self, ids: Vec<Uuid>) -> Reply<Vec<Option<Kept>>> {
        self.call(move |desk| ids.iter().map(|id| state::read(&desk.connection, id)).collect())
    }

    fn keep(&self, id: Uuid, state: State) -> Reply<()> {
        let now = self.time.now();
        self.run(move |tx| {
            let change = super::Change { id, found: 0, state };
            if state::version(tx, &change.id)? == 0 { state::write(tx, &change, today(), now) } else { Ok(()) }
        })
    }

    fn list(&self, listed: Listed) -> Reply<Vec<(Uuid, Kept)>> {
        self.call(move |desk| state::list(&desk.connection, &listed))
    }

    fn due(&self, kind: &'static str, before: i64, most: u32) -> Reply<Vec<Due>> {
        self.call(move |desk| state::due(&desk.connection, kind, before, most))
    }

    fn count(&self, kind: &'static str) -> Reply<Vec<Count>> {
        self.call(move |desk| state::count(&desk.connection, kind, today()))
    }

    fn adopt(&self, left: Left) -> Reply<Vec<Row>> {
        let (worker, now) = (self.worker.clone(), self.time.now());
        self.call(move |desk| {
            let columns = "id, partition, envelope, body";
            // Mostly there is nothing, and a read waits for no other process.
            if let Left::In(partition) = &left {
                let any = "SELECT EXISTS (SELECT 1 FROM outbox WHERE partition = ?1 AND worker <> ?2)";
                let found: bool =
                    desk.connection.prepare_cached(any)?.query_row(params![partition, worker], |row| row.get(0))?;
                if !found {
                    return Ok(Vec::new());
                }
            }
            let (tx, _) = desk.write()?;
            let rows = match left {
                Left::In(partition) => {
                    let rows = tx
                        .prepare_cached(&format!(
                            "SELECT {columns} FROM outbox WHERE partition = ?1 AND worker <> ?2 ORDER BY id"
                        ))?
                        .query_map(params![partition, worker], row)?
                        .filter_map(Result::transpose)
                        .collect::<rusqlite::Result<Vec<Row>>>()?;
                    tx.execute("UPDATE outbox SET worker = ?2 WHERE partition = ?1", params![partition, worker])?;
                    rows
                }
                Left::Silent(age) => {
                    let before = now - i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
                    let silent = "worker <> ?1 AND worker NOT IN (SELECT id FROM workers WHERE seen >= ?2)";
                    let rows = tx
                        .prepare_cached(&format!("SELECT {columns} FROM outbox WHERE {silent} ORDER BY id"))?
                        .query_map(params![worker, before], row)?
                        .filter_map(Result::transpose)
                        .collect::<rusqlite::Result<Vec<Row>>>()?;
                    tx.execute(&format!("UPDATE outbox SET worker = ?1 WHERE {silent}"), params![worker, before])?;
                    tx.execute("DELETE FROM workers WHERE seen < ?1 AND NOT ended", [before])?;
                    rows
                }
            };
            tx.commit().map(|()| rows)
        })
    }

    fn give_up(&self, rows: Vec<i64>) -> Reply<()> {
        self.run(move |tx| {
            for id in &rows {
                tx.prepare_cached("UPDATE outbox SET worker = '' WHERE id = ?1")?.execute([id])?;
            }
            Ok(())
        })
    }

    fn sent(&self, rows: Vec<i64>) -> Reply<()> {
        self.run(move |tx| {
            for id in &rows {
                tx.prepare_cached("DELETE FROM outbox WHERE id = ?1")?.execute([id])?;
            }
            Ok(())
        })
    }

    fn own(&self, partition: Arc<str>) -> Reply<Option<Arc<str>>> {
        let worker = self.worker.clone();
        self.run(move |tx| {
            let owner = "SELECT worker FROM owners WHERE partition = ?1 AND worker <> ?2";
            let owner = tx.prepare_cached(owner)?.query_row(params![partition, worker], |row| row.get(0)).optional()?;
            tx.execute("INSERT OR REPLACE INTO owners VALUES (?1, ?2)", params![partition, worker])?;
            Ok(owner)
        })
    }

    fn disown(&self, partition: Arc<str>) -> Reply<()> {
        let worker = self.worker.clone();
        self.run(move |tx| {
            tx.execute("DELETE FROM owners WHERE partition = ?1 AND worker = ?2", params![partition, worker]).map(drop)
        })
    }

    fn leave(&self) -> Reply<()> {
        let worker = self.worker.clone();
        self.run(move |tx| {
            tx.execute("DELETE FROM owners WHERE worker = ?1", [&worker])?;
            tx.execute("UPDATE workers SET ended = 1 WHERE id = ?1", [&worker]).map(drop)
        })
    }

    fn beat(&self) -> Reply<()> {
        let (worker, time) = (self.worker.clone(), self.time.clone());
        self.run(move |tx| {
            let now = time.now();
            tx.execute(
                "INSERT INTO workers (id, seen) VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET seen = excluded.seen",
                params![worker, now],
            )?;
            tx.execute("UPDATE meta SET value = max(CAST(value AS INTEGER), ?1) WHERE name = 'time'", [now])?;
            time.hear(tx.query_row(TIME, [], |row| row.get(0))?);
            Ok(())
        })
    }

    fn prune(&self, window: Duration) -> Reply<u64> {
        // A 256th of the starts a call: no index on time to pay for at every start, no long pause here.
        let slice = self.slice.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let before = self.time.now() - i64::try_from(window.as_millis()).unwrap_or(i64::MAX);
        self.call(move |desk| {
            let pruned = prune(desk, slice, before);
            if pruned.is_err() {
                desk.inbox = Inbox::default();
            }
            pruned
        })
    }

    fn identity(&self) -> &str {
        &self.identity
    }
}

#[cfg(test)]
mod tests;
