//! The outbox of an upstream system: a table in its own PostgreSQL, which it fills in its own transactions and which
//! `warren-publisher relay` empties. Here is the table, and the way into it for Rust; `docs/outbox.md` has it for SQL.
use crate::Publisher;
use std::fmt;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Error, GenericClient};
use warren_shared::event::{Data, Event, Value};

/// What every relay listens to, whatever its table is called.
pub const CHANNEL: &str = "warren_outbox";

/// Attributes with a column of their own.
pub(crate) const COLUMNS: [(&str, &str); 10] = [
    ("specversion", "none: it is always 1.0"),
    ("id", "event_id"),
    ("source", "source"),
    ("type", "type"),
    ("subject", "subject"),
    ("time", "time"),
    ("datacontenttype", "content_type"),
    ("data", "data"),
    ("partitionkey", "key"),
    ("traceparent", "traceparent"),
];

/// The table's name, written as in SQL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    schema: Option<String>,
    name: String,
}

impl Default for Table {
    fn default() -> Self {
        Self { schema: None, name: "warren_outbox".into() }
    }
}

/// PostgreSQL cuts names after 63 bytes; those of index and function are longer than the table's.
const LONGEST: usize = 48;

impl Table {
    /// Reads `name` or `schema.name`: as PostgreSQL keeps it, without quotes, upper and lower case told apart.
    ///
    /// # Errors
    /// Says what a name is.
    pub fn parse(text: &str) -> Result<Self, String> {
        let legal = |part: &str| !part.is_empty() && part.len() <= LONGEST && !part.contains(['.', '"', '\0']);
        let (schema, name) = match text.split_once('.') {
            Some((schema, name)) => (Some(schema), name),
            None => (None, text),
        };
        if legal(name) && schema.is_none_or(legal) {
            Ok(Self { schema: schema.map(str::to_owned), name: name.into() })
        } else {
            Err(format!("'{text}' is not name or schema.name, unquoted, of at most {LONGEST} bytes each"))
        }
    }

    /// What makes the table, with its indexes and its trigger.
    #[must_use]
    pub fn ddl(&self) -> String {
        let of = |suffix: &str| Self { name: format!("{}{suffix}", self.name), ..self.clone() };
        // An index lies in its table's schema, and takes no other.
        let index = |suffix| Self { schema: None, ..of(suffix) };
        include_str!("outbox.sql")
            .replace("{function}", &of("_notify").to_string())
            .replace("{unsent}", &index("_unsent").to_string())
            .replace("{sent}", &index("_sent").to_string())
            .replace("{trigger}", &index("_notify").to_string())
            .replace("{channel}", CHANNEL)
            .replace("{table}", &self.to_string())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No key word of SQL looks like ours, and the printed DDL is easier to read.
        let plain =
            |part: &str| part.starts_with("warren_") && part.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        let mut part = |part: &str| if plain(part) { f.write_str(part) } else { write!(f, "\"{part}\"") };
        if let Some(schema) = &self.schema {
            part(schema)?;
            f.write_str(".")?;
        }
        let mut part = |part: &str| if plain(part) { f.write_str(part) } else { write!(f, "\"{part}\"") };
        part(&self.name)
    }
}

impl Publisher {
    /// Puts an event into the table `warren_outbox` of this transaction: it is published once that commits, and never if
    /// it does not. `warren-publisher relay` has to run somewhere.
    ///
    /// Its time is kept to the microsecond; an event without one gets the transaction's.
    ///
    /// # Errors
    /// What PostgreSQL says; the transaction is to be rolled back.
    pub async fn enqueue<C: GenericClient>(tx: &C, event: &Event) -> Result<(), Error> {
        Self::enqueue_into(tx, &Table::default(), event).await
    }

    /// The same with a table of another name.
    ///
    /// # Errors
    /// What PostgreSQL says; the transaction is to be rolled back.
    pub async fn enqueue_into<C: GenericClient>(tx: &C, table: &Table, event: &Event) -> Result<(), Error> {
        let sql = format!(
            "INSERT INTO {table} (event_id, source, type, key, subject, time, content_type, data, data_bytes, \
             traceparent, extensions) VALUES ($1, $2, $3, $4, $5, coalesce($6::text::timestamptz, now()), $7, \
             $8::text::json, $9, $10, $11::text::jsonb)"
        );
        let text = |name: &str| event.extension(name).map(Value::to_string);
        let (json, bytes) = match event.data() {
            Some(Data::Json(json)) => (Some(json.get()), None),
            Some(other) => (None, Some(other.as_bytes())),
            None => (None, None),
        };
        // One round trip, and nothing prepared that a pooler would lose.
        let parameters: [(&(dyn ToSql + Sync), Type); 11] = [
            (&event.id(), Type::TEXT),
            (&event.source(), Type::TEXT),
            (&event.kind(), Type::TEXT),
            (&text("partitionkey"), Type::TEXT),
            (&event.subject(), Type::TEXT),
            (&event.time(), Type::TEXT),
            (&event.content_type(), Type::TEXT),
            (&json, Type::TEXT),
            (&bytes, Type::BYTEA),
            (&text("traceparent"), Type::TEXT),
            (&extensions(event), Type::TEXT),
        ];
        tx.execute_typed(&sql, &parameters).await.map(|_| ())
    }
}

/// The attributes that have no column, as a JSON object.
fn extensions(event: &Event) -> Option<String> {
    let others = event.extensions().filter(|(name, _)| COLUMNS.iter().all(|(own, _)| own != name));
    let mut all: serde_json::Map<_, _> =
        others.map(|(name, value)| (name.to_owned(), serde_json::json!(value))).collect();
    if let Some(schema) = event.schema() {
        all.insert("dataschema".into(), schema.into());
    }
    (!all.is_empty()).then(|| serde_json::Value::Object(all).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_quotes() {
        let shown = |text| Table::parse(text).map(|table| table.to_string());
        assert_eq!(shown("warren_outbox").as_deref(), Ok("warren_outbox"));
        assert_eq!(shown("app.Order outbox").as_deref(), Ok("\"app\".\"Order outbox\""));
        for wrong in ["", ".", "a.", ".b", "a.b.c", "a\"; DROP TABLE b; --", &"x".repeat(49)] {
            assert!(shown(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_table_of_the_documentation_is_the_one_that_is_made() {
        let page = include_str!("../../docs/outbox.md");
        assert!(
            page.contains(&Table::default().ddl()),
            "docs/outbox.md shows what 'relay --ddl' prints:\n{}",
            Table::default().ddl()
        );
        let other = Table::parse("app.outbox").expect("a name").ddl();
        let left = ["{table}", "{function}", "{trigger}", "{unsent}", "{sent}", "{channel}", "warren_outbox "];
        assert!(left.iter().all(|name| !other.contains(name)), "{other}");
    }
}
