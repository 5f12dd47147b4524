//! The lines that Warren and a program exchange: one JSON object each, in both directions.
use super::{Call, Outcome, Reply};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::time::Duration;
use warren_shared::json::{glimpse, without_bom};
use warren_shared::process::wire::idempotency_key;
use warren_shared::{Event, Identity, env};

/// A program's words are cut here: a dead letter's header takes no more.
const ERROR_LIMIT: usize = 1024;

/// Appends the line that hands an event over.
pub(super) fn write(call: &Call, identity: &Identity, out: &mut Vec<u8>) {
    use std::io::Write;
    let now = jiff::Timestamp::now();
    let deadline = now.checked_add(call.context.timeout).unwrap_or(jiff::Timestamp::MAX);
    let (event, attempt) = (call.event.to_json(), call.context.attempt);
    let event = one_line(&event);
    let key = idempotency_key(&call.event, identity);
    writeln!(
        out,
        "{{\"event\":{event},\"attempt\":{attempt},\"idempotency_key\":\"{key}\",\"deadline\":\"{deadline:.3}\"}}"
    )
    .expect("a vector takes all that is written");
}

/// JSON without what some readers take for the end of a line: JSON lets these stand in a string as they are.
fn one_line(json: &str) -> Cow<'_, str> {
    const ENDS: [(char, &str); 3] = [('\u{85}', "\\u0085"), ('\u{2028}', "\\u2028"), ('\u{2029}', "\\u2029")];
    let may_hold = memchr::memchr2_iter(0xc2, 0xe2, json.as_bytes()).any(|at| {
        let rest = &json.as_bytes()[at..];
        [&b"\xc2\x85"[..], b"\xe2\x80\xa8", b"\xe2\x80\xa9"].iter().any(|end| rest.starts_with(end))
    });
    if !may_hold {
        return json.into();
    }
    ENDS.iter().fold(json.to_owned(), |json, (end, escaped)| json.replace(*end, escaped)).into()
}

/// A line of a program that names an event.
pub(super) struct Answer<'a> {
    /// Which event.
    pub(super) named: Named,
    said: Result<Said<'a>, String>,
}

/// How a line names an event.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Named {
    /// By source and id.
    Event(Identity),
    /// By the id alone: a wrong answer, if the program holds one event with that id.
    Id(String),
}

/// A line of a program that names none.
#[derive(Debug)]
pub(super) struct NoAnswer;

/// What is said about the event stays unparsed until the event is known: its limits apply.
#[derive(Deserialize)]
struct Said<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    #[serde(borrow)]
    source: Cow<'a, str>,
    #[serde(borrow)]
    status: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow)]
    after: Option<&'a RawValue>,
    #[serde(borrow)]
    result: Option<&'a RawValue>,
    #[serde(borrow)]
    emit: Option<&'a RawValue>,
}

impl<'a> Answer<'a> {
    /// Reads a line.
    pub(super) fn read(line: &'a [u8]) -> Result<Self, NoAnswer> {
        let line = without_bom(line);
        // A derived reader would take a list for an object.
        if !line.trim_ascii_start().starts_with(b"{") {
            return Err(NoAnswer);
        }
        match serde_json::from_slice::<Said<'_>>(line) {
            Ok(said) => Ok(Self { named: Named::Event(Identity::of(&said.source, &said.id)), said: Ok(said) }),
            // An event that is named must not wait for another answer.
            Err(error) => Self::wrong(line, &error),
        }
    }

    /// Reads a line that is no right answer: the event that it names, and what is wrong with it.
    fn wrong(line: &'a [u8], error: &serde_json::Error) -> Result<Self, NoAnswer> {
        let (seen, broken) = glimpse(line, &["id", "source", "status"]);
        let all = |place: usize| seen.iter().filter(move |(found, _)| *found == place).map(|(_, raw)| *raw);
        let (id, source) = (all(0).next(), all(1).next());
        // Two ids name nobody.
        if all(0).count() > 1 || all(1).count() > 1 {
            return Err(NoAnswer);
        }
        let word_id = id.and_then(word).ok_or(NoAnswer)?;
        let named = match source.and_then(word) {
            Some(source) => Named::Event(Identity::of(&source, &word_id)),
            // Lines of a log are JSON, too, and may have an id.
            None if broken.is_some() || all(2).next().is_some() => Named::Id(word_id),
            None => return Err(NoAnswer),
        };
        let column = |raw: &RawValue| raw.get().as_ptr() as usize - line.as_ptr() as usize + 1;
        let no_text = |name, raw: Option<&'a RawValue>| match raw {
            None => Some(format!("it has no '{name}'")),
            Some(raw) if raw.get().starts_with('"') => None,
            Some(raw) => Some(format!("'{name}' is not a string (column {})", column(raw))),
        };
        let not_json = broken.map(|error| format!("it is not valid JSON at column {}", error.column()));
        let not_text = str::from_utf8(line).err().map(|e| format!("it is not UTF-8 (column {})", e.valid_up_to() + 1));
        let wrong = not_json.or(not_text).or_else(|| no_text("id", id)).or_else(|| no_text("source", source));
        let wrong = wrong.unwrap_or_else(|| format!("it has a member twice (column {})", error.column()));
        Ok(Self { named, said: Err(wrong) })
    }

    /// What it means for the call that it answers. An answer that means nothing is one that trying again cannot help:
    /// the program does not speak the protocol.
    pub(super) fn outcome(self, call: &Call) -> Outcome {
        let outcome = self.said.and_then(|said| said.outcome(call));
        outcome.unwrap_or_else(|error| Outcome::Unclear { error: format!("the program's answer is wrong: {error}") })
    }
}

/// A string, or a number as it is written, which a program may have made of one.
fn word(raw: &RawValue) -> Option<String> {
    match raw.get().as_bytes().first() {
        Some(b'"') => serde_json::from_str(raw.get()).ok(),
        Some(b'-' | b'0'..=b'9') => Some(raw.get().into()),
        _ => None,
    }
}

impl Said<'_> {
    fn outcome(&self, call: &Call) -> Result<Outcome, String> {
        let Some(status) = self.status else {
            return Err("it has no 'status', which is done, retry or dead".into());
        };
        let error = || match self.error {
            Some(raw) => text(raw).unwrap_or_else(|| plain(raw.get(), ERROR_LIMIT)),
            None => "the program gave no 'error'".into(),
        };
        match text(status).as_deref() {
            Some("done") => {
                let result = self.result.map(|raw| call.result(raw.get().as_bytes())).transpose()?.flatten();
                Ok(Outcome::Done(Reply { result, emit: self.emit(call)?, ..Reply::default() }))
            }
            Some("retry") => Ok(Outcome::Retry { error: error(), after: self.after()? }),
            Some("dead") => Ok(Outcome::Dead { error: error() }),
            _ => Err(format!("'status' is {}, not one of: done, retry, dead", plain(status.get(), 32))),
        }
    }

    fn emit(&self, call: &Call) -> Result<Vec<Event>, String> {
        let Some(raw) = self.emit else { return Ok(Vec::new()) };
        let list: Vec<&RawValue> = serde_json::from_str(raw.get()).map_err(|_| "'emit' is not a list of events")?;
        let read = |(i, raw): (usize, &&RawValue)| {
            call.emitted(i, raw.get().as_bytes()).map_err(|error| format!("emit[{i}]: {error}"))
        };
        list.iter().enumerate().map(read).collect()
    }

    fn after(&self) -> Result<Option<Duration>, String> {
        let Some(raw) = self.after else { return Ok(None) };
        let text = text(raw).ok_or("'after' is not a string such as \"5s\"")?;
        env::duration(&text).map(Some).map_err(|error| format!("after: {error}"))
    }
}

fn text(raw: &RawValue) -> Option<String> {
    let text: String = serde_json::from_str(raw.get()).ok()?;
    Some(plain(&text, ERROR_LIMIT))
}

/// Words of a program on one line that is not longer than this: nothing in them can forge a line of a log.
pub(super) fn plain(text: &str, limit: usize) -> String {
    let fits = text.char_indices().take_while(|(i, c)| i + c.len_utf8() <= limit);
    fits.map(|(_, c)| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::Context;

    fn call() -> Call {
        let event = Event::new("ü\"1", "/s", "a.b").and_then(|e| e.with_json(b"{\"n\":\n1}", Default::default()));
        let timeout = Duration::from_secs(5);
        let context = Context { attempt: 3, timeout, partition: "p00".into(), pool: "p".into(), ..Default::default() };
        Call { event: event.expect("valid"), context, entry: Default::default(), kept: None }
    }

    fn outcome(rest: &str) -> Outcome {
        let line = format!("{{\"id\":\"\\u00fc\\\"1\",\"source\":\"/s\"{rest}}}");
        let answer = Answer::read(line.as_bytes()).expect("it names the event");
        assert_eq!(answer.named, Named::Event(call().event.identity()));
        answer.outcome(&call())
    }

    fn is_dead(rest: &str, wanted: &str) {
        match outcome(rest) {
            // What it means nobody can tell: it may have been done.
            Outcome::Unclear { error } => assert!(error.contains(wanted), "{rest}: {error}"),
            other => panic!("{rest}: {other:?}"),
        }
    }

    #[test]
    fn an_event_is_one_line_with_attempt_and_deadline() {
        let mut out = Vec::new();
        write(&call(), &call().event.identity(), &mut out);
        let text = String::from_utf8(out).expect("UTF-8");
        assert_eq!(text.matches('\n').count(), 1, "{text}");
        let line: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((&line["event"]["id"], &line["attempt"]), (&"ü\"1".into(), &3.into()));
        assert_eq!(line["idempotency_key"], format!("{:?}", call().event.identity()));
        assert!(
            line["deadline"].as_str().expect("text").parse::<jiff::Timestamp>().expect("a time")
                > jiff::Timestamp::now()
        );
    }

    #[test]
    fn the_three_outcomes_are_read() {
        match outcome(
            ",\"status\":\"done\",\"result\":{\"a\":[1]},\"emit\":[{\"type\":\"x\"},{\"type\":\"y\",\"id\":\"7\"}]",
        ) {
            Outcome::Done(reply) => {
                assert_eq!(reply.result.expect("a result").get(), "{\"a\":[1]}");
                assert_eq!((reply.emit[0].kind(), reply.emit[1].id()), ("x", "7"));
                assert_eq!(reply.emit[0].key(), call().event.key());
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(outcome(",\"status\":\"retry\",\"error\":\"e\",\"after\":\"5s\""),
            Outcome::Retry { error, after: Some(after) } if error == "e" && after.as_secs() == 5));
        assert!(
            matches!(outcome(",\"status\":\"dead\",\"error\":\"a\\nb\""), Outcome::Dead { error } if error == "a b")
        );
    }

    #[test]
    fn null_is_as_good_as_absent() {
        let done =
            outcome(",\"status\":\"done\",\"error\":null,\"after\":null,\"result\":null,\"emit\":null,\"more\":1");
        assert!(matches!(done, Outcome::Done(Reply { result: None, emit, .. }) if emit.is_empty()));
        let retry = outcome(",\"status\":\"retry\",\"error\":null,\"after\":null");
        assert!(matches!(retry, Outcome::Retry { error, after: None } if error.contains("no 'error'")));
    }

    #[test]
    fn an_error_that_is_no_string_is_taken_as_it_stands() {
        assert!(matches!(outcome(",\"status\":\"retry\",\"error\":{\"code\":5}"),
            Outcome::Retry { error, .. } if error == "{\"code\":5}"));
        let long = format!(",\"status\":\"dead\",\"error\":\"{}\"", "ü".repeat(5000));
        assert!(matches!(outcome(&long), Outcome::Dead { error } if error.len() == ERROR_LIMIT));
    }

    #[test]
    fn a_wrong_answer_says_what_is_wrong() {
        is_dead("", "no 'status'");
        is_dead(",\"status\":\"ok\"", "'status' is \"ok\", not one of: done, retry, dead");
        is_dead(",\"status\":1", "'status' is 1");
        is_dead(",\"status\":\"retry\",\"after\":5", "'after' is not a string");
        is_dead(",\"status\":\"retry\",\"after\":\"soon\"", "after: 'soon' is not a duration");
        is_dead(",\"status\":\"done\",\"emit\":{}", "'emit' is not a list");
        is_dead(",\"status\":\"done\",\"emit\":[{\"type\":\"a\"},{}]", "emit[1]: the attribute 'type' is missing");
        is_dead(",\"status\":\"done\",\"emit\":[5]", "emit[0]: ");
        is_dead(
            ",\"status\":\"done\",\"result\":{\"a\":1,\"a\":2}",
            "result: ambiguous: an object names a member twice",
        );
        is_dead(&format!(",\"status\":\"done\",\"result\":{}1{}", "[".repeat(5000), "]".repeat(5000)), "nested deeper");
        is_dead(",\"status\":\"done\",\"result\":1e999", "result: ");
        is_dead(",\"status\":\"done\",\"status\":\"dead\"", "it has a member twice (column ");
    }

    #[test]
    fn a_line_that_names_no_event_is_no_answer() {
        for line in [
            "",
            "hello",
            "5",
            "[\"i\",\"s\",\"done\"]",
            "{",
            "{}",
            "{\"id\":\"i\",\"message\":\"a line of a log\"}",
            "{\"id\":null,\"source\":\"s\",\"status\":\"done\"}",
            "{\"id\":[\"i\"],\"source\":\"s\",\"status\":\"done\"}",
            "{\"source\":\"s\",\"status\":\"done\"}",
            "{\"source\":\"s\",\"status\":\"done\",\"result\":NaN,\"id\":\"i\"}",
            "{\"id\":\"i\",\"id\":\"j\",\"source\":\"s\"}",
            "{'id':'i','source':'s'}",
            "{\"id\":\"\\ud800\",\"source\":\"s\"}",
        ] {
            assert!(Answer::read(line.as_bytes()).is_err(), "{line}");
        }
        assert!(Answer::read(b"{\"id\":\"\xff\",\"source\":\"s\"}").is_err());
    }

    #[test]
    fn what_names_an_event_and_is_no_right_answer_is_wrong_at_once_and_says_where() {
        let event = || Named::Event(Identity::of("s", "1"));
        for (line, named, wrong) in [
            (&b"{\"id\":\"1\",\"source\":\"s\",\"result\":NaN}"[..], event(), "not valid JSON at column 33"),
            (b"{\"id\":\"1\",\"source\":\"s\",\"result\":[-Infinity", event(), "not valid JSON at column 35"),
            (b"{\"id\":\"1\",\"source\":\"s\",\"status\":\"do", event(), "not valid JSON at column 3"),
            (b"{\"id\":\"1\",\"source\":\"s\"} {}", event(), "not valid JSON at column 25"),
            (b"{\"id\":1,\"source\":\"s\",\"status\":\"done\"}", event(), "'id' is not a string (column 7)"),
            (b"{\"id\":1,\"source\":\"s\",\"result\":NaN}", event(), "not valid JSON at column 3"),
            (b"{\"id\":\"1\",\"source\":\"s\",\"result\":\"\xff\"}", event(), "not UTF-8 (column 34)"),
            (b"{\"id\":\"1\",\"status\":\"done\"}", Named::Id("1".into()), "it has no 'source'"),
            (b"{\"id\":\"1\",\"status\":NaN}", Named::Id("1".into()), "not valid JSON at column 2"),
            (b"{\"id\":1,\"source\":null,\"status\":\"done\"}", Named::Id("1".into()), "'id' is not a string"),
            (
                b"{\"id\":\"1\",\"source\":[],\"status\":\"done\"}",
                Named::Id("1".into()),
                "'source' is not a string (col",
            ),
        ] {
            let shown = String::from_utf8_lossy(line);
            let answer = Answer::read(line).unwrap_or_else(|_| panic!("{shown} names an event"));
            assert_eq!(answer.named, named, "{shown}");
            match answer.outcome(&call()) {
                Outcome::Unclear { error } => {
                    assert!(
                        error.starts_with("the program's answer is wrong: ") && error.contains(wrong),
                        "{shown}: {error}"
                    );
                }
                other => panic!("{shown}: {other:?}"),
            }
        }
        let answer = Answer::read("\u{feff}{\"id\":\"1\",\"source\":\"s\",\"status\":\"done\"}".as_bytes());
        let outcome = answer.expect("it names the event").outcome(&call());
        assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    }

    #[test]
    fn results_and_events_keep_the_text_of_their_numbers() {
        for number in ["12345678901234567890123", "12345678901234567.89", "1.10", "-0.0", "1E2"] {
            let Outcome::Done(reply) = outcome(&format!(
                ",\"status\":\"done\",\"result\":{{\"n\":{number}}},\"emit\":[{{\"type\":\"x\",\"data\":{number}}}]"
            )) else {
                panic!("{number}")
            };
            assert_eq!(reply.result.expect("a result").get(), format!("{{\"n\":{number}}}"));
            assert_eq!(reply.emit[0].data().expect("data").as_bytes(), number.as_bytes());
        }
    }

    #[test]
    fn nothing_in_an_event_ends_a_line_for_any_reader() {
        let mut call = call();
        let data = "\"\u{85}é€\u{2028}’\u{2029}\\u2028\"";
        call.event = call.event.with("note", "a\u{2028}b".into()).expect("an extension");
        call.event = call.event.with_json(data.as_bytes(), Default::default()).expect("JSON");
        let mut out = Vec::new();
        write(&call, &call.event.identity(), &mut out);
        let text = String::from_utf8(out).expect("UTF-8");
        let end = text.find(['\n', '\r', '\u{b}', '\u{c}', '\u{85}', '\u{2028}', '\u{2029}']);
        assert_eq!(end, Some(text.len() - 1), "{text}");
        let line: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(line["event"]["data"], "\u{85}é€\u{2028}’\u{2029}\u{2028}");
        assert_eq!(line["event"]["note"], "a\u{2028}b");
        assert!(matches!(one_line("\"é€’Â\""), Cow::Borrowed(_)));
    }
}
