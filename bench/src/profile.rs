//! One client alone, on loaded queues, to look into it.
use crate::Order;
use crate::bench::{Bench, say};
use crate::clients::steps::STEPS;
use crate::rows::tx;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// Recording slows it down.
const PATIENCE: Duration = Duration::from_secs(1200);

/// Loads, prints the command line, runs it.
pub(crate) fn run(client: &str, count: u64, perf: Option<&Path>) -> anyhow::Result<ExitCode> {
    let order = Order { rows: Vec::new(), only: Vec::new(), rounds: None, count: None, smoke: false, json: None };
    let bench = Bench::new(&order)?;
    let mut site = bench.site()?;
    if client == "warren_postgres" || client.starts_with("tx_") {
        site = site.on_postgres()?;
    }
    if client.starts_with("tx_") {
        tx::tables(&bench, &site)?;
    }
    if client != "publish_raw" {
        // Of a process the steps count, but the starts wait.
        site.load(1, if client == "process_warren" { count / STEPS } else { count })?;
    }
    let plain = bench.client(client, &site, count)?;
    say(&line(&plain));
    let command =
        perf.filter(|_| is_installed("perf")).map_or(plain, |file| under_perf(&bench, client, file, &site, count));
    let run = bench.run_within(&command, PATIENCE)?;
    let figures = run.between(count)?;
    say(&format!("{:.0}/s  {:.1} µs  {:.1} MB", figures.per_s, figures.cpu_us, figures.rss_mb));
    Ok(ExitCode::SUCCESS)
}

fn under_perf(bench: &Bench, client: &str, file: &Path, site: &crate::site::Site<'_>, count: u64) -> Command {
    let mut command = Command::new("perf");
    command.args(["record", "--call-graph", "dwarf,16384", "-F", "499", "-o"]).arg(file).arg("--");
    command.arg(warren_tests::process::binary("warren-bench")).args(["client", client]);
    bench.describe(&mut command, site, count);
    command
}

fn is_installed(program: &str) -> bool {
    let asked = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    let there = asked.is_ok_and(|status| status.success());
    if !there {
        say(&format!("{program} is not installed: running without it"));
    }
    there
}

/// The command as a shell takes it.
fn line(command: &Command) -> String {
    let variables = command
        .get_envs()
        .filter_map(|(name, value)| Some(format!("{}='{}'", name.to_string_lossy(), value?.to_string_lossy())));
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    variables.chain(words.map(|word| word.to_string_lossy().into_owned())).collect::<Vec<_>>().join(" ")
}
