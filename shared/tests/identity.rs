//! What identifies an event and what keeps it in order: values that stores and partitions hold for ever.
use std::collections::HashSet;
use warren_shared::{Event, Identity, Value};

fn event(attributes: &[(&str, &str)]) -> Event {
    let event = Event::new("A-1", "/shop", "order.placed").expect("valid");
    attributes.iter().fold(event, |event, (name, value)| event.with(name, Value::Text((*value).into())).expect("valid"))
}

#[test]
fn an_identity_is_the_same_in_every_version() {
    let identity = Identity::of("/shop", "A-1");
    assert_eq!(format!("{identity:?}"), "5b262471-6971-529a-8740-642f452fe068");
    assert_eq!(identity.derive("order/charge/do"), "8639fdc7-96f2-5ab4-91a9-ac19a919eb0b");
    assert_eq!(format!("{:?}", Identity::of("urn:größe", "🐇")), "55ba25bc-9e79-552a-94ed-34911e0fd68b");
    assert_eq!(event(&[]).identity(), identity);
    assert_eq!(format!("{identity:?}").replace('-', ""), hex(identity.as_bytes()));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn source_and_id_alone_make_the_identity_and_their_border_counts() {
    let pairs = [("/a", "b"), ("/a", "c"), ("/b", "b"), ("/ab", "c"), ("/a", "bc"), ("/abc", "1"), ("/ab", "c1")];
    let identities: HashSet<_> = pairs.iter().map(|(source, id)| Identity::of(source, id)).collect();
    assert_eq!(identities.len(), pairs.len());
    let other = event(&[("subject", "s"), ("partitionkey", "k"), ("time", "2026-03-01T12:00:00Z"), ("tenant", "t")]);
    assert_eq!(other.identity(), event(&[]).identity());
    let derived: HashSet<_> = ["do", "undo", ""].iter().map(|what| other.identity().derive(what)).collect();
    assert_eq!(derived.len(), 3);
}

#[test]
fn a_key_is_the_partition_key_else_the_subject_else_the_id() {
    assert_eq!(event(&[]).key(), "A-1");
    assert_eq!(event(&[("subject", "customer/7")]).key(), "customer/7");
    assert_eq!(event(&[("subject", "customer/7"), ("partitionkey", "k")]).key(), "k");
    assert_eq!(event(&[("partitionkey", "k")]).key(), "k");
}

#[test]
fn a_subject_too_long_for_amqp_keeps_its_order_by_a_hash_that_never_changes() {
    assert_eq!(event(&[("subject", &"s".repeat(255))]).key(), "s".repeat(255));
    assert_eq!(event(&[("subject", &"s".repeat(256))]).key(), "e8038c8f-9269-58ed-ac07-5d3316071660");
    assert_ne!(event(&[("subject", &"s".repeat(257))]).key(), event(&[("subject", &"s".repeat(256))]).key());
}

#[test]
fn a_priority_asks_for_a_lane() {
    let lanes: Vec<_> = (0..=9).map(|p: i64| event(&[("priority", &p.to_string())]).lane().unwrap()).collect();
    let expected = ["low", "low", "low", "low", "normal", "normal", "normal", "high", "high", "high"];
    assert_eq!(lanes, expected);
    assert_eq!(event(&[]).lane(), None);
    for wrong in [Value::Int(10), Value::Int(-1), Value::Text("urgent".into()), Value::Bool(true)] {
        assert!(Event::new("1", "/s", "t").unwrap().with("priority", wrong).is_err());
    }
}
