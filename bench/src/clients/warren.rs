//! Warren, embedded: a Rust handler that does nothing, the SQLite or the PostgreSQL store, the settings' defaults.
use super::{Progress, Task, say};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use warren_shared::Event;
use warren_shared::env::Settings;
use warren_worker::{Reply, Worker};

/// Queues a lane.
const PARTITIONS: &str = "8";

/// The settings of a worker: the defaults but for a single lane and eight partitions; WARREN_… of our own environment
/// goes before, to try things out.
pub(crate) fn settings(url: &str, database: &str, routes: Option<&str>) -> anyhow::Result<Settings> {
    let mut map = BTreeMap::new();
    let mut set = |name: &str, value: &str| map.insert(name.to_owned(), value.to_owned());
    set("WARREN_POOL", "bench");
    set("WARREN_LANES", "normal:1");
    set("WARREN_PARTITIONS", PARTITIONS);
    set("AMQP_URL", url);
    set("DATABASE_URL", database);
    if let Some(routes) = routes {
        set("WARREN_ROUTES", routes);
    }
    map.extend(std::env::vars().filter(|(name, _)| name.starts_with("WARREN_")));
    Settings::read(&map).map_err(|mistakes| anyhow::anyhow!("{mistakes:?}"))
}

/// A store's file as DATABASE_URL.
pub(crate) fn file(store: &str) -> String {
    format!("sqlite://{store}")
}

/// A worker whose handler calls a function.
pub(crate) fn worker<F>(settings: Settings, handled: F) -> anyhow::Result<Worker>
where
    F: Fn(&Event) + Send + Sync + 'static,
{
    let handle = move |event: Event, _| {
        handled(&event);
        std::future::ready(Ok(Reply::done()))
    };
    let built = Worker::builder(settings).handle(crate::events::KIND, handle).build();
    built.map_err(|mistakes| anyhow::anyhow!("{mistakes:?}"))
}

/// Takes everything, with a handler that does nothing.
pub(crate) async fn drain(task: Task) -> anyhow::Result<()> {
    take(task, |_| {}).await
}

pub(super) async fn take<F>(task: Task, read: F) -> anyhow::Result<()>
where
    F: Fn(&Event) + Send + Sync + 'static,
{
    let progress = Arc::new(Progress::new(task.count));
    let finished = progress.finished();
    let worker = worker(settings(&task.url, &task.store_url(), None)?, move |event| {
        read(event);
        progress.step();
    })?;
    run(worker, finished).await
}

/// Runs a worker until its handlers have had all; its drain sees to their acks.
pub(super) async fn run(worker: Worker, mut finished: watch::Receiver<bool>) -> anyhow::Result<()> {
    let (stop, stops) = mpsc::unbounded_channel();
    let running = tokio::spawn(worker.run(stops));
    if finished.wait_for(|finished| *finished).await.is_ok() {
        let _ = stop.send(());
    }
    running.await??;
    say("last");
    Ok(())
}
