//! A process of five steps in a line: process and steps in one worker, whose Rust handlers do nothing but let it answer.
use super::{Task, say, warren as client};
use crate::events::{KIND, short};
use anyhow::Context;
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use tokio::sync::watch;
use warren_shared::topology::BUS;
use warren_worker::{Reply, Worker};

/// Steps of an instance.
pub(crate) const STEPS: u64 = 5;

/// A loaded event starts an instance.
fn definition() -> Value {
    let step = |n: u64| {
        let after = Vec::from_iter((n > 1).then(|| name(n - 1)));
        (name(n), json!({"do": format!("step.{}", name(n)), "after": after, "final": true}))
    };
    let steps: Map<String, Value> = (1..=STEPS).map(step).collect();
    json!({"processes": [{"name": "line", "on": KIND, "steps": steps}]})
}

fn name(n: u64) -> String {
    format!("s{n}")
}

/// Takes all instances to their end, from the start of the worker until the last one's `line.completed` has come.
pub(crate) async fn warren(task: Task) -> anyhow::Result<()> {
    let settings = client::settings(&task.url, &task.store_url(), Some(&definition().to_string()))?;
    let built = Worker::builder(settings).handle("step.*", |_, _| std::future::ready(Ok(Reply::done()))).build();
    let worker = built.map_err(|mistakes| anyhow::anyhow!("{mistakes:?}"))?;
    let connection = Connection::connect(&task.url, ConnectionProperties::default()).await?;
    let mut ends = listen(&connection).await?;
    let all = watch::Sender::new(false);
    let finished = all.subscribe();
    say("first");
    let running = tokio::spawn(client::run(worker, finished));
    // One that is published again has the same id.
    let mut ended = HashSet::new();
    while ended.len() as u64 * STEPS < task.count {
        let end = tokio::select! {
            end = ends.next() => end.context("the consumer ended")??,
            () = all.closed() => break,
        };
        ended.insert(end.properties.message_id().clone().context("an event without id")?.to_string());
    }
    all.send_replace(true);
    running.await??;
    let _ = connection.close(200, short("done")).await;
    anyhow::ensure!(ended.len() as u64 * STEPS == task.count, "the worker ended before its instances");
    Ok(())
}

/// Who hears of ends: a queue of the benchmark's own, without acks.
async fn listen(connection: &Connection) -> anyhow::Result<lapin::Consumer> {
    let (channel, queue) = (connection.create_channel().await?, short("bench.ends"));
    let own = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
    channel.queue_declare(queue.clone(), own, FieldTable::default()).await?;
    let key = short("line.completed");
    channel.queue_bind(queue.clone(), short(BUS), key, QueueBindOptions::default(), FieldTable::default()).await?;
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    Ok(channel.basic_consume(queue, short(""), options, FieldTable::default()).await?)
}
