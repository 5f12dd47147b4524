//! The store's time: it passes while workers run, as their machines count seconds. What is forgotten by age is forgotten by
//! it: the clock of the day may be set, by a person or by NTP, and an hour's step would make everything an hour older.
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Instant;

/// A worker's view of the store's time. The store keeps the latest one; workers tell it theirs with each beat.
#[derive(Debug)]
pub(super) struct StoreTime {
    opened: Instant,
    /// The store's time then, in milliseconds from an origin of its own.
    then: AtomicI64,
}

impl StoreTime {
    /// From the time that the store has kept.
    pub(super) fn from(kept: i64) -> Self {
        Self { opened: Instant::now(), then: AtomicI64::new(kept) }
    }

    /// The time now, in milliseconds.
    pub(super) fn now(&self) -> i64 {
        self.then.load(Ordering::Relaxed) + self.passed()
    }

    /// Takes in what another worker told the store.
    pub(super) fn hear(&self, kept: i64) {
        self.then.fetch_max(kept - self.passed(), Ordering::Relaxed);
    }

    fn passed(&self) -> i64 {
        i64::try_from(self.opened.elapsed().as_millis()).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_from_what_was_kept_and_never_back() {
        let time = StoreTime::from(1_000);
        assert!((1_000..2_000).contains(&time.now()));
        time.hear(500);
        assert!(time.now() >= 1_000);
        time.hear(60_000);
        assert!((60_000..61_000).contains(&time.now()));
    }
}
