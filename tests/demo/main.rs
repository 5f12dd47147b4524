//! `make demo`: the main job on a real broker, with kills, and an account of every event.
mod bank;

use anyhow::{Context, ensure};
use lapin::options::{ExchangeDeleteOptions, QueueDeleteOptions};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use warren_publisher::publish::Options;
use warren_publisher::{Broker, Publisher, Refused};
use warren_shared::Message;
use warren_shared::env::{Secret, Settings};
use warren_shared::topology::{BUS, Declaration, Topology};
use warren_tests::broker::{root, scratch};
use warren_tests::process::{self, Process, command};
use warren_tests::{Sink, event, until};

const CUSTOMERS: usize = 150;
const ORDERS: usize = 4000;
const BUSY: usize = 60;
const STOLEN: usize = 40;
const UNKNOWN: usize = 25;
const MALFORMED: usize = 30;
const TWICE: usize = 300;
const PATIENCE: Duration = Duration::from_secs(100);

fn main() -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let demo = Demo::new()?;
        let mut kept = demo.run().await;
        if let (Ok(()), Some(url)) = (&kept, &demo.database) {
            kept = bank::run(&demo, url).await;
        }
        // Whatever happened, the broker is left as it was found.
        if let Err(error) = demo.clean().await {
            eprintln!("the demo's queues could not be removed: {error:#}");
        }
        kept
    })
}

pub(crate) struct Demo {
    url: String,
    /// Where the store is PostgreSQL.
    database: Option<String>,
    pool: String,
    pub(crate) dir: PathBuf,
    pub(crate) environment: Vec<(String, String)>,
    started: Instant,
}

impl Demo {
    fn new() -> anyhow::Result<Self> {
        let url = std::env::var("AMQP_URL").context("scripts/demo sets AMQP_URL")?;
        let database = std::env::var("DATABASE_URL").ok().filter(|url| url.starts_with("postgres"));
        let pool = format!("demo-{}", std::process::id());
        let dir = scratch().join("demo");
        std::fs::remove_dir_all(&dir).ok();
        std::fs::create_dir_all(&dir)?;
        let handler = root().join("examples/orders.py");
        let routes = format!(
            "routes: [{{on: 'order.*', exec: [python3, '{}', '{}'], timeout: 10s}}]",
            handler.display(),
            dir.join("calls").display()
        );
        let environment = [
            ("AMQP_URL", url.clone()),
            (
                "DATABASE_URL",
                database.clone().unwrap_or_else(|| format!("sqlite://{}", dir.join("warren.db").display())),
            ),
            ("WARREN_POOL", pool.clone()),
            ("WARREN_PARTITIONS", "4".into()),
            ("WARREN_ROUTES", routes),
            ("WARREN_SUBSCRIBE", "unheard.of".into()),
        ];
        let environment = environment.map(|(name, value)| (name.to_owned(), value)).to_vec();
        Ok(Self { url, database, pool, dir, environment, started: Instant::now() })
    }

    pub(crate) fn say(&self, what: &str) {
        println!("{:5.1} s  {what}", self.started.elapsed().as_secs_f64());
    }

    fn topology(&self) -> anyhow::Result<Topology> {
        let map = self.environment.iter().cloned().collect();
        let s = Settings::read(&map).map_err(|mistakes| anyhow::anyhow!("{mistakes:?}"))?;
        Ok(Topology {
            pool: s.pool,
            lanes: s.lanes,
            partitions: s.partitions,
            queue_type: s.queue_type,
            order: s.order,
            subscriptions: s.subscribe,
        })
    }

    async fn run(&self) -> anyhow::Result<()> {
        self.say("declaring exchanges and queues");
        let mut declare = command("warren-worker", &self.environment);
        declare.args(["topology", "--apply"]);
        process::expect_exit(&process::output(declare, Vec::new()).await?, 0)?;
        let entries = Sink::listen(&self.url, &self.pool, BUS, "ledger.entry").await?;

        let mut workers: Vec<Process> = (1..=3).map(|n| self.worker(n)).collect::<Result<_, _>>()?;
        let taking = |worker: &Process| worker.log().contains("the pool has 3 workers");
        until("three workers share the partitions", PATIENCE, || workers.iter().all(taking)).await?;
        // Before anything is killed: what is no event has no identity, and a death before its ack buries it again.
        self.malform().await?;
        self.settle(MALFORMED).await?;
        self.say(&format!("{MALFORMED} malformed messages, published as an upstream system would, are dead letters"));
        self.say("three workers are up: one active consumer a partition, the others stand by");

        let events = events();
        let file = self.dir.join("orders.ndjson");
        // Some lines stand twice: an upstream system that repeats itself.
        let lines: Vec<String> = events.iter().chain(events.iter().take(TWICE)).map(Value::to_string).collect();
        std::fs::write(&file, lines.join("\n"))?;
        let mut send = command("warren-publisher", &self.environment);
        send.arg("send").arg(&file);
        let (account, _) = process::expect_exit(&process::output(send, Vec::new()).await?, 0)?;
        self.say(&format!("sent: {}", account.trim()));

        let heard = || entries.distinct().len();
        until("a third is handled", PATIENCE, || heard() > ORDERS / 3).await?;
        let active = workers.iter().position(|w| w.log().contains("first delivery")).unwrap_or(0);
        workers[active].kill().await?;
        self.say(&format!("{} entries: killed worker {} with SIGKILL", heard(), active + 1));
        let victim = (active + 1) % 3;
        until("two thirds are handled", PATIENCE, || heard() > ORDERS * 2 / 3).await?;
        let status = workers[victim].terminate(Duration::from_secs(40)).await?;
        self.say(&format!("{} entries: SIGTERM to worker {}, it drained and ended with {status}", heard(), victim + 1));
        ensure!(status.success(), "a drain ends with 0; its log:\n{}", workers[victim].log());

        let expected = ORDERS + BUSY;
        until("everything is handled", PATIENCE, || heard() >= expected).await?;
        let dead = self.settle(STOLEN + UNKNOWN + MALFORMED).await?;
        self.say("all is settled");
        let mut last = workers.swap_remove((active + 2) % 3);
        ensure!(last.terminate(Duration::from_secs(40)).await?.success(), "the last worker drains");
        self.report(&events, &entries, &dead)
    }

    fn worker(&self, number: usize) -> anyhow::Result<Process> {
        let mut environment = self.environment.clone();
        environment.push(("WARREN_WORKER_ID".into(), format!("worker-{number}")));
        let mut run = command("warren-worker", &environment);
        run.arg("run");
        Process::start(run, &self.dir.join(format!("worker-{number}.log")))
    }

    /// Publishes bodies that are no JSON although they say so. `send` would refuse them.
    async fn malform(&self) -> anyhow::Result<()> {
        let broker = Broker::new(Secret::new(self.url.as_str()), "demo");
        let publisher = Publisher::start(broker.clone(), broker.connect("demo").await?, Options::default());
        let message = |n: usize| Message {
            exchange: BUS.into(),
            routing_key: "order.placed".into(),
            content_type: Some("application/json".into()),
            message_id: Some(format!("malformed-{n}")),
            correlation_id: Some(format!("customer-{}", n % CUSTOMERS)),
            body: b"{\"total\": NaN}".to_vec(),
            ..Message::default()
        };
        let outcomes = publisher.publish_all((0..MALFORMED).map(message).collect()).await;
        outcomes.into_iter().collect::<Result<Vec<_>, Refused>>()?;
        Ok(())
    }

    /// Waits until so many are dead, then lists their letters. After a crash there may be two of one event: what was
    /// committed is sent at least once.
    pub(crate) async fn settle(&self, expected: usize) -> anyhow::Result<Vec<Value>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut list = command("warren-worker", &self.environment);
            list.args(["dead", "list", "--json"]);
            let (stdout, _) = process::expect_exit(&process::output(list, Vec::new()).await?, 0)?;
            let dead: Vec<Value> = stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
            let distinct: HashSet<&str> = dead.iter().filter_map(|letter| letter["id"].as_str()).collect();
            if distinct.len() >= expected || Instant::now() > deadline {
                return Ok(dead);
            }
        }
    }

    fn report(&self, events: &[Value], entries: &Sink, dead: &[Value]) -> anyhow::Result<()> {
        let (heard, distinct) = (entries.heard(), entries.distinct());
        let mut handled: HashMap<String, usize> = HashMap::new();
        let (mut last, mut inversions) = (HashMap::new(), 0);
        for entry in &distinct {
            let data: Value = entry.json()?;
            let order = data["order"].as_str().unwrap_or_default().to_owned();
            let n = data["n"].as_str().unwrap_or_default().to_owned();
            *handled.entry(order).or_default() += 1;
            inversions +=
                usize::from(last.insert(entry.key().into_owned(), n.clone()).is_some_and(|before| before > n));
        }
        let mut reasons = BTreeMap::<&str, usize>::new();
        let mut buried = HashSet::new();
        for letter in dead {
            if buried.insert(letter["id"].as_str().unwrap_or_default()) {
                *reasons.entry(letter["reason"].as_str().unwrap_or("unknown")).or_default() += 1;
            }
        }
        let mut causes = reasons.iter().map(|(reason, n)| format!("{n} {reason}")).collect::<Vec<_>>().join(", ");
        if dead.len() > buried.len() {
            causes += &format!("; {} letters repeated after the kill, with the same id", dead.len() - buried.len());
        }
        let calls = std::fs::read_to_string(self.dir.join("calls"))?;
        let again: HashSet<&str> =
            calls.lines().filter(|l| !l.ends_with(" 1")).filter_map(|l| l.split(' ').next()).collect();
        let ids: HashSet<String> = events.iter().filter_map(|e| e["id"].as_str().map(str::to_owned)).collect();
        let malformed = (0..MALFORMED).map(|n| format!("malformed-{n}"));
        let published: HashSet<String> = ids.iter().cloned().chain(malformed).collect();
        let lost = published.iter().filter(|id| !handled.contains_key(*id) && !buried.contains(id.as_str())).count();
        let both = handled.keys().filter(|id| buried.contains(id.as_str())).count();
        let twice = handled.values().filter(|n| **n > 1).count();
        let rows = [
            ("published", published.len().to_string(), String::new()),
            ("handled once", (handled.len() - twice).to_string(), String::new()),
            ("duplicates absorbed", (TWICE - twice).to_string(), "sent twice, one effect each".into()),
            ("retried", again.len().to_string(), "through the delay queues".into()),
            ("dead", buried.len().to_string(), causes),
            ("out of order", inversions.to_string(), "within a customer's orders".into()),
            (
                "handled twice",
                twice.to_string(),
                format!("{} repeated entries had the same id", heard.len() - distinct.len()),
            ),
            ("handled and dead", both.to_string(), String::new()),
            ("lost", lost.to_string(), String::new()),
        ];
        println!();
        for (name, n, note) in &rows {
            println!("  {name:<20} {n:>6}  {note}");
        }
        println!();
        let expected = BTreeMap::from([("permanent", STOLEN), ("no-route", UNKNOWN), ("bad-json", MALFORMED)]);
        ensure!(
            lost == 0 && twice == 0 && both == 0 && inversions == 0,
            "a promise is broken; see {}",
            self.dir.display()
        );
        ensure!(reasons == expected, "dead letters are {reasons:?}, expected {expected:?}");
        ensure!(handled.len() + buried.len() == published.len(), "the account does not add up");
        ensure!(again.len() >= BUSY, "{} events were retried, expected at least {BUSY}", again.len());
        println!("every promise was kept");
        Ok(())
    }

    async fn clean(&self) -> anyhow::Result<()> {
        if let Some(url) = &self.database {
            let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
            tokio::spawn(connection);
            let schema = format!("warren_{}", self.pool.replace('-', "_"));
            client.batch_execute(&format!("DROP SCHEMA IF EXISTS {schema} CASCADE")).await?;
        }
        let connection = lapin::Connection::connect(&self.url, lapin::ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        let sink = format!("sink.{}", self.pool);
        channel.queue_delete(sink.as_str().into(), QueueDeleteOptions::default()).await?;
        for declaration in self.topology()?.declarations().into_iter().rev() {
            match declaration {
                Declaration::Queue { name, .. } => {
                    channel.queue_delete(name.as_str().into(), QueueDeleteOptions::default()).await?;
                }
                // The bus belongs to everybody.
                Declaration::Exchange { name, .. } if name != BUS => {
                    channel.exchange_delete(name.as_str().into(), ExchangeDeleteOptions::default()).await?;
                }
                _ => {}
            }
        }
        connection.close(200, "done".into()).await?;
        Ok(())
    }
}

/// Orders of many customers, each customer's numbered; among them some that fail for a while, or for good, and some of
/// a type that nobody handles.
fn events() -> Vec<Value> {
    let mut events = Vec::new();
    let mut counts: HashMap<String, usize> = HashMap::new();
    let mut add = |id: String, kind: &str, customer: String, data: Value| {
        let n = counts.entry(customer.clone()).or_default();
        *n += 1;
        let mut event = event(&id, kind, &customer, data);
        event["sequence"] = json!(format!("{n:06}"));
        event["priority"] = json!(5);
        events.push(event);
    };
    for i in 0..ORDERS {
        let data = json!({"total": 10 + i % 90, "items": i % 5 + 1});
        add(format!("order-{i}"), "order.placed", format!("customer-{}", i % CUSTOMERS), data);
        // A retry lets its key go on, so these customers order once.
        if i % (ORDERS / BUSY) == 0 && i / (ORDERS / BUSY) < BUSY {
            let n = i / (ORDERS / BUSY);
            add(format!("busy-{n}"), "order.placed", format!("waiting-{n}"), json!({"total": 5, "bank": "busy"}));
        }
        if i % (ORDERS / STOLEN) == 0 && i / (ORDERS / STOLEN) < STOLEN {
            let n = i / (ORDERS / STOLEN);
            add(format!("stolen-{n}"), "order.placed", format!("thief-{n}"), json!({"total": 999, "card": "stolen"}));
        }
        if i % (ORDERS / UNKNOWN) == 0 && i / (ORDERS / UNKNOWN) < UNKNOWN {
            let n = i / (ORDERS / UNKNOWN);
            add(format!("unknown-{n}"), "unheard.of", format!("stranger-{n}"), json!({}));
        }
    }
    events
}
