//! A row of the outbox, and what is published for it: exactly what `send` publishes for the same attributes.
use crate::outbox::COLUMNS;
use crate::publish::Confirmed;
use serde_json::Value as Json;
use tokio_postgres::Error;
use warren_shared::event::{Event, Limits, Unreadable, Value};
use warren_shared::number::canonical;
use warren_shared::topology::BUS;
use warren_shared::{Message, lane};

/// A row that waits.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) id: i64,
    /// What order is kept for.
    pub(super) key: String,
    /// The last transaction that locked it, where there was one; [`super::desk::Desk::take`] leaves only those that still do.
    pub(super) holder: Option<String>,
    /// What is published, or why it cannot be.
    pub(super) message: Result<Message, Unreadable>,
}

/// A row that the broker has: there is no other way to mark one.
#[must_use]
pub(super) struct Sent {
    id: i64,
    _proof: Confirmed,
}

impl Sent {
    pub(super) fn new(id: i64, proof: Confirmed) -> Self {
        Self { id, _proof: proof }
    }

    pub(super) fn id(&self) -> i64 {
        self.id
    }
}

/// The columns as they are.
struct Columns {
    event_id: String,
    source: String,
    kind: String,
    key: Option<String>,
    lane: Option<String>,
    subject: Option<String>,
    time: Option<String>,
    content_type: Option<String>,
    traceparent: Option<String>,
    extensions: Option<String>,
    size: i32,
    body: Option<Vec<u8>>,
}

impl Row {
    /// Reads what [`super::desk::Desk::take`] selects.
    ///
    /// # Errors
    /// A column has another type than it should.
    pub(super) fn read(row: &tokio_postgres::Row, limits: Limits) -> Result<Self, Error> {
        let columns = Columns {
            event_id: row.try_get("event_id")?,
            source: row.try_get("source")?,
            kind: row.try_get("type")?,
            key: row.try_get("key")?,
            lane: row.try_get("lane")?,
            subject: row.try_get("subject")?,
            time: row.try_get("time")?,
            content_type: row.try_get("content_type")?,
            traceparent: row.try_get("traceparent")?,
            extensions: row.try_get("extensions")?,
            size: row.try_get("size")?,
            body: row.try_get("body")?,
        };
        let key = columns.key.as_ref().or(columns.subject.as_ref()).unwrap_or(&columns.event_id).clone();
        let holder = row.try_get("holder")?;
        Ok(Self { id: row.try_get("id")?, key, holder, message: columns.message(limits) })
    }
}

impl Columns {
    fn message(self, limits: Limits) -> Result<Message, Unreadable> {
        let lane = self.lane.clone();
        if let Some(lane) = lane.as_deref().filter(|lane| !lane::is_name(lane)) {
            let lane: String = lane.chars().filter(|c| !c.is_control()).take(32).collect();
            return Err(wrong("lane", format!("is '{lane}', which is not a name of a-z, 0-9 and -, at most 32 long")));
        }
        let event = self.event(limits)?;
        Ok(Message::to_lane(&event, BUS, lane.as_deref()))
    }

    fn event(self, limits: Limits) -> Result<Event, Unreadable> {
        let mut event = Event::new(self.event_id, self.source, self.kind)?;
        let time = self.time.as_deref().map(shortened);
        let plain = [
            ("partitionkey", self.key),
            ("subject", self.subject),
            ("time", time),
            ("datacontenttype", self.content_type),
            ("traceparent", self.traceparent),
        ];
        for (name, value) in plain {
            if let Some(value) = value {
                event = event.with(name, Value::Text(value))?;
            }
        }
        for (name, value) in extensions(self.extensions.as_deref())? {
            if let Some((_, column)) = COLUMNS.iter().find(|(own, _)| *own == name) {
                return Err(wrong("extensions", format!("hold '{name}', which has a column of its own ({column})")));
            }
            let value = match value {
                Json::Null => continue,
                Json::Bool(flag) => Value::Bool(flag),
                Json::String(text) => Value::Text(text),
                Json::Number(number) => match whole(&number) {
                    Some(int) => Value::Int(int),
                    None => return Err(wrong("extensions", "hold a number that is not a whole one of 64 bits".into())),
                },
                Json::Array(_) | Json::Object(_) => {
                    return Err(wrong("extensions", "hold a list or an object, attributes are plain values".into()));
                }
            };
            event = event.with(&name, value)?;
        }
        match (self.body, usize::try_from(self.size).unwrap_or_default()) {
            (Some(body), _) => event.with_body(&body, limits),
            (None, 0) => Ok(event),
            (None, size) => Err(Unreadable::TooLarge { size, limit: limits.body }),
        }
    }
}

/// `2.0` is a whole number, too.
fn whole(number: &serde_json::Number) -> Option<i64> {
    canonical(&number.to_string())?.parse().ok()
}

fn extensions(text: Option<&str>) -> Result<serde_json::Map<String, Json>, Unreadable> {
    match text.map(serde_json::from_str) {
        None | Some(Ok(Json::Null)) => Ok(serde_json::Map::new()),
        Some(Ok(Json::Object(members))) => Ok(members),
        Some(_) => Err(wrong("extensions", "are not a JSON object".into())),
    }
}

/// PostgreSQL's microseconds, without zeros that say nothing.
fn shortened(time: &str) -> String {
    match time.strip_suffix('Z').and_then(|time| time.split_once('.')) {
        Some((second, fraction)) => {
            let fraction = fraction.trim_end_matches('0');
            format!("{second}{}{fraction}Z", if fraction.is_empty() { "" } else { "." })
        }
        None => time.to_owned(),
    }
}

fn wrong(name: &str, problem: String) -> Unreadable {
    Unreadable::Attribute { name: name.into(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warren_shared::wire::LANE;

    fn columns() -> Columns {
        Columns {
            event_id: "1".into(),
            source: "/shop".into(),
            kind: "order.placed".into(),
            key: Some("c7".into()),
            lane: None,
            subject: None,
            time: Some("2024-05-01T10:00:00.120000Z".into()),
            content_type: Some("application/json".into()),
            traceparent: None,
            extensions: Some(r#"{"sequence": "7", "priority": 8, "dry": true, "none": null}"#.into()),
            size: 2,
            body: Some(b"{}".to_vec()),
        }
    }

    #[test]
    fn a_row_is_published_as_send_would() {
        let line = br#"{"specversion":"1.0","id":"1","source":"/shop","type":"order.placed","partitionkey":"c7",
            "time":"2024-05-01T10:00:00.12Z","datacontenttype":"application/json","sequence":"7","priority":8,"dry":true,"data":{}}"#;
        let event = Event::from_json(line, Limits::default()).expect("an event");
        let mut sent = Message::write(&event, BUS);
        sent.set(LANE, "high");
        assert_eq!(columns().message(Limits::default()), Ok(sent));
    }

    #[test]
    fn what_can_never_be_an_event_says_why() {
        type Change = fn(&mut Columns);
        let said = |change: Change| {
            let mut columns = columns();
            change(&mut columns);
            columns.message(Limits { body: 10, depth: 3 }).map_err(|e| e.to_string()).expect_err("refused")
        };
        let rows: [(&str, Change); 10] = [
            ("'type' is empty", |c| c.kind = String::new()),
            ("'lane' is 'Very High'", |c| c.lane = Some("Very High".into())),
            ("not valid JSON", |c| c.body = Some(b"{".to_vec())),
            ("has 99 bytes, the limit is 10", |c| (c.body, c.size) = (None, 99)),
            ("column of its own (key)", |c| c.extensions = Some(r#"{"partitionkey":"x"}"#.into())),
            ("column of its own (none", |c| c.extensions = Some(r#"{"specversion":"2"}"#.into())),
            ("plain values", |c| c.extensions = Some(r#"{"a":[1]}"#.into())),
            ("whole one", |c| c.extensions = Some(r#"{"a":1.5}"#.into())),
            ("not a JSON object", |c| c.extensions = Some("[]".into())),
            ("RFC 3339", |c| c.time = Some("10000-01-01T00:00:00.000000Z".into())),
        ];
        for (wanted, change) in rows {
            let said = said(change);
            assert!(said.contains(wanted), "{said} instead of {wanted}");
        }
    }
}
