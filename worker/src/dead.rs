//! `dead list|show|replay|drop`: the dead letters, looked at and brought back.
//!
//! Letters are taken unacked and go back in order when the channel closes; only what was replayed (and confirmed) or
//! dropped is acked.
use crate::consumer::Proof;
use anyhow::{Context, bail};
use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions};
use lapin::types::FieldTable;
use std::collections::BTreeMap;
use std::time::Duration;
use warren_publisher::publish::Options;
use warren_publisher::{Broker, BrokerError, Publisher, codec};
use warren_shared::dead::{PREFIX, revive};
use warren_shared::env::Settings;
use warren_shared::event::Value;
use warren_shared::topology::Topology;
use warren_shared::wire::Header;
use warren_shared::{Limits, Message};

/// Which letters.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of this reason.
    pub reason: Option<String>,
    /// Of this event type.
    pub kind: Option<String>,
    /// Of this event id.
    pub id: Option<String>,
}

/// A letter, as a person sees it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Letter {
    /// When it died.
    pub at: String,
    /// Why, as a word.
    pub reason: String,
    /// The event's type.
    #[serde(rename = "type")]
    pub kind: String,
    /// The event's id.
    pub id: String,
    /// The event's source.
    pub source: String,
    /// The event's key.
    pub key: String,
    /// Attempts made.
    pub attempts: u64,
    /// The handler's route.
    pub handler: String,
    /// The worker.
    pub worker: String,
    /// Why, as a sentence.
    pub error: String,
}

/// What to do with a letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// Publish it to the pool again, then remove it.
    Replay,
    /// Remove it.
    Drop,
}

/// No letter for so long: that was the last.
const IDLE: Duration = Duration::from_millis(1000);
const CHUNK: usize = 256;

impl Filter {
    fn takes(&self, letter: &Letter) -> bool {
        let is = |wanted: &Option<String>, found: &str| wanted.as_deref().is_none_or(|wanted| wanted == found);
        is(&self.reason, &letter.reason) && is(&self.kind, &letter.kind) && is(&self.id, &letter.id)
    }
}

impl Letter {
    /// Reads the marks of a dead letter.
    #[must_use]
    pub fn of(message: &Message) -> Self {
        let header = |name: &str| message.header(name).map(Value::to_string);
        let mark = |name: &str| header(&format!("{PREFIX}{name}")).unwrap_or_default();
        let attribute = |name: &str| header(&format!("cloudEvents_{name}"));
        // The broker's own net leaves marks of its own.
        let reason = header("warren-dead-reason").or_else(|| header("x-first-death-reason")).unwrap_or_default();
        // What could not be read may still tell who it is.
        let event = message.read(Limits::default(), String::new).ok().map(|incoming| incoming.event);
        let of = |f: fn(&warren_shared::Event) -> String| event.as_ref().map(f);
        Self {
            at: mark("at"),
            reason,
            kind: of(|e| e.kind().to_owned())
                .or_else(|| attribute("type"))
                .unwrap_or_else(|| message.routing_key.clone()),
            id: of(|e| e.id().to_owned()).or_else(|| message.message_id.clone()).unwrap_or_default(),
            source: of(|e| e.source().to_owned()).or_else(|| attribute("source")).unwrap_or_default(),
            key: message.correlation_id.clone().unwrap_or_default(),
            attempts: message.number("warren-dead-attempts").unwrap_or(0),
            handler: mark("handler"),
            worker: mark("worker"),
            error: mark("error"),
        }
    }
}

/// The dead letters of a pool.
#[derive(Debug)]
pub struct Dead {
    broker: Broker,
    settings: Settings,
    topology: Topology,
}

impl Dead {
    /// The dead letters of the pool of these settings.
    #[must_use]
    pub fn new(settings: Settings, topology: Topology) -> Self {
        Self { broker: Broker::new(settings.amqp_url.clone(), "warren-worker dead"), settings, topology }
    }

    /// Shows each letter that the filter takes, oldest first, without removing any.
    ///
    /// # Errors
    /// The broker cannot be reached, or `show` failed.
    pub async fn each(
        &self,
        filter: &Filter,
        mut show: impl FnMut(Letter, Message) -> anyhow::Result<()> + Send,
    ) -> anyhow::Result<()> {
        let link = self.broker.connect_within("dead", self.settings.connect_timeout).await?;
        let (channel, mut letters) = self.open(&link).await?;
        while let Ok(Some(delivery)) = tokio::time::timeout(IDLE, letters.next()).await {
            let message = codec::read(delivery.map_err(|e| BrokerError::lost(&e))?);
            let letter = Letter::of(&message);
            if filter.takes(&letter) {
                show(letter, message)?;
            }
        }
        let _ = channel.close(200, "looked".into()).await;
        link.close().await;
        Ok(())
    }

    /// Replays or drops each letter that the filter takes, oldest first; returns how many, by reason.
    ///
    /// # Errors
    /// The broker cannot be reached or refuses a replay; what was done until then stays done.
    pub async fn treat(&self, filter: &Filter, treatment: Treatment) -> anyhow::Result<BTreeMap<String, u64>> {
        // What dies again while this runs is for the next time.
        let until = jiff::Timestamp::now().to_string();
        let link = self.broker.connect_within("dead", self.settings.connect_timeout).await?;
        let publishing = self.broker.connect_within("replay", self.settings.connect_timeout).await?;
        let options = Options { timeout: self.settings.publish_timeout, ..Options::default() };
        let publisher = Publisher::start(self.broker.clone(), publishing, options);
        let (channel, mut letters) = self.open(&link).await?;
        let mut done = BTreeMap::new();
        let mut chunk: Vec<(u64, Letter, Message)> = Vec::new();
        loop {
            let next = tokio::time::timeout(IDLE, letters.next()).await;
            let last = !matches!(next, Ok(Some(_)));
            if let Ok(Some(delivery)) = next {
                let delivery = delivery.map_err(|e| BrokerError::lost(&e))?;
                let tag = delivery.delivery_tag;
                let message = codec::read(delivery);
                let letter = Letter::of(&message);
                if filter.takes(&letter) && letter.at <= until {
                    chunk.push((tag, letter, message));
                }
            }
            if chunk.len() >= CHUNK || last {
                for (tag, reason) in self.finish(&publisher, std::mem::take(&mut chunk), treatment).await? {
                    let acked = channel.basic_ack(tag, BasicAckOptions::default()).await;
                    acked.map_err(|e| BrokerError::lost(&e))?;
                    *done.entry(reason).or_default() += 1;
                }
            }
            if last {
                break;
            }
        }
        let _ = channel.close(200, "done".into()).await;
        link.close().await;
        Ok(done)
    }

    /// Tags that may be acked now, and why each letter was there.
    async fn finish(
        &self,
        publisher: &Publisher,
        chunk: Vec<(u64, Letter, Message)>,
        treatment: Treatment,
    ) -> anyhow::Result<Vec<(u64, String)>> {
        if treatment == Treatment::Drop {
            return Ok(chunk.into_iter().map(|(tag, letter, _)| (tag, letter.reason)).collect());
        }
        let (mut marks, mut messages) = (Vec::new(), Vec::new());
        for (tag, letter, message) in chunk {
            marks.push((tag, letter.reason));
            messages.push(revive(message, &self.topology.door()));
        }
        let mut finished = Vec::new();
        for (mark, outcome) in marks.into_iter().zip(publisher.publish_all(messages).await) {
            match outcome {
                Ok(confirmed) => {
                    let _proof = Proof::Confirmed(confirmed);
                    finished.push(mark);
                }
                // In order: what comes after a refused one stays with it.
                Err(refused) if finished.is_empty() => bail!("a replay is refused, the letter stays: {refused}"),
                Err(_) => break,
            }
        }
        Ok(finished)
    }

    async fn open(&self, link: &warren_publisher::Link) -> anyhow::Result<(lapin::Channel, lapin::Consumer)> {
        let lost = |e: lapin::Error| BrokerError::lost(&e);
        let channel = link.connection().create_channel().await.map_err(lost)?;
        let queue = self.topology.dead();
        let consuming = channel.basic_consume(
            queue.as_str().into(),
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let letters = consuming.await.map_err(lost).with_context(|| {
            format!("the queue '{queue}' cannot be read: is WARREN_POOL right, and its topology declared?")
        })?;
        Ok((channel, letters))
    }
}

/// A letter in full: its marks, its headers, its body.
#[must_use]
pub fn describe(letter: &Letter, message: &Message) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<10} {value}");
    };
    line("id", &letter.id);
    line("source", &letter.source);
    line("type", &letter.kind);
    line("key", &letter.key);
    line("died", &letter.at);
    line("reason", &letter.reason);
    line("error", &letter.error);
    line("attempts", &letter.attempts.to_string());
    line("handler", &letter.handler);
    line("worker", &letter.worker);
    for (name, header) in &message.headers {
        if let Header::Plain(value) = header
            && !name.starts_with(PREFIX)
        {
            line("header", &format!("{name}: {value}"));
        }
    }
    line("body", &String::from_utf8_lossy(&message.body));
    text
}
