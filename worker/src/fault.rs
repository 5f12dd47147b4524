//! Points where a test kills the process, to prove that nothing depends on what comes after.
//!
//! `WARREN_TEST_CRASH=after-commit:3` kills the process (SIGKILL) the third time it comes to that point. Release builds hold none
//! of it.

/// Dies here if a test wants it.
#[inline]
pub(crate) fn point(name: &str) {
    #[cfg(debug_assertions)]
    armed::point(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicI64, Ordering};

    static PLAN: LazyLock<Option<(String, AtomicI64)>> = LazyLock::new(|| {
        let plan = std::env::var("WARREN_TEST_CRASH").ok()?;
        let (name, count) = plan.split_once(':').unwrap_or((&plan, "1"));
        Some((name.to_owned(), AtomicI64::new(count.parse().ok()?)))
    });

    pub(super) fn point(name: &str) {
        if let Some((wanted, left)) = &*PLAN
            && wanted == name
            && left.fetch_sub(1, Ordering::SeqCst) == 1
            && let Some(pid) = rustix::process::Pid::from_raw(std::process::id().cast_signed())
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            // The signal arrives before the next instruction that matters, or not: wait for it.
            std::thread::park();
        }
    }
}
