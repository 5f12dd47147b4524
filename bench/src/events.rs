//! The events under measure: 256 bytes of data, about 10,000 keys, and ids that are the same in every run.
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use uuid::{Builder, Uuid};
use warren_shared::{Event, Limits};

/// The type of all of them.
pub(crate) const KIND: &str = "bench.done";
const SOURCE: &str = "/bench";
/// The series of the publish rows; others begin at 1.
pub(crate) const PUBLISHED: u64 = 0;
/// Bytes of data.
const DATA: usize = 256;
/// Random ones, not one after the other: keys meet as they do in life.
const KEYS: u64 = 10_000;

/// A message as lapin publishes it.
pub(crate) type Wire = (BasicProperties, Vec<u8>);

/// What an event's data says.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct Said {
    /// Its number.
    pub(crate) n: u64,
    /// When it was sent, in µs since 1970; 0 where nobody asks.
    pub(crate) sent: u64,
}

/// The id of the n-th event; another series has other ids.
fn id(series: u64, n: u64) -> Uuid {
    let (high, low) = (mix(series << 40 | n), mix(!(series << 40 | n)));
    Builder::from_random_bytes((u128::from(high) << 64 | u128::from(low)).to_be_bytes()).into_uuid()
}

fn key(series: u64, n: u64) -> String {
    format!("key-{:04}", mix(series << 40 ^ n ^ 0x5bd1_e995) % KEYS)
}

/// SplitMix64: one number to another that looks random.
pub(crate) fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

fn data(n: u64, sent: u64) -> Vec<u8> {
    let head = format!("{{\"n\":{n},\"sent\":{sent},\"pad\":\"");
    let mut data = head.into_bytes();
    data.resize(DATA - 2, b'x');
    data.extend(b"\"}");
    data
}

/// The n-th event of a series.
///
/// # Errors
/// Never, unless the schema changes.
pub(crate) fn event(series: u64, n: u64) -> anyhow::Result<Event> {
    let event = Event::new(id(series, n).to_string(), SOURCE, KIND)?;
    Ok(event.with("partitionkey", key(series, n).into())?.with_json(&data(n, 0), Limits::default())?)
}

/// The same event as `Message::write` and the publisher put it on the wire, made as a hand-written loop makes it.
pub(crate) fn wire(series: u64, n: u64, sent: u64) -> Wire {
    let (id, key) = (id(series, n).to_string(), key(series, n));
    let mut headers = FieldTable::default();
    let mut put = |name: &str, text: &str| {
        headers.insert(short(name), AMQPValue::LongString(LongString::from(text)));
    };
    put("cloudEvents_specversion", "1.0");
    put("cloudEvents_id", &id);
    put("cloudEvents_source", SOURCE);
    put("cloudEvents_type", KIND);
    put("cloudEvents_partitionkey", &key);
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_content_type(short("application/json"))
        .with_message_id(short(&id))
        .with_correlation_id(short(&key))
        .with_type(short(KIND))
        .with_headers(headers);
    (properties, data(n, sent))
}

/// All strings here are short by construction.
pub(crate) fn short(text: &str) -> ShortString {
    ShortString::try_new(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use warren_shared::Message;
    use warren_shared::event::Value;
    use warren_shared::wire::Header;

    #[test]
    fn the_hand_written_message_is_what_the_publisher_writes() {
        let message = Message::write(&event(3, 7).expect("valid"), "warren.events");
        let (properties, body) = wire(3, 7, 0);
        assert_eq!(body.len(), DATA);
        assert_eq!(body, message.body);
        let text = |s: &Option<ShortString>| s.as_ref().map(|s| s.as_str().to_owned());
        assert_eq!(text(properties.message_id()), message.message_id);
        assert_eq!(text(properties.correlation_id()), message.correlation_id);
        assert_eq!(text(properties.kind()), message.kind);
        assert_eq!(text(properties.content_type()), message.content_type);
        let ours = properties.headers().clone().unwrap_or_default();
        assert_eq!(ours.inner().len(), message.headers.len());
        for (name, value) in &message.headers {
            let Header::Plain(Value::Text(theirs)) = value else { panic!("{name} is no text") };
            let Some(AMQPValue::LongString(text)) = ours.inner().get(name.as_str()) else { panic!("no {name}") };
            assert_eq!(text.as_bytes(), theirs.as_bytes());
        }
    }
}
