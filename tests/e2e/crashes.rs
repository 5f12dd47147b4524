//! The worker is killed (-9) wherever it can hurt: between any two steps, and at random under load.
use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;
use warren_tests::{Lab, Ledger, Process, Proxy, event, events, until};

const PATIENCE: Duration = Duration::from_secs(120);
const SIGKILL: i32 = 9;
/// What a crash at one point left behind, and what it came to.
struct Aftermath {
    /// Rows of the store when the first worker was dead.
    recorded: usize,
    /// Recorded and not known to be published when the first worker was dead.
    unsent: usize,
    /// Calls of the handler, of all workers together.
    calls: usize,
    ledger: Ledger,
}

/// Kills a worker at the point, lets a second one finish, and checks everything that holds wherever the first one died.
async fn crash(point: &str, hit: u32) -> anyhow::Result<Aftermath> {
    const EVENTS: usize = 300;
    let mut lab = Lab::new(&format!("crashes-{point}"))?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(""));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let ids = lab.send(&events(EVENTS, 20)).await?;

    let mut first = lab.worker_with(&[("WARREN_TEST_CRASH", &format!("{point}:{hit}"))])?;
    let status = first.wait(PATIENCE).await?;
    ensure!(status.signal() == Some(SIGKILL), "it was to die at {point}: {status}\n{}", first.log());
    let (recorded, unsent) = (lab.inbox(), lab.outbox());
    ensure!(recorded < EVENTS, "the crash came too late: everything was recorded");

    let mut second = lab.worker()?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == EVENTS, "{ledger:?}");
    lab.calls_in_order()?;
    ensure!(second.terminate(PATIENCE).await?.success(), "{}", second.log());
    ensure!(lab.starts() == 0, "{} starts are left", lab.starts());
    ensure!(lab.queued().await? == 0, "{} deliveries were not acked", lab.queued().await?);
    let calls = lab.calls().len();
    println!("{point}: {recorded} recorded and {unsent} unsent at its death, {calls} calls in all");
    Ok(Aftermath { recorded, unsent, calls, ledger })
}

#[tokio::test]
async fn a_crash_on_receipt_loses_and_repeats_nothing() -> anyhow::Result<()> {
    let after = crash("received", 250).await?;
    ensure!(after.calls <= 2 * 300, "{} calls: no event can have been handled thrice", after.calls);
    Ok(())
}

#[tokio::test]
async fn a_crash_when_the_handler_has_answered_runs_it_again_and_records_it_once() -> anyhow::Result<()> {
    let after = crash("handled", 40).await?;
    ensure!(after.calls > 300, "what was handled and not recorded is handled again");
    ensure!(after.recorded < 40, "{} recorded of at most 39", after.recorded);
    Ok(())
}

#[tokio::test]
async fn a_crash_before_the_commit_runs_the_handlers_again() -> anyhow::Result<()> {
    let after = crash("before-commit", 5).await?;
    ensure!(after.calls > 300, "what was handled and not recorded is handled again");
    Ok(())
}

#[tokio::test]
async fn what_a_worker_committed_before_its_crash_is_sent_by_the_next() -> anyhow::Result<()> {
    let after = crash("after-commit", 5).await?;
    ensure!(after.recorded > 0 && after.unsent > 0, "the outbox of the dead worker holds what it recorded last");
    Ok(())
}

#[tokio::test]
async fn a_crash_before_the_ack_makes_a_known_duplicate() -> anyhow::Result<()> {
    let after = crash("before-ack", 40).await?;
    ensure!(after.recorded >= 40, "{} recorded, but 40 were about to be acked", after.recorded);
    Ok(())
}

#[tokio::test]
async fn a_crash_between_confirm_and_forgetting_repeats_events_with_the_same_ids() -> anyhow::Result<()> {
    let after = crash("outbox-published", 5).await?;
    ensure!(after.unsent > 0, "the rows are still there");
    ensure!(after.ledger.repeats > 0, "and are sent again: {:?}", after.ledger);
    Ok(())
}

#[tokio::test]
async fn a_crash_once_published_rows_are_forgotten_loses_none() -> anyhow::Result<()> {
    let after = crash("outbox-marked", 5).await?;
    ensure!(after.recorded > 0, "something was published and forgotten");
    Ok(())
}

#[tokio::test]
async fn the_first_hit_of_every_point_one_crash_after_the_other_is_survived() -> anyhow::Result<()> {
    let mut lab = Lab::new("crashes-first-hits")?;
    // More deaths in a row, with nothing done in between, than an event may be there for; none of them is its fault.
    lab.set("WARREN_CRASH_LIMIT", "10");
    lab.set("WARREN_ROUTES", &lab.fresh_route(""));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let ids = lab.send(&events(300, 20)).await?;
    for point in
        ["received", "handled", "before-commit", "after-commit", "before-ack", "outbox-published", "outbox-marked"]
    {
        let mut worker = lab.worker_with(&[("WARREN_TEST_CRASH", &format!("{point}:1"))])?;
        let status = worker.wait(PATIENCE).await?;
        ensure!(status.signal() == Some(SIGKILL), "it was to die at {point}: {status}\n{}", worker.log());
    }
    let mut last = lab.worker()?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 300, "{ledger:?}");
    lab.calls_in_order()?;
    ensure!(last.terminate(PATIENCE).await?.success(), "{}", last.log());
    ensure!(lab.starts() == 0 && lab.queued().await? == 0, "{} starts, {} queued", lab.starts(), lab.queued().await?);
    Ok(())
}

/// Kills workers at these counts of recorded events; the oldest, which is the active one, more often than the others.
async fn kill_at(lab: &Lab, fleet: &mut Vec<Process>, counts: impl Iterator<Item = usize>) -> anyhow::Result<()> {
    for (round, count) in counts.enumerate() {
        lab.progressed(count, PATIENCE).await?;
        let victim = [0, 1, 0, 0, 2][round % 5] % fleet.len();
        let mut worker = fleet.remove(victim);
        worker.kill().await?;
        println!("killed worker {victim} at {} recorded", lab.inbox());
        fleet.push(lab.worker()?);
    }
    Ok(())
}

fn fleet(lab: &Lab, size: usize) -> anyhow::Result<Vec<Process>> {
    (0..size).map(|_| lab.worker()).collect()
}

async fn survive_kills(name: &str, workers: usize, count: usize) -> anyhow::Result<()> {
    let mut lab = Lab::new(name)?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(""));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let mut fleet = fleet(&lab, workers)?;
    let step = count / 6;
    let all = events(count, 40);
    let (ids, killed) = tokio::join!(lab.send(&all), kill_at(&lab, &mut fleet, (1..=5).map(|n| n * step)));
    killed?;
    let ledger = lab.account(&ids?, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == count, "{ledger:?}{}", lab.logs());
    lab.calls_in_order()?;
    let programs: HashSet<String> = lab.calls().into_iter().map(|[pid, ..]| pid).collect();
    ensure!(programs.len() >= 3, "only {} programs ever ran: the kills hit nobody who worked", programs.len());
    for mut worker in fleet {
        ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    }
    ensure!(lab.starts() == 0 && lab.queued().await? == 0, "{} starts, {} queued", lab.starts(), lab.queued().await?);
    Ok(())
}

#[tokio::test]
async fn five_kills_under_load_with_two_workers_keep_the_account() -> anyhow::Result<()> {
    survive_kills("crashes-two-workers", 2, 3_000).await
}

#[tokio::test]
async fn five_kills_under_load_with_three_workers_keep_the_account() -> anyhow::Result<()> {
    survive_kills("crashes-three-workers", 3, 3_000).await
}

#[tokio::test]
async fn retries_and_dead_letters_across_kills_end_once_each() -> anyhow::Result<()> {
    let mut lab = Lab::new("crashes-retries")?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(", retry: {attempts: 4, backoff: 100ms}"));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let mut fleet = fleet(&lab, 2)?;
    // A third fails once, a third fails for good, a third is done at once.
    let data = [json!({}), json!({"fail": 1}), json!({"dead": true})];
    let one = |i: usize| event(&format!("e{i}"), "order.placed", &format!("k{}", i % 40), data[i % 3].clone());
    let all: Vec<_> = (0..900).map(one).collect();
    let (ids, killed) = tokio::join!(lab.send(&all), kill_at(&lab, &mut fleet, [150, 300, 600].into_iter()));
    killed?;
    let ids = ids?;
    lab.settled(900, PATIENCE).await?;
    until("all heard", PATIENCE, || heard.distinct().len() >= 600).await?;
    let letters = lab.dead().await?;
    println!("{} letters, {} of them repeats", letters.len(), letters.len().saturating_sub(300));
    // A letter that was sent and not forgotten is sent again: one event, one death, told twice.
    let dead: BTreeMap<String, String> = letters.into_iter().collect();
    let ledger = Ledger::of(&ids, &heard, &dead.clone().into_iter().collect::<Vec<_>>())?;
    ensure!((ledger.lost, ledger.twice, ledger.handled) == (0, 0, 600), "{ledger:?}");
    ensure!(ledger.dead == BTreeMap::from([("permanent".to_owned(), 300)]), "{ledger:?}");
    let mut done = BTreeSet::new();
    for event in heard.distinct() {
        let data: serde_json::Value = event.json()?;
        done.insert(data["id"].as_str().context("an id")?.to_owned());
    }
    let both: Vec<_> = dead.keys().filter(|id| done.contains(*id)).collect();
    ensure!(both.is_empty(), "both done and dead: {both:?}");
    for [_, id, _, _, attempt] in lab.calls() {
        let failing = id.trim_start_matches('e').parse::<usize>()? % 3 == 1;
        ensure!(attempt == "1" || failing && attempt == "2", "{id} had attempt {attempt}");
    }
    for mut worker in fleet {
        ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    }
    ensure!(lab.starts() == 0 && lab.queued().await? == 0, "{} starts, {} queued", lab.starts(), lab.queued().await?);
    Ok(())
}

/// Runs until the store is not locked by a process that is stopped; stops it in such a moment.
async fn stop_outside_of_transactions(lab: &Lab, worker: &Process) -> anyhow::Result<()> {
    for _ in 0..100 {
        worker.signal(Signal::STOP)?;
        let store = rusqlite::Connection::open(lab.path("warren.db"))?;
        store.busy_timeout(Duration::from_millis(200))?;
        if store.execute_batch("BEGIN IMMEDIATE; ROLLBACK").is_ok() {
            return Ok(());
        }
        worker.signal(Signal::CONT)?;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    anyhow::bail!("it always holds the store")
}

/// A worker is cut off from the broker while it handles an event, and has its outcome committed before its successor has, but
/// stands still before it publishes anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_zombie_committed_is_published_before_its_successors_next_event() -> anyhow::Result<()> {
    let mut lab = Lab::new("crashes-zombie")?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(""));
    lab.set("WARREN_PARTITIONS", "1");
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let proxy = Proxy::before(&lab.url()).await?;
    let zombie = lab.worker_with(&[("WARREN_TEST_STOP", "after-commit"), ("AMQP_URL", &proxy.url)])?;
    until("it consumes", PATIENCE, || lab.connections("w0 (consume)").is_ok_and(|names| !names.is_empty())).await?;
    let mut all = events(2, 1);
    all[0]["data"] = json!({"sleeps": [2, 6, 0]});
    let ids = lab.send(&all).await?;
    until("it runs", PATIENCE, || lab.calls().len() == 1).await?;
    zombie.signal(Signal::STOP)?;
    let _successor = lab.worker()?;
    // For good: it would come back, stand in line and be served, frozen as it is.
    proxy.shut();
    until("the successor runs it too", PATIENCE, || lab.calls().len() == 2).await?;
    let notes = || std::fs::read_to_string(lab.path("calls")).unwrap_or_default();
    until("the zombie's program answers", PATIENCE, || notes().contains("answered")).await?;

    zombie.signal(Signal::CONT)?;
    until("it stands still", PATIENCE, || lab.inbox() == 1 && zombie.stands_still().is_ok_and(|still| still)).await?;
    ensure!(lab.outbox() == 1 && notes().matches("answered").count() == 1, "the successor came first:\n{}", lab.logs());
    until("both are published, by the successor", PATIENCE, || heard.distinct().len() == 2 && lab.inbox() == 2).await?;
    let first: serde_json::Value = heard.distinct()[0].json()?;
    ensure!(first["id"] == "e0", "the successor's event came first: {first}");
    zombie.signal(Signal::CONT)?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 2, "{ledger:?}");
    Ok(())
}

#[tokio::test]
async fn rows_adopted_while_the_connection_breaks_are_published_all_the_same() -> anyhow::Result<()> {
    let mut lab = Lab::new("crashes-adopted")?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(""));
    lab.set("WARREN_PARTITIONS", "1");
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let consumes = |name: &str| lab.connections(&format!("{name} (consume)")).is_ok_and(|names| !names.is_empty());
    let mut first = lab.worker_with(&[("WARREN_TEST_CRASH", "after-commit:3")])?;
    until("the first consumes", PATIENCE, || consumes("w0")).await?;
    let second = lab.worker()?;
    until("the second stands by", PATIENCE, || consumes("w1")).await?;
    stop_outside_of_transactions(&lab, &second).await?;
    let ids = lab.send(&events(100, 5)).await?;
    first.wait(PATIENCE).await?;
    ensure!(lab.outbox() > 0, "the first left nothing behind");

    // The store is held, so that the adoption begins before the connection ends and ends after it.
    let store = rusqlite::Connection::open(lab.path("warren.db"))?;
    store.execute_batch("BEGIN IMMEDIATE")?;
    second.signal(Signal::CONT)?;
    until("the second takes over", PATIENCE, || second.log().contains("first delivery from")).await?;
    lab.close(&lab.connections("w1 (consume)")?)?;
    until("its connection breaks", PATIENCE, || second.log().contains("the subscription ended")).await?;
    store.execute_batch("ROLLBACK")?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 100, "{ledger:?}{}", lab.logs());
    lab.calls_in_order()
}

#[tokio::test]
async fn what_was_handed_over_has_met_no_death() -> anyhow::Result<()> {
    let mut lab = Lab::new("crashes-handed-over")?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(", timeout: 90s"));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let calls = |id: &str| lab.calls().into_iter().filter(|[_, called, ..]| called == id).count();
    let mut first = lab.worker()?;
    let behind = event("behind", "order.placed", "k", json!({"sleeps": [60, 60, 0]}));
    let ids = lab.send(&[event("before", "order.placed", "k", json!({"sleeps": [3, 0, 0]})), behind]).await?;
    until("the one before it runs", PATIENCE, || calls("before") == 1).await?;
    // What waits is given back, so it is delivered again; then two workers are killed that handle it.
    ensure!(first.terminate(PATIENCE).await?.success(), "{}", first.log());
    ensure!(calls("before") == 1 && lab.inbox() == 1 && calls("behind") == 0, "{:?}", lab.calls());
    for killed in 1..=2 {
        let mut worker = lab.worker()?;
        until("it runs", PATIENCE, || calls("behind") == killed).await?;
        worker.kill().await?;
    }
    let _last = lab.worker()?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 2 && ledger.dead.is_empty(), "{ledger:?}{}", lab.logs());
    ensure!(calls("behind") == 3 && lab.starts() == 0, "{:?}, {} starts", lab.calls(), lab.starts());
    Ok(())
}

#[tokio::test]
async fn what_was_recorded_of_an_attempt_that_a_kill_ended_goes_when_a_retry_is_done() -> anyhow::Result<()> {
    let mut lab = Lab::new("crashes-recorded")?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(", retry: {attempts: 4, backoff: 100ms}"));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let ids = lab.send(&[event("e", "order.placed", "k", json!({"fail": 1, "sleeps": [60, 60, 0, 0]}))]).await?;
    for calls in 1..=2 {
        let mut worker = lab.worker()?;
        until("it runs", PATIENCE, || lab.calls().len() == calls).await?;
        worker.kill().await?;
    }
    ensure!(lab.starts() == 1, "the second start was to be recorded");
    let _last = lab.worker()?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 1, "{ledger:?}");
    let attempts: Vec<String> = lab.calls().into_iter().map(|[.., attempt]| attempt).collect();
    ensure!(attempts == ["1", "1", "1", "2"], "the attempts were {attempts:?}");
    ensure!(lab.starts() == 0, "{} starts are left", lab.starts());
    Ok(())
}
