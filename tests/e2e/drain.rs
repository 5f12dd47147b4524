//! SIGTERM: what runs is finished or handed over, nothing is done twice, and nobody is blamed.
use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::net::TcpListener;
use std::time::{Duration, Instant};
use warren_tests::{Lab, Process, Sink, event, events, length, until};

const PATIENCE: Duration = Duration::from_secs(120);

async fn lab(name: &str) -> anyhow::Result<(Lab, Sink)> {
    let mut lab = Lab::new(name)?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(""));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    Ok((lab, heard))
}

/// SIGTERM, and exit 0 in time.
async fn drain(worker: &mut Process) -> anyhow::Result<Duration> {
    let started = Instant::now();
    let status = worker.terminate(PATIENCE).await?;
    ensure!(status.success(), "{status}\n{}", worker.log());
    Ok(started.elapsed())
}

/// Every event was handled once, by one call, and published once.
async fn all_once(lab: &Lab, ids: &[String], heard: &Sink) -> anyhow::Result<()> {
    let ledger = lab.account(ids, heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == ids.len(), "{ledger:?}{}", lab.logs());
    ensure!(ledger.repeats == 0, "a drained outbox leaves nothing to repeat: {ledger:?}");
    ensure!(lab.calls().len() == ids.len(), "{} calls for {} events", lab.calls().len(), ids.len());
    ensure!(lab.starts() == 0, "{} starts are left", lab.starts());
    lab.calls_in_order()
}

fn slow(id: &str, seconds: f64) -> Value {
    event(id, "order.placed", id, json!({"sleep": seconds}))
}

/// The first call takes so long, the next ones no time.
fn slow_once(id: &str, seconds: f64) -> Value {
    event(id, "order.placed", id, json!({"sleeps": [seconds, 0, 0]}))
}

#[tokio::test]
async fn workers_that_drain_under_load_hand_over_what_they_did_not_begin() -> anyhow::Result<()> {
    let (lab, heard) = lab("drain-load").await?;
    let (mut first, mut second) = (lab.worker()?, lab.worker()?);
    let all = events(2_000, 30);
    let draining = async {
        lab.progressed(300, PATIENCE).await?;
        drain(&mut first).await?;
        lab.progressed(700, PATIENCE).await?;
        drain(&mut second).await?;
        ensure!(lab.inbox() < 2_000, "both were to leave work behind");
        ensure!(lab.outbox() == 0, "{} outgoing events were left behind", lab.outbox());
        lab.worker()
    };
    let (ids, third) = tokio::join!(lab.send(&all), draining);
    let mut third = third?;
    all_once(&lab, &ids?, &heard).await?;
    drain(&mut third).await?;
    ensure!(lab.queued().await? == 0, "{} deliveries were not acked", lab.queued().await?);
    Ok(())
}

#[tokio::test]
async fn rolling_restarts_of_three_workers_under_load_keep_the_account() -> anyhow::Result<()> {
    let (lab, heard) = lab("drain-rolling").await?;
    let mut fleet = vec![lab.worker()?, lab.worker()?, lab.worker()?];
    let rounds = length(4, 10);
    let all = events(rounds * 300 + 300, 30);
    let rolling = async {
        for round in 1..=rounds {
            lab.progressed(round * 300, PATIENCE).await?;
            drain(&mut fleet.remove(0)).await?;
            fleet.push(lab.worker()?);
        }
        anyhow::Ok(())
    };
    let (ids, rolled) = tokio::join!(lab.send(&all), rolling);
    rolled?;
    all_once(&lab, &ids?, &heard).await?;
    for worker in &mut fleet {
        drain(worker).await?;
    }
    ensure!(lab.queued().await? == 0, "{} deliveries were not acked", lab.queued().await?);
    Ok(())
}

#[tokio::test]
async fn a_slow_handler_finishes_within_the_drain() -> anyhow::Result<()> {
    let (lab, heard) = lab("drain-slow").await?;
    let mut worker = lab.worker()?;
    let ids = lab.send(&[slow("slow", 3.0)]).await?;
    until("it runs", PATIENCE, || lab.calls().len() == 1).await?;
    drain(&mut worker).await?;
    ensure!(lab.inbox() == 1 && lab.outbox() == 0, "it was not finished:\n{}", worker.log());
    all_once(&lab, &ids, &heard).await?;
    ensure!(lab.queued().await? == 0, "it was not acked");
    Ok(())
}

#[tokio::test]
async fn a_handler_slower_than_the_drain_is_interrupted_and_not_counted() -> anyhow::Result<()> {
    let (lab, heard) = lab("drain-interrupt").await?;
    let ids = lab.send(&[slow_once("slow", 8.0)]).await?;
    let mut first = lab.worker_with(&[("WARREN_DRAIN_TIMEOUT", "2s")])?;
    until("it runs", PATIENCE, || lab.calls().len() == 1).await?;
    let took = drain(&mut first).await?;
    ensure!(took < Duration::from_secs(8), "the drain took {took:?}");
    ensure!(lab.inbox() == 0, "it was to be interrupted");
    let _second = lab.worker()?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 1, "{ledger:?}");
    let attempts: Vec<String> = lab.calls().into_iter().map(|[.., attempt]| attempt).collect();
    ensure!(attempts == ["1", "1"], "the attempts were {attempts:?}");
    Ok(())
}

#[tokio::test]
async fn more_interrupted_drains_than_the_crash_limit_kill_no_event() -> anyhow::Result<()> {
    let (lab, heard) = lab("drain-again").await?;
    let ids = lab.send(&[slow("slow", 6.0), slow("next", 0.0)]).await?;
    for round in 1..=4 {
        let mut worker = lab.worker_with(&[("WARREN_DRAIN_TIMEOUT", "1s")])?;
        let runs = || lab.calls().iter().filter(|[_, id, ..]| id == "slow").count() >= round;
        until("it runs", PATIENCE, runs).await?;
        drain(&mut worker).await?;
        ensure!(lab.starts() == 0, "round {round}: {} starts are left", lab.starts());
    }
    let _last = lab.worker()?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 2, "{ledger:?}{}", lab.logs());
    ensure!(lab.calls().iter().all(|[.., attempt]| attempt == "1"), "{:?}", lab.calls());
    Ok(())
}

#[tokio::test]
async fn a_drain_takes_back_the_recorded_starts_of_the_innocent() -> anyhow::Result<()> {
    let (lab, heard) = lab("drain-starts").await?;
    let all: Vec<Value> = (0..10).map(|n| slow(&format!("e{n}"), 1.0)).collect();
    let ids = lab.send(&all).await?;
    let mut killed = lab.worker()?;
    until("they run", PATIENCE, || !lab.calls().is_empty()).await?;
    killed.kill().await?;
    // All of them are redelivered, so their starts are recorded; most are still waiting inside the program.
    let mut drained = lab.worker_with(&[("WARREN_DRAIN_TIMEOUT", "1s")])?;
    until("starts are recorded", PATIENCE, || (1..=10).contains(&lab.starts_of("w1"))).await?;
    drain(&mut drained).await?;
    ensure!(lab.inbox() < 10, "the drain was to interrupt some");
    ensure!(lab.starts_of("w1") == 0, "{} starts are left", lab.starts_of("w1"));
    ensure!(lab.starts_of("w0") > 0, "it is forgotten who died");
    let _last = lab.worker()?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 10, "{ledger:?}{}", lab.logs());
    ensure!(lab.starts() == 0, "{} starts are left at rest", lab.starts());
    Ok(())
}

#[tokio::test]
async fn a_second_sigterm_skips_ahead() -> anyhow::Result<()> {
    let (lab, heard) = lab("drain-second").await?;
    let ids = lab.send(&[slow_once("slow", 20.0)]).await?;
    let mut first = lab.worker_with(&[("WARREN_DRAIN_TIMEOUT", "100s")])?;
    until("it runs", PATIENCE, || lab.calls().len() == 1).await?;
    first.signal(Signal::TERM)?;
    until("it drains", PATIENCE, || first.log().contains("draining")).await?;
    let took = drain(&mut first).await?;
    ensure!(took < Duration::from_secs(10), "it took {took:?} after the second signal");
    ensure!(lab.inbox() == 0 && lab.starts() == 0, "{} outcomes, {} starts", lab.inbox(), lab.starts());
    let _second = lab.worker()?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 1, "{ledger:?}");
    Ok(())
}

/// A probe's status and body; none where nobody answers.
fn probe(address: &str, path: &str) -> Option<(u16, Value)> {
    let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(5)));
    let agent: ureq::Agent = config.build().into();
    let mut response = agent.get(format!("http://{address}{path}")).call().ok()?;
    let body = response.body_mut().read_to_string().ok()?;
    Some((response.status().as_u16(), serde_json::from_str(&body).ok()?))
}

#[tokio::test]
async fn a_draining_worker_is_alive_and_not_ready() -> anyhow::Result<()> {
    let (lab, heard) = lab("drain-probes").await?;
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let mut worker = lab.worker_with(&[("WARREN_ADMIN_ADDR", &address)])?;
    until("it is ready", PATIENCE, || probe(&address, "/readyz").is_some_and(|(status, _)| status == 200)).await?;
    let ids = lab.send(&[slow("slow", 6.0)]).await?;
    until("it runs", PATIENCE, || lab.calls().len() == 1).await?;
    worker.signal(Signal::TERM)?;
    until("it drains", PATIENCE, || worker.log().contains("draining")).await?;
    let ready = probe(&address, "/readyz").context("/readyz answers while it drains")?;
    let live = probe(&address, "/livez").context("/livez answers while it drains")?;
    ensure!(
        ready.0 == 503 && ready.1["reasons"].as_array().is_some_and(|r| r.contains(&json!("draining"))),
        "{ready:?}"
    );
    ensure!(live.0 == 200, "{live:?}");
    ensure!(lab.inbox() == 0, "the probes came too late to see the drain");
    ensure!(worker.wait(PATIENCE).await?.success(), "{}", worker.log());
    all_once(&lab, &ids, &heard).await
}

#[tokio::test]
async fn sigterm_while_a_mute_broker_is_asked_ends_the_worker_at_once() -> anyhow::Result<()> {
    let mut lab = Lab::new("drain-mute")?;
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    lab.set("AMQP_URL", &format!("amqp://guest:guest@{}/%2f", mute.local_addr()?));
    lab.set("WARREN_CONNECT_TIMEOUT", "100s");
    let mut worker = lab.worker()?;
    let _asked = tokio::time::timeout(PATIENCE, mute.accept()).await.context("the worker connects")??;
    ensure!(worker.terminate(Duration::from_secs(5)).await?.success(), "{}", worker.log());
    Ok(())
}

#[tokio::test]
async fn sigterm_while_the_broker_is_away_ends_the_worker_at_once() -> anyhow::Result<()> {
    let mut lab = Lab::new("drain-away")?;
    // Bound and not listening: nobody else gets the port, and whoever connects is refused.
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.bind("127.0.0.1:0".parse()?)?;
    let port = socket.local_addr()?.port();
    lab.set("AMQP_URL", &format!("amqp://guest:guest@127.0.0.1:{port}/%2f"));
    lab.set("WARREN_CONNECT_TIMEOUT", "100s");
    let mut worker = lab.worker()?;
    until("it waits for the broker", PATIENCE, || worker.log().contains("not connected yet")).await?;
    ensure!(worker.terminate(Duration::from_secs(5)).await?.success(), "{}", worker.log());
    Ok(())
}
