//! `make demo`: the order process of `examples/order` on a real broker, with kills, and an account of every order.
mod bank;

use anyhow::{Context, ensure};
use lapin::options::{ExchangeDeleteOptions, QueueDeleteOptions};
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use warren_shared::env::Settings;
use warren_shared::topology::{BUS, Declaration, Topology};
use warren_tests::broker::scratch;
use warren_tests::process::{self, Process, command};
use warren_tests::shop::{ARTICLES, Shop, order, sold};
use warren_tests::{Sink, until};

const ORDERS: usize = 400;
const RATE: &str = "40";
const CUSTOMERS: usize = 120;
/// Of each article: fewer lamps and chairs than are ordered.
const STOCK: [i64; 4] = [500, 120, 150, 500];
const PATIENCE: Duration = Duration::from_secs(100);
/// How long the payment service is gone.
const GONE: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let demo = Demo::new()?;
        let mut kept = demo.run().await;
        if let (Ok(()), Some((url, _))) = (&kept, &demo.database) {
            kept = bank::run(&demo, url).await;
        }
        // Whatever happened, broker and database are left as they were found.
        if let Err(error) = demo.clean().await {
            eprintln!("what the demo made could not be removed: {error:#}");
        }
        kept
    })
}

pub(crate) struct Demo {
    url: String,
    /// Where the store is PostgreSQL, and its table of parcels.
    database: Option<(String, String)>,
    pool: String,
    pub(crate) dir: PathBuf,
    pub(crate) environment: Vec<(String, String)>,
    shop: Shop,
    started: Instant,
}

impl Demo {
    fn new() -> anyhow::Result<Self> {
        let url = std::env::var("AMQP_URL").context("scripts/demo sets AMQP_URL")?;
        let database = std::env::var("DATABASE_URL").ok().filter(|url| url.starts_with("postgres"));
        let database = database.map(|url| (url, format!("parcels_{}", std::process::id())));
        let pool = format!("demo-{}", std::process::id());
        let dir = scratch().join("demo");
        std::fs::remove_dir_all(&dir).ok();
        std::fs::create_dir_all(&dir)?;
        let stock: Vec<(&str, i64)> = ARTICLES.iter().map(|(sku, _)| *sku).zip(STOCK).collect();
        let shop = Shop::open(&dir.join("shop"), &stock)?;
        let file = format!("sqlite://{}", dir.join("warren.db").display());
        let environment = [
            ("AMQP_URL", url.clone()),
            ("DATABASE_URL", database.as_ref().map_or(file, |(url, _)| url.clone())),
            ("ORDER_TABLE", database.as_ref().map_or(String::new(), |(_, table)| table.clone())),
            ("WARREN_POOL", pool.clone()),
            ("WARREN_PARTITIONS", "6".into()),
            ("WARREN_ROUTES", shop.definition()?),
        ];
        let environment = environment.map(|(name, value)| (name.to_owned(), value)).to_vec();
        Ok(Self { url, database, pool, dir, environment, shop, started: Instant::now() })
    }

    pub(crate) fn say(&self, what: &str) {
        println!("{:5.1} s  {what}", self.started.elapsed().as_secs_f64());
    }

    async fn run(&self) -> anyhow::Result<()> {
        if let Some((url, table)) = &self.database {
            let client = bank::connect(url).await?;
            client
                .batch_execute(&format!("CREATE TABLE {table} (instance text NOT NULL, address text NOT NULL)"))
                .await?;
        }
        let mut payments = self.shop.payments().await?;
        let mut started = 0;
        let mut worker = || {
            started += 1;
            let mut environment = self.environment.clone();
            environment.push(("WARREN_WORKER_ID".into(), format!("worker-{started}")));
            self.shop.worker(&environment, &self.dir.join(format!("worker-{started}.log")))
        };
        let mut workers: Vec<Process> = (1..=3).map(|_| worker()).collect::<Result<_, _>>()?;
        let taking = |worker: &Process| worker.log().contains("the pool has 3 workers");
        let ready = until("three workers share the partitions", PATIENCE, || workers.iter().all(taking)).await;
        ready.with_context(|| workers[0].log())?;
        self.say("three workers share the partitions; goods in Perl, payments over HTTP in Python, shipping in Rust");
        let completed = Sink::listen(&self.url, &format!("{}.completed", self.pool), BUS, "order.completed").await?;
        let compensated =
            Sink::listen(&self.url, &format!("{}.compensated", self.pool), BUS, "order.compensated").await?;
        let ended = || completed.distinct().len() + compensated.distinct().len();

        let orders: Vec<String> = (0..ORDERS).map(|n| order(n, CUSTOMERS).to_string()).collect();
        let file = self.dir.join("orders.ndjson");
        std::fs::write(&file, orders.join("\n"))?;
        let mut send = command("warren-publisher", &self.environment);
        send.args(["send", "--rate", RATE]).arg(&file);
        let mut sender = Process::start(send, &self.dir.join("send.log"))?;
        self.say(&format!("{ORDERS} orders come in, {RATE} a second"));

        until("a fifth has ended", PATIENCE, || ended() > ORDERS / 5).await?;
        workers[0].kill().await?;
        self.say(&format!("{:3} orders have ended: killed worker 1 with SIGKILL", ended()));
        workers[0] = worker()?;
        until("two fifths have ended", PATIENCE, || ended() > ORDERS * 2 / 5).await?;
        payments.kill().await?;
        workers[1].kill().await?;
        self.say(&format!("{:3} orders have ended: killed worker 2, and the payment service for {GONE:?}", ended()));
        workers[1] = worker()?;
        tokio::time::sleep(GONE).await;
        let mut payments = self.shop.payments().await?;
        self.say(&format!("{:3} orders have ended: the payment service is back", ended()));
        until("three fifths have ended", PATIENCE, || ended() > ORDERS * 3 / 5).await?;
        let status = workers[2].terminate(Duration::from_secs(40)).await?;
        self.say(&format!("{:3} orders have ended: SIGTERM to worker 3, it drained and ended with {status}", ended()));
        ensure!(status.success(), "a drain ends with 0; its log:\n{}", workers[2].log());
        let all = until("every order has ended", PATIENCE, || ended() >= ORDERS).await;
        all.with_context(|| format!("{} of {ORDERS} have; the logs are in {}", ended(), self.dir.display()))?;
        ensure!(sender.wait(PATIENCE).await?.success(), "{}", sender.log());
        self.say(&format!("every order has ended; sent: {}", sender.account()?));
        for worker in &mut workers[..2] {
            ensure!(worker.terminate(Duration::from_secs(40)).await?.success(), "a worker drains:\n{}", worker.log());
        }
        payments.kill().await?;
        let data =
            |sink: &Sink| sink.distinct().iter().map(|end| Ok(end.json()?)).collect::<anyhow::Result<Vec<Value>>>();
        self.report(&data(&completed)?, &data(&compensated)?).await
    }

    async fn report(&self, completed: &[Value], compensated: &[Value]) -> anyhow::Result<()> {
        let instances = self.ask(&["process", "list", "--limit", "100000"]).await?;
        let count = |status: &str| instances.iter().filter(|instance| instance["status"] == status).count();
        let mut causes = BTreeMap::<&str, usize>::new();
        for end in compensated {
            let failed = |step: &str| !end["failures"][step].is_null();
            let cause = match () {
                () if failed("reserve") => "out of stock",
                () if failed("charge") => "not enough money",
                () => "nobody delivers there",
            };
            *causes.entry(cause).or_default() += 1;
        }
        let causes: Vec<String> = causes.iter().map(|(cause, n)| format!("{n} {cause}")).collect();
        let (mut books, sold) = (self.shop.books()?, sold(completed)?);
        if let Some((url, table)) = &self.database {
            books.parcels = bank::number(url, &format!("SELECT count(*) FROM {table}")).await?.try_into()?;
        }
        let goods: i64 = sold.goods.values().sum();
        let left: Vec<String> = books.left.iter().map(|(sku, left)| format!("{left} {sku}s")).collect();
        let rows = [
            ("orders", ORDERS, String::new()),
            ("completed", count("completed"), String::new()),
            ("compensated", count("compensated"), causes.join(", ")),
            ("stuck", count("stuck"), String::new()),
            ("dead letters", self.letters().await?.len(), "the steps that failed, each with its reason".into()),
            ("money taken", usize::try_from(books.money)?, format!("{} is what the completed orders cost", sold.money)),
            (
                "goods taken",
                books.goods.values().sum::<i64>().try_into()?,
                format!("{goods} are in the completed orders; left: {}", left.join(", ")),
            ),
            ("parcels", books.parcels, format!("{} orders are completed", sold.parcels)),
        ];
        println!();
        for (name, n, note) in &rows {
            println!("  {name:<20} {n:>6}  {note}");
        }
        println!();
        ensure!(
            instances.len() == ORDERS && count("stuck") == 0,
            "{} instances, {} stuck",
            instances.len(),
            count("stuck")
        );
        ensure!(
            count("completed") == completed.len() && count("compensated") == compensated.len(),
            "events and states differ"
        );
        ensure!(books.add_up(&sold), "the books do not add up; see {}", self.dir.display());
        println!("every order has one end, and the books add up");
        Ok(())
    }

    /// What `warren-worker` prints, a JSON object a line.
    async fn ask(&self, arguments: &[&str]) -> anyhow::Result<Vec<Value>> {
        let mut command = command("warren-worker", &self.environment);
        command.args(arguments).arg("--json");
        let (stdout, _) = process::expect_exit(&process::output(command, Vec::new()).await?, 0)?;
        Ok(stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
    }

    /// The ids of all dead letters; after a kill there may be two of one event.
    pub(crate) async fn letters(&self) -> anyhow::Result<HashSet<String>> {
        let letters = self.ask(&["dead", "list"]).await?;
        Ok(letters.iter().filter_map(|letter| letter["id"].as_str().map(str::to_owned)).collect())
    }

    fn topology(&self) -> anyhow::Result<Topology> {
        let map = self.environment.iter().cloned().collect();
        let s = Settings::read(&map).map_err(|mistakes| anyhow::anyhow!("{mistakes:?}"))?;
        let (pool, lanes, partitions) = (s.pool, s.lanes, s.partitions);
        let (queue_type, order) = (s.queue_type, s.order);
        Ok(Topology { pool, lanes, partitions, queue_type, order, subscriptions: s.subscribe })
    }

    async fn clean(&self) -> anyhow::Result<()> {
        if let Some((url, table)) = &self.database {
            let client = bank::connect(url).await?;
            let schema = format!("warren_{}", self.pool.replace('-', "_"));
            client
                .batch_execute(&format!("DROP SCHEMA IF EXISTS {schema} CASCADE; DROP TABLE IF EXISTS {table}"))
                .await?;
        }
        let connection = lapin::Connection::connect(&self.url, lapin::ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        for end in ["completed", "compensated"] {
            let sink = format!("sink.{}.{end}", self.pool);
            channel.queue_delete(sink.as_str().into(), QueueDeleteOptions::default()).await?;
        }
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
