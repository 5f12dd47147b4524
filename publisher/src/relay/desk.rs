//! The outbox table on one connection: the only SQL of the relay.
//!
//! No statement is prepared: they would be lost with the connection, and stale when somebody changes the table.
use super::row::{Row, Sent};
use crate::outbox::Table;
use crate::postgres::{Connection, Postgres, PostgresError};
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
            Self::Silent(_) => true,
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
        desk.look(Keys::AllBut(&[]), 0).await?;
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

    /// The first rows that wait, in order.
    pub(super) async fn take(&self, of: Keys<'_>) -> Result<Vec<Row>, RelayError> {
        self.look(of, ROWS).await
    }

    async fn look(&self, of: Keys<'_>, most: i64) -> Result<Vec<Row>, RelayError> {
        // A sub-select, as PostgreSQL hashes it: a list it would compare with one by one.
        let (is_in, keys) = match of {
            Keys::AllBut(keys) => ("NOT IN", keys),
            Keys::Only(keys) => ("IN", keys),
        };
        let limit = i32::try_from(self.limits.body).unwrap_or(i32::MAX);
        let sql = format!(
            "SELECT id, event_id, source, type, key, lane, subject, \
               to_char(time AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') AS time, \
               content_type, traceparent, extensions::text AS extensions, size, \
               CASE WHEN size <= $1 THEN coalesce(data_bytes, convert_to(data::text, 'UTF8')) END AS body \
             FROM (SELECT *, sum(weight) OVER (ORDER BY id) - weight AS before FROM ( \
               SELECT *, coalesce(octet_length(data_bytes), pg_column_size(data), 0) \
                 + coalesce(pg_column_size(extensions), 0) AS weight FROM {} \
               WHERE sent_at IS NULL AND error IS NULL AND coalesce(key, subject, event_id) {is_in} (SELECT unnest($2)) \
               ORDER BY id LIMIT $3) AS waiting) AS weighed, \
             LATERAL (SELECT coalesce(octet_length(data_bytes), octet_length(data::text), 0)) AS whole(size) \
             WHERE before < $4 ORDER BY id",
            self.table
        );
        let rows = self
            .query(&sql, &[(&limit, Type::INT4), (&keys, Type::TEXT_ARRAY), (&most, Type::INT8), (&BYTES, Type::INT8)])
            .await?;
        rows.iter().map(|row| Row::read(row, self.limits).map_err(|error| self.explain(&error))).collect()
    }

    /// Marks rows that the broker has.
    pub(super) async fn mark(&self, sent: Vec<Sent>) -> Result<(), RelayError> {
        if sent.is_empty() {
            return Ok(());
        }
        let ids: Vec<i64> = sent.into_iter().map(Sent::into_id).collect();
        let sql = format!("UPDATE {} SET sent_at = now() WHERE id = ANY($1) AND sent_at IS NULL", self.table);
        self.query(&sql, &[(&ids, Type::INT8_ARRAY)]).await.map(|_| ())
    }

    /// Notes why rows cannot be published.
    pub(super) async fn refuse(&self, refused: Vec<(i64, String)>) -> Result<(), RelayError> {
        if refused.is_empty() {
            return Ok(());
        }
        let (ids, errors): (Vec<i64>, Vec<String>) = refused.into_iter().unzip();
        let sql = format!(
            "UPDATE {} AS row SET error = refused.error FROM unnest($1, $2) AS refused(id, error) \
             WHERE row.id = refused.id AND row.sent_at IS NULL",
            self.table
        );
        self.query(&sql, &[(&ids, Type::INT8_ARRAY), (&errors, Type::TEXT_ARRAY)]).await.map(|_| ())
    }

    /// Tells the server that this relay lives.
    pub(super) async fn touch(&self) -> Result<(), RelayError> {
        self.query("SELECT 1", &[]).await.map(|_| ())
    }

    /// Deletes some of the rows that were sent longer ago than this; returns whether there may be more.
    pub(super) async fn sweep(&self, keep: Duration) -> Result<bool, RelayError> {
        let seconds = keep.as_secs_f64();
        let sql = format!(
            "WITH gone AS (DELETE FROM {0} WHERE id = ANY(ARRAY(SELECT id FROM {0} \
               WHERE sent_at < now() - make_interval(secs => $1) ORDER BY sent_at LIMIT $2)) RETURNING 1) \
             SELECT count(*) FROM gone",
            self.table
        );
        let rows = self.query(&sql, &[(&seconds, Type::FLOAT8), (&PORTION, Type::INT8)]).await?;
        let gone: i64 = rows.first().map_or(Ok(0), |row| row.try_get(0)).map_err(|error| self.explain(&error))?;
        Ok(gone == PORTION)
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

    async fn query(
        &self,
        sql: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<tokio_postgres::Row>, RelayError> {
        match tokio::time::timeout(ANSWER, self.client.query_typed(sql, parameters)).await {
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
