//! One run's place: a vhost with the pool's topology, a directory for the store, and where it is asked for a database.
use crate::bench::{Bench, delete, dir};
use crate::clients::warren;
use crate::events::short;
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use warren_publisher::{Broker, declare};
use warren_shared::env::Secret;
use warren_shared::lane::NORMAL;
use warren_shared::topology::Topology;
use warren_tests::{Postgres, Rabbit};

/// A vhost, a directory and a database, deleted when dropped.
pub(crate) struct Site<'a> {
    bench: &'a Bench,
    vhost: String,
    dir: PathBuf,
    topology: Topology,
    database: Option<Postgres>,
}

/// The broker is still busy with what was just confirmed.
const SETTLE: Duration = Duration::from_millis(300);
/// How long acks may take through a queue's log.
const PATIENCE: Duration = Duration::from_secs(1);

impl<'a> Site<'a> {
    pub(crate) fn new(bench: &'a Bench, number: u32) -> anyhow::Result<Self> {
        let vhost = format!("bench-{}-{number}", std::process::id());
        let dir = dir().join(&vhost);
        delete(&dir);
        std::fs::create_dir_all(&dir)?;
        bench.calm();
        bench.rabbit.api("PUT", &format!("vhosts/{vhost}"), None)?;
        let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
        bench.rabbit.api("PUT", &format!("permissions/{vhost}/guest"), Some(all))?;
        let url = format!("{}/{vhost}", bench.rabbit.amqp);
        let worker = warren::worker(warren::settings(&url, &warren::file("unused"), None)?, |_| {})?;
        let site = Self { bench, vhost, dir, topology: worker.topology(), database: None };
        bench.runtime.block_on(async {
            let link = Broker::new(Secret::new(site.url()), "warren-bench").connect("topology").await?;
            let declared = declare::apply(&link, &site.topology.declarations()).await;
            link.close().await;
            anyhow::Ok(declared?)
        })?;
        Ok(site)
    }

    /// The same with a fresh database on the PostgreSQL server of this checkout.
    pub(crate) fn on_postgres(mut self) -> anyhow::Result<Self> {
        self.database = Some(Postgres::shared(&self.vhost)?);
        Ok(self)
    }

    /// The database, where this run has one.
    pub(crate) fn database(&self) -> Option<&Postgres> {
        self.database.as_ref()
    }

    /// The broker's URL with this vhost.
    pub(crate) fn url(&self) -> String {
        format!("{}/{}", self.bench.rabbit.amqp, self.vhost)
    }

    /// The partitions.
    pub(crate) fn queues(&self) -> Vec<String> {
        (0..self.topology.partitions).map(|partition| self.topology.partition(NORMAL, partition)).collect()
    }

    /// A file of this run.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The store's file.
    pub(crate) fn store(&self) -> PathBuf {
        self.path("warren.db")
    }

    /// How many events lie in the partitions, while nobody consumes; waits a moment for it to be so many.
    pub(crate) fn depth(&self, expected: u64) -> anyhow::Result<u64> {
        let begun = Instant::now();
        loop {
            let depth = self.bench.runtime.block_on(self.count())?;
            if depth == expected || begun.elapsed() > PATIENCE {
                return Ok(depth);
            }
            std::thread::sleep(SETTLE);
        }
    }

    async fn count(&self) -> anyhow::Result<u64> {
        let connection = Connection::connect(&self.url(), ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        let (passive, mut depth) = (QueueDeclareOptions { passive: true, ..Default::default() }, 0);
        for queue in self.queues() {
            let found = channel.queue_declare(short(&queue), passive, FieldTable::default()).await?;
            depth += u64::from(found.message_count());
        }
        connection.close(200, short("counted")).await?;
        Ok(depth)
    }

    /// Fills the partitions with so many events of a series.
    pub(crate) fn load(&self, series: u64, count: u64) -> anyhow::Result<()> {
        self.bench.runtime.block_on(crate::load::load(&self.url(), series, count))?;
        std::thread::sleep(SETTLE);
        self.bench.calm();
        Ok(())
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        // What is left over is swept by the next harness.
        let _ = self.bench.rabbit.api("DELETE", &format!("vhosts/{}", self.vhost), None);
        delete(&self.dir);
    }
}

/// Deletes what harnesses that were killed left behind.
pub(crate) fn sweep(rabbit: &Rabbit) -> anyhow::Result<()> {
    let dead = |name: &str| {
        let pid = name.strip_prefix("bench-")?.split('-').next()?.parse::<u32>().ok()?;
        (!PathBuf::from(format!("/proc/{pid}")).exists()).then(|| name.to_owned())
    };
    let vhosts = rabbit.api("GET", "vhosts", None)?;
    let names = vhosts.as_array().into_iter().flatten().filter_map(|vhost| vhost["name"].as_str());
    for name in names.filter_map(dead) {
        rabbit.api("DELETE", &format!("vhosts/{name}"), None)?;
    }
    let entries = std::fs::read_dir(dir()).into_iter().flatten().flatten();
    let left = entries.filter(|entry| entry.file_name().to_str().and_then(dead).is_some());
    left.for_each(|entry| delete(&entry.path()));
    Ok(())
}
