//! One statement an event, in a transaction with the event's inbox row: by Warren, and by hand.
use super::{Progress, Task, say, warren as client};
use crate::events::{KIND, Said, mix, short};
use anyhow::Context;
use futures_util::StreamExt;
use futures_util::stream::select_all;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use std::sync::Arc;
use uuid::Uuid;
use warren_shared::Event;
use warren_worker::tokio_postgres::{NoTls, connect};
use warren_worker::{Failure, Reply, Tx, Worker};

/// Rows that the statement finds one of.
pub(crate) const ACCOUNTS: u64 = 10_000;
const CHANGE: &str = "UPDATE account SET balance = balance + 1 WHERE id = $1";

const PREFETCH: u16 = 200;

/// The account of the n-th event.
fn account(said: &Said) -> i32 {
    (mix(said.n) % ACCOUNTS) as i32
}

/// A transactional handler, the settings' defaults.
pub(crate) async fn warren(task: Task) -> anyhow::Result<()> {
    let progress = Arc::new(Progress::new(task.count));
    let finished = progress.finished();
    let handle = move |event: Event, tx: Tx, _| {
        let progress = progress.clone();
        async move {
            let said = event.json::<Said>().map_err(|error| Failure::dead(error.to_string()))?;
            tx.execute(CHANGE, &[&account(&said)]).await?;
            progress.step();
            Ok(Reply::done())
        }
    };
    let settings = client::settings(&task.url, task.database()?, None)?;
    let built = Worker::builder(settings).handle_tx(KIND, handle).build();
    client::run(built.map_err(|mistakes| anyhow::anyhow!("{mistakes:?}"))?, finished).await
}

/// As it is usually written: one connection, one message after the other, statements prepared, an ack each.
pub(crate) async fn by_hand(task: Task) -> anyhow::Result<()> {
    let (mut client, connection) = connect(task.database()?, NoTls).await?;
    tokio::spawn(connection);
    let record = client.prepare("INSERT INTO inbox VALUES ($1) ON CONFLICT DO NOTHING").await?;
    let change = client.prepare(CHANGE).await?;

    let broker = Connection::connect(&task.url, ConnectionProperties::default()).await?;
    let channel = broker.create_channel().await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let mut consumers = Vec::new();
    for queue in &task.queues {
        let tag = short(queue);
        consumers.push(
            channel.basic_consume(tag.clone(), tag, BasicConsumeOptions::default(), FieldTable::default()).await?,
        );
    }
    let mut deliveries = select_all(consumers);
    let progress = Progress::new(task.count);
    for _ in 0..task.count {
        let delivery = deliveries.next().await.context("the consumers ended")??;
        let id = delivery.properties.message_id().as_ref().context("a message without id")?;
        let (id, said) = (Uuid::parse_str(id.as_str())?, serde_json::from_slice::<Said>(&delivery.data)?);
        let transaction = client.transaction().await?;
        if transaction.execute(&record, &[&id]).await? == 1 {
            transaction.execute(&change, &[&account(&said)]).await?;
        }
        transaction.commit().await?;
        delivery.ack(BasicAckOptions::default()).await?;
        progress.step();
    }
    // The broker has every ack once it agrees to close.
    let _ = broker.close(200, short("done")).await;
    say("last");
    Ok(())
}
