//! The inbox: which events have an outcome, for as long as the retention says.
//!
//! A commit appends one row with all its identities. An index of 16-byte hashes would take a page of the file for
//! nearly every event, over and over; this takes a page for two hundred. What was recorded last is kept in memory.
//! When that is many, it is sealed: sorted into pages that are found by an identity's first bits, behind a filter that
//! answers for almost everything that is fresh. A run of sealed pages is forgotten as a whole.
//!
//! Whatever is called `at` is in the store's time (`../time.rs`).
//!
//! Other processes write to the same file: every transaction first takes in what is new, so memory is never behind.
use super::filter::Filter;
use crate::store::{Outcome, Seen};
use rusqlite::{Transaction, params};
use rustc_hash::FxHashSet;
use warren_shared::Identity;

pub(super) const TABLES: &str = "
    CREATE TABLE inbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, identities BLOB NOT NULL);
    CREATE TABLE runs (run INTEGER PRIMARY KEY AUTOINCREMENT, newest INTEGER NOT NULL, identities INTEGER NOT NULL);
    CREATE TABLE pages (page INTEGER PRIMARY KEY, identities BLOB NOT NULL);
    CREATE TABLE dead (identity BLOB PRIMARY KEY, replayed INTEGER NOT NULL, at INTEGER NOT NULL) WITHOUT ROWID;
";

/// Identities in a run. Tests seal often.
const RUN: usize = if cfg!(test) { 128 } else { 1 << 16 };
/// Pages of a run: 64 identities each, three of them in a page of the file.
const PAGES: i64 = 1024;
/// Runs that share a filter.
const GROUP: usize = 16;
const SIZE: usize = 16;

/// What this process knows of the inbox without reading.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// What is not sealed.
    recent: FxHashSet<Identity>,
    /// The last row of it.
    seq: i64,
    /// The last run.
    run: i64,
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    runs: Vec<i64>,
    filter: Filter,
}

/// What a commit adds, known only once it is durable.
#[derive(Debug, Default)]
pub(super) struct Fresh {
    identities: FxHashSet<Identity>,
    seq: i64,
    sealed: Option<i64>,
}

impl Inbox {
    /// Takes in what other processes recorded and sealed.
    pub(super) fn refresh(&mut self, tx: &Transaction<'_>) -> rusqlite::Result<()> {
        let run: i64 = tx.prepare_cached("SELECT coalesce(max(run), 0) FROM runs")?.query_row([], |row| row.get(0))?;
        if run > self.run {
            let mut sealed = tx.prepare_cached("SELECT run FROM runs WHERE run > ?1 ORDER BY run")?;
            let sealed = sealed.query_map([self.run], |row| row.get(0))?.collect::<rusqlite::Result<Vec<i64>>>()?;
            self.forget_recent();
            for run in sealed {
                let identities = pages(tx, run)?;
                self.add_run(run, identities.iter());
            }
        }
        let mut rows = tx.prepare_cached("SELECT seq, identities FROM inbox WHERE seq > ?1 ORDER BY seq")?;
        let mut rows = rows.query([self.seq])?;
        while let Some(row) = rows.next()? {
            self.seq = row.get(0)?;
            self.recent.extend(split(row.get_ref(1)?.as_blob()?));
        }
        Ok(())
    }

    fn forget_recent(&mut self) {
        self.recent.clear();
        self.seq = 0;
    }

    fn add_run<'a>(&mut self, run: i64, identities: impl Iterator<Item = &'a Identity>) {
        if self.groups.last().is_none_or(|group| group.runs.len() == GROUP) {
            self.groups.push(Group { runs: Vec::new(), filter: Filter::with_capacity(GROUP * RUN) });
        }
        if let Some(group) = self.groups.last_mut() {
            group.runs.push(run);
            self.run = run;
            identities.for_each(|identity| group.filter.insert(identity));
        }
    }

    /// Whether an outcome of it is recorded.
    fn holds(&self, tx: &Transaction<'_>, identity: &Identity) -> rusqlite::Result<bool> {
        if self.recent.contains(identity) {
            return Ok(true);
        }
        for group in self.groups.iter().rev().filter(|group| group.filter.may_hold(identity)) {
            let mut page = tx.prepare_cached("SELECT identities FROM pages WHERE page = ?1")?;
            for run in group.runs.iter().rev() {
                let mut rows = page.query([run * PAGES + place(identity)])?;
                let Some(row) = rows.next()? else { continue };
                if split(row.get_ref(0)?.as_blob()?).any(|held| held == *identity) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Whether this event has an outcome that stands: a death gives way to a later replay.
    pub(super) fn knows(&self, tx: &Transaction<'_>, seen: &Seen) -> rusqlite::Result<bool> {
        Ok(self.holds(tx, &seen.identity)?
            && death(tx, &seen.identity)?.is_none_or(|replayed| replayed >= seen.replayed))
    }

    /// Records an outcome, unless there is one that stands. First come, first served.
    pub(super) fn claim(
        &self,
        tx: &Transaction<'_>,
        fresh: &mut Fresh,
        seen: &Seen,
        outcome: Outcome,
        at: i64,
    ) -> rusqlite::Result<bool> {
        let known = fresh.identities.contains(&seen.identity) || self.holds(tx, &seen.identity)?;
        if known {
            match death(tx, &seen.identity)? {
                Some(replayed) if replayed < seen.replayed => {}
                _ => return Ok(false),
            }
        }
        // Also where a replay overcomes a death: the time to remember it begins anew.
        fresh.identities.insert(seen.identity);
        if outcome == Outcome::Dead {
            tx.prepare_cached("INSERT OR REPLACE INTO dead VALUES (?1, ?2, ?3)")?.execute(params![
                seen.identity.as_bytes(),
                seen.replayed,
                at
            ])?;
        } else if known {
            tx.prepare_cached("DELETE FROM dead WHERE identity = ?1")?.execute([seen.identity.as_bytes()])?;
        }
        Ok(true)
    }

    /// Writes what a commit claimed: a row, or with all recent rows a run.
    pub(super) fn write(&self, tx: &Transaction<'_>, fresh: &mut Fresh, at: i64) -> rusqlite::Result<()> {
        if fresh.identities.is_empty() {
            return Ok(());
        }
        if self.recent.len() + fresh.identities.len() < RUN {
            let identities: Vec<u8> = fresh.identities.iter().flat_map(|identity| *identity.as_bytes()).collect();
            tx.prepare_cached("INSERT INTO inbox (at, identities) VALUES (?1, ?2)")?
                .execute(params![at, identities])?;
            fresh.seq = tx.last_insert_rowid();
            return Ok(());
        }
        let mut all: Vec<&Identity> = self.recent.union(&fresh.identities).collect();
        all.sort_unstable();
        tx.execute("INSERT INTO runs (newest, identities) VALUES (?1, ?2)", params![at, all.len() as i64])?;
        let run = tx.last_insert_rowid();
        let mut insert = tx.prepare_cached("INSERT INTO pages VALUES (?1, ?2)")?;
        for page in all.chunk_by(|a, b| place(a) == place(b)) {
            let identities: Vec<u8> = page.iter().flat_map(|identity| *identity.as_bytes()).collect();
            insert.execute(params![run * PAGES + place(page[0]), identities])?;
        }
        tx.execute("DELETE FROM inbox", [])?;
        fresh.sealed = Some(run);
        Ok(())
    }

    /// Remembers what a commit made durable.
    pub(super) fn remember(&mut self, fresh: Fresh) {
        self.seq = self.seq.max(fresh.seq);
        self.recent.extend(fresh.identities);
        if let Some(run) = fresh.sealed {
            let recent = std::mem::take(&mut self.recent);
            self.add_run(run, recent.iter());
            self.forget_recent();
        }
    }

    /// Forgets what was recorded before a time; says how much that was. Where that cannot be committed, this whole value
    /// is to be forgotten: it would be behind the file.
    pub(super) fn prune(&mut self, tx: &Transaction<'_>, before: i64) -> rusqlite::Result<i64> {
        self.refresh(tx)?;
        let count = |sql| tx.prepare_cached(sql)?.query_row([before], |row| row.get::<_, i64>(0));
        let gone = count("SELECT coalesce(sum(identities), 0) FROM runs WHERE newest < ?1")?
            + count("SELECT coalesce(sum(length(identities)), 0) / 16 FROM inbox WHERE at < ?1")?;
        if gone == 0 {
            return Ok(0);
        }
        let mut old = tx.prepare_cached("DELETE FROM runs WHERE newest < ?1 RETURNING run")?;
        let old = old.query_map([before], |row| row.get(0))?.collect::<rusqlite::Result<Vec<i64>>>()?;
        for run in &old {
            let pages = [run * PAGES, (run + 1) * PAGES];
            tx.execute("DELETE FROM pages WHERE page >= ?1 AND page < ?2", pages)?;
        }
        tx.execute("DELETE FROM inbox WHERE at < ?1", [before])?;
        self.groups.iter_mut().for_each(|group| group.runs.retain(|run| !old.contains(run)));
        self.groups.retain(|group| !group.runs.is_empty());
        self.forget_recent();
        self.refresh(tx)?;
        // A death is remembered as long as its identity, else it would pass for a success.
        let mut dead = tx.prepare_cached("SELECT identity FROM dead WHERE at < ?1")?;
        let dead = dead.query_map([before], |row| row.get(0))?.collect::<rusqlite::Result<Vec<[u8; SIZE]>>>()?;
        for identity in dead {
            if !self.holds(tx, &Identity::from_bytes(identity))? {
                tx.prepare_cached("DELETE FROM dead WHERE identity = ?1")?.execute([identity])?;
            }
        }
        Ok(gone)
    }
}

/// Up to which replay an event is dead, where it is.
fn death(tx: &Transaction<'_>, identity: &Identity) -> rusqlite::Result<Option<u32>> {
    let mut find = tx.prepare_cached("SELECT replayed FROM dead WHERE identity = ?1")?;
    let mut rows = find.query([identity.as_bytes()])?;
    rows.next()?.map(|row| row.get(0)).transpose()
}

fn pages(tx: &Transaction<'_>, run: i64) -> rusqlite::Result<Vec<Identity>> {
    let mut find = tx.prepare_cached("SELECT identities FROM pages WHERE page >= ?1 AND page < ?2")?;
    let mut rows = find.query([run * PAGES, (run + 1) * PAGES])?;
    let mut identities = Vec::with_capacity(RUN);
    while let Some(row) = rows.next()? {
        identities.extend(split(row.get_ref(0)?.as_blob()?));
    }
    Ok(identities)
}

/// Which page of a run an identity is in: its first ten bits.
fn place(identity: &Identity) -> i64 {
    let bytes = identity.as_bytes();
    i64::from(u16::from_be_bytes([bytes[0], bytes[1]]) >> 6)
}

fn split(blob: &[u8]) -> impl Iterator<Item = Identity> {
    blob.as_chunks::<SIZE>().0.iter().map(|bytes| Identity::from_bytes(*bytes))
}
