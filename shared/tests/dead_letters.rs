//! A dead letter tells why, keeps the event whole, and comes back to life as what it was.
use events::events;
use proptest::prelude::*;
use warren_shared::dead::{self, Cause, Scene};
use warren_shared::wire::{Header, Identified, Incoming};
use warren_shared::{Event, Limits, Message, Value};

mod events;

fn cause(error: &str) -> Cause {
    Cause { reason: "exhausted", error: error.into(), attempts: 8, handler: "order.*".into() }
}

fn scene() -> Scene {
    Scene { worker: "worker-3".into(), at: "2026-03-01T12:00:00Z".into() }
}

fn text<'a>(message: &'a Message, name: &str) -> Option<&'a str> {
    match message.header(name)? {
        Value::Text(text) => Some(text),
        other => panic!("{name} is {other:?}"),
    }
}

fn read(message: &Message) -> Incoming {
    message.read(Limits::default(), || unreachable!("it has its id")).expect("readable")
}

/// What the broker adds on the way through the dead-letter queue.
fn marked(mut letter: Message) -> Message {
    letter.headers.push(("x-death".into(), Header::Nested(3)));
    letter.set("x-first-death-exchange", "warren.orders.dead");
    letter.set("x-last-death-reason", "expired");
    letter.set("x-delivery-count", 2_i64);
    letter
}

fn has_marks(message: &Message) -> bool {
    message.headers.iter().any(|(name, _)| name.starts_with("x-") || name.starts_with(dead::PREFIX))
}

proptest! {
    #[test]
    fn a_revived_letter_is_the_same_event_with_one_replay_more(event in events(), replayed in 0..u32::MAX) {
        let letter = dead::of_event(&event, replayed, "high", &cause("no"), &scene(), "warren.orders.dead");
        prop_assert_eq!(read(&letter).replayed, replayed);
        prop_assert_eq!(&read(&letter).event, &event);

        let alive = dead::revive(marked(letter), "warren.orders");
        prop_assert!(!has_marks(&alive), "{:?}", alive.headers);
        prop_assert_eq!((alive.exchange.as_str(), alive.routing_key.as_str()), ("warren.orders", event.kind()));
        let key = event.key();
        prop_assert_eq!(alive.correlation_id.as_deref(), Some(&*key));
        prop_assert_eq!(text(&alive, "warren-lane"), Some("high"));
        let incoming = read(&alive);
        prop_assert_eq!(&incoming.event, &event);
        prop_assert_eq!((incoming.attempt, incoming.left, incoming.replayed), (1, Default::default(), replayed + 1));
        prop_assert_eq!(incoming.identified, Identified::ByItself);
    }

    #[test]
    fn an_error_is_cut_at_1024_bytes_and_never_inside_a_character(plain in 1000..1030_usize, rest in "[aé🐇]{0,20}") {
        let error = "a".repeat(plain) + &rest;
        let event = Event::new("1", "/test", "t").expect("valid");
        let letter = dead::of_event(&event, 0, "normal", &cause(&error), &scene(), "d");
        let cut = text(&letter, "warren-dead-error").expect("set");
        prop_assert!(error.starts_with(cut) && cut.len() <= 1024);
        let next = error[cut.len()..].chars().next();
        prop_assert!(next.is_none_or(|next| cut.len() + next.len_utf8() > 1024), "cut short: {} bytes", cut.len());
    }
}

#[test]
fn a_letter_says_why_where_and_when() {
    let event = Event::new("1", "/test", "order.placed").unwrap();
    let letter = dead::of_event(&event, 0, "low", &cause("card declined"), &scene(), "warren.orders.dead");
    for (name, expected) in [
        ("warren-dead-reason", "exhausted"),
        ("warren-dead-error", "card declined"),
        ("warren-dead-handler", "order.*"),
        ("warren-dead-worker", "worker-3"),
        ("warren-dead-at", "2026-03-01T12:00:00Z"),
        ("warren-lane", "low"),
    ] {
        assert_eq!(text(&letter, name), Some(expected));
    }
    assert_eq!(letter.number("warren-dead-attempts"), Some(8));
    assert_eq!(letter.header("warren-replayed"), None);
    let again = dead::of_event(&event, 1, "low", &cause("again"), &scene(), "warren.orders.dead");
    assert_eq!(again.number("warren-replayed"), Some(1));
    assert_eq!(letter.exchange, "warren.orders.dead");
}

fn garbage() -> Message {
    Message {
        exchange: "orders-exchange".into(),
        routing_key: "order.created".into(),
        content_type: Some("application/json".into()),
        message_id: Some("m-1".into()),
        correlation_id: Some("customer-7".into()),
        app_id: Some("billing".into()),
        kind: Some("order.created".into()),
        timestamp: Some(1_767_225_600),
        priority: Some(3),
        headers: vec![
            ("tenant".into(), Header::Plain("north".into())),
            ("deep".into(), Header::Nested(26_000)),
            ("blob".into(), Header::Opaque),
        ],
        body: b"{\"total\": \xff".to_vec(),
    }
}

#[test]
fn a_message_that_is_no_event_dies_and_revives_as_it_came_less_what_cannot_be_written() {
    let letter = dead::of_message(marked(garbage()), &cause("not UTF-8"), &scene(), "warren.orders.dead");
    assert_eq!(text(&letter, "warren-dead-error"), Some("not UTF-8"));
    assert!(letter.headers.iter().all(|(_, header)| matches!(header, Header::Plain(_))), "{:?}", letter.headers);
    assert!(!letter.headers.iter().any(|(name, _)| name.starts_with("x-")), "{:?}", letter.headers);

    let alive = dead::revive(marked(letter), "orders-exchange");
    let mut headers = vec![("tenant".into(), Header::Plain("north".into()))];
    headers.push(("warren-replayed".into(), Header::Plain(1_i64.into())));
    assert_eq!(alive, Message { headers, ..garbage() });
    assert_eq!(dead::revive(alive, "x").number("warren-replayed"), Some(2));
}

#[test]
fn headers_that_would_not_fit_beside_the_reason_stay_behind() {
    let with = |count: usize| {
        let header = |i| (format!("h{i}"), Header::Plain("x".repeat(1000).into()));
        let message = Message { headers: (0..count).map(header).collect(), ..garbage() };
        dead::of_message(message, &cause("no"), &scene(), "d")
    };
    assert_eq!(with(60).headers.len(), 60 + 6);
    assert_eq!(with(70).headers.len(), 6);
    let header = |i| (format!("{i:04}"), Header::Plain("".into()));
    let many = Message { headers: (0..8000).map(header).collect(), ..garbage() };
    assert_eq!(dead::of_message(many, &cause("no"), &scene(), "d").headers.len(), 6, "small headers count in full");
    assert_eq!(with(70).body, garbage().body);
}
