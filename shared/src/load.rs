//! How busy a worker is, by Little's law: what it counted between two moments, and what follows from that.
//!
//! L = λ·W holds for everything that comes and goes, whatever happens in between. A worker measures the three of them apart
//! (how many deliveries were here, how many left, how long those stayed), so that a count that is wrong shows.
use std::collections::VecDeque;

/// What a worker has counted up to a moment. All but `backlog` only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Count {
    /// When, in seconds.
    pub at: f64,
    /// Deliveries that left it: settled, or given back.
    pub left: u64,
    /// Seconds that those stayed, summed.
    pub stays: f64,
    /// Seconds that deliveries were here, summed; those that still are, too.
    pub presence: f64,
    /// Places for handlers that became free again.
    pub calls: u64,
    /// Seconds that such places were held, summed; those that still are, too.
    pub busy: f64,
    /// Seconds in which nothing waited for a place.
    pub idle: f64,
    /// Events in the queues that it serves: ready, and delivered to it.
    pub backlog: u64,
}

/// How busy it is. All times are seconds, all rates are events a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// λ: events that come into its queues.
    pub arrivals: f64,
    /// Events that leave it.
    pub departures: f64,
    /// How long an event holds a place for handlers.
    pub service: f64,
    /// μ: events that it can do. Its places over the service time; where events waited all the time although places were
    /// free, something else is the limit (a key, a core, the store): then it can do what it did.
    pub rate: f64,
    /// W: how long a delivery stays here.
    pub stay: f64,
    /// L: how many are here.
    pub inside: f64,
    /// The part of its places that is taken, 0 to 1.
    pub utilization: f64,
    /// Events in its queues.
    pub backlog: f64,
    /// How long it would work on them: backlog × service time ÷ places.
    pub work: f64,
    /// How many workers like this one its queues call for: for what comes, and to be through with the backlog in the time
    /// that was set. The sum over a pool is the number of its workers.
    pub wanted: f64,
}

/// The last counts of a worker.
#[derive(Clone, Debug)]
pub struct Window {
    counts: VecDeque<Count>,
    /// Places for handlers.
    capacity: f64,
    /// In so many seconds a backlog should be worked off.
    work_off: f64,
    last: Load,
}

/// The load is that of so many seconds.
pub const SPAN: f64 = 30.0;
/// Something waited for this part of the time: always, but for moments.
const ALWAYS: f64 = 0.9;

impl Window {
    /// Of a worker that handles so many events at once, and should be through with a backlog in so many seconds.
    #[must_use]
    pub fn new(capacity: usize, work_off: f64) -> Self {
        Self { counts: VecDeque::new(), capacity: capacity as f64, work_off, last: Load::default() }
    }

    /// Forgets the counts: it serves other queues now.
    pub fn restart(&mut self) {
        self.counts.clear();
    }

    /// Takes in a count, and says what follows; of the first, little does.
    pub fn count(&mut self, now: Count) -> Load {
        while self.counts.len() > 1 && self.counts[1].at <= now.at - SPAN {
            self.counts.pop_front();
        }
        let first = self.counts.front().copied().unwrap_or(now);
        self.counts.push_back(now);
        self.last = self.load(first, now);
        self.last
    }

    fn load(&self, first: Count, now: Count) -> Load {
        let seconds = now.at - first.at;
        let over = |sum: f64, by: f64, otherwise: f64| if by > 0.0 { sum / by } else { otherwise };
        let (left, calls) = ((now.left - first.left) as f64, (now.calls - first.calls) as f64);
        let backlog = now.backlog as f64;
        // Where nothing ended, the last that did tell how long it takes.
        let service = over(now.busy - first.busy, calls, self.last.service);
        let utilization = over((now.busy - first.busy) / self.capacity, seconds, 0.0).min(1.0);
        let waited = 1.0 - over(now.idle - first.idle, seconds, 1.0);
        let rate = if waited > ALWAYS && utilization < ALWAYS && calls > 0.0 {
            calls / seconds
        } else {
            over(self.capacity, service, 0.0)
        };
        let arrivals = over(left + backlog - first.backlog as f64, seconds, 0.0).max(0.0);
        let wanted = if rate > 0.0 {
            (arrivals + backlog / self.work_off) / rate
        } else {
            // Nothing is known of its handlers: itself, if there is anything to do.
            f64::from(u8::from(backlog > 0.0))
        };
        Load {
            arrivals,
            departures: over(left, seconds, 0.0),
            service,
            rate,
            stay: over(now.stays - first.stays, left, 0.0),
            inside: over(now.presence - first.presence, seconds, 0.0),
            utilization,
            backlog,
            work: over(backlog, rate, 0.0),
            wanted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A worker with places for handlers, second by second in small steps: events come evenly and take equally long.
    fn simulate(capacity: usize, per_second: f64, service: f64, seconds: u32) -> (Load, f64) {
        const STEP: f64 = 0.001;
        let mut window = Window::new(capacity, 60.0);
        let (mut count, mut due, mut queue, mut running) = (Count::default(), 0.0, VecDeque::new(), Vec::new());
        let mut load = window.count(count);
        for _ in 0..seconds * 1000 {
            due += per_second * STEP;
            while due >= 1.0 {
                due -= 1.0;
                queue.push_back(count.at);
            }
            let before = running.len();
            running.retain(|(came, ends): &(f64, f64)| {
                let stays = *ends > count.at;
                if !stays {
                    count.left += 1;
                    count.stays += count.at - came;
                }
                stays
            });
            count.calls += (before - running.len()) as u64;
            while running.len() < capacity
                && let Some(came) = queue.pop_front()
            {
                running.push((came, count.at + service));
            }
            count.busy += running.len() as f64 * STEP;
            count.presence += (queue.len() + running.len()) as f64 * STEP;
            count.idle += if queue.is_empty() { STEP } else { 0.0 };
            count.at += STEP;
            count.backlog = (queue.len() + running.len()) as u64;
            if (count.at / 5.0).fract() < STEP / 5.0 {
                load = window.count(count);
            }
        }
        (load, count.at)
    }

    fn near(found: f64, expected: f64) -> bool {
        (found - expected).abs() <= expected * 0.05
    }

    #[test]
    fn a_worker_that_keeps_up() {
        let (load, _) = simulate(8, 50.0, 0.1, 60);
        assert!(near(load.arrivals, 50.0) && near(load.departures, 50.0), "{load:?}");
        assert!(near(load.service, 0.1) && near(load.rate, 80.0), "{load:?}");
        assert!(near(load.utilization, 5.0 / 8.0) && near(load.inside, 5.0), "{load:?}");
        assert!(near(load.inside, load.departures * load.stay), "L = λW: {load:?}");
        assert!(near(load.wanted, 0.625 + load.backlog / 60.0 / 80.0), "{load:?}");
    }

    #[test]
    fn a_worker_that_falls_behind_calls_for_more() {
        let (load, _) = simulate(4, 100.0, 0.1, 60);
        assert!(near(load.arrivals, 100.0) && near(load.departures, 40.0) && near(load.rate, 40.0), "{load:?}");
        assert!(near(load.utilization, 1.0) && load.backlog > 3000.0, "{load:?}");
        assert!(near(load.work, load.backlog * 0.1 / 4.0), "events of 0.1 s on four places: {load:?}");
        assert!(near(load.wanted, (100.0 + load.backlog / 60.0) / 40.0), "{load:?}");
    }

    #[test]
    fn where_places_are_free_and_events_wait_all_the_same_the_pace_is_the_limit() {
        let mut window = Window::new(64, 60.0);
        window.count(Count::default());
        // One hot key: a call after the other, 10 ms each, and 500 wait.
        let load =
            window.count(Count { at: 10.0, left: 1000, calls: 1000, busy: 10.0, backlog: 500, ..Count::default() });
        assert!(near(load.rate, 100.0) && near(load.work, 5.0), "{load:?}");
    }

    #[test]
    fn what_is_not_known_is_not_made_up() {
        let mut window = Window::new(4, 60.0);
        let nothing = Count::default();
        assert_eq!(window.count(nothing), Load::default());
        let load = window.count(Count { at: 5.0, backlog: 100, ..nothing });
        assert_eq!((load.rate, load.work, load.wanted), (0.0, 0.0, 1.0));
        assert!(near(load.arrivals, 20.0), "{load:?}");
        // Long handlers: none ended in this window, the last ones still tell.
        window.count(Count { at: 10.0, left: 1, calls: 1, busy: 8.0, backlog: 100, ..nothing });
        window.restart();
        window.count(Count { at: 40.0, left: 1, calls: 1, busy: 128.0, backlog: 100, ..nothing });
        let load = window.count(Count { at: 45.0, left: 1, calls: 1, busy: 148.0, backlog: 100, ..nothing });
        assert!(near(load.service, 8.0) && near(load.rate, 0.5), "{load:?}");
    }

    proptest! {
        #[test]
        fn nothing_is_negative_and_the_law_holds(capacity in 1_usize..16, rate in 1.0..200.0_f64, service in 0.002..0.3_f64) {
            let (load, _) = simulate(capacity, rate, service, 40);
            let values = [load.arrivals, load.departures, load.service, load.rate, load.stay, load.inside, load.work, load.wanted];
            prop_assert!(values.iter().all(|v| v.is_finite() && *v >= 0.0), "{load:?}");
            prop_assert!((0.0..=1.0).contains(&load.utilization));
            // Where the queue is steady, the three that were measured apart agree.
            if rate * service < capacity as f64 * 0.8 {
                prop_assert!((load.inside - load.departures * load.stay).abs() <= 0.1 * load.inside + 0.05, "{load:?}");
            }
        }
    }
}
