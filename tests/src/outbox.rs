//! An outbox on real servers: relays, writers that fill it, and the account that must add up.
use crate::process::{command, expect_exit, output};
use crate::{Lab, Postgres, Process, Sink, exchange};
use anyhow::{Context, ensure};
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use warren_shared::topology::BUS;

const PATIENCE: Duration = Duration::from_secs(120);

/// A test's surroundings, with an outbox.
#[derive(Debug)]
pub struct Outbox {
    /// The broker's side.
    pub lab: Lab,
    /// The database.
    pub postgres: Postgres,
}

impl Outbox {
    /// On the servers that all tests share. The bus is there, with a queue for `order.#`.
    ///
    /// # Errors
    /// A server cannot be had.
    pub async fn new(name: &str) -> anyhow::Result<Self> {
        Self::of(Lab::new(name)?, Postgres::shared(name)?).await
    }

    /// On servers of the test's choice.
    ///
    /// # Errors
    /// The table cannot be made.
    pub async fn of(mut lab: Lab, postgres: Postgres) -> anyhow::Result<Self> {
        lab.set("DATABASE_URL", postgres.url());
        let outbox = Self { lab, postgres };
        exchange(&outbox.lab, BUS, &[("order.#", "quorum", 0)]).await?;
        expect_exit(&outbox.run(&["--apply"]).await?, 0)?;
        Ok(outbox)
    }

    /// Runs `relay` to its end.
    ///
    /// # Errors
    /// It cannot be started or does not end.
    pub async fn run(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = command("warren-publisher", &self.lab.environment);
        command.arg("relay").args(arguments);
        output(command, Vec::new()).await
    }

    /// Runs `relay --once`; returns its account.
    ///
    /// # Errors
    /// It ends with another code.
    pub async fn once(&self, code: i32) -> anyhow::Result<Value> {
        let (stdout, _) = expect_exit(&self.run(&["--once"]).await?, code)?;
        Ok(serde_json::from_str(stdout.lines().last().context("an account")?)?)
    }

    /// Starts a relay, with a log of this name.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn relay(&self, name: &str, arguments: &[&str]) -> anyhow::Result<Process> {
        let mut command = command("warren-publisher", &self.lab.environment);
        command.arg("relay").args(arguments);
        Process::start(command, &self.lab.path(&format!("{name}.log")))
    }

    /// A connection to the database.
    ///
    /// # Errors
    /// It does not take it.
    pub async fn client(&self) -> anyhow::Result<Client> {
        self.postgres.client().await
    }

    /// Hears all that is published, from a queue of its own.
    ///
    /// # Errors
    /// The broker cannot be reached.
    pub async fn sink(&self) -> anyhow::Result<Sink> {
        Sink::listen(&self.lab.url(), "all", BUS, "order.#").await
    }

    /// Waits until no row waits.
    ///
    /// # Errors
    /// It does not come to that in time.
    pub async fn empty(&self) -> anyhow::Result<()> {
        let since = Instant::now();
        loop {
            let left = match self.client().await {
                Ok(client) => number(&client, "SELECT count(*) FROM warren_outbox WHERE sent_at IS NULL").await.ok(),
                Err(_) => None,
            };
            if left == Some(0) {
                return Ok(());
            }
            ensure!(since.elapsed() < PATIENCE, "{left:?} rows are left{}", self.lab.logs());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Draws up the account: every committed row was heard, each key's first copies in order. Returns the repeats.
    ///
    /// # Errors
    /// Some row is lost, of nobody, or out of order.
    pub async fn account(&self, written: &Written, sink: &Sink) -> anyhow::Result<usize> {
        self.empty().await?;
        let wanted: HashSet<&String> = written.committed.iter().collect();
        let since = Instant::now();
        while sink.distinct().len() < wanted.len() && since.elapsed() < Duration::from_secs(30) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let (all, first) = (sink.heard().len(), sink.distinct());
        let heard: HashSet<String> = first.iter().map(|event| event.id().to_owned()).collect();
        let lost = wanted.iter().filter(|id| !heard.contains(**id)).count();
        // A commit that the server never answered may have happened.
        let known: HashSet<&String> = written.committed.iter().chain(&written.unknown).collect();
        let strange = heard.iter().filter(|id| !known.contains(id)).count();
        let mut last: HashMap<String, i64> = HashMap::new();
        let mut inversions = 0;
        for event in &first {
            let data: Value = event.json()?;
            let n = data["n"].as_i64().context("a number")?;
            let before = last.insert(event.key().into_owned(), n).unwrap_or(-1);
            inversions += usize::from(before > n);
        }
        let sent = "SELECT count(*) FROM warren_outbox WHERE sent_at IS NOT NULL";
        let confirmed = number(&self.client().await?, sent).await?;
        println!(
            "ledger: published {}, confirmed {confirmed}, repeats {}, inversions {inversions}, lost {lost}",
            wanted.len(),
            all - first.len()
        );
        ensure!(lost == 0 && inversions == 0 && strange == 0, "{strange} of nobody{}", self.lab.logs());
        ensure!(confirmed == i64::try_from(first.len())?, "{confirmed} marked, {} heard", first.len());
        self.lab.tell();
        Ok(all - first.len())
    }
}

/// What a query counts.
///
/// # Errors
/// The query fails, or gives no number.
pub async fn number(client: &Client, sql: &str) -> anyhow::Result<i64> {
    Ok(client.query_one(sql, &[]).await?.try_get(0)?)
}

/// Ids that writers committed, and such as may be committed.
#[derive(Debug, Default)]
pub struct Written {
    /// Ids of rows whose commit was answered.
    pub committed: Vec<String>,
    /// Ids of rows whose commit was not.
    pub unknown: Vec<String>,
}

/// Writers that fill the outbox, each with keys of its own, until they are told to end; they outlive the database.
#[derive(Debug)]
pub struct Writers {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Written>>,
}

impl Writers {
    /// Starts so many, each with a pause between its transactions.
    #[must_use]
    pub fn start(url: &str, count: usize, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let task = |writer| tokio::spawn(write(url.to_owned(), writer, pause, stop.clone()));
        Self { tasks: (0..count).map(task).collect(), stop }
    }

    /// Ends them; returns what they wrote.
    ///
    /// # Errors
    /// One of them panicked.
    pub async fn end(self) -> anyhow::Result<Written> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Written::default();
        for task in self.tasks {
            let written = task.await?;
            all.committed.extend(written.committed);
            all.unknown.extend(written.unknown);
        }
        Ok(all)
    }
}

/// Transactions of several rows; every seventh is rolled back.
async fn write(url: String, writer: usize, pause: Duration, stop: Arc<AtomicBool>) -> Written {
    let (mut written, mut n) = (Written::default(), 0_i64);
    while !stop.load(Ordering::Relaxed) {
        let Ok((mut client, connection)) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        tokio::spawn(async move {
            let _ = connection.await;
        });
        while !stop.load(Ordering::Relaxed) {
            let ids: Vec<String> = (0..4).map(|i| format!("w{writer}-{}", n + i)).collect();
            let rolled_back = n % 28 == 24;
            match transaction(&mut client, writer, n, &ids, rolled_back).await {
                Ok(()) if !rolled_back => written.committed.extend(ids),
                Ok(()) => {}
                Err(_) => {
                    written.unknown.extend(ids);
                    n += 4;
                    break;
                }
            }
            n += 4;
            tokio::time::sleep(pause).await;
        }
    }
    written
}

async fn transaction(c: &mut Client, writer: usize, n: i64, ids: &[String], rolled: bool) -> anyhow::Result<()> {
    let tx = c.transaction().await?;
    for (i, id) in (n..).zip(ids) {
        // Five keys a writer: nobody else writes them, so their order is that of the numbers.
        let (key, data) = (format!("w{writer}k{}", i % 5), format!("{{\"n\":{i}}}"));
        let sql = "INSERT INTO warren_outbox (event_id, source, type, key, data) \
                   VALUES ($1, '/tests', 'order.placed', $2, $3::text::json)";
        tx.execute(sql, &[id, &key, &data]).await?;
    }
    if rolled {
        tx.rollback().await?
    } else {
        tx.commit().await?
    }
    Ok(())
}
