//! The fleet's words over AMQP: one fanout exchange a pool, one exclusive queue a worker, nothing that outlives it.
//!
//! A connection of its own: an alarm blocks whatever publishes, and must not block acks. Words are not confirmed; whoever
//! hears its own knows that the way is open. Under an alarm nobody speaks, and so nobody is given up.
use super::JoinError;
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::{BasicProperties, Channel, Consumer, Error, ErrorKind};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use warren_publisher::broker::describe;
use warren_publisher::{Broker, BrokerError, Link};
use warren_shared::Message;
use warren_shared::fleet::Word;

/// What comes in.
#[derive(Debug)]
pub(super) enum Tiding {
    /// Somebody said something.
    Word(Box<Word>),
    /// The connection was lost and is there again: words were missed.
    Back,
}

/// The way to the fleet.
#[derive(Debug)]
pub(super) struct Gossip {
    pub(super) tidings: mpsc::UnboundedReceiver<Tiding>,
    say: mpsc::UnboundedSender<Word>,
    task: JoinHandle<()>,
}

/// Older words are of no use: a worker that was frozen must not wade through them.
const LIFE_MS: i32 = 10_000;
const MOST: i32 = 10_000;
/// How long the broker may take for an answer.
const ANSWER: Duration = Duration::from_secs(10);

/// A word as a message.
pub(super) fn message(exchange: &str, word: &Word) -> Message {
    let body = serde_json::to_vec(word).unwrap_or_default();
    let id = uuid::Uuid::new_v4().to_string();
    let content_type = Some("application/json".into());
    Message { exchange: exchange.into(), message_id: Some(id), content_type, body, ..Message::default() }
}

struct Line {
    link: Link,
    channel: Channel,
    consumer: Consumer,
}

impl Gossip {
    /// Connects: from now on everything is heard.
    ///
    /// # Errors
    /// The broker does not answer in time, or refuses.
    pub(super) async fn open(broker: Broker, exchange: String, patience: Duration) -> Result<Self, JoinError> {
        let link = broker.connect_within("fleet", patience).await?;
        let line = within(&exchange, Line::open(link, &exchange)).await?;
        let (tell, tidings) = mpsc::unbounded_channel();
        let (say, said) = mpsc::unbounded_channel();
        let task = tokio::spawn(Task { broker, exchange, said, tell }.run(line));
        Ok(Self { tidings, say, task })
    }

    /// Ends, once everything is said; a broker that is away is not waited for.
    pub(super) async fn close(self) {
        drop(self.say);
        let _ = tokio::time::timeout(Duration::from_secs(2), self.task).await;
    }

    /// Says something, if the way is open.
    pub(super) fn say(&self, word: Word) {
        let _ = self.say.send(word);
    }
}

async fn within<T>(exchange: &str, doing: impl Future<Output = Result<T, Error>>) -> Result<T, JoinError> {
    let Ok(done) = tokio::time::timeout(ANSWER, doing).await else {
        return Err(BrokerError::Lost("the broker does not answer".into()).into());
    };
    done.map_err(|error| match error.kind() {
        ErrorKind::ProtocolError(amqp) if *amqp.kind() == AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
            JoinError::Denied { said: describe(&error), pattern: exchange.replace('.', r"\.") }
        }
        _ => BrokerError::lost(&error).into(),
    })
}

impl Line {
    async fn open(link: Link, exchange: &str) -> Result<Self, Error> {
        let channel = link.connection().create_channel().await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(LongString::from("classic")));
        arguments.insert("x-message-ttl".into(), AMQPValue::LongInt(LIFE_MS));
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(MOST));
        let name = format!("{exchange}.{}", uuid::Uuid::new_v4().simple());
        let options = QueueDeclareOptions { exclusive: true, ..Default::default() };
        channel.queue_declare(name.as_str().into(), options, arguments).await?;
        let options = BasicConsumeOptions { no_ack: true, exclusive: true, ..Default::default() };
        let consumer = channel.basic_consume(name.as_str().into(), "".into(), options, FieldTable::default()).await?;
        let bind = QueueBindOptions::default();
        channel.queue_bind(name.as_str().into(), exchange.into(), "".into(), bind, FieldTable::default()).await?;
        Ok(Self { link, channel, consumer })
    }

    async fn say(&self, exchange: &str, word: &Word) -> Result<(), Error> {
        let Message { content_type, body, .. } = message(exchange, word);
        let properties = BasicProperties::default().with_content_type(content_type.unwrap_or_default().into());
        let options = BasicPublishOptions::default();
        self.channel.basic_publish(exchange.into(), "".into(), options, &body, properties).await.map(|_| ())
    }
}

struct Task {
    broker: Broker,
    exchange: String,
    said: mpsc::UnboundedReceiver<Word>,
    tell: mpsc::UnboundedSender<Tiding>,
}

impl Task {
    async fn run(mut self, mut line: Line) {
        while let Err(why) = self.serve(&mut line).await {
            tracing::warn!(why, "the fleet is not heard, connecting again: everybody keeps what they have");
            line.link.close().await;
            line = loop {
                let link = self.broker.connect_for_ever("fleet").await;
                match within(&self.exchange, Line::open(link, &self.exchange)).await {
                    Ok(line) => break line,
                    Err(error) => {
                        tracing::warn!(%error, "the fleet cannot be heard yet, trying again");
                        tokio::time::sleep(Duration::from_secs(2)).await;
                    }
                }
            };
            // What was to be said meanwhile is no longer true.
            while self.said.try_recv().is_ok() {}
            if self.tell.send(Tiding::Back).is_err() {
                break;
            }
        }
        line.link.close().await;
    }

    /// Ends well where the worker has nothing more to say.
    async fn serve(&mut self, line: &mut Line) -> Result<(), String> {
        let mut warned = false;
        loop {
            tokio::select! {
                word = self.said.recv() => match word {
                    None => return Ok(()),
                    // Under an alarm nothing is written; the next word will be as good.
                    Some(_) if line.link.blocked().borrow().is_some() => {}
                    Some(word) => match tokio::time::timeout(ANSWER, line.say(&self.exchange, &word)).await {
                        Ok(said) => said.map_err(|error| describe(&error))?,
                        Err(_) => return Err("the broker does not take it".into()),
                    }
                },
                delivery = line.consumer.next() => match delivery {
                    None => return Err("the broker cancelled the consumer".into()),
                    Some(Err(error)) => return Err(describe(&error)),
                    Some(Ok(delivery)) => match serde_json::from_slice::<Word>(&delivery.data) {
                        Ok(word) => if self.tell.send(Tiding::Word(Box::new(word))).is_err() {
                            return Ok(());
                        },
                        Err(error) => if !std::mem::replace(&mut warned, true) {
                            tracing::warn!(%error, "somebody of the fleet speaks another language (said once)");
                        },
                    },
                },
            }
        }
    }
}
