//! From the start of the process to its first event handled, with the topology in place and events waiting.
use crate::bench::{Bench, say};
use crate::results::Results;

/// Events that wait.
const WAITING: u64 = 8;

pub(super) fn run(bench: &Bench, results: &mut Results) -> anyhow::Result<()> {
    say("start");
    let site = bench.site()?;
    for round in 1..=bench.plan.starts {
        // A series each: the store knows the ids of those before.
        site.load(u64::from(round), WAITING)?;
        let run = bench.run(&bench.client("warren_sqlite", &site, WAITING)?)?;
        let took = run.line("first")?.at - run.started;
        let all = run.ended - run.started;
        results.put("start.ms", round, took.as_secs_f64() * 1000.0);
        say(&format!("{round:>2}  first event after {took:.1?}, drained and ended after {all:.1?}"));
    }
    Ok(())
}
