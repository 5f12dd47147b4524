//! The places of routes that are not to run many calls at once (`concurrency`).
//!
//! An event of a full route waits here, not among those that wait for one of the worker's places: a slow route takes neither
//! places nor turns from the others. Who waits for one route comes out as from the schedule: lanes by weight, the most
//! urgent first. A place is held from the question to the store until the call has ended for good, also while a key
//! waits in place for its next attempt.
use warren_shared::schedule::Schedule;

/// Who waits: the key's hash and the job.
pub(super) type Waiting = (u64, u64);

struct Room {
    places: usize,
    taken: usize,
    waiting: Schedule<u64, Waiting>,
}

/// One room for each route that has a limit.
pub(super) struct Places {
    /// By the routes' places in the table.
    rooms: Vec<Option<Room>>,
}

/// How urgent somebody is who waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Urgency {
    pub(super) lane: usize,
    pub(super) priority: u8,
    /// When it came, in milliseconds from any origin.
    pub(super) since: u64,
}

impl Places {
    /// For routes with these limits, and lanes of these weights.
    pub(super) fn new(limits: impl Iterator<Item = Option<usize>>, weights: &[u32]) -> Self {
        let room = |places| Room { places, taken: 0, waiting: Schedule::new(weights.iter().copied()) };
        Self { rooms: limits.map(|limit| limit.map(room)).collect() }
    }

    fn room(&mut self, route: Option<usize>) -> Option<&mut Room> {
        self.rooms.get_mut(route?)?.as_mut()
    }

    /// Takes a place of a route; one without a limit always has one.
    #[must_use]
    pub(super) fn take(&mut self, route: Option<usize>) -> bool {
        let Some(room) = self.room(route) else { return true };
        // Nobody overtakes those who wait.
        let free = room.taken < room.places && room.waiting.waiting() == 0;
        room.taken += usize::from(free);
        free
    }

    /// Waits for a place of a route.
    pub(super) fn wait(&mut self, route: Option<usize>, urgency: Urgency, who: Waiting) {
        if let Some(room) = self.room(route) {
            // Each is a key of its own: the worker's schedule has let one of its key out.
            room.waiting.push(who.1, urgency.lane, urgency.priority, urgency.since, who);
        }
    }

    /// Somebody who waited and has a place now.
    pub(super) fn next(&mut self) -> Option<Waiting> {
        for room in self.rooms.iter_mut().flatten().filter(|room| room.taken < room.places) {
            if let Some((key, who)) = room.waiting.take() {
                room.waiting.finish(&key);
                room.taken += 1;
                return Some(who);
            }
        }
        None
    }

    /// Gives a place back.
    pub(super) fn leave(&mut self, route: Option<usize>) {
        if let Some(room) = self.room(route) {
            room.taken = room.taken.saturating_sub(1);
        }
    }

    /// Sends those away who wait and whom `which` names.
    pub(super) fn discard(&mut self, mut which: impl FnMut(u64) -> bool) -> Vec<Waiting> {
        let rooms = self.rooms.iter_mut().flatten();
        rooms.flat_map(|room| room.waiting.discard(|(_, job)| which(*job))).collect()
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.rooms.iter().flatten().map(|room| room.waiting.waiting()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Urgency = Urgency { lane: 0, priority: 0, since: 0 };

    fn places() -> Places {
        Places::new([None, Some(2), Some(1)].into_iter(), &[6, 1])
    }

    #[test]
    fn a_full_route_holds_nobody_else_up() {
        let mut places = places();
        assert!(places.take(Some(1)) && places.take(Some(1)) && !places.take(Some(1)));
        places.wait(Some(1), NOW, (7, 70));
        assert!(places.take(Some(2)) && (0..100).all(|_| places.take(Some(0)) && places.take(None)));
        assert_eq!((places.next(), places.waiting()), (None, 1));
        places.leave(Some(0));
        places.leave(Some(2));
        assert_eq!(places.next(), None, "another route's place is not its own");
        places.leave(Some(1));
        assert_eq!((places.next(), places.next(), places.waiting()), (Some((7, 70)), None, 0));
    }

    #[test]
    fn nobody_overtakes_those_who_wait_except_the_more_urgent() {
        let mut places = places();
        assert!(places.take(Some(2)));
        for (job, lane, priority) in [(1, 1, 0), (2, 0, 0), (3, 0, 9), (4, 0, 0)] {
            places.wait(Some(2), Urgency { lane, priority, since: job }, (0, job));
        }
        places.leave(Some(2));
        assert!(!places.take(Some(2)), "it is for those who wait");
        let order: Vec<u64> = std::iter::from_fn(|| {
            let next = places.next();
            places.leave(Some(2));
            next.map(|(_, job)| job)
        })
        .collect();
        assert_eq!(order.iter().filter(|job| **job != 1).collect::<Vec<_>>(), [&3, &2, &4], "{order:?}");
        assert_eq!(order.len(), 4);
    }

    #[test]
    fn who_is_sent_away_takes_no_place() {
        let mut places = places();
        assert!(places.take(Some(2)));
        places.wait(Some(2), NOW, (1, 10));
        places.wait(Some(2), NOW, (2, 20));
        assert_eq!(places.discard(|job| job == 10), [(1, 10)]);
        places.leave(Some(2));
        assert_eq!((places.next(), places.next()), (Some((2, 20)), None));
    }
}
