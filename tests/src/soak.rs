//! Tests that give confidence by their length: `make soak` runs them for as long as they were once, `make test` a short twin.

/// How long a test goes on, or how much it does: in `make test`, and in `make soak`, which sets WARREN_TEST_SOAK.
#[must_use]
pub fn length<T>(test: T, soak: T) -> T {
    if std::env::var("WARREN_TEST_SOAK").is_ok_and(|set| set == "1") { soak } else { test }
}
