//! The events between a process and those who do its steps.
//!
//! A step asks by the event `do`, and takes back by `undo`, with two extensions: `processid` (`<process>/<instance>`) and
//! `processstep` (`charge`, `charge#2` for a second attempt, `undo.charge`). Whoever handled it answers with `<type>.done` or
//! `<type>.failed` and the same extensions. A worker does so by itself.
use super::Direction;
use crate::event::{Data, Event, Identity, Limits, Unreadable, Value};
use crate::json::Json;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

/// The extension that names the instance.
pub const INSTANCE: &str = "processid";
/// The extension that names step, direction and attempt.
pub const STEP: &str = "processstep";
/// The types of what a process tells itself, and a person tells it.
pub const OWN: &str = "warren.process.*";
/// The type of a timer.
pub const TIMER: &str = "warren.process.timer";
/// The type of a person's order to take an instance back.
pub const CANCEL: &str = "warren.process.cancel";
/// The type of a person's order to go on with an instance that is stuck.
pub const RESUME: &str = "warren.process.resume";

/// The ending of an answer's type where the step was done.
pub const DONE: &str = ".done";
/// And where it failed.
pub const FAILED: &str = ".failed";

/// What follows the process' name in the types of the events that tell how its instances end, or that they are stuck.
pub const ENDS: [&str; 3] = ["completed", "compensated", "stuck"];

/// Reasons that do not tell whether the step was done, where the answer does not say it either.
const UNCERTAIN: [&str; 5] = ["exhausted", "crash", "unclear", "expired", "delivery_limit"];

/// An instance by its name: `order/6f1c…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// The process.
    pub process: String,
    /// The instance.
    pub id: Uuid,
}

/// An attempt at a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Try {
    /// The step.
    pub step: String,
    /// Which way.
    pub direction: Direction,
    /// Which attempt, counted from 1.
    pub attempt: u32,
}

/// Why a step failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// The word of the dead letter: `permanent`, `exhausted`, `unstorable`, `unsendable`, `crash`, `no-route`,
    /// `loop`, or why it could not be read; or
    /// `unheard`, where nobody subscribes, and `unclear`, where the handler's answer could not be understood.
    pub reason: String,
    /// A sentence for a person.
    #[serde(default)]
    pub error: String,
    /// Whether it is certain that nothing was done; where nobody says it, the reason does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certain: Option<bool>,
}

impl Failed {
    /// A failure before anything was done.
    #[must_use]
    pub fn before(reason: &str, error: String) -> Self {
        Self { reason: reason.into(), error, certain: Some(true) }
    }

    /// What a failure's event says. Whoever answers need not know how Warren does it: what it leaves out is none the less a failure.
    #[must_use]
    pub fn of(event: &Event) -> Self {
        let data: serde_json::Value = serde_json::from_str(result(event).get()).unwrap_or_default();
        let text = |value: &serde_json::Value| match value {
            serde_json::Value::Null => None,
            serde_json::Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        };
        Self {
            reason: text(&data["reason"]).filter(|reason| !reason.is_empty()).unwrap_or_else(|| "failed".into()),
            error: text(&data["error"]).or_else(|| data.as_str().map(str::to_owned)).unwrap_or_default(),
            certain: data["certain"].as_bool(),
        }
    }

    /// Whether it is certain that nothing was done. Who answers by himself and says nothing else has refused.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        self.certain.unwrap_or(!UNCERTAIN.contains(&self.reason.as_str()))
    }
}

impl Name {
    /// The instance that an event starts: the same for the same event.
    #[must_use]
    pub fn started_by(process: &str, event: &Event) -> Self {
        let id = event.identity().derive(&format!("process {process}"));
        Self { process: process.into(), id: id.parse().unwrap_or_default() }
    }

    /// The instance that an event belongs to, if to any.
    #[must_use]
    pub fn of(event: &Event) -> Option<Self> {
        match event.extension(INSTANCE)? {
            Value::Text(text) => text.parse().ok(),
            _ => None,
        }
    }

    /// An id that is the same whenever the same thing is derived from the instance.
    #[must_use]
    pub fn derive(&self, what: &str) -> String {
        Uuid::new_v5(&self.id, what.as_bytes()).to_string()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.process, self.id)
    }
}

impl FromStr for Name {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (process, id) = text.split_once('/').ok_or(())?;
        Ok(Self { process: process.into(), id: id.parse().map_err(|_| ())? })
    }
}

impl Try {
    /// The attempt that an event belongs to.
    #[must_use]
    pub fn of(event: &Event) -> Option<Self> {
        match event.extension(STEP)? {
            Value::Text(text) => text.parse().ok(),
            // A step may be called `7`.
            Value::Int(number) => number.to_string().parse().ok(),
            _ => None,
        }
    }
}

impl fmt::Display for Try {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = if self.direction == Direction::Undo { "undo." } else { "" };
        write!(f, "{way}{}", self.step)?;
        if self.attempt > 1 { write!(f, "#{}", self.attempt) } else { Ok(()) }
    }
}

impl FromStr for Try {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (step, attempt) = match text.split_once('#') {
            Some((step, attempt)) => (step, attempt.parse().map_err(|_| ())?),
            None => (text, 1),
        };
        let (direction, step) = match step.strip_prefix("undo.") {
            Some(step) => (Direction::Undo, step),
            None => (Direction::Do, step),
        };
        if step.is_empty() || attempt == 0 {
            return Err(());
        }
        Ok(Self { step: step.into(), direction, attempt })
    }
}

/// What a handler tells repeats of the same work by: the same for every attempt at a step of an instance one way, however the
/// attempts are made (retries, timeouts, a person's resuming); for any other event its identity.
#[must_use]
pub fn idempotency_key(event: &Event, identity: &Identity) -> Uuid {
    match (Name::of(event), Try::of(event)) {
        (Some(name), Some(attempt)) if asks(event) => {
            let once = Try { attempt: 1, ..attempt };
            Uuid::new_v5(&name.id, format!("key {once}").as_bytes())
        }
        _ => Uuid::from_bytes(*identity.as_bytes()),
    }
}

/// Whether an event asks for a step, and so is to be answered.
#[must_use]
pub fn asks(event: &Event) -> bool {
    let kind = event.kind();
    !kind.ends_with(DONE)
        && !kind.ends_with(FAILED)
        && !kind.starts_with("warren.process.")
        && Name::of(event).is_some()
        && Try::of(event).is_some()
}

/// Whether an event answers a step.
#[must_use]
pub fn is_answer(event: &Event) -> bool {
    let kind = event.kind();
    (kind.ends_with(DONE) || kind.ends_with(FAILED)) && Name::of(event).is_some() && Try::of(event).is_some()
}

/// The answer to an event that asks for a step.
///
/// # Errors
/// The result is larger than the limits say.
pub fn answer(
    event: &Event,
    outcome: Result<Option<&Json>, &Failed>,
    source: &str,
    time: &str,
    limits: Limits,
) -> Result<Event, Unreadable> {
    let failed;
    let (ending, data) = match outcome {
        Ok(result) => (DONE, result.map_or("null", Json::get)),
        Err(why) => {
            failed = serde_json::to_string(why).unwrap_or_else(|_| "null".into());
            (FAILED, &*failed)
        }
    };
    let kind = format!("{}{ending}", event.kind());
    let answer = Event::new(event.identity().derive(ending), source, kind)?;
    carry(event, answer, time)?.with_json(data.as_bytes(), limits)
}

/// An event with what it has from the one that it follows: instance, step, key, priority, trace.
fn carry(from: &Event, mut to: Event, time: &str) -> Result<Event, Unreadable> {
    for name in [INSTANCE, STEP, "priority", "traceparent", "tracestate"] {
        if let Some(value) = from.extension(name) {
            to = to.with(name, value.clone())?;
        }
    }
    to.with("partitionkey", Value::Text(from.key().into_owned()))?.with("time", Value::Text(time.into()))
}

/// An event's data as JSON: a result, or what an instance begins with. Text is a string, bytes are one in base64.
#[must_use]
pub fn result(event: &Event) -> Box<RawValue> {
    let string = |text: &str| serde_json::value::to_raw_value(text).unwrap_or_else(|_| RawValue::NULL.to_owned());
    match event.data() {
        Some(Data::Text(text)) => string(text),
        Some(Data::Bytes(bytes)) => string(&BASE64.encode(bytes)),
        _ => event.json().unwrap_or_else(|_| RawValue::NULL.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_is_read_as_it_is_written() {
        for (text, step, direction, attempt) in [
            ("charge", "charge", Direction::Do, 1),
            ("charge#12", "charge", Direction::Do, 12),
            ("undo.charge", "charge", Direction::Undo, 1),
            ("undo.charge#3", "charge", Direction::Undo, 3),
            ("undo", "undo", Direction::Do, 1),
            ("undo.2", "2", Direction::Undo, 1),
        ] {
            let wanted = Try { step: step.into(), direction, attempt };
            assert_eq!(text.parse(), Ok(wanted.clone()));
            assert_eq!(wanted.to_string(), text);
        }
        for text in ["", "undo.", "#2", "a#0", "a#x", "a#-1"] {
            assert!(text.parse::<Try>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_answer_is_told_from_a_question_and_finds_its_way_back() {
        let start = Event::new("1", "/shop", "order.placed").expect("valid");
        let name = Name::started_by("order", &start);
        assert_eq!(Name::started_by("order", &start), name);
        assert_ne!(Name::started_by("parcel", &start).id, name.id);
        let text = |text: &str| Value::Text(text.into());
        let question = Event::new("2", "/warren/shop", "payment.charge")
            .and_then(|event| event.with(INSTANCE, text(&name.to_string())))
            .and_then(|event| event.with(STEP, text("charge#2")))
            .and_then(|event| event.with("partitionkey", text("k1")))
            .and_then(|event| event.with("priority", Value::Int(8)))
            .expect("valid");
        assert!(asks(&question) && !asks(&start));
        let written = r#"{"paid": 7.10, "by": 12345678901234567890123}"#;
        let result = crate::json::check(written.as_bytes(), 8).expect("JSON");
        let time = "2026-01-01T00:00:00Z";
        let done = answer(&question, Ok(Some(&result)), "/warren/shop", time, Limits::default()).expect("valid");
        assert_eq!(done.kind(), "payment.charge.done");
        assert!(!asks(&done) && is_answer(&done) && !is_answer(&question));
        assert_eq!((Name::of(&done), Try::of(&done)), (Some(name), "charge#2".parse().ok()));
        assert_eq!((done.key(), done.lane()), ("k1".into(), question.lane()));
        assert_eq!(super::result(&done).get(), written);
        let failed = Failed { reason: "exhausted".into(), error: "no".into(), certain: None };
        let failed = answer(&question, Err(&failed), "/warren/shop", time, Limits::default()).expect("valid");
        assert_eq!(failed.kind(), "payment.charge.failed");
        assert_ne!(failed.id(), done.id());
    }

    fn with_body(content_type: &str, body: &[u8]) -> Event {
        Event::new("1", "/shop", "payment.charge.failed")
            .and_then(|event| event.with("datacontenttype", content_type.into()))
            .and_then(|event| event.with_body(body, Limits::default()))
            .expect("valid")
    }

    #[test]
    fn any_failure_is_an_answer_and_only_some_reasons_leave_open_whether_it_was_done() {
        let json = |text: &str| Failed::of(&with_body("application/json", text.as_bytes()));
        for (data, reason, error, certain) in [
            (r#"{"reason":"declined","error":"no money"}"#, "declined", "no money", true),
            (r#"{"error":"no money"}"#, "failed", "no money", true),
            (r#"{"reason":7,"error":{"code":1}}"#, "7", r#"{"code":1}"#, true),
            (r#"{"reason":""}"#, "failed", "", true),
            ("null", "failed", "", true),
            ("[1]", "failed", "", true),
            (r#""no money""#, "failed", "no money", true),
            (r#"{"reason":"exhausted"}"#, "exhausted", "", false),
            (r#"{"reason":"crash","certain":true}"#, "crash", "", true),
            (r#"{"reason":"permanent","certain":false}"#, "permanent", "", false),
            (r#"{"reason":"permanent","certain":"no"}"#, "permanent", "", true),
        ] {
            let failed = json(data);
            assert_eq!((&*failed.reason, &*failed.error, failed.is_certain()), (reason, error, certain), "{data}");
        }
        assert_eq!(Failed::of(&with_body("text/plain", b"no money")).error, "no money");
        assert_eq!(Failed::of(&with_body("application/json", b"")).reason, "failed");
    }

    #[test]
    fn data_that_is_not_json_is_kept() {
        assert_eq!(result(&with_body("text/plain", "a \"ü\"".as_bytes())).get(), r#""a \"ü\"""#);
        assert_eq!(result(&with_body("image/png", b"\x00\xff")).get(), r#""AP8=""#);
        assert_eq!(result(&with_body("application/json", b"1.50")).get(), "1.50");
        assert_eq!(result(&with_body("application/json", b"")).get(), "null");
    }

    #[test]
    fn all_attempts_at_a_step_one_way_have_one_key() {
        let key = |instance: u128, step: &str, id: &str| {
            let name = Name { process: "order".into(), id: Uuid::from_u128(instance) };
            let event = Event::new(id, "/warren/shop", "payment.charge")
                .and_then(|event| event.with(INSTANCE, Value::Text(name.to_string())))
                .and_then(|event| event.with(STEP, Value::Text(step.into())))
                .expect("valid");
            idempotency_key(&event, &event.identity())
        };
        let first = key(1, "charge", "a");
        assert_eq!((key(1, "charge#2", "b"), key(1, "charge#70", "c")), (first, first));
        assert_eq!(key(1, "undo.charge", "d"), key(1, "undo.charge#2", "e"));
        let all = [first, key(1, "undo.charge", "d"), key(2, "charge", "a"), key(1, "ship", "a")];
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
        let plain = Event::new("1", "/shop", "order.placed").expect("valid");
        assert_eq!(idempotency_key(&plain, &plain.identity()).as_bytes(), plain.identity().as_bytes());
    }
}
