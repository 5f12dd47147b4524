//! `gather`: results by group become one event, when all are there or the deadline is over.
use super::filtered::run;
use super::{Call, Handler, Outcome, Reply};
use crate::jq::Jq;
use crate::store::{Change, Kept, State};
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;
use warren_shared::Event;
use warren_shared::event::{Unreadable, Value};
use warren_shared::gather::{Closed, Group, Taken};

/// What a route gathers.
#[derive(Clone, Debug)]
pub struct Gathering {
    /// The type of the event that a group becomes.
    pub(crate) emit: String,
    /// Of which group an event is; else the extension `groupid` says it.
    pub(crate) group: Option<Jq>,
    /// How many a group has; else the extension `groupsize` says it, or nobody.
    pub(crate) count: Option<Jq>,
    /// How long after its first member a group is closed.
    pub(crate) deadline: Option<Duration>,
}

pub(super) struct Gather(pub(super) Arc<Gathering>);

/// What the types of the events begin with that tell that a group's time is over; the type that it becomes follows.
pub(crate) const OVERDUE: &str = "warren.gather.";

/// What is kept of a group.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    name: String,
    group: Group,
}

/// What a deadline says.
#[derive(Debug, Serialize, Deserialize)]
struct Over {
    group: String,
}

/// The event that a group becomes.
#[derive(Debug, Serialize)]
struct Gathered<'a> {
    group: &'a str,
    complete: bool,
    count: usize,
    members: Vec<Box<RawValue>>,
}

impl Handler for Gather {
    fn handle(&self, call: Call) -> BoxFuture<'static, Outcome> {
        let gathering = self.0.clone();
        Box::pin(async move {
            match gathering.handle(call).await {
                Ok(outcome) | Err(outcome) => outcome,
            }
        })
    }
}

fn dead(error: impl std::fmt::Display) -> Outcome {
    Outcome::Dead { error: format!("gather: {error}") }
}

impl Gathering {
    /// The type of the event that tells that a group's time is over.
    pub(crate) fn overdue(&self) -> String {
        format!("{OVERDUE}{}", self.emit)
    }

    async fn handle(&self, mut call: Call) -> Result<Outcome, Outcome> {
        let over = call.event.kind() == self.overdue();
        let name = match over {
            true => call.event.json::<Over>().map_err(dead)?.group,
            false => self.name(&call).await?,
        };
        let id = Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("gather {} {name}", self.emit).as_bytes());
        let Some((_, kept)) = call.kept.take() else { return Ok(Outcome::Needs(id)) };
        let mut record = match &kept {
            Some(kept) => serde_json::from_slice(&kept.state.body).map_err(dead)?,
            None => Record { name: name.clone(), group: Group::default() },
        };
        let mut reply = Reply::done();
        let closes = if over {
            record.group.overdue()
        } else {
            let size = self.size(&call).await?;
            let member = call.event.identity().derive("member");
            let data = call.event.json().map_err(|error| dead(format!("its data is no JSON: {error}")))?;
            match record.group.take(&member, data, size) {
                Taken::Waits => false,
                Taken::Closes => true,
                Taken::Known => return Ok(Outcome::Done(reply)),
                Taken::Late(how) => {
                    let how = if how == Closed::Complete { "complete" } else { "closed by its deadline" };
                    return Err(dead(format!("it comes late: the group '{name}' is {how}")));
                }
                Taken::Misfit { said, known } => {
                    return Err(dead(format!(
                        "it says that the group '{name}' has {said} members, others say {known}"
                    )));
                }
            }
        };
        if over && !closes {
            return Ok(Outcome::Done(reply));
        }
        if closes {
            reply = reply.emit(self.gathered(&mut record, id, &call).map_err(dead)?);
        } else if let (None, Some(deadline)) = (&kept, self.deadline) {
            reply.later.push((deadline, self.deadline_of(&name, id, &call).map_err(dead)?));
        }
        reply.change = Some(self.change(id, kept.as_ref(), &record).map_err(dead)?);
        Ok(Outcome::Done(reply))
    }

    async fn name(&self, call: &Call) -> Result<String, Outcome> {
        let Some(group) = &self.group else {
            let group = call.event.extension("groupid").map(ToString::to_string);
            return group.ok_or_else(|| dead("it has no extension 'groupid', and the route says no 'group'"));
        };
        let outputs = run(group.clone(), "gather.group", call).await?;
        match outputs.first().map(|json| serde_json::from_slice(json)) {
            Some(Ok(serde_json::Value::String(text))) if outputs.len() == 1 => Ok(text),
            Some(Ok(serde_json::Value::Number(number))) if outputs.len() == 1 => Ok(number.to_string()),
            _ => Err(dead("'group' gives no text or number")),
        }
    }

    async fn size(&self, call: &Call) -> Result<Option<u64>, Outcome> {
        let wrong = || dead("its group's size is no number from 1 on");
        let Some(count) = &self.count else {
            return match call.event.extension("groupsize") {
                None if self.deadline.is_some() => Ok(None),
                None => Err(dead("it has no extension 'groupsize', and the route says neither 'count' nor 'deadline'")),
                Some(size) => size.to_string().parse().ok().filter(|size| *size > 0).map(Some).ok_or_else(wrong),
            };
        };
        let outputs = run(count.clone(), "gather.count", call).await?;
        match outputs.first().map(|json| serde_json::from_slice::<Option<u64>>(json)) {
            Some(Ok(size)) if outputs.len() == 1 && size != Some(0) => Ok(size),
            _ => Err(wrong()),
        }
    }

    fn gathered(&self, record: &mut Record, id: Uuid, call: &Call) -> Result<Event, Unreadable> {
        let members = record.group.give();
        let complete = record.group.closed() == Some(Closed::Complete);
        let gathered = Gathered { group: &record.name, complete, count: members.len(), members };
        self.event(&self.emit, id, "gathered", &gathered, call)?
            .with("partitionkey", Value::Text(record.name.clone()))?
            .with("groupid", Value::Text(record.name.clone()))
    }

    fn deadline_of(&self, name: &str, id: Uuid, call: &Call) -> Result<Event, Unreadable> {
        // Under a key of its own: the group's key may be busy.
        self.event(&self.overdue(), id, "deadline", &Over { group: name.into() }, call)?
            .with("partitionkey", Value::Text(id.to_string()))
    }

    fn event(&self, kind: &str, id: Uuid, what: &str, data: &impl Serialize, call: &Call) -> Result<Event, Unreadable> {
        let own = Uuid::new_v5(&id, what.as_bytes()).to_string();
        let mut event = Event::new(own, format!("/warren/{}", call.context.pool), kind)?
            .with("time", Value::Text(jiff::Timestamp::now().to_string()))?;
        if let Some(trace) = call.event.extension("traceparent") {
            event = event.with("traceparent", trace.clone())?;
        }
        event.with_json(&serde_json::to_vec(data).unwrap_or_default(), call.context.limits)
    }

    fn change(&self, id: Uuid, kept: Option<&Kept>, record: &Record) -> Result<Change, serde_json::Error> {
        let status = match record.group.closed() {
            None => "open",
            Some(Closed::Complete) => "complete",
            Some(Closed::Overdue) => "overdue",
        };
        let state = State {
            kind: "gather".into(),
            name: self.emit.clone(),
            status: status.into(),
            key: record.name.clone(),
            ended: record.group.closed().is_some(),
            due: None,
            body: serde_json::to_vec(record)?,
        };
        Ok(Change { id, found: kept.map_or(0, |kept| kept.version), state })
    }
}
