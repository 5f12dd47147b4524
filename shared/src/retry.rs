//! When to try again, when to stop, and which delay queue the wait is spent in.
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Why a handler did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Trying again may help; the handler may ask for a wait.
    Transient {
        /// At least this long (`Retry-After`).
        after: Option<Duration>,
    },
    /// Trying again cannot help.
    Permanent,
}

/// What to do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Try again after the wait.
    Retry(Duration),
    /// Dead-letter the event.
    GiveUp,
}

/// Exponential back-off with full jitter and a bound on attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Attempts allowed, the first included.
    pub attempts: u32,
    /// Longest wait after the first failure; doubles with each.
    pub backoff: Duration,
    /// Longest wait of all.
    pub max: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self { attempts: 8, backoff: Duration::from_secs(1), max: Duration::from_secs(600) }
    }
}

/// No wait that a handler asks for is longer.
pub const LONGEST: Duration = Duration::from_secs(24 * 3600);

impl Policy {
    /// Judges a failed attempt, counted from 1. `chance` in 0..1 is the jitter.
    #[must_use]
    pub fn judge(&self, attempt: u32, failure: Failure, chance: f64) -> Verdict {
        match failure {
            Failure::Transient { after } if attempt < self.attempts => {
                let jittered = self.ceiling(attempt).mul_f64(chance.clamp(0.0, 1.0));
                Verdict::Retry(jittered.max(after.unwrap_or_default()).min(LONGEST))
            }
            _ => Verdict::GiveUp,
        }
    }

    /// The longest wait after the given attempt.
    #[must_use]
    pub fn ceiling(&self, attempt: u32) -> Duration {
        let factor = 2_u32.saturating_pow(attempt.saturating_sub(1));
        self.backoff.checked_mul(factor).map_or(self.max, |wait| wait.min(self.max))
    }

    /// The longest time that all attempts and waits together can take.
    #[must_use]
    pub fn longest(&self, timeout: Duration) -> Duration {
        let mut total = timeout.saturating_mul(self.attempts);
        for attempt in 1..self.attempts.min(10_000) {
            total = total.saturating_add(self.ceiling(attempt));
        }
        total
    }
}

/// A delay queue: one fixed TTL each, because only the head of a queue expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its name in the queue's name.
    pub name: &'static str,
    /// Its TTL.
    pub ttl: Duration,
}

/// The ladder of delays, shortest first.
pub const LADDER: [Step; 6] = [
    Step { name: "1s", ttl: Duration::from_secs(1) },
    Step { name: "5s", ttl: Duration::from_secs(5) },
    Step { name: "30s", ttl: Duration::from_secs(30) },
    Step { name: "2m", ttl: Duration::from_secs(120) },
    Step { name: "10m", ttl: Duration::from_secs(600) },
    Step { name: "1h", ttl: Duration::from_secs(3600) },
];

impl Step {
    /// Where a wait is spent next, and what is left of it then. A wait may overshoot by a fifth to save hops; what is left
    /// after a step hops again.
    #[must_use]
    pub fn toward(remaining: Duration) -> (Self, Duration) {
        let fits = |step: &&Self| step.ttl.mul_f64(0.8) <= remaining;
        let step = *LADDER.iter().rev().find(fits).unwrap_or(&LADDER[0]);
        (step, remaining.saturating_sub(step.ttl))
    }
}

/// What is left of a wait that is over: less than half the shortest step.
pub const DUE: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn waits_stay_within_the_policy(attempt in 1_u32..200, chance in 0.0..1.0_f64, backoff in 1_u64..100_000, max in 1_u64..10_000_000) {
            let policy = Policy { attempts: 100, backoff: Duration::from_millis(backoff), max: Duration::from_millis(max) };
            match policy.judge(attempt, Failure::Transient { after: None }, chance) {
                Verdict::Retry(wait) => {
                    prop_assert!(attempt < 100);
                    prop_assert!(wait <= policy.max);
                }
                Verdict::GiveUp => prop_assert!(attempt >= 100),
            }
        }

        #[test]
        fn the_ladder_ends_near_the_wish_in_few_hops(wish in 1_u64..86_400_000) {
            let wish = Duration::from_millis(wish);
            let (mut waited, mut hops, mut remaining) = (Duration::ZERO, 0, wish);
            while remaining > DUE || hops == 0 {
                let (step, left) = Step::toward(remaining);
                (waited, remaining) = (waited + step.ttl, left);
                hops += 1;
            }
            prop_assert!(waited.as_secs_f64() <= wish.as_secs_f64() * 1.25 + 1.0, "{waited:?} for {wish:?}");
            prop_assert!(waited + DUE >= wish, "too early");
            prop_assert!(hops <= 45, "{hops} hops for {wish:?}");
        }
    }

    #[test]
    fn a_permanent_failure_and_the_last_attempt_end_it() {
        let policy = Policy::default();
        assert_eq!(policy.judge(1, Failure::Permanent, 0.5), Verdict::GiveUp);
        assert_eq!(policy.judge(8, Failure::Transient { after: None }, 0.5), Verdict::GiveUp);
    }

    #[test]
    fn a_handler_may_ask_for_a_longer_wait_but_not_for_ever() {
        let ask = |after| Policy::default().judge(1, Failure::Transient { after: Some(after) }, 0.0);
        assert_eq!(ask(Duration::from_secs(90)), Verdict::Retry(Duration::from_secs(90)));
        assert_eq!(ask(Duration::MAX), Verdict::Retry(LONGEST));
    }
}
