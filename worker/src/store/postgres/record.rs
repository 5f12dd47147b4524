//! Recording effects: one statement for many, in which the inbox decides who is fresh.
use super::periods::Periods;
use super::state::Changes;
use crate::store::{Effect, Outcome, Seen};
use std::collections::{HashMap, HashSet};
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;
use warren_shared::{Identity, Message};

/// Outgoing rows of one statement get ids from a range of this size: they ascend in the order of statements and in it.
const RANGE: i64 = 1 << 20;

pub(super) fn uuid(identity: &Identity) -> Uuid {
    Uuid::from_bytes(*identity.as_bytes())
}

/// Bytes that one statement sends, beyond its last effect.
const LARGE: usize = 32 << 20;

/// Effects that one statement records: no identity twice, a replay alone, not too many bytes.
pub(super) fn chunks(effects: &[Effect]) -> Vec<&[Effect]> {
    let (mut chunks, mut begin, mut seen, mut bytes) = (Vec::new(), 0, HashSet::new(), 0);
    let replay = |effect: &Effect| effect.seen.is_some_and(|seen| seen.replayed > 0);
    for (n, effect) in effects.iter().enumerate() {
        let repeated = effect.seen.is_some_and(|seen_here| !seen.insert(seen_here.identity));
        if n > begin && (repeated || bytes > LARGE || replay(effect) || replay(&effects[n - 1])) {
            chunks.push(&effects[begin..n]);
            (begin, bytes) = (n, 0);
            seen.clear();
            seen.extend(effect.seen.map(|seen| seen.identity));
        }
        bytes += effect.out.iter().map(|message| message.body.len() + 1024).sum::<usize>();
    }
    chunks.push(&effects[begin..]);
    chunks
}

/// The parameters of a statement that records effects; they live as long as it runs.
#[derive(Debug, Default)]
pub(super) struct Batch<'a> {
    numbers: Vec<i32>,
    identities: Vec<Option<Uuid>>,
    dead: Vec<bool>,
    started: Vec<Uuid>,
    replayed: i32,
    pub(super) out: Out<'a>,
    changes: Changes<'a>,
}

/// Outgoing rows, column by column.
#[derive(Debug, Default)]
pub(super) struct Out<'a> {
    worker: &'a str,
    effects: Vec<i32>,
    places: Vec<i64>,
    partitions: Vec<&'a str>,
    causes: Vec<Option<Uuid>>,
    envelopes: Vec<String>,
    bodies: Vec<&'a [u8]>,
}

impl<'a> Out<'a> {
    pub(super) fn of(worker: &'a str) -> Self {
        Self { worker, ..Self::default() }
    }

    pub(super) fn push(
        &mut self,
        effect: i32,
        partition: &'a str,
        cause: Option<Uuid>,
        message: &'a Message,
    ) -> Result<(), serde_json::Error> {
        self.effects.push(effect);
        self.places.push(self.places.len() as i64);
        self.partitions.push(partition);
        self.causes.push(cause);
        self.envelopes.push(serde_json::to_string(message)?);
        self.bodies.push(&message.body);
        Ok(())
    }

    /// The ids of the rows, from the id before the first one's.
    pub(super) fn ids(&self, base: i64) -> Vec<i64> {
        self.places.iter().map(|place| base + place).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.effects.is_empty()
    }

    /// The statement that sends them on a condition; it answers with the id before the first one's, or not at all.
    pub(super) fn statement(&self, s: &str, condition: &str) -> String {
        let sent = sent(s, 1, &format!("WHERE {condition}"));
        format!("WITH {sent} SELECT base FROM base WHERE {condition}")
    }

    /// What a statement that sends them is given.
    pub(super) fn values(&self) -> [(&(dyn ToSql + Sync), Type); 7] {
        [
            (&self.worker, Type::TEXT),
            (&self.effects, Type::INT4_ARRAY),
            (&self.places, Type::INT8_ARRAY),
            (&self.partitions, Type::TEXT_ARRAY),
            (&self.causes, Type::UUID_ARRAY),
            (&self.envelopes, Type::TEXT_ARRAY),
            (&self.bodies, Type::BYTEA_ARRAY),
        ]
    }
}

impl<'a> Batch<'a> {
    pub(super) fn of(effects: &'a [Effect], may: &[bool], worker: &'a str) -> Result<Self, serde_json::Error> {
        let mut batch = Self { out: Out::of(worker), ..Self::default() };
        for (n, effect) in (0..).zip(effects).filter(|(n, _)| may.get(*n as usize).is_none_or(|may| *may)) {
            let identity = effect.seen.map(|seen| uuid(&seen.identity));
            batch.numbers.push(n);
            batch.identities.push(identity);
            batch.dead.push(effect.outcome == Outcome::Dead);
            batch.started.extend(effect.started.as_ref().map(uuid));
            batch.replayed = effect.seen.map_or(0, |seen| i32::try_from(seen.replayed).unwrap_or(i32::MAX));
            effect.change.iter().for_each(|change| batch.changes.push(n, change));
            for message in &effect.out {
                batch.out.push(n, &effect.partition, identity, message)?;
            }
        }
        // Two batches that lock the same rows lock them in the same order.
        batch.started.sort_unstable();
        Ok(batch)
    }

    /// The statement that records it. It answers in one row: the phase, the numbers of the effects that are fresh, and the
    /// id before the first outgoing row's.
    ///
    /// Who is not known is new, and a unique index lets one of two at the same time win. A replay is new as well where the
    /// last outcome is a death before it: the lock of that row decides.
    ///
    /// It has only the parts that these effects need, as the server plans it anew each time. Whom an open period knows, its
    /// index says; the others are asked before. `now` is the store's time, `more` is selected beside the answer.
    pub(super) fn statement(&self, s: &str, periods: &Periods, now: &str, more: &str) -> String {
        let (period, next) = periods.open();
        let known = if self.replayed > 0 { Some(periods.known(s, 2)) } else { periods.known_before(s, 2) };
        let unknown = known.as_ref().map_or("", |_| "AND identity NOT IN (SELECT identity FROM known)");
        let known = known.map(|known| format!("known AS MATERIALIZED ({known}),")).unwrap_or_default();
        let (mut also, mut fresh) = (String::new(), "identity IN (SELECT identity FROM added)".to_owned());
        let added = match next {
            None => "SELECT identity FROM won".to_owned(),
            Some(next) => {
                // The death of an event that is forgotten is forgotten a moment later.
                also += &format!(
                    "cleared AS (DELETE FROM {s}.dead d USING e, added WHERE d.identity = added.identity
                         AND e.identity = added.identity AND NOT e.dead),"
                );
                format!(
                    "INSERT INTO {s}.inbox_{next} SELECT identity FROM won ORDER BY identity ON CONFLICT DO NOTHING
                     RETURNING identity"
                )
            }
        };
        if self.replayed > 0 {
            also += &format!(
                "revived AS (DELETE FROM {s}.dead d USING e WHERE d.identity = e.identity AND d.replayed < $5 AND NOT e.dead
                     AND EXISTS (SELECT FROM known) RETURNING d.identity),
                 redied AS (UPDATE {s}.dead d SET replayed = $5, at = clock_timestamp() FROM e WHERE d.identity = e.identity
                     AND d.replayed < $5 AND e.dead AND EXISTS (SELECT FROM known) RETURNING d.identity),
                 again AS (SELECT identity FROM revived UNION SELECT identity FROM redied),"
            );
            // The time to remember it begins anew.
            for period in [Some(period), next].into_iter().flatten() {
                also += &format!(
                    "again_{period} AS (INSERT INTO {s}.inbox_{period} SELECT identity FROM again ON CONFLICT DO NOTHING),"
                );
            }
            fresh += " OR identity IN (SELECT identity FROM again)";
        }
        if self.dead.contains(&true) {
            also += &format!(
                "died AS (INSERT INTO {s}.dead SELECT identity, $5, clock_timestamp() FROM e
                     WHERE dead AND identity IN (SELECT identity FROM added) ORDER BY identity
                     ON CONFLICT (identity) DO UPDATE SET replayed = excluded.replayed, at = excluded.at),"
            );
        }
        if !self.started.is_empty() {
            also += &format!("ended AS (DELETE FROM {s}.starts WHERE identity = ANY($4) AND EXISTS (SELECT FROM e)),");
        }
        let (out, base) = if self.out.is_empty() {
            (String::new(), "0::bigint".to_owned())
        } else {
            (format!(", {}", sent(s, 6, "WHERE n IN (SELECT n FROM fresh)")), "(SELECT base FROM base)".to_owned())
        };
        let changed = match self.changes.is_empty() {
            true => String::new(),
            false => format!(", {}", self.changes.part(s, 1 + self.values().len() - self.changes.values().len(), now)),
        };
        format!(
            "WITH e AS MATERIALIZED (SELECT n, identity, dead
                 FROM unnest($1::integer[], $2::uuid[], $3::boolean[]) AS e(n, identity, dead)
                 WHERE (SELECT phase FROM {s}.phase) = {phase}),
             {known}
             won AS (INSERT INTO {s}.inbox_{period} SELECT identity FROM e WHERE identity IS NOT NULL {unknown}
                 ORDER BY identity ON CONFLICT DO NOTHING RETURNING identity),
             added AS ({added}),
             {also}
             fresh AS MATERIALIZED (SELECT n FROM e WHERE identity IS NULL OR {fresh}){out}{changed}
             SELECT (SELECT phase FROM {s}.phase), ARRAY(SELECT n FROM fresh), {base}{more}",
            phase = periods.phase,
        )
    }

    /// What the statement is given.
    pub(super) fn values(&self) -> Vec<(&(dyn ToSql + Sync), Type)> {
        let mut values: Vec<(&(dyn ToSql + Sync), Type)> = vec![
            (&self.numbers, Type::INT4_ARRAY),
            (&self.identities, Type::UUID_ARRAY),
            (&self.dead, Type::BOOL_ARRAY),
            (&self.started, Type::UUID_ARRAY),
            (&self.replayed, Type::INT4),
        ];
        if !self.out.is_empty() {
            values.extend(self.out.values());
        }
        if !self.changes.is_empty() {
            values.extend(self.changes.values());
        }
        values
    }

    /// The ids of each effect's outgoing rows, from the id before the first one's.
    pub(super) fn rows(&self, base: i64) -> HashMap<i32, Vec<i64>> {
        let mut rows: HashMap<i32, Vec<i64>> = HashMap::new();
        for (effect, place) in self.out.effects.iter().zip(&self.out.places) {
            rows.entry(*effect).or_default().push(base + place);
        }
        rows
    }
}

/// The statement that records one effect of the usual kind, without parameters: its event is done, is no replay and was
/// not counted before, in a period that gives way to no other. It answers in one row: the phase, and whether it is fresh;
/// `more` beside them. None where the effect is of another kind.
pub(super) fn plain(effect: &Effect, s: &str, periods: &Periods, more: &str) -> Option<String> {
    let ((period, None), Some(Seen { identity, replayed: 0 })) = (periods.open(), effect.seen) else { return None };
    if effect.outcome != Outcome::Done || effect.started.is_some() || !effect.out.is_empty() || effect.change.is_some()
    {
        return None;
    }
    let (phase, identity) = (periods.phase, uuid(&identity));
    let unknown =
        |period: i32| format!(" AND NOT EXISTS (SELECT FROM {s}.inbox_{period} WHERE identity = '{identity}')");
    let unknown: String = periods.closed().map(unknown).collect();
    Some(format!(
        "WITH won AS (INSERT INTO {s}.inbox_{period} SELECT '{identity}' WHERE (SELECT phase FROM {s}.phase) = {phase}{unknown}
             ON CONFLICT DO NOTHING RETURNING 1)
         SELECT (SELECT phase FROM {s}.phase), EXISTS (SELECT FROM won){more}"
    ))
}

/// Inserts outgoing rows; their columns are the parameters from `$first` on.
fn sent(s: &str, first: u32, which: &str) -> String {
    let n = |offset: u32| first + offset;
    format!(
        "base AS MATERIALIZED (SELECT nextval('{s}.outbox_base') * {RANGE} AS base),
         sent AS (INSERT INTO {s}.outbox (id, worker, partition, cause, envelope, body)
             SELECT base + place, ${}, partition, cause, envelope, body
             FROM unnest(${}::integer[], ${}::bigint[], ${}::text[], ${}::uuid[], ${}::text[], ${}::bytea[])
                 AS o(n, place, partition, cause, envelope, body), base {which})",
        n(0),
        n(1),
        n(2),
        n(3),
        n(4),
        n(5),
        n(6)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effect(id: &str, replayed: u32, size: usize) -> Effect {
        let seen = Some(Seen { identity: Identity::of("/tests", id), replayed });
        let out = vec![Message { body: vec![0; size], ..Message::default() }];
        Effect { seen, outcome: Outcome::Done, started: None, partition: "p00".into(), out, change: None }
    }

    #[test]
    fn a_statement_holds_no_identity_twice_a_replay_alone_and_not_too_much() {
        let sizes = |effects: &[Effect]| chunks(effects).iter().map(|chunk| chunk.len()).collect::<Vec<_>>();
        let small = |id: &str| effect(id, 0, 1);
        assert_eq!(sizes(&[small("1"), small("2"), small("1"), small("1"), small("3")]), [2, 1, 2]);
        assert_eq!(sizes(&[small("1"), effect("2", 1, 1), effect("3", 2, 1), small("4"), small("5")]), [1, 1, 1, 2]);
        let large = |id: &str| effect(id, 0, 20 << 20);
        assert_eq!(sizes(&[large("1"), large("2"), large("3"), large("4"), small("5")]), [2, 2, 1]);
    }
}
