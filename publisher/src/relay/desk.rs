//! The outbox table on one connection: the only SQL of the relay.
//!
//! No statement is prepared: they would be lost with the connection, and stale when somebody changes the table.
use super::row::{Row, Sent};
use crate::outbox::Table;
use crate::postgres::{Connection, Postgres, PostgresError};
use std::collections::HashSet;
use std::time::Duration;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error};
use warren_shared::event::Limits;

/// Rows that are taken at once.
const ROWS: i64 = 500;
/// Bytes of data after which no further row is taken, as PostgreSQL keeps them (it compresses large JSON).
const BYTES: i64 = 8 << 20;
/// Sent rows that are deleted at once.
const PORTION: i64 = 2000;
/// Somebody else's lock is waited for no longer: the other keys have to go on. Shorter than PostgreSQL's deadlock_timeout (1s).
const LOCKED: &str = "500ms";
/// A server that is there and does not answer within this time is left.
const ANSWER: Duration = Duration::from_secs(30);
/// A connection that asks nothing for so long is ended by the server. A relay asks every second.
const IDLE: &str = "30s";
/// The first half of the advisory lock; the second is the table's oid.
const LOCK: i32 = i32::from_be_bytes(*b"wrrn");

/// Why the table cannot be used now.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RelayError {
    /// The server.
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    /// It does not answer.
    #[error("PostgreSQL at {0} does not answer within {ANSWER:?}")]
    Silent(String),
    /// Somebody has locked the whole table.
    #[error("the table {table} is locked by {by}")]
    Locked {
        /// The table.
        table: String,
        /// The transaction that holds it, and how to end it.
        by: String,
    },
    /// There is no such table.
    #[error(
        "there is no table {table} in {at}: make it with 'warren-publisher relay --apply', or with what 'relay --ddl' prints"
    )]
    Missing {
        /// The table.
        table: String,
        /// Hosts and database.
        at: String,
    },
    /// The table is another.
    #[error(
        "the table {table} in {at} is not an outbox ({problem}): compare it with what 'warren-publisher relay --ddl' prints"
    )]
    Different {
        /// The table.
        table: String,
        /// Hosts and database.
        at: String,
        /// What the server said.
        problem: String,
    },
}

impl RelayError {
    /// Whether it may be gone in a moment.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Postgres(error) => error.is_passing(),
            Self::Silent(_) | Self::Locked { .. } => true,
            Self::Missing { .. } | Self::Different { .. } => false,
        }
    }
}

/// Whose rows are taken.
#[derive(Clone, Copy, Debug)]
pub(super) enum Keys<'a> {
    AllBut(&'a [String]),
    Only(&'a [String]),
}

/// What is not published.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    pub(super) unsent: i64,
    pub(super) refused: i64,
}

/// An open connection to the table.
pub(super) struct Desk {
    client: Client,
    postgres: Postgres,
    table: Table,
    limits: Limits,
}

impl Desk {
    /// Connects, and tries what will be done with the table: rows that are published and cannot be marked would be
    /// published again and again.
    pub(super) async fn open(postgres: &Postgres, table: &Table, limits: Limits) -> Result<Self, RelayError> {
        let (client, connection) = postgres.connect().await?;
        drive(connection);
        let desk = Self { client, postgres: postgres.clone(), table: table.clone(), limits };
        desk.query("SELECT set_config('lock_timeout', $1, false)", &[(&LOCKED, Type::TEXT)]).await?;
        desk.look(Keys::AllBut(&[]), &[], 0).await?;
        // PostgreSQL 14 and newer: a relay that is frozen holds the lock no longer than this.
        let release = "SELECT set_config('idle_session_timeout', $1, false) \
                       WHERE current_setting('server_version_num')::int >= 140000";
        desk.query(release, &[(&IDLE, Type::TEXT)]).await?;
        for change in ["UPDATE {} SET sent_at = NULL, error = NULL WHERE false", "DELETE FROM {} WHERE false"] {
            desk.query(&change.replace("{}", &desk.table.to_string()), &[]).await?;
        }
        Ok(desk)
    }

    /// Makes the table where it is missing; false if it was there.
    pub(super) async fn make(postgres: &Postgres, table: &Table) -> Result<bool, RelayError> {
        let (mut client, connection) = postgres.connect().await?;
        drive(connection);
        let make = async {
            let tx = client.transaction().await?;
            // Two that make it at once would both find it missing.
            tx.execute_typed("SELECT pg_advisory_xact_lock($1, 0)", &[(&LOCK, Type::INT4)]).await?;
            let name = table.to_string();
            let there = tx.query_typed("SELECT to_regclass($1) IS NOT NULL", &[(&name, Type::TEXT)]).await?;
            if there.first().map_or(Ok(false), |row| row.try_get(0))? {
                return Ok(false);
            }
            tx.batch_execute(&table.ddl()).await?;
            tx.commit().await?;
            Ok(true)
        };
        make.await.map_err(|error: Error| postgres.explain(&error).into())
    }

    /// Whether this relay is the one that publishes: no other can be until this connection ends.
    pub(super) async fn lead(&self) -> Result<bool, RelayError> {
        let sql = "SELECT pg_try_advisory_lock($1, $2::regclass::oid::int4)";
        let rows = self.query(sql, &[(&LOCK, Type::INT4), (&self.table.to_string(), Type::TEXT)]).await?;
        rows.first().map_or(Ok(false), |row| row.try_get(0)).map_err(|error| self.explain(&error))
    }

    /// The first rows that wait, in order, without those that the broker has and whose mark waits. A row that another
    /// transaction has locked says so.
    pub(super) async fn take(&self, of: Keys<'_>, unmarked: &[i64]) -> Result<Vec<Row>, RelayError> {
        let mut rows = self.look(of, unmarked, ROWS).await?;
        // Whoever locks a row writes to it: only such rows are tried, so that the others cost nothing.
        let touched: Vec<i64> = rows.iter().filter(|row| row.holder.is_some()).map(|row| row.id).collect();
        if !touched.is_empty() {
            let sql = format!("SELECT id FROM {} WHERE id = ANY($1) FOR NO KEY UPDATE SKIP LOCKED", self.table);
            let free = self.ids(&sql, &touched).await?;
            rows.iter_mut().filter(|row| free.contains(&row.id)).for_each(|row| row.holder = None);
        }
        Ok(rows)
    }

    async fn look(&self, of: Keys<'_>, unmarked: &[i64], most: i64) -> Result<Vec<Row>, RelayError> {
        // A sub-select, as PostgreSQL hashes it: a list it would compare with one by one.
        let (is_in, keys) = match of {
            Keys::AllBut(keys) => ("NOT IN", keys),
            Keys::Only(keys) => ("IN", keys),
        };
        let limit = i32::try_from(self.limits.body).unwrap_or(i32::MAX);
        let sql = format!(
            "SELECT id, nullif(holder, '0') AS holder, event_id, source, type, key, lane, subject, \
               to_char(time AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') AS time, \
               content_type, traceparent, extensions::text AS extensions, size, \
               CASE WHEN size <= $1 THEN coalesce(data_bytes, convert_to(data::text, 'UTF8')) END AS body \
             FROM (SELECT *, sum(weight) OVER (ORDER BY id) - weight AS before FROM ( \
               SELECT *, xmax::text AS holder, coalesce(octet_length(data_bytes), pg_column_size(data), 0) \
                 + coalesce(pg_column_size(extensions), 0) AS weight FROM {} \
               WHERE sent_at IS NULL AND error IS NULL AND coalesce(key, subject, event_id) {is_in} (SELECT unnest($2)) \
                 AND id NOT IN (SELECT unnest($5)) \
               ORDER BY id LIMIT $3) AS waiting) AS weighed, \
             LATERAL (SELECT coalesce(octet_length(data_bytes), octet_length(data::text), 0)) AS whole(size) \
             WHERE before < $4 ORDER BY id",
            self.table
        );
        let rows = self
            .query(
                &sql,
                &[
                    (&limit, Type::INT4),
                    (&keys, Type::TEXT_ARRAY),
                    (&most, Type::INT8),
                    (&BYTES, Type::INT8),
                    (&unmarked, Type::INT8_ARRAY),
                ],
            )
            .await?;
        rows.iter().map(|row| Row::read(row, self.limits).map_err(|error| self.explain(&error))).collect()
    }

    /// Marks rows that the broker has; returns those that another transaction has locked.
    pub(super) async fn mark(&self, sent: Vec<Sent>) -> Result<Vec<Sent>, RelayError> {
        if sent.is_empty() {
            return Ok(sent);
        }
        let ids: Vec<i64> = sent.iter().map(Sent::id).collect();
        let update = format!("UPDATE {} SET sent_at = now() WHERE id = ANY($1) AND sent_at IS NULL", self.table);
        let all = self.query(&update, &[(&ids, Type::INT8_ARRAY)]).await;
        if !matches!(all, Err(RelayError::Locked { .. })) {
            return all.map(|_| Vec::new());
        }
        self.mark_free(sent).await
    }

    /// The same without waiting: what is locked is passed over.
    pub(super) async fn mark_free(&self, sent: Vec<Sent>) -> Result<Vec<Sent>, RelayError> {
        if sent.is_empty() {
            return Ok(sent);
        }
        let ids: Vec<i64> = sent.iter().map(Sent::id).collect();
        let sql = format!(
            "WITH free AS (SELECT id FROM {0} WHERE id = ANY($1) AND sent_at IS NULL FOR NO KEY UPDATE SKIP LOCKED), \
               marked AS (UPDATE {0} SET sent_at = now() WHERE id IN (SELECT id FROM free) RETURNING id) \
             SELECT id FROM {0} WHERE id = ANY($1) AND sent_at IS NULL AND id NOT IN (SELECT id FROM marked)",
            self.table
        );
        match self.ids(&sql, &ids).await {
            Ok(locked) => Ok(sent.into_iter().filter(|sent| locked.contains(&sent.id())).collect()),
            Err(RelayError::Locked { .. }) => Ok(sent),
            Err(error) => Err(error),
        }
    }

    /// Notes why rows cannot be published; returns those that it could not be noted of, as another transaction has locked
    /// them.
    pub(super) async fn refuse(&self, refused: &[(i64, String)]) -> Result<HashSet<i64>, RelayError> {
        if refused.is_empty() {
            return Ok(HashSet::new());
        }
        let (ids, errors): (Vec<i64>, Vec<&str>) = refused.iter().map(|(id, error)| (*id, error.as_str())).unzip();
        let sql = format!(
            "WITH free AS (SELECT id FROM {0} WHERE id = ANY($1) FOR NO KEY UPDATE SKIP LOCKED), \
               noted AS (UPDATE {0} AS row SET error = refused.error \
                 FROM unnest($1, $2) AS refused(id, error) JOIN free ON free.id = refused.id \
                 WHERE row.id = refused.id AND row.sent_at IS NULL RETURNING row.id) \
             SELECT id FROM {0} WHERE id = ANY($1) AND sent_at IS NULL AND id NOT IN (SELECT id FROM noted)",
            self.table
        );
        let rows = self.query(&sql, &[(&ids, Type::INT8_ARRAY), (&errors, Type::TEXT_ARRAY)]).await;
        match rows {
            Err(RelayError::Locked { .. }) => Ok(ids.into_iter().collect()),
            rows => self.numbers(&rows?),
        }
    }

    /// Tells the server that this relay lives.
    pub(super) async fn touch(&self) -> Result<(), RelayError> {
        self.query("SELECT 1", &[]).await.map(|_| ())
    }

    /// Deletes some of the rows that were sent longer ago than this, but for those that somebody has locked; returns whether
    /// there may be more.
    pub(super) async fn sweep(&self, keep: Duration) -> Result<bool, RelayError> {
        let seconds = keep.as_secs_f64();
        // The inner list is bounded before locks are looked at: no number of locked rows makes this longer.
        let sql = format!(
            "WITH gone AS (DELETE FROM {0} WHERE id = ANY(ARRAY(SELECT id FROM {0} WHERE id = ANY(ARRAY( \
                 SELECT id FROM {0} WHERE sent_at < now() - make_interval(secs => $1) ORDER BY sent_at LIMIT $2)) \
               FOR UPDATE SKIP LOCKED)) RETURNING 1) \
             SELECT count(*) FROM gone",
            self.table
        );
        let rows = self.query(&sql, &[(&seconds, Type::FLOAT8), (&PORTION, Type::INT8)]).await?;
        let gone: i64 = rows.first().map_or(Ok(0), |row| row.try_get(0)).map_err(|error| self.explain(&error))?;
        Ok(gone > PORTION / 2)
    }

    /// Which transaction holds rows: the one that they name, else the oldest that has locked anything of the table.
    pub(super) async fn blocker(&self, holders: &[String]) -> String {
        // What others do is shown to a member of pg_read_all_stats only; process id, user and program to everybody.
        let sql = "SELECT l.pid, a.application_name, a.usename::text, a.state, \
                     extract(epoch FROM now() - a.xact_start)::int8, p.gid \
                   FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
                     LEFT JOIN pg_prepared_xacts p ON l.pid IS NULL AND split_part(l.virtualtransaction, '/', 2) = p.transaction::text \
                   WHERE l.granted AND l.pid IS DISTINCT FROM pg_backend_pid() \
                     AND (l.locktype = 'transactionid' AND l.transactionid::text = ANY($1) \
                       OR l.locktype = 'relation' AND l.relation = $2::regclass AND l.mode <> 'AccessShareLock' \
                         AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())) \
                   ORDER BY l.locktype = 'transactionid' DESC, a.xact_start LIMIT 1";
        let table = self.table.to_string();
        let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(&holders, Type::TEXT_ARRAY), (&table, Type::TEXT)];
        let found = tokio::time::timeout(ANSWER, self.client.query_typed(sql, &parameters)).await;
        let row = found.ok().and_then(Result::ok).and_then(|rows| rows.into_iter().next());
        row.as_ref().map_or_else(|| "a transaction that has ended meanwhile".into(), blocker)
    }

    /// What is not published.
    pub(super) async fn left(&self) -> Result<Left, RelayError> {
        let sql = format!(
            "SELECT count(*) FILTER (WHERE error IS NULL), count(error) FROM {} WHERE sent_at IS NULL",
            self.table
        );
        let rows = self.query(&sql, &[]).await?;
        let number = |at| rows.first().map_or(Ok(0), |row| row.try_get(at)).map_err(|error| self.explain(&error));
        Ok(Left { unsent: number(0)?, refused: number(1)? })
    }

    async fn ids(&self, sql: &str, ids: &[i64]) -> Result<HashSet<i64>, RelayError> {
        self.numbers(&self.query(sql, &[(&ids, Type::INT8_ARRAY)]).await?)
    }

    fn numbers(&self, rows: &[tokio_postgres::Row]) -> Result<HashSet<i64>, RelayError> {
        rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map_err(|error| self.explain(&error))
    }

    async fn query(
        &self,
        sql: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<tokio_postgres::Row>, RelayError> {
        match tokio::time::timeout(ANSWER, self.client.query_typed(sql, parameters)).await {
            Ok(Err(error)) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                Err(RelayError::Locked { table: self.table.to_string(), by: self.blocker(&[]).await })
            }
            Ok(answer) => answer.map_err(|error| self.explain(&error)),
            Err(_) => Err(RelayError::Silent(self.postgres.at())),
        }
    }

    fn explain(&self, error: &Error) -> RelayError {
        let (table, at) = (self.table.to_string(), self.postgres.at());
        match error.code() {
            Some(&SqlState::UNDEFINED_TABLE | &SqlState::INVALID_SCHEMA_NAME) => RelayError::Missing { table, at },
            Some(&SqlState::UNDEFINED_COLUMN | &SqlState::DATATYPE_MISMATCH | &SqlState::UNDEFINED_FUNCTION) => {
                RelayError::Different { table, at, problem: crate::postgres::problem(error) }
            }
            None if is_conversion(error) => {
                RelayError::Different { table, at, problem: crate::postgres::problem(error) }
            }
            _ => self.postgres.explain(error).into(),
        }
    }
}

/// A transaction, for a person: what it is, and how to end it.
fn blocker(row: &tokio_postgres::Row) -> String {
    let text = |at| row.try_get::<_, Option<String>>(at).ok().flatten().filter(|text| !text.is_empty());
    let Ok(Some(pid)) = row.try_get::<_, Option<i32>>(0) else {
        return match text(5) {
            Some(gid) => format!("the prepared transaction '{gid}': COMMIT PREPARED or ROLLBACK PREPARED ends it"),
            None => "a transaction that this user may not see".into(),
        };
    };
    let (program, user) = (text(1).unwrap_or_else(|| "a program".into()), text(2).unwrap_or_default());
    let state = text(3).map_or_else(String::new, |state| format!(", {state}"));
    let age = row.try_get::<_, Option<i64>>(4).ok().flatten();
    let age = age.map_or_else(String::new, |seconds| format!(", in a transaction for {seconds} s"));
    format!("{program} (pid {pid}, user {user}{state}{age}): SELECT pg_terminate_backend({pid}) ends it")
}

/// A column of another type than the outbox' own.
fn is_conversion(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(|cause| cause.is::<tokio_postgres::types::WrongType>())
}

/// Keeps a connection going until its client is dropped; the client hears how it ended.
fn drive(connection: Connection) {
    tokio::spawn(async move {
        let _ = connection.await;
    });
}
