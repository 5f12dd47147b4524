//! Business processes on a real broker and store: they end as they should, whatever dies meanwhile.
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use warren_tests::broker::root;
use warren_tests::lab::{Lab, event, until};
use warren_tests::ledger::Sink;
use warren_tests::length;
use warren_tests::process::expect_exit;

const PATIENCE: Duration = Duration::from_secs(120);

const STEPS: &str = "
      reserve: { do: inventory.reserve, undo: inventory.release }
      charge: { do: payment.charge, undo: payment.refund, after: [reserve] }
      ship: { do: shipping.create, undo: shipping.cancel, after: [charge], when: '.input.digital != true' }
      notify: { do: email.send, after: [ship], optional: true, final: true, with: '{input: .input, to: .results.charge.by}' }
";

/// Its steps that are undone where an order is taken back.
const ALL: &[&str] = &["reserve", "charge", "ship"];

/// A pool with the order process and its services in `tests/handlers/services.py`.
fn lab_of(name: &str, steps: &str) -> anyhow::Result<Lab> {
    let mut lab = Lab::new(name)?;
    let text = definition(&lab, steps);
    lab.set("WARREN_ROUTES", &text);
    Ok(lab)
}

fn definition(lab: &Lab, steps: &str) -> String {
    let program = root().join("tests/handlers/services.py");
    let exec = format!("exec: [python3, '{}', '{}']", program.display(), lab.path("served").display());
    let route = |on: &str| format!("  - {{on: {on}, {exec}, retry: {{attempts: 3, backoff: 100ms}}}}\n");
    let routes: String = ["inventory.*", "payment.*", "shipping.*", "email.*"].into_iter().map(route).collect();
    format!("routes:\n{routes}processes:\n  - name: order\n    on: order.placed\n    steps:{steps}")
}

fn order(n: usize, data: Value) -> Value {
    event(&format!("o{n}"), "order.placed", &format!("k{n}"), data)
}

/// A call of a service.
#[derive(Debug, serde::Deserialize)]
struct Served {
    id: String,
    step: String,
    key: String,
    outcome: String,
}

fn served(lab: &Lab) -> Vec<Served> {
    let text = std::fs::read_to_string(lab.path("served")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The steps that were done for a key, in order, each once.
fn done(lab: &Lab, key: &str) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let calls = served(lab).into_iter().filter(|call| call.key == key && call.outcome == "done");
    calls.filter(|call| seen.insert(call.id.clone())).map(|call| call.step).collect()
}

/// What the end of each instance is, by key.
async fn ends(sink: &Sink, count: usize) -> anyhow::Result<BTreeMap<String, String>> {
    let by_key = || -> BTreeMap<String, String> {
        let ends = sink.distinct();
        ends.iter().map(|end| (end.key().into_owned(), end.kind().trim_start_matches("order.").to_owned())).collect()
    };
    let told = until("all have ended", PATIENCE, || by_key().len() >= count).await;
    told.with_context(|| format!("{} of {count}: {:?}", by_key().len(), by_key().iter().take(5).collect::<Vec<_>>()))?;
    Ok(by_key())
}

async fn listen(lab: &Lab) -> anyhow::Result<[Sink; 2]> {
    // `order.placed` is no end.
    let listen = |word: &'static str| {
        let (url, pattern) = (lab.url(), format!("order.{word}"));
        async move { Sink::listen(&url, word, "warren.events", &pattern).await }
    };
    Ok([listen("completed").await?, listen("compensated").await?])
}

async fn instance(lab: &Lab, status: &str) -> anyhow::Result<Value> {
    let output = lab.run(&["process", "list", "--json", "--status", status]).await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().next().with_context(|| format!("no instance is {status}"))?;
    Ok(serde_json::from_str(line)?)
}

/// From the line of `send`, by a transform, a step's result and expressions, to the event at the end.
#[tokio::test]
async fn numbers_keep_their_digits_all_the_way_through_a_process() -> anyhow::Result<()> {
    const DIGITS: &str = r#"{"big":12345678901234567890123,"long":12345678901234567.89,"short":1.10}"#;
    let program = "import json, sys
for line in sys.stdin:
    event = json.loads(line)['event']
    names = json.dumps({'id': event['id'], 'source': event['source'], 'status': 'done'})
    print(names[:-1] + ', \"result\": ' + sys.argv[1] + '}', flush=True)
";
    let mut lab = Lab::new("processes-digits")?;
    let exec = json!(["python3", "-c", program, DIGITS]);
    lab.set(
        "WARREN_ROUTES",
        &format!(
            "routes:
  - {{on: order.came, transform: .data.order, emit: order.placed}}
  - {{on: payment.charge, exec: {exec}}}
processes:
  - name: order
    on: order.placed
    steps:
      charge: {{ do: payment.charge, undo: payment.refund }}
      again: {{ do: payment.charge, after: [charge], final: true, with: '{{a: .input, b: .results.charge}}' }}
"
        ),
    );
    lab.declare().await?;
    let [completed, _] = listen(&lab).await?;
    let asked = Sink::listen(&lab.url(), "asked", "warren.events", "payment.charge").await?;
    let _worker = lab.worker()?;
    let line = format!(
        r#"{{"specversion":"1.0","id":"1","source":"/tests","type":"order.came","data":{{"order":{DIGITS}}}}}"#
    );
    lab.send_raw(line.into_bytes(), &[]).await?;
    until("it has ended", PATIENCE, || !completed.distinct().is_empty()).await?;
    let data = |events: Vec<warren_shared::Event>| {
        let text = |event: &warren_shared::Event| {
            event.data().map(|data| String::from_utf8_lossy(data.as_bytes()).into_owned()).unwrap_or_default()
        };
        events.iter().map(text).collect::<Vec<_>>()
    };
    let (ends, asked) = (data(completed.distinct()), data(asked.distinct()));
    ensure!(ends[0].matches(DIGITS).count() == 3, "input and two results: {ends:?}");
    ensure!(asked[1].matches(DIGITS).count() == 2, "made by 'with': {asked:?}");
    Ok(())
}

#[tokio::test]
async fn an_order_runs_through_its_steps_and_a_person_can_see_how() -> anyhow::Result<()> {
    let lab = lab_of("processes-order", STEPS)?;
    lab.declare().await?;
    let [completed, _] = listen(&lab).await?;
    let _worker = lab.worker()?;
    lab.send(&[order(1, json!({"email": "a@b"})), order(2, json!({"digital": true}))]).await?;
    let ends = ends(&completed, 2).await?;
    ensure!(ends.values().all(|end| end == "completed"), "{ends:?}");
    ensure!(done(&lab, "k1") == ["reserve", "charge", "ship", "notify"], "{:?}", done(&lab, "k1"));
    ensure!(done(&lab, "k2") == ["reserve", "charge", "notify"], "{:?}", done(&lab, "k2"));
    let end: Value = completed.distinct().iter().find(|end| end.key() == "k1").context("it ended")?.json()?;
    ensure!(end["input"]["email"] == "a@b" && end["results"]["ship"]["by"] == "ship", "{end}");

    let (table, _) = expect_exit(&lab.run(&["process", "list"]).await?, 0)?;
    ensure!(table.contains("completed") && table.contains("k2"), "{table}");
    let id = instance(&lab, "completed").await?["instance"].as_str().context("an id")?.to_owned();
    let (text, _) = expect_exit(&lab.run(&["process", "show", &id]).await?, 0)?;
    for wanted in ["begun by order.placed", "sent payment.charge", "charge done", "completed"] {
        ensure!(text.contains(wanted), "{wanted} is not in\n{text}");
    }
    let (picture, _) = expect_exit(&lab.run(&["process", "show", &format!("order/{id}"), "--mermaid"]).await?, 0)?;
    ensure!(picture.starts_with("flowchart LR") && picture.contains("done"), "{picture}");
    let (picture, _) = expect_exit(&lab.run(&["check", "--dot"]).await?, 0)?;
    ensure!(picture.starts_with("digraph \"order\""), "{picture}");
    expect_exit(&lab.run(&["process", "show", &"0".repeat(32)]).await?, 1)?;
    until("nothing is left", PATIENCE, || lab.outbox() == 0).await
}

#[tokio::test]
async fn a_failure_at_each_step_takes_back_what_was_done_and_nothing_else() -> anyhow::Result<()> {
    let lab = lab_of("processes-failures", STEPS)?;
    lab.declare().await?;
    let [completed, compensated] = listen(&lab).await?;
    let _worker = lab.worker()?;
    let dead = json!({"dead": true});
    lab.send(&[
        order(1, json!({"reserve": dead})),
        order(2, json!({"charge": dead})),
        order(3, json!({"ship": dead})),
        order(4, json!({"notify": dead})),
        order(5, json!({"charge": {"fail": 2}, "undo.reserve": dead})),
        order(6, json!({"ship": dead, "undo.charge": {"fail": 1}})),
    ])
    .await?;
    let back = ends(&compensated, 4).await?;
    let there = ends(&completed, 2).await?;
    ensure!(back.keys().eq(["k1", "k2", "k3", "k6"].iter()), "{back:?}");
    ensure!(there.keys().eq(["k4", "k5"].iter()), "{there:?}");
    for (key, wanted) in [
        ("k1", &[][..]),
        ("k2", &["reserve", "undo.reserve"]),
        ("k3", &["reserve", "charge", "undo.charge", "undo.reserve"]),
        ("k4", &["reserve", "charge", "ship"]),
        ("k5", &["reserve", "charge", "ship", "notify"]),
        ("k6", &["reserve", "charge", "undo.charge", "undo.reserve"]),
    ] {
        ensure!(done(&lab, key) == wanted, "{key}: {:?}, not {wanted:?}", done(&lab, key));
    }
    // The letters of the steps that failed for good stay for a person.
    ensure!(lab.dead().await?.len() == 5, "{:?}", lab.dead().await?);
    let end: Value = compensated.distinct().iter().find(|end| end.key() == "k2").context("it ended")?.json()?;
    ensure!(end["failures"]["charge"]["reason"] == "permanent", "{end}");
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_undone_waits_for_a_person_who_resumes_it() -> anyhow::Result<()> {
    let lab = lab_of("processes-stuck", STEPS)?;
    lab.declare().await?;
    let [_, compensated] = listen(&lab).await?;
    let stuck = Sink::listen(&lab.url(), "stuck", "warren.events", "order.stuck").await?;
    let _worker = lab.worker()?;
    let repaired = lab.path("repaired");
    let wishes = json!({"ship": {"dead": true}, "undo.charge": {"dead_unless": repaired}});
    lab.send(&[order(1, wishes)]).await?;
    until("a person is called", PATIENCE, || stuck.distinct().len() == 1).await?;
    let shown = instance(&lab, "stuck").await?;
    let id = shown["instance"].as_str().context("an id")?.to_owned();
    ensure!(shown["waits_for"][0] == "a person: charge could not be undone", "{shown}");
    expect_exit(&lab.run(&["process", "list"]).await?, 1)?;

    expect_exit(&lab.run(&["process", "resume", &id]).await?, 0)?;
    until("a person is called again", PATIENCE, || stuck.distinct().len() == 2).await?;
    std::fs::write(&repaired, "")?;
    expect_exit(&lab.run(&["process", "resume", &id]).await?, 0)?;
    ends(&compensated, 1).await?;
    ensure!(done(&lab, "k1") == ["reserve", "charge", "undo.charge#3", "undo.reserve"], "{:?}", done(&lab, "k1"));
    expect_exit(&lab.run(&["process", "resume", &id]).await?, 1)?;
    expect_exit(&lab.run(&["process", "cancel", &id]).await?, 1)?;
    Ok(())
}

#[tokio::test]
async fn a_person_cancels_what_runs() -> anyhow::Result<()> {
    let lab = lab_of("processes-cancel", STEPS)?;
    lab.declare().await?;
    let [completed, compensated] = listen(&lab).await?;
    let _worker = lab.worker()?;
    let go = lab.path("go");
    lab.send(&[order(1, json!({"charge": {"wait_for": go}}))]).await?;
    until("the first step is done", PATIENCE, || done(&lab, "k1") == ["reserve"]).await?;
    let id = instance(&lab, "running").await?["instance"].as_str().context("an id")?.to_owned();
    expect_exit(&lab.run(&["process", "cancel", &id]).await?, 0)?;
    // What was asked for is answered first: an undo must not overtake it.
    let mut shown = json!({});
    for _ in 0..200 {
        let (text, _) = expect_exit(&lab.run(&["process", "show", &id, "--json"]).await?, 0)?;
        shown = serde_json::from_str(&text)?;
        if shown["status"] == "compensating" {
            break;
        }
    }
    ensure!(shown["status"] == "compensating" && done(&lab, "k1") == ["reserve"], "{shown}");
    std::fs::write(go, "")?;
    ends(&compensated, 1).await?;
    ensure!(done(&lab, "k1") == ["reserve", "charge", "undo.charge", "undo.reserve"], "{:?}", done(&lab, "k1"));
    ensure!(completed.distinct().is_empty(), "it ended twice");
    Ok(())
}

/// A pool whose `charge` is to answer within a second, so many times, and answers after three.
async fn late(name: &str, attempts: u32) -> anyhow::Result<(Lab, [Sink; 2])> {
    let steps = format!(
        "
      reserve: {{ do: inventory.reserve, undo: inventory.release }}
      charge: {{ do: payment.charge, undo: payment.refund, after: [reserve], timeout: 1s,
                retry: {{attempts: {attempts}, backoff: 100ms}} }}
"
    );
    let lab = lab_of(name, &steps)?;
    lab.declare().await?;
    let sinks = listen(&lab).await?;
    Ok((lab, sinks))
}

#[tokio::test]
async fn a_step_that_does_not_answer_in_time_is_asked_again_and_the_first_answer_counts() -> anyhow::Result<()> {
    let (lab, [completed, compensated]) = late("processes-late", 20).await?;
    let _worker = lab.worker()?;
    lab.send(&[order(1, json!({"charge": {"sleep": 3}}))]).await?;
    ends(&completed, 1).await?;
    let asked = || served(&lab).into_iter().map(|call| call.step).collect::<BTreeSet<_>>();
    until("the second attempt answers, too", PATIENCE, || asked().contains("charge#2")).await?;
    let id = instance(&lab, "completed").await?["instance"].as_str().context("an id")?.to_owned();
    let (text, _) = expect_exit(&lab.run(&["process", "show", &id]).await?, 0)?;
    ensure!(text.contains("charge: no answer in time") && text.contains("sent payment.charge (attempt 2)"), "{text}");
    ensure!(compensated.distinct().is_empty() && completed.distinct().len() == 1, "it ended twice");
    Ok(())
}

#[tokio::test]
async fn what_answers_after_it_was_given_up_is_taken_back_before_its_parents() -> anyhow::Result<()> {
    let (lab, [completed, compensated]) = late("processes-given-up", 1).await?;
    let _worker = lab.worker()?;
    lab.send(&[order(1, json!({"charge": {"sleep": 6}}))]).await?;
    ends(&compensated, 1).await?;
    ensure!(done(&lab, "k1") == ["reserve", "charge", "undo.charge", "undo.reserve"], "{:?}", done(&lab, "k1"));
    ensure!(completed.distinct().is_empty(), "it ended twice");
    Ok(())
}

#[tokio::test]
async fn a_step_that_nobody_subscribes_to_fails_with_that_reason() -> anyhow::Result<()> {
    let steps = "
      reserve: { do: inventory.reserve, undo: inventory.release }
      weigh: { do: scales.weigh, undo: scales.reset, after: [reserve] }
";
    let lab = lab_of("processes-unheard", steps)?;
    lab.declare().await?;
    let [_, compensated] = listen(&lab).await?;
    let _worker = lab.worker()?;
    lab.send(&[order(1, json!({}))]).await?;
    ends(&compensated, 1).await?;
    let end: Value = compensated.distinct()[0].json()?;
    ensure!(end["failures"]["weigh"]["reason"] == "unheard", "{end}");
    ensure!(done(&lab, "k1") == ["reserve", "undo.reserve"], "{:?}", done(&lab, "k1"));
    Ok(())
}

#[tokio::test]
async fn who_only_looks_on_answers_nothing_and_a_person_gives_up_what_nobody_answers() -> anyhow::Result<()> {
    let steps = "
      reserve: { do: inventory.reserve, undo: inventory.release }
      weigh: { do: scales.weigh, undo: scales.reset, after: [reserve], timeout: 1s }
";
    let lab = lab_of("processes-audit", steps)?;
    lab.declare().await?;
    let [completed, compensated] = listen(&lab).await?;
    let stuck = Sink::listen(&lab.url(), "stuck", "warren.events", "order.stuck").await?;
    let store = format!("sqlite://{}", lab.path("audit.db").display());
    let audit = "routes: [{on: 'scales.*', log: {}}]";
    let pool = [("WARREN_POOL", "processes-audit-log"), ("WARREN_ROUTES", audit), ("DATABASE_URL", store.as_str())];
    let auditor = lab.worker_with(&pool)?;
    until("the auditor is there", PATIENCE, || auditor.log().contains("takes events")).await?;
    let _worker = lab.worker()?;
    lab.send(&[order(1, json!({}))]).await?;
    until("the auditor sees it", PATIENCE, || auditor.log().contains("of scales.weigh")).await?;
    until("a person is called", PATIENCE, || !stuck.distinct().is_empty()).await?;
    let shown = instance(&lab, "stuck").await?;
    ensure!(shown["waits_for"][0] == "a person: weigh was never answered", "{shown}");
    let id = shown["instance"].as_str().context("an id")?;
    expect_exit(&lab.run(&["process", "cancel", id]).await?, 0)?;
    ends(&compensated, 1).await?;
    ensure!(done(&lab, "k1") == ["reserve", "undo.reserve"], "{:?}", done(&lab, "k1"));
    ensure!(completed.distinct().is_empty(), "it ended twice");
    Ok(())
}

#[tokio::test]
async fn an_instance_ends_under_the_definition_that_it_began_with() -> anyhow::Result<()> {
    let mut lab = lab_of("processes-deploy", STEPS)?;
    lab.declare().await?;
    let [completed, _] = listen(&lab).await?;
    let go = lab.path("go");
    let mut old = lab.worker()?;
    lab.send(&[order(1, json!({"charge": {"wait_for": go}}))]).await?;
    until("the first step is done", PATIENCE, || done(&lab, "k1") == ["reserve"]).await?;
    old.kill().await?;
    let other = "
      weigh: { do: inventory.weigh, undo: inventory.release }
      charge: { do: payment.charge, undo: payment.refund, after: [weigh] }
";
    let text = definition(&lab, other);
    lab.set("WARREN_ROUTES", &text);
    let _new = lab.worker()?;
    std::fs::write(go, "")?;
    lab.send(&[order(2, json!({}))]).await?;
    ends(&completed, 2).await?;
    // Of the types that the new definition does not know, the old one's answers are bound still.
    ensure!(done(&lab, "k1") == ["reserve", "charge", "ship", "notify"], "{:?}", done(&lab, "k1"));
    ensure!(done(&lab, "k2") == ["weigh", "charge"], "{:?}", done(&lab, "k2"));
    Ok(())
}

/// Everyone's steps, counted: each was done once, and undone once where the order was taken back.
fn adds_up(lab: &Lab, ends: &BTreeMap<String, String>, of: &[&str]) -> anyhow::Result<()> {
    let mut by_key: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for call in served(lab).into_iter().filter(|call| call.outcome == "done") {
        by_key.entry(call.key).or_default().entry(call.step).or_default().insert(call.id);
    }
    for (key, end) in ends {
        let steps = by_key.get(key).cloned().unwrap_or_default();
        ensure!(steps.values().all(|ids| ids.len() == 1), "{key}: a step under two ids: {steps:?}");
        for step in of {
            let (there, back) = (steps.contains_key(*step), steps.contains_key(&format!("undo.{step}")));
            // What a crash leaves open is undone, done or not.
            let right = if end == "completed" { there && !back } else { !there || back };
            ensure!(right, "{key} is {end}, {step} {there}, its undo {back}");
        }
    }
    Ok(())
}

/// So many orders, some of which fail at a step for good or for a while.
fn orders(count: usize) -> Vec<Value> {
    let data = |n: usize| match n % 10 {
        1 => json!({"charge": {"dead": true}}),
        2 => json!({"ship": {"dead": true}}),
        3 => json!({"reserve": {"fail": 1}}),
        _ => json!({}),
    };
    (0..count).map(|n| order(n, data(n))).collect()
}

async fn ended(sinks: &[Sink; 2], count: usize) -> anyhow::Result<BTreeMap<String, String>> {
    let back = count / 5;
    let mut all = ends(&sinks[0], count - back).await?;
    all.extend(ends(&sinks[1], back).await?);
    ensure!(all.len() == count, "{} ended, not {count}", all.len());
    Ok(all)
}

#[tokio::test]
async fn a_crash_at_every_point_of_a_running_process_is_survived() -> anyhow::Result<()> {
    let mut lab = lab_of("processes-crashes", STEPS)?;
    // Twenty deaths in a row are no event's fault here.
    lab.set("WARREN_CRASH_LIMIT", "100");
    lab.declare().await?;
    let sinks = listen(&lab).await?;
    lab.send(&orders(40)).await?;
    let points =
        ["received", "handled", "before-commit", "after-commit", "outbox-published", "outbox-marked", "before-ack"];
    let mut crashes = 0;
    for (point, hit) in points.into_iter().flat_map(|point| [1, 3, 6].map(|hit| (point, hit))) {
        let mut worker = lab.worker_with(&[("WARREN_TEST_CRASH", &format!("{point}:{hit}"))])?;
        // The last of them may find everything done.
        let mut crashed = false;
        until("it crashes, or has nothing left to do", PATIENCE, || {
            crashed = !worker.is_running();
            crashed || sinks.iter().map(|sink| sink.distinct().len()).sum::<usize>() == 40
        })
        .await?;
        crashes += usize::from(crashed);
    }
    ensure!(crashes >= 14, "only {crashes} crashed");
    let _last = lab.worker()?;
    let ends = ended(&sinks, 40).await?;
    adds_up(&lab, &ends, ALL)
}

#[tokio::test]
async fn every_answer_again_and_another_one_after_it_change_nothing() -> anyhow::Result<()> {
    const ORDERS: usize = 20;
    let lab = lab_of("processes-answers", STEPS)?;
    lab.declare().await?;
    let sinks = listen(&lab).await?;
    let answers = Sink::listen(&lab.url(), "answers", "warren.events", "#").await?;
    let _worker = lab.worker()?;
    lab.send(&orders(ORDERS)).await?;
    let (mut told, mut again, mut all) = (BTreeSet::new(), 0, false);
    // What an answer comes after it: while the instance runs, while it goes back, and after its end.
    loop {
        let mut more = Vec::new();
        for event in answers.distinct() {
            let (asked, verdict) = event.kind().rsplit_once('.').context("a type")?;
            let answers = ["done", "failed"].contains(&verdict) && event.extension("processstep").is_some();
            if !answers || event.source() == "/somebody" || !told.insert(event.id().to_owned()) {
                continue;
            }
            let same: Value = serde_json::from_str(&event.to_json())?;
            let mut other = same.clone();
            other["id"] = json!(format!("other-{}", event.id()));
            other["source"] = json!("/somebody");
            if verdict == "done" {
                other["type"] = json!(format!("{asked}.failed"));
                other["data"] = json!({"reason": "permanent", "error": "a second answer"});
            } else {
                other["type"] = json!(format!("{asked}.done"));
            }
            more.extend([same, other]);
        }
        again += more.len();
        if !more.is_empty() {
            lab.send(&more).await?;
        } else if all {
            break;
        } else {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        all = sinks[0].distinct().len() + sinks[1].distinct().len() >= ORDERS;
    }
    lab.at_rest(PATIENCE).await?;
    until("nothing is left", PATIENCE, || lab.outbox() == 0).await?;
    ensure!(again > ORDERS * 4, "{again} answers");
    let ends = ended(&sinks, ORDERS).await?;
    adds_up(&lab, &ends, ALL)?;
    ensure!(sinks[0].distinct().len() + sinks[1].distinct().len() == ORDERS, "one has two ends");
    // Two orders each whose charge and whose shipping fails.
    let dead = lab.dead().await?;
    ensure!(dead.len() == 4 && dead.iter().all(|(_, reason)| reason == "permanent"), "{dead:?}");
    Ok(())
}

#[tokio::test]
async fn a_timer_that_fires_as_the_answer_arrives_leaves_one_end() -> anyhow::Result<()> {
    const ORDERS: usize = 40;
    let (lab, [completed, compensated]) = late("processes-race", 1).await?;
    let _worker = lab.worker()?;
    // The timer of a second fires somewhere among them.
    let sleeps = |n: usize| json!({"charge": {"sleep": 0.6 + 0.045 * n as f64}});
    lab.send(&(0..ORDERS).map(|n| order(n, sleeps(n))).collect::<Vec<_>>()).await?;
    let count = || [completed.distinct().len(), compensated.distinct().len()];
    until("all have ended", PATIENCE, || count().iter().sum::<usize>() >= ORDERS).await?;
    lab.at_rest(PATIENCE).await?;
    println!("{:?} were completed and taken back", count());
    let mut all = ends(&completed, 0).await?;
    all.extend(ends(&compensated, 0).await?);
    ensure!(all.len() == ORDERS && count().iter().sum::<usize>() == ORDERS, "{:?} of {ORDERS}", count());
    adds_up(&lab, &all, &["reserve", "charge"])
}

#[tokio::test]
async fn orders_end_and_add_up_whoever_is_killed() -> anyhow::Result<()> {
    let count = length(600, 10_000);
    let mut lab = lab_of("processes-kills", STEPS)?;
    lab.set("WARREN_CRASH_LIMIT", "100");
    lab.declare().await?;
    let sinks = listen(&lab).await?;
    let mut fleet = [lab.worker()?, lab.worker()?, lab.worker()?];
    lab.send(&orders(count)).await?;
    for round in 0..count / length(100, 160) {
        let before = served(&lab).len();
        until("more is served", PATIENCE, || {
            served(&lab).len() > before + length(150, 300) || sinks[0].distinct().len() > count / 2
        })
        .await?;
        let victim = &mut fleet[round % 3];
        victim.kill().await?;
        *victim = lab.worker()?;
    }
    let ends = ended(&sinks, count).await?;
    adds_up(&lab, &ends, ALL)?;
    let (text, _) = expect_exit(&lab.run(&["process", "list", "--status", "running"]).await?, 0)?;
    ensure!(text.lines().count() == 1, "{text}");
    Ok(())
}
