//! Floods, a key that fails, a dependency that is slow: the rest goes on, and nothing is hoarded.
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::{Duration, Instant};
use warren_tests::trace::{self, Trace};
use warren_tests::{Fleet, Lab, event, length};

const PATIENCE: Duration = Duration::from_secs(180);

async fn lab(name: &str, more: &[(&str, &str)]) -> anyhow::Result<Lab> {
    let mut lab = Lab::new(name)?;
    lab.set("WARREN_ROUTES", "");
    lab.set("WARREN_SUBSCRIBE", "order.#");
    more.iter().for_each(|(variable, value)| lab.set(variable, value));
    lab.declare().await?;
    lab.gather().await?;
    Ok(lab)
}

/// An event that takes its handler so long.
fn lasting(id: String, key: String, seconds: f64) -> Value {
    event(&id, "order.placed", &key, json!({"sleep": seconds}))
}

/// So many of them on one lane, without waiting for their confirms one by one.
async fn flood(lab: &Lab, lane: &'static str, count: usize, seconds: f64) -> anyhow::Result<Vec<String>> {
    let lines: String = (0..count)
        .map(|n| format!("{}\n", lasting(format!("{lane}{n}"), format!("{lane}-k{}", n % 200), seconds)))
        .collect();
    let (account, stderr) = lab.send_raw(lines.into_bytes(), &["--lane", lane]).await?;
    ensure!(account["confirmed"] == json!(count), "{account}\n{stderr}");
    Ok((0..count).map(|n| format!("{lane}{n}")).collect())
}

const LANES: [&str; 3] = ["high", "normal", "low"];

/// How many events of each prefix began between two moments.
fn begun(trace: &Trace, from: u64, to: u64, prefixes: [&'static str; 3]) -> [usize; 3] {
    let mut counts = [0; 3];
    for call in trace.calls.iter().filter(|call| (from..to).contains(&call.begin)) {
        if let Some(n) = prefixes.iter().position(|prefix| call.id.starts_with(prefix)) {
            counts[n] += 1;
        }
    }
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flooded_lane_leaves_the_others_their_share() -> anyhow::Result<()> {
    // Sixteen handlers of 40 ms: less than 400 events a second, whatever the machine.
    let seconds = 0.04;
    let more = [("WARREN_LANES", "high:6,normal:3,low:1"), ("WARREN_CONCURRENCY", "16"), ("WARREN_PARTITIONS", "4")];
    let lab = lab("load-lanes", &more).await?;
    let mut fleet = Fleet::default();
    fleet.scale(&lab, 1).await?;
    lab.balanced(1, PATIENCE).await?;
    let lane = |lane: &'static str, rate: f64| {
        lab.load_of(rate as usize, &["--lane", lane], move |n| {
            lasting(format!("{lane}{n}"), format!("{lane}-k{}", n % 200), seconds)
        })
    };
    // The low lane is offered twice the capacity.
    let low = lane("low", 800.0)?;
    lab.progressed(400, PATIENCE).await?;
    let (from, measured) = (trace::now(), length(4, 10));
    tokio::time::sleep(Duration::from_secs(measured)).await;
    let capacity = begun(&Trace::read(&lab.dir)?, from, trace::now(), LANES)[2] as f64 / measured as f64;
    // The others are offered 0.85 of their shares of it: all of that must get through, in time.
    let loads = [lane("high", capacity * 0.6 * 0.85)?, lane("normal", capacity * 0.3 * 0.85)?, low];
    let flooded = lab.inbox();
    lab.progressed(flooded + 1_000, PATIENCE).await?;
    let (from, began) = (trace::now(), Instant::now());
    let mut oldest: HashMap<String, u64> = HashMap::new();
    while began.elapsed() < Duration::from_secs(length(15, 60)) {
        let status = lab.status().await?;
        for lane in status["lanes"].as_array().into_iter().flatten() {
            let age = oldest.entry(lane["lane"].as_str().unwrap_or_default().to_owned()).or_default();
            *age = (*age).max(lane["oldest_ms"].as_u64().unwrap_or(0));
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let to = trace::now();
    let mut ids = Vec::new();
    for load in loads {
        ids.extend(load.finish().await?);
    }
    let trace = Trace::read(&lab.dir)?;
    let shares = begun(&trace, from, to, LANES).map(|count| count as f64 / ((to - from) as f64 / 1e9) / capacity);
    println!(
        "{capacity:.0} events/s; of it high {:.2} (share 0.60), normal {:.2} (0.30), low, flooded with 800/s, {:.2} (0.10); \
         oldest delivery {oldest:?} ms",
        shares[0], shares[1], shares[2]
    );
    ensure!(shares[0] >= 0.8 * 0.6 && shares[1] >= 0.8 * 0.3, "{shares:?}");
    let bounded = |lane: &str| oldest.get(lane).is_some_and(|age| *age < 5_000);
    ensure!(bounded("high") && bounded("normal"), "{oldest:?}");
    // Help with the backlog of the flood.
    fleet.start_with(&lab, &[("WARREN_CONCURRENCY", "1000")])?;
    let ledger = lab.tally(&ids, PATIENCE).await?;
    ensure!(ledger.adds_up(), "{ledger}{}", lab.logs());
    fleet.stop(&lab).await
}

/// Events a second of the other keys, and the account, with one key of the partition failing or not.
async fn beside(name: &str, failing: bool) -> anyhow::Result<f64> {
    let lab = lab(name, &[("WARREN_PARTITIONS", "1"), ("WARREN_CONCURRENCY", "8"), ("WARREN_PREFETCH", "500")]).await?;
    let mut fleet = Fleet::default();
    fleet.start_with(&lab, &[("TEST_ORDER", "strict"), ("WARREN_CONSUMER_TIMEOUT", "1h")])?;
    lab.balanced(1, PATIENCE).await?;
    let until = if failing { jiff::Timestamp::now().as_millisecond() + length(17_000, 60_000) } else { 0 };
    // One event in eighty is of the failing key: what waits behind it meanwhile fits into the prefetch.
    let load = lab.load_of(300, &[], move |n| {
        let key = if n % 80 == 0 { "bad".to_owned() } else { format!("k{}", n % 79) };
        let data = json!({"sleep": 0.005, "fail_until": if key == "bad" { until } else { 0 }});
        event(&format!("e{n}"), "order.placed", &key, data)
    })?;
    lab.progressed(900, PATIENCE).await?;
    let from = trace::now();
    tokio::time::sleep(Duration::from_secs(length(10, if failing { 50 } else { 20 }))).await;
    let to = trace::now();
    let ids = load.finish().await?;
    let trace = Trace::read(&lab.dir)?;
    let others = trace.calls.iter().filter(|call| call.key != "bad" && (from..to).contains(&call.begin)).count();
    let bad = trace.calls.iter().filter(|call| call.key == "bad" && (from..to).contains(&call.begin));
    println!(
        "{} attempts at {} events of the failing key",
        bad.clone().count(),
        bad.map(|call| &call.id).collect::<std::collections::HashSet<_>>().len()
    );
    let ledger = lab.tally(&ids, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.dead.is_empty(), "{ledger}{}", lab.logs());
    fleet.stop(&lab).await?;
    Ok(others as f64 / ((to - from) as f64 / 1e9))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strict_key_that_fails_costs_the_others_of_its_partition_little() -> anyhow::Result<()> {
    let (alone, beside) = (beside("load-strict-0", false).await?, beside("load-strict", true).await?);
    println!("{alone:.0} events/s of the other keys, {beside:.0} while one key fails: {:.2}", beside / alone);
    ensure!(beside >= 0.9 * alone, "{alone} and {beside}");
    Ok(())
}

/// The resident memory of a process, in bytes.
fn memory(pid: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? * 1024)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_dependency_makes_the_worker_take_less_and_hoard_nothing() -> anyhow::Result<()> {
    let more = [("WARREN_PARTITIONS", "4"), ("WARREN_CONCURRENCY", "16"), ("WARREN_PREFETCH", "100")];
    let lab = lab("load-slow", &more).await?;
    let mut fleet = Fleet::default();
    let name = fleet.start(&lab)?;
    lab.balanced(1, PATIENCE).await?;
    let pid = fleet.workers[&name].pid().context("it runs")?;
    // First handlers of 5 ms, then of half a second, with a backlog behind them.
    let mut ids = flood(&lab, "normal", 4_000, 0.005).await?;
    lab.settled(4_000, PATIENCE).await?;
    let quick = memory(pid)?;
    let lines: String = (0..6_000)
        .map(|n| {
            format!("{}\n", lasting(format!("slow{n}"), format!("k{}", n % 400), if n < 600 { 0.5 } else { 0.001 }))
        })
        .collect();
    let (account, stderr) = lab.send_raw(lines.into_bytes(), &[]).await?;
    ensure!(account["confirmed"] == json!(6_000), "{account}\n{stderr}");
    ids.extend((0..6_000).map(|n| format!("slow{n}")));
    let (mut most, mut peak, began) = (0, 0, Instant::now());
    while began.elapsed() < Duration::from_secs(length(5, 10)) {
        let status = lab.status().await?;
        let unacked: u64 =
            status["lanes"].as_array().into_iter().flatten().filter_map(|lane| lane["unacked"].as_u64()).sum();
        (most, peak) = (most.max(unacked), peak.max(memory(pid)?));
    }
    println!(
        "unacked at most {most} of 400, memory {} MB with quick handlers, {} MB with slow ones",
        quick >> 20,
        peak >> 20
    );
    ensure!(most <= 400, "{most} unacked");
    ensure!(peak < quick + (16 << 20), "{peak} bytes, {quick} before");
    let ledger = lab.tally(&ids, PATIENCE).await?;
    ensure!(ledger.adds_up(), "{ledger}{}", lab.logs());
    fleet.stop(&lab).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_bodies_are_held_within_the_memory_that_there_is() -> anyhow::Result<()> {
    const MIB: u64 = 1 << 20;
    let memory = (32 * MIB).to_string();
    let more = [("WARREN_MEMORY", memory.as_str()), ("WARREN_CONCURRENCY", "8"), ("WARREN_PARTITIONS", "8")];
    let mut lab = lab("load-large", &more).await?;
    // The broker's bytes wait for longer than a connection may be silent.
    lab.set("AMQP_URL", &format!("{}?heartbeat=2", lab.url()));
    let count = length(450, 1500);
    let mut ids = Vec::new();
    for from in (0..count).step_by(50) {
        let large = |n: usize| {
            event(
                &format!("e{n}"),
                "order.placed",
                &format!("k{n}"),
                json!({"sleep": 0.3, "fill": "x".repeat(1 << 20)}),
            )
        };
        ids.extend(lab.send(&(from..from + 50).map(large).collect::<Vec<_>>()).await?);
    }
    let mut fleet = Fleet::default();
    let name = fleet.start(&lab)?;
    let pid = fleet.workers[&name].pid().context("it runs")?;
    lab.settled(count, PATIENCE).await?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    let peak = peak.trim().trim_end_matches(" kB").parse::<u64>()? * 1024;
    println!("{count} bodies of 1 MiB, {} of them prefetched: at most {} MiB were in use", 8 * 200, peak / MIB);
    // Less than all bodies. Beside what is held there are copies of what runs, what the AMQP library has read and nobody took yet, and
    // the program itself: 186 to 256 MiB were seen.
    ensure!(peak < 360 * MIB, "{} MiB", peak / MIB);
    let log = fleet.workers[&name].log();
    ensure!(!log.contains("subscribing again") && !log.contains("connection lost"), "{log}");
    let ledger = lab.tally(&ids, PATIENCE).await?;
    ensure!(ledger.adds_up(), "{ledger}{}", lab.logs());
    fleet.stop(&lab).await
}
