//! Few and many known ids: what an event costs where the store remembers a hundred times as much.
use super::note;
use crate::bench::{Bench, delete, dir, say};
use crate::measure;
use crate::results::Results;
use anyhow::ensure;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use warren_shared::Identity;
use warren_worker::store::{Effect, Outcome, Seen, Sqlite, Store};

/// The names of the two sizes in the results. A smoke run has fewer of both.
pub(crate) const SIZES: [&str; 2] = ["100k", "10m"];

/// A store with known ids, copied for each run; deleted when dropped.
struct Template {
    path: PathBuf,
    name: &'static str,
}

impl Drop for Template {
    fn drop(&mut self) {
        delete(&self.path);
    }
}

pub(super) fn run(bench: &Bench, results: &mut Results) -> anyhow::Result<()> {
    say("inbox");
    let mut templates = Vec::new();
    for (name, ids) in SIZES.into_iter().zip(bench.plan.inbox) {
        let template = Template { path: dir().join(format!("inbox-{name}.db")), name };
        fill(bench, &template.path, ids)?;
        templates.push(template);
    }
    let count = bench.plan.drain;
    for round in 1..=bench.plan.rounds {
        for template in &templates {
            let site = bench.site()?;
            std::fs::copy(&template.path, site.store())?;
            // Else the kernel writes the copy while the client waits for its own writes.
            std::fs::File::open(site.store())?.sync_all()?;
            site.load(1, count)?;
            let run = bench.run(&bench.client("warren_sqlite", &site, count)?)?;
            let row = format!("inbox.{}", template.name);
            let start = run.line("first")?.at - run.started;
            results.put(&format!("{row}.start_ms"), round, start.as_secs_f64() * 1000.0);
            note(results, &row, round, run.between(count)?);
            say(&format!("    first event after {start:.1?}"));
        }
    }
    Ok(())
}

/// Ids a commit. As many as a worker would commit at once is slow here, and more changes nothing that stays.
const BATCH: u64 = 20_000;

/// Makes a store that knows so many ids, by its own means: whatever its layout, this is what it would have become.
fn fill(bench: &Bench, path: &Path, ids: u64) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir())?;
    delete(path);
    let store = Sqlite::open(path, "prefill")?;
    for from in (0..ids).step_by(BATCH as usize) {
        let effects = (from..ids.min(from + BATCH)).map(known).collect();
        bench.runtime.block_on(store.commit(Arc::new(effects)))?;
    }
    drop(store);
    folded(path)?;
    say(&format!("    a store with {ids} ids has {:.0} MB", measure::megabytes(std::fs::metadata(path)?.len())));
    Ok(())
}

fn known(n: u64) -> Effect {
    let seen = Seen { identity: Identity::of("/known", &n.to_string()), replayed: 0 };
    Effect {
        seen: Some(seen),
        outcome: Outcome::Done,
        started: None,
        partition: "".into(),
        out: Vec::new(),
        change: None,
    }
}

/// Waits until the write-ahead log is part of the file: the store's thread may still be closing it.
fn folded(path: &Path) -> anyhow::Result<()> {
    let begun = Instant::now();
    let store = rusqlite::Connection::open(path)?;
    while store.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0))? != 0 {
        ensure!(begun.elapsed() < Duration::from_secs(60), "the store's log cannot be folded into its file");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
