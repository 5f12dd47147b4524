//! Strict JSON: what a payload must be before anything looks inside it.
//!
//! `serde_json` alone accepts duplicate keys (the last one wins, silently) and has one fixed depth.
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::collections::{BTreeMap, HashSet};
use std::fmt;

/// Why bytes are not a JSON text that Warren takes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// Not UTF-8.
    #[error("not UTF-8: invalid byte at offset {0}")]
    Utf8(usize),
    /// Nested deeper than the limit.
    #[error("nested deeper than {0} levels")]
    TooDeep(usize),
    /// An object names a member twice, so readers would disagree on its value.
    #[error("ambiguous: an object names a member twice (line {line}, column {column})")]
    DuplicateKey {
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
    /// Not JSON by RFC 8259 (this includes `NaN` and `Infinity`).
    #[error("not valid JSON at line {line}, column {column}")]
    Syntax {
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
}

/// A JSON text that was checked whole, and is left unparsed: most routes do not look inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Json(Box<str>);

impl Json {
    /// The text, without white space around it.
    #[must_use]
    pub fn get(&self) -> &str {
        &self.0
    }

    /// A part of a text that was checked whole.
    pub(crate) fn part_of_checked(text: &str) -> Self {
        Self(text.into())
    }

    /// The value as a Rust type. What is to keep the text of its numbers is read as [`RawValue`]: `f64`, and so
    /// `serde_json::Value`, holds 17 digits.
    ///
    /// # Errors
    /// It has another shape.
    pub fn parse<'a, T: de::Deserialize<'a>>(&'a self) -> Result<T, serde_json::Error> {
        serde_json::from_str(&self.0)
    }

    /// The text of the value that a JSON pointer (RFC 6901) names, as it is written: numbers keep their digits.
    #[must_use]
    pub fn at(&self, pointer: &str) -> Option<&str> {
        let mut text = self.get();
        if pointer.is_empty() {
            return Some(text);
        }
        for token in pointer.strip_prefix('/')?.split('/') {
            text = match text.as_bytes().first() {
                Some(b'{') => {
                    let members: BTreeMap<String, &RawValue> = serde_json::from_str(text).ok()?;
                    members.get(&token.replace("~1", "/").replace("~0", "~"))?.get()
                }
                // A place has one spelling.
                Some(b'[') if token == "0" || token.starts_with(|c: char| matches!(c, '1'..='9')) => {
                    let items: Vec<&RawValue> = serde_json::from_str(text).ok()?;
                    items.get(token.parse::<usize>().ok()?)?.get()
                }
                _ => return None,
            };
        }
        Some(text)
    }
}

impl From<serde_json::Value> for Json {
    fn from(value: serde_json::Value) -> Self {
        Self(value.to_string().into())
    }
}

impl From<Box<RawValue>> for Json {
    fn from(raw: Box<RawValue>) -> Self {
        Self(raw.get().into())
    }
}

/// serde_json gives up at 128 levels; a configured limit stays below it.
pub const MAX_DEPTH: usize = 120;

/// What can be seen of an object's members with these names, by their place in the names, up to where the text is no
/// JSON object any more; and what is wrong there.
#[must_use]
pub fn glimpse<'a>(text: &'a [u8], names: &[&str]) -> (Vec<(usize, &'a RawValue)>, Option<serde_json::Error>) {
    let mut seen = Vec::new();
    let mut parser = serde_json::Deserializer::from_slice(text);
    let broken = parser.deserialize_map(Glimpse { names, seen: &mut seen }).and_then(|()| parser.end()).err();
    (seen, broken)
}

struct Glimpse<'n, 'a> {
    names: &'n [&'n str],
    seen: &'n mut Vec<(usize, &'a RawValue)>,
}

impl<'de> Visitor<'de> for Glimpse<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Name(name)) = map.next_key()? {
            match self.names.iter().position(|wanted| *wanted == name) {
                Some(place) => self.seen.push((place, map.next_value()?)),
                // Not read: it may hold anything, also what is not UTF-8.
                None => _ = map.next_value::<de::IgnoredAny>()?,
            }
        }
        Ok(())
    }
}

/// What some writers put before UTF-8. It says nothing, and no JSON text begins with it.
const BOM: &str = "\u{feff}";

/// The bytes without a byte order mark before them.
#[must_use]
pub fn without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BOM.as_bytes()).unwrap_or(bytes)
}

/// Checks the whole text and returns it unparsed, without a byte order mark.
///
/// # Errors
/// Says what is wrong and where; never quotes the text, which may be a secret.
pub fn check(bytes: &[u8], max_depth: usize) -> Result<Json, JsonError> {
    checked(bytes, max_depth).map(Json::part_of_checked)
}

/// The same, without a copy.
pub(crate) fn checked(bytes: &[u8], max_depth: usize) -> Result<&str, JsonError> {
    let text = std::str::from_utf8(bytes).map_err(|e| JsonError::Utf8(e.valid_up_to()))?;
    let text = text.strip_prefix(BOM).unwrap_or(text);
    let max_depth = max_depth.min(MAX_DEPTH);
    let mut parser = serde_json::Deserializer::from_str(text);
    Strict { left: max_depth }
        .deserialize(&mut parser)
        .and_then(|()| parser.end())
        .map_err(|e| explain(&e, max_depth))?;

    Ok(text.trim())
}

const DEEP: &str = "warren:too-deep";
const TWICE: &str = "warren:duplicate-key";

fn explain(error: &serde_json::Error, max_depth: usize) -> JsonError {
    let (line, column) = (error.line(), error.column());
    let message = error.to_string();
    if message.starts_with(DEEP) || message.starts_with("recursion limit") {
        JsonError::TooDeep(max_depth)
    } else if message.starts_with(TWICE) {
        JsonError::DuplicateKey { line, column }
    } else {
        JsonError::Syntax { line, column }
    }
}

/// Walks a value without building it.
#[derive(Clone, Copy)]
struct Strict {
    left: usize,
}

impl Strict {
    fn inner<E: de::Error>(self) -> Result<Self, E> {
        match self.left.checked_sub(1) {
            Some(left) => Ok(Self { left }),
            None => Err(E::custom(DEEP)),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let inner = self.inner()?;
        while seq.next_element_seed(inner)?.is_some() {}
        Ok(())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let inner = self.inner()?;
        // Few members: a scan beats a hash set. Many: the set keeps it linear.
        let mut few: Vec<std::borrow::Cow<'de, str>> = Vec::new();
        let mut many: HashSet<String> = HashSet::new();
        while let Some(Name(name)) = map.next_key()? {
            let fresh = if few.len() < 16 {
                let fresh = !few.contains(&name);
                few.push(name);
                fresh
            } else {
                if many.is_empty() {
                    many.extend(few.iter().map(|n| n.clone().into_owned()));
                }
                many.insert(name.into_owned())
            };
            if !fresh {
                return Err(de::Error::custom(TWICE));
            }
            map.next_value_seed(inner)?;
        }
        Ok(())
    }
}

/// A member's name, borrowed where it holds no escapes.
struct Name<'a>(std::borrow::Cow<'a, str>);

impl<'de> de::Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Name<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a member name")
            }
            fn visit_borrowed_str<E>(self, name: &'de str) -> Result<Name<'de>, E> {
                Ok(Name(name.into()))
            }
            fn visit_str<E>(self, name: &str) -> Result<Name<'de>, E> {
                Ok(Name(name.to_owned().into()))
            }
        }
        deserializer.deserialize_str(Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuses(text: &[u8], want: fn(&JsonError) -> bool) {
        let error = check(text, 64).expect_err("must be refused");
        assert!(want(&error), "{error:?}");
    }

    #[test]
    fn takes_what_the_rfc_takes_and_leaves_it_unparsed() {
        let raw = check(b" {\"a\": [1, 2.50, null, \"x\"]} \n", 64).expect("valid");
        assert_eq!(raw.get(), "{\"a\": [1, 2.50, null, \"x\"]}");
    }

    #[test]
    fn a_byte_order_mark_says_nothing() {
        assert_eq!(check("\u{feff} {\"a\":1}".as_bytes(), 64).expect("valid").get(), "{\"a\":1}");
        assert_eq!(check(b"\xef\xbb\xbf\"\xff\"", 64), Err(JsonError::Utf8(4)), "counted from the body's beginning");
        for text in ["\u{feff}", "\u{feff}\u{feff}1", "[\u{feff}1]"] {
            refuses(text.as_bytes(), |e| matches!(e, JsonError::Syntax { .. }));
        }
    }

    #[test]
    fn a_pointer_finds_the_text_as_it_is_written() {
        let text =
            r#"{"a": {"b/c": [1.10, 12345678901234567890123, "x\u0041"], "m~n": -0}, "": true, "2": {"0": 1e2}}"#;
        let json = check(text.as_bytes(), 64).expect("valid");
        for (pointer, wanted) in [
            ("/a/b~1c/0", Some("1.10")),
            ("/a/b~1c/1", Some("12345678901234567890123")),
            ("/a/b~1c/2", Some(r#""x\u0041""#)),
            ("/a/m~0n", Some("-0")),
            ("/2/0", Some("1e2")),
            ("/", Some("true")),
            ("/a/b~1c/3", None),
            ("/a/b~1c/01", None),
            ("/a/b~1c/+1", None),
            ("/a/b~1c/-", None),
            ("/a/b~1c/0/0", None),
            ("/none", None),
            ("a", None),
        ] {
            assert_eq!(json.at(pointer), wanted, "{pointer}");
        }
        assert_eq!(json.at(""), Some(json.get()));
    }

    #[test]
    fn refuses_what_readers_would_disagree_on() {
        refuses(b"{\"a\":1,\"a\":2}", |e| matches!(e, JsonError::DuplicateKey { .. }));
        refuses(b"{\"a\":1,\"\\u0061\":2}", |e| matches!(e, JsonError::DuplicateKey { .. }));
        let mut wide: String = (0..40).map(|i| format!("\"k{i}\":1,")).collect();
        wide = format!("{{{wide}\"k3\":2}}");
        refuses(wide.as_bytes(), |e| matches!(e, JsonError::DuplicateKey { .. }));
    }

    #[test]
    fn refuses_what_is_not_json() {
        for text in ["{\"a\":NaN}", "{\"a\":Infinity}", "{\"a\":1", "", "{} {}", "{'a':1}", "01"] {
            refuses(text.as_bytes(), |e| matches!(e, JsonError::Syntax { .. }));
        }
        refuses(b"{\"a\":\"\xff\"}", |e| matches!(e, JsonError::Utf8(6)));
    }

    #[test]
    fn refuses_a_hundred_thousand_levels_without_using_the_stack() {
        let deep = "[".repeat(100_000);
        refuses(deep.as_bytes(), |e| matches!(e, JsonError::TooDeep(64)));
        let ok = format!("{}1{}", "[".repeat(64), "]".repeat(64));
        assert!(check(ok.as_bytes(), 64).is_ok());
        let over = format!("{}1{}", "[".repeat(65), "]".repeat(65));
        refuses(over.as_bytes(), |e| matches!(e, JsonError::TooDeep(64)));
    }
}
