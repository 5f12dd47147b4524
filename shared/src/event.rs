//! `Event`: what travels. A CloudEvent 1.0 with its identity, its key and its lane.
//!
//! Source: CloudEvents 1.0.2 with the extensions `partitionkey`, `sequence` and `traceparent`. An `Event` that exists
//! is valid: every attribute fits where AMQP must carry it, so nothing downstream checks again.
use crate::json::{self, Json, JsonError};
use crate::wire::Foreign;
use base64::Engine as _;
use jiff::SignedDuration;
use jiff::civil::DateTime;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

/// How large and how deep an event may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a body.
    pub body: usize,
    /// Levels of nesting in JSON.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { body: 16 << 20, depth: 64 }
    }
}

/// Why something is not an event. [`Unreadable::reason`] is the word that a dead letter carries.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// The body is not JSON where it must be.
    #[error("the body is {0}")]
    Json(#[from] JsonError),
    /// The body's text is not UTF-8.
    #[error("the body is not UTF-8: invalid byte at offset {0}")]
    Utf8(usize),
    /// The body is larger than the limit.
    #[error("the body has {size} bytes, the limit is {limit}")]
    TooLarge {
        /// Its size.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// A required attribute is missing.
    #[error("the attribute '{0}' is missing")]
    Missing(&'static str),
    /// An attribute has a value that it cannot have.
    #[error("the attribute '{name}' {problem}")]
    Attribute {
        /// Its name.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Another version of CloudEvents.
    #[error("specversion is '{0}', only '1.0' is understood")]
    SpecVersion(String),
    /// A form of CloudEvents that is not read.
    #[error("the content type '{0}' is not read: send one event a message")]
    Form(String),
    /// A header is a table or list where a plain value must be.
    #[error("the header '{0}' is nested, or of a type or value that no attribute has")]
    Header(String),
    /// The body is not what its content encoding says, or in one that is not read.
    #[error("{0}")]
    Encoding(String),
    /// The body is larger than the limit once it is decompressed.
    #[error("the body has more than {0} bytes once it is decompressed, the limit is {0}")]
    TooLargeInside(usize),
    /// The body is sealed and cannot be opened.
    #[error("the payload is sealed: {0}")]
    Sealed(String),
}

impl Unreadable {
    /// The reason as a word: stable, for filters and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Json(JsonError::Utf8(_)) | Self::Utf8(_) => "bad-utf8",
            Self::Json(JsonError::TooDeep(_)) => "too-deep",
            Self::Json(JsonError::DuplicateKey { .. }) => "duplicate-key",
            Self::Json(JsonError::Syntax { .. }) => "bad-json",
            Self::TooLarge { .. } | Self::TooLargeInside(_) => "too-large",
            Self::Encoding(_) => "bad-encoding",
            Self::Missing(_) => "missing-attribute",
            Self::Attribute { .. } => "bad-attribute",
            Self::SpecVersion(_) => "bad-specversion",
            Self::Form(_) => "bad-form",
            Self::Header(_) => "bad-header",
            Self::Sealed(_) => "sealed",
        }
    }
}

/// The value of an extension attribute.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// `Boolean`.
    Bool(bool),
    /// `Integer`, and what AMQP's wider integers hold.
    Int(i64),
    /// `String` and everything written as one.
    Text(String),
}

impl Value {
    /// Bytes, as CloudEvents writes them.
    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self::Text(base64::engine::general_purpose::STANDARD.encode(bytes))
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bool(b) => write!(f, "{b}"),
            Self::Int(i) => write!(f, "{i}"),
            Self::Text(s) => f.write_str(s),
        }
    }
}

/// An event's payload.
#[derive(Clone, Debug)]
pub enum Data {
    /// JSON.
    Json(Json),
    /// Text of a type that is not JSON.
    Text(String),
    /// Anything else.
    Bytes(Vec<u8>),
}

impl Data {
    /// The body as AMQP carries it.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Json(raw) => raw.get().as_bytes(),
            Self::Text(text) => text.as_bytes(),
            Self::Bytes(bytes) => bytes,
        }
    }
}

impl PartialEq for Data {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

/// What dedupe compares: `source` and `id`, hashed to 16 bytes (UUIDv5).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity(Uuid);

const WARREN: Uuid = Uuid::from_u128(0x7761_7272_656e_5ca1_ab1e_0000_0000_0001);

impl Identity {
    /// The identity of the event with this source and id.
    #[must_use]
    pub fn of(source: &str, id: &str) -> Self {
        Self(Uuid::new_v5(&WARREN, format!("{source}\0{id}").as_bytes()))
    }

    /// The 16 bytes that a store keeps.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// The identity that a store kept.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    /// Its halves.
    #[must_use]
    pub fn as_u64s(&self) -> (u64, u64) {
        self.0.as_u64_pair()
    }

    /// An id that is the same whenever the same thing is derived from the same event.
    #[must_use]
    pub fn derive(&self, what: &str) -> String {
        Uuid::new_v5(&self.0, what.as_bytes()).to_string()
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An event that is valid. Cheap to clone: clones share what they hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Event(pub(crate) Arc<Attributes>);

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Attributes {
    pub(crate) id: String,
    pub(crate) source: String,
    pub(crate) kind: String,
    pub(crate) subject: Option<String>,
    pub(crate) time: Option<String>,
    pub(crate) content_type: Option<String>,
    pub(crate) schema: Option<String>,
    pub(crate) extensions: BTreeMap<String, Value>,
    /// What the extensions take as headers: kept, so that many of them cost no more than their number.
    weight: usize,
    pub(crate) data: Option<Data>,
    /// The key that its data came sealed with: copies of it leave sealed, too.
    pub(crate) sealed: Option<String>,
    /// Properties of its message that no attribute holds: copies of it keep them.
    pub(crate) foreign: Option<Box<Foreign>>,
}

/// AMQP short strings end here: ids, keys and types travel as such.
const SHORT: usize = 255;
/// Long enough for any URI, short enough for a header table.
const LONG: usize = 4096;
/// All attributes must fit into one AMQP frame as headers: what can be read can be written again.
pub(crate) const HEADERS: usize = 64 << 10;

impl Event {
    /// An event with the three attributes that identify and route it.
    ///
    /// # Errors
    /// Names the attribute that is empty, too long or holds control characters.
    pub fn new(id: impl Into<String>, source: impl Into<String>, kind: impl Into<String>) -> Result<Self, Unreadable> {
        let (id, source, kind) = (id.into(), source.into(), kind.into());
        text("id", &id, SHORT)?;
        text("source", &source, LONG)?;
        text("type", &kind, SHORT)?;
        Ok(Self(Arc::new(Attributes {
            id,
            source,
            kind,
            subject: None,
            time: None,
            content_type: None,
            schema: None,
            extensions: BTreeMap::new(),
            weight: 0,
            data: None,
            sealed: None,
            foreign: None,
        })))
    }

    /// Its attributes, to be changed: of the last clone in place, of others in a copy.
    pub(crate) fn edit(&mut self) -> &mut Attributes {
        Arc::make_mut(&mut self.0)
    }

    /// The same event with one more attribute, by its CloudEvents name.
    ///
    /// # Errors
    /// Names the attribute and what is wrong with it.
    pub fn with(mut self, name: &str, value: Value) -> Result<Self, Unreadable> {
        self.set(name, value)?;
        Ok(self)
    }

    /// The same event with JSON data.
    ///
    /// # Errors
    /// Says where the text is not JSON, or that it is larger than a body may be: nobody could publish it.
    pub fn with_json(mut self, json: &[u8], limits: Limits) -> Result<Self, Unreadable> {
        if json.len() > limits.body {
            return Err(Unreadable::TooLarge { size: json.len(), limit: limits.body });
        }
        let data = Data::Json(json::check(json, limits.depth)?);
        let attributes = self.edit();
        attributes.data = Some(data);
        attributes.content_type.get_or_insert_with(|| "application/json".into());
        Ok(self)
    }

    pub(crate) fn set(&mut self, name: &str, value: Value) -> Result<(), Unreadable> {
        let plain = |value: Value, max| {
            let value = match value {
                Value::Text(text) => text,
                other => other.to_string(),
            };
            text(name, &value, max).map(|()| value)
        };
        match name {
            "id" | "source" | "type" | "specversion" | "data" | "data_base64" => {
                return Err(attribute(name, "is not an extension"));
            }
            "subject" => self.edit().subject = Some(plain(value, LONG)?),
            "datacontenttype" => {
                let content_type = plain(value, SHORT)?;
                if is_event(&content_type) {
                    return Err(attribute(
                        name,
                        "is that of an event, which data cannot be: AMQP could not tell them apart",
                    ));
                }
                self.edit().content_type = Some(content_type);
            }
            "dataschema" => self.edit().schema = Some(plain(value, LONG)?),
            "time" => {
                let time = plain(value, SHORT)?;
                if seconds_of(&time).is_none() {
                    return Err(attribute(name, "is not an RFC 3339 time"));
                }
                self.edit().time = Some(time);
            }
            "partitionkey" => {
                let key = plain(value, SHORT)?;
                self.extend(name, Value::Text(key))?;
            }
            "priority" => match value.to_string().parse::<u8>() {
                Ok(p) if p <= 9 => {
                    self.extend(name, Value::Int(p.into()))?;
                }
                _ => return Err(attribute(name, "is not a number from 0 to 9")),
            },
            _ => {
                let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
                if name.is_empty() || name.len() > 64 || !name.chars().all(legal) {
                    return Err(attribute(&excerpt(name), "has a name that is not of a-z and 0-9, at most 64"));
                }
                if let Value::Text(value) = &value
                    && !value.is_empty()
                {
                    text(name, value, LONG)?;
                }
                self.extend(name, value)?;
            }
        }
        Ok(())
    }

    fn extend(&mut self, name: &str, value: Value) -> Result<(), Unreadable> {
        // With room for what a header costs beside name and text: the prefix, the lengths, the type.
        let cost = |value: &Value| 20 + name.len() + if let Value::Text(text) = value { text.len() } else { 8 };
        let weight = self.0.weight + cost(&value) - self.0.extensions.get(name).map_or(0, cost);
        if weight > HEADERS {
            return Err(attribute("extensions", &format!("have {weight} bytes together, the limit is {HEADERS}")));
        }
        let attributes = self.edit();
        attributes.weight = weight;
        attributes.extensions.insert(name.into(), value);
        Ok(())
    }

    /// `id`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// `source`.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.0.source
    }

    /// `type`, which is also the routing key.
    #[must_use]
    pub fn kind(&self) -> &str {
        &self.0.kind
    }

    /// `subject`.
    #[must_use]
    pub fn subject(&self) -> Option<&str> {
        self.0.subject.as_deref()
    }

    /// `time`, RFC 3339.
    #[must_use]
    pub fn time(&self) -> Option<&str> {
        self.0.time.as_deref()
    }

    /// `datacontenttype`.
    #[must_use]
    pub fn content_type(&self) -> Option<&str> {
        self.0.content_type.as_deref()
    }

    /// `dataschema`.
    #[must_use]
    pub fn schema(&self) -> Option<&str> {
        self.0.schema.as_deref()
    }

    /// All extension attributes, by name.
    pub fn extensions(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.extensions.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// An extension attribute.
    #[must_use]
    pub fn extension(&self, name: &str) -> Option<&Value> {
        self.0.extensions.get(name)
    }

    /// The W3C trace that it belongs to: 32 hexadecimal digits of its `traceparent`.
    #[must_use]
    pub fn trace_id(&self) -> Option<&str> {
        let Value::Text(trace) = self.extension("traceparent")? else { return None };
        trace.split('-').nth(1).filter(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()))
    }

    /// The payload.
    #[must_use]
    pub fn data(&self) -> Option<&Data> {
        self.0.data.as_ref()
    }

    /// The payload as a value of a Rust type.
    ///
    /// # Errors
    /// The payload is absent, not JSON, or of another shape.
    pub fn json<'a, T: Deserialize<'a>>(&'a self) -> Result<T, serde_json::Error> {
        match &self.0.data {
            Some(Data::Json(raw)) => serde_json::from_str(raw.get()),
            Some(_) => Err(serde::de::Error::custom("the event's data is not JSON")),
            None => serde_json::from_str("null"),
        }
    }

    /// What dedupe compares.
    #[must_use]
    pub fn identity(&self) -> Identity {
        Identity::of(&self.0.source, &self.0.id)
    }

    /// What order is kept for: `partitionkey`, else `subject`, else `id`.
    ///
    /// A subject that no AMQP short string can hold stands for itself by its hash.
    #[must_use]
    pub fn key(&self) -> std::borrow::Cow<'_, str> {
        if let Some(Value::Text(key)) = self.0.extensions.get("partitionkey") {
            return key.into();
        }
        match self.0.subject.as_deref() {
            Some(subject) if subject.len() <= SHORT => subject.into(),
            Some(subject) => Uuid::new_v5(&WARREN, subject.as_bytes()).to_string().into(),
            None => self.0.id.as_str().into(),
        }
    }

    /// The lane that the `priority` extension (0 to 9) asks for.
    #[must_use]
    pub fn lane(&self) -> Option<&'static str> {
        match self.0.extensions.get("priority") {
            Some(Value::Int(p)) => Some(crate::lane::for_priority(*p)),
            _ => None,
        }
    }
}

/// The start of a text that may be anything, fit for a log line.
pub(crate) fn excerpt(text: &str) -> String {
    text.chars().take(64).map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Whether a media type means a whole CloudEvent, or many.
pub(crate) fn is_event(content_type: &str) -> bool {
    const FORM: &str = "application/cloudevents";
    content_type.trim_start().get(..FORM.len()).is_some_and(|start| start.eq_ignore_ascii_case(FORM))
}

const EPOCH: DateTime = DateTime::constant(1970, 1, 1, 0, 0, 0, 0);

/// The seconds since 1970 of a time as RFC 3339 writes it; none where it is no such time.
///
/// A time with a zone ends for jiff a day before the year 9999 does, and has nine digits behind its point at most; it also takes
/// ISO 8601's other spellings, which other readers of the event would refuse.
#[must_use]
pub fn seconds_of(time: &str) -> Option<i64> {
    let like = |text: &str, shape: &str| {
        let fits = |(c, s): (u8, u8)| if s == b'0' { c.is_ascii_digit() } else { c.eq_ignore_ascii_case(&s) };
        text.len() == shape.len() && text.bytes().zip(shape.bytes()).all(fits)
    };
    let (second, rest) = time.split_at_checked("0000-00-00T00:00:00".len())?;
    let zone = match rest.strip_prefix('.') {
        None => rest,
        Some(rest) if rest.starts_with(|c: char| c.is_ascii_digit()) => {
            rest.trim_start_matches(|c: char| c.is_ascii_digit())
        }
        Some(_) => return None,
    };
    let number = |text: &str| text.parse::<i8>().ok();
    let offset = match ["Z", "+00:00", "-00:00"].iter().find(|shape| like(zone, shape))? {
        &"Z" => 0,
        sign => {
            let (hours, minutes) = (number(&zone[1..3])?, number(&zone[4..])?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            let offset = i64::from(hours) * 3600 + i64::from(minutes) * 60;
            if sign.starts_with('-') { -offset } else { offset }
        }
    };
    if !like(second, "0000-00-00T00:00:00") {
        return None;
    }
    let part = |from: usize| number(&second[from..from + 2]);
    // A leap second is the one before it.
    let leap = part(17)? == 60;
    let whole = if leap { 59 } else { part(17)? };
    let civil = DateTime::new(second[..4].parse().ok()?, part(5)?, part(8)?, part(11)?, part(14)?, whole, 0).ok()?;
    civil.duration_since(EPOCH).as_secs().checked_sub(offset)
}

/// The time so many seconds after 1970, as RFC 3339 writes it; none beyond the year 9999.
#[must_use]
pub fn time_of(seconds: u64) -> Option<String> {
    let since = SignedDuration::from_secs(i64::try_from(seconds).ok()?);
    Some(format!("{}Z", EPOCH.checked_add(since).ok()?))
}

fn attribute(name: &str, problem: &str) -> Unreadable {
    Unreadable::Attribute { name: name.into(), problem: problem.into() }
}

/// What stands for a byte that was not UTF-8: a text that holds it is not the text that was meant.
const SUBSTITUTE: char = '\u{1a}';

/// Checks a text that is to be the key of an event.
///
/// # Errors
/// It is empty, too long, or holds control characters.
pub fn check_key(key: &str) -> Result<(), Unreadable> {
    text("partitionkey", key, SHORT)
}

/// Neither empty, nor too long for its place, nor able to forge a log line.
fn text(name: &str, value: &str, max: usize) -> Result<(), Unreadable> {
    if value.is_empty() {
        Err(attribute(name, "is empty"))
    } else if value.len() > max {
        Err(attribute(name, &format!("has {} bytes, the limit is {max}", value.len())))
    } else if !value.bytes().any(|byte| byte < b' ' || byte == 0x7f || byte == 0xc2) {
        // Every control character has one of these bytes.
        Ok(())
    } else if value.contains(SUBSTITUTE) {
        Err(attribute(name, "holds bytes that are not UTF-8 (each stands as U+001A)"))
    } else if value.chars().any(char::is_control) {
        Err(attribute(name, "holds control characters"))
    } else {
        Ok(())
    }
}
