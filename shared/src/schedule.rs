//! Who runs next: one at a time per key, lanes by weight, the oldest effective urgency first inside a lane.
//!
//! Law: items of one key leave in the order in which they came, and none leaves while another of its key is out.
//! Every lane with something ready gets its share (stride scheduling); urgency ages, so nothing waits for ever.
use rustc_hash::FxHashMap;
use std::collections::{BinaryHeap, VecDeque};
use std::hash::Hash;

/// What a step of priority is worth, in milliseconds of waiting.
const PRIORITY_MS: u64 = 10_000;
/// Shares are fractions of this.
const SCALE: u64 = 1 << 20;

/// An item that may run now, or after others of its key.
#[derive(Debug)]
struct Item<T> {
    lane: usize,
    /// Less is more urgent: arrival time, later by what each step of priority that it lacks is worth.
    urgency: u64,
    value: T,
}

/// The items of a key. Most keys have one at a time, which needs no queue.
#[derive(Debug)]
struct Key<T> {
    out: bool,
    head: Option<Item<T>>,
    rest: VecDeque<Item<T>>,
}

impl<T> Key<T> {
    fn push(&mut self, item: Item<T>) {
        if self.head.is_none() { self.head = Some(item) } else { self.rest.push_back(item) }
    }

    fn pop(&mut self) -> Option<Item<T>> {
        let item = self.head.take()?;
        self.head = self.rest.pop_front();
        Some(item)
    }
}

/// A key at the head of its lane's queue; least is first.
type Ready<K> = std::cmp::Reverse<(u64, u64, K)>;

#[derive(Debug)]
struct Lane<K> {
    stride: u64,
    pass: u64,
    ready: BinaryHeap<Ready<K>>,
}

/// The items that wait, by key and lane.
#[derive(Debug)]
pub struct Schedule<K, T> {
    /// Callers choose the keys' values by a hash that nobody outside can steer.
    keys: FxHashMap<K, Key<T>>,
    lanes: Vec<Lane<K>>,
    /// Breaks ties between items of one millisecond in the order of arrival.
    sequence: u64,
    waiting: usize,
}

impl<K: Hash + Eq + Ord + Clone, T> Schedule<K, T> {
    /// A schedule for lanes of these weights.
    pub fn new(weights: impl IntoIterator<Item = u32>) -> Self {
        let lane = |weight: u32| Lane { stride: SCALE / u64::from(weight.max(1)), pass: 0, ready: BinaryHeap::new() };
        Self { keys: FxHashMap::default(), lanes: weights.into_iter().map(lane).collect(), sequence: 0, waiting: 0 }
    }

    /// Items that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Adds an item behind all others of its key. `now` is in milliseconds, from any origin.
    pub fn push(&mut self, key: K, lane: usize, priority: u8, now: u64, value: T) {
        let urgency = now.saturating_add(u64::from(u8::MAX - priority) * PRIORITY_MS);
        self.waiting += 1;
        let fresh = || Key { out: false, head: None, rest: VecDeque::new() };
        let entry = self.keys.entry(key.clone()).or_insert_with(fresh);
        let ready = !entry.out && entry.head.is_none();
        entry.push(Item { lane, urgency, value });
        if ready {
            self.offer(key, lane, urgency);
        }
    }

    /// Takes the next item; its key stays out until [`Schedule::finish`].
    pub fn take(&mut self) -> Option<(K, T)> {
        loop {
            let lane = (0..self.lanes.len())
                .filter(|i| !self.lanes[*i].ready.is_empty())
                .min_by_key(|i| self.lanes[*i].pass)?;
            let floor = self.lanes[lane].pass;
            let Some(std::cmp::Reverse((_, _, key))) = self.lanes[lane].ready.pop() else { continue };
            let Some(entry) = self.keys.get_mut(&key) else { continue };
            // A key that was emptied, or whose head changed lanes, left a stale place behind.
            if entry.out || entry.head.as_ref().is_none_or(|item| item.lane != lane) {
                continue;
            }
            let Some(item) = entry.pop() else { continue };
            entry.out = true;
            self.waiting -= 1;
            self.lanes[lane].pass += self.lanes[lane].stride;
            // A lane that was idle must not save up its share.
            for other in self.lanes.iter_mut().filter(|other| other.ready.is_empty()) {
                other.pass = other.pass.max(floor);
            }
            return Some((key, item.value));
        }
    }

    /// The key's item is done with; the next of its key may run.
    pub fn finish(&mut self, key: &K) {
        let Some(entry) = self.keys.get_mut(key) else { return };
        entry.out = false;
        match &entry.head {
            None => {
                self.keys.remove(key);
            }
            Some(item) => {
                let (lane, urgency) = (item.lane, item.urgency);
                self.offer(key.clone(), lane, urgency);
            }
        }
    }

    /// Drops the waiting items that `drop` names; those that are out stay out. Returns what was dropped.
    pub fn discard(&mut self, mut drop: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut dropped = Vec::new();
        let mut moved = Vec::new();
        self.keys.retain(|key, entry| {
            let before = dropped.len();
            for item in entry.head.take().into_iter().chain(std::mem::take(&mut entry.rest)) {
                if drop(&item.value) { dropped.push(item.value) } else { entry.push(item) }
            }
            if let Some(head) = &entry.head
                && !entry.out
                && dropped.len() > before
            {
                moved.push((key.clone(), head.lane, head.urgency));
            }
            entry.out || entry.head.is_some()
        });
        self.waiting -= dropped.len();
        for (key, lane, urgency) in moved {
            self.offer(key, lane, urgency);
        }
        dropped
    }

    fn offer(&mut self, key: K, lane: usize, urgency: u64) {
        self.sequence += 1;
        self.lanes[lane].ready.push(std::cmp::Reverse((urgency, self.sequence, key)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[derive(Clone, Debug)]
    enum Step {
        Push { key: u8, lane: usize, priority: u8 },
        Take,
        Finish(prop::sample::Index),
        Discard { parity: u64 },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0_u8..6, 0_usize..3, 0_u8..3).prop_map(|(key, lane, priority)| Step::Push { key, lane, priority }),
            3 => Just(Step::Take),
            3 => any::<prop::sample::Index>().prop_map(Step::Finish),
            1 => (0_u64..2).prop_map(|parity| Step::Discard { parity }),
        ];
        prop::collection::vec(step, 1..200)
    }

    proptest! {
        #[test]
        fn one_at_a_time_per_key_in_order_and_none_forgotten(steps in steps()) {
            let mut schedule = Schedule::new([6, 3, 1]);
            let (mut now, mut out, mut last) = (0, Vec::new(), HashMap::new());
            let mut inside = std::collections::BTreeSet::new();
            for step in steps {
                now += 1;
                match step {
                    Step::Push { key, lane, priority } => {
                        schedule.push(key, lane, priority, now, now);
                        inside.insert(now);
                    }
                    Step::Take => if let Some((key, value)) = schedule.take() {
                        prop_assert!(!out.contains(&key), "two of one key");
                        prop_assert!(last.insert(key, value).is_none_or(|before| before < value), "out of order");
                        prop_assert!(inside.remove(&value));
                        out.push(key);
                    },
                    Step::Finish(index) => if !out.is_empty() {
                        let key = out.swap_remove(index.index(out.len()));
                        schedule.finish(&key);
                    },
                    Step::Discard { parity } => for value in schedule.discard(|v| v % 2 == parity) {
                        prop_assert!(inside.remove(&value));
                    },
                }
                prop_assert_eq!(schedule.waiting(), inside.len());
            }
            for key in out.drain(..) {
                schedule.finish(&key);
            }
            while let Some((key, value)) = schedule.take() {
                prop_assert!(inside.remove(&value));
                schedule.finish(&key);
            }
            prop_assert!(inside.is_empty(), "forgotten: {inside:?}");
        }
    }

    #[test]
    fn every_lane_gets_its_share_and_an_idle_one_saves_nothing_up() {
        let mut schedule = Schedule::new([6, 3, 1]);
        for i in 0..3000_u64 {
            schedule.push(i, 1, 0, i, 1_usize);
        }
        for _ in 0..1000 {
            schedule.take();
        }
        for i in 10_000..20_000_u64 {
            schedule.push(i, 0, 0, i, 0);
            schedule.push(i + 100_000, 2, 0, i, 2);
        }
        let mut counts = [0; 3];
        for _ in 0..1000 {
            counts[schedule.take().expect("full").1] += 1;
        }
        assert!((595..=605).contains(&counts[0]) && (95..=105).contains(&counts[2]), "{counts:?}");
    }

    #[test]
    fn urgency_ages() {
        let mut schedule = Schedule::new([1]);
        schedule.push(1, 0, 0, 0, "old");
        schedule.push(2, 0, 1, 11_000, "urgent, much later");
        schedule.push(3, 0, 1, 9_000, "urgent");
        let order: Vec<_> = std::iter::from_fn(|| schedule.take()).map(|(_, v)| v).collect();
        assert_eq!(order, ["urgent", "old", "urgent, much later"]);
    }
}
