//! What an operator sees: probes, the drain of a pod, and metrics that tell the load.
use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use warren_tests::process::expect_exit;
use warren_tests::raw::free_port;
use warren_tests::{Fleet, Lab, Trace, event, until};

const PATIENCE: Duration = Duration::from_secs(60);

/// A pool of one lane with few partitions, and where its workers serve.
async fn lab(name: &str) -> anyhow::Result<(Lab, String)> {
    let mut lab = Lab::new(name)?;
    let address = format!("127.0.0.1:{}", free_port()?);
    lab.set("WARREN_ROUTES", "");
    lab.set("WARREN_SUBSCRIBE", "order.#");
    lab.set("WARREN_LANES", "normal:1");
    lab.set("WARREN_PARTITIONS", "4");
    lab.set("WARREN_ADMIN_ADDR", &address);
    lab.declare().await?;
    Ok((lab, address))
}

fn slow(id: usize, seconds: f64) -> Value {
    event(&format!("s{id}"), "order.placed", &format!("k{id}"), json!({"sleep": seconds}))
}

fn within(part: f64, found: f64, expected: f64) -> bool {
    (found - expected).abs() <= expected * part
}

/// The gauges of a worker's load, by their names without the prefix.
struct Seen<'a>(&'a Lab, &'a str);

impl Seen<'_> {
    fn gauge(&self, name: &str) -> anyhow::Result<f64> {
        let name = format!("warren_{name}");
        self.0.metric(self.1, &name, &[])?.with_context(|| format!("{name} is there"))
    }

    fn all(&self) -> String {
        let names = ["arrival_rate", "service_rate", "service_seconds", "sojourn_seconds", "in_system"];
        let more = ["utilization_ratio", "backlog_events", "work_seconds", "workers_wanted"];
        let shown = |name: &&str| format!("{name} {:.3}", self.gauge(name).unwrap_or(f64::NAN));
        names.iter().chain(&more).map(shown).collect::<Vec<_>>().join(", ")
    }
}

#[tokio::test]
async fn the_gauges_tell_a_known_load_within_a_tenth() -> anyhow::Result<()> {
    let (mut lab, address) = lab("ops-load").await?;
    lab.set("WARREN_CONCURRENCY", "8");
    let (mut fleet, seen) = (Fleet::default(), Seen(&lab, &address));
    fleet.start(&lab)?;
    until("the worker is ready", PATIENCE, || lab.page(&address, "/readyz").is_ok_and(|(s, _)| s == 200)).await?;

    // 8 events a second that take half a second each, on eight places: half of them are taken. So long that what a busy machine
    // adds is little.
    let steady: Vec<Value> = (0..240).map(|n| slow(n, 0.5)).collect();
    let mut sender = lab.sender(&steady, &["--rate", "8"])?;
    tokio::time::sleep(Duration::from_secs(28)).await;
    println!("8/s × 0.5 s on 8 places: {}", seen.all());
    let (rate, stay, inside) = (seen.gauge("arrival_rate")?, seen.gauge("sojourn_seconds")?, seen.gauge("in_system")?);
    ensure!(within(0.1, rate, 8.0), "λ: {rate}");
    ensure!(within(0.1, seen.gauge("service_seconds")?, 0.5), "{}", seen.all());
    ensure!(within(0.1, seen.gauge("service_rate")?, 16.0), "μ: {}", seen.all());
    ensure!(within(0.1, seen.gauge("utilization_ratio")?, 0.5), "{}", seen.all());
    ensure!(within(0.1, inside, rate * stay), "L = {inside}, λW = {}", rate * stay);
    ensure!(within(0.1, seen.gauge("workers_wanted")?, 0.5 + seen.gauge("backlog_events")? / 60.0 / 16.0));
    ensure!(sender.wait(PATIENCE).await?.success(), "{}", sender.log());

    // A backlog of known size: as long as it lasts, it is told.
    let flood: Vec<Value> = (10_000..10_400).map(|n| slow(n, 0.5)).collect();
    let sent = Instant::now();
    lab.send(&flood).await?;
    until("the backlog is seen", PATIENCE, || seen.gauge("backlog_events").is_ok_and(|backlog| backlog > 200.0))
        .await?;
    let (backlog, work, at) = (seen.gauge("backlog_events")?, seen.gauge("work_seconds")?, sent.elapsed());
    println!("{backlog} events wait {at:.1?} after 400 came: {}", seen.all());
    ensure!(within(0.1, work, backlog * 0.5 / 8.0), "{work} s of work for {backlog} events");
    ensure!(seen.gauge("utilization_ratio")? > 0.4 && seen.gauge("workers_wanted")? > 0.5);
    until("all is done", PATIENCE, || seen.gauge("backlog_events").is_ok_and(|backlog| backlog == 0.0)).await?;
    // It is seen every five seconds, and a turn later at most.
    let took = (sent.elapsed() - at).as_secs_f64();
    println!("{work:.1} s of work took {took:.1} s until it was seen to be over");
    ensure!(took > work * 0.9 - 5.0 && took < work * 1.1 + 10.0);

    let handled = [("lane", "normal"), ("route", "order.#")];
    ensure!(
        lab.metric(&address, "warren_handled_total", &handled)? == Some(640.0),
        "{}",
        lab.page(&address, "/metrics")?.1
    );
    ensure!(lab.metric(&address, "warren_handler_seconds_count", &handled)? == Some(640.0));
    fleet.stop(&lab).await
}

#[tokio::test]
async fn counters_and_histograms_tell_what_became_of_every_delivery() -> anyhow::Result<()> {
    let (mut lab, address) = lab("ops-counts").await?;
    lab.set(
        "WARREN_ROUTES",
        &json!({"routes": [
            {"on": "order.log", "log": {}},
            {"on": "order.skip", "where": ".data.n > 100", "log": {}},
            {"on": "order.bad", "exec": ["sh", "-c", "exit 1"], "retry": {"attempts": 2, "backoff": "1s"}},
        ]})
        .to_string(),
    );
    let _worker = lab.worker()?;
    let ago = |seconds: i64| (jiff::Timestamp::now() - jiff::SignedDuration::from_secs(seconds)).to_string();
    let mut all: Vec<Value> = (0..10).map(|n| event(&format!("l{n}"), "order.log", "k", json!({"n": n}))).collect();
    for event in &mut all {
        event["time"] = json!(ago(20));
    }
    all.push(all[0].clone());
    all.extend((0..3).map(|n| event(&format!("f{n}"), "order.skip", "k", json!({"n": n}))));
    all.push(event("b", "order.bad", "b", json!({})));
    all.push(event("u", "order.unknown", "u", json!({})));
    lab.send(&all).await?;
    let count = |name: &str, labels: &[(&str, &str)]| lab.metric(&address, name, labels).ok().flatten().unwrap_or(0.0);
    until("all is dead or done", PATIENCE, || {
        count("warren_dead_total", &[]) == 2.0 && count("warren_handled_total", &[]) == 13.0
    })
    .await?;
    let counted = [
        ("warren_received_total", "order.log", 11.0),
        ("warren_handled_total", "order.log", 10.0),
        ("warren_duplicates_total", "order.log", 1.0),
        ("warren_filtered_total", "order.skip", 3.0),
        ("warren_retried_total", "order.bad", 1.0),
        ("warren_received_total", "order.bad", 2.0),
        ("warren_dead_total", "order.bad", 1.0),
        ("warren_received_total", "", 1.0),
        ("warren_dead_total", "", 1.0),
        ("warren_handler_seconds_count", "order.log", 10.0),
    ];
    for (name, route, expected) in counted {
        ensure!(
            count(name, &[("route", route)]) == expected,
            "{name}{{{route}}} is {}",
            count(name, &[("route", route)])
        );
    }
    ensure!(count("warren_dead_total", &[("reason", "no-route")]) == 1.0);
    ensure!(count("warren_dead_total", &[("reason", "exhausted")]) == 1.0);
    // Ten of them happened twenty seconds ago; the others do not say when.
    for name in ["warren_wait_seconds", "warren_end_to_end_seconds"] {
        let (below, above) = (count(&format!("{name}_bucket"), &[("le", "10")]), count(&format!("{name}_count"), &[]));
        ensure!((below, above) == (0.0, 10.0), "{name}: {below} of {above} took less than 10 s");
    }
    until("the dead letters are seen", PATIENCE, || count("warren_dead_letters", &[]) == 2.0).await?;
    ensure!(count("warren_ack_events_count", &[]) > 0.0 && count("warren_commit_events_sum", &[]) >= 13.0);
    let age = jiff::Timestamp::now().as_second() as f64 - count("warren_last_consumption_timestamp_seconds", &[]);
    ensure!(age < 30.0, "no proof of consumption for {age} s");

    let text = lab.page(&address, "/metrics")?.1;
    let pool = format!("pool=\"{}\"", lab.name);
    let strays: Vec<&str> =
        text.lines().filter(|line| !line.starts_with('#') && !line.is_empty() && !line.contains(&pool)).collect();
    ensure!(strays.is_empty(), "without a pool: {strays:?}");
    let known = |line: &str| warren_worker::metrics::METRICS.iter().any(|metric| line.starts_with(metric.name));
    let unknown: Vec<&str> = text.lines().filter(|line| line.starts_with("warren_") && !known(line)).collect();
    ensure!(unknown.is_empty(), "not in the table: {unknown:?}");
    // What the table names and nobody sets is a promise that is not kept.
    let silent: Vec<&str> = warren_worker::metrics::METRICS
        .iter()
        .map(|m| m.name)
        .filter(|name| !text.contains(&format!("\n{name}")))
        .collect();
    ensure!(silent.is_empty(), "in the table, and not there: {silent:?}");
    Ok(())
}

#[tokio::test]
async fn a_healthcheck_says_what_the_worker_says() -> anyhow::Result<()> {
    let (mut lab, address) = lab("ops-health").await?;
    lab.set("WARREN_ROUTES", "routes: [{on: 'order.#', log: {}}]");
    let (_, nobody) = expect_exit(&lab.run(&["healthcheck"]).await?, 1)?;
    ensure!(nobody.contains("no worker answers") && nobody.contains("WARREN_ADMIN_ADDR"), "{nobody}");
    // As it stands in a container: every address.
    let everywhere = address.replace("127.0.0.1", "0.0.0.0");
    lab.set("WARREN_ADMIN_ADDR", &everywhere);
    let worker = lab.worker()?;
    until("it is ready", PATIENCE, || lab.page(&address, "/readyz").is_ok_and(|(s, _)| s == 200)).await?;
    for probe in ["livez", "readyz", "startupz"] {
        let (said, _) = expect_exit(&lab.run(&["healthcheck", probe]).await?, 0)?;
        ensure!(serde_json::from_str::<Value>(&said)? == json!({"ok": true, "reasons": []}), "{probe}: {said}");
    }
    expect_exit(&lab.run(&["healthcheck", "metrics"]).await?, 64)?;
    worker.freeze().await?;
    expect_exit(&lab.run(&["healthcheck", "livez"]).await?, 1)?;
    worker.signal(Signal::CONT)?;
    lab.set("WARREN_ADMIN_ADDR", "");
    let (_, unset) = expect_exit(&lab.run(&["healthcheck"]).await?, 64)?;
    ensure!(unset.contains("WARREN_ADMIN_ADDR is not set"), "{unset}");
    Ok(())
}

/// What the kubelet does: SIGTERM, then nothing until terminationGracePeriodSeconds are over. It asks the probes meanwhile.
#[tokio::test]
async fn a_pod_drains_within_its_grace_and_its_successor_finishes_what_was_left() -> anyhow::Result<()> {
    let (mut lab, address) = lab("ops-pod").await?;
    lab.set("WARREN_DRAIN_TIMEOUT", "8s");
    lab.set("WARREN_CONCURRENCY", "8");
    lab.gather().await?;
    let grace = Duration::from_secs(8 + 15);
    let mut fleet = Fleet::default();
    let name = fleet.start(&lab)?;
    until("it is ready", PATIENCE, || lab.page(&address, "/readyz").is_ok_and(|(s, _)| s == 200)).await?;
    // Three end within the drain, one does not.
    let begun = lab.send(&[slow(1, 3.0), slow(2, 3.0), slow(3, 3.0), slow(4, 12.0)]).await?;
    until("all four run", PATIENCE, || lab.metric(&address, "warren_running", &[]).is_ok_and(|n| n == Some(4.0)))
        .await?;
    let worker = fleet.workers.get_mut(&name).context("it runs")?;
    worker.signal(Signal::TERM)?;
    let told = Instant::now();
    let unready = |said: anyhow::Result<(u16, String)>| {
        said.is_ok_and(|(status, body)| status == 503 && body.contains("\"draining\""))
    };
    until("it is not ready", Duration::from_secs(5), || unready(lab.page(&address, "/readyz"))).await?;
    let flipped = told.elapsed();
    // Alive and started as long as a handler may run: no probe of a pod that drains may kill it.
    while told.elapsed() < Duration::from_secs(4) {
        for probe in ["/livez", "/startupz"] {
            let (status, body) = lab.page(&address, probe)?;
            ensure!(status == 200, "{probe}: {body}");
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let status = worker.wait(grace).await?;
    let drained = told.elapsed();
    println!("not ready after {flipped:.1?}, gone after {drained:.1?} of {grace:?}: {status}");
    ensure!(status.success() && flipped < Duration::from_secs(1), "{}", worker.log());
    ensure!(drained > Duration::from_secs(4) && drained < Duration::from_secs(8 + 4), "{drained:?}");
    fleet.workers.clear();
    fleet.start(&lab)?;
    let ledger = lab.tally(&begun, PATIENCE).await?;
    println!("{ledger}");
    ensure!(ledger.adds_up() && ledger.handled == 4, "{ledger:?}");
    let calls = Trace::read(&lab.dir)?.calls.len();
    ensure!(calls == 5, "{calls} calls: the one that was interrupted runs again, the others do not");
    fleet.stop(&lab).await
}
