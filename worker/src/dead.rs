//! `dead list|show|replay|drop`: the dead letters, looked at and brought back.
//!
//! Letters are taken unacked and go back in order when the channel closes; only what was replayed (and confirmed) or
//! dropped is acked.
use crate::fault;
use crate::pile::Pile;
use anyhow::bail;
use std::collections::{BTreeMap, HashSet};
use warren_publisher::publish::{Options, Refused};
use warren_publisher::{Broker, Confirmed, Publisher};
use warren_shared::dead::{PREFIX, recall, revive};
use warren_shared::env::Settings;
use warren_shared::event::Value;
use warren_shared::json::{glimpse, without_bom};
use warren_shared::topology::{Topology, give_type};
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

/// A letter that may be acked: its tag, and the proof of its copy.
type Finished = (u64, Letter, Option<Confirmed>);

/// Letters that are treated at once.
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
        let attribute = |name: &str| ["_", ":"].iter().find_map(|sign| header(&format!("cloudEvents{sign}{name}")));
        // The broker's own net leaves marks of its own.
        let marks = ["warren-dead-reason", "x-last-death-reason", "x-first-death-reason"];
        let reason = marks.iter().find_map(|name| header(name)).unwrap_or_default();
        // What could not be read may still tell who it is.
        let event = message.read(Limits::default(), String::new).ok().map(|incoming| incoming.event);
        let of = |f: fn(&warren_shared::Event) -> String| event.as_ref().map(f);
        let seen = if event.is_none() { seen(message) } else { Default::default() };
        let [id, source, kind] = seen;
        Self {
            at: mark("at"),
            reason,
            kind: of(|e| e.kind().to_owned())
                .or_else(|| attribute("type"))
                .or_else(|| message.kind.clone().filter(|kind| !kind.is_empty()))
                .or(kind)
                .unwrap_or_else(|| message.routing_key.clone()),
            id: of(|e| e.id().to_owned())
                .or_else(|| attribute("id"))
                .or(id)
                .or_else(|| message.message_id.clone())
                .unwrap_or_default(),
            source: of(|e| e.source().to_owned()).or_else(|| attribute("source")).or(source).unwrap_or_default(),
            key: message.correlation_id.clone().unwrap_or_default(),
            attempts: message.number("warren-dead-attempts").unwrap_or(0),
            handler: mark("handler"),
            worker: mark("worker"),
            error: mark("error"),
        }
    }

    /// What tells it from the others.
    fn mark(&self) -> String {
        [&*self.at, &self.worker, &self.source, &self.id].join("\0")
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
        Self { broker: Broker::new(settings.amqp.clone(), "warren-worker dead"), settings, topology }
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
        let mut pile = Pile::open(&link, &self.topology.dead()).await?;
        while let Some((_, letter, message)) = self.next(&mut pile).await? {
            if filter.takes(&letter) {
                show(letter, message)?;
            }
        }
        pile.close().await;
        link.close().await;
        Ok(())
    }

    /// The next letter, as its message came.
    async fn next(&self, pile: &mut Pile) -> anyhow::Result<Option<(u64, Letter, Message)>> {
        Ok(pile.next().await?.map(|(tag, mut message)| {
            recall(&mut message);
            give_type(&self.topology.subscriptions, &mut message);
            (tag, Letter::of(&message), message)
        }))
    }

    /// Replays or drops each letter that the filter takes, oldest first; returns how many, by reason, and how many of those that
    /// were replayed the store has forgotten.
    ///
    /// # Errors
    /// The broker cannot be reached or refuses a replay; what was done until then stays done.
    pub async fn treat(&self, filter: &Filter, treatment: Treatment) -> anyhow::Result<(BTreeMap<String, u64>, u64)> {
        // What dies again while this runs is for the next time.
        let now = jiff::Timestamp::now();
        let (until, window) = (now.to_string(), jiff::SignedDuration::try_from(self.settings.retention)?);
        let remembered = now.checked_sub(window)?.to_string();
        let link = self.broker.connect_within("dead", self.settings.connect_timeout).await?;
        let publishing = self.broker.connect_within("replay", self.settings.connect_timeout).await?;
        let options = Options { timeout: self.settings.publish_timeout, ..Options::default() };
        let publisher = Publisher::start(self.broker.clone(), publishing, options);
        let mut pile = Pile::open(&link, &self.topology.dead()).await?;
        let (mut done, mut forgotten, mut treated) = (BTreeMap::new(), 0, HashSet::new());
        let mut chunk = Vec::new();
        loop {
            let next = self.next(&mut pile).await?;
            let last = next.is_none();
            // The worker's clock may be ahead of ours: what lay there at the beginning is meant in any case.
            let meant = |letter: &Letter| pile.is_old() || letter.at <= until;
            chunk.extend(next.filter(|(_, letter, _)| filter.takes(letter) && meant(letter)));
            if chunk.len() >= CHUNK || last {
                let (finished, refused) = self.finish(&publisher, std::mem::take(&mut chunk), treatment).await;
                for (tag, letter, copy) in finished {
                    match copy {
                        Some(confirmed) => pile.settle(tag, confirmed),
                        None => pile.discard(tag),
                    }
                    treated.insert(letter.mark());
                    let old = !letter.at.is_empty() && letter.at < remembered;
                    forgotten += u64::from(old && treatment == Treatment::Replay);
                    *done.entry(letter.reason).or_default() += 1;
                }
                pile.flush().await?;
                if let Some(refused) = refused {
                    bail!("a replay is refused, this letter and those after it stay: {refused}");
                }
            }
            if last {
                break;
            }
        }
        pile.close().await;
        self.sweep(&link, &treated).await?;
        link.close().await;
        Ok((done, forgotten))
    }

    /// Takes away what was treated and came back: a quorum queue forgets acks that are still on their way to it when
    /// their channel ends.
    async fn sweep(&self, link: &warren_publisher::Link, treated: &HashSet<String>) -> anyhow::Result<()> {
        for _ in 0..10 {
            let mut pile = Pile::open(link, &self.topology.dead()).await?;
            let mut back = 0;
            while let Some((tag, letter, _)) = self.next(&mut pile).await? {
                // A letter without a time cannot be told from its copies: it stays, rather than be lost.
                if !letter.at.is_empty() && treated.contains(&letter.mark()) {
                    back += 1;
                    pile.discard(tag);
                }
                if pile.seen() % CHUNK == 0 {
                    pile.flush().await?;
                }
            }
            pile.flush().await?;
            pile.close().await;
            if back == 0 {
                return Ok(());
            }
            tracing::debug!(back, "acks were lost with their channel, given again");
        }
        Ok(())
    }

    /// Letters that may be acked now, each with the proof of its copy where it has one, and why the next one may not.
    async fn finish(
        &self,
        publisher: &Publisher,
        chunk: Vec<(u64, Letter, Message)>,
        treatment: Treatment,
    ) -> (Vec<Finished>, Option<Refused>) {
        if treatment == Treatment::Drop {
            return (chunk.into_iter().map(|(tag, letter, _)| (tag, letter, None)).collect(), None);
        }
        let (mut letters, mut messages) = (Vec::new(), Vec::new());
        for (tag, letter, message) in chunk {
            letters.push((tag, letter));
            messages.push(revive(message, &self.topology.door()));
        }
        let mut finished = Vec::new();
        let outcomes = publisher.publish_all(messages).await;
        fault::point("letters-replayed");
        for ((tag, letter), outcome) in letters.into_iter().zip(outcomes) {
            match outcome {
                Ok(confirmed) => finished.push((tag, letter, Some(confirmed))),
                // In order: what comes after a refused one stays with it.
                Err(refused) => return (finished, Some(refused)),
            }
        }
        (finished, None)
    }
}

/// Id, source and type in the body of a structured event that cannot be read, as far as they can be seen.
fn seen(message: &Message) -> [Option<String>; 3] {
    let mut found = [None, None, None];
    let kind = message.content_type.as_deref().unwrap_or_default().trim_start().to_ascii_lowercase();
    if kind.starts_with("application/cloudevents")
        && message.sealed_with().is_none()
        && let Ok(body) = message.decoded(Limits::default().body)
    {
        let (members, _) = glimpse(without_bom(&body), &["id", "source", "type"]);
        for (place, raw) in members {
            let text = serde_json::from_str(raw.get()).unwrap_or_else(|_| raw.get().to_owned());
            // It is shown on a line: what could forge one does not stand there.
            let text = text.chars().filter(|c| !c.is_control()).take(255).collect();
            found[place].get_or_insert(text);
        }
    }
    found
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
        if !name.starts_with(PREFIX) {
            let shown = header.value().map_or_else(|| "(a value that is no text)".to_owned(), Value::to_string);
            line("header", &format!("{name}: {shown}"));
        }
    }
    if let Some(foreign) = &message.foreign {
        for (name, value) in
            [("encoding", &foreign.content_encoding), ("reply to", &foreign.reply_to), ("cluster", &foreign.cluster_id)]
        {
            if let Some(value) = value {
                line(name, value);
            }
        }
    }
    match message.sealed_with() {
        Some(key) => line("body", &format!("sealed with the key '{key}', {} bytes", message.body.len())),
        None => {
            let body = message.decoded(Limits::default().body).unwrap_or(message.body.as_slice().into());
            line("body", &String::from_utf8_lossy(&body));
        }
    }
    text
}
