//! A million events in one go: memory and pace at its end are what they were at its beginning.
use super::note;
use crate::bench::{Bench, say};
use crate::measure::megabytes;
use crate::results::Results;
use std::time::Duration;

/// Minutes, where the other rows take seconds.
const PATIENCE: Duration = Duration::from_secs(1200);

pub(super) fn run(bench: &Bench, results: &mut Results) -> anyhow::Result<()> {
    say("backlog");
    let count = bench.plan.backlog;
    let site = bench.site()?;
    site.load(1, count)?;
    let run = bench.run_within(&bench.client("warren_sqlite", &site, count)?, PATIENCE)?;
    note(results, "backlog", 1, run.between(count)?);
    let (first, tenth) = (run.line("first")?, run.line("mark 1")?);
    let (ninth, end) = (run.line("mark 9")?, run.line("mark 10")?);
    let pace = |time: Duration| (count / 10) as f64 / time.as_secs_f64().max(1e-6);
    results.put("backlog.first_tenth_per_s", 1, pace(tenth.at - first.at));
    results.put("backlog.last_tenth_per_s", 1, pace(end.at - ninth.at));
    results.put("backlog.rss_tenth_mb", 1, megabytes(tenth.memory));
    results.put("backlog.rss_end_mb", 1, megabytes(end.memory));
    Ok(())
}
