//! What `warren-worker process` shows of instances, and has done to them.
use super::draw::{self, Style};
use super::{Plan, Record};
use crate::job::outgoing;
use crate::store::{Kept, Listed, State, Store};
use anyhow::{Context as _, ensure};
use serde::Serialize;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use uuid::Uuid;
use warren_publisher::publish::Options;
use warren_publisher::{Broker, Publisher};
use warren_shared::Event;
use warren_shared::env::Settings;
use warren_shared::event::Value;
use warren_shared::process::wire::{CANCEL, INSTANCE, Name, RESUME};
use warren_shared::process::{Going, Place};
use warren_shared::topology::Topology;

/// The instances of a pool.
pub(crate) struct Instances {
    store: Arc<dyn Store>,
}

/// An instance, as it is shown.
#[derive(Debug, Serialize)]
pub(crate) struct Shown {
    process: String,
    instance: Uuid,
    status: String,
    key: String,
    begun: String,
    changed: String,
    waits_for: Vec<String>,
    #[serde(skip)]
    record: Record,
    #[serde(skip)]
    plan: Arc<Plan>,
}

/// What a person orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Resume,
    Cancel,
}

impl Instances {
    pub(crate) fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// Those that changed last come first.
    pub(crate) async fn list(
        &self,
        name: Option<String>,
        status: Option<String>,
        most: u32,
    ) -> anyhow::Result<Vec<Shown>> {
        let found = self.store.list(Listed { kind: "process", name, status, most }).await?;
        let mut plans = HashMap::new();
        let mut shown = Vec::with_capacity(found.len());
        for (id, kept) in found {
            shown.push(self.shown(id, kept, &mut plans).await?);
        }
        Ok(shown)
    }

    /// The instance of this id, `<process>/<id>` or the id alone.
    pub(crate) async fn find(&self, text: &str) -> anyhow::Result<Option<Shown>> {
        let id = text.rsplit('/').next().unwrap_or(text);
        let id: Uuid =
            id.parse().with_context(|| format!("'{text}' is no instance: 'process list' shows their ids"))?;
        let kept = self.store.load(vec![id]).await?.pop().flatten().filter(|kept| kept.state.kind == "process");
        match kept {
            Some(kept) => Ok(Some(self.shown(id, kept, &mut HashMap::new()).await?)),
            None => Ok(None),
        }
    }

    async fn shown(&self, instance: Uuid, kept: Kept, plans: &mut HashMap<Uuid, Arc<Plan>>) -> anyhow::Result<Shown> {
        let record = Record::read(&kept.state).map_err(|error| anyhow::anyhow!("the state of {instance}: {error}"))?;
        let plan = match plans.get(&record.definition) {
            Some(plan) => plan.clone(),
            None => {
                let plan = Plan::load(&*self.store, record.definition).await;
                let plan = plan.map_err(|error| anyhow::anyhow!("{instance}: {error}"))?;
                plans.entry(record.definition).or_insert(Arc::new(plan)).clone()
            }
        };
        let State { name, status, key, .. } = kept.state;
        Ok(Shown {
            process: name,
            instance,
            status,
            key,
            begun: time(kept.begun),
            changed: time(kept.changed),
            waits_for: record.waits_for(&plan),
            record,
            plan,
        })
    }
}

impl Shown {
    /// What the table of instances says of it.
    pub(crate) fn cells(&self) -> [String; 6] {
        let second = |time: &String| time.get(..19).unwrap_or(time).to_owned();
        let (instance, waits) = (self.instance.to_string(), self.waits_for.join(", "));
        [self.status.clone(), self.process.clone(), instance, self.key.clone(), second(&self.changed), waits]
    }

    /// Its status, in a word.
    pub(crate) fn status(&self) -> &str {
        &self.status
    }

    /// All of it, as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        let mut json = serde_json::to_value(self).unwrap_or_default();
        let steps = self.plan.definition.steps.iter().zip(&self.record.instance.steps);
        let steps = steps.map(|(step, state)| (step.name.clone(), word(state.place).into()));
        json["steps"] = serde_json::Value::Object(steps.collect());
        json["failures"] = serde_json::to_value(self.record.failures()).unwrap_or_default();
        let entry = |entry: &super::record::Entry| serde_json::json!({"at": time(entry.at), "what": entry.what});
        json["history"] = self.record.history.iter().map(entry).collect();
        json
    }

    /// The picture of it.
    pub(crate) fn picture(&self, style: Style) -> String {
        draw::draw(&self.plan.definition, Some(&self.record.instance), style)
    }

    /// All of it, for people.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "{name:<10} {value}");
        };
        line("process", &self.process);
        line("instance", &self.instance.to_string());
        line("status", &self.status);
        line("key", &self.key);
        line("begun", &self.begun);
        line("changed", &self.changed);
        self.waits_for.iter().for_each(|waits| line("waits for", waits));
        for (step, state) in self.plan.definition.steps.iter().zip(&self.record.instance.steps) {
            line("step", &format!("{:<20} {}", step.name, word(state.place)));
        }
        for entry in &self.record.history {
            line("history", &format!("{}  {}", time(entry.at), entry.what));
        }
        text
    }

    /// Has the pool do what a person orders.
    ///
    /// # Errors
    /// It cannot be done to an instance in this state, or the broker does not take it.
    pub(crate) async fn order(&self, order: Order, settings: &Settings, topology: &Topology) -> anyhow::Result<()> {
        let going = self.record.instance.going;
        match order {
            Order::Resume => ensure!(
                matches!(going, Going::Stuck | Going::Held),
                "it is {}: only what is stuck is resumed",
                self.status
            ),
            Order::Cancel => {
                ensure!(!matches!(going, Going::Ended(_)), "it is {}: nothing is left to cancel", self.status)
            }
        }
        let kind = if order == Order::Resume { RESUME } else { CANCEL };
        let name = Name { process: self.process.clone(), id: self.instance };
        let event = Event::new(Uuid::new_v4().to_string(), format!("/warren/{}", settings.pool), kind)?
            // Not behind a step of the instance that takes its time.
            .with("partitionkey", Value::Text(name.to_string()))?
            .with(INSTANCE, Value::Text(name.to_string()))?
            .with("time", Value::Text(jiff::Timestamp::now().to_string()))?;
        let mut message = outgoing(&event);
        message.exchange = topology.door();
        let broker = Broker::new(settings.amqp.clone(), "warren-worker process");
        let link = broker.connect_within("process", settings.connect_timeout).await?;
        let options = Options { timeout: settings.publish_timeout, ..Options::default() };
        let publisher = Publisher::start(broker, link, options);
        let sent = publisher.publish_all(vec![message]).await.pop();
        match sent {
            Some(Ok(_)) => Ok(()),
            Some(Err(refused)) => Err(refused).context("the pool does not take the order"),
            None => Ok(()),
        }
    }
}

/// Where a step stands, in a word.
pub(super) fn word(place: Place) -> &'static str {
    match place {
        Place::Waiting => "waiting",
        Place::Skipped => "skipped",
        Place::Running { .. } => "running",
        Place::Pausing { .. } => "pausing",
        Place::Late => "late",
        Place::Done => "done",
        Place::Failed => "failed",
        Place::Unknown => "unknown",
        Place::Undoing { .. } => "undoing",
        Place::UndoPausing { .. } => "undo pausing",
        Place::Undone => "undone",
        Place::Stuck { .. } => "STUCK",
        Place::Abandoned => "abandoned",
    }
}

fn time(ms: i64) -> String {
    let at = jiff::Timestamp::from_millisecond(ms).unwrap_or_default();
    at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}
