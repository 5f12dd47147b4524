//! States in a file.
use crate::store::{Change, Count, Due, Kept, Listed, State};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use std::time::Duration;
use uuid::Uuid;

pub(super) const TABLE: &str = "
    CREATE TABLE states (id BLOB PRIMARY KEY, version INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
        status TEXT NOT NULL, key TEXT NOT NULL, ended INTEGER NOT NULL, begun INTEGER NOT NULL, changed INTEGER NOT NULL,
        body BLOB NOT NULL);
";

/// What came later: when a state is due, and a way to those that have not ended.
pub(super) const DUE: &str = "
    ALTER TABLE states ADD COLUMN due INTEGER;
    CREATE INDEX states_due ON states (kind, due) WHERE due IS NOT NULL;
    CREATE INDEX states_open ON states (kind, name, status, changed) WHERE NOT ended;
";

const COLUMNS: &str = "version, begun, changed, kind, name, status, key, ended, body, id, due";

/// The version of a state; 0 where there is none.
pub(super) fn version(tx: &Transaction<'_>, id: &Uuid) -> rusqlite::Result<i64> {
    let mut found = tx.prepare_cached("SELECT version FROM states WHERE id = ?1")?;
    Ok(found.query_row([id.as_bytes()], |row| row.get(0)).optional()?.unwrap_or(0))
}

/// `today` is for people, `at` in the store's time.
pub(super) fn write(tx: &Transaction<'_>, change: &Change, today: i64, at: i64) -> rusqlite::Result<()> {
    let State { kind, name, status, key, ended, due, body } = &change.state;
    tx.prepare_cached(
        "INSERT INTO states (id, version, kind, name, status, key, ended, begun, changed, body, due, at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8, ?9, ?10, ?11) ON CONFLICT (id) DO UPDATE SET
             version = excluded.version, status = excluded.status, ended = excluded.ended, changed = excluded.changed,
             body = excluded.body, due = excluded.due, at = excluded.at",
    )?
    .execute(params![change.id.as_bytes(), change.found + 1, kind, name, status, key, ended, today, body, due, at])
    .map(drop)
}

pub(super) fn read(connection: &Connection, id: &Uuid) -> rusqlite::Result<Option<Kept>> {
    let sql = format!("SELECT {COLUMNS} FROM states WHERE id = ?1");
    connection.prepare_cached(&sql)?.query_row([id.as_bytes()], kept).optional()
}

pub(super) fn list(connection: &Connection, listed: &Listed) -> rusqlite::Result<Vec<(Uuid, Kept)>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM states WHERE kind = ?1 AND name = coalesce(?2, name) AND status = coalesce(?3, status)
         ORDER BY changed DESC, id LIMIT ?4"
    );
    let both = |row: &Row<'_>| Ok((Uuid::from_bytes(row.get(9)?), kept(row)?));
    connection
        .prepare_cached(&sql)?
        .query_map(params![listed.kind, listed.name, listed.status, listed.most], both)?
        .collect()
}

pub(super) fn due(connection: &Connection, kind: &str, before: i64, most: u32) -> rusqlite::Result<Vec<Due>> {
    let sql =
        "SELECT id, name, due FROM states WHERE due IS NOT NULL AND kind = ?1 AND due < ?2 ORDER BY due, id LIMIT ?3";
    let due = |row: &Row<'_>| Ok(Due { id: Uuid::from_bytes(row.get(0)?), name: row.get(1)?, at: row.get(2)? });
    connection.prepare_cached(sql)?.query_map(params![kind, before, most], due)?.collect()
}

pub(super) fn count(connection: &Connection, kind: &str, now: i64) -> rusqlite::Result<Vec<Count>> {
    let sql =
        "SELECT name, status, count(*), min(changed) FROM states WHERE NOT ended AND kind = ?1 GROUP BY name, status";
    let count = |row: &Row<'_>| {
        let states = u64::try_from(row.get::<_, i64>(2)?).unwrap_or(0);
        let since = now.saturating_sub(row.get(3)?);
        let oldest = Duration::from_millis(u64::try_from(since).unwrap_or(0));
        Ok(Count { name: row.get(0)?, status: row.get(1)?, states, oldest })
    };
    connection.prepare_cached(sql)?.query_map(params![kind], count)?.collect()
}

fn kept(row: &Row<'_>) -> rusqlite::Result<Kept> {
    let state = State {
        kind: row.get(3)?,
        name: row.get(4)?,
        status: row.get(5)?,
        key: row.get(6)?,
        ended: row.get(7)?,
        due: row.get(10)?,
        body: row.get(8)?,
    };
    Ok(Kept { version: row.get(0)?, begun: row.get(1)?, changed: row.get(2)?, state })
}
