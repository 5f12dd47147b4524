//! Steps whose end nobody can tell: the money moves once, comes back where it may have moved, and a person is called where neither
//! can be had.
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use warren_tests::broker::root;
use warren_tests::lab::{Lab, event, until};
use warren_tests::ledger::Sink;
use warren_tests::process::expect_exit;

const PATIENCE: Duration = Duration::from_secs(60);

/// What the bank does with a request.
#[derive(Clone, Debug)]
enum Does {
    /// Answers after so long.
    Answers(Duration),
    /// Says this, byte for byte, and closes the connection.
    Says(&'static str),
}

type Calls = Arc<Mutex<Vec<(String, String)>>>;

/// A bank: notes step and `Idempotency-Key` of each request, and does what is said of the step, else answers at once.
struct Bank {
    url: String,
    calls: Calls,
    task: tokio::task::JoinHandle<()>,
}

impl Bank {
    async fn open(does: BTreeMap<&'static str, Does>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (url, calls) = (format!("http://{}/", listener.local_addr()?), Calls::default());
        let noted = calls.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, does.clone(), noted.clone()));
            }
        });
        Ok(Self { url, calls, task })
    }

    /// The keys of a step, one way, whatever the attempt.
    fn keys(&self, step: &str) -> Vec<String> {
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |called: &&(String, String)| called.0.split('#').next() == Some(step);
        calls.iter().filter(of).map(|(_, key)| key.clone()).collect()
    }
}

impl Drop for Bank {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(stream: TcpStream, does: BTreeMap<&'static str, Does>, noted: Calls) -> anyhow::Result<()> {
    let mut stream = BufReader::new(stream);
    let (mut headers, mut line) = (BTreeMap::new(), String::new());
    while stream.read_line(&mut line).await? > 0 && line != "\r\n" {
        if let Some((name, value)) = line.trim_end().split_once(": ") {
            headers.insert(name.to_lowercase(), value.to_owned());
        }
        line.clear();
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    stream.read_exact(&mut vec![0; length]).await?;
    let step = headers.get("ce-processstep").cloned().unwrap_or_default();
    let key = headers.get("idempotency-key").cloned().unwrap_or_default();
    noted.lock().unwrap_or_else(PoisonError::into_inner).push((step.clone(), key));
    let said = match does.get(step.split('#').next().unwrap_or_default()) {
        Some(Does::Says(said)) => (*said).to_owned(),
        other => {
            if let Some(Does::Answers(after)) = other {
                tokio::time::sleep(*after).await;
            }
            let body = format!("{{\"by\":\"{step}\"}}");
            let length = body.len();
            format!(
                "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
            )
        }
    };
    stream.write_all(said.as_bytes()).await?;
    stream.flush().await?;
    Ok(())
}

fn order(data: Value) -> Value {
    event("o1", "order.placed", "k1", data)
}

/// How instances end: `completed`, `compensated`, or `stuck`.
async fn ends(lab: &Lab) -> anyhow::Result<BTreeMap<&'static str, Sink>> {
    let mut sinks = BTreeMap::new();
    for end in ["completed", "compensated", "stuck"] {
        sinks.insert(end, Sink::listen(&lab.url(), end, "warren.events", &format!("order.{end}")).await?);
    }
    Ok(sinks)
}

#[tokio::test]
async fn a_slow_step_charges_once_and_refunds_once_however_often_it_is_asked_for() -> anyhow::Result<()> {
    let slow = Does::Answers(Duration::from_secs(3));
    let refusal = "HTTP/1.1 422 Unprocessable Content\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let bank =
        Bank::open(BTreeMap::from([("charge", slow.clone()), ("undo.charge", slow), ("ship", Does::Says(refusal))]))
            .await?;
    let mut lab = Lab::new("unknown-slow")?;
    let routes = format!(
        "routes: [{{on: 'bank.*', http: '{}', timeout: 20s}}]
processes:
  - name: order
    on: order.placed
    steps:
      charge: {{ do: bank.charge, undo: bank.refund, timeout: 1s, retry: {{attempts: 3, backoff: 100ms}} }}
      ship: {{ do: bank.ship, final: true, after: [charge] }}
",
        bank.url
    );
    lab.set("WARREN_ROUTES", &routes);
    lab.declare().await?;
    let ends = ends(&lab).await?;
    let _worker = lab.worker()?;
    lab.send(&[order(json!({}))]).await?;
    until("it is taken back", PATIENCE, || !ends["compensated"].distinct().is_empty()).await?;
    lab.at_rest(PATIENCE).await?;
    let (charges, refunds) = (bank.keys("charge"), bank.keys("undo.charge"));
    ensure!(charges.len() > 1 && refunds.len() > 1, "{charges:?} {refunds:?}: it was not asked again");
    ensure!(charges.iter().all(|key| *key == charges[0]), "several keys charge: {charges:?}");
    ensure!(refunds.iter().all(|key| *key == refunds[0]), "several keys refund: {refunds:?}");
    ensure!(charges[0] != refunds[0] && charges[0].len() == 36, "{charges:?} {refunds:?}");
    // The first result is the one that what follows rests on.
    let end: Value = ends["compensated"].distinct()[0].json()?;
    ensure!(end["results"]["charge"]["by"] == "charge", "{end}");
    Ok(())
}

#[tokio::test]
async fn whatever_may_have_been_done_is_undone_and_a_refusal_is_not() -> anyhow::Result<()> {
    let says = |status: &str, body: &str| {
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        )
    };
    let leak = |text: String| -> &'static str { text.leak() };
    for (name, does, undone) in [
        ("hangs", Does::Answers(Duration::from_secs(5)), true),
        ("breaks", Does::Says("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"), true),
        ("closes", Does::Says(""), true),
        ("garbage", Does::Says(leak(says("200 OK", "{\"paid\": "))), true),
        ("fails", Does::Says(leak(says("500 Internal Server Error", ""))), true),
        ("moved", Does::Says(leak(says("303 See Other", ""))), true),
        ("refuses", Does::Says(leak(says("402 Payment Required", "{}"))), false),
        ("busy", Does::Says(leak(says("429 Too Many Requests", ""))), false),
        ("away", Does::Says(""), false),
    ] {
        let mut bank = Bank::open(BTreeMap::from([("charge", does)])).await?;
        if name == "away" {
            bank.url = format!("http://{}/", std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?);
        }
        let mut lab = Lab::new(&format!("unknown-{name}"))?;
        let routes = format!(
            "routes: [{{on: 'bank.*', http: '{}', timeout: 1s, retry: {{attempts: 2, backoff: 100ms}}}}]
processes:
  - name: order
    on: order.placed
    steps:
      charge: {{ do: bank.charge, undo: {{do: bank.refund, with: '{{order: .input.n}}'}} }}
",
            bank.url
        );
        lab.set("WARREN_ROUTES", &routes);
        lab.declare().await?;
        let ends = ends(&lab).await?;
        let refunds = Sink::listen(&lab.url(), "refunds", "warren.events", "bank.refund").await?;
        let _worker = lab.worker()?;
        lab.send(&[order(json!({"n": 7}))]).await?;
        until("it is taken back", PATIENCE, || !ends["compensated"].distinct().is_empty()).await?;
        ensure!(bank.keys("charge").len() <= 2, "{name}: {:?}", bank.keys("charge"));
        let refunded = bank.keys("undo.charge").len();
        ensure!(refunded == usize::from(undone), "{name}: {refunded} refunds");
        let end: Value = ends["compensated"].distinct()[0].json()?;
        ensure!(end["failures"]["charge"]["certain"] == json!(!undone), "{name}: {end}");
        if undone {
            let refund: Value = refunds.distinct().first().context("a refund")?.json()?;
            ensure!(refund == json!({"order": 7}), "the undo has data of its own: {refund}");
        }
    }
    Ok(())
}

/// The services in `services.py`.
fn services(lab: &Lab) -> String {
    let program = root().join("tests/handlers/services.py");
    format!("exec: [python3, '{}', '{}']", program.display(), lab.path("served").display())
}

/// A process of one step, and who does it.
fn charging(handler: &str, more: &str) -> String {
    format!(
        "routes: [{{on: 'payment.*', {handler}}}]
processes:
  - name: order
    on: order.placed
    steps:
      charge: {{ do: payment.charge, undo: payment.refund{more} }}
"
    )
}

fn served(lab: &Lab) -> Vec<String> {
    let text = std::fs::read_to_string(lab.path("served")).unwrap_or_default();
    let calls = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    calls.filter_map(|call| call["step"].as_str().map(str::to_owned)).collect()
}

#[tokio::test]
async fn a_refusal_after_a_crash_does_not_tell_what_was_done_before_it() -> anyhow::Result<()> {
    let mut lab = Lab::new("unknown-crash")?;
    let routes = charging(&services(&lab), "");
    lab.set("WARREN_ROUTES", &routes);
    lab.declare().await?;
    let ends = ends(&lab).await?;
    lab.send(&[order(json!({"charge": {"dead": true}}))]).await?;
    // The event that begins the process is handled twice, as it needs its state first; the charge comes third.
    let mut first = lab.worker_with(&[("WARREN_TEST_CRASH", "handled:3")])?;
    until("it dies with the charge", PATIENCE, || !first.is_running()).await?;
    ensure!(served(&lab) == ["charge"], "{:?}", served(&lab));
    let _second = lab.worker()?;
    until("it is taken back", PATIENCE, || !ends["compensated"].distinct().is_empty()).await?;
    ensure!(served(&lab).contains(&"undo.charge".to_owned()), "{:?}", served(&lab));
    Ok(())
}

#[tokio::test]
async fn a_step_that_its_pool_cannot_read_is_answered() -> anyhow::Result<()> {
    let mut lab = Lab::new("unknown-unread")?;
    let processes = charging(&services(&lab), "").lines().skip(1).collect::<Vec<_>>().join("\n");
    lab.set("WARREN_ROUTES", &processes);
    lab.declare().await?;
    let ends = ends(&lab).await?;
    let (routes, store) = (charging(&services(&lab), ""), format!("sqlite://{}", lab.path("services.db").display()));
    let routes = routes.lines().next().context("the routes")?;
    let services = lab.worker_with(&[
        ("WARREN_POOL", "unknown-unread-services"),
        ("DATABASE_URL", store.as_str()),
        ("WARREN_ROUTES", routes),
        ("WARREN_BODY_LIMIT", "1000"),
    ])?;
    until("the services are there", PATIENCE, || services.log().contains("takes events")).await?;
    let _worker = lab.worker()?;
    lab.send(&[order(json!({"text": "x".repeat(2000)}))]).await?;
    until("it is taken back", PATIENCE, || !ends["compensated"].distinct().is_empty()).await?;
    let end: Value = ends["compensated"].distinct()[0].json()?;
    let failure = &end["failures"]["charge"];
    ensure!(failure["reason"] == "too-large" && failure["certain"] == true, "{end}");
    ensure!(served(&lab).is_empty(), "{:?}", served(&lab));
    Ok(())
}

#[tokio::test]
async fn a_step_that_nobody_answers_calls_a_person_everywhere() -> anyhow::Result<()> {
    let mut lab = Lab::new("unknown-silent")?;
    let routes = charging("log: {}", ", timeout: 1s");
    lab.set("WARREN_ROUTES", &routes);
    lab.declare().await?;
    let ends = ends(&lab).await?;
    let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let worker = lab.worker_with(&[("WARREN_ADMIN_ADDR", &address)])?;
    lab.send(&[order(json!({}))]).await?;
    until("a person is called", PATIENCE, || !ends["stuck"].distinct().is_empty()).await?;
    ensure!(worker.log().contains("is stuck and waits for a person: charge was never answered"), "{}", worker.log());
    expect_exit(&lab.run(&["process", "list", "--limit", "0"]).await?, 1)?;
    let (status, _) = expect_exit(&lab.run(&["status"]).await?, 1)?;
    ensure!(status.contains("1 instance of process 'order' is stuck"), "{status}");
    let counted = "warren_process_instances{pool=\"unknown-silent\",process=\"order\",status=\"stuck\"} 1";
    let mut metrics = String::new();
    for _ in 0..400 {
        metrics = lab.page(&address, "/metrics")?.1;
        if metrics.contains(counted) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    ensure!(metrics.contains(counted), "{metrics}");
    Ok(())
}

#[tokio::test]
async fn a_condition_that_fails_is_told_with_its_step_and_text_data_is_kept() -> anyhow::Result<()> {
    let mut lab = Lab::new("unknown-condition")?;
    let routes = charging(&services(&lab), ", when: '.input | keys'");
    lab.set("WARREN_ROUTES", &routes);
    lab.declare().await?;
    let ends = ends(&lab).await?;
    let _worker = lab.worker()?;
    let mut text = order(json!("an order in words"));
    text["datacontenttype"] = json!("text/plain");
    lab.send(&[text]).await?;
    until("it ends", PATIENCE, || !ends["compensated"].distinct().is_empty()).await?;
    let end: Value = ends["compensated"].distinct()[0].json()?;
    ensure!(end["input"] == "an order in words", "{end}");
    let error = end["failures"]["charge"]["error"].as_str().unwrap_or_default();
    ensure!(error.starts_with("when: ") && end["failures"]["charge"]["certain"] == true, "{end}");
    let (list, _) = expect_exit(&lab.run(&["process", "list", "--json"]).await?, 0)?;
    let id = serde_json::from_str::<Value>(&list)?["instance"].as_str().context("an id")?.to_owned();
    let (shown, _) = expect_exit(&lab.run(&["process", "show", &id]).await?, 0)?;
    ensure!(shown.contains("charge cannot be asked for: when: "), "{shown}");
    Ok(())
}

#[tokio::test]
async fn events_that_go_round_die_at_the_limit() -> anyhow::Result<()> {
    let mut lab = Lab::new("unknown-loop")?;
    let program = "import json,sys\nfor l in sys.stdin:\n e=json.loads(l)['event']; print(json.dumps({'id':e['id'],'source':e['source'],'status':'done','emit':[{'type':'ping'}]}),flush=True)";
    let routes = json!({"routes": [{"on": "ping", "exec": ["python3", "-c", program]}]});
    lab.set("WARREN_ROUTES", &routes.to_string());
    lab.set("WARREN_HOP_LIMIT", "10");
    lab.declare().await?;
    let pings = Sink::listen(&lab.url(), "pings", "warren.events", "ping").await?;
    let _worker = lab.worker()?;
    lab.send(&[event("p1", "ping", "k1", json!({}))]).await?;
    let mut dead = Vec::new();
    for _ in 0..100 {
        dead = lab.dead().await?;
        if !dead.is_empty() {
            break;
        }
    }
    ensure!(dead.len() == 1 && dead[0].1 == "loop", "{dead:?}");
    ensure!(pings.distinct().len() == 12, "{} went round", pings.distinct().len());
    Ok(())
}

#[tokio::test]
async fn a_long_timer_stands_in_the_store_until_its_last_hour() -> anyhow::Result<()> {
    let mut lab = Lab::new("unknown-timer")?;
    lab.set("WARREN_TEST_LAST_HOUR", "2");
    let routes = charging("log: {}", ", timeout: 8s");
    lab.set("WARREN_ROUTES", &routes);
    lab.declare().await?;
    let ends = ends(&lab).await?;
    let worker = lab.worker()?;
    lab.send(&[order(json!({}))]).await?;
    until("it is asked for", PATIENCE, || worker.log().contains("of payment.charge")).await?;
    lab.at_rest(PATIENCE).await?;
    let mut waiting = 0;
    for step in ["1s", "5s", "30s", "2m", "10m", "1h"] {
        let queue = format!("warren.{}.delay.{step}", lab.name);
        waiting += lab.depth(&queue).await?.context("a delay queue")?.0;
    }
    ensure!(waiting == 0, "{waiting} timers hop through the delay queues");
    until("its time comes all the same", PATIENCE, || !ends["stuck"].distinct().is_empty()).await
}
