//! Dead letters: what could not be handled, with the reason, in headers that a person can read.
use crate::event::Value;
use crate::event::{Event, HEADERS};
use crate::wire::{Foreign, Header, LANE, Message, REPLAYED};

/// Why an event died. The words in `reason` are stable: filters, metrics and runbooks rest on them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// A word: `no-route`, `permanent`, `exhausted`, `crash`, or why it could not be read.
    pub reason: &'static str,
    /// A sentence for a person.
    pub error: String,
    /// Attempts made.
    pub attempts: u32,
    /// The handler, by its route's pattern; empty where none was asked.
    pub handler: String,
}

/// Where and when it died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scene {
    /// The worker's id.
    pub worker: String,
    /// RFC 3339.
    pub at: String,
}

/// An error's text is cut here: it is a header, not a log.
const ERROR_LIMIT: usize = 1024;

/// Why it died, in a word.
const REASON: &str = "warren-dead-reason";
/// The word for an outgoing message that the broker will never take: a replay sends it to where it was to go.
pub const UNSENDABLE: &str = "unsendable";

/// All headers of a dead letter begin so.
pub const PREFIX: &str = "warren-dead-";

/// The exchange that a message was published to which is no event.
pub const EXCHANGE: &str = "warren-dead-exchange";

/// The dead letter of an event.
#[must_use]
pub fn of_event(event: &Event, replayed: u32, lane: &str, cause: &Cause, scene: &Scene, exchange: &str) -> Message {
    let mut message = Message::write(event, exchange);
    message.set(LANE, lane);
    if replayed > 0 {
        message.set(REPLAYED, replayed);
    }
    mark(&mut message, cause, scene);
    message
}

/// The dead letter of a message that is no event: as it came.
#[must_use]
pub fn of_message(mut message: Message, cause: &Cause, scene: &Scene, exchange: &str) -> Message {
    message.strip();
    let weight = |(name, header): &(String, Header)| name.len() + header.weight();
    if message.headers.iter().map(weight).sum::<usize>() > HEADERS {
        // The marks of its death must fit into the frame; its body stays whole.
        message.headers.clear();
    }
    let from = std::mem::replace(&mut message.exchange, exchange.into());
    mark(&mut message, cause, scene);
    message.set(EXCHANGE, from);
    message
}

/// The exchange that a letter's message was published to: as noted here or, where the broker let it die itself, as noted there.
fn origin(letter: &Message) -> Option<String> {
    let noted = [EXCHANGE, "x-last-death-exchange", "x-first-death-exchange"];
    noted.iter().find_map(|name| letter.header(name)).map(Value::to_string)
}

/// A letter as its message came: from the exchange that it was published to, not from that of the dead letters. A message
/// that names no source of its own has its exchange for one, and so a part of its identity.
pub fn recall(letter: &mut Message) {
    if let Some(exchange) = origin(letter) {
        letter.exchange = exchange;
    }
}

/// The letter brought back to life: the message as it was, under the identity that it had, its replay counted. What was on its way out
/// goes where it was to go, all else to the pool's door.
#[must_use]
pub fn revive(mut letter: Message, door: &str) -> Message {
    let unsent = matches!(letter.header(REASON), Some(Value::Text(reason)) if reason == UNSENDABLE);
    let exchange = origin(&letter).filter(|exchange| unsent && exchange.starts_with("warren."));
    let exchange = exchange.unwrap_or_else(|| door.to_owned());
    let replays = letter.number(REPLAYED).unwrap_or(0).saturating_add(1);
    if origin(&letter).is_some() {
        recall(&mut letter);
        letter.keep_source();
    }
    letter.strip();
    letter.headers.retain(|(name, _)| !name.starts_with(PREFIX));
    letter.set(REPLAYED, i64::try_from(replays).unwrap_or(i64::MAX));
    letter.exchange = exchange;
    letter
}

fn mark(message: &mut Message, cause: &Cause, scene: &Scene) {
    // The broker acts on these: it would drop the letter in time, or refuse it. For people they are kept all the same.
    let foreign = message.foreign.take();
    if let Some(Foreign { expiration, user_id, .. }) = foreign.as_deref() {
        for (name, value) in [("warren-dead-expiration", expiration), ("warren-dead-user-id", user_id)] {
            if let Some(value) = value {
                message.set(name, value.as_str());
            }
        }
    }
    message.foreign = foreign;
    let mut end = cause.error.len().min(ERROR_LIMIT);
    while !cause.error.is_char_boundary(end) {
        end -= 1;
    }
    message.set(REASON, cause.reason);
    message.set("warren-dead-error", &cause.error[..end]);
    message.set("warren-dead-attempts", cause.attempts);
    message.set("warren-dead-handler", cause.handler.as_str());
    message.set("warren-dead-worker", scene.worker.as_str());
    message.set("warren-dead-at", scene.at.as_str());
}
