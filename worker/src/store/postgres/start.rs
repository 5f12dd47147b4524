//! Starts of events that were delivered before, in the database.
use super::record::uuid;
use super::session::Values;
use super::{Inner, StoreError};
use crate::store::{Begin, Other, Start};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use tokio_postgres::types::Type;
use uuid::Uuid;
use warren_shared::Identity;

impl Inner {
    /// Records our start of each event, where not too many others are recorded.
    pub(super) async fn start(&self, events: &[Begin]) -> Result<Vec<Start>, StoreError> {
        // Each once, in an order in which two calls do not lock each other out.
        let asked: BTreeMap<Uuid, &Begin> = events.iter().map(|begin| (uuid(&begin.event), begin)).collect();
        let identities: Vec<Uuid> = asked.keys().copied().collect();
        let most: Vec<i32> = asked.values().map(|begin| i32::try_from(begin.most).unwrap_or(i32::MAX)).collect();
        let before: Vec<Option<&str>> = asked.values().map(|begin| begin.before.as_deref()).collect();
        let (s, now) = (&self.schema, self.now());
        let sql = format!(
            "WITH known AS MATERIALIZED (SELECT e.identity, e.most, coalesce(s.failed, 0) AS failed,
                 CASE WHEN coalesce(cardinality(s.runs), 0) > 0 THEN s.runs
                     WHEN e.before IS NULL THEN '{{}}'::text[] ELSE ARRAY[e.before] END AS runs
                 FROM unnest($1::uuid[], $2::integer[], $3::text[]) AS e(identity, most, before)
                     LEFT JOIN {s}.starts s USING (identity)),
             others AS MATERIALIZED (SELECT k.identity, array_agg(run ORDER BY run) AS runs,
                 array_agg(coalesce((extract(epoch FROM w.seen) * 1000)::bigint, -1) ORDER BY run) AS seen
                 FROM known k CROSS JOIN unnest(k.runs) AS run LEFT JOIN {s}.workers w ON w.id = run
                 WHERE run <> $4 AND NOT coalesce(w.ended, false) GROUP BY k.identity),
             told AS MATERIALIZED (SELECT k.identity, coalesce(cardinality(o.runs), 0) <= k.most AS kept, k.failed,
                 k.runs AS all, coalesce(o.runs, '{{}}') AS runs, coalesce(o.seen, '{{}}') AS seen
                 FROM known k LEFT JOIN others o USING (identity)),
             begun AS (INSERT INTO {s}.starts AS s (identity, starts, failed, at, runs)
                 SELECT identity, 0, 0, {now}, CASE WHEN $4 = ANY(told.all) THEN told.all ELSE told.all || $4 END
                 FROM told WHERE kept ORDER BY identity
                 ON CONFLICT (identity) DO UPDATE SET at = excluded.at, runs = CASE WHEN cardinality(s.runs) = 0
                     THEN excluded.runs WHEN $4 = ANY(s.runs) THEN s.runs ELSE s.runs || $4 END)
             SELECT identity, kept, failed, runs, seen FROM told"
        );
        let values: Values<'_> = &[
            (&identities, Type::UUID_ARRAY),
            (&most, Type::INT4_ARRAY),
            (&before, Type::TEXT_ARRAY),
            (&self.worker, Type::TEXT),
        ];
        let rows = self.write(&sql, values).await?;
        let told: HashMap<Uuid, Start> = rows.iter().map(|row| (row.get(0), start(row))).collect();
        Ok(events.iter().map(|begin| told.get(&uuid(&begin.event)).cloned().unwrap_or_default()).collect())
    }

    /// Takes our start of each event back.
    pub(super) async fn unstart(&self, events: &[Identity]) -> Result<(), StoreError> {
        let identities: Vec<Uuid> = events.iter().map(uuid).collect::<BTreeSet<_>>().into_iter().collect();
        let s = &self.schema;
        let sql = format!(
            "WITH e AS MATERIALIZED (SELECT identity, array_remove(runs, $2) AS runs, failed FROM {s}.starts
                 WHERE identity = ANY($1) ORDER BY identity FOR UPDATE),
             gone AS (DELETE FROM {s}.starts s USING e
                 WHERE s.identity = e.identity AND cardinality(e.runs) = 0 AND e.failed = 0)
             UPDATE {s}.starts s SET runs = e.runs FROM e
                 WHERE s.identity = e.identity AND NOT (cardinality(e.runs) = 0 AND e.failed = 0)"
        );
        let values: Values<'_> = &[(&identities, Type::UUID_ARRAY), (&self.worker, Type::TEXT)];
        self.write(&sql, values).await.map(drop)
    }
}

fn start(row: &tokio_postgres::Row) -> Start {
    let (runs, seen): (Vec<String>, Vec<i64>) = (row.get(3), row.get(4));
    let other = |(run, seen)| Other { run, seen: (seen >= 0).then_some(seen) };
    let failed = u32::try_from(row.get::<_, i32>(2)).unwrap_or(0);
    Start { kept: row.get(1), others: runs.into_iter().zip(seen).map(other).collect(), failed }
}
