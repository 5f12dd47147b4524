//! Whatever event is written, in whichever form, is read as the same event.
use events::events;
use proptest::prelude::*;
use warren_shared::structured::Defaults;
use warren_shared::wire::Identified;
use warren_shared::{Data, Event, Limits, Message};

mod events;

fn read(message: &Message) -> Event {
    message.read(Limits::default(), || unreachable!("it has its id")).expect("readable").event
}

proptest! {
    #[test]
    fn an_event_written_as_a_message_is_read_back_the_same(event in events()) {
        let message = Message::write(&event, "warren.events");
        let incoming = message.read(Limits::default(), || unreachable!("it has its id")).expect("readable");
        prop_assert_eq!(&incoming.event, &event);
        prop_assert_eq!((incoming.identified, incoming.attempt), (Identified::ByItself, 1));
        prop_assert_eq!((incoming.left, incoming.replayed, incoming.priority), (Default::default(), 0, 0));

        prop_assert_eq!((message.exchange.as_str(), message.routing_key.as_str()), ("warren.events", event.kind()));
        prop_assert_eq!(message.message_id.as_deref(), Some(event.id()));
        let key = event.key();
        prop_assert_eq!(message.correlation_id.as_deref(), Some(&*key));
        prop_assert!(key.len() <= 255, "AMQP cannot carry the key {key}");
        prop_assert_eq!(incoming.event.key(), key);
        prop_assert_eq!(incoming.event.identity(), event.identity());
        // Once read from a message, data has the kind that every later reader sees.
        prop_assert_eq!(read(&Message::write(&incoming.event, "x")).to_json(), incoming.event.to_json());
    }

    #[test]
    fn an_event_written_as_json_stands_on_one_line_and_is_read_back_the_same(event in events()) {
        let json = event.to_json();
        prop_assert!(!json.contains(['\n', '\r']), "{json}");
        let again = Event::from_json(json.as_bytes(), Limits::default()).expect("readable");
        prop_assert_eq!(&again, &event);
        prop_assert_eq!(again.to_json(), json);
        let value: serde_json::Value = serde_json::from_str(&again.to_json()).expect("JSON");
        prop_assert_eq!(value["id"].as_str(), Some(event.id()));
    }

    #[test]
    fn a_whole_event_takes_no_defaults_but_for_time_key_and_trace(event in events()) {
        let unused = || "unused".to_owned();
        let (id, source, key, time) = (unused(), unused(), unused(), "2026-01-01T00:00:00Z".to_owned());
        let defaults = Defaults { id, source, time, key, trace: None };
        let read = Event::from_partial(event.to_json().as_bytes(), Limits::default(), defaults).expect("readable");
        prop_assert_eq!(read.identity(), event.identity());
        prop_assert_eq!(read.time(), event.time().or(Some("2026-01-01T00:00:00Z")));
        if event.extension("partitionkey").is_some() || event.subject().is_some() {
            prop_assert_eq!(read.key(), event.key());
        } else {
            prop_assert_eq!(read.key(), "unused");
        }
        prop_assert_eq!(read.data(), event.data());
    }
}

#[test]
fn line_breaks_in_json_become_spaces_and_nothing_else_changes() {
    let pretty = b"{\r\n\t\"a\": [\n1,\n2\n],\n\"text\": \"a\\nb\"\n}";
    let event = Event::new("1", "/test", "t").unwrap().with_json(pretty, Limits::default()).unwrap();
    let json = event.to_json();
    assert!(json.ends_with("\"data\":{  \t\"a\": [ 1, 2 ], \"text\": \"a\\nb\" }}"), "{json}");
    assert_eq!(read(&Message::write(&event, "x")).data().map(Data::as_bytes), Some(pretty.as_slice()));
}

#[test]
fn a_partial_event_takes_what_it_does_not_say() {
    let defaults = || Defaults {
        id: "made".into(),
        source: "/worker".into(),
        time: "2026-01-01T00:00:00Z".into(),
        key: "customer-7".into(),
        trace: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
    };
    for (partial, whole) in [
        (
            r#"{"type":"order.paid","data":{"a":1}}"#,
            r#"{"specversion":"1.0","id":"made","source":"/worker","type":"order.paid","time":"2026-01-01T00:00:00Z","partitionkey":"customer-7","traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01","data":{"a":1}}"#,
        ),
        (
            r#"{"type":"order.paid","id":"own","subject":"customer/8","traceparent":"own"}"#,
            r#"{"specversion":"1.0","id":"own","source":"/worker","type":"order.paid","subject":"customer/8","time":"2026-01-01T00:00:00Z","traceparent":"own"}"#,
        ),
    ] {
        let event = Event::from_partial(partial.as_bytes(), Limits::default(), defaults()).unwrap();
        assert_eq!(event.to_json(), whole);
    }
    for (partial, problem) in [
        ("{}", "the attribute 'type' is missing"),
        (r#"{"type":"t","specversion":"0.3"}"#, "specversion is '0.3', only '1.0' is understood"),
        (r#"{"type":"t","id":""}"#, "the attribute 'id' is empty"),
    ] {
        let error = Event::from_partial(partial.as_bytes(), Limits::default(), defaults()).unwrap_err();
        assert_eq!(error.to_string(), problem);
    }
}
