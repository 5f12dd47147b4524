//! What messages mean: each file in `golden/` holds one message and the event, or the error, that is read from it.
use serde::Deserialize;
use serde_json::{Map, Value as Json};
use std::cell::Cell;
use warren_shared::event::time_of;
use warren_shared::wire::{Foreign, Header, Identified, Typed};
use warren_shared::{Event, Limits, Message, Value};

/// One file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Golden {
    message: Written,
    /// The event in structured form, or
    event: Option<Json>,
    /// why there is none.
    error: Option<Refusal>,
    // What travels beside the event, where it is not the usual.
    key: Option<String>,
    lane: Option<String>,
    attempt: Option<u32>,
    left: Option<u64>,
    replayed: Option<u32>,
    priority: Option<u8>,
    identified: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    exchange: String,
    routing_key: String,
    properties: Properties,
    /// A plain value, `{"nested": levels}`, `{"opaque": true}`, `{"void": true}` or `{"timestamp": seconds}`.
    headers: Map<String, Json>,
    /// Text, or `{"base64": …}`.
    body: Json,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Properties {
    content_type: Option<String>,
    message_id: Option<String>,
    correlation_id: Option<String>,
    app_id: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    timestamp: Option<u64>,
    priority: Option<u8>,
    content_encoding: Option<String>,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Refusal {
    reason: String,
    text: String,
}

fn typed(value: Option<Value>, depth: usize) -> Header {
    Header::Typed(Box::new(Typed { value, depth, wire: Vec::new() }))
}

fn header(json: Json) -> Header {
    match json {
        Json::Bool(b) => Header::Plain(Value::Bool(b)),
        Json::Number(n) => Header::Plain(Value::Int(n.as_i64().expect("a whole number"))),
        Json::String(s) => Header::Plain(Value::Text(s)),
        Json::Object(mark) => match mark.get("nested").and_then(Json::as_u64) {
            Some(levels) => typed(None, levels as usize),
            None if mark.contains_key("opaque") => typed(None, 0),
            None if mark.contains_key("void") => Header::Void,
            None if mark.contains_key("timestamp") => {
                let time = mark["timestamp"].as_u64().and_then(time_of).map(Value::Text);
                typed(time, 0)
            }
            None => panic!("no header: {mark:?}"),
        },
        other => panic!("no header: {other}"),
    }
}

impl Written {
    fn message(self) -> Message {
        use base64::Engine as _;
        let body = match &self.body {
            Json::String(text) => text.as_bytes().to_vec(),
            other => {
                let text = other["base64"].as_str().expect("text, or base64");
                base64::engine::general_purpose::STANDARD.decode(text).expect("base64")
            }
        };
        Message {
            exchange: self.exchange,
            routing_key: self.routing_key,
            content_type: self.properties.content_type,
            message_id: self.properties.message_id,
            correlation_id: self.properties.correlation_id,
            app_id: self.properties.app_id,
            kind: self.properties.kind,
            timestamp: self.properties.timestamp,
            priority: self.properties.priority,
            foreign: self
                .properties
                .content_encoding
                .map(|encoding| Box::new(Foreign { content_encoding: Some(encoding), ..Foreign::default() })),
            headers: self.headers.into_iter().map(|(name, json)| (name, header(json))).collect(),
            body,
        }
    }
}

fn check(golden: Golden) {
    let message = golden.message.message();
    let asked = Cell::new(Identified::ByItself);
    let read = message.read(Limits::default(), || {
        asked.set(Identified::OnArrival);
        "fresh".into()
    });
    let Some(event) = golden.event else {
        let error = read.expect_err("no event can be read from it");
        let refusal = Refusal { reason: error.reason().into(), text: error.to_string() };
        assert_eq!(refusal, golden.error.expect("an event or an error"));
        return;
    };
    assert!(golden.error.is_none(), "an event or an error");
    let read = read.expect("an event");
    let json = read.event.to_json();
    assert_eq!(serde_json::from_str::<Json>(&json).expect("JSON"), event, "got {json}");
    if let Some(key) = golden.key {
        assert_eq!(read.event.key(), key);
    }
    assert_eq!(read.event.lane(), golden.lane.as_deref());
    let left = std::time::Duration::from_millis(golden.left.unwrap_or(0));
    assert_eq!((read.attempt, read.left), (golden.attempt.unwrap_or(1), left));
    assert_eq!((read.replayed, read.priority), (golden.replayed.unwrap_or(0), golden.priority.unwrap_or(0)));
    let identified = golden.identified.as_deref() == Some("on arrival");
    assert_eq!(read.identified == Identified::OnArrival, identified);
    assert_eq!(read.identified, asked.get(), "an id is made where there is none, and only there");

    let again = Message::write(&read.event, "x").read(Limits::default(), || unreachable!("it has its id"));
    assert_eq!(again.expect("what is written can be read").event, read.event);
    let again = Event::from_json(json.as_bytes(), Limits::default());
    assert_eq!(again.expect("what is written can be read").to_json(), json);
}

#[test]
fn every_golden_message_means_what_its_file_says() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 70, "only {} files", files.len());
    let failed = files.iter().filter(|file| {
        let name = file.file_name().unwrap().display().to_string();
        let golden: Golden = serde_json::from_slice(&std::fs::read(file).unwrap()).expect(&name);
        assert_eq!(name.starts_with("error-"), golden.error.is_some(), "{name} is not named for what it holds");
        let outcome = std::panic::catch_unwind(|| check(golden));
        if outcome.is_err() {
            eprintln!("^ in {name}");
        }
        outcome.is_err()
    });
    assert_eq!(failed.count(), 0, "see above");
}
