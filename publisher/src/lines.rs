//! Input lines as events: CloudEvents, or any JSON with its type given.
use std::io::{self, BufRead};
use warren_shared::event::{Event, Identity, Limits, Unreadable, Value};
use warren_shared::json;

/// How a line becomes an event.
#[derive(Clone, Debug)]
pub enum Reading {
    /// Each line is a CloudEvent in JSON.
    CloudEvents,
    /// Each line is the data of an event.
    Any {
        /// The type of all.
        kind: String,
        /// The source of all.
        source: String,
        /// JSON pointer to the id; without one it is derived from source, line number and content.
        id: Option<String>,
        /// JSON pointer to the key.
        key: Option<String>,
    },
}

/// A line of input.
#[derive(Debug)]
pub struct Line {
    /// Its number, from 1.
    pub number: u64,
    /// Its bytes; of a line beyond the limit only the beginning.
    pub text: Vec<u8>,
    /// Its whole length.
    pub length: usize,
}

/// Reads the next line that is not blank, keeping at most `limit` bytes of it: no line can fill the memory.
///
/// # Errors
/// The input cannot be read.
pub fn next(input: &mut impl BufRead, number: &mut u64, limit: usize) -> io::Result<Option<Line>> {
    loop {
        let (mut text, mut length, mut ended) = (Vec::new(), 0, false);
        while !ended {
            let available = input.fill_buf()?;
            if available.is_empty() {
                break;
            }
            let end = memchr::memchr(b'\n', available);
            let taken = end.unwrap_or(available.len());
            let room = limit.saturating_sub(text.len()).min(taken);
            text.extend_from_slice(&available[..room]);
            length += taken;
            ended = end.is_some();
            input.consume(taken + usize::from(ended));
        }
        if length == 0 && !ended {
            return Ok(None);
        }
        *number += 1;
        if !text.trim_ascii().is_empty() {
            return Ok(Some(Line { number: *number, text, length }));
        }
    }
}

impl Reading {
    /// The event of a line.
    ///
    /// # Errors
    /// Says why the line is no event.
    pub fn event(&self, line: &Line, limits: Limits) -> Result<Event, Unreadable> {
        if line.length > limits.body {
            return Err(Unreadable::TooLarge { size: line.length, limit: limits.body });
        }
        let Self::Any { kind, source, id, key } = self else {
            return Event::from_json(&line.text, limits);
        };
        let raw = json::check(&line.text, limits.depth)?;
        let value = || serde_json::from_str::<serde_json::Value>(raw.get()).unwrap_or_default();
        let id = match id {
            Some(pointer) => at(&value(), "id", pointer)?,
            None => {
                let content = format!("{}\0{}", line.number, raw.get());
                Identity::of(source, &content).derive("line")
            }
        };
        let mut event = Event::new(id, source.as_str(), kind.as_str())?;
        if let Some(pointer) = key {
            event = event.with("partitionkey", Value::Text(at(&value(), "partitionkey", pointer)?))?;
        }
        event.with_json(raw.get().as_bytes(), limits)
    }
}

fn at(value: &serde_json::Value, name: &str, pointer: &str) -> Result<String, Unreadable> {
    let wrong = |problem: String| Unreadable::Attribute { name: name.into(), problem };
    match value.pointer(pointer) {
        Some(serde_json::Value::String(text)) => Ok(text.clone()),
        Some(serde_json::Value::Number(number)) => Ok(number.to_string()),
        Some(_) => Err(wrong(format!("at '{pointer}' is neither a string nor a number"))),
        None => Err(wrong(format!("is not there: the line has nothing at '{pointer}'"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_numbered_bounded_and_blank_ones_skipped() {
        let mut input = io::BufReader::with_capacity(3, &b"one\n\n  \nfourteen bytes\nlast"[..]);
        let mut number = 0;
        let mut read = || next(&mut input, &mut number, 8).expect("readable").map(|l| (l.number, l.text, l.length));
        assert_eq!(read(), Some((1, b"one".to_vec(), 3)));
        assert_eq!(read(), Some((4, b"fourteen".to_vec(), 14)));
        assert_eq!(read(), Some((5, b"last".to_vec(), 4)));
        assert_eq!(read(), None);
    }

    #[test]
    fn the_same_file_gives_the_same_ids_and_equal_lines_differ() {
        let reading = Reading::Any { kind: "a.b".into(), source: "/s".into(), id: None, key: Some("/k".into()) };
        let id = |number, text: &str| {
            let line = Line { number, text: text.into(), length: text.len() };
            reading.event(&line, Limits::default()).expect("valid").id().to_owned()
        };
        assert_eq!(id(1, "{\"k\":7}"), id(1, "{\"k\":7}"));
        assert_ne!(id(1, "{\"k\":7}"), id(2, "{\"k\":7}"));
        assert_ne!(id(1, "{\"k\":7}"), id(1, "{\"k\":8}"));
    }
}
