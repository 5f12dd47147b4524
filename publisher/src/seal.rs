//! Sealed payloads: AES-256-GCM around the data of events, bound to the identity, type and key of each.
//!
//! A sealed body is a nonce of 96 random bits, the ciphertext, and a tag of 16 bytes; the header `warren-key` names the key.
//! Everything else stays as it was, for it routes.
use crate::codec::Unwritable;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use std::sync::Arc;
use warren_shared::seal::{KEY, PayloadKeys, SEAL};
use warren_shared::{Incoming, Limits, Message, Unreadable};

/// What a sealed body has more than its content.
const MORE: usize = NONCE_LEN + 16;

/// What seals and opens payloads; without keys it leaves them as they are.
#[derive(Clone, Default)]
pub struct Seal(Option<Arc<Keys>>);

struct Keys {
    sealing: Option<String>,
    all: Vec<(String, LessSafeKey)>,
    chance: SystemRandom,
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Seal").field(&self.0.as_ref().map(|keys| keys.all.len())).finish()
    }
}

impl Keys {
    fn named(&self, id: &str) -> Option<&LessSafeKey> {
        self.all.iter().find_map(|(other, key)| (other == id).then_some(key))
    }
}

impl Seal {
    /// With these keys.
    #[must_use]
    pub fn new(keys: &PayloadKeys) -> Self {
        let key = |bytes: &[u8; 32]| UnboundKey::new(&AES_256_GCM, bytes).map(LessSafeKey::new);
        // Every 32 bytes are a key.
        let all: Vec<_> = keys.all.iter().filter_map(|(id, bytes)| Some((id.clone(), key(bytes).ok()?))).collect();
        if all.is_empty() {
            return Self(None);
        }
        Self(Some(Arc::new(Keys { sealing: keys.sealing.clone(), all, chance: SystemRandom::new() })))
    }

    /// The limits of events where what this publishes is sealed: the seal must fit into a body, too.
    #[must_use]
    pub fn within(&self, limits: Limits) -> Limits {
        let seals = self.0.as_ref().is_some_and(|keys| keys.sealing.is_some());
        Limits { body: limits.body.saturating_sub(if seals { MORE } else { 0 }), ..limits }
    }

    /// A message as it leaves: the data of an event sealed with the first key, or, where nothing is sealed and it came so,
    /// with the key that it came with. What is sealed already, and what is no event, leaves as it is.
    pub(crate) fn close(&self, message: &Arc<Message>) -> Result<Arc<Message>, Unwritable> {
        let asked = message.header(SEAL).map(ToString::to_string);
        let sealing = self.0.as_ref().and_then(|keys| keys.sealing.clone());
        let Some(id) = sealing.or(asked) else { return Ok(message.clone()) };
        if message.body.is_empty() || message.sealed_with().is_some() || !message.is_binary() {
            return Ok(without_mark(message));
        }
        // What came with unreadable attributes came in plain, and is a dead letter now.
        let Ok(bond) = message.bond() else { return Ok(without_mark(message)) };
        let keys = self.0.as_ref().ok_or(Unwritable::Unsealed("there are no WARREN_PAYLOAD_KEYS"))?;
        // A key that was taken away since is followed by the first.
        let key = keys.all.iter().find(|(other, _)| *other == id).or(keys.all.first());
        let (id, key) = key.ok_or(Unwritable::Unsealed("there is no key"))?;
        let mut nonce = [0; NONCE_LEN];
        keys.chance.fill(&mut nonce).map_err(|_| Unwritable::Unsealed("the system gives no random numbers"))?;
        let mut body = Vec::with_capacity(message.body.len() + MORE);
        body.extend(nonce);
        body.extend(&message.body);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let sealed = key.seal_in_place_separate_tag(nonce, Aad::from(bond), &mut body[NONCE_LEN..]);
        let tag = sealed.map_err(|_| Unwritable::Unsealed("it is too large"))?;
        body.extend(tag.as_ref());
        let mut closed = Message { body, ..message.envelope() };
        closed.headers.retain(|(name, _)| name != SEAL);
        closed.set(KEY, id.as_str());
        Ok(Arc::new(closed))
    }

    /// Reads the event in a message that came, opening its body where that is sealed.
    ///
    /// # Errors
    /// Says why no event can be read from it.
    pub fn open(
        &self,
        envelope: Message,
        body: &[u8],
        limits: Limits,
        fresh_id: impl FnOnce() -> String,
    ) -> Result<Incoming, Unreadable> {
        let (Some(keys), Some(id)) = (&self.0, envelope.sealed_with()) else {
            return envelope.open(body, limits, fresh_id);
        };
        // Without the key, the same words as without any.
        let Some(key) = keys.named(&id) else { return envelope.open(&[], limits, fresh_id) };
        if body.len() > limits.body.saturating_add(MORE) {
            return Err(Unreadable::TooLarge { size: body.len(), limit: limits.body });
        }
        let bond = envelope.bond()?;
        let torn = || {
            let what = format!("it was changed, or belongs to another event than '{}'", excerpt(&envelope));
            Unreadable::Sealed(format!("{what}: its seal does not fit its source, id, type and key"))
        };
        let (nonce, content) = body.split_at_checked(NONCE_LEN).ok_or_else(torn)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| torn())?;
        let mut content = content.to_vec();
        let opened = key.open_in_place(nonce, Aad::from(bond), &mut content).map_err(|_| torn())?;
        let mut envelope = envelope;
        envelope.headers.retain(|(name, _)| name != KEY);
        let incoming = envelope.open(opened, limits, fresh_id)?;
        Ok(Incoming { event: incoming.event.came_sealed(id), ..incoming })
    }
}

fn excerpt(envelope: &Message) -> String {
    envelope.message_id.as_deref().unwrap_or_default().chars().take(64).collect()
}

/// The mark is for us alone.
fn without_mark(message: &Arc<Message>) -> Arc<Message> {
    if message.header(SEAL).is_none() {
        return message.clone();
    }
    let mut plain = Message::clone(message);
    plain.headers.retain(|(name, _)| name != SEAL);
    Arc::new(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;
    use warren_shared::Event;
    use warren_shared::wire::Header;

    const LIMITS: Limits = Limits { body: 1 << 20, depth: 64 };

    fn seal(sealing: Option<&str>, keys: &[(&str, u8)]) -> Seal {
        let all = keys.iter().map(|(id, byte)| ((*id).to_owned(), [*byte; 32])).collect();
        Seal::new(&PayloadKeys { sealing: sealing.map(str::to_owned), all })
    }

    fn message(id: &str, source: &str, kind: &str, key: &str, data: &[u8]) -> Arc<Message> {
        let event = Event::new(id, source, kind).and_then(|e| e.with("partitionkey", key.into()));
        let event = event.and_then(|e| e.with("datacontenttype", "application/octet-stream".into()));
        let event = event.and_then(|e| e.with_body(data, LIMITS)).expect("valid");
        Arc::new(Message::write(&event, "warren.events"))
    }

    fn open(seal: &Seal, message: &Message) -> Result<Vec<u8>, Unreadable> {
        let incoming = seal.open(message.envelope(), &message.body, LIMITS, || unreachable!("it has an id"))?;
        Ok(incoming.event.data().map(|data| data.as_bytes().to_vec()).unwrap_or_default())
    }

    proptest! {
        #[test]
        fn what_is_sealed_is_opened_alike_and_only_as_what_it_was(
            data in prop::collection::vec(any::<u8>(), 1..2000),
            (id, source, kind, key) in ("[a-z0-9]{1,20}", "/[a-z]{1,20}", "[a-z]{1,9}\\.[a-z]{1,9}", "[a-z0-9]{1,20}"),
        ) {
            let seal = seal(Some("a"), &[("a", 1)]);
            let plain = message(&id, &source, &kind, &key, &data);
            let sealed = seal.close(&plain).expect("sealed");
            prop_assert_eq!(sealed.body.len(), data.len() + MORE);
            prop_assert_eq!(open(&seal, &sealed).expect("opened"), data.clone());
            prop_assert_eq!(&sealed.content_type, &plain.content_type);
            // Moved to any other event, it does not open.
            for (n, other) in [
                message(&format!("{id}x"), &source, &kind, &key, &data),
                message(&id, &format!("{source}x"), &kind, &key, &data),
                message(&id, &source, &format!("{kind}x"), &key, &data),
                message(&id, &source, &kind, &format!("{key}x"), &data),
            ].iter().enumerate() {
                let mut moved = Message { body: sealed.body.clone(), ..other.envelope() };
                moved.set(KEY, "a");
                let refused = matches!(open(&seal, &moved), Err(Unreadable::Sealed(_)));
                prop_assert!(refused, "part {} is not bound", n);
            }
            // Nor with any bit of it changed, nor cut short.
            for at in [0, NONCE_LEN, sealed.body.len() / 2, sealed.body.len() - 1] {
                let mut changed = Message::clone(&sealed);
                changed.body[at] ^= 1;
                let refused = matches!(open(&seal, &changed), Err(Unreadable::Sealed(_)));
                prop_assert!(refused, "byte {} may change", at);
            }
            for size in [0, 5, NONCE_LEN, sealed.body.len() - 1] {
                let cut = Message { body: sealed.body[..size].to_vec(), ..sealed.envelope() };
                let refused = matches!(open(&seal, &cut), Err(Unreadable::Sealed(_)));
                prop_assert!(refused, "{} bytes are enough", size);
            }
        }
    }

    #[test]
    fn a_sealed_body_fits_where_the_data_is_within_the_limits() {
        let (limits, keys) = (Limits { body: 100, ..Limits::default() }, [("a", 1)]);
        let (plain, sealing) = (seal(None, &keys), seal(Some("a"), &keys));
        assert_eq!((plain.within(limits).body, sealing.within(limits).body), (100, 72));
        let data = vec![b'x'; 72];
        let sealed = sealing.close(&message("1", "/s", "t", "k", &data)).expect("sealed");
        assert_eq!(sealed.body.len(), 100);
    }

    #[test]
    fn keys_rotate_while_all_of_them_open() {
        let plain = message("1", "/s", "a.b", "k", b"secret");
        let (old, new) = (seal(Some("1"), &[("1", 1)]), seal(Some("2"), &[("2", 2), ("1", 1)]));
        let (by_old, by_new) = (old.close(&plain).expect("sealed"), new.close(&plain).expect("sealed"));
        assert_eq!((by_old.sealed_with().as_deref(), by_new.sealed_with().as_deref()), (Some("1"), Some("2")));
        assert_eq!(open(&new, &by_old).expect("the old one is there"), b"secret");
        assert_eq!(open(&new, &by_new).expect("the new one is there"), b"secret");
        for (seal, message) in [(&old, &by_new), (&Seal::default(), &by_old)] {
            let why = open(seal, message).expect_err("no such key").to_string();
            assert!(why.contains("WARREN_PAYLOAD_KEYS") && !why.contains("secret"), "{why}");
        }
        // Another key under the same name.
        assert!(matches!(open(&seal(Some("1"), &[("1", 9)]), &by_old), Err(Unreadable::Sealed(_))));
        assert_eq!(open(&new, &plain).expect("what is not sealed is taken"), b"secret");
    }

    #[test]
    fn what_came_sealed_never_leaves_in_plain() {
        let plain = message("1", "/s", "a.b", "k", b"secret");
        let sealing = seal(Some("1"), &[("1", 1)]);
        let sealed = sealing.close(&plain).expect("sealed");
        let opening = seal(None, &[("2", 2), ("1", 1)]);
        let came = opening.open(sealed.envelope(), &sealed.body, LIMITS, String::new).expect("opened").event;
        let copy = Arc::new(Message::write(&came, "warren.pool.dead"));
        let again = opening.close(&copy).expect("sealed again");
        assert_eq!(again.sealed_with().as_deref(), Some("1"));
        assert!(again.header(SEAL).is_none() && !again.body.windows(6).any(|bytes| bytes == b"secret"));
        assert_eq!(open(&sealing, &again).expect("the same"), b"secret");
        assert!(matches!(Seal::default().close(&copy), Err(Unwritable::Unsealed(_))), "a row that outlived its keys");
        assert_eq!(opening.close(&plain).expect("as it is"), plain);
        // What is sealed already is not sealed twice.
        assert_eq!(sealing.close(&sealed).expect("as it is"), sealed);
    }

    #[test]
    fn what_is_no_event_in_binary_form_leaves_as_it_is() {
        let seal = seal(Some("1"), &[("1", 1)]);
        let foreign = Message { message_id: Some("1".into()), body: b"{".to_vec(), ..Message::default() };
        let broken = vec![("cloudEvents_specversion".to_owned(), Header::Plain("1.0".into()))];
        let broken = Message { headers: broken, body: b"{".to_vec(), ..Message::default() };
        let empty = Message { body: Vec::new(), ..message("1", "/s", "a.b", "k", b"x").envelope() };
        for message in [foreign, broken, empty].map(Arc::new) {
            assert_eq!(seal.close(&message).expect("as it is"), message);
        }
    }

    #[test]
    fn no_two_nonces_are_alike() {
        let (seal, plain) = (seal(Some("1"), &[("1", 1)]), message("1", "/s", "a.b", "k", b"x"));
        let nonces: HashSet<Vec<u8>> =
            (0..10_000).map(|_| seal.close(&plain).expect("sealed").body[..NONCE_LEN].to_vec()).collect();
        assert_eq!(nonces.len(), 10_000);
    }
}
