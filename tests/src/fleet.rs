//! A fleet of test workers in a lab, and what `warren-worker status` says of it.
use crate::lab::{Lab, event};
use crate::ledger::Ledger;
use crate::process::{self, Process};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use warren_publisher::Broker;
use warren_shared::env::Secret;
use warren_shared::fleet::{line, seats};
use warren_shared::topology::BUS;
use warren_shared::{Event, Limits};

/// The workers, by name.
#[derive(Debug, Default)]
pub struct Fleet {
    /// Those that run.
    pub workers: BTreeMap<String, Process>,
    started: usize,
}

/// Who serves what, as the pool itself says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    /// Who is first in each queue's line.
    pub active: BTreeMap<String, String>,
    /// Whether that is, everywhere, whom the assignment names, with the standby behind.
    pub settled: bool,
    /// Workers heard.
    pub workers: usize,
}

impl Map {
    /// How many partitions each worker serves.
    #[must_use]
    pub fn loads(&self) -> Vec<usize> {
        let mut loads: HashMap<&str, usize> = HashMap::new();
        self.active.values().for_each(|worker| *loads.entry(worker).or_default() += 1);
        loads.into_values().collect()
    }

    /// Most and fewest partitions of a worker.
    #[must_use]
    pub fn spread(&self) -> usize {
        let loads = self.loads();
        let idle = loads.len() < self.workers;
        loads.iter().max().unwrap_or(&0) - if idle { 0 } else { *loads.iter().min().unwrap_or(&0) }
    }

    /// Partitions that are served by another.
    #[must_use]
    pub fn moved(&self, after: &Self) -> usize {
        self.active.iter().filter(|(queue, worker)| after.active.get(*queue) != Some(worker)).count()
    }

    /// What had to move at least: the surplus of each over what it has after.
    #[must_use]
    pub fn ideal(&self, after: &Self) -> usize {
        let count = |map: &Self, worker: &String| map.active.values().filter(|w| *w == worker).count();
        let workers: std::collections::BTreeSet<&String> = self.active.values().collect();
        workers.into_iter().map(|w| count(self, w).saturating_sub(count(after, w))).sum()
    }
}

impl Fleet {
    /// Starts one more worker; returns its name.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&mut self, lab: &Lab) -> anyhow::Result<String> {
        self.start_with(lab, &[])
    }

    /// Starts one more worker with more variables.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_with(&mut self, lab: &Lab, more: &[(&str, &str)]) -> anyhow::Result<String> {
        let name = format!("w{}", self.started);
        self.started += 1;
        let mut command = process::command("warren-test-worker", &lab.environment_of(&name, more));
        command.arg(lab.path(&format!("{name}.calls")));
        self.workers.insert(name.clone(), Process::start(command, &lab.path(&format!("{name}.log")))?);
        Ok(name)
    }

    /// Has so many workers run: starts some, or drains the first ones.
    ///
    /// # Errors
    /// One does not start or end well.
    pub async fn scale(&mut self, lab: &Lab, count: usize) -> anyhow::Result<()> {
        while self.workers.len() < count {
            self.start(lab)?;
        }
        let surplus: Vec<String> = self.workers.keys().take(self.workers.len() - count).cloned().collect();
        let mut leaving: Vec<Process> = surplus.iter().filter_map(|name| self.workers.remove(name)).collect();
        for worker in &leaving {
            worker.signal(rustix::process::Signal::TERM)?;
        }
        for worker in &mut leaving {
            let status = worker.wait(Duration::from_secs(60)).await?;
            ensure!(status.success(), "{status}\n{}", worker.log());
        }
        Ok(())
    }

    /// Drains one worker; returns how long that took.
    ///
    /// # Errors
    /// It does not end well.
    pub async fn drain(&mut self, name: &str) -> anyhow::Result<Duration> {
        let started = Instant::now();
        let mut worker = self.workers.remove(name).context("it runs")?;
        let status = worker.terminate(Duration::from_secs(60)).await?;
        ensure!(status.success(), "{status}\n{}", worker.log());
        Ok(started.elapsed())
    }

    /// Drains all of them.
    ///
    /// # Errors
    /// One does not end well.
    pub async fn stop(&mut self, lab: &Lab) -> anyhow::Result<()> {
        self.scale(lab, 0).await
    }
}

/// Events on their way to a pool at a steady rate, until they are told to stop.
#[derive(Debug)]
pub struct Load {
    stop: watch::Sender<bool>,
    feeding: JoinHandle<anyhow::Result<Vec<String>>>,
    sender: Process,
    rejects: PathBuf,
    fed: Arc<AtomicUsize>,
}

impl Load {
    /// How many were handed to the sender until now.
    #[must_use]
    pub fn fed(&self) -> usize {
        self.fed.load(Ordering::Relaxed)
    }

    /// Stops, and waits until everything is confirmed; returns the ids.
    ///
    /// # Errors
    /// Something was not confirmed.
    pub async fn finish(self) -> anyhow::Result<Vec<String>> {
        self.end().await.map(|(ids, _)| ids)
    }

    /// The same where the broker has no reason to refuse anything.
    ///
    /// # Errors
    /// Something was not confirmed, or refused.
    pub async fn finish_all(self) -> anyhow::Result<Vec<String>> {
        let (ids, refused) = self.end().await?;
        ensure!(refused == 0, "{refused} were refused");
        Ok(ids)
    }

    /// What was confirmed, and how many were refused.
    async fn end(mut self) -> anyhow::Result<(Vec<String>, usize)> {
        self.stop.send_replace(true);
        let mut ids = self.feeding.await??;
        self.sender.wait(Duration::from_secs(120)).await?;
        let account = self.sender.account()?;
        // What a queue without a leader refused is certainly not stored: those lines are the sender's to send again.
        let rejects = std::fs::read_to_string(&self.rejects).unwrap_or_default();
        let id = |line: &str| {
            let record: Value = serde_json::from_str(line).ok()?;
            let event: Value = serde_json::from_str(record["input"].as_str()?).ok()?;
            event["id"].as_str().map(str::to_owned)
        };
        let refused: HashSet<String> = rejects.lines().filter_map(id).collect();
        let fed = ids.len();
        ids.retain(|id| !refused.contains(id));
        if !refused.is_empty() {
            println!("{} of {fed} events were refused by the broker", refused.len());
        }
        let whole = account["read"] == fed && account["confirmed"] == ids.len() && account["unknown"] == 0;
        ensure!(whole, "{account}, of {fed} fed {} are not refused:\n{}", ids.len(), self.sender.log());
        let refused = fed - ids.len();
        Ok((ids, refused))
    }
}

impl Lab {
    /// Publishes so many events a second over so many keys, each key's numbered.
    ///
    /// # Errors
    /// The sender cannot be started.
    pub fn load(&self, rate: usize, keys: usize) -> anyhow::Result<Load> {
        self.load_of(rate, &[], move |n| {
            let mut event = event(&format!("e{n}"), "order.placed", &format!("k{}", n % keys), json!({}));
            event["sequence"] = json!(format!("{:07}", n / keys + 1));
            event
        })
    }

    /// Publishes so many events a second, made from their numbers.
    ///
    /// # Errors
    /// The sender cannot be started.
    pub fn load_of(
        &self,
        rate: usize,
        arguments: &[&str],
        make: impl Fn(usize) -> Value + Send + 'static,
    ) -> anyhow::Result<Load> {
        use tokio::io::AsyncWriteExt;
        const STEPS: usize = 50;
        let number = self.loads.fetch_add(1, Ordering::Relaxed);
        let mut command = process::command("warren-publisher", &self.environment);
        let rejects = self.path(&format!("load{number}.rejects"));
        command.arg("send").args(arguments).arg("--rejects").arg(&rejects).arg("-");
        let (sender, mut stdin) = Process::start_fed(command, &self.path(&format!("load{number}.log")))?;
        let (stop, stopped) = watch::channel(false);
        let fed = Arc::<AtomicUsize>::default();
        let counted = fed.clone();
        let feeding = tokio::spawn(async move {
            let mut step = tokio::time::interval(Duration::from_millis(1000 / STEPS as u64));
            let (mut ids, mut due) = (Vec::new(), 0.0);
            while !*stopped.borrow() {
                step.tick().await;
                due += rate as f64 / STEPS as f64;
                let mut lines = String::new();
                while (ids.len() as f64) < due {
                    let event = make(ids.len());
                    ids.push(event["id"].as_str().context("an id")?.to_owned());
                    counted.store(ids.len(), Ordering::Relaxed);
                    lines.push_str(&format!("{event}\n"));
                }
                stdin.write_all(lines.as_bytes()).await.context("the sender ended")?;
            }
            Ok(ids)
        });
        Ok(Load { stop, feeding, sender, rejects, fed })
    }

    /// Waits until all these events have their outcomes and all effects are on the bus; returns the account.
    ///
    /// # Errors
    /// They do not in time.
    pub async fn tally(&self, ids: &[String], patience: Duration) -> anyhow::Result<Ledger> {
        let distinct = ids.iter().collect::<std::collections::HashSet<_>>().len();
        self.settled(distinct, patience).await?;
        let recorded: Vec<Event> = self
            .take_all("effects")
            .await?
            .into_iter()
            .filter_map(|message| message.read(Limits::default(), String::new).ok().map(|incoming| incoming.event))
            .collect();
        self.told.store(true, Ordering::Relaxed);
        Ledger::add_up(ids, &recorded, &self.dead().await?)
    }

    /// What `warren-worker status --json` says.
    ///
    /// # Errors
    /// It says nothing.
    pub async fn status(&self) -> anyhow::Result<Value> {
        let output = self.run(&["status", "--json"]).await?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(stdout.trim()).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Who serves what, as so many workers tell.
    ///
    /// # Errors
    /// The pool cannot be asked.
    pub async fn map(&self, workers: usize) -> anyhow::Result<Map> {
        let topology = self.topology()?;
        let urls = self.environment.iter().find(|(name, _)| name == "AMQP_URL").map(|(_, url)| url.clone());
        let broker = Broker::new(Secret::new(urls.context("AMQP_URL")?), "test");
        let words = warren_worker::fleet::ask(broker, &topology, Duration::from_secs(30), workers).await?;
        let queues = topology.queues();
        let lanes = topology.lanes.iter().flat_map(|lane| vec![lane.name.as_str(); topology.partitions.into()]);
        let partitions: Vec<(&str, &str)> = lanes.zip(queues.iter().map(String::as_str)).collect();
        let mut map = Map { active: BTreeMap::new(), settled: true, workers: words.len() };
        for (queue, seat) in queues.iter().zip(seats(&partitions, words.iter())) {
            let line: Vec<&str> = line(&words, queue).into_iter().map(|(_, name)| name).collect();
            let wanted = [&seat.owner, &seat.standby].into_iter().flatten();
            map.settled &= wanted.map(|member| member.name.as_str()).eq(line.iter().copied());
            if let Some(first) = line.first() {
                map.active.insert(queue.clone(), (*first).to_owned());
            }
        }
        map.settled &= map.active.len() == queues.len();
        Ok(map)
    }

    /// Waits until so many workers have found their places, standbys too; returns them and how long that took.
    ///
    /// # Errors
    /// They do not in time.
    pub async fn balanced(&self, workers: usize, patience: Duration) -> anyhow::Result<(Map, Duration)> {
        let balanced = |map: &Map| map.settled && map.workers == workers && map.spread() <= 1;
        self.until_map(workers, patience, balanced).await.context("not balanced")
    }

    /// Waits until the pool's map is like that; returns it and how long that took.
    ///
    /// # Errors
    /// It is not in time.
    pub async fn until_map(
        &self,
        workers: usize,
        patience: Duration,
        ready: impl Fn(&Map) -> bool,
    ) -> anyhow::Result<(Map, Duration)> {
        let started = Instant::now();
        loop {
            let map = self.map(workers).await?;
            if ready(&map) {
                return Ok((map, started.elapsed()));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
            ensure!(started.elapsed() < patience, "not within {patience:?}: {map:?}{}", self.logs());
        }
    }

    /// Which partition each of these keys goes to: the topology must be declared, and nobody consume yet.
    ///
    /// # Errors
    /// The broker cannot be asked.
    pub async fn places(&self, keys: impl Iterator<Item = String>) -> anyhow::Result<HashMap<String, String>> {
        let (keys, queues) = (keys.collect::<Vec<_>>(), self.topology()?.queues());
        let (_connection, channel) = self.channel().await?;
        channel.confirm_select(Default::default()).await?;
        for key in &keys {
            let properties = lapin::BasicProperties::default().with_correlation_id(key.as_str().into());
            let exchange = format!("warren.{}.normal", self.name);
            channel
                .basic_publish(exchange.as_str().into(), "".into(), Default::default(), b"", properties)
                .await?
                .await?;
        }
        let mut places = HashMap::new();
        let started = Instant::now();
        while places.len() < keys.len() {
            ensure!(started.elapsed() < Duration::from_secs(60), "{} of {} keys came back", places.len(), keys.len());
            for queue in queues.iter().filter(|queue| queue.contains(".normal.")) {
                for message in self.take_all(queue).await? {
                    places.insert(message.correlation_id.unwrap_or_default(), queue.clone());
                }
            }
        }
        Ok(places)
    }

    /// Has everything that the handlers emit gather in a queue, which is counted at the end. Declare the topology first.
    ///
    /// # Errors
    /// The bus is not declared.
    pub async fn gather(&self) -> anyhow::Result<()> {
        let (_connection, channel) = self.channel().await?;
        let options = lapin::options::QueueDeclareOptions { durable: true, ..Default::default() };
        let mut arguments = lapin::types::FieldTable::default();
        // Replicated where there are several nodes: they may be killed.
        arguments.insert("x-queue-type".into(), lapin::types::AMQPValue::LongString("quorum".into()));
        channel.queue_declare("effects".into(), options, arguments).await?;
        channel
            .queue_bind("effects".into(), BUS.into(), "test.recorded".into(), Default::default(), Default::default())
            .await?;
        Ok(())
    }
}
