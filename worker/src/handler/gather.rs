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
use warren_shared::event::{Unreadable, Value, check_key};
use warren_shared::gather::{Closed, Group, Taken};
use warren_shared::{Event, number};

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

/// How many a group has, however that is written: `2`, `2.0`, `"2"`.
fn counted(text: &str) -> Option<u64> {
    number::canonical(text)?.parse().ok().filter(|count| *count > 0)
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
        if !over {
            // Now, and not when the group is closed: its event has the name for its key.
            check_key(&name).map_err(|error| dead(format!("its group's name cannot be a key: {error}")))?;
        }
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
        match &outputs[..] {
            [json] if json.starts_with(b"\"") => serde_json::from_slice(json).ok(),
            // `1` and `1.0` name one group; numbers that differ in any digit name two.
            [json] => str::from_utf8(json).ok().and_then(number::canonical),
            _ => None,
        }
        .ok_or_else(|| dead("'group' gives no text or number"))
    }

    async fn size(&self, call: &Call) -> Result<Option<u64>, Outcome> {
        let wrong = || dead("its group's size is no number from 1 on");
        let Some(count) = &self.count else {
            return match call.event.extension("groupsize") {
                None if self.deadline.is_some() => Ok(None),
                None => Err(dead("it has no extension 'groupsize', and the route says neither 'count' nor 'deadline'")),
                Some(size) => counted(&size.to_string()).map(Some).ok_or_else(wrong),
            };
        };
        let outputs = run(count.clone(), "gather.count", call).await?;
        let size = match &outputs[..] {
            [json] if json == b"null" => return Ok(None),
            [json] if json.starts_with(b"\"") => {
                serde_json::from_slice(json).ok().and_then(|text: String| counted(&text))
            }
            [json] => str::from_utf8(json).ok().and_then(counted),
            _ => None,
        };
        size.map(Some).ok_or_else(wrong)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::Context;
    use crate::store::Entry;

    fn call(attributes: &[(&str, Value)], data: &str) -> Call {
        let event = Event::new("1", "/s", "part.done").and_then(|e| e.with_json(data.as_bytes(), Default::default()));
        let event = attributes
            .iter()
            .fold(event.expect("valid"), |event, (name, value)| event.with(name, value.clone()).expect("an attribute"));
        let (timeout, limits) = (Duration::from_secs(5), Default::default());
        let context = Context {
            attempt: 1,
            timeout,
            partition: "p00".into(),
            pool: "orders".into(),
            limits,
            ..Context::default()
        };
        Call { event, context, entry: Entry::default(), kept: None }
    }

    fn gathering(group: Option<&str>, count: Option<&str>) -> Gathering {
        let program = |text: &str| Jq::compile(text).expect("valid");
        Gathering { emit: "all.done".into(), group: group.map(program), count: count.map(program), deadline: None }
    }

    /// The state that a member's group is kept under, or why it has none.
    async fn group(gathering: &Gathering, call: Call) -> Result<Uuid, String> {
        match gathering.handle(call).await {
            Ok(Outcome::Needs(id)) => Ok(id),
            Err(Outcome::Dead { error }) => Err(error),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn equal_numbers_are_one_group_and_numbers_that_differ_in_any_digit_two() {
        let by_data = gathering(Some(".data"), Some("2"));
        let of = async |data: &str| group(&by_data, call(&[], data)).await.expect(data);
        for (a, b) in [("1", "1.0"), ("1", "\"1\""), ("100", "1e2"), ("1.1", "1.10"), ("0", "-0.0")] {
            assert_eq!(of(a).await, of(b).await, "{a} and {b}");
        }
        for (a, b) in [
            ("12345678901234567890", "12345678901234567891"),
            ("12345678901234567.89", "12345678901234567.88"),
            ("\"1.0\"", "\"1\""),
            ("1", "-1"),
        ] {
            assert_ne!(of(a).await, of(b).await, "{a} and {b}");
        }
        let by_extension = gathering(None, Some("2"));
        let int = group(&by_extension, call(&[("groupid", Value::Int(7))], "{}")).await;
        assert_eq!(int, Ok(of("7").await));
        for data in ["null", "true", "[1]", "{}"] {
            assert!(group(&by_data, call(&[], data)).await.expect_err(data).contains("gives no text or number"));
        }
    }

    #[tokio::test]
    async fn a_count_is_a_whole_number_however_it_is_written() {
        let by_data = gathering(Some("\"g\""), Some(".data"));
        for (data, wanted) in [
            ("2", Some(2)),
            ("2.0", Some(2)),
            ("\"2\"", Some(2)),
            ("\"2.0\"", Some(2)),
            ("2e1", Some(20)),
            ("0", None),
            ("-2", None),
            ("2.5", None),
            ("\"two\"", None),
            ("\"\"", None),
            ("true", None),
            ("[2]", None),
        ] {
            let size = by_data.size(&call(&[], data)).await.ok().flatten();
            assert_eq!(size, wanted, "{data}");
        }
        assert_eq!(by_data.size(&call(&[], "null")).await.expect("nobody said"), None);
        let by_extension = gathering(Some("\"g\""), None);
        for (value, wanted) in [
            (Value::Int(2), Some(2)),
            (Value::Text("2".into()), Some(2)),
            (Value::Text("2.0".into()), Some(2)),
            (Value::Text("many".into()), None),
            (Value::Bool(true), None),
        ] {
            let size = by_extension.size(&call(&[("groupsize", value.clone())], "{}")).await.ok().flatten();
            assert_eq!(size, wanted, "{value}");
        }
    }

    /// Not at the last one: by then the others are taken, and their group could never be closed.
    #[tokio::test]
    async fn a_name_that_no_key_can_have_is_refused_at_the_first_member() {
        let by_data = gathering(Some(".data"), Some("2"));
        let by_extension = gathering(None, Some("2"));
        for (name, problem) in [
            (String::new(), "is empty"),
            ("x".repeat(256), "has 256 bytes, the limit is 255"),
            ("a\u{0}b".into(), "holds control characters"),
            ("a\nb".into(), "holds control characters"),
            ("a\u{85}b".into(), "holds control characters"),
        ] {
            let data = serde_json::Value::from(name.as_str()).to_string();
            let error = group(&by_data, call(&[], &data)).await.expect_err(problem);
            assert!(error.contains(problem) && error.starts_with("gather: its group's name"), "{error}");
            if name.chars().all(|c| !c.is_control()) {
                let error = group(&by_extension, call(&[("groupid", name.into())], "{}")).await.expect_err(problem);
                assert!(error.contains(problem), "{error}");
            }
        }
        assert!(group(&by_data, call(&[], &format!("\"{}\"", "x".repeat(255)))).await.is_ok());
    }
}
