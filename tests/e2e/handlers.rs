//! Real programs as handlers, right and wrong, and what becomes of their events.
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::time::Duration;
use warren_tests::{Lab, Process, Sink, event, until};

const PATIENCE: Duration = Duration::from_secs(120);

const QUICK: &str = ", retry: {attempts: 3, backoff: 100ms, max: 1s}";

/// A worker with the acting handler for `order.#`, and more of the route's fields.
async fn acting(name: &str, more: &str) -> anyhow::Result<(Lab, Process)> {
    let mut lab = Lab::new(name)?;
    lab.set("WARREN_ROUTES", &format!("routes: [{}]", lab.actor_route("order.#", more)));
    lab.declare().await?;
    let worker = lab.worker()?;
    Ok((lab, worker))
}

fn order(id: &str, key: &str, data: Value) -> Value {
    event(id, "order.placed", key, data)
}

fn attempts(lab: &Lab, id: &str) -> Vec<u64> {
    lab.acts_of(id).iter().filter_map(|act| act["attempt"].as_u64()).collect()
}

/// Seconds between the calls for an event.
fn gaps(lab: &Lab, id: &str) -> Vec<f64> {
    let times: Vec<f64> = lab.acts_of(id).iter().filter_map(|act| act["at"].as_f64()).collect();
    times.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

#[tokio::test]
async fn a_failed_event_is_tried_again_and_dies_when_its_attempts_are_used_up() -> anyhow::Result<()> {
    let (lab, _worker) = acting("handlers-retry", QUICK).await?;
    lab.send(&[order("heals", "a", json!({"fail": 2})), order("never", "b", json!({"fail": 9}))]).await?;
    lab.settled(2, PATIENCE).await?;
    ensure!(attempts(&lab, "heals") == [1, 2, 3], "{:?}", attempts(&lab, "heals"));
    ensure!(attempts(&lab, "never") == [1, 2, 3], "{:?}", attempts(&lab, "never"));
    let letters = lab.dead_letters(1, PATIENCE).await?;
    let letter = &letters[0];
    ensure!(letter.id == "never" && letter.reason() == "exhausted", "{letter:?}");
    ensure!(letter.header("warren-dead-attempts") == "3", "{letter:?}");
    ensure!(letter.header("warren-dead-error") == "asked to fail at attempt 3", "{letter:?}");
    ensure!(letter.header("warren-dead-handler") == "order.#", "{letter:?}");
    Ok(())
}

#[tokio::test]
async fn a_handler_that_gives_up_kills_its_event_at_the_first_attempt() -> anyhow::Result<()> {
    let (lab, _worker) = acting("handlers-permanent", QUICK).await?;
    lab.send(&[order("hopeless", "a", json!({"dead": true}))]).await?;
    let letters = lab.dead_letters(1, PATIENCE).await?;
    ensure!(letters[0].reason() == "permanent" && letters[0].header("warren-dead-attempts") == "1", "{letters:?}");
    ensure!(letters[0].header("warren-dead-error") == "asked to die", "{letters:?}");
    ensure!(attempts(&lab, "hopeless") == [1], "{:?}", lab.acts());
    Ok(())
}

#[tokio::test]
async fn a_wait_that_the_handler_asks_for_is_kept_through_the_ladder() -> anyhow::Result<()> {
    // The policy alone would wait a tenth of a second.
    let (lab, _worker) = acting("handlers-after", ", retry: {attempts: 2, backoff: 100ms, max: 100ms}").await?;
    lab.send(&[
        order("two", "a", json!({"fail": 1, "after": "2s"})),
        order("seven", "b", json!({"fail": 1, "after": "7s"})),
    ])
    .await?;
    lab.settled(2, PATIENCE).await?;
    ensure!(lab.letters().await?.is_empty(), "{:?}", lab.letters().await?);
    for (id, wish) in [("two", 2.0), ("seven", 7.0)] {
        let gaps = gaps(&lab, id);
        // Not earlier than the half second that a wait may fall short; hops and this machine may add some.
        ensure!(gaps.len() == 1 && gaps[0] >= wish - 0.6 && gaps[0] <= wish * 1.25 + 4.0, "{id}: {gaps:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_handler_that_hangs_is_killed_at_its_timeout_and_others_go_on() -> anyhow::Result<()> {
    let more = format!(", timeout: 2s, processes: 2{QUICK}");
    let (lab, _worker) = acting("handlers-hang", &more).await?;
    lab.send(&[order("hangs", "a", json!({"hang": 1})), order("always", "b", json!({"hang": 9}))]).await?;
    lab.send(&(0..20).map(|n| order(&format!("e{n}"), &format!("k{n}"), json!({}))).collect::<Vec<_>>()).await?;
    lab.settled(22, PATIENCE).await?;
    let letters = lab.dead_letters(1, PATIENCE).await?;
    ensure!(letters[0].id == "always" && letters[0].reason() == "exhausted", "{letters:?}");
    ensure!(letters[0].header("warren-dead-error").contains("no answer within 2s"), "{letters:?}");
    ensure!(attempts(&lab, "hangs").last() == Some(&2), "{:?}", attempts(&lab, "hangs"));
    ensure!(attempts(&lab, "always").iter().max() == Some(&3), "{:?}", attempts(&lab, "always"));
    for n in 0..20 {
        let attempts = attempts(&lab, &format!("e{n}"));
        ensure!(attempts.iter().all(|attempt| *attempt == 1), "e{n} paid for another: {attempts:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_program_that_exits_is_started_again_and_only_its_event_pays() -> anyhow::Result<()> {
    let (lab, mut worker) = acting("handlers-exit", QUICK).await?;
    let mut events: Vec<Value> = (0..10).map(|n| order(&format!("e{n}"), &format!("k{n}"), json!({}))).collect();
    events.insert(3, order("once", "a", json!({"exit": 1})));
    events.insert(6, order("always", "b", json!({"exit": 9})));
    lab.send(&events).await?;
    lab.settled(12, PATIENCE).await?;
    let letters = lab.dead_letters(1, PATIENCE).await?;
    ensure!(letters[0].id == "always" && letters[0].reason() == "exhausted", "{letters:?}");
    ensure!(letters[0].header("warren-dead-error").contains("while it handled this event"), "{letters:?}");
    ensure!(attempts(&lab, "once").last() == Some(&2), "{:?}", attempts(&lab, "once"));
    let paid = (0..10).filter(|n| attempts(&lab, &format!("e{n}")).iter().any(|attempt| *attempt > 1)).count();
    ensure!(paid == 0, "{paid} innocents paid: {:?}", lab.acts());
    let programs: HashSet<_> = lab.acts().iter().filter_map(|act| act["pid"].as_u64()).collect();
    ensure!(programs.len() >= 3 && worker.is_running(), "{programs:?}");
    Ok(())
}

#[tokio::test]
async fn what_a_program_says_beside_its_answers_changes_nothing() -> anyhow::Result<()> {
    let (lab, mut worker) = acting("handlers-noise", &format!(", timeout: 30s{QUICK}")).await?;
    let heard = Sink::listen(&lab.url(), "heard", "warren.events", "test.#").await?;
    let emit = json!([{"type": "test.heard"}]);
    lab.send(&[
        order("flood", "a", json!({"flood": 20_000, "emit": emit})),
        order("stranger", "b", json!({"stranger": true, "emit": emit})),
        order("twice", "c", json!({"twice": true, "emit": emit})),
        order("last", "d", json!({"emit": emit})),
    ])
    .await?;
    lab.settled(4, PATIENCE).await?;
    until("all four heard", PATIENCE, || heard.heard().len() >= 4).await?;
    ensure!(lab.letters().await?.is_empty() && heard.heard().len() == 4, "{:?}", heard.heard());
    ensure!(["flood", "stranger", "twice", "last"].iter().all(|id| attempts(&lab, id) == [1]), "{:?}", lab.acts());
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    let log = worker.log();
    ensure!(log.contains("that is no answer") && log.contains("for an event that it does not hold"), "{log}");
    ensure!(log.lines().count() < 100, "a flood of the log: {} lines", log.lines().count());
    Ok(())
}

#[tokio::test]
async fn answers_that_are_wrong_kill_the_event_with_what_is_wrong() -> anyhow::Result<()> {
    let (lab, _worker) = acting("handlers-wrong", QUICK).await?;
    let cases = [
        ("emit", json!({"emit": [{"data": 1}]}), "emit[0]: the attribute 'type' is missing"),
        ("list", json!({"emit": {"type": "a"}}), "'emit' is not a list"),
        ("status", json!({"status": "ok"}), "'status' is \"ok\", not one of: done, retry, dead"),
        ("none", json!({"status": null}), "it has no 'status'"),
        ("after", json!({"status": "retry", "after": "soon"}), "'soon' is not a duration"),
        ("key", json!({"emit": [{"type": "a", "partitionkey": "x".repeat(300)}]}), "'partitionkey' has 300 bytes"),
    ];
    let events: Vec<Value> = cases.iter().map(|(id, answer, _)| order(id, id, json!({"answer": answer}))).collect();
    lab.send(&events).await?;
    let letters = lab.dead_letters(cases.len(), PATIENCE).await?;
    for (id, _, wanted) in cases {
        let letter = letters.iter().find(|letter| letter.id == id).with_context(|| format!("no letter of {id}"))?;
        let error = letter.header("warren-dead-error");
        ensure!(letter.reason() == "permanent" && error.contains(wanted), "{id}: {} {error}", letter.reason());
        ensure!(attempts(&lab, id) == [1], "{id}: {:?}", attempts(&lab, id));
    }
    Ok(())
}

#[tokio::test]
async fn a_program_that_cannot_be_started_fails_its_events_and_says_so() -> anyhow::Result<()> {
    let mut lab = Lab::new("handlers-missing")?;
    lab.set("WARREN_ROUTES", &format!("routes: [{{on: 'order.#', exec: [/no/such/program]{QUICK}}}]"));
    lab.declare().await?;
    let worker = lab.worker()?;
    lab.send(&[order("e", "k", json!({}))]).await?;
    let letters = lab.dead_letters(1, PATIENCE).await?;
    ensure!(letters[0].reason() == "exhausted", "{letters:?}");
    ensure!(letters[0].header("warren-dead-error").contains("cannot start '/no/such/program'"), "{letters:?}");
    ensure!(worker.log().contains("correct 'exec' in the routes"), "{}", worker.log());
    Ok(())
}

#[tokio::test]
async fn a_strict_route_holds_the_failed_key_and_no_other() -> anyhow::Result<()> {
    let more = ", order: strict, timeout: 5s, retry: {attempts: 60, backoff: 200ms, max: 200ms}";
    let mut lab = Lab::new("handlers-strict")?;
    lab.set("WARREN_PARTITIONS", "1");
    lab.set("WARREN_ROUTES", &format!("routes: [{}]", lab.actor_route("order.#", more)));
    lab.declare().await?;
    let _worker = lab.worker()?;
    let repaired = lab.path("repaired");
    let held = json!({"retry_unless": repaired});
    lab.send(&[order("h1", "held", held), order("h2", "held", json!({})), order("h3", "held", json!({}))]).await?;
    lab.send(&(0..10).map(|n| order(&format!("e{n}"), &format!("k{}", n % 2), json!({}))).collect::<Vec<_>>()).await?;
    until("ten others", PATIENCE, || lab.inbox() == 10 && lab.acts_of("h1").len() >= 3).await?;
    ensure!(lab.acts_of("h2").is_empty() && lab.acts_of("h3").is_empty(), "the key was not held: {:?}", lab.acts());
    std::fs::write(&repaired, "")?;
    lab.settled(13, PATIENCE).await?;
    ensure!(lab.letters().await?.is_empty(), "{:?}", lab.letters().await?);
    let ids: Vec<_> = lab.acts().iter().map(|act| act["event"]["id"].as_str().unwrap_or_default().to_owned()).collect();
    let held: Vec<&String> = ids.iter().filter(|id| id.starts_with('h')).collect();
    ensure!(held.windows(2).all(|pair| pair[0] <= pair[1]), "out of order: {held:?}");
    let counted = attempts(&lab, "h1");
    ensure!(counted.iter().copied().eq(1..=counted.len() as u64), "{counted:?}");
    Ok(())
}

#[tokio::test]
async fn a_relaxed_route_lets_the_key_go_on_while_one_event_waits() -> anyhow::Result<()> {
    let (lab, _worker) = acting("handlers-relaxed", ", retry: {attempts: 30, backoff: 1s, max: 1s}").await?;
    let repaired = lab.path("repaired");
    let waits = json!({"retry_unless": repaired});
    lab.send(&[order("h1", "k", waits), order("h2", "k", json!({})), order("h3", "k", json!({}))]).await?;
    lab.settled(2, PATIENCE).await?;
    ensure!(lab.acts_of("h2").len() == 1 && lab.acts_of("h3").len() == 1, "{:?}", lab.acts());
    std::fs::write(&repaired, "")?;
    lab.settled(3, PATIENCE).await?;
    ensure!(lab.letters().await?.is_empty(), "{:?}", lab.letters().await?);
    Ok(())
}

#[tokio::test]
async fn emitted_events_inherit_key_trace_and_an_id_that_is_derived() -> anyhow::Result<()> {
    let (lab, _worker) = acting("handlers-emit", QUICK).await?;
    let heard = Sink::listen(&lab.url(), "heard", "warren.events", "test.#").await?;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut parent = order(
        "parent",
        "customer-7",
        json!({"emit": [
            {"type": "test.plain", "data": {"n": 1}},
            {"type": "test.own", "id": "own", "subject": "its own key", "source": "/own"},
        ]}),
    );
    parent["traceparent"] = json!(trace);
    lab.send(&[parent]).await?;
    until("both heard", PATIENCE, || heard.heard().len() >= 2).await?;
    let heard = heard.heard();
    let (plain, own) = (&heard[0], &heard[1]);
    let derived = warren_shared::Identity::of("/tests", "parent").derive("emit 0");
    ensure!((plain.id(), plain.kind()) == (derived.as_str(), "test.plain"), "{plain:?}");
    ensure!(plain.key() == "customer-7" && plain.source() == "/warren/handlers-emit", "{plain:?}");
    ensure!(plain.extension("traceparent").map(ToString::to_string).as_deref() == Some(trace), "{plain:?}");
    ensure!(plain.time().is_some() && plain.json::<Value>()? == json!({"n": 1}), "{plain:?}");
    ensure!((own.id(), own.source(), &*own.key()) == ("own", "/own", "its own key"), "{own:?}");
    Ok(())
}

#[tokio::test]
async fn the_built_in_log_writes_the_identity_and_not_the_payload() -> anyhow::Result<()> {
    let mut lab = Lab::new("handlers-log")?;
    lab.set("WARREN_ROUTES", "routes: [{on: 'audit.#', log: {}}]");
    lab.declare().await?;
    let worker = lab.worker()?;
    lab.send(&[event("audited", "audit.login", "customer-7", json!({"password": "hunter2"}))]).await?;
    lab.settled(1, PATIENCE).await?;
    let log = worker.log();
    ensure!(["audited", "audit.login", "customer-7"].iter().all(|word| log.contains(word)), "{log}");
    ensure!(!log.contains("hunter2"), "{log}");
    ensure!(lab.letters().await?.is_empty(), "{:?}", lab.letters().await?);
    Ok(())
}

#[tokio::test]
async fn a_line_that_is_no_answer_leaves_its_event_to_the_timeout() -> anyhow::Result<()> {
    let more = ", timeout: 1s, retry: {attempts: 2, backoff: 100ms, max: 100ms}";
    let (lab, _worker) = acting("handlers-garbage", more).await?;
    lab.send(&[order("mute", "a", json!({"garbage": true})), order("fine", "b", json!({}))]).await?;
    lab.settled(2, PATIENCE).await?;
    let letters = lab.dead_letters(1, PATIENCE).await?;
    ensure!(letters[0].id == "mute" && letters[0].reason() == "exhausted", "{letters:?}");
    ensure!(letters[0].header("warren-dead-error").contains("no answer within 1s"), "{letters:?}");
    Ok(())
}
