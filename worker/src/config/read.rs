//! YAML that knows its lines: a tree of nodes, and tables whose fields are taken out one by one.
//!
//! Whoever reads a table asks for the fields that it knows; every mistake is noted with its line, and [`Table::finish`]
//! notes what nobody asked for. So a file's mistakes are all told at once, and every table reads like a list of its fields.
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value as Json;
use serde_saphyr::options::DuplicateKeyPolicy;
use serde_saphyr::{Spanned, from_str_with_options, options};
use std::cell::RefCell;
use std::fmt::{self, Display};
use std::ops::RangeInclusive;
use std::time::Duration;
use warren_shared::env::duration;

/// The mistakes of a file, each with its line.
#[derive(Debug, Default)]
pub(super) struct Mistakes(RefCell<Vec<(u64, String)>>);

impl Mistakes {
    /// Notes one.
    pub(super) fn note(&self, line: u64, mistake: impl Into<String>) {
        self.0.borrow_mut().push((line, mistake.into()));
    }

    /// All of them in the order of their lines, as `<origin>:<line>: <mistake>`.
    pub(super) fn list(self, origin: &str) -> Vec<String> {
        let mut all = self.0.into_inner();
        all.sort_by_key(|(line, _)| *line);
        all.into_iter().map(|(line, mistake)| format!("{origin}:{line}: {mistake}")).collect()
    }
}

/// A value and the line where it begins, counted from 1.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) line: u64,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Scalar(Json),
    List(Vec<Node>),
    Table(Vec<Field>),
}

#[derive(Debug)]
struct Field {
    name: String,
    line: u64,
    /// None once it is taken.
    value: Option<Node>,
}

impl Node {
    /// Reads a document. What is no YAML, and keys that stand twice, are noted.
    pub(super) fn read(text: &str, mistakes: &Mistakes) -> Option<Self> {
        // The second of two alike is looked for below, where the first is known as well; `on` and `yes` are words.
        let options =
            options! { duplicate_keys: DuplicateKeyPolicy::LastWins, strict_booleans: true, with_snippet: false };
        match from_str_with_options::<Self>(text, options) {
            Ok(node) => {
                node.note_twins(mistakes);
                Some(node)
            }
            Err(error) => {
                let line = error.location().map_or(1, |location| location.line().max(1));
                mistakes.note(line, format!("this is not YAML: {error}"));
                None
            }
        }
    }

    fn note_twins(&self, mistakes: &Mistakes) {
        match &self.value {
            Value::Scalar(_) => {}
            Value::List(nodes) => nodes.iter().for_each(|node| node.note_twins(mistakes)),
            Value::Table(fields) => {
                for (i, Field { name, line, value }) in fields.iter().enumerate() {
                    if let Some(first) = fields[..i].iter().find(|other| other.name == *name) {
                        let mistake = format!("'{name}' stands in line {} already: remove one of the two", first.line);
                        mistakes.note(*line, mistake);
                    }
                    value.iter().for_each(|node| node.note_twins(mistakes));
                }
            }
        }
    }

    /// The text of a field in a table, for names in messages.
    pub(super) fn peek(&self, name: &str) -> Option<&str> {
        let Value::Table(fields) = &self.value else { return None };
        match &fields.iter().find(|field| field.name == name)?.value.as_ref()?.value {
            Value::Scalar(Json::String(text)) => Some(text),
            _ => None,
        }
    }

    /// The fields of a table whose names are free, with their lines; none for nothing. What is neither is noted under its `name`.
    pub(super) fn entries(self, name: &str, mistakes: &Mistakes) -> Vec<(String, u64, Self)> {
        match self.value {
            Value::Table(fields) => {
                return fields.into_iter().filter_map(|field| Some((field.name, field.line, field.value?))).collect();
            }
            Value::Scalar(Json::Null) => {}
            _ => mistakes.note(self.line, format!("{name} is not a table of fields")),
        }
        Vec::new()
    }

    /// The nodes of a list; none for nothing. What is neither is noted under its `name`.
    pub(super) fn list(self, name: &str, mistakes: &Mistakes) -> Vec<Self> {
        match self.value {
            Value::List(nodes) => return nodes,
            Value::Scalar(Json::Null) => {}
            _ => mistakes.note(self.line, format!("{name} is not a list")),
        }
        Vec::new()
    }

    /// A scalar's text; else the node again.
    pub(super) fn scalar(self) -> Result<String, Self> {
        match self.value {
            Value::Scalar(Json::String(text)) => Ok(text),
            Value::Scalar(scalar @ (Json::Bool(_) | Json::Number(_))) => Ok(scalar.to_string()),
            _ => Err(self),
        }
    }

    /// It as JSON.
    pub(super) fn json(self) -> Json {
        match self.value {
            Value::Scalar(scalar) => scalar,
            Value::List(nodes) => nodes.into_iter().map(Self::json).collect(),
            Value::Table(fields) => {
                let member = |field: Field| Some((field.name, field.value?.json()));
                Json::Object(fields.into_iter().filter_map(member).collect())
            }
        }
    }
}

/// A table whose fields are taken out one by one.
#[derive(Debug)]
pub(super) struct Table<'m> {
    /// What it is, as its mistakes name it: `route 3 (on: a.b)`; nothing for the file itself.
    what: String,
    /// What stands before its fields' names: `retry.`.
    path: String,
    line: u64,
    fields: Vec<Field>,
    known: Vec<&'static str>,
    mistakes: &'m Mistakes,
}

impl<'m> Table<'m> {
    /// The table that a node is; nothing is an empty one. What is none is noted.
    pub(super) fn of(node: Node, what: impl Into<String>, mistakes: &'m Mistakes) -> Option<Self> {
        let (what, line) = (what.into(), node.line);
        let fields = match node.value {
            Value::Table(fields) => fields,
            Value::Scalar(Json::Null) => Vec::new(),
            _ => {
                let what = if what.is_empty() { "the file" } else { &what };
                mistakes.note(line, format!("{what} is not a table of fields"));
                return None;
            }
        };
        Some(Self { what, path: String::new(), line, fields, known: Vec::new(), mistakes })
    }

    /// What it is.
    pub(super) fn what(&self) -> &str {
        &self.what
    }

    /// Where its mistakes are noted.
    pub(super) fn mistakes(&self) -> &'m Mistakes {
        self.mistakes
    }

    /// The line of a field; the table's where the field is not there.
    pub(super) fn line(&self, name: &str) -> u64 {
        self.fields.iter().find(|field| field.name == name).map_or(self.line, |field| field.line)
    }

    /// Notes a mistake of a field, at its line: `'<field>' <problem>`.
    pub(super) fn mistake(&self, name: &str, problem: impl Display) {
        self.note(self.line(name), format!("'{}{name}' {problem}", self.path));
    }

    /// Notes a mistake of the table as a whole.
    pub(super) fn wrong(&self, problem: impl Display) {
        self.note(self.line, problem);
    }

    fn note(&self, line: u64, problem: impl Display) {
        let what = if self.what.is_empty() { String::new() } else { format!("{}: ", self.what) };
        self.mistakes.note(line, format!("{what}{problem}"));
    }

    /// Takes a field as it stands. From here on the table knows it.
    pub(super) fn take(&mut self, name: &'static str) -> Option<Node> {
        self.known.push(name);
        self.fields.iter_mut().find(|field| field.name == name)?.value.take()
    }

    /// Whether a field stands there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.fields.iter().any(|field| field.name == name)
    }

    /// Whether a field is a table itself.
    pub(super) fn is_table(&self, name: &str) -> bool {
        let value = self.fields.iter().find(|field| field.name == name).and_then(|field| field.value.as_ref());
        value.is_some_and(|node| matches!(node.value, Value::Table(_)))
    }

    /// Takes a field that has to be there, as a type.
    pub(super) fn need<T: DeserializeOwned>(&mut self, name: &'static str, what: &str) -> Option<T> {
        if !self.has(name) {
            self.mistake(name, format!("is missing: name {what}"));
        }
        self.get(name, what)
    }

    /// Takes a field as a type; `what` says of what kind it has to be.
    pub(super) fn get<T: DeserializeOwned>(&mut self, name: &'static str, what: &str) -> Option<T> {
        let json = self.take(name)?.json();
        let found = found(&json);
        serde_json::from_value(json).map_err(|_| self.mistake(name, format!("is not {what}: {found}"))).ok()
    }

    /// Takes a number within limits.
    pub(super) fn number(&mut self, name: &'static str, limits: RangeInclusive<u32>) -> Option<u32> {
        let what = format!("a number from {} to {}", limits.start(), limits.end());
        let json = self.take(name)?.json();
        let number =
            json.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| limits.contains(number));
        if number.is_none() {
            self.mistake(
                name,
                match &json {
                    Json::Number(number) => format!("is {number}, not {what}"),
                    other => format!("is not {what}: {}", found(other)),
                },
            );
        }
        number
    }

    /// Takes a duration.
    pub(super) fn time(&mut self, name: &'static str) -> Option<Duration> {
        let text = match self.take(name)?.json() {
            Json::String(text) => text,
            // It is told which unit it lacks.
            Json::Number(number) => number.to_string(),
            other => {
                self.mistake(name, format!("is not a duration such as 10s: {}", found(&other)));
                return None;
            }
        };
        duration(&text).map_err(|error| self.mistake(name, format!("is wrong: {error}"))).ok()
    }

    /// Takes one of some words.
    pub(super) fn word<T: Copy>(&mut self, name: &'static str, words: &[(&str, T)]) -> Option<T> {
        let names = words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
        let text = self.get::<String>(name, &format!("one of: {names}"))?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, meaning)| *meaning);
        if found.is_none() {
            self.mistake(name, format!("is '{text}', not one of: {names}"));
        }
        found
    }

    /// Takes a table inside this one; its fields are named `<name>.<field>`.
    pub(super) fn table(&mut self, name: &'static str) -> Option<Self> {
        let node = self.take(name)?;
        if !matches!(node.value, Value::Table(_) | Value::Scalar(Json::Null)) {
            self.mistake(name, "is not a table of fields");
            return None;
        }
        let inner = Self::of(node, self.what.clone(), self.mistakes)?;
        Some(Self { path: format!("{}{name}.", self.path), ..inner })
    }

    /// Notes every field that nobody asked for.
    pub(super) fn finish(self) {
        for field in self.fields.iter().filter(|field| !self.known.contains(&field.name.as_str())) {
            let near = self.known.iter().map(|known| (distance(&field.name, known), known)).min();
            let hint = match near.filter(|(distance, known)| *distance <= known.len() / 3) {
                Some((_, known)) => format!(", did you mean '{known}'?"),
                None => String::new(),
            };
            let problem =
                format!("'{}{}' is unknown{hint}; known are: {}", self.path, field.name, self.known.join(", "));
            self.note(field.line, problem);
        }
    }
}

/// What stands where something else is wanted, and what may help.
fn found(json: &Json) -> String {
    match json {
        Json::Null => "it is empty".into(),
        Json::Bool(flag) => format!("it is the flag {flag} (in quotes it would be text)"),
        Json::Number(number) => format!("it is the number {number} (in quotes it would be text)"),
        Json::String(text) if text.parse::<f64>().is_ok() => "it is text (without quotes it would be a number)".into(),
        Json::String(_) => "it is text".into(),
        Json::Object(_) => "it is a table of fields".into(),
        Json::Array(items) => match items.iter().position(|item| !item.is_string()) {
            Some(place) => format!("of its list, item {}: {}", place + 1, found(&items[place])),
            None if items.is_empty() => "it is an empty list".into(),
            None => "it is a list of text".into(),
        },
    }
}

/// How many letters are to be changed, added or left out to make one word of another.
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.chars().count()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut before = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in other.chars().enumerate() {
            let changed = before + usize::from(a != b);
            before = row[j + 1];
            row[j + 1] = changed.min(before + 1).min(row[j] + 1);
        }
    }
    row[row.len() - 1]
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Spanned { value, referenced, .. } = Spanned::deserialize(deserializer)?;
        Ok(Self { line: referenced.line(), value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Shape)
    }
}

struct Shape;

impl<'de> Visitor<'de> for Shape {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Scalar(Json::Null))
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Value, E> {
        Ok(Value::Scalar(flag.into()))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Scalar(number.into()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Scalar(number.into()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Value::Scalar(number.into()))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Scalar(text.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = seq.next_element()? {
            nodes.push(node);
        }
        Ok(Value::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Vec::new();
        while let Some((name, value)) = map.next_entry::<Spanned<String>, Node>()? {
            fields.push(Field { name: name.value, line: name.referenced.line(), value: Some(value) });
        }
        Ok(Value::Table(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistakes(text: &str, read: impl FnOnce(&mut Table<'_>)) -> Vec<String> {
        let mistakes = Mistakes::default();
        if let Some(mut table) = Node::read(text, &mistakes).and_then(|node| Table::of(node, "", &mistakes)) {
            read(&mut table);
            table.finish();
        }
        mistakes.list("f")
    }

    #[test]
    fn fields_are_read_as_they_stand_and_mistakes_know_their_lines() {
        let text = "on: 'yes'\nsize: 7\n\ninner:\n  wait: 5s\n  kind: soft\nlist: [a, b]\n";
        let found = mistakes(text, |table| {
            assert_eq!(table.get::<String>("on", "text").as_deref(), Some("yes"));
            assert_eq!(table.number("size", 1..=7), Some(7));
            let mut inner = table.table("inner").expect("a table");
            assert_eq!(inner.time("wait"), Some(Duration::from_secs(5)));
            assert_eq!(inner.word("kind", &[("hard", 1), ("soft", 2)]), Some(2));
            inner.finish();
            assert_eq!(table.get::<Vec<String>>("list", "a list").expect("a list"), ["a", "b"]);
            assert_eq!(table.take("absent").map(|node| node.line), None);
        });
        assert!(found.is_empty(), "{found:?}");
        let wrong = "on: yes\nsize: 8\ninner:\n  wait: long\n  kind: 5\n  knid: 1\nlist: {}\nlits: 1\nsize: 9\n";
        let found = mistakes(wrong, |table| {
            assert_eq!(table.get::<String>("on", "text").as_deref(), Some("yes"), "no word is a flag in disguise");
            assert_eq!(table.number("size", 1..=7), None);
            let mut inner = table.table("inner").expect("a table");
            assert!(inner.time("wait").is_none() && inner.word("kind", &[("hard", ()), ("soft", ())]).is_none());
            inner.finish();
            assert!(table.get::<Vec<String>>("list", "a list").is_none());
            assert!(table.need::<String>("absent", "a word").is_none());
        });
        for (found, wanted) in found.iter().zip([
            "f:1: 'absent' is missing: name a word",
            "f:2: 'size' is 8, not a number from 1 to 7",
            "f:4: 'inner.wait' is wrong: ",
            "f:5: 'inner.kind' is not one of: hard, soft",
            "f:6: 'inner.knid' is unknown; known are: wait, kind",
            "f:7: 'list' is not a list",
            "f:8: 'lits' is unknown; known are: on, size, inner, list, absent",
            "f:9: 'size' stands in line 2 already",
        ]) {
            assert!(found.starts_with(wanted), "{found} is not {wanted}");
        }
        assert_eq!(found.len(), 8);
    }

    #[test]
    fn what_is_no_yaml_or_no_table_is_one_mistake_with_its_line() {
        for (text, wanted) in [
            ("a: 1\nb: [1,\n", "f:2: this is not YAML: "),
            ("a: 1\n  b: 2\n", "f:2: this is not YAML: "),
            ("a: *nobody\n", "f:1: this is not YAML: "),
            ("\n- a\n", "f:2: the file is not a table of fields"),
        ] {
            let found = mistakes(text, |_| {});
            assert!(found.len() == 1 && found[0].starts_with(wanted), "{text}: {found:?}");
        }
        assert!(mistakes("", |_| {}).is_empty(), "nothing is an empty file");
    }

    #[test]
    fn a_merged_table_gives_way_to_what_stands_beside_it() {
        let text = "base: &base {wait: 1s, size: 1}\nuse:\n  <<: *base\n  size: 2\n";
        let found = mistakes(text, |table| {
            table.take("base");
            let mut merged = table.table("use").expect("a table");
            assert_eq!((merged.number("size", 0..=9), merged.time("wait")), (Some(2), Some(Duration::from_secs(1))));
            merged.finish();
        });
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn an_unknown_name_is_told_what_it_may_have_meant() {
        let found = mistakes("retri: 1\nprocesses: 2\n", |table| {
            table.take("retry");
            table.take("processs");
        });
        assert_eq!(found[0], "f:1: 'retri' is unknown, did you mean 'retry'?; known are: retry, processs");
        assert!(found[1].contains("did you mean 'processs'?"), "{found:?}");
        assert_eq!([distance("", "abc"), distance("abc", "abc"), distance("kitten", "sitting")], [3, 0, 3]);
    }
}
