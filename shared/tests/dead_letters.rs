//! A dead letter tells why, keeps the event whole, and comes back to life as what it was.
use events::events;
use proptest::prelude::*;
use warren_shared::dead::{self, Cause, Scene};
use warren_shared::wire::{Foreign, Header, Identified, Incoming, Typed};
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
    letter.headers.push(("x-death".into(), nested(3)));
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

fn nested(depth: usize) -> Header {
    Header::Typed(Box::new(Typed { value: None, depth, wire: vec![b'A', 0, 0, 0, 0] }))
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
        foreign: Some(Box::new(Foreign {
            content_encoding: Some("br".into()),
            reply_to: Some("billing.answers".into()),
            cluster_id: Some("c".into()),
            expiration: Some("60000".into()),
            user_id: Some("billing".into()),
        })),
        headers: vec![
            ("tenant".into(), Header::Plain("north".into())),
            ("deep".into(), nested(100)),
            ("void".into(), Header::Void),
        ],
        body: b"{\"total\": \xff".to_vec(),
    }
}

#[test]
fn a_message_that_is_no_event_dies_and_revives_as_it_came() {
    let letter = dead::of_message(marked(garbage()), &cause("not UTF-8"), &scene(), "warren.orders.dead");
    assert_eq!(text(&letter, "warren-dead-error"), Some("not UTF-8"));
    // What the broker would act on stands where people look.
    assert_eq!(text(&letter, "warren-dead-expiration"), Some("60000"));
    assert_eq!(text(&letter, "warren-dead-user-id"), Some("billing"));
    assert!(!letter.headers.iter().any(|(name, _)| name.starts_with("x-")), "{:?}", letter.headers);

    let alive = dead::revive(marked(letter), "orders-exchange");
    let mut headers = garbage().headers;
    headers.push(("warren-replayed".into(), Header::Plain(1_i64.into())));
    assert_eq!(alive, Message { headers, ..garbage() });
    assert_eq!(dead::revive(alive, "x").number("warren-replayed"), Some(2));
}

/// A message of a system that names no source, as the broker hands it out of the queue of dead letters.
fn sourceless(death: &[(&str, &str)]) -> Message {
    let headers = death.iter().map(|(name, value)| ((*name).to_owned(), Header::Plain((*value).into()))).collect();
    Message { exchange: "warren.orders.dead".into(), app_id: None, headers, body: b"{}".to_vec(), ..garbage() }
}

#[test]
fn a_replay_has_the_identity_that_its_message_had_whoever_let_it_die() {
    let wanted = Message { exchange: "orders-exchange".into(), ..sourceless(&[]) };
    let wanted = read(&wanted).identity;
    for death in [
        &[("x-first-death-exchange", "orders-exchange"), ("x-first-death-reason", "expired")][..],
        // It had died elsewhere before it came to us.
        &[("x-first-death-exchange", "elsewhere"), ("x-last-death-exchange", "orders-exchange")],
    ] {
        let mut letter = sourceless(death);
        let alive = dead::revive(letter.clone(), "warren.orders");
        assert_eq!((read(&alive).identity, alive.exchange.as_str()), (wanted, "warren.orders"), "{death:?}");
        assert_eq!(read(&dead::revive(alive, "warren.orders")).identity, wanted, "a second replay");
        dead::recall(&mut letter);
        assert_eq!(read(&letter).identity, wanted, "as it is shown");
    }
    // Ours: it could not be read, and can be after a change of the limits.
    let unread = Message { app_id: None, headers: vec![], body: b"{}".to_vec(), ..garbage() };
    let letter = dead::of_message(unread.clone(), &cause("too large"), &scene(), "warren.orders.dead");
    assert_eq!(read(&dead::revive(letter, "warren.orders")).identity, read(&unread).identity);
    // What says itself where it is from is left as it is.
    let own = Message { app_id: Some("shop".into()), ..sourceless(&[("x-first-death-exchange", "orders-exchange")]) };
    assert_eq!(dead::revive(own, "warren.orders").app_id.as_deref(), Some("shop"));
}

#[test]
fn an_event_keeps_the_properties_of_its_message_but_for_the_encoding_that_it_was_read_from() {
    let foreign = |encoding: Option<&str>| {
        let foreign = *garbage().foreign.expect("properties");
        Some(Box::new(Foreign { content_encoding: encoding.map(Into::into), ..foreign }))
    };
    let gzip = vec![31, 139, 8, 0, 0, 0, 0, 0, 2, 3, 51, 4, 0, 183, 239, 220, 131, 1, 0, 0, 0];
    for (encoding, body, kept) in
        [(Some("gzip"), gzip, None), (Some("utf-8"), b"1".to_vec(), Some("utf-8")), (None, b"1".to_vec(), None)]
    {
        let event = read(&Message { foreign: foreign(encoding), body, headers: Vec::new(), ..garbage() }).event;
        let letter = dead::of_event(&event, 0, "normal", &cause("no"), &scene(), "warren.orders.dead");
        assert_eq!((letter.body.as_slice(), &letter.foreign), (&b"1"[..], &foreign(kept)), "{encoding:?}");
        assert_eq!(text(&letter, "warren-dead-expiration"), Some("60000"));
        assert_eq!(text(&letter, "warren-dead-user-id"), Some("billing"));
    }
}

#[test]
fn headers_that_would_not_fit_beside_the_reason_stay_behind() {
    let with = |count: usize| {
        let header = |i| (format!("h{i}"), Header::Plain("x".repeat(1000).into()));
        let message = Message { headers: (0..count).map(header).collect(), ..garbage() };
        dead::of_message(message, &cause("no"), &scene(), "d")
    };
    assert_eq!(with(60).headers.len(), 60 + 9);
    assert_eq!(with(70).headers.len(), 9);
    let header = |i| (format!("{i:04}"), Header::Plain("".into()));
    let many = Message { headers: (0..8000).map(header).collect(), ..garbage() };
    assert_eq!(dead::of_message(many, &cause("no"), &scene(), "d").headers.len(), 9, "small headers count in full");
    assert_eq!(with(70).body, garbage().body);
}
