//! What a payload is sealed with, and what its seal is bound to. The sealing itself takes chance: `publisher/src/seal.rs`.
use crate::event::{Event, Unreadable};
use crate::wire::Message;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use std::fmt;

/// The header that names the key of a sealed payload.
pub const KEY: &str = "warren-key";
/// The header of a message whose payload must not leave unsealed: the key that it came with. It is never on the wire.
pub const SEAL: &str = "warren-seal";

/// The keys of `WARREN_PAYLOAD_KEYS`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PayloadKeys {
    /// The id of the key that seals; none = what is published is not sealed.
    pub sealing: Option<String>,
    /// Ids and keys that open.
    pub all: Vec<(String, [u8; 32])>,
}

impl fmt::Debug for PayloadKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<&str> = self.all.iter().map(|(id, _)| id.as_str()).collect();
        f.debug_struct("PayloadKeys").field("sealing", &self.sealing).field("all", &ids).finish()
    }
}

/// In place of a first key: nothing is sealed.
const PLAIN: &str = "plain";

impl PayloadKeys {
    /// Reads `id:base64 of 32 bytes`, several by comma or line. The first seals, all open; where the first is the word
    /// `plain`, nothing is sealed, for the time in which not everybody has the keys yet.
    ///
    /// # Errors
    /// What is wrong, by the place in the list; never a part of a key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut keys = Self::default();
        let parts = text.split([',', '\n']).map(str::trim).filter(|part| !part.is_empty());
        for (n, part) in parts.enumerate() {
            let nth = n + 1;
            if n == 0 && part == PLAIN {
                continue;
            }
            let wrong =
                || format!("key {nth} is not of the form id:base64 of 32 bytes (make one: openssl rand -base64 32)");
            let (id, key) = part.split_once(':').ok_or_else(wrong)?;
            let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if id.is_empty() || id.len() > 64 || !id.chars().all(legal) {
                return Err(format!("the id of key {nth} is not 1 to 64 of a-z, A-Z, 0-9, -, _ and ."));
            }
            if keys.all.iter().any(|(other, _)| other == id) {
                return Err(format!("the id of key {nth} stands twice: every key has an id of its own"));
            }
            let bytes = BASE64_STANDARD.decode(key).ok().and_then(|bytes| bytes.try_into().ok()).ok_or_else(wrong)?;
            if n == 0 {
                keys.sealing = Some(id.to_owned());
            }
            keys.all.push((id.to_owned(), bytes));
        }
        Ok(keys)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}

/// What the seal of an event's payload is bound to: its identity, its type and its key. Each part is preceded by its
/// length, so no two events share one.
#[must_use]
pub fn bond(event: &Event) -> Vec<u8> {
    let key = event.key();
    let parts = ["warren 1", event.source(), event.id(), event.kind(), &key];
    let mut bond = Vec::with_capacity(parts.iter().map(|part| 4 + part.len()).sum());
    for part in parts {
        bond.extend(u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
        bond.extend(part.as_bytes());
    }
    bond
}

impl Event {
    /// The same event, whose data came sealed with this key: whatever is written of it is to be sealed again.
    #[must_use]
    pub fn came_sealed(mut self, key: String) -> Self {
        self.edit().sealed = Some(key);
        self
    }
}

impl Message {
    /// The id of the key that its body is sealed with.
    #[must_use]
    pub fn sealed_with(&self) -> Option<String> {
        self.header(KEY).map(ToString::to_string)
    }

    /// Whether it is an event in binary form: what is sealed when it leaves.
    #[must_use]
    pub fn is_binary(&self) -> bool {
        self.header("cloudEvents_specversion").is_some()
    }

    /// What its seal is, or would be, bound to.
    ///
    /// # Errors
    /// Its attributes are not those of an event.
    pub fn bond(&self) -> Result<Vec<u8>, Unreadable> {
        let mut envelope = self.envelope();
        envelope.headers.retain(|(name, _)| name != KEY && name != SEAL);
        let incoming = envelope.open(&[], crate::Limits::default(), String::new)?;
        Ok(bond(&incoming.event))
    }

    /// All but the body.
    #[must_use]
    pub fn envelope(&self) -> Self {
        Self {
            exchange: self.exchange.clone(),
            routing_key: self.routing_key.clone(),
            content_type: self.content_type.clone(),
            message_id: self.message_id.clone(),
            correlation_id: self.correlation_id.clone(),
            app_id: self.app_id.clone(),
            kind: self.kind.clone(),
            timestamp: self.timestamp,
            priority: self.priority,
            foreign: self.foreign.clone(),
            headers: self.headers.clone(),
            body: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> String {
        BASE64_STANDARD.encode([byte; 32])
    }

    #[test]
    fn the_first_key_seals_and_all_open() {
        let keys = PayloadKeys::parse(&format!("new:{}\n\n old:{} \n", key(1), key(2))).expect("valid");
        assert_eq!(keys.sealing.as_deref(), Some("new"));
        assert_eq!(keys.all, [("new".to_owned(), [1; 32]), ("old".to_owned(), [2; 32])]);
        let keys = PayloadKeys::parse(&format!("plain,old:{}", key(2))).expect("valid");
        assert_eq!((keys.sealing, keys.all.len()), (None, 1));
        assert!(PayloadKeys::parse("").expect("none").is_empty());
    }

    #[test]
    fn a_wrong_key_is_told_by_its_place_and_never_shown() {
        let good = key(7);
        let wrong = [
            (good.clone(), "key 1 is not of the form"),
            (format!("a:{good},b:{}", &good[..40]), "key 2 is not of the form"),
            (format!("a:{good},a:{good}"), "key 2 stands twice"),
            (format!("a b:{good}"), "the id of key 1"),
            (format!("a:{good},plain"), "key 2 is not of the form"),
        ];
        for (text, wanted) in wrong {
            let said = PayloadKeys::parse(&text).expect_err(wanted);
            assert!(said.contains(wanted) && !said.contains(&good[..8]), "{said}");
        }
        let keys = PayloadKeys::parse(&format!("a:{good}")).expect("valid");
        assert_eq!(format!("{keys:?}"), r#"PayloadKeys { sealing: Some("a"), all: ["a"] }"#);
    }

    #[test]
    fn a_bond_is_told_apart_in_each_of_its_parts() {
        let event = |source: &str, id: &str, kind: &str, key: &str| {
            let event = Event::new(id, source, kind).and_then(|e| e.with("partitionkey", key.into()));
            bond(&event.expect("valid"))
        };
        let all = [
            event("/s", "1", "a.b", "k"),
            event("/s1", "1", "a.b", "k"),
            event("/", "s1", "a.b", "k"),
            event("/s", "1a", ".b", "k"),
            event("/s", "1", "a.bk", "k"),
            event("/s", "1", "a.b", "l"),
        ];
        for (n, bond) in all.iter().enumerate() {
            assert!(all[n + 1..].iter().all(|other| other != bond), "{n}");
        }
    }
}
