//! How fast the programs' own timers run.
use std::time::Duration;

/// The length of a timer inside of a program. Debug builds multiply it with `WARREN_TEST_PACE`, where a test has set that: 0.2 is
/// five times as fast. Timers that rest on one another come here together, so that the shorter one stays the shorter. Release builds
/// do not read it.
#[must_use]
pub fn paced(length: Duration) -> Duration {
    #[cfg(debug_assertions)]
    return length.mul_f64(*PACE);
    #[cfg(not(debug_assertions))]
    length
}

#[cfg(debug_assertions)]
static PACE: std::sync::LazyLock<f64> = std::sync::LazyLock::new(|| {
    let set = std::env::var("WARREN_TEST_PACE").ok().and_then(|pace| pace.parse().ok());
    set.filter(|pace| (0.01..=1.0).contains(pace)).unwrap_or(1.0)
});
