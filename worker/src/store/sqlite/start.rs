//! Starts of events that were delivered before, in a file.
use crate::store::{Begin, Other, Start};
use rusqlite::{OptionalExtension, Transaction, params};
use warren_shared::Identity;

/// Records a worker's start, where not too many others are recorded.
pub(super) fn begin(tx: &Transaction<'_>, begin: &Begin, worker: &str, now: i64) -> rusqlite::Result<Start> {
    let (mut runs, failed) = read(tx, &begin.event)?.unwrap_or_default();
    if runs.is_empty() {
        runs.extend(begin.before.as_deref().map(str::to_owned));
    }
    let mut others = Vec::new();
    for run in runs.iter().filter(|run| *run != worker) {
        let known = "SELECT seen, ended FROM workers WHERE id = ?1";
        let known: Option<(i64, bool)> =
            tx.prepare_cached(known)?.query_row([run], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        if known.is_none_or(|(_, ended)| !ended) {
            others.push(Other { run: run.clone(), seen: known.map(|(seen, _)| seen) });
        }
    }
    let kept = others.len() <= begin.most as usize;
    if kept {
        if !runs.iter().any(|run| run == worker) {
            runs.push(worker.to_owned());
        }
        write(tx, &begin.event, &runs, failed, now)?;
    }
    Ok(Start { kept, others, failed })
}

/// Takes a worker's start back.
pub(super) fn take_back(tx: &Transaction<'_>, event: &Identity, worker: &str) -> rusqlite::Result<()> {
    let Some((mut runs, failed)) = read(tx, event)? else { return Ok(()) };
    runs.retain(|run| run != worker);
    if runs.is_empty() && failed == 0 {
        return tx.prepare_cached("DELETE FROM starts WHERE identity = ?1")?.execute([event.as_bytes()]).map(drop);
    }
    let runs = serde_json::to_string(&runs).unwrap_or_default();
    tx.prepare_cached("UPDATE starts SET runs = ?2 WHERE identity = ?1")?
        .execute(params![event.as_bytes(), runs])
        .map(drop)
}

/// The workers that began an event, and attempts that failed in place.
fn read(tx: &Transaction<'_>, event: &Identity) -> rusqlite::Result<Option<(Vec<String>, u32)>> {
    let mut find = tx.prepare_cached("SELECT runs, failed FROM starts WHERE identity = ?1")?;
    let found = find.query_row([event.as_bytes()], |row| Ok((row.get::<_, String>(0)?, row.get(1)?))).optional()?;
    Ok(found.map(|(runs, failed)| (serde_json::from_str(&runs).unwrap_or_default(), failed)))
}

fn write(tx: &Transaction<'_>, event: &Identity, runs: &[String], failed: u32, now: i64) -> rusqlite::Result<()> {
    let text = serde_json::to_string(runs).unwrap_or_default();
    tx.prepare_cached(
        "INSERT INTO starts (identity, starts, failed, at, runs) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (identity) DO UPDATE SET starts = excluded.starts, at = excluded.at, runs = excluded.runs",
    )?
    .execute(params![event.as_bytes(), runs.len() as i64, failed, now, text])
    .map(drop)
}
