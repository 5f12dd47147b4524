//! The table on stdout, and the file of figures.
use crate::bench::{Bench, say};
use crate::results::Results;
use crate::targets::TARGETS;
use anyhow::Context;
use serde_json::json;
use std::io::Write;
use std::path::Path;

/// Writes the file of figures.
pub(crate) fn write(bench: &Bench, results: &Results, path: &Path) -> anyhow::Result<()> {
    let mut json = results.json();
    let overview = bench.rabbit.api("GET", "overview", None)?;
    let variables: std::collections::BTreeMap<_, _> =
        std::env::vars().filter(|(name, _)| name.starts_with("WARREN_")).collect();
    json["broker"] = json!({"rabbitmq": overview["rabbitmq_version"], "erlang": overview["erlang_version"]});
    json["peers"] = json!(bench.peers.versions());
    json["rounds"] = json!(bench.plan.rounds);
    json["count"] = json!(bench.plan.drain);
    json["smoke"] = json!(bench.plan.smoke);
    json["date"] = json!(jiff::Timestamp::now().to_string());
    json["cores"] = json!(std::thread::available_parallelism().map_or(0, usize::from));
    json["disturbed_runs"] = json!(bench.disturbed.get());
    // What somebody tried out must not pass for the defaults.
    json["variables"] = json!(variables);
    let targets = TARGETS.iter().map(|target| {
        let verdict = target.judge(results);
        json!({"what": target.what, "wanted": verdict.wanted, "measured": verdict.measured, "met": verdict.met})
    });
    json["targets"] = targets.collect();
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let text = format!("{}\n", serde_json::to_string_pretty(&json)?);
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    say(&format!("figures: {}", path.display()));
    Ok(())
}

/// Prints the table.
pub(crate) fn print(bench: &Bench, results: &Results) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if bench.plan.smoke {
        writeln!(out, "smoke run: everything works; the figures mean nothing")?;
    }
    writeln!(out, "{:<24} {:>9} {:>19} {:>9} {:>8}", "row", "events/s", "(lowest-highest)", "CPU µs", "RSS MB")?;
    for row in results.rows() {
        if let Some(why) = results.why_absent().get(&row) {
            writeln!(out, "{row:<24} absent: {why}")?;
            continue;
        }
        let figure = |name: &str| results.median(&format!("{row}.{name}")).unwrap_or(f64::NAN);
        let (low, high) = results.range(&format!("{row}.per_s")).unwrap_or((f64::NAN, f64::NAN));
        let spread = format!("({low:.0}-{high:.0})");
        let (per_s, cpu, rss) = (figure("per_s"), figure("cpu_us"), figure("rss_mb"));
        writeln!(out, "{row:<24} {per_s:>9.0} {spread:>19} {cpu:>9.1} {rss:>8.1}")?;
    }
    for row in ["raw", "warren"] {
        let figures = ["p50_ms", "p99_ms", "max_ms"].map(|name| results.median(&format!("latency.{row}.{name}")));
        if let [Some(p50), Some(p99), Some(max)] = figures {
            writeln!(out, "latency, {row:<15} p50 {p50:.2} ms, p99 {p99:.2} ms, longest {max:.2} ms")?;
        }
    }
    if bench.disturbed.get() > 0 {
        writeln!(out, "{} runs were disturbed by an alarm of the broker (memory or disk)", bench.disturbed.get())?;
    }
    if bench.plan.smoke {
        return Ok(());
    }
    writeln!(out, "\n{:<36} {:>9} {:>10}", "target", "wanted", "measured")?;
    for target in &TARGETS {
        let verdict = target.judge(results);
        let measured = verdict.measured.map_or_else(|| "-".into(), |value| format!("{value:.2}"));
        let met = match verdict.met {
            Some(true) => "ok",
            Some(false) => "MISS",
            None => "not measured",
        };
        writeln!(out, "{:<36} {:>9} {measured:>10} {met}", target.what, verdict.wanted)?;
    }
    Ok(())
}
