//! A queue that is looked through: its messages are taken unacked and go back in order when the look ends, but for
//! those that are settled.
use anyhow::{Context, bail};
use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use std::sync::LazyLock;
use std::time::Duration;
use warren_publisher::pace::paced;
use warren_publisher::{BrokerError, Confirmed, Link, codec};
use warren_shared::Message;
use warren_shared::acks::{Ledger, Span};

/// One look: each message is ours until it is settled or the look ends.
pub(crate) struct Pile {
    channel: lapin::Channel,
    messages: lapin::Consumer,
    ready: usize,
    seen: usize,
    ledger: Ledger,
}

/// No message for so long: that was the last.
static IDLE: LazyLock<Duration> = LazyLock::new(|| paced(Duration::from_secs(1)));
/// How long a message that the broker has counted may be on its way.
const PATIENCE: Duration = Duration::from_secs(15);

impl Pile {
    /// Begins a look.
    ///
    /// # Errors
    /// The queue is not there, or the broker cannot be asked.
    pub(crate) async fn open(link: &Link, queue: &str) -> anyhow::Result<Self> {
        let lost = |e: lapin::Error| BrokerError::lost(&e);
        let channel = link.connection().create_channel().await.map_err(lost)?;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let found = channel.queue_declare(queue.into(), passive, FieldTable::default()).await;
        let found = found.map_err(lost).with_context(|| {
            format!("the queue '{queue}' cannot be read: is WARREN_POOL right, and its topology declared?")
        })?;
        let ready = usize::try_from(found.message_count()).unwrap_or(usize::MAX);
        let options = BasicConsumeOptions::default();
        let messages = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await;
        let messages = messages.map_err(lost).with_context(|| format!("the queue '{queue}' cannot be read"))?;
        Ok(Self { channel, messages, ready, seen: 0, ledger: Ledger::default() })
    }

    /// Messages taken so far.
    pub(crate) fn seen(&self) -> usize {
        self.seen
    }

    /// Whether the last message lay there when the look began.
    pub(crate) fn is_old(&self) -> bool {
        self.seen <= self.ready
    }

    /// The next message and its tag; none after the last.
    ///
    /// # Errors
    /// The connection ended, or the broker delivers fewer messages than it counted.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<(u64, Message)>> {
        // Beyond what was counted come those that another look has only just returned.
        let patience = if self.seen < self.ready { PATIENCE } else { *IDLE };
        let delivery = match tokio::time::timeout(patience, self.messages.next()).await {
            Ok(Some(delivery)) => delivery.map_err(|e| BrokerError::lost(&e))?,
            _ if self.seen < self.ready => bail!(
                "the broker counted {} letters and delivered {}: does another command read them? Try again",
                self.ready,
                self.seen
            ),
            _ => return Ok(None),
        };
        self.seen += 1;
        let tag = delivery.delivery_tag;
        self.ledger.open(tag);
        Ok(Some((tag, codec::read(delivery))))
    }

    /// Takes a message away, with the next flush: the broker has its copy.
    pub(crate) fn settle(&mut self, tag: u64, _copy: Confirmed) {
        self.ledger.settle(tag);
    }

    /// Takes a message away, with the next flush, for ever: a person wants it so.
    pub(crate) fn discard(&mut self, tag: u64) {
        self.ledger.settle(tag);
    }

    /// Acks what is settled, runs of messages at once.
    ///
    /// # Errors
    /// The connection ended.
    pub(crate) async fn flush(&mut self) -> anyhow::Result<()> {
        while self.ledger.unacked() > 0 {
            for ack in self.ledger.sweep() {
                let options = BasicAckOptions { multiple: ack.span == Span::UpTo };
                self.channel.basic_ack(ack.tag, options).await.map_err(|e| BrokerError::lost(&e))?;
            }
        }
        Ok(())
    }

    /// Ends the look.
    pub(crate) async fn close(self) {
        let _ = self.channel.close(200, "done".into()).await;
    }
}
