//! Input lines as events: CloudEvents, or any JSON with its type given.
use std::io::{self, BufRead};
use warren_shared::event::{Event, Identity, Limits, Unreadable, Value};
use warren_shared::json::{self, Json, JsonError};

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
        // A file that was made of several has such a mark before each.
        if !json::without_bom(&text).trim_ascii().is_empty() {
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
        self.read(line, limits).map_err(|error| placed(error, line.number))
    }

    fn read(&self, line: &Line, limits: Limits) -> Result<Event, Unreadable> {
        let Self::Any { kind, source, id, key } = self else {
            return Event::from_json(&line.text, limits);
        };
        let raw = json::check(&line.text, limits.depth)?;
        let id = match id {
            Some(pointer) => at(&raw, "id", pointer)?,
            None => {
                let content = format!("{}\0{}", line.number, raw.get());
                Identity::of(source, &content).derive("line")
            }
        };
        let mut event = Event::new(id, source.as_str(), kind.as_str())?;
        if let Some(pointer) = key {
            event = event.with("partitionkey", Value::Text(at(&raw, "partitionkey", pointer)?))?;
        }
        event.with_json(raw.get().as_bytes(), limits)
    }
}

/// A string, or a number as it is written: two numbers that differ in the twentieth digit are two ids.
fn at(json: &Json, name: &str, pointer: &str) -> Result<String, Unreadable> {
    let wrong = |problem: String| Unreadable::Attribute { name: name.into(), problem };
    let neither = || wrong(format!("at '{pointer}' is neither a string nor a number"));
    match json.at(pointer) {
        Some(text) if text.starts_with('"') => serde_json::from_str(text).map_err(|_| neither()),
        Some(text) if text.starts_with(|c: char| c == '-' || c.is_ascii_digit()) => Ok(text.into()),
        Some(_) => Err(neither()),
        None => Err(wrong(format!("is not there: the line has nothing at '{pointer}'"))),
    }
}

/// The same with the number of the line in the input: each line is a text of its own, whose lines count from 1.
fn placed(mut error: Unreadable, number: u64) -> Unreadable {
    if let Unreadable::Json(JsonError::Syntax { line, .. } | JsonError::DuplicateKey { line, .. }) = &mut error {
        *line = usize::try_from(number).unwrap_or(usize::MAX);
    }
    error
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
    fn numbers_that_differ_in_any_digit_are_different_ids_and_keys() {
        let (id, key) = (Some("/iccid".into()), Some("/sim/0".into()));
        let reading = Reading::Any { kind: "a.b".into(), source: "/s".into(), id, key };
        let read = |number: &str| {
            let text = format!("{{\"iccid\":{number},\"sim\":[{number}]}}").into_bytes();
            let line = Line { number: 1, length: text.len(), text };
            let event = reading.event(&line, Limits::default()).expect("valid");
            assert_eq!(event.key(), event.id());
            event.id().to_owned()
        };
        for number in ["89490200001234567890", "89490200001234567891", "12345678901234567.89", "1.10", "1e2", "-0", "7"]
        {
            assert_eq!(read(number), number);
        }
        assert_eq!(read("\"a\\u0062\""), "ab");
    }

    #[test]
    fn a_byte_order_mark_changes_nothing() {
        let mut input = io::BufReader::new("\u{feff}{\"k\":7}\n\u{feff}\n\u{feff}{\"k\":7}\n".as_bytes());
        let (mut number, mut lines) = (0, Vec::new());
        while let Some(line) = next(&mut input, &mut number, 100).expect("readable") {
            lines.push(line);
        }
        assert_eq!(lines.iter().map(|line| line.number).collect::<Vec<_>>(), [1, 3]);
        let reading = Reading::Any { kind: "a.b".into(), source: "/s".into(), id: None, key: None };
        let bare = Line { number: 1, text: b"{\"k\":7}".into(), length: 7 };
        let read = |line: &Line| reading.event(line, Limits::default()).expect("valid");
        assert_eq!(read(&lines[0]), read(&bare));
        assert_eq!(read(&lines[1]).data(), read(&bare).data());
        let text = "\u{feff}{\"specversion\":\"1.0\",\"id\":\"1\",\"source\":\"/s\",\"type\":\"a.b\"}";
        let line = Line { number: 1, text: text.into(), length: text.len() };
        assert_eq!(Reading::CloudEvents.event(&line, Limits::default()).expect("valid").id(), "1");
    }

    #[test]
    fn a_mistake_is_placed_in_the_line_of_the_input() {
        for reading in
            [Reading::CloudEvents, Reading::Any { kind: "a.b".into(), source: "/s".into(), id: None, key: None }]
        {
            for text in ["{\"a\":NaN}", "{\"a\":1,\"a\":2}"] {
                let line = Line { number: 42, text: text.into(), length: text.len() };
                let error = reading.event(&line, Limits::default()).expect_err(text).to_string();
                assert!(error.contains("line 42, column"), "{error}");
            }
        }
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
