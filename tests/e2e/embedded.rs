//! The worker as a library: Rust functions as handlers, in this very process.
use anyhow::ensure;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use warren_shared::env::Settings;
use warren_shared::{Event, Limits};
use warren_tests::{Lab, event, until};
use warren_worker::{Failure, Reply, Worker};

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(serde::Deserialize)]
struct Order {
    total: u32,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rust_functions_handle_emit_fail_panic_and_hang() -> anyhow::Result<()> {
    let mut lab = Lab::new("embedded")?;
    lab.set("WARREN_ROUTES", "routes: [{on: 'unused', log: {}}]");
    let settings = Settings::read(&lab.environment.iter().cloned().collect())
        .map_err(|mistakes| anyhow::anyhow!("{mistakes:?}"))?;
    let panics = Arc::new(AtomicUsize::new(0));
    let counted = panics.clone();
    let worker = Worker::builder(settings)
        .handle_json("order.placed", |order: Order, cx| async move {
            let data = format!("{{\"id\":\"from {}\",\"total\":{}}}", cx.pool, order.total);
            let id = format!("recorded-{}", order.total);
            let entry = Event::new(id, "/tests", "test.recorded").map_err(Failure::dead)?;
            Ok(Reply::done().emit(entry.with_json(data.as_bytes(), Limits::default()).map_err(Failure::dead)?))
        })
        .handle("order.panics", move |_, _| {
            let counted = counted.clone();
            async move {
                ensure_calm(counted.fetch_add(1, Ordering::SeqCst));
                Ok(Reply::done())
            }
        })
        .handle("order.refused", |_, _| async { Err(Failure::dead("no such order")) })
        .build()
        .map_err(|mistakes| anyhow::anyhow!("{mistakes:?}"))?;
    lab.set("WARREN_SUBSCRIBE", "order.#");
    lab.declare().await?;
    let recorded = lab.recorded().await?;
    let (stop, stops) = tokio::sync::mpsc::unbounded_channel();
    let running = tokio::spawn(worker.run(stops));
    until("its bindings are there", PATIENCE, || {
        let bindings = lab.rabbit.api("GET", "bindings/embedded", None).unwrap_or_default();
        bindings.to_string().contains("order.refused")
    })
    .await?;

    lab.send(&[
        event("good", "order.placed", "a", json!({"total": 7})),
        event("misshapen", "order.placed", "b", json!({"sum": 7})),
        event("panics", "order.panics", "c", json!({})),
        event("refused", "order.refused", "d", json!({})),
    ])
    .await?;
    lab.settled(4, PATIENCE).await?;
    until("it is heard", PATIENCE, || recorded.distinct().len() == 1).await?;
    let mut dead = lab.dead().await?;
    dead.sort();
    let both = [("misshapen", "permanent"), ("refused", "permanent")].map(|(id, why)| (id.to_owned(), why.to_owned()));
    ensure!(dead == both, "{dead:?}");
    ensure!(panics.load(Ordering::SeqCst) == 2, "it panicked once and was tried again");
    stop.send(())?;
    tokio::time::timeout(PATIENCE, running).await???;
    Ok(())
}

fn ensure_calm(calls: usize) {
    assert!(calls > 0, "the first call panics");
}
