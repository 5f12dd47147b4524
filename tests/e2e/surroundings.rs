//! What surrounds the process: a stderr that nobody reads, a terminal that goes, PID 1 of a container.
use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use std::process::{Command, Stdio};
use std::time::Duration;
use warren_tests::process::{binary, command};
use warren_tests::raw::free_port;
use warren_tests::{Lab, Process, event, until};

const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_log_that_nobody_reads_stops_nobody() -> anyhow::Result<()> {
    let mut lab = Lab::new("surroundings-stderr")?;
    let address = format!("127.0.0.1:{}", free_port()?);
    lab.set("WARREN_ROUTES", "routes: [{on: 'order.#', log: {}}]");
    lab.set("WARREN_ADMIN_ADDR", &address);
    lab.declare().await?;
    let mut worker = command("warren-worker", &lab.environment_of("mute", &[]));
    worker.arg("run").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut worker = tokio::process::Command::from(worker).kill_on_drop(true).spawn()?;
    // Each is a line of a kilobyte: more than the pipe and the buffer before it hold.
    let long = "x".repeat(200);
    let all: Vec<_> = (0..8_000)
        .map(|n| event(&format!("{long}{n}"), "order.placed", &format!("{long}{}", n % 50), json!(n)))
        .collect();
    lab.send(&all).await?;
    until("all are handled", PATIENCE, || lab.inbox() == all.len()).await?;
    until("the loss is counted", PATIENCE, || {
        lab.metric(&address, "warren_log_dropped_total", &[]).is_ok_and(|lost| lost.is_some_and(|lost| lost > 0.0))
    })
    .await?;
    ensure!(lab.page(&address, "/readyz")?.0 == 200, "it works as if nothing were wrong");
    let pid = worker.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).context("it runs")?;
    kill_process(pid, Signal::TERM)?;
    let status = tokio::time::timeout(PATIENCE, worker.wait()).await.context("it waits for its stderr")??;
    ensure!(status.success(), "{status}");
    Ok(())
}

#[tokio::test]
async fn a_terminal_that_goes_drains_the_worker_unless_nohup_says_no() -> anyhow::Result<()> {
    let mut lab = Lab::new("surroundings-hangup")?;
    lab.set("WARREN_ROUTES", &format!("routes: [{}]", lab.actor_route("order.#", "")));
    lab.declare().await?;
    let mut worker = lab.worker()?;
    lab.send(&[event("slow", "order.placed", "a", json!({"sleep": 2}))]).await?;
    until("it runs", PATIENCE, || lab.acts().len() == 1).await?;
    // The shell and the kernel both send it. The second is no second request, which would interrupt what runs.
    worker.signal(Signal::HUP)?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    worker.signal(Signal::HUP)?;
    let status = worker.wait(PATIENCE).await?;
    ensure!(status.success() && worker.log().contains("drained"), "{status}\n{}", worker.log());
    ensure!(lab.acts().len() == 1 && lab.inbox() == 1, "what ran was finished: {:?}", lab.acts());

    let mut nohup = Command::new("nohup");
    nohup.arg(binary("warren-worker")).arg("run");
    let mut worker = Process::start(with_environment(nohup, &lab), &lab.path("nohup.log"))?;
    until("it is there", PATIENCE, || worker.log().contains("takes events")).await?;
    worker.signal(Signal::HUP)?;
    lab.send(&[event("later", "order.placed", "a", json!({}))]).await?;
    until("it goes on", PATIENCE, || lab.inbox() == 2).await?;
    let status = worker.terminate(PATIENCE).await?;
    ensure!(status.success(), "{status}\n{}", worker.log());
    Ok(())
}

fn with_environment(mut outer: Command, lab: &Lab) -> Command {
    let inner = command("warren-worker", &lab.environment_of("inner", &[]));
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => outer.env(name, value),
            None => outer.env_remove(name),
        };
    }
    outer
}

/// The children of a process: their pids and states.
fn children(of: u32) -> Vec<(u32, char)> {
    let of_stat = |stat: &str| {
        let (pid, rest) = stat.split_once(' ')?;
        let mut fields = rest.rsplit_once(") ")?.1.split(' ');
        let (state, parent) = (fields.next()?.chars().next()?, fields.next()?.parse::<u32>().ok()?);
        (parent == of).then_some((pid.parse().ok()?, state))
    };
    let stats = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    stats.filter_map(|entry| of_stat(&std::fs::read_to_string(entry.path().join("stat")).ok()?)).collect()
}

#[tokio::test]
async fn a_worker_that_is_the_first_process_reaps_what_its_programs_leave() -> anyhow::Result<()> {
    let mut lab = Lab::new("surroundings-orphans")?;
    let ends = lab.path("ends");
    let program = format!(
        "import json, os, sys\n\
         for line in sys.stdin:\n    e = json.loads(line)['event']\n    \
         os.system('(sleep 0.3; echo x >> {}) > /dev/null 2>&1 &')\n    \
         print(json.dumps({{'id': e['id'], 'source': e['source'], 'status': 'done'}}), flush=True)\n",
        ends.display()
    );
    std::fs::write(lab.path("leaves.py"), program)?;
    lab.set(
        "WARREN_ROUTES",
        &format!("routes: [{{on: 'order.#', exec: [python3, '{}']}}]", lab.path("leaves.py").display()),
    );
    lab.declare().await?;
    let mut outer = Command::new("unshare");
    outer.args(["--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    outer.arg(binary("warren-worker")).arg("run");
    let mut worker = Process::start(with_environment(outer, &lab), &lab.path("first.log"))?;
    until("it is there", PATIENCE, || worker.log().contains("takes events")).await?;
    let first = children(worker.pid().context("it runs")?)[0].0;
    let all: Vec<_> = (0..5).map(|n| event(&format!("e{n}"), "order.placed", &format!("k{n}"), json!({}))).collect();
    lab.send(&all).await?;
    until("all are handled", PATIENCE, || lab.inbox() == 5).await?;
    let ended = || std::fs::read_to_string(&ends).map_or(0, |text| text.lines().count());
    until("the orphans have ended", PATIENCE, || ended() == 5).await?;
    until("none of them is left", PATIENCE, || children(first).len() == 1).await?;
    // The signal goes to the first process, as an engine sends it; its child drains.
    kill_process(Pid::from_raw(first.cast_signed()).context("a pid")?, Signal::TERM)?;
    let status = worker.wait(PATIENCE).await?;
    ensure!(status.success() && worker.log().contains("drained"), "{status}\n{}", worker.log());
    Ok(())
}
