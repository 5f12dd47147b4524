//! One test's surroundings: a vhost, a store, a directory, and short names for what tests do.
use crate::broker::{Rabbit, root, scratch};
use crate::ledger::{Ledger, Sink};
use crate::postgres::Postgres;
use crate::process::{self, Process};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use warren_shared::Message;
use warren_shared::topology::{BUS, Topology};

/// A test's surroundings.
#[derive(Debug)]
pub struct Lab {
    /// The broker.
    pub rabbit: Rabbit,
    /// The vhost, which is also the pool.
    pub name: String,
    /// Files of this test.
    pub dir: PathBuf,
    /// The environment of its processes.
    pub environment: Vec<(String, String)>,
    /// The database, where the store is PostgreSQL.
    pub postgres: Option<Postgres>,
    workers: AtomicU32,
    pub(crate) loads: AtomicU32,
    /// What `send` read and the broker confirmed, and whether a whole ledger was printed.
    read: AtomicU64,
    confirmed: AtomicU64,
    pub(crate) told: AtomicBool,
}

impl Lab {
    /// A vhost on the shared broker.
    ///
    /// # Errors
    /// The broker cannot be had.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        Self::on(Rabbit::shared()?, name)
    }

    /// A vhost on a broker of its own, which the test may break.
    ///
    /// # Errors
    /// The broker cannot be had.
    pub fn with_own_broker(name: &str) -> anyhow::Result<Self> {
        Self::on(Rabbit::private(name)?, name)
    }

    /// A vhost on a broker of its own with more settings for its `rabbitmq.conf`.
    ///
    /// # Errors
    /// The broker cannot be had.
    pub fn with_own_broker_set(name: &str, conf: &str) -> anyhow::Result<Self> {
        Self::on(Rabbit::private_with(name, conf)?, name)
    }

    /// A vhost on this broker.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn on_broker(rabbit: Rabbit, name: &str) -> anyhow::Result<Self> {
        Self::on(rabbit, name)
    }

    /// A vhost on a cluster of three nodes of its own, which the test may break. Processes know all of its nodes.
    ///
    /// # Errors
    /// The cluster cannot be had.
    pub fn with_own_cluster(name: &str) -> anyhow::Result<Self> {
        let mut lab = Self::on(Rabbit::cluster(name)?, name)?;
        let urls: Vec<String> =
            [&lab.rabbit.amqp].into_iter().chain(&lab.rabbit.others).map(|url| format!("{url}/{name}")).collect();
        lab.set("AMQP_URL", &urls.join(","));
        Ok(lab)
    }

    fn on(rabbit: Rabbit, name: &str) -> anyhow::Result<Self> {
        rabbit.api("DELETE", &format!("vhosts/{name}"), None).ok();
        rabbit.api("PUT", &format!("vhosts/{name}"), None)?;
        let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
        rabbit.api("PUT", &format!("permissions/{name}/guest"), Some(all))?;
        // Always the same place: what a failed test left can be read, and nothing piles up.
        let dir = scratch().join(name);
        std::fs::remove_dir_all(&dir).ok();
        std::fs::create_dir_all(&dir)?;
        // `make test STORE=postgres`: the same promises on the other store.
        let on_postgres = std::env::var("WARREN_TEST_STORE").is_ok_and(|store| store == "postgres");
        let postgres = if on_postgres { Some(Postgres::shared(name)?) } else { None };
        let mut lab = Self {
            rabbit,
            name: name.into(),
            dir,
            postgres,
            environment: Vec::new(),
            workers: AtomicU32::new(0),
            loads: AtomicU32::new(0),
            read: AtomicU64::new(0),
            confirmed: AtomicU64::new(0),
            told: AtomicBool::new(false),
        };
        let file = format!("sqlite://{}", lab.path("warren.db").display());
        let store = lab.postgres.as_ref().map_or(file, |postgres| postgres.url().to_owned());
        for (variable, value) in [
            ("AMQP_URL", lab.url().as_str()),
            ("DATABASE_URL", store.as_str()),
            ("WARREN_POOL", name),
            ("WARREN_PARTITIONS", "3"),
            ("WARREN_LANES", "normal:1"),
            ("WARREN_ROUTES", lab.ledger_route("").as_str()),
            // Beats, looks and moments of calm inside of the programs: none is waited for longer than a test has to.
            ("WARREN_TEST_PACE", "0.2"),
        ] {
            lab.set(variable, value);
        }
        Ok(lab)
    }

    /// The same with this database for its store.
    #[must_use]
    pub fn with_store(mut self, postgres: Postgres) -> Self {
        self.set("DATABASE_URL", postgres.url());
        self.postgres = Some(postgres);
        self
    }

    /// A file of this test.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The broker's URL with this test's vhost.
    #[must_use]
    pub fn url(&self) -> String {
        format!("{}/{}", self.rabbit.amqp, self.name)
    }

    /// Sets a variable for processes started from now on.
    pub fn set(&mut self, variable: &str, value: &str) {
        self.environment.retain(|(name, _)| name != variable);
        self.environment.push((variable.into(), value.into()));
    }

    /// A route for `order.#` with the ledger handler (`tests/handlers/ledger.py`), and more of its fields, such as
    /// `, timeout: 2s`. It notes its calls in the file `calls`.
    #[must_use]
    pub fn ledger_route(&self, more: &str) -> String {
        let handler = root().join("tests/handlers/ledger.py");
        let (handler, calls) = (handler.display(), self.path("calls"));
        format!("routes: [{{on: 'order.#', exec: [python3, '{handler}', '{}']{more}}}]", calls.display())
    }

    /// A route for `order.#` with the ledger handler, whose calls all emit under ids of their own: an effect that is
    /// recorded twice counts as `twice`, where derived ids would make it a mere repeat.
    #[must_use]
    pub fn fresh_route(&self, more: &str) -> String {
        self.ledger_route(more).replacen("']", "', fresh]", 1)
    }

    /// What the ledger handler noted: (pid, id, key, sequence, attempt) a call.
    #[must_use]
    pub fn calls(&self) -> Vec<[String; 5]> {
        let text = std::fs::read_to_string(self.path("calls")).unwrap_or_default();
        text.lines().filter_map(|line| line.split(' ').map(str::to_owned).collect::<Vec<_>>().try_into().ok()).collect()
    }

    /// Starts a worker.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn worker(&self) -> anyhow::Result<Process> {
        self.worker_with(&[])
    }

    /// Starts a worker with more variables.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn worker_with(&self, more: &[(&str, &str)]) -> anyhow::Result<Process> {
        let name = format!("w{}", self.workers.fetch_add(1, Ordering::Relaxed));
        let mut command = process::command("warren-worker", &self.environment_of(&name, more));
        command.arg("run");
        Process::start(command, &self.path(&format!("{name}.log")))
    }

    /// The environment of a worker of this name, with more variables.
    #[must_use]
    pub fn environment_of(&self, name: &str, more: &[(&str, &str)]) -> Vec<(String, String)> {
        let mut environment = self.environment.clone();
        environment.push(("WARREN_WORKER_ID".into(), name.to_owned()));
        environment.extend(more.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        environment
    }

    /// Runs a command of the worker to its end.
    ///
    /// # Errors
    /// It cannot be started or does not end.
    pub async fn run(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = process::command("warren-worker", &self.environment);
        command.args(arguments);
        process::output(command, Vec::new()).await
    }

    /// Declares the pool's topology.
    ///
    /// # Errors
    /// What the command said.
    pub async fn declare(&self) -> anyhow::Result<()> {
        process::expect_exit(&self.run(&["topology", "--apply"]).await?, 0).map(|_| ())
    }

    /// Sends lines with `warren-publisher send -`; returns its account and its stderr.
    ///
    /// # Errors
    /// It cannot be started, or prints no account.
    pub async fn send_raw(&self, input: Vec<u8>, arguments: &[&str]) -> anyhow::Result<(Value, String)> {
        let mut command = process::command("warren-publisher", &self.environment);
        command.arg("send").args(arguments).arg("-");
        let output = process::output(command, input).await?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let line = stdout.lines().last().with_context(|| format!("no account; stderr: {stderr}"))?;
        let account: Value = serde_json::from_str(line)?;
        self.read.fetch_add(account["read"].as_u64().unwrap_or(0), Ordering::Relaxed);
        self.confirmed.fetch_add(account["confirmed"].as_u64().unwrap_or(0), Ordering::Relaxed);
        Ok((account, stderr))
    }

    /// Sends events and expects all of them to be confirmed; returns their ids.
    ///
    /// # Errors
    /// Not all were confirmed.
    pub async fn send(&self, events: &[Value]) -> anyhow::Result<Vec<String>> {
        let lines: String = events.iter().map(|event| format!("{event}\n")).collect();
        let (account, stderr) = self.send_raw(lines.into_bytes(), &[]).await?;
        ensure!(account["confirmed"] == json!(events.len()), "{account}\n{stderr}");
        Ok(events.iter().filter_map(|event| event["id"].as_str().map(str::to_owned)).collect())
    }

    /// Starts `warren-publisher send` over a file with these events; its log is `send.log`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn sender(&self, events: &[Value], arguments: &[&str]) -> anyhow::Result<Process> {
        let file = self.path("events.jsonl");
        let lines: String = events.iter().map(|event| format!("{event}\n")).collect();
        std::fs::write(&file, lines)?;
        let mut command = process::command("warren-publisher", &self.environment);
        command.arg("send").args(arguments).arg(file);
        Process::start(command, &self.path("send.log"))
    }

    /// Ready messages and consumers of a queue; none where it does not exist.
    ///
    /// # Errors
    /// The broker cannot be reached.
    pub async fn depth(&self, queue: &str) -> anyhow::Result<Option<(u32, u32)>> {
        let (_connection, channel) = self.channel().await?;
        let options = lapin::options::QueueDeclareOptions { passive: true, ..Default::default() };
        let found = channel.queue_declare(queue.into(), options, lapin::types::FieldTable::default()).await;
        Ok(found.ok().map(|queue| (queue.message_count(), queue.consumer_count())))
    }

    /// Takes all messages out of a queue that nobody publishes to now.
    ///
    /// # Errors
    /// The broker cannot be reached, or holds some of them back.
    pub async fn take_all(&self, queue: &str) -> anyhow::Result<Vec<Message>> {
        use futures_util::StreamExt;
        let (_connection, channel) = self.channel().await?;
        let options = lapin::options::BasicConsumeOptions { no_ack: true, ..Default::default() };
        let mut consumer =
            channel.basic_consume(queue.into(), "".into(), options, lapin::types::FieldTable::default()).await?;
        let mut messages = Vec::new();
        let mut silent = Instant::now();
        // A node that was cut off knows an old depth for a moment: only with silence it means something.
        loop {
            if let Ok(next) = tokio::time::timeout(Duration::from_millis(500), consumer.next()).await {
                messages.push(warren_publisher::codec::read(next.context("the consumer ended")??));
                silent = Instant::now();
                continue;
            }
            let (ready, _) = self.depth(queue).await?.with_context(|| format!("there is no {queue}"))?;
            if ready == 0 {
                break;
            }
            ensure!(silent.elapsed() < Duration::from_secs(30), "{ready} more do not come out of {queue}");
        }
        Ok(messages)
    }

    /// Closes connections whose name holds a text, by the management interface; returns how many.
    ///
    /// # Errors
    /// The management interface does not answer.
    pub fn close_connections(&self, holding: &str) -> anyhow::Result<usize> {
        let names = self.connections(holding)?;
        let mut closed = 0;
        for name in names {
            let path: String = name.bytes().map(|b| format!("%{b:02x}")).collect();
            // One that has gone by itself is not listed at once as gone.
            closed += usize::from(self.rabbit.api("DELETE", &format!("connections/{path}"), None).is_ok());
        }
        Ok(closed)
    }

    /// Hears what the ledger handler emits. Declare the topology first.
    ///
    /// # Errors
    /// The bus is not declared.
    pub async fn recorded(&self) -> anyhow::Result<Sink> {
        Sink::listen(&self.url(), "recorded", BUS, "test.recorded").await
    }

    /// The dead letters: id and reason.
    ///
    /// # Errors
    /// They cannot be listed.
    pub async fn dead(&self) -> anyhow::Result<Vec<(String, String)>> {
        let output = self.run(&["dead", "list", "--json"]).await?;
        let (stdout, _) = process::expect_exit(&output, 0)?;
        let text = |letter: &Value, name: &str| letter[name].as_str().unwrap_or_default().to_owned();
        stdout
            .lines()
            .map(|line| serde_json::from_str(line).map(|letter| (text(&letter, "id"), text(&letter, "reason"))))
            .collect::<Result<_, _>>()
            .context("dead list --json prints JSON")
    }

    /// A whole ledger was printed: none is needed at the end.
    pub fn tell(&self) {
        self.told.store(true, Ordering::Relaxed);
    }

    /// How many events the store knows.
    #[must_use]
    pub fn inbox(&self) -> usize {
        if let Some(postgres) = &self.postgres {
            // A table a period; the transition from one to the next writes to both.
            let count = "SELECT coalesce(sum((xpath('//n/text()', query_to_xml(format(
                'SELECT count(*) AS n FROM {s}.inbox_%s', period), false, true, '')))[1]::text::bigint), 0)::bigint
                FROM {s}.periods";
            return postgres.number(&self.in_schema(count)).map_or(0, |n| usize::try_from(n).unwrap_or(0));
        }
        let sealed = self.ask("SELECT coalesce(sum(identities), 0) FROM runs");
        let recent = self.ask("SELECT coalesce(sum(length(identities)), 0) / 16 FROM inbox");
        sealed.unwrap_or(0) + recent.unwrap_or(0)
    }

    /// SQL about the pool's schema, which is written `{s}`.
    #[must_use]
    pub fn in_schema(&self, sql: &str) -> String {
        sql.replace("{s}", &format!("warren_{}", self.name.replace('-', "_")))
    }

    /// Outbox rows that were not published yet.
    #[must_use]
    pub fn outbox(&self) -> usize {
        self.count("outbox").unwrap_or(usize::MAX)
    }

    /// Recorded starts that did not end: none once the pool is at rest.
    #[must_use]
    pub fn starts(&self) -> usize {
        self.count("starts").unwrap_or(usize::MAX)
    }

    /// Those of them that name a worker.
    #[must_use]
    pub fn starts_of(&self, worker: &str) -> usize {
        let runs = if self.postgres.is_some() { "runs::text" } else { "runs" };
        self.count(&format!("starts WHERE {runs} LIKE '%{worker}#%'")).unwrap_or(usize::MAX)
    }

    /// Messages that wait in the partitions, ready to be delivered.
    ///
    /// # Errors
    /// A partition is not declared.
    pub async fn queued(&self) -> anyhow::Result<u32> {
        let (_connection, channel) = self.channel().await?;
        let mut sum = 0;
        for queue in self.topology()?.queues() {
            let options = lapin::options::QueueDeclareOptions { passive: true, ..Default::default() };
            sum += channel.queue_declare(queue.into(), options, Default::default()).await?.message_count();
        }
        Ok(sum)
    }

    /// Waits until no partition holds anything.
    ///
    /// # Errors
    /// That does not come to be in time.
    pub async fn at_rest(&self, patience: Duration) -> anyhow::Result<()> {
        let started = Instant::now();
        while self.queued().await? > 0 {
            ensure!(started.elapsed() < patience, "events still wait{}", self.logs());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// Whether somebody holds the store's lock for writing, for longer than a transaction takes.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn store_is_locked(&self) -> anyhow::Result<bool> {
        let store = rusqlite::Connection::open(self.path("warren.db"))?;
        store.busy_timeout(Duration::from_millis(500))?;
        Ok(store.execute_batch("BEGIN IMMEDIATE; ROLLBACK").is_err())
    }

    fn count(&self, table: &str) -> anyhow::Result<usize> {
        if let Some(postgres) = &self.postgres {
            let count = postgres.number(&self.in_schema(&format!("SELECT count(*) FROM {{s}}.{table}")))?;
            return Ok(usize::try_from(count)?);
        }
        self.ask(&format!("SELECT count(*) FROM {table}"))
    }

    fn ask(&self, sql: &str) -> anyhow::Result<usize> {
        let store = rusqlite::Connection::open(self.path("warren.db"))?;
        store.busy_timeout(Duration::from_secs(5))?;
        let rows: i64 = store.query_row(sql, [], |row| row.get(0))?;
        Ok(usize::try_from(rows)?)
    }

    /// Waits until the store knows so many events and has published everything that they sent.
    ///
    /// # Errors
    /// It does not come to that in time.
    pub async fn settled(&self, events: usize, patience: Duration) -> anyhow::Result<()> {
        let state =
            || format!("{} of {events} in the inbox, {} in the outbox{}", self.inbox(), self.outbox(), self.logs());
        let done = || self.inbox() >= events && self.outbox() == 0;
        until_or(patience, done, state).await
    }

    /// Waits until these events have their outcomes and all that they sent was heard; returns the account.
    ///
    /// # Errors
    /// It does not come to that in time.
    pub async fn account(&self, ids: &[String], recorded: &Sink, patience: Duration) -> anyhow::Result<Ledger> {
        let distinct = ids.iter().collect::<std::collections::HashSet<_>>().len();
        self.settled(distinct, patience).await?;
        let dead = self.dead().await?;
        let died = dead.iter().map(|(id, _)| id).collect::<std::collections::HashSet<_>>().len();
        let heard = || recorded.distinct().len() + died >= distinct;
        until_or(patience, heard, || format!("{} heard of {distinct}, {died} dead", recorded.distinct().len())).await?;
        self.told.store(true, Ordering::Relaxed);
        Ledger::of(ids, recorded, &dead)
    }

    /// Whether the handler saw each key's events in their order, repeats aside.
    ///
    /// # Errors
    /// It saw one after a later one.
    pub fn calls_in_order(&self) -> anyhow::Result<()> {
        let (mut seen, mut last) = (std::collections::HashSet::new(), std::collections::HashMap::new());
        for [_, id, key, sequence, _] in self.calls() {
            if sequence != "-" && seen.insert(id.clone()) {
                let before = last.insert(key.clone(), sequence.clone()).unwrap_or_default();
                ensure!(before < sequence, "{id}: the handler saw {sequence} of {key} after {before}");
            }
        }
        Ok(())
    }

    /// Waits until the store knows at least so many events.
    ///
    /// # Errors
    /// It does not come to that in time.
    pub async fn progressed(&self, events: usize, patience: Duration) -> anyhow::Result<()> {
        until_or(
            patience,
            || self.inbox() >= events,
            || format!("{} of {events} in the inbox{}", self.inbox(), self.logs()),
        )
        .await
    }

    /// The last lines of every process' log: they tell why.
    #[must_use]
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|e| e == "log") {
                let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
                let from = log.lines().count().saturating_sub(25);
                let tail: Vec<&str> = log.lines().skip(from).collect();
                text.push_str(&format!("\n--- {}\n{}", entry.path().display(), tail.join("\n")));
            }
        }
        text
    }

    /// The pool's topology, for queue names.
    ///
    /// # Errors
    /// The environment is wrong.
    pub fn topology(&self) -> anyhow::Result<Topology> {
        let map = self.environment.iter().cloned().collect();
        let s = warren_shared::env::Settings::read(&map).map_err(|m| anyhow::anyhow!("{m:?}"))?;
        let (pool, lanes, partitions) = (s.pool, s.lanes, s.partitions);
        let (queue_type, order) = (s.queue_type, s.order);
        Ok(Topology { pool, lanes, partitions, queue_type, order, subscriptions: Vec::new() })
    }

    /// A raw AMQP channel in this test's vhost; the connection closes when it is dropped.
    ///
    /// # Errors
    /// The broker cannot be reached.
    pub async fn channel(&self) -> anyhow::Result<(lapin::Connection, lapin::Channel)> {
        let mut why = None;
        // Of a cluster the first node that answers.
        for node in [&self.rabbit.amqp].into_iter().chain(&self.rabbit.others) {
            let url = format!("{node}/{}", self.name);
            match lapin::Connection::connect(&url, lapin::ConnectionProperties::default()).await {
                Ok(connection) => {
                    let channel = connection.create_channel().await?;
                    return Ok((connection, channel));
                }
                Err(error) => why = Some(error),
            }
        }
        Err(why.map_or_else(|| anyhow::anyhow!("no broker"), Into::into))
    }

    /// Closes connections from the broker's side, as an operator or a proxy does; returns how many were there.
    ///
    /// # Errors
    /// The management interface does not answer.
    pub fn close(&self, connections: &[String]) -> anyhow::Result<usize> {
        // One that has gone meanwhile is none to close.
        let close = |name: &&String| {
            let name = name.replace(' ', "%20").replace('>', "%3E").replace(':', "%3A");
            self.rabbit.api("DELETE", &format!("connections/{name}"), None).is_ok()
        };
        self.rabbit.api("GET", "overview", None)?;
        Ok(connections.iter().filter(close).count())
    }

    /// The names of this vhost's connections that hold a text.
    ///
    /// # Errors
    /// The management interface does not answer.
    pub fn connections(&self, holding: &str) -> anyhow::Result<Vec<String>> {
        let all = self.rabbit.api("GET", &format!("vhosts/{}/connections", self.name), None)?;
        let ours = |c: &Value| {
            let name = c["client_properties"]["connection_name"].as_str()?;
            name.contains(holding).then(|| c["name"].as_str().map(str::to_owned))?
        };
        Ok(all.as_array().into_iter().flatten().filter_map(ours).collect())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Where a test drew up no ledger of its own, what the store and the broker tell.
        if !self.told.load(Ordering::Relaxed) {
            let dead = self.rabbit.api("GET", &format!("queues/{0}/warren.{0}.dead", self.name), None);
            let dead = dead.ok().and_then(|queue| queue["messages"].as_u64()).unwrap_or(0);
            let inversions = usize::from(self.calls_in_order().is_err());
            println!(
                "ledger: published {}, confirmed {}, recorded {}, dead letters at the end {dead}, inversions {inversions}",
                self.read.load(Ordering::Relaxed),
                self.confirmed.load(Ordering::Relaxed),
                if self.postgres.is_some() || self.path("warren.db").exists() { self.inbox() } else { 0 },
            );
        }
        self.rabbit.api("DELETE", &format!("vhosts/{}", self.name), None).ok();
    }
}

/// Waits until a fact holds.
///
/// # Errors
/// It does not hold in time.
pub async fn until(what: &str, patience: Duration, fact: impl FnMut() -> bool) -> anyhow::Result<()> {
    until_or(patience, fact, || what.to_owned()).await
}

async fn until_or(patience: Duration, mut fact: impl FnMut() -> bool, what: impl Fn() -> String) -> anyhow::Result<()> {
    let started = Instant::now();
    while !fact() {
        ensure!(started.elapsed() < patience, "not within {patience:?}: {}", what());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// An event for the ledger handler.
#[must_use]
pub fn event(id: &str, kind: &str, key: &str, data: Value) -> Value {
    json!({"specversion": "1.0", "id": id, "source": "/tests", "type": kind, "partitionkey": key, "data": data})
}

/// So many events over so many keys, each key's numbered in `sequence`.
#[must_use]
pub fn events(count: usize, keys: usize) -> Vec<Value> {
    let number = |i: usize| {
        let mut event = event(&format!("e{i}"), "order.placed", &format!("k{}", i % keys), json!({"n": i}));
        event["sequence"] = json!(format!("{:06}", i / keys + 1));
        event
    };
    (0..count).map(number).collect()
}
