//! Keys whose next row the broker does not take for now: the others go on meanwhile.
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// The pauses of a key: at first, doubling up to the last.
const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

/// Which keys are held, and until when.
#[derive(Debug, Default)]
pub(super) struct Holds(HashMap<String, Hold>);

#[derive(Debug)]
struct Hold {
    pause: Duration,
    until: Instant,
}

impl Holds {
    /// Holds a key, longer each time until it is released.
    pub(super) fn hold(&mut self, key: &str, now: Instant) {
        let pause = self.0.get(key).map_or(PAUSES[0], |hold| (hold.pause * 2).min(PAUSES[1]));
        self.0.insert(key.to_owned(), Hold { pause, until: now + pause });
    }

    /// A row of this key has its outcome.
    pub(super) fn release(&mut self, key: &str) {
        self.0.remove(key);
    }

    /// All keys that are held.
    pub(super) fn keys(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    /// Those of them that may be tried again.
    pub(super) fn due(&self, now: Instant) -> Vec<String> {
        self.0.iter().filter(|(_, hold)| hold.until <= now).map(|(key, _)| key.clone()).collect()
    }

    /// When the first key may be tried again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.values().map(|hold| hold.until).min()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_held_longer_each_time_until_a_row_of_it_goes() {
        let (mut holds, now) = (Holds::default(), Instant::now());
        for millis in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            holds.hold("k", now);
            assert_eq!(holds.next(), Some(now + Duration::from_millis(millis)));
        }
        assert_eq!((holds.keys().len(), holds.due(now).len()), (1, 0));
        assert_eq!(holds.due(now + PAUSES[1]), ["k"]);
        holds.release("k");
        assert!(holds.is_empty());
    }
}
