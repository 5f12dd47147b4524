//! States in the database.
//!
//! Who changes states locks them first, in the transaction that records the change; so what is told to be outdated is so, and
//! what is not stays as it is until the end.
use super::session::Lease;
use crate::store::{Change, Count, Effect, Kept, Listed, State, StoreError};
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

pub(super) const TABLE: &str = "
    CREATE TABLE {s}.states (id uuid PRIMARY KEY, version bigint NOT NULL, kind text NOT NULL, name text NOT NULL,
        status text NOT NULL, key text NOT NULL, ended boolean NOT NULL, begun timestamptz NOT NULL,
        changed timestamptz NOT NULL, body bytea NOT NULL) WITH (fillfactor = 70);
    CREATE INDEX ON {s}.states (changed) WHERE ended;
    ALTER TABLE {s}.states SET (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 5000);
";

/// What came later: when a state is due, and a way to those that have not ended. Workers of the version before leave the column
/// empty, or as it is: who is woken in vain notes it.
pub(super) const DUE: &str = "
    ALTER TABLE {s}.states ADD COLUMN due bigint;
    CREATE INDEX ON {s}.states (kind, due) WHERE due IS NOT NULL;
    CREATE INDEX ON {s}.states (kind, name, status, changed) WHERE NOT ended;
";

const COLUMNS: &str =
    "version, (extract(epoch FROM begun) * 1000)::bigint, (extract(epoch FROM changed) * 1000)::bigint, kind,
    name, status, key, ended, body, id, due";

/// Locks the states that effects change, and makes room for new ones. The answer: which effects may be recorded, in order; the
/// others rest on a state that is another one now, or that an effect before them changes.
pub(super) async fn current(lease: &Lease, s: &str, effects: &[Effect]) -> Result<Vec<bool>, StoreError> {
    let changes = || effects.iter().filter_map(|effect| effect.change.as_ref());
    let ids = |new: bool| -> Vec<Uuid> {
        changes()
            .filter(|change| (change.found == 0) == new)
            .map(|change| change.id)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect()
    };
    let (new, old) = (ids(true), ids(false));
    let mut versions: HashMap<Uuid, i64> = HashMap::new();
    let mut know =
        |rows: Vec<Row>| versions.extend(rows.iter().map(|row| (row.get::<_, Uuid>(0), row.get::<_, i64>(1))));
    if !old.is_empty() {
        let sql = format!("SELECT id, version FROM {s}.states WHERE id = ANY($1) ORDER BY id FOR UPDATE");
        know(lease.query_typed(&sql, &[(&old, Type::UUID_ARRAY)]).await?);
    }
    if !new.is_empty() {
        let sql = format!(
            "INSERT INTO {s}.states SELECT id, 0, '', '', '', '', true, clock_timestamp(), clock_timestamp(), ''
             FROM unnest($1::uuid[]) AS c(id) ORDER BY id ON CONFLICT (id) DO UPDATE SET id = excluded.id
             WHERE states.version = 0 RETURNING id, version"
        );
        know(lease.query_typed(&sql, &[(&new, Type::UUID_ARRAY)]).await?);
    }
    let mut may =
        |effect: &Effect| effect.change.as_ref().is_none_or(|change| versions.remove(&change.id) == Some(change.found));
    Ok(effects.iter().map(&mut may).collect())
}

/// Changes of states, column by column.
#[derive(Debug, Default)]
pub(super) struct Changes<'a> {
    effects: Vec<i32>,
    ids: Vec<Uuid>,
    kinds: Vec<&'a str>,
    names: Vec<&'a str>,
    statuses: Vec<&'a str>,
    keys: Vec<&'a str>,
    ends: Vec<bool>,
    dues: Vec<Option<i64>>,
    bodies: Vec<&'a [u8]>,
}

impl<'a> Changes<'a> {
    pub(super) fn push(&mut self, effect: i32, change: &'a Change) {
        let State { kind, name, status, key, ended, due, body } = &change.state;
        self.effects.push(effect);
        self.ids.push(change.id);
        self.kinds.push(kind);
        self.names.push(name);
        self.statuses.push(status);
        self.keys.push(key);
        self.ends.push(*ended);
        self.dues.push(*due);
        self.bodies.push(body);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.effects.is_empty()
    }

    /// The part of a statement that makes the changes of those effects that are fresh; its parameters begin at `$first`.
    /// `now` is the store's time, in SQL; `changed` is for people.
    pub(super) fn part(&self, s: &str, first: usize, now: &str) -> String {
        let n = |offset: usize| first + offset;
        format!(
            "changed AS (UPDATE {s}.states s SET version = s.version + 1, kind = c.kind, name = c.name, status = c.status,
                 key = c.key, ended = c.ended, changed = clock_timestamp(), body = c.body, due = c.due, at = {now}
                 FROM unnest(${}::integer[], ${}::uuid[], ${}::text[], ${}::text[], ${}::text[], ${}::text[], ${}::boolean[],
                     ${}::bytea[], ${}::bigint[]) AS c(n, id, kind, name, status, key, ended, body, due)
                 WHERE s.id = c.id AND c.n IN (SELECT n FROM fresh))",
            n(0), n(1), n(2), n(3), n(4), n(5), n(6), n(7), n(8)
        )
    }

    pub(super) fn values(&self) -> [(&(dyn ToSql + Sync), Type); 9] {
        [
            (&self.effects, Type::INT4_ARRAY),
            (&self.ids, Type::UUID_ARRAY),
            (&self.kinds, Type::TEXT_ARRAY),
            (&self.names, Type::TEXT_ARRAY),
            (&self.statuses, Type::TEXT_ARRAY),
            (&self.keys, Type::TEXT_ARRAY),
            (&self.ends, Type::BOOL_ARRAY),
            (&self.bodies, Type::BYTEA_ARRAY),
            (&self.dues, Type::INT8_ARRAY),
        ]
    }
}

pub(super) fn load(s: &str) -> String {
    format!("SELECT {COLUMNS} FROM {s}.states WHERE id = ANY($1) AND version > 0")
}

pub(super) fn keep(s: &str, now: &str) -> String {
    format!(
        "INSERT INTO {s}.states (id, version, kind, name, status, key, ended, begun, changed, body, at)
         VALUES ($1, 1, $2, $3, $4, $5, $6, clock_timestamp(), clock_timestamp(), $7, {now}) ON CONFLICT (id) DO NOTHING"
    )
}

/// The statement that lists, and what it is given.
pub(super) fn list(s: &str) -> String {
    format!(
        "SELECT {COLUMNS} FROM {s}.states WHERE version > 0 AND kind = $1 AND name = coalesce($2, name)
             AND status = coalesce($3, status) ORDER BY changed DESC, id LIMIT $4"
    )
}

pub(super) fn listed<'a>(listed: &'a Listed, most: &'a i64) -> [(&'a (dyn ToSql + Sync), Type); 4] {
    [(&listed.kind, Type::TEXT), (&listed.name, Type::TEXT), (&listed.status, Type::TEXT), (most, Type::INT8)]
}

pub(super) fn due(s: &str) -> String {
    format!(
        "SELECT id, name, due FROM {s}.states WHERE due IS NOT NULL AND kind = $1 AND due < $2 ORDER BY due, id LIMIT $3"
    )
}

pub(super) fn count(s: &str) -> String {
    format!(
        "SELECT name, status, count(*), (extract(epoch FROM clock_timestamp() - min(changed)) * 1000)::bigint
             FROM {s}.states WHERE NOT ended AND kind = $1 GROUP BY name, status"
    )
}

pub(super) fn counted(row: &Row) -> Count {
    let whole = |column: usize| u64::try_from(row.get::<_, i64>(column)).unwrap_or(0);
    Count { name: row.get(0), status: row.get(1), states: whole(2), oldest: Duration::from_millis(whole(3)) }
}

/// Forgets those that ended before the window.
pub(super) fn prune(s: &str, now: &str) -> String {
    format!("DELETE FROM {s}.states WHERE ended AND at < {now} - make_interval(secs => $1) RETURNING 1")
}

pub(super) fn kept(row: &Row) -> (Uuid, Kept) {
    let state = State {
        kind: row.get(3),
        name: row.get(4),
        status: row.get(5),
        key: row.get(6),
        ended: row.get(7),
        due: row.get(10),
        body: row.get(8),
    };
    (row.get(9), Kept { version: row.get(0), begun: row.get(1), changed: row.get(2), state })
}
