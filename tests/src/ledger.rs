//! What happened: a queue that hears every recorded effect, and the account that must add up.
use anyhow::Context;
use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use warren_publisher::codec;
use warren_shared::{Event, Limits};

/// Hears events of a pattern from a queue of its own, in the order of the bus.
#[derive(Clone, Debug)]
pub struct Sink {
    heard: Arc<Mutex<Vec<Event>>>,
}

impl Sink {
    /// Listens to a pattern of the bus; reconnects when the broker restarts (the queue is durable).
    ///
    /// # Errors
    /// The broker cannot be reached.
    pub async fn listen(url: &str, name: &str, exchange: &str, pattern: &str) -> anyhow::Result<Self> {
        let sink = Self { heard: Arc::default() };
        let queue = format!("sink.{name}");
        let connection = lapin::Connection::connect(url, lapin::ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(queue.as_str().into(), options, FieldTable::default()).await?;
        let bind = QueueBindOptions::default();
        channel.queue_bind(queue.as_str().into(), exchange.into(), pattern.into(), bind, FieldTable::default()).await?;
        let (heard, url) = (Arc::downgrade(&sink.heard), url.to_owned());
        let mut current = Some((connection, channel));
        tokio::spawn(async move {
            loop {
                if let Some((_connection, channel)) = current.take() {
                    let options = BasicConsumeOptions::default();
                    let consuming =
                        channel.basic_consume(queue.as_str().into(), "".into(), options, FieldTable::default());
                    let Ok(mut consumer) = consuming.await else { continue };
                    while let Some(Ok(delivery)) = consumer.next().await {
                        let tag = delivery.delivery_tag;
                        // Nobody listens any more: the next test's sink has the same name.
                        let Some(heard) = heard.upgrade() else { return };
                        if let Ok(incoming) = codec::read(delivery).read(Limits::default(), String::new)
                            && let Ok(mut heard) = heard.lock()
                        {
                            heard.push(incoming.event);
                        }
                        let _ = channel.basic_ack(tag, BasicAckOptions::default()).await;
                    }
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
                if heard.strong_count() == 0 {
                    return;
                }
                let connected = lapin::Connection::connect(&url, lapin::ConnectionProperties::default()).await;
                if let Ok(connection) = connected
                    && let Ok(channel) = connection.create_channel().await
                {
                    current = Some((connection, channel));
                }
            }
        });
        Ok(sink)
    }

    /// Everything heard, in order, repeats included.
    #[must_use]
    pub fn heard(&self) -> Vec<Event> {
        self.heard.lock().map(|heard| heard.clone()).unwrap_or_default()
    }

    /// First occurrences by id, in order.
    #[must_use]
    pub fn distinct(&self) -> Vec<Event> {
        let mut seen = HashSet::new();
        self.heard().into_iter().filter(|event| seen.insert(event.id().to_owned())).collect()
    }
}

/// The account of one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Distinct events published; all of them were confirmed.
    pub published: usize,
    /// Confirmed publishes, repeats of an event included.
    pub confirmed: usize,
    /// Distinct events whose effect was recorded (heard as `test.recorded`).
    pub handled: usize,
    /// Events whose effect was recorded under more than one id: must be 0.
    pub twice: usize,
    /// Repeats of the same recorded event or dead letter, by id, after a crash: harmless, absorbed by whoever listens.
    pub repeats: usize,
    /// Events that are dead letters, by reason.
    pub dead: BTreeMap<String, usize>,
    /// Pairs of one key that were recorded against their sequence: must be 0.
    pub inversions: usize,
    /// Published, and neither handled nor dead: must be 0.
    pub lost: usize,
}

impl std::fmt::Display for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { published, confirmed, handled, twice, repeats, dead, inversions, lost } = self;
        let absorbed = confirmed - published + repeats;
        write!(
            f,
            "ledger: published {published}, confirmed {confirmed}, handled {handled}, duplicates absorbed {absorbed}, \
             handled twice {twice}, dead {dead:?}, inversions {inversions}, lost {lost}"
        )
    }
}

impl Ledger {
    /// Adds up what a sink of `test.recorded` events heard. `published` are the ids of all confirmed publishes, `dead` the
    /// letters' id and reason.
    ///
    /// # Errors
    /// A recorded event has not the shape that the handler gives it.
    pub fn of(published: &[String], recorded: &Sink, dead: &[(String, String)]) -> anyhow::Result<Self> {
        Self::add_up(published, &recorded.heard(), dead)
    }

    /// Adds up recorded events in the order in which they were published.
    ///
    /// # Errors
    /// One has not the shape that the handler gives it.
    pub fn add_up(published: &[String], recorded: &[Event], dead: &[(String, String)]) -> anyhow::Result<Self> {
        let (mut by_parent, mut ids) = (HashMap::<String, usize>::new(), HashSet::new());
        let mut last: HashMap<String, u64> = HashMap::new();
        let mut inversions = 0;
        for event in recorded.iter().filter(|event| ids.insert(event.id())) {
            let data: serde_json::Value = event.json().context("recorded events carry JSON")?;
            let id = data["id"].as_str().context("the id of the event")?;
            *by_parent.entry(id.to_owned()).or_default() += 1;
            if let Some(sequence) = data["sequence"].as_str().and_then(|s| s.parse().ok()) {
                let before = last.insert(event.key().into_owned(), sequence);
                if let Some(before) = before.filter(|before| *before > sequence) {
                    inversions += 1;
                    println!("key {}: {sequence} after {before} (emitted {:?})", event.key(), event.time());
                }
            }
        }
        // What has no identity is a letter each time.
        let (mut reasons, mut buried) = (BTreeMap::new(), HashSet::new());
        let letters = dead.iter().filter(|letter| letter.0.is_empty() || buried.insert(*letter));
        for (_, reason) in letters {
            *reasons.entry(reason.clone()).or_default() += 1;
        }
        let ends: HashSet<&str> =
            by_parent.keys().map(String::as_str).chain(dead.iter().map(|(id, _)| id.as_str())).collect();
        let distinct: HashSet<&str> = published.iter().map(String::as_str).collect();
        let ledger = Self {
            published: distinct.len(),
            confirmed: published.len(),
            handled: by_parent.len(),
            twice: by_parent.values().filter(|n| **n > 1).count(),
            repeats: recorded.len() - ids.len() + dead.len() - reasons.values().sum::<usize>(),
            dead: reasons,
            inversions,
            lost: distinct.iter().filter(|id| !ends.contains(**id)).count(),
        };
        println!("{ledger}");
        Ok(ledger)
    }

    /// Whether every promise was kept.
    #[must_use]
    pub fn adds_up(&self) -> bool {
        self.lost == 0
            && self.twice == 0
            && self.inversions == 0
            && self.handled + self.dead.values().sum::<usize>() == self.published
    }
}
