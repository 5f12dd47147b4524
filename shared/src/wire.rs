//! The wire forms: an AMQP message as plain values, read as an event and written from one.
//!
//! Read: *binary* (attributes as headers), *structured* (the body is the whole event), *plain* (a message of a system
//! that knows nothing of Warren). Written: binary. The AMQP library's own types stay in `publisher/src/codec.rs`.
use crate::encoding::{self, Coding};
use crate::event::{Data, Event, Identity, Limits, Unreadable, Value, excerpt, is_event, seconds_of, time_of};
use crate::json;
use crate::seal::SEAL;
use crate::structured::{charset, is_ascii, is_json, is_text, is_utf8};
use std::borrow::Cow;
use std::time::Duration;

/// A header's value.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Header {
    /// A value that an attribute can have.
    Plain(Value),
    /// AMQP's void: as good as absent.
    Void,
    /// A value of a type that attributes do not have.
    Typed(Box<Typed>),
}

/// A header's value of a type that attributes do not have.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Typed {
    /// What an attribute makes of it, if anything: of a timestamp its text, of bytes Base64.
    pub value: Option<Value>,
    /// Levels of nesting of a table or list, harmless while it is shallow; 0 = it is none.
    pub depth: usize,
    /// Type and value as AMQP writes them, for it leaves as it came. Empty: it is too deep for that.
    pub wire: Vec<u8>,
}

/// Properties of a message that Warren has no use for. They stay with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Foreign {
    /// `content_encoding`; of a body that was decompressed it is gone.
    pub content_encoding: Option<String>,
    /// `reply_to`.
    pub reply_to: Option<String>,
    /// `cluster_id`.
    pub cluster_id: Option<String>,
    /// `expiration`. Never written: a dead letter must not expire.
    pub expiration: Option<String>,
    /// `user_id`. Never written: the broker takes nobody's but our own.
    pub user_id: Option<String>,
}

/// An AMQP message as values. Serialised it is the envelope alone: stores keep the body beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// The exchange it was, or is to be, published to.
    pub exchange: String,
    /// The routing key.
    pub routing_key: String,
    /// `content_type`.
    pub content_type: Option<String>,
    /// `message_id`.
    pub message_id: Option<String>,
    /// `correlation_id`: what the partition is chosen by.
    pub correlation_id: Option<String>,
    /// `app_id`.
    pub app_id: Option<String>,
    /// `type`.
    pub kind: Option<String>,
    /// `timestamp`, seconds since 1970.
    pub timestamp: Option<u64>,
    /// `priority`.
    pub priority: Option<u8>,
    /// The properties that Warren has no use for, where it has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreign: Option<Box<Foreign>>,
    /// Headers, in no order.
    pub headers: Vec<(String, Header)>,
    /// The body.
    #[serde(skip)]
    pub body: Vec<u8>,
}

/// The attempt that this delivery is, counted from 1.
pub const ATTEMPT: &str = "warren-attempt";
/// What is left of its wait after this delivery, in milliseconds: two machines' clocks need not agree on a moment.
pub const LEFT: &str = "warren-left";
/// The lane it asks for.
pub const LANE: &str = "warren-lane";
/// How often it was replayed from the dead letters.
pub const REPLAYED: &str = "warren-replayed";
/// Whether no attempt before this one can have done anything.
pub const UNTOUCHED: &str = "warren-untouched";
/// How many events caused one another until this one.
pub const HOPS: &str = "warren-hops";

/// An event as it arrived: what travels beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Incoming {
    /// The event.
    pub event: Event,
    /// Its identity, worked out once.
    pub identity: Identity,
    /// Whether it can be told from its copies.
    pub identified: Identified,
    /// The attempt that this is, counted from 1.
    pub attempt: u32,
    /// What is left of its wait.
    pub left: Duration,
    /// How often it was replayed from the dead letters.
    pub replayed: u32,
    /// Its AMQP priority.
    pub priority: u8,
    /// How many events caused one another until this one.
    pub hops: u32,
    /// Whether no attempt before this one can have done anything.
    pub untouched: bool,
}

/// Whether an event can be told from its copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identified {
    /// It brought its id.
    ByItself,
    /// It had none and got one on arrival: a redelivery will get another.
    OnArrival,
}

impl Message {
    /// The plain value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&Value> {
        self.headers.iter().find_map(|(n, header)| if n == name { header.value() } else { None })
    }

    /// The body without its content encoding, where that is one that is read.
    ///
    /// # Errors
    /// It is not encoded so, or larger than the limit inside.
    pub fn decoded(&self, limit: usize) -> Result<Cow<'_, [u8]>, Unreadable> {
        self.coding().decoded(&self.body, limit)
    }

    fn encoding(&self) -> Option<&str> {
        self.foreign.as_ref()?.content_encoding.as_deref()
    }

    fn coding(&self) -> Coding {
        self.encoding().map_or(Coding::Plain, Coding::of)
    }

    /// A header that holds a whole number, not negative.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<u64> {
        match self.header(name)? {
            Value::Int(i) => u64::try_from(*i).ok(),
            other => other.to_string().parse().ok(),
        }
    }

    /// Sets a header, replacing one of the same name.
    pub fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.headers.retain(|(n, _)| n != name);
        self.headers.push((name.into(), Header::Plain(value.into())));
    }

    /// The same message, with how many events caused one another until it.
    #[must_use]
    pub fn after_hops(mut self, hops: u32) -> Self {
        self.set(HOPS, hops);
        self
    }

    /// Drops what must not travel again: the broker's own marks.
    pub fn strip(&mut self) {
        const MARKS: [&str; 5] = ["x-death", "x-first-death", "x-last-death", "x-delivery-count", "x-acquired-count"];
        self.headers.retain(|(name, _)| !MARKS.iter().any(|mark| name.starts_with(mark)));
    }

    /// Writes the source down that this message has because of where it was published to, before it is published to somewhere
    /// else.
    pub fn keep_source(&mut self) {
        let is_plain = !is_event(self.content_type.as_deref().unwrap_or_default())
            && !self.headers.iter().any(|(name, _)| attribute_at(name).is_some());
        let source = source_of(&self.exchange);
        // Longer ones do not fit into the property.
        if is_plain && self.app_id.as_deref().unwrap_or_default().is_empty() && source.len() <= 255 {
            self.app_id = Some(source);
        }
    }

    /// Reads the event in it. `fresh_id` is asked only where the message brings no id.
    ///
    /// # Errors
    /// Says why no event can be read from it.
    pub fn read(&self, limits: Limits, fresh_id: impl FnOnce() -> String) -> Result<Incoming, Unreadable> {
        Self { body: Vec::new(), ..self.clone() }.open(&self.body, limits, fresh_id)
    }

    /// Makes an event of it and of a body that lies elsewhere: what the event needs is moved, not copied.
    ///
    /// # Errors
    /// Says why no event can be made of it.
    pub fn open(
        mut self,
        body: &[u8],
        limits: Limits,
        fresh_id: impl FnOnce() -> String,
    ) -> Result<Incoming, Unreadable> {
        if body.len() > limits.body {
            return Err(Unreadable::TooLarge { size: body.len(), limit: limits.body });
        }
        if let Some(key) = self.sealed_with() {
            // Whoever has the keys opens the body first, and takes the header away.
            let cure = format!("give WARREN_PAYLOAD_KEYS the key '{}', then replay", excerpt(&key));
            return Err(Unreadable::Sealed(cure));
        }
        let deep =
            |(_, header): &&(String, Header)| matches!(header, Header::Typed(typed) if typed.depth > limits.depth);
        if let Some((name, _)) = self.headers.iter().find(deep) {
            return Err(Unreadable::Header(excerpt(name)));
        }
        let coding = self.coding();
        let body = &*coding.decoded(body, limits.body)?;
        let foreign = self.foreign.take().map(|mut foreign| {
            let encoding = foreign.content_encoding.take();
            // What was decompressed is not so any more.
            foreign.content_encoding = encoding.filter(|_| matches!(coding, Coding::Plain | Coding::Unknown));
            foreign
        });
        let small = |name| self.number(name).and_then(|n| u32::try_from(n).ok());
        let (attempt, replayed) = (small(ATTEMPT).unwrap_or(1).max(1), small(REPLAYED).unwrap_or(0));
        let hops = small(HOPS).unwrap_or(0);
        // Whoever says nothing may have done something.
        let untouched = attempt == 1 || self.header(UNTOUCHED) == Some(&Value::Bool(true));
        let left = Duration::from_millis(self.number(LEFT).unwrap_or(0));
        let priority = self.priority.unwrap_or(0);
        let unknown = foreign.as_ref().filter(|_| coding == Coding::Unknown).and_then(|f| f.content_encoding.clone());
        let (mut event, identified) = self.event(body, limits, fresh_id).map_err(|why| match &unknown {
            Some(name) if matches!(why, Unreadable::Json(_) | Unreadable::Utf8(_)) => encoding::unknown(name, &why),
            _ => why,
        })?;
        if let Some(name) = unknown.filter(|_| matches!(event.data(), Some(Data::Bytes(_)))) {
            // The handler gets the bytes as they are, and is told; a name that no attribute can have is none.
            let _ = event.set("contentencoding", Value::Text(name));
        }
        if let Some(foreign) = foreign.filter(|foreign| **foreign != Foreign::default()) {
            event.edit().foreign = Some(foreign);
        }
        let identity = event.identity();
        Ok(Incoming { identity, event, identified, attempt, left, replayed, priority, hops, untouched })
    }

    fn event(
        self,
        body: &[u8],
        limits: Limits,
        fresh_id: impl FnOnce() -> String,
    ) -> Result<(Event, Identified), Unreadable> {
        let content_type = self.content_type.as_deref().unwrap_or_default();
        let mut identified = Identified::ByItself;
        let event = if is_event(content_type) {
            let content_type = content_type.to_ascii_lowercase();
            if content_type.contains("cloudevents-batch") || !is_json(&content_type) {
                return Err(Unreadable::Form(excerpt(&content_type)));
            }
            Event::from_json(body, limits)?
        } else if self.headers.iter().any(|(name, _)| attribute_at(name).is_some()) {
            self.open_binary(body, limits)?
        } else {
            if self.message_id.as_deref().unwrap_or_default().is_empty() {
                identified = Identified::OnArrival;
            }
            self.open_plain(body, limits, fresh_id)?
        };
        Ok((event, identified))
    }

    fn open_binary(self, body: &[u8], limits: Limits) -> Result<Event, Unreadable> {
        let mut found = std::collections::BTreeMap::new();
        for (mut name, header) in self.headers {
            let Some(start) = attribute_at(&name) else { continue };
            // As good as absent.
            if header == Header::Void {
                continue;
            }
            let Some(value) = header.into_value() else {
                return Err(Unreadable::Header(excerpt(&name)));
            };
            name.drain(..start);
            if found.get(&name).is_some_and(|other| *other != value) {
                return Err(Unreadable::Attribute { name: excerpt(&name), problem: "stands twice".into() });
            }
            found.insert(name, value);
        }
        let mut required = |name: &'static str| match found.remove(name) {
            Some(Value::Text(text)) => Ok(text),
            Some(_) => Err(Unreadable::Attribute { name: name.into(), problem: "is not a string".into() }),
            None => Err(Unreadable::Missing(name)),
        };
        let version = required("specversion")?;
        if version != "1.0" {
            return Err(Unreadable::SpecVersion(excerpt(&version)));
        }
        let mut event = Event::new(required("id")?, required("source")?, required("type")?)?;
        for (name, value) in found {
            event.set(&name, value)?;
        }
        if let Some(content_type) = given(self.content_type) {
            event.set("datacontenttype", Value::Text(content_type))?;
        }
        event.set_body(body, limits)?;
        Ok(event)
    }

    fn open_plain(self, body: &[u8], limits: Limits, fresh_id: impl FnOnce() -> String) -> Result<Event, Unreadable> {
        let id = given(self.message_id).unwrap_or_else(fresh_id);
        let source = given(self.app_id).unwrap_or_else(|| source_of(&self.exchange));
        let kind = given(self.kind).unwrap_or(self.routing_key);
        let mut event = Event::new(id, source, kind)?;
        event.edit().time = self.timestamp.and_then(time_of);
        if let Some(key) = given(self.correlation_id) {
            event.set("partitionkey", Value::Text(key))?;
        }
        if let Some(content_type) = given(self.content_type) {
            event.set("datacontenttype", Value::Text(content_type))?;
        }
        for (name, header) in self.headers {
            if let Some(value) = header.into_value()
                && event.extension(&name).is_none()
                && !["subject", "time", "datacontenttype", "dataschema"].contains(&name.as_str())
            {
                // A header whose name or value no attribute can have stays behind: it was not meant for us.
                let _ = event.set(&name, value);
            }
        }
        event.set_body(body, limits)?;
        Ok(event)
    }

    /// The event in binary form, for this exchange, asking for a lane: this one, else the one that its priority asks for.
    #[must_use]
    pub fn to_lane(event: &Event, exchange: &str, lane: Option<&str>) -> Self {
        let mut message = Self::write(event, exchange);
        if let Some(lane) = lane.or(event.lane()) {
            message.set(LANE, lane);
        }
        message
    }

    /// The event in binary form, for this exchange. Its key is what the partition is chosen by.
    #[must_use]
    pub fn write(event: &Event, exchange: &str) -> Self {
        let mut headers = Vec::with_capacity(6 + event.0.extensions.len());
        let mut put = |name: &str, value: Value| headers.push((format!("cloudEvents_{name}"), Header::Plain(value)));
        put("specversion", Value::Text("1.0".into()));
        put("id", Value::Text(event.0.id.clone()));
        put("source", Value::Text(event.0.source.clone()));
        put("type", Value::Text(event.0.kind.clone()));
        for (name, value) in [("subject", &event.0.subject), ("time", &event.0.time), ("dataschema", &event.0.schema)] {
            if let Some(value) = value {
                put(name, Value::Text(value.clone()));
            }
        }
        for (name, value) in &event.0.extensions {
            put(name, value.clone());
        }
        if let Some(key) = &event.0.sealed {
            headers.push((SEAL.into(), Header::Plain(Value::Text(key.clone()))));
        }
        let time = event.0.time.as_deref().and_then(seconds_of);
        Self {
            exchange: exchange.into(),
            routing_key: event.0.kind.clone(),
            content_type: event.0.content_type.clone(),
            message_id: Some(event.0.id.clone()),
            correlation_id: Some(event.key().into_owned()),
            app_id: None,
            kind: Some(event.0.kind.clone()),
            timestamp: time.and_then(|seconds| seconds.try_into().ok()),
            priority: None,
            foreign: event.0.foreign.clone(),
            headers,
            body: event.0.data.as_ref().map(|d| d.as_bytes().to_vec()).unwrap_or_default(),
        }
    }
}

impl Event {
    /// The same event with this body for its data, read as its content type says. Set that one first.
    ///
    /// # Errors
    /// The body is too large, or not what the content type says.
    pub fn with_body(mut self, body: &[u8], limits: Limits) -> Result<Self, Unreadable> {
        if body.len() > limits.body {
            return Err(Unreadable::TooLarge { size: body.len(), limit: limits.body });
        }
        self.set_body(body, limits)?;
        Ok(self)
    }

    /// Takes a body for its data, by its content type. Without one, what starts like a JSON object, list or string must
    /// be JSON; other text is called so, because no content type means JSON to readers of the structured form.
    pub(crate) fn set_body(&mut self, body: &[u8], limits: Limits) -> Result<(), Unreadable> {
        let utf8 = || std::str::from_utf8(body).map(str::to_owned);
        let data = match self.0.content_type.as_deref() {
            _ if body.is_empty() => None,
            Some(json) if is_json(json) => Some(Data::Json(json::check(body, limits.depth)?)),
            // In another charset it is text to nobody here, and stays as it is.
            Some(text) if is_text(text) => match (charset(text).map(|place| &text[place]), utf8()) {
                (Some(charset), Ok(_)) if !is_utf8(charset) && !is_ascii(charset) => Some(Data::Bytes(body.to_vec())),
                (Some(charset), Err(_)) if !is_utf8(charset) => Some(Data::Bytes(body.to_vec())),
                (_, Ok(text)) => Some(Data::Text(text)),
                (_, Err(error)) => return Err(Unreadable::Utf8(error.valid_up_to())),
            },
            Some(_) => Some(Data::Bytes(body.to_vec())),
            None => match (json::without_bom(body).trim_ascii_start().first(), json::check(body, limits.depth)) {
                (_, Ok(raw)) => Some(Data::Json(raw)),
                (Some(b'{' | b'[' | b'"'), Err(error)) => return Err(error.into()),
                _ => match utf8() {
                    Ok(text) => {
                        self.edit().content_type = Some("text/plain".into());
                        Some(Data::Text(text))
                    }
                    Err(_) => Some(Data::Bytes(body.to_vec())),
                },
            },
        };
        self.edit().data = data;
        Ok(())
    }
}

impl Header {
    /// What an attribute makes of it.
    #[must_use]
    pub fn value(&self) -> Option<&Value> {
        match self {
            Self::Plain(value) => Some(value),
            Self::Void => None,
            Self::Typed(typed) => typed.value.as_ref(),
        }
    }

    fn into_value(self) -> Option<Value> {
        match self {
            Self::Plain(value) => Some(value),
            Self::Void => None,
            Self::Typed(typed) => typed.value,
        }
    }

    /// About how many bytes it takes beside its name.
    pub(crate) fn weight(&self) -> usize {
        match self {
            Self::Plain(Value::Text(text)) => 6 + text.len(),
            Self::Typed(typed) => 10 + typed.wire.len(),
            _ => 10,
        }
    }
}

/// The source of a plain message that names none.
fn source_of(exchange: &str) -> String {
    if exchange.is_empty() { "/amqp".into() } else { format!("/amqp/{exchange}") }
}

/// A property that says something.
fn given(property: Option<String>) -> Option<String> {
    property.filter(|text| !text.is_empty())
}

/// Where the attribute's name begins in `cloudEvents_<name>` or, as AMQP 1.0 SDKs write it, `cloudEvents:<name>`.
fn attribute_at(header: &str) -> Option<usize> {
    const PREFIX: &str = "cloudEvents";
    header.strip_prefix(PREFIX)?.starts_with(['_', ':']).then_some(PREFIX.len() + 1)
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<bool> for Value {
    fn from(bool: bool) -> Self {
        Self::Bool(bool)
    }
}

impl From<i64> for Value {
    fn from(int: i64) -> Self {
        Self::Int(int)
    }
}

impl From<u32> for Value {
    fn from(int: u32) -> Self {
        Self::Int(int.into())
    }
}
