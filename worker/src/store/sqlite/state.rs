//! States in a file.
use crate::store::{Change, Kept, Listed, State};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use uuid::Uuid;

pub(super) const TABLE: &str = "
    CREATE TABLE states (id BLOB PRIMARY KEY, version INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
        status TEXT NOT NULL, key TEXT NOT NULL, ended INTEGER NOT NULL, begun INTEGER NOT NULL, changed INTEGER NOT NULL,
        body BLOB NOT NULL);
";

const COLUMNS: &str = "version, begun, changed, kind, name, status, key, ended, body, id";

/// The version of a state; 0 where there is none.
pub(super) fn version(tx: &Transaction<'_>, id: &Uuid) -> rusqlite::Result<i64> {
    let mut found = tx.prepare_cached("SELECT version FROM states WHERE id = ?1")?;
    Ok(found.query_row([id.as_bytes()], |row| row.get(0)).optional()?.unwrap_or(0))
}

/// `today` is for people, `at` in the store's time.
pub(super) fn write(tx: &Transaction<'_>, change: &Change, today: i64, at: i64) -> rusqlite::Result<()> {
    let State { kind, name, status, key, ended, body } = &change.state;
    tx.prepare_cached(
        "INSERT INTO states VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8, ?9, ?10) ON CONFLICT (id) DO UPDATE SET
             version = excluded.version, status = excluded.status, ended = excluded.ended, changed = excluded.changed,
             body = excluded.body, at = excluded.at",
    )?
    .execute(params![change.id.as_bytes(), change.found + 1, kind, name, status, key, ended, today, body, at])
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

fn kept(row: &Row<'_>) -> rusqlite::Result<Kept> {
    let state = State {
        kind: row.get(3)?,
        name: row.get(4)?,
        status: row.get(5)?,
        key: row.get(6)?,
        ended: row.get(7)?,
        body: row.get(8)?,
    };
    Ok(Kept { version: row.get(0)?, begun: row.get(1)?, changed: row.get(2)?, state })
}
