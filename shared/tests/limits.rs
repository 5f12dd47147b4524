//! What is too large, too deep or too long is refused at the limit, not before it, and never by a crash.
use warren_shared::wire::{Header, Typed};
use warren_shared::{Event, Limits, Message, Unreadable, Value};

const MIB: usize = 1 << 20;

fn typed(content_type: &str, body: Vec<u8>) -> Message {
    let (content_type, message_id) = (Some(content_type.into()), Some("m-1".into()));
    Message { routing_key: "order.created".into(), content_type, message_id, body, ..Message::default() }
}

fn read(message: &Message) -> Result<Event, Unreadable> {
    message.read(Limits::default(), || unreachable!("it has its id")).map(|incoming| incoming.event)
}

fn nested(levels: usize) -> String {
    "[".repeat(levels) + &"]".repeat(levels)
}

#[test]
fn a_body_may_be_as_large_as_the_limit_and_no_larger() {
    for content_type in ["text/plain", "application/octet-stream", "application/json", "application/cloudevents+json"] {
        let error = read(&typed(content_type, vec![b'1'; 20 * MIB])).unwrap_err();
        assert_eq!(error, Unreadable::TooLarge { size: 20 * MIB, limit: 16 * MIB });
        assert_eq!(error.reason(), "too-large");
    }
    assert!(read(&typed("text/plain", vec![b'1'; 16 * MIB])).is_ok());
    assert!(read(&typed("text/plain", vec![b'1'; 16 * MIB + 1])).is_err());
}

#[test]
fn data_that_is_made_here_may_be_as_large_as_a_body_and_no_larger() {
    let limits = Limits { body: 10, ..Limits::default() };
    let with = |json: &str| Event::new("1", "/s", "t").and_then(|event| event.with_json(json.as_bytes(), limits));
    assert!(with("\"12345678\"").is_ok());
    assert_eq!(with("\"123456789\"").unwrap_err(), Unreadable::TooLarge { size: 11, limit: 10 });
}

#[test]
fn json_may_be_as_deep_as_the_limit_and_no_deeper() {
    for levels in [65, 100_000] {
        let error = read(&typed("application/json", nested(levels).into())).unwrap_err();
        assert_eq!(
            (error.reason(), error.to_string()),
            ("too-deep", "the body is nested deeper than 64 levels".into())
        );
    }
    let unclosed = "{\"a\":".repeat(100_000);
    assert_eq!(read(&typed("application/json", unclosed.into())).unwrap_err().reason(), "too-deep");

    let whole =
        |levels| format!(r#"{{"specversion":"1.0","id":"1","source":"/s","type":"t","data":{}}}"#, nested(levels));
    for levels in [65, 100_000] {
        let error = read(&typed("application/cloudevents+json", whole(levels).into())).unwrap_err();
        assert_eq!(error.reason(), "too-deep");
    }
    // The deepest data that a message may bring can be written in every form and read again.
    let event = read(&typed("application/json", nested(64).into())).unwrap();
    assert_eq!(Event::from_json(event.to_json().as_bytes(), Limits::default()), Ok(event.clone()));
    assert_eq!(read(&Message::write(&event, "x")), Ok(event));
}

#[test]
fn a_header_may_be_as_deep_as_the_limit_and_no_deeper() {
    let with = |header| Message { headers: vec![("x-deep".into(), header)], ..typed("application/json", b"1".into()) };
    let nested = |depth| Header::Typed(Box::new(Typed { depth, ..Typed::default() }));
    assert!(read(&with(nested(64))).is_ok());
    for levels in [65, 26_000] {
        assert_eq!(read(&with(nested(levels))), Err(Unreadable::Header("x-deep".into())));
    }
}

#[test]
fn a_plain_message_leaves_behind_the_headers_that_do_not_fit_together() {
    let names = || (10..90).map(|i| format!("h{i}"));
    let headers = names().map(|name| (name, Header::Plain("x".repeat(1000).into()))).collect();
    let event = read(&Message { headers, ..typed("application/json", b"1".into()) }).unwrap();
    let kept: Vec<_> = names().filter(|name| event.extension(name).is_some()).collect();
    assert_eq!(kept, names().take(65_536 / (20 + 3 + 1000)).collect::<Vec<_>>());
    let error = event.with("another", Value::Text("x".repeat(1000))).unwrap_err();
    assert_eq!(error.to_string(), "the attribute 'extensions' have 66499 bytes together, the limit is 65536");
}

#[test]
fn whatever_extensions_an_event_has_they_fit_into_one_frame() {
    const FRAME: usize = 128 << 10;
    let long = || "x".repeat(4096);
    for value in [Value::Bool(true), Value::Int(1), Value::Text(String::new()), Value::Text(long())] {
        let headers = (0..6000).map(|i| (i.to_string(), Header::Plain(value.clone()))).collect();
        let message = Message { headers, app_id: Some(long()), ..typed("application/json", b"1".into()) };
        let event = ["subject", "dataschema"]
            .into_iter()
            .fold(read(&message).unwrap(), |event, name| event.with(name, Value::Text(long())).unwrap());
        let message = Message::write(&event, "x");
        let bytes = message.headers.iter().map(|(name, header)| match header {
            Header::Plain(Value::Text(text)) => 1 + name.len() + 1 + 4 + text.len(),
            _ => 1 + name.len() + 1 + 8,
        });
        let bytes: usize = bytes.sum();
        assert!((FRAME / 4..FRAME - 8192).contains(&bytes), "{bytes} bytes of headers with {value:?}");
    }
}

#[test]
fn what_travels_as_a_short_string_has_255_bytes_at_most() {
    let new = |id: usize, source, kind| Event::new("i".repeat(id), "s".repeat(source), "t".repeat(kind));
    assert!(new(255, 4096, 255).is_ok());
    assert!(new(256, 4096, 255).is_err() && new(255, 4097, 255).is_err() && new(255, 4096, 256).is_err());
    for (name, max) in [("partitionkey", 255), ("datacontenttype", 255), ("subject", 4096), ("tenant", 4096)] {
        let with = |bytes| new(1, 1, 1).unwrap().with(name, Value::Text("x".repeat(bytes)));
        assert!(with(max).is_ok(), "{name}");
        let problem = format!("the attribute '{name}' has {} bytes, the limit is {max}", max + 1);
        assert_eq!(with(max + 1).unwrap_err().to_string(), problem);
    }
    let error = new(1, 1, 1).unwrap().with(&"x".repeat(65), Value::Bool(true)).unwrap_err();
    assert_eq!(error.reason(), "bad-attribute");
}

#[test]
fn times_are_taken_as_rfc_3339_writes_them() {
    let with = |time: &str| Event::new("1", "/s", "t").unwrap().with("time", Value::Text(time.into()));
    for time in [
        "2026-03-01T12:00:00Z",
        "2026-03-01t12:00:00.123456789z",
        "2024-02-29T23:59:60-08:00",
        "1969-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59Z",
        "9999-12-31T23:59:59.999999999999-23:59",
        "0000-01-01T00:00:00+23:59",
        "2026-03-01T12:00:00.1234567890123456789012345678901234567890Z",
    ] {
        assert_eq!(with(time).unwrap().time(), Some(time));
    }
    for time in [
        "2026-03-01 12:00:00Z",
        "20260301T120000Z",
        "2026-03-01T12:00:00",
        "2026-03-01T12:00:00,5Z",
        "2026-03-01T12:00:00.Z",
        "2026-03-01T12:00:00+01",
        "2026-03-01T12:00:00+24:00",
        "2026-03-01T12:00:00+01:60",
        "2026-03-01T12:00:61Z",
        "10000-01-01T00:00:00Z",
        "2025-02-29T12:00:00Z",
        "2026-03-01T24:00:00Z",
        "é026-03-01T12:00:00Z",
        "+002026-03-01T12:00:00Z",
        "now",
    ] {
        assert!(with(time).is_err(), "{time}");
    }
}
