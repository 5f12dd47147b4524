//! The schema: its steps, who may work with it, and the one who brings it up to date.
use super::periods;
use super::session::{Lease, begin};
use super::state;
use crate::store::StoreError;

/// A step, and the oldest version of the schema's users that may work beside it: where a step only adds, workers of the
/// version before go on while those of the next one start.
struct Step {
    sql: &'static str,
    needs: i32,
}

const STEPS: [Step; 5] = [
    Step {
        sql: "
    CREATE TABLE {s}.starts (identity uuid PRIMARY KEY, starts integer NOT NULL, failed integer NOT NULL,
        at timestamptz NOT NULL);
    CREATE INDEX ON {s}.starts (at);
    CREATE SEQUENCE {s}.outbox_base;
    CREATE TABLE {s}.outbox (id bigint PRIMARY KEY, worker text NOT NULL, partition text NOT NULL, cause uuid,
        envelope text NOT NULL, body bytea NOT NULL);
    CREATE INDEX ON {s}.outbox (partition);
    ALTER TABLE {s}.outbox SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
    CREATE TABLE {s}.workers (id text PRIMARY KEY, seen timestamptz NOT NULL);
    ",
        needs: 1,
    },
    Step { sql: state::TABLE, needs: 1 },
    Step { sql: state::DUE, needs: 1 },
    Step {
        sql: "
    INSERT INTO {s}.meta VALUES ('time', (extract(epoch FROM clock_timestamp()) * 1000)::bigint::text);
    ALTER TABLE {s}.states ADD COLUMN at timestamptz NOT NULL DEFAULT clock_timestamp();
    UPDATE {s}.states SET at = changed;
    DROP INDEX {s}.states_changed_idx;
    CREATE INDEX ON {s}.states (at) WHERE ended;
    ",
        needs: 1,
    },
    Step {
        sql: "
    ALTER TABLE {s}.starts ADD COLUMN runs text[] NOT NULL DEFAULT '{}';
    ALTER TABLE {s}.workers ADD COLUMN ended boolean NOT NULL DEFAULT false;
    CREATE TABLE {s}.owners (partition text PRIMARY KEY, worker text NOT NULL);
    ",
        needs: 1,
    },
];

/// What this version knows.
pub(super) const KNOWN: i32 = STEPS.len() as i32;

/// The schema's name for a pool: each pool has its own, so that pools may share a database.
pub(super) fn name(pool: &str) -> String {
    let name = format!("warren_{}", pool.replace('-', "_"));
    // An identifier of PostgreSQL is 63 bytes long at most; longer ones are told apart by their hash.
    if name.len() <= 63 { name } else { format!("{}_{:08x}", &name[..54], class(&name)) }
}

/// The number under which a schema's locks stand: FNV-1a of its name.
pub(super) fn class(name: &str) -> i32 {
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    i32::from_ne_bytes(hash.to_ne_bytes())
}

/// Brings the schema up to date and returns the store's identity. Under a lock: of eight workers that start at once, one does
/// it.
pub(super) async fn migrate(lease: &Lease, schema: &str, pool: &str) -> Result<String, StoreError> {
    if let Some((version, needs, identity)) = version(lease, schema).await? {
        if needs > KNOWN {
            return Err(StoreError::Newer { found: version.into(), known: KNOWN.into() });
        }
        if version >= KNOWN {
            return Ok(identity);
        }
    }
    // Locks of phases are numbered from -1.
    lease.batch_execute(&begin(&format!(", pg_advisory_xact_lock({}, -2)", class(schema)))).await?;
    let row = lease.query_typed(&format!("SELECT to_regnamespace('{schema}') IS NULL"), &[]).await?;
    // Asked first: who may not create schemas may still use one that is there.
    if row.first().is_none_or(|row| row.get(0)) {
        lease.batch_execute(&format!("CREATE SCHEMA {schema}")).await?;
    }
    let found = version(lease, schema).await?;
    if found.is_none() {
        let meta = format!(
            "CREATE TABLE {schema}.meta (name text PRIMARY KEY, value text NOT NULL);
             INSERT INTO {schema}.meta VALUES ('version', '0'), ('needs', '0'), ('pool', '{pool}'),
                 ('identity', gen_random_uuid()::text);
             {}",
            periods::TABLES.replace("{s}", schema)
        );
        lease.batch_execute(&meta).await?;
    }
    let from = found.map_or(0, |(version, ..)| usize::try_from(version).unwrap_or(0));
    for step in STEPS.iter().skip(from) {
        lease.batch_execute(&step.sql.replace("{s}", schema)).await?;
    }
    let needs = STEPS.iter().map(|step| step.needs).max().unwrap_or(0);
    let done = format!(
        "UPDATE {schema}.meta SET value = '{KNOWN}' WHERE name = 'version' AND value::integer < {KNOWN};
         UPDATE {schema}.meta SET value = '{needs}' WHERE name = 'needs' AND value::integer < {needs};
         COMMIT"
    );
    lease.batch_execute(&done).await?;
    match version(lease, schema).await? {
        Some((.., identity)) => Ok(identity),
        None => Err(StoreError::Unavailable(format!("the schema {schema} was dropped while it was made"))),
    }
}

/// The store's time as it was told last.
pub(super) async fn time(lease: &Lease, schema: &str) -> Result<i64, StoreError> {
    let sql = format!("SELECT value::bigint FROM {schema}.meta WHERE name = 'time'");
    let row = lease.query_typed(&sql, &[]).await?;
    let missing = || StoreError::Unavailable(format!("the schema {schema} keeps no time"));
    row.first().map(|row| row.get(0)).ok_or_else(missing)
}

/// Version, oldest version that may use it, identity; none where there is no store yet.
async fn version(lease: &Lease, schema: &str) -> Result<Option<(i32, i32, String)>, StoreError> {
    let row = lease.query_typed(&format!("SELECT to_regclass('{schema}.meta') IS NOT NULL"), &[]).await?;
    if !row.first().is_some_and(|row| row.get(0)) {
        return Ok(None);
    }
    let sql = format!(
        "SELECT (SELECT value::integer FROM {schema}.meta WHERE name = 'version'),
                (SELECT value::integer FROM {schema}.meta WHERE name = 'needs'),
                (SELECT value FROM {schema}.meta WHERE name = 'identity')"
    );
    let row = lease.query_typed(&sql, &[]).await?;
    Ok(row.first().map(|row| (row.get(0), row.get(1), row.get(2))))
}
