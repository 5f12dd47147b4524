//! Points where a test kills or stops the process, to prove that nothing depends on what comes after, or when.
//!
//! `WARREN_TEST_CRASH=after-commit:3` kills the process (SIGKILL) the third time it comes to that point, `WARREN_TEST_STOP`
//! stops it there (SIGSTOP). Release builds hold none of it.

/// Dies or stands still here if a test wants it.
#[inline]
pub(crate) fn point(name: &str) {
    #[cfg(debug_assertions)]
    armed::point(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

#[cfg(debug_assertions)]
mod armed {
    use rustix::process::{Pid, Signal, kill_process};
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicI64, Ordering};

    struct Plan {
        name: String,
        left: AtomicI64,
        signal: Signal,
    }

    static PLAN: LazyLock<Option<Plan>> = LazyLock::new(|| {
        let read = |(variable, signal)| {
            let plan = std::env::var(variable).ok()?;
            let (name, count) = plan.split_once(':').unwrap_or((&plan, "1"));
            Some(Plan { name: name.to_owned(), left: AtomicI64::new(count.parse().ok()?), signal })
        };
        [("WARREN_TEST_CRASH", Signal::KILL), ("WARREN_TEST_STOP", Signal::STOP)].into_iter().find_map(read)
    });

    pub(super) fn point(name: &str) {
        if let Some(plan) = &*PLAN
            && plan.name == name
            && plan.left.fetch_sub(1, Ordering::SeqCst) == 1
            && let Some(pid) = Pid::from_raw(std::process::id().cast_signed())
        {
            let _ = kill_process(pid, plan.signal);
            // The signal arrives before the next instruction that matters, or not: wait for it.
            match plan.signal {
                Signal::KILL => std::thread::park(),
                _ => std::thread::sleep(std::time::Duration::from_millis(10)),
            }
        }
    }
}
