//! What comes and goes through the loop, for Little's law: how many are here, how many work, and for how long.
use std::time::Instant;
use warren_shared::load::Count;

/// How many deliveries are where.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Level {
    /// In this worker.
    pub(super) present: usize,
    /// At a place for handlers.
    pub(super) active: usize,
    /// Waiting for one.
    pub(super) waiting: usize,
}

#[derive(Debug)]
pub(super) struct Tide {
    started: Instant,
    last: Instant,
    level: Level,
    count: Count,
}

impl Tide {
    pub(super) fn new(started: Instant) -> Self {
        Self { started, last: started, level: Level::default(), count: Count::default() }
    }

    /// After a turn of the loop: until now it was as the last turn left it.
    pub(super) fn flow(&mut self, level: Level) {
        let now = Instant::now();
        let seconds = now.duration_since(self.last).as_secs_f64();
        self.count.presence += self.level.present as f64 * seconds;
        self.count.busy += self.level.active as f64 * seconds;
        self.count.idle += if self.level.waiting == 0 { seconds } else { 0.0 };
        (self.last, self.level) = (now, level);
    }

    /// A place for handlers is free again.
    pub(super) fn called(&mut self) {
        self.count.calls += 1;
    }

    /// A delivery that came then has left.
    pub(super) fn left(&mut self, came: Instant) {
        self.count.left += 1;
        self.count.stays += came.elapsed().as_secs_f64();
    }

    /// What was counted up to now; the backlog is for others to add.
    pub(super) fn count(&mut self) -> Count {
        self.flow(self.level);
        Count { at: self.last.duration_since(self.started).as_secs_f64(), ..self.count }
    }
}
