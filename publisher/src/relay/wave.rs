//! One turn of the relay: rows that were taken go out in waves in which each key stands once.
use super::Relay;
use super::desk::{Desk, RelayError};
use super::row::{Row, Sent};
use crate::publish::{Outcome, Refused};
use std::collections::{HashSet, VecDeque};
use std::time::Duration;
use tokio::time::Instant;
use warren_shared::Message;

/// How long a relay that is told to stop waits for the answers to its last wave.
const GRACE: Duration = Duration::from_secs(10);

/// How often the server hears of a relay that waits for the broker.
const TOUCH: Duration = Duration::from_secs(5);

/// How often it is said that keys are held: each is tried for itself.
const QUIET: Duration = Duration::from_secs(10);

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Every row that was taken has its outcome, or its key is held.
    Through,
    /// The broker takes nothing of anybody: it has no bus, or does not let us write to it.
    Paused,
}

impl Ended {
    pub(super) fn is_paused(self) -> bool {
        self == Self::Paused
    }
}

pub(super) struct Waves<'a> {
    relay: &'a mut Relay,
    desk: &'a Desk,
    /// Rows that were not published yet, in order.
    waiting: VecDeque<(Place, Message)>,
    /// Rows that the broker has and the table does not know of.
    sent: Vec<Sent>,
}

/// Which row it is.
struct Place {
    id: i64,
    key: String,
}

/// What an outcome asks for.
enum Verdict {
    Sent(Sent),
    Refused(String),
    /// Only this key waits.
    Held,
    /// All wait.
    Paused(String),
}

impl<'a> Waves<'a> {
    pub(super) fn new(relay: &'a mut Relay, desk: &'a Desk) -> Self {
        Self { relay, desk, waiting: VecDeque::new(), sent: Vec::new() }
    }

    pub(super) async fn publish(mut self, rows: Vec<Row>) -> Result<Ended, RelayError> {
        let mut refused = Vec::new();
        for Row { id, key, message, .. } in rows {
            match message {
                Ok(message) => self.waiting.push_back((Place { id, key }, message)),
                Err(error) => refused.push((Place { id, key }, error.to_string())),
            }
        }
        self.refuse(refused).await?;
        let mut ended = Ended::Through;
        while ended == Ended::Through && !self.relay.is_stopped() {
            let (places, messages) = self.next();
            if places.is_empty() {
                break;
            }
            // The rows of the last wave are marked while this one is on its way: their keys go on since they are confirmed.
            let sent = std::mem::take(&mut self.sent);
            let (outcomes, marked) = tokio::join!(self.outcomes(messages), self.desk.mark(sent));
            ended = self.settle(places, outcomes).await?;
            self.relay.unmarked.extend(marked?);
        }
        self.relay.unmarked.extend(self.desk.mark(self.sent).await?);
        Ok(ended)
    }

    /// The first row of each key.
    fn next(&mut self) -> (Vec<Place>, Vec<Message>) {
        let (mut wave, mut rest, mut keys) = ((Vec::new(), Vec::new()), VecDeque::new(), HashSet::new());
        for (place, message) in self.waiting.drain(..) {
            if keys.insert(place.key.clone()) {
                wave.0.push(place);
                wave.1.push(message);
            } else {
                rest.push_back((place, message));
            }
        }
        self.waiting = rest;
        wave
    }

    /// The outcomes; fewer if it was told to stop and the broker does not answer.
    async fn outcomes(&self, messages: Vec<Message>) -> Vec<Outcome> {
        let mut stop = self.relay.stop.clone();
        let stopped = async {
            let _ = stop.wait_for(|stop| *stop).await;
            tokio::time::sleep(GRACE).await;
        };
        // A broker may be away for long: the lock is kept meanwhile. If it is lost, marking will find out.
        let living = async {
            loop {
                tokio::time::sleep(TOUCH).await;
                let _ = self.desk.touch().await;
            }
        };
        tokio::select! {
            biased;
            outcomes = self.relay.publisher.publish_all(messages) => outcomes,
            never = living => never,
            () = stopped => {
                tracing::warn!("stopped before the broker had answered: these rows will be published again");
                Vec::new()
            }
        }
    }

    async fn settle(&mut self, places: Vec<Place>, outcomes: Vec<Outcome>) -> Result<Ended, RelayError> {
        let (mut refused, mut held, mut ended) = (Vec::new(), HashSet::new(), Ended::Through);
        for (place, outcome) in places.into_iter().zip(outcomes) {
            match verdict(place.id, outcome) {
                Verdict::Sent(sent) => {
                    self.relay.account.published += 1;
                    self.relay.holds.release(&place.key);
                    self.sent.push(sent);
                }
                Verdict::Refused(error) => {
                    self.relay.holds.release(&place.key);
                    refused.push((place, error));
                }
                Verdict::Held => {
                    self.relay.holds.hold(&place.key, Instant::now());
                    held.insert(place.key);
                }
                Verdict::Paused(said) => {
                    if ended == Ended::Through {
                        tracing::error!(said, "the broker lets nothing onto the bus, trying again");
                    }
                    ended = Ended::Paused;
                }
            }
        }
        if !held.is_empty() {
            if self.relay.warned.is_none_or(|at| at.elapsed() > QUIET) {
                self.relay.warned = Some(Instant::now());
                tracing::warn!("the broker does not take the next row of some keys, trying again");
            }
            // What follows under these keys waits with them, in the table.
            self.waiting.retain(|(place, _)| !held.contains(&place.key));
        }
        self.refuse(refused).await?;
        Ok(ended)
    }

    /// Notes why rows cannot be published, before later rows of their keys go out. Where a row is locked, its key waits.
    async fn refuse(&mut self, refused: Vec<(Place, String)>) -> Result<(), RelayError> {
        let (places, notes): (Vec<Place>, Vec<_>) = refused
            .into_iter()
            .map(|(place, error)| {
                let note = (place.id, error);
                (place, note)
            })
            .unzip();
        let locked = self.desk.refuse(&notes).await?;
        let mut held = HashSet::new();
        for Place { id: row, key } in places {
            if locked.contains(&row) {
                self.relay.holds.hold(&key, Instant::now());
                held.insert(key);
            } else {
                tracing::warn!(row, "a row cannot be published: its column 'error' says why");
                self.relay.account.refused += 1;
            }
        }
        if !held.is_empty() {
            self.waiting.retain(|(place, _)| !held.contains(&place.key));
        }
        Ok(())
    }
}

fn verdict(id: i64, outcome: Outcome) -> Verdict {
    match outcome {
        Ok(proof) => Verdict::Sent(Sent::new(id, proof)),
        Err(Refused::Rejected | Refused::Unknown) => Verdict::Held,
        Err(refused) if refused.is_of_the_exchange() => Verdict::Paused(refused.to_string()),
        Err(refused) => Verdict::Refused(refused.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_broker_says_of_all_is_no_fault_of_a_row() {
        let forbidden = |said: &str| verdict(1, Err(Refused::Forbidden(said.into())));
        let missing = "NOT_FOUND - no exchange 'warren.events' in vhost '/'";
        assert!(matches!(forbidden(missing), Verdict::Paused(_)));
        let closed = "ACCESS_REFUSED - access to exchange 'warren.events' in vhost '/' refused for user 'a'";
        assert!(matches!(forbidden(closed), Verdict::Paused(_)));
        let topic =
            "ACCESS_REFUSED - access to topic 'a.b' in exchange 'warren.events' in vhost '/' refused for user 'a'";
        assert!(matches!(forbidden(topic), Verdict::Refused(_)));
        let large = "PRECONDITION_FAILED - message size 9 is larger than configured max size 8";
        assert!(matches!(forbidden(large), Verdict::Refused(_)));
        assert!(matches!(verdict(1, Err(Refused::Rejected)), Verdict::Held));
    }
}
