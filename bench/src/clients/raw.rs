//! lapin by hand: no promise is kept but the ack.
use super::{Progress, Task, say};
use crate::events::{self, short};
use crate::load::load;
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, ConnectionProperties};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const PREFETCH: u16 = 200;
const EVERY: u32 = 50;

/// When deliveries are acked.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Acks {
    /// Each by itself.
    Each,
    /// Fifty at a time, or what is there after a time.
    Multiple { flush: Option<Duration> },
}

/// Takes everything from the queues, a channel each.
pub(crate) async fn drain(task: Task, acks: Acks) -> anyhow::Result<()> {
    // Every byte is looked at, as by a handler that does something.
    let read = |body: &[u8]| {
        std::hint::black_box(body.iter().fold(0_u8, |sum, byte| sum ^ byte));
    };
    take(task, acks, read).await
}

pub(super) async fn take<F>(task: Task, acks: Acks, read: F) -> anyhow::Result<()>
where
    F: Fn(&[u8]) + Send + Sync + 'static,
{
    let (progress, read) = (Arc::new(Progress::new(task.count)), Arc::new(read));
    let connection = Connection::connect(&task.url, ConnectionProperties::default()).await?;
    let mut tasks = Vec::new();
    for queue in &task.queues {
        let channel = connection.create_channel().await?;
        let taking = Taking { channel, acks, progress: progress.clone(), read: read.clone(), pending: 0, tag: 0 };
        let queue = queue.clone();
        tasks.push(tokio::spawn(async move { taking.run(&queue).await }));
    }
    for taken in try_join_all(tasks).await? {
        taken?;
    }
    // What was written before is read before: the broker has every ack once it agrees to close. The channels that the
    // tasks dropped are closing too, which the library may complain of.
    let _ = connection.close(200, short("done")).await;
    say("last");
    Ok(())
}

async fn turned(finished: &mut watch::Receiver<bool>) {
    // Whoever would never turn it is gone: then there is nothing to wait for either.
    let _ = finished.wait_for(|finished| *finished).await;
}

struct Taking<F> {
    channel: Channel,
    acks: Acks,
    progress: Arc<Progress>,
    read: Arc<F>,
    pending: u32,
    tag: u64,
}

impl<F: Fn(&[u8])> Taking<F> {
    async fn run(mut self, queue: &str) -> anyhow::Result<()> {
        self.channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let options = BasicConsumeOptions::default();
        let mut consumer = self.channel.basic_consume(short(queue), short(""), options, FieldTable::default()).await?;
        let mut finished = self.progress.finished();
        let patience = match self.acks {
            Acks::Multiple { flush } => flush,
            Acks::Each => None,
        };
        let mut due = tokio::time::Instant::now();
        loop {
            let delivery = tokio::select! {
                biased;
                next = consumer.next() => match next {
                    Some(delivery) => delivery?,
                    None => anyhow::bail!("the consumer of {queue} ended"),
                },
                () = turned(&mut finished) => break,
                () = tokio::time::sleep_until(due), if patience.is_some() && self.pending > 0 => {
                    self.ack().await?;
                    continue;
                }
            };
            if let (Some(patience), 0) = (patience, self.pending) {
                due = tokio::time::Instant::now() + patience;
            }
            (self.read)(&delivery.data);
            (self.tag, self.pending) = (delivery.delivery_tag, self.pending + 1);
            let full = match self.acks {
                Acks::Each => true,
                Acks::Multiple { .. } => self.pending == EVERY,
            };
            if full {
                self.ack().await?;
            }
            self.progress.step();
        }
        self.ack().await
    }

    async fn ack(&mut self) -> anyhow::Result<()> {
        if self.pending > 0 {
            let multiple = matches!(self.acks, Acks::Multiple { .. });
            self.channel.basic_ack(self.tag, BasicAckOptions { multiple }).await?;
            self.pending = 0;
        }
        Ok(())
    }
}

/// Publishes so many to the bus, confirmed.
pub(crate) async fn publish(task: Task) -> anyhow::Result<()> {
    say("first");
    load(&task.url, events::PUBLISHED, task.count).await?;
    say("last");
    Ok(())
}
