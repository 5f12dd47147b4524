//! The inbox's periods: a table each, so that what is older than the window goes by dropping a table.
//!
//! An event must not be recorded in two periods by two workers at once, and no worker waits for another's clock. So a period
//! gives way to the next in two phases. In an even phase outcomes are recorded in one period; in the odd phase after it, in
//! that and the next. Every transaction holds its phase's lock, shared, and does nothing if the phase is over. A phase begins
//! only when no transaction of the phase before the last is under way: whatever two transactions are under way at once share
//! a period, and its unique index lets one of them win.
use super::session::{Lease, begin};
use crate::store::StoreError;
use std::time::Duration;

/// The phase, and the periods that are looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Periods {
    pub(super) phase: i32,
    alive: Vec<i32>,
}

/// A new period begins when this part of the window has gone by.
const PARTS: u32 = 4;

/// The first phase of a new store.
pub(super) const TABLES: &str = "
    CREATE TABLE {s}.phase (phase integer NOT NULL, since timestamptz NOT NULL);
    CREATE TABLE {s}.periods (period integer PRIMARY KEY, closed timestamptz, retired boolean NOT NULL DEFAULT false);
    CREATE TABLE {s}.dead (identity uuid PRIMARY KEY, replayed integer NOT NULL, at timestamptz NOT NULL);
    CREATE TABLE {s}.inbox_0 (identity uuid PRIMARY KEY);
    INSERT INTO {s}.periods (period) VALUES (0);
    INSERT INTO {s}.phase VALUES (0, clock_timestamp());
";

impl Periods {
    /// Reads them.
    pub(super) async fn read(lease: &Lease, schema: &str) -> Result<Self, StoreError> {
        let sql = format!(
            "SELECT phase, ARRAY(SELECT period FROM {schema}.periods WHERE NOT retired ORDER BY period) FROM {schema}.phase"
        );
        let row = lease.query_typed(&sql, &[]).await?;
        let row = row.first().ok_or_else(|| StoreError::Unavailable("the inbox has no phase".into()))?;
        Ok(Self { phase: row.get(0), alive: row.get(1) })
    }

    /// Where outcomes are recorded: the period, and while it gives way the next.
    pub(super) fn open(&self) -> (i32, Option<i32>) {
        let period = self.phase / 2;
        (period, (self.phase % 2 == 1).then_some(period + 1))
    }

    /// The identities of `$n` that have an outcome.
    pub(super) fn known(&self, schema: &str, n: u32) -> String {
        known(&self.alive, schema, n)
    }

    /// Those of them whose outcome stands where nothing is recorded any more; none where there is no such period.
    pub(super) fn known_before(&self, schema: &str, n: u32) -> Option<String> {
        let before: Vec<i32> = self.closed().collect();
        (!before.is_empty()).then(|| known(&before, schema, n))
    }

    /// Where nothing is recorded any more.
    pub(super) fn closed(&self) -> impl Iterator<Item = i32> {
        let (period, _) = self.open();
        self.alive.iter().copied().filter(move |alive| *alive < period)
    }
}

fn known(periods: &[i32], schema: &str, n: u32) -> String {
    let table =
        |period: &i32| format!("SELECT identity FROM {schema}.inbox_{period} WHERE identity = ANY(${n}::uuid[])");
    periods.iter().map(table).collect::<Vec<_>>().join(" UNION ALL ")
}

/// Goes on to the next phase where it is time; forgets what is older than the window. Returns about how many rows went.
/// `now` is the store's time, in SQL.
pub(super) async fn turn(
    lease: &Lease,
    schema: &str,
    class: i32,
    window: Duration,
    now: &str,
) -> Result<u64, StoreError> {
    let seconds = window.as_secs_f64();
    lease.batch_execute(&begin("")).await?;
    // One worker does it; the others have nothing to wait for.
    let sql = format!(
        "SELECT phase, phase % 2 = 1 OR {now} - since >= make_interval(secs => $1) FROM {schema}.phase
         FOR UPDATE SKIP LOCKED"
    );
    let part = seconds / f64::from(PARTS);
    let rows = lease.query_typed(&sql, &[(&part, tokio_postgres::types::Type::FLOAT8)]).await?;
    let phase = rows.first().filter(|row| row.get(1)).map(|row| row.get::<_, i32>(0));
    let gone = match phase {
        Some(phase) if nobody_is_in(lease, class, phase - 1).await? => {
            let gone = if phase % 2 == 0 {
                retire(lease, schema, seconds, now).await?;
                let next = phase / 2 + 1;
                let open = format!(
                    "CREATE TABLE {schema}.inbox_{next} (identity uuid PRIMARY KEY);
                     INSERT INTO {schema}.periods (period) VALUES ({next})"
                );
                lease.batch_execute(&open).await?;
                0
            } else {
                let closed = phase / 2;
                let close = format!("UPDATE {schema}.periods SET closed = {now} WHERE period = {closed}");
                lease.batch_execute(&close).await?;
                drop_retired(lease, schema).await?
            };
            let next = format!("UPDATE {schema}.phase SET phase = {}, since = {now}", phase + 1);
            lease.batch_execute(&next).await?;
            gone
        }
        _ => 0,
    };
    lease.batch_execute("COMMIT").await?;
    Ok(gone)
}

/// Whether no transaction of a phase is under way; no new one can begin.
async fn nobody_is_in(lease: &Lease, class: i32, phase: i32) -> Result<bool, StoreError> {
    let row = lease.query_typed(&format!("SELECT pg_try_advisory_xact_lock({class}, {phase})"), &[]).await?;
    Ok(row.first().is_some_and(|row| row.get(0)))
}

/// From the next phase on, nobody looks at what is older than the window.
async fn retire(lease: &Lease, schema: &str, seconds: f64, now: &str) -> Result<(), StoreError> {
    let sql = format!(
        "UPDATE {schema}.periods SET retired = true WHERE closed < {now} - make_interval(secs => $1) RETURNING 1"
    );
    lease.query_typed(&sql, &[(&seconds, tokio_postgres::types::Type::FLOAT8)]).await?;
    Ok(())
}

/// Drops the retired tables: whoever looked at them was under way before the last phase, and has ended. With them go the
/// deaths that no other period knows: a death that is forgotten leaves nothing behind.
async fn drop_retired(lease: &Lease, schema: &str) -> Result<u64, StoreError> {
    let sql = format!(
        "SELECT p.period, p.closed, greatest(c.reltuples, 0)::bigint, (SELECT array_agg(period) FROM {schema}.periods
         WHERE NOT retired) FROM {schema}.periods p JOIN pg_class c ON c.oid = format('{schema}.inbox_%s', p.period)::regclass
         WHERE p.retired ORDER BY p.period"
    );
    let mut gone = 0;
    for row in lease.query_typed(&sql, &[]).await? {
        let (period, rows): (i32, i64) = (row.get(0), row.get(2));
        let alive: Vec<i32> = row.get(3);
        let known = |other: &i32| {
            format!(" AND NOT EXISTS (SELECT FROM {schema}.inbox_{other} i WHERE i.identity = d.identity)")
        };
        let known: String = alive.iter().map(known).collect();
        let sql = format!(
            "DELETE FROM {schema}.dead d USING {schema}.inbox_{period} i WHERE d.identity = i.identity{known};
             DROP TABLE {schema}.inbox_{period}; DELETE FROM {schema}.periods WHERE period = {period}"
        );
        lease.batch_execute(&sql).await?;
        tracing::debug!(period, rows, "a period of the inbox is older than the window: forgotten");
        gone += u64::try_from(rows).unwrap_or(0);
    }
    Ok(gone)
}
