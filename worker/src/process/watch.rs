//! What looks after instances beside their events: wakes those that are due within the hour, and counts them.
use super::{Due, last_hour};
use crate::job::outgoing;
use crate::metrics::{self, names};
use crate::store::{self, Count, Store, StoreError};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::MissedTickBehavior;
use warren_publisher::Publisher;
use warren_publisher::pace::paced;
use warren_shared::event::{Unreadable, Value};
use warren_shared::process::wire::{INSTANCE, Name, TIMER};
use warren_shared::retry::LADDER;
use warren_shared::topology::Topology;
use warren_shared::{Event, Limits, Message};

/// How often. What is due within the hour is woken several times before: the second time changes nothing.
const LOOK: Duration = Duration::from_secs(30);
/// Instances that are woken at once.
const MOST: u32 = 4096;
/// Where an instance stands that has not ended.
const OPEN: [&str; 3] = ["running", "compensating", "stuck"];

/// Until it is aborted. `processes` are those that are defined: they are counted where there is no instance of them, too.
pub(crate) async fn watch(
    store: Arc<dyn Store>,
    publisher: Publisher,
    topology: Topology,
    mut processes: BTreeSet<String>,
) {
    let mut tick = tokio::time::interval(paced(LOOK));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let looked = async {
            gauge(&store.count("process").await?, &mut processes);
            wake(&*store, &publisher, &topology).await
        };
        if let Err(error) = looked.await {
            metrics::count(names::STORE_ERRORS, 1);
            tracing::warn!(%error, "instances of processes can be neither counted nor woken now, trying again");
        }
    }
}

fn gauge(counts: &[Count], processes: &mut BTreeSet<String>) {
    // One that has none any more has none: a gauge keeps what it was set to.
    processes.extend(counts.iter().map(|count| count.name.clone()));
    // An alert on a first one needs the zero before it.
    if processes.is_empty() {
        processes.insert(String::new());
    }
    for (process, status) in processes.iter().flat_map(|process| OPEN.map(|status| (process, status))) {
        let count = counts.iter().find(|count| count.name == *process && count.status == status);
        let (states, oldest) = count.map_or((0, Duration::ZERO), |count| (count.states, count.oldest));
        let labels = || [("process", process.clone()), ("status", status.to_owned())];
        ::metrics::gauge!(names::INSTANCES, &labels()).set(states as f64);
        ::metrics::gauge!(names::UNCHANGED, &labels()).set(oldest.as_secs_f64());
    }
}

async fn wake(store: &dyn Store, publisher: &Publisher, topology: &Topology) -> Result<(), StoreError> {
    let now = jiff::Timestamp::now().as_millisecond();
    let soon = now.saturating_add(i64::try_from(last_hour().as_millis()).unwrap_or(i64::MAX));
    let due = store.due("process", soon, MOST).await?;
    let messages: Vec<Message> = due.into_iter().filter_map(|due| alarm(due, topology).ok()).collect();
    for refused in publisher.publish_all(messages).await.into_iter().filter_map(Result::err) {
        tracing::warn!(%refused, "an instance of a process cannot be woken now, trying again");
    }
    Ok(())
}

/// The event that has an instance set the timer of its last hour. The same for the same time: a repeat is a duplicate.
fn alarm(due: store::Due, topology: &Topology) -> Result<Message, Unreadable> {
    let name = Name { process: due.name, id: due.id };
    let text = Value::Text(name.to_string());
    let data = serde_json::to_vec(&Due { due: 0 }).unwrap_or_default();
    let event = Event::new(name.derive(&format!("alarm {}", due.at)), format!("/warren/{}", topology.pool), TIMER)?
        .with("partitionkey", text.clone())?
        .with(INSTANCE, text)?
        .with("time", Value::Text(jiff::Timestamp::now().to_string()))?
        .with_json(&data, Limits::default())?;
    let mut message = outgoing(&event);
    // A worker may write there; the pool's door is for those who steer it.
    message.exchange = topology.delay(LADDER[0]);
    Ok(message)
}
