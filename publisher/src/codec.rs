//! Between AMQP's types and plain values: the only place that knows both.
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::generation::gen_value;
use lapin::types::parsing::parse_value;
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use warren_shared::Message;
use warren_shared::event::{Value, time_of};
use warren_shared::topology::{Argument, Arguments};
use warren_shared::wire::{Foreign, Header, Typed};

/// Why a message cannot be put on the wire.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unwritable {
    /// AMQP's short strings end at 255 bytes.
    #[error("the {0} has {1} bytes, AMQP carries at most 255")]
    TooLong(&'static str, usize),
    /// All headers must fit in one frame.
    #[error("the headers have about {0} bytes, at most {1} fit in a frame")]
    Headers(usize, usize),
    /// Its payload came sealed, and would leave in plain.
    #[error("its payload is to be sealed, which cannot be done ({0}): it stays here")]
    Unsealed(&'static str),
}

/// The most bytes of headers that a frame of this size holds beside the other properties (five short strings and less);
/// 0 = any size. Never more than fits in the common 128 KiB: the next hop's frames may be smaller than ours.
pub(crate) fn header_room(frame_max: u32) -> usize {
    match frame_max as usize {
        0 => HEADER_LIMIT,
        size => size.saturating_sub(PROPERTIES).min(HEADER_LIMIT),
    }
}

const HEADER_LIMIT: usize = 100_000;
const PROPERTIES: usize = 2048;
/// A header that is nested deeper is not written again: reading it is recursive in the library. `sieve` lets none in.
const DEEPEST: usize = 128;
/// `delivery_mode`: on disk.
const PERSISTENT: u8 = 2;

/// A delivery's message as values, without its body.
#[must_use]
pub fn envelope(delivery: &Delivery) -> Message {
    from_parts(delivery.exchange.as_str(), delivery.routing_key.as_str(), &delivery.properties, Vec::new())
}

/// A delivery's message as values. Deeply nested headers are measured, not followed by recursion.
#[must_use]
pub fn read(delivery: Delivery) -> Message {
    let Delivery { exchange, routing_key, properties, data, .. } = delivery;
    from_parts(exchange.as_str(), routing_key.as_str(), &properties, data)
}

pub(crate) fn from_parts(exchange: &str, routing_key: &str, properties: &BasicProperties, body: Vec<u8>) -> Message {
    let text = |property: &Option<ShortString>| property.as_ref().map(|s| s.as_str().to_owned());
    let headers = properties
        .headers()
        .as_ref()
        .map(|table| table.inner().iter().map(|(name, value)| (name.as_str().to_owned(), header(value))).collect());
    let foreign = Foreign {
        content_encoding: text(properties.content_encoding()),
        reply_to: text(properties.reply_to()),
        cluster_id: text(properties.cluster_id()),
        expiration: text(properties.expiration()),
        user_id: text(properties.user_id()),
    };
    Message {
        exchange: exchange.to_owned(),
        routing_key: routing_key.to_owned(),
        content_type: text(properties.content_type()),
        message_id: text(properties.message_id()),
        correlation_id: text(properties.correlation_id()),
        app_id: text(properties.app_id()),
        kind: text(properties.kind()),
        timestamp: *properties.timestamp(),
        priority: *properties.priority(),
        foreign: (foreign != Foreign::default()).then(|| Box::new(foreign)),
        headers: headers.unwrap_or_default(),
        body,
    }
}

fn header(value: &AMQPValue) -> Header {
    let int = |i: i64| Header::Plain(Value::Int(i));
    match value {
        AMQPValue::Boolean(b) => Header::Plain(Value::Bool(*b)),
        AMQPValue::ShortShortInt(i) => int((*i).into()),
        AMQPValue::ShortShortUInt(i) => int((*i).into()),
        AMQPValue::ShortInt(i) => int((*i).into()),
        AMQPValue::ShortUInt(i) => int((*i).into()),
        AMQPValue::LongInt(i) => int((*i).into()),
        AMQPValue::LongUInt(i) => int((*i).into()),
        AMQPValue::LongLongInt(i) => int(*i),
        AMQPValue::Timestamp(t) => typed(value, time_of(*t).map(Value::Text)),
        AMQPValue::Float(f) => typed(value, Some(Value::Text(f.to_string()))),
        AMQPValue::Double(f) => typed(value, Some(Value::Text(f.to_string()))),
        AMQPValue::ShortString(s) => Header::Plain(Value::Text(s.as_str().to_owned())),
        AMQPValue::LongString(s) => match std::str::from_utf8(s.as_bytes()) {
            Ok(text) => Header::Plain(Value::Text(text.to_owned())),
            Err(_) => typed(value, None),
        },
        AMQPValue::ByteArray(bytes) => typed(value, Some(Value::of_bytes(bytes.as_slice()))),
        AMQPValue::FieldArray(_) | AMQPValue::FieldTable(_) | AMQPValue::DecimalValue(_) => typed(value, None),
        AMQPValue::Void => Header::Void,
    }
}

/// A value of a type that attributes do not have, and what one makes of it.
fn typed(value: &AMQPValue, plain: Option<Value>) -> Header {
    let depth = depth(value);
    let wire = if depth > DEEPEST { Vec::new() } else { wire(value) };
    Header::Typed(Box::new(Typed { value: plain, depth, wire }))
}

/// As AMQP writes it. Writing to memory does not fail.
fn wire(value: &AMQPValue) -> Vec<u8> {
    gen_value(value)(Vec::new().into()).map(|written| written.into_inner().0).unwrap_or_default()
}

/// Levels of nesting, with the work list on the heap.
fn depth(value: &AMQPValue) -> usize {
    let (mut open, mut deepest) = (vec![(value, 1)], 0);
    while let Some((value, level)) = open.pop() {
        deepest = deepest.max(level);
        match value {
            AMQPValue::FieldArray(array) => open.extend(array.as_slice().iter().map(|v| (v, level + 1))),
            AMQPValue::FieldTable(table) => open.extend(table.inner().values().map(|v| (v, level + 1))),
            _ => {}
        }
    }
    deepest - 1
}

/// A message's properties, with so much room for headers. Everything is persistent.
///
/// # Errors
/// Names the property that AMQP cannot carry.
pub(crate) fn write(message: &Message, room: usize) -> Result<BasicProperties, Unwritable> {
    let mut properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
    if let Some(text) = short("content type", message.content_type.as_deref())? {
        properties = properties.with_content_type(text);
    }
    if let Some(text) = short("message id", message.message_id.as_deref())? {
        properties = properties.with_message_id(text);
    }
    if let Some(text) = short("key", message.correlation_id.as_deref())? {
        properties = properties.with_correlation_id(text);
    }
    if let Some(text) = short("application id", message.app_id.as_deref())? {
        properties = properties.with_app_id(text);
    }
    if let Some(text) = short("type", message.kind.as_deref())? {
        properties = properties.with_type(text);
    }
    if let Some(seconds) = message.timestamp {
        properties = properties.with_timestamp(seconds);
    }
    if let Some(priority) = message.priority {
        properties = properties.with_priority(priority);
    }
    if let Some(foreign) = &message.foreign {
        if let Some(text) = short("content encoding", foreign.content_encoding.as_deref())? {
            properties = properties.with_content_encoding(text);
        }
        // By this very name the broker asks who consumes on the channel that publishes.
        let reply_to = foreign.reply_to.as_deref().filter(|name| *name != "amq.rabbitmq.reply-to");
        if let Some(text) = short("reply address", reply_to)? {
            properties = properties.with_reply_to(text);
        }
        if let Some(text) = short("cluster id", foreign.cluster_id.as_deref())? {
            properties = properties.with_cluster_id(text);
        }
    }
    let mut table = FieldTable::default();
    let mut size = 0;
    for (name, value) in &message.headers {
        let mut length = 10;
        let value = match value {
            Header::Plain(Value::Bool(b)) => AMQPValue::Boolean(*b),
            Header::Plain(Value::Int(i)) => AMQPValue::LongLongInt(*i),
            Header::Plain(Value::Text(text)) => {
                length = text.len() + 6;
                AMQPValue::LongString(LongString::from(text.as_bytes()))
            }
            Header::Void => AMQPValue::Void,
            Header::Typed(typed) => {
                length += typed.wire.len();
                let Ok((_, value)) = parse_value(&*typed.wire) else { continue };
                value
            }
        };
        let name = ShortString::try_new(name.clone()).map_err(|_| Unwritable::TooLong("header's name", name.len()))?;
        size += name.as_str().len() + length;
        table.insert(name, value);
    }
    if size > room {
        return Err(Unwritable::Headers(size, room));
    }
    Ok(properties.with_headers(table))
}

/// Exchange and routing key as AMQP takes them.
pub(crate) fn address(message: &Message) -> Result<(ShortString, ShortString), Unwritable> {
    let exchange = short("exchange's name", Some(&message.exchange))?.unwrap_or_default();
    let key = short("routing key", Some(&message.routing_key))?.unwrap_or_default();
    Ok((exchange, key))
}

fn short(what: &'static str, text: Option<&str>) -> Result<Option<ShortString>, Unwritable> {
    text.map(|text| ShortString::try_new(text).map_err(|_| Unwritable::TooLong(what, text.len()))).transpose()
}

/// A declaration's arguments.
pub(crate) fn arguments(arguments: &Arguments) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        let value = match value {
            Argument::Text(text) => AMQPValue::LongString(LongString::from(text.as_bytes())),
            Argument::Int(i) => AMQPValue::LongLongInt(*i),
            Argument::Flag(flag) => AMQPValue::Boolean(*flag),
        };
        table.insert(ShortString::from(*name), value);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::types::FieldArray;

    #[test]
    fn twenty_six_thousand_levels_are_counted_not_followed() {
        // Building and dropping such a value is recursive in the library; what arrives was cut by `sieve` before.
        let run = || {
            let mut value = AMQPValue::Void;
            for _ in 0..26_000 {
                let mut array = FieldArray::default();
                array.push(value);
                value = AMQPValue::FieldArray(array);
            }
            let Header::Typed(typed) = header(&value) else { panic!("a list") };
            assert_eq!((typed.depth, typed.wire.len()), (26_000, 0));
        };
        let thread = std::thread::Builder::new().stack_size(64 << 20).spawn(run).expect("spawned");
        thread.join().expect("no overflow");
    }

    #[test]
    fn what_was_written_is_read_alike() {
        let mut message = Message {
            exchange: "x".into(),
            routing_key: "order.placed".into(),
            content_type: Some("application/json".into()),
            message_id: Some("1".into()),
            correlation_id: Some("k".into()),
            kind: Some("order.placed".into()),
            timestamp: Some(1_700_000_000),
            body: b"{}".to_vec(),
            ..Message::default()
        };
        message.set("warren-attempt", 2_u32);
        message.set("note", "schön");
        let properties = write(&message, HEADER_LIMIT).expect("writable");
        let mut read = from_parts("x", "order.placed", &properties, b"{}".to_vec());
        read.headers.sort_by(|a, b| b.0.cmp(&a.0));
        assert_eq!(read, message);
    }

    #[test]
    fn headers_of_every_type_and_properties_of_no_use_leave_as_they_came() {
        let mut inner = FieldTable::default();
        inner.insert("deep".into(), AMQPValue::Double(1.5));
        let mut list = FieldArray::default();
        list.push(AMQPValue::FieldTable(inner));
        list.push(AMQPValue::Void);
        let mut table = FieldTable::default();
        for (name, value) in [
            ("flag", AMQPValue::Boolean(true)),
            ("int", AMQPValue::LongLongInt(-7)),
            ("text", AMQPValue::LongString("schön".into())),
            ("latin", AMQPValue::LongString(LongString::from(b"caf\xe9".as_slice()))),
            ("bytes", AMQPValue::ByteArray(vec![0, 255].into())),
            ("float", AMQPValue::Float(0.1)),
            ("double", AMQPValue::Double(12345678.9)),
            ("decimal", AMQPValue::DecimalValue(lapin::types::DecimalValue { scale: 2, value: 1099 })),
            ("time", AMQPValue::Timestamp(1_700_000_000)),
            ("late", AMQPValue::Timestamp(u64::MAX)),
            ("void", AMQPValue::Void),
            ("list", AMQPValue::FieldArray(list)),
        ] {
            table.insert(name.into(), value);
        }
        let came = BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_content_encoding("br".into())
            .with_reply_to("answers".into())
            .with_cluster_id("c".into())
            .with_headers(table);
        let acted_on = came.clone().with_expiration("1000".into()).with_user_id("guest".into());
        let message = from_parts("x", "k", &acted_on, Vec::new());
        assert_eq!(write(&message, HEADER_LIMIT), Ok(came.clone()), "less what the broker would act on");
        // A store keeps it in between.
        let stored = serde_json::to_string(&message).and_then(|text| serde_json::from_str::<Message>(&text));
        assert_eq!(write(&stored.expect("kept"), HEADER_LIMIT), Ok(came.clone()));
        let foreign = message.foreign.as_deref().expect("properties");
        assert_eq!((foreign.expiration.as_deref(), foreign.user_id.as_deref()), (Some("1000"), Some("guest")));
        for (name, value) in [("bytes", "AP8="), ("float", "0.1"), ("time", "2023-11-14T22:13:20Z")] {
            assert_eq!(message.header(name), Some(&value.into()), "{name}");
        }
        for name in ["latin", "decimal", "late", "void", "list"] {
            assert_eq!(message.header(name), None, "{name}");
        }
        let direct = from_parts("x", "k", &came.with_reply_to("amq.rabbitmq.reply-to".into()), Vec::new());
        assert_eq!(write(&direct, HEADER_LIMIT).map(|properties| properties.reply_to().clone()), Ok(None));
    }

    #[test]
    fn what_amqp_cannot_carry_is_refused_by_name() {
        let message = Message { message_id: Some("x".repeat(300)), ..Message::default() };
        assert_eq!(write(&message, HEADER_LIMIT), Err(Unwritable::TooLong("message id", 300)));
        let mut message = Message::default();
        message.set("big", "x".repeat(200_000));
        assert!(matches!(write(&message, header_room(0)), Err(Unwritable::Headers(..))));
        message.set("big", "x".repeat(7_000));
        assert!(write(&message, header_room(131_072)).is_ok());
        assert!(matches!(write(&message, header_room(8192)), Err(Unwritable::Headers(_, 6144))));
    }
}
