//! The broker's own state during a run: an alarm holds publishers back, whoever they are.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;
use warren_tests::Rabbit;

/// How often it is asked; an alarm lasts for seconds.
const POLL: Duration = Duration::from_millis(500);

/// Whether it is short of memory or disk now. It answers with an error status then.
pub(crate) fn has_alarm(rabbit: &Rabbit) -> bool {
    rabbit.api("GET", "health/checks/alarms", None).is_err()
}

/// Looks for alarms until told to stop.
pub(crate) struct Watch {
    over: Arc<AtomicBool>,
    looking: JoinHandle<bool>,
}

impl Watch {
    pub(crate) fn start(rabbit: Arc<Rabbit>) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let seen = over.clone();
        let looking = std::thread::spawn(move || {
            let mut alarmed = false;
            while !seen.load(Relaxed) && !alarmed {
                alarmed = has_alarm(&rabbit);
                std::thread::park_timeout(POLL);
            }
            alarmed
        });
        Self { over, looking }
    }

    /// Whether there was one.
    pub(crate) fn stop(self) -> bool {
        self.over.store(true, Relaxed);
        self.looking.thread().unpark();
        self.looking.join().unwrap_or(false)
    }
}
