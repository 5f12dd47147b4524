//! Messages of systems that are not ours: published as they are, and dead letters read as they are.
use crate::lab::Lab;
use anyhow::{Context, ensure};
use lapin::BasicProperties;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A message to publish as it is.
#[derive(Clone, Debug, Default)]
pub struct Raw {
    /// The exchange.
    pub exchange: String,
    /// The routing key.
    pub routing_key: String,
    /// The properties.
    pub properties: BasicProperties,
    /// The body.
    pub body: Vec<u8>,
}

impl Raw {
    /// A message for the bus.
    #[must_use]
    pub fn new(routing_key: &str, body: impl Into<Vec<u8>>) -> Self {
        Self { exchange: "warren.events".into(), routing_key: routing_key.into(), body: body.into(), ..Self::default() }
    }

    /// For another exchange.
    #[must_use]
    pub fn to(mut self, exchange: &str) -> Self {
        self.exchange = exchange.into();
        self
    }

    /// With a content type.
    #[must_use]
    pub fn content_type(self, text: &str) -> Self {
        self.with(|p| p.with_content_type(short(text)))
    }

    /// With a message id.
    #[must_use]
    pub fn id(self, text: &str) -> Self {
        self.with(|p| p.with_message_id(short(text)))
    }

    /// With a correlation id, which is the key.
    #[must_use]
    pub fn key(self, text: &str) -> Self {
        self.with(|p| p.with_correlation_id(short(text)))
    }

    /// With other properties.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(BasicProperties) -> BasicProperties) -> Self {
        self.properties = change(self.properties.with_delivery_mode(2));
        self
    }

    /// With one more header, a text.
    #[must_use]
    pub fn header(self, name: &str, text: &str) -> Self {
        let value = AMQPValue::LongString(LongString::from(text.as_bytes()));
        let mut headers = self.properties.headers().clone().unwrap_or_default();
        headers.insert(short(name), value);
        self.with(|p| p.with_headers(headers))
    }

    /// With the attributes of a CloudEvent in binary form; `prefix` is `cloudEvents_` or `cloudEvents:`.
    #[must_use]
    pub fn attributes(mut self, prefix: &str, attributes: &[(&str, &str)]) -> Self {
        for (name, text) in attributes {
            self = self.header(&format!("{prefix}{name}"), text);
        }
        self
    }
}

fn short(text: &str) -> ShortString {
    ShortString::try_new(text).expect("tests write short strings")
}

/// A dead letter as it lies in its queue.
#[derive(Clone, Debug)]
pub struct Letter {
    /// Its headers, plain ones as text.
    pub headers: BTreeMap<String, String>,
    /// Its routing key.
    pub routing_key: String,
    /// Its `message_id`.
    pub id: String,
    /// Its properties as they lie there.
    pub properties: BasicProperties,
    /// Its body.
    pub body: Vec<u8>,
}

impl Letter {
    fn of(delivery: &lapin::message::Delivery) -> Self {
        let properties = &delivery.properties;
        let text = |value: &AMQPValue| match value {
            AMQPValue::LongString(s) => String::from_utf8_lossy(s.as_bytes()).into_owned(),
            AMQPValue::LongLongInt(i) => i.to_string(),
            AMQPValue::Boolean(b) => b.to_string(),
            other => format!("({:?})", other.get_type()),
        };
        let headers = properties.headers().as_ref().map(FieldTable::inner).into_iter().flatten();
        Self {
            headers: headers.map(|(name, value)| (name.as_str().to_owned(), text(value))).collect(),
            routing_key: delivery.routing_key.as_str().to_owned(),
            id: properties.message_id().as_ref().map(|id| id.as_str().to_owned()).unwrap_or_default(),
            properties: properties.clone(),
            body: delivery.data.clone(),
        }
    }

    /// A header; empty where there is none.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// Why it is here, as a word.
    #[must_use]
    pub fn reason(&self) -> &str {
        self.header("warren-dead-reason")
    }
}

impl Lab {
    /// Publishes messages as they are, in order, mandatory and confirmed.
    ///
    /// # Errors
    /// The broker refuses one, or nobody subscribes to it.
    pub async fn publish(&self, messages: &[Raw]) -> anyhow::Result<()> {
        let (connection, channel) = self.channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        for message in messages {
            let Raw { exchange, routing_key, properties, body } = message;
            let options = BasicPublishOptions { mandatory: true, ..Default::default() };
            let (exchange, key) = (exchange.as_str().into(), routing_key.as_str().into());
            let published = channel.basic_publish(exchange, key, options, body, properties.clone()).await?.await?;
            ensure!(published.take_message().is_none(), "nobody subscribes to '{routing_key}'");
        }
        connection.close(200, "published".into()).await?;
        Ok(())
    }

    /// Everything in a queue, first to last; it stays there.
    ///
    /// By a consumer and not by `basic.get`: what that took, a quorum queue gets back in no order.
    ///
    /// # Errors
    /// The queue cannot be read.
    pub async fn letters_in(&self, queue: &str) -> anyhow::Result<Vec<Letter>> {
        use futures_util::StreamExt;
        let (connection, channel) = self.channel().await?;
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let declared = channel.queue_declare(queue.into(), options, FieldTable::default()).await?;
        let ready = declared.message_count() as usize;
        let consuming =
            channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), FieldTable::default());
        let mut consumer = consuming.await?;
        let mut letters = Vec::new();
        loop {
            // What another look returned a moment ago may still be on its way back into the queue.
            let patience = Duration::from_millis(if letters.len() < ready { 10_000 } else { 300 });
            let Ok(Some(delivery)) = tokio::time::timeout(patience, consumer.next()).await else { break };
            letters.push(Letter::of(&delivery?));
        }
        channel.close(200, "read".into()).await?;
        connection.close(200, "read".into()).await?;
        Ok(letters)
    }

    /// The pool's dead letters, first to last; they stay there.
    ///
    /// # Errors
    /// The queue cannot be read.
    pub async fn letters(&self) -> anyhow::Result<Vec<Letter>> {
        self.letters_in(&format!("warren.{}.dead", self.name)).await
    }

    /// Waits for so many dead letters, and then a moment longer for one too many.
    ///
    /// # Errors
    /// There are fewer in time, or more.
    pub async fn dead_letters(&self, count: usize, patience: Duration) -> anyhow::Result<Vec<Letter>> {
        let started = Instant::now();
        loop {
            let letters = self.letters().await?;
            if letters.len() == count {
                return Ok(letters);
            }
            let found: Vec<_> = letters.iter().map(|l| (&l.id, l.reason(), l.header("warren-dead-error"))).collect();
            ensure!(letters.len() < count, "{} dead letters instead of {count}: {found:?}", letters.len());
            let logs = || self.logs();
            ensure!(started.elapsed() < patience, "{} of {count} dead letters: {found:?}{}", letters.len(), logs());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// A route for a pattern with the acting handler (`tests/handlers/actor.py`), and more of its fields.
    #[must_use]
    pub fn actor_route(&self, on: &str, more: &str) -> String {
        let handler = crate::broker::root().join("tests/handlers/actor.py");
        let (handler, acts) = (handler.display(), self.path("acts"));
        format!("{{on: '{on}', exec: [python3, '{handler}', '{}']{more}}}", acts.display())
    }

    /// What the acting handler was asked: `{"pid":…,"at":…,"attempt":…,"event":{…}}` a call.
    #[must_use]
    pub fn acts(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("acts")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The acts of one event.
    #[must_use]
    pub fn acts_of(&self, id: &str) -> Vec<Value> {
        self.acts().into_iter().filter(|act| act["event"]["id"] == id).collect()
    }

    /// A worker's admin page: its status and its text.
    ///
    /// # Errors
    /// Nobody answers there.
    pub fn page(&self, address: &str, path: &str) -> anyhow::Result<(u16, String)> {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(10)))
            .build();
        let agent: ureq::Agent = config.into();
        let mut response = agent.get(format!("http://{address}{path}")).call()?;
        Ok((response.status().as_u16(), response.body_mut().read_to_string()?))
    }

    /// The sum of a metric's series that carry these labels; none where there is no such series.
    ///
    /// # Errors
    /// Nobody answers there.
    pub fn metric(&self, address: &str, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<Option<f64>> {
        let (_, text) = self.page(address, "/metrics")?;
        let labels: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        let value = |line: &str| {
            let rest = line.strip_prefix(name)?;
            let (set, value) = rest.rsplit_once(' ')?;
            let ours = set.is_empty() || set.starts_with('{');
            (ours && labels.iter().all(|label| set.contains(label))).then(|| value.parse::<f64>().ok())?
        };
        let values: Vec<f64> = text.lines().filter_map(value).collect();
        Ok((!values.is_empty()).then(|| values.iter().sum()))
    }

    /// The names of this vhost's queues and exchanges (the broker's own exchanges left out), sorted.
    ///
    /// # Errors
    /// The management interface does not answer.
    pub fn names(&self) -> anyhow::Result<Vec<String>> {
        let mut names = Vec::new();
        for kind in ["queues", "exchanges"] {
            let all = self.rabbit.api("GET", &format!("{kind}/{}", self.name), None)?;
            let all = all.as_array().cloned().context("a list")?;
            let theirs = |name: &str| kind == "exchanges" && (name.is_empty() || name.starts_with("amq."));
            let name = |item: &Value| item["name"].as_str().map(str::to_owned);
            names.extend(all.iter().filter_map(name).filter(|n| !theirs(n)).map(|n| format!("{kind} {n}")));
        }
        names.sort();
        Ok(names)
    }
}

/// A port of this machine that nobody listens at, and that the kernel gives to no outgoing connection meanwhile: a broker
/// takes its time until it listens.
///
/// # Errors
/// None is free.
pub fn free_port() -> anyhow::Result<u16> {
    // Tests run in processes of their own.
    let from = std::process::id() as u16 % 1000 * 10;
    let mut ports = (0..10_000).map(|n| 10_000 + (from + n) % 10_000);
    ports.find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()).context("no port is free")
}
