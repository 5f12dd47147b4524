//! An event as one JSON object: CloudEvents' structured form, the line that `send` reads, the line that `exec` writes.
use crate::event::{Data, Event, Limits, Unreadable, Value, excerpt};
use crate::json::{self, Json};
use crate::number;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// What a partial event (an `emit` of a handler) takes where it says nothing.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// `id`.
    pub id: String,
    /// `source`.
    pub source: String,
    /// `time`.
    pub time: String,
    /// `partitionkey`, unless the event brings one or a `subject`.
    pub key: String,
    /// `traceparent`.
    pub trace: Option<String>,
}

/// The members of an object, unparsed, in their order.
struct Members<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Members<'a> {
    fn get(&self, name: &str) -> Option<&'a str> {
        self.0.iter().find_map(|(found, raw)| (*found == name).then_some(*raw))
    }
}

impl Event {
    /// Reads a whole event from JSON.
    ///
    /// # Errors
    /// Says why it is not an event.
    pub fn from_json(text: &[u8], limits: Limits) -> Result<Self, Unreadable> {
        let text = checked(text, limits)?;
        Self::read(&members(text)?, None, limits)
    }

    /// Reads an event that may leave out everything but its `type`.
    ///
    /// # Errors
    /// Says why it is not an event.
    pub fn from_partial(text: &[u8], limits: Limits, defaults: Defaults) -> Result<Self, Unreadable> {
        let text = checked(text, limits)?;
        Self::read(&members(text)?, Some(defaults), limits)
    }

    fn read(members: &Members<'_>, defaults: Option<Defaults>, limits: Limits) -> Result<Self, Unreadable> {
        let partial = defaults.is_some();
        match required(members, "specversion") {
            Ok(version) if version == "1.0" => {}
            Ok(other) => return Err(Unreadable::SpecVersion(excerpt(&other))),
            Err(Unreadable::Missing(_)) if partial => {}
            Err(error) => return Err(error),
        }
        let or = |name, default: Option<String>| match (required(members, name), default) {
            (Err(Unreadable::Missing(_)), Some(default)) => Ok(default),
            (found, _) => found,
        };
        let (id, source) = match &defaults {
            Some(d) => (Some(d.id.clone()), Some(d.source.clone())),
            None => (None, None),
        };
        let mut event = Self::new(or("id", id)?, or("source", source)?, required(members, "type")?)?;
        for (name, raw) in &members.0 {
            match *name {
                "specversion" | "id" | "source" | "type" | "data" | "data_base64" => {}
                _ => {
                    if let Some(value) = scalar(name, raw)? {
                        event.set(name, value)?;
                    }
                }
            }
        }
        event.set_data(members, limits)?;
        match defaults {
            Some(defaults) => event.with_defaults(defaults),
            None => Ok(event),
        }
    }

    /// The same event with time, key and trace where it says nothing of them.
    ///
    /// # Errors
    /// Names the default that no attribute can hold.
    pub fn with_defaults(mut self, defaults: Defaults) -> Result<Self, Unreadable> {
        self.edit().time.get_or_insert(defaults.time);
        if self.subject().is_none() && self.extension("partitionkey").is_none() {
            self.set("partitionkey", Value::Text(defaults.key))?;
        }
        if let (None, Some(trace)) = (self.extension("traceparent"), defaults.trace) {
            self.set("traceparent", Value::Text(trace))?;
        }
        Ok(self)
    }

    fn set_data(&mut self, members: &Members<'_>, limits: Limits) -> Result<(), Unreadable> {
        let wrong = |name: &str, problem: &str| Unreadable::Attribute { name: name.into(), problem: problem.into() };
        let set = |name| members.get(name).filter(|raw| *raw != "null");
        if let Some(raw) = set("data_base64") {
            if set("data").is_some() {
                return Err(wrong("data", "stands beside 'data_base64', only one may"));
            }
            let bytes = serde_json::from_str::<String>(raw).ok().and_then(|text| BASE64.decode(text).ok());
            return self.set_body(&bytes.ok_or_else(|| wrong("data_base64", "is not base64"))?, limits);
        }
        // `null` is a JSON value like any other, but neither text nor bytes.
        let is_json = self.0.content_type.as_deref().is_none_or(is_json);
        let data = if is_json { members.get("data") } else { set("data") };
        let text = |raw| if is_json { None } else { serde_json::from_str::<String>(raw).ok() };
        if data.is_some() {
            self.in_utf8();
        }
        let data = data.map(|raw| match text(raw) {
            Some(text) => Data::Text(text),
            None => Data::Json(Json::part_of_checked(raw)),
        });
        self.edit().data = data.filter(|data| !data.as_bytes().is_empty());
        Ok(())
    }

    /// Its data came inside JSON and leaves in UTF-8: a content type of text that says otherwise would make bytes of it.
    fn in_utf8(&mut self) {
        let Some(content_type) = self.0.content_type.as_deref().filter(|content_type| is_text(content_type)) else {
            return;
        };
        let Some(place) = charset(content_type) else { return };
        let charset = &content_type[place.clone()];
        if !is_utf8(charset) && !is_ascii(charset) {
            let mut changed = content_type.to_owned();
            changed.replace_range(place, "utf-8");
            self.edit().content_type = Some(changed);
        }
    }

    /// The event as one JSON object on one line.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut out = String::with_capacity(256 + self.0.data.as_ref().map_or(0, |d| d.as_bytes().len()));
        out.push_str("{\"specversion\":\"1.0\"");
        let string = |out: &mut String, name: &str, value: Option<&str>| {
            if let Some(value) = value {
                member(out, name);
                quote(out, value);
            }
        };
        string(&mut out, "id", Some(&self.0.id));
        string(&mut out, "source", Some(&self.0.source));
        string(&mut out, "type", Some(&self.0.kind));
        string(&mut out, "subject", self.0.subject.as_deref());
        string(&mut out, "time", self.0.time.as_deref());
        string(&mut out, "datacontenttype", self.0.content_type.as_deref());
        string(&mut out, "dataschema", self.0.schema.as_deref());
        for (name, value) in &self.0.extensions {
            member(&mut out, name);
            match value {
                Value::Text(text) => quote(&mut out, text),
                Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
                Value::Int(int) => out.push_str(&int.to_string()),
            }
        }
        match &self.0.data {
            None => {}
            Some(Data::Json(raw)) => {
                out.push_str(",\"data\":");
                // Outside strings a line break is white space, inside them it cannot stand.
                raw.get().split(['\n', '\r']).enumerate().for_each(|(i, line)| {
                    out.push_str(if i > 0 { " " } else { "" });
                    out.push_str(line);
                });
            }
            Some(Data::Text(text)) => {
                out.push_str(",\"data\":");
                quote(&mut out, text);
            }
            Some(Data::Bytes(bytes)) => {
                out.push_str(",\"data_base64\":\"");
                BASE64.encode_string(bytes, &mut out);
                out.push('"');
            }
        }
        out.push('}');
        out
    }
}

fn checked(text: &[u8], limits: Limits) -> Result<&str, Unreadable> {
    if text.len() > limits.body {
        return Err(Unreadable::TooLarge { size: text.len(), limit: limits.body });
    }
    // One level more: the event itself, around data that may be as deep as any body.
    Ok(json::checked(text, limits.depth.saturating_add(1))?)
}

fn members(text: &str) -> Result<Members<'_>, Unreadable> {
    struct Read;
    impl<'de> Visitor<'de> for Read {
        type Value = Vec<(&'de str, &'de str)>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut members = Vec::with_capacity(16);
            while let Some((name, raw)) = map.next_entry::<&str, &RawValue>()? {
                members.push((name, raw.get()));
            }
            Ok(members)
        }
    }
    serde_json::Deserializer::from_str(text).deserialize_map(Read).map(Members).map_err(|_| Unreadable::Attribute {
        name: "event".into(),
        problem: "is not a JSON object with plain member names".into(),
    })
}

fn required(members: &Members<'_>, name: &'static str) -> Result<String, Unreadable> {
    match members.get(name).map(|raw| scalar(name, raw)).transpose()?.flatten() {
        None => Err(Unreadable::Missing(name)),
        Some(Value::Text(text)) => Ok(text),
        Some(_) => Err(Unreadable::Attribute { name: name.into(), problem: "is not a string".into() }),
    }
}

/// An attribute's value; `null` is as good as absent.
fn scalar(name: &str, raw: &str) -> Result<Option<Value>, Unreadable> {
    let wrong = |problem: &str| Unreadable::Attribute { name: excerpt(name), problem: problem.into() };
    // Most are strings without escapes, which are read by cutting off the quotes.
    if let Some(text) = raw.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'))
        && !text.contains('\\')
    {
        return Ok(Some(Value::Text(text.into())));
    }
    match raw.as_bytes().first() {
        Some(b'n') => Ok(None),
        Some(b't' | b'f') => Ok(Some(Value::Bool(raw == "true"))),
        Some(b'"') => {
            serde_json::from_str(raw).map(|text| Some(Value::Text(text))).map_err(|_| wrong("is not a string"))
        }
        // `2.0` is a whole number, too.
        Some(b'-' | b'0'..=b'9') => match number::canonical(raw).and_then(|number| number.parse().ok()) {
            Some(int) => Ok(Some(Value::Int(int))),
            None => Err(wrong("is not a whole number of 64 bits")),
        },
        _ => Err(wrong("is a list or an object, attributes are plain values")),
    }
}

/// Whether a media type means JSON.
pub(crate) fn is_json(content_type: &str) -> bool {
    const SUFFIX: &str = "+json";
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    let end = essence.len().checked_sub(SUFFIX.len()).and_then(|from| essence.get(from..));
    ["application/json", "text/json"].iter().any(|json| essence.eq_ignore_ascii_case(json))
        || end.is_some_and(|end| end.eq_ignore_ascii_case(SUFFIX))
}

/// Whether a media type means text.
pub(crate) fn is_text(content_type: &str) -> bool {
    content_type.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("text/"))
}

/// Where the charset of a media type stands in it.
pub(crate) fn charset(content_type: &str) -> Option<std::ops::Range<usize>> {
    const NAME: &str = "charset=";
    let mut at = 0;
    for part in content_type.split(';') {
        let skipped = part.len() - part.trim_start().len();
        let from = at + skipped + NAME.len();
        at += part.len() + 1;
        let named = part.trim_start().get(..NAME.len()).is_some_and(|name| name.eq_ignore_ascii_case(NAME));
        if named {
            let value = &content_type[from..at - 1];
            let start = from + value.len() - value.trim_start_matches([' ', '"']).len();
            return Some(start..start + value.trim_matches([' ', '"', '\t']).len());
        }
    }
    None
}

pub(crate) fn is_utf8(charset: &str) -> bool {
    ["", "utf-8", "utf8"].iter().any(|name| charset.eq_ignore_ascii_case(name))
}

pub(crate) fn is_ascii(charset: &str) -> bool {
    ["us-ascii", "ascii"].iter().any(|name| charset.eq_ignore_ascii_case(name))
}

fn member(out: &mut String, name: &str) {
    out.push_str(",\"");
    out.push_str(name);
    out.push_str("\":");
}

/// Appends a JSON string.
fn quote(out: &mut String, text: &str) {
    out.push('"');
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c < ' ' || matches!(c, '"' | '\\')) {
        let (plain, special) = rest.split_at(at);
        out.push_str(plain);
        let length = special.chars().next().map_or(0, char::len_utf8);
        let escaped = serde_json::Value::from(&special[..length]).to_string();
        out.push_str(&escaped[1..escaped.len() - 1]);
        rest = &special[length..];
    }
    out.push_str(rest);
    out.push('"');
}
