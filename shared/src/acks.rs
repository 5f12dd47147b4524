//! The ack ledger: turns completions in any order into the fewest acks.
//!
//! Law: a tag is acked once, only after it was settled, and `multiple` never covers a tag that is not settled. A
//! delivery that is stuck holds nobody: what settled behind it is acked alone once it has waited one sweep.
use std::collections::VecDeque;

/// One `basic.ack`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// Up to which tag, or which.
    pub tag: u64,
    /// What it covers.
    pub span: Span,
}

/// What an ack covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// The tag alone.
    One,
    /// Every unacked tag up to it.
    UpTo,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Open,
    Settled,
    /// Settled, and left over by a sweep before.
    Waiting,
}

/// An ack is due once it covers this part of the window.
const PART: usize = 4;

/// The tags of one channel that are not acked.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Ascending, mostly without gaps.
    entries: VecDeque<(u64, Entry)>,
    settled: usize,
}

impl Ledger {
    /// The broker handed over this tag. A channel's tags ascend; one that does not is no delivery.
    pub fn open(&mut self, tag: u64) {
        if self.entries.back().is_none_or(|(last, _)| *last < tag) {
            self.entries.push_back((tag, Entry::Open));
        }
    }

    /// The tag may be acked. Settling twice, or a tag of no delivery, changes nothing.
    pub fn settle(&mut self, tag: u64) {
        let place = self.place(tag);
        if let Some((_, entry @ Entry::Open)) = place.and_then(|place| self.entries.get_mut(place)) {
            *entry = Entry::Settled;
            self.settled += 1;
        }
    }

    fn place(&self, tag: u64) -> Option<usize> {
        let (first, _) = self.entries.front()?;
        let guess = usize::try_from(tag.checked_sub(*first)?).ok()?;
        match self.entries.get(guess) {
            Some((found, _)) if *found == tag => Some(guess),
            _ => self.entries.binary_search_by_key(&tag, |(tag, _)| *tag).ok(),
        }
    }

    /// Deliveries that are not settled.
    #[must_use]
    pub fn unsettled(&self) -> usize {
        self.entries.len() - self.settled
    }

    /// The first delivery that is not settled.
    #[must_use]
    pub fn first_unsettled(&self) -> Option<u64> {
        self.entries.iter().find(|(_, entry)| *entry == Entry::Open).map(|(tag, _)| *tag)
    }

    /// Deliveries that are settled and not yet acked.
    #[must_use]
    pub fn unacked(&self) -> usize {
        self.settled
    }

    /// One ack for everything that is settled before the first that is not.
    pub fn flush(&mut self) -> Option<Ack> {
        let mut prefix = None;
        while let Some((tag, _)) = self.entries.front().copied().filter(|(_, entry)| *entry != Entry::Open) {
            prefix = Some(Ack { tag, span: Span::UpTo });
            self.entries.pop_front();
            self.settled -= 1;
        }
        prefix
    }

    /// Whether what is settled is worth an ack, in a window of so many unacked deliveries: each ack is work for the
    /// broker's queue and its replicas. Nothing waits where nothing else is out.
    #[must_use]
    pub fn is_due(&self, window: usize) -> bool {
        self.settled >= window / PART || self.unsettled() == 0
    }

    /// One ack for what is settled in order. Where a stuck delivery keeps most of the window from it, one each.
    pub fn relieve(&mut self, window: usize) -> Vec<Ack> {
        let first = self.flush();
        let crowded = self.settled > window - window / PART;
        first.into_iter().chain(if crowded { self.sweep() } else { Vec::new() }).collect()
    }

    /// What [`Self::flush`] gives, and an ack for each that was left over by the sweep before.
    pub fn sweep(&mut self) -> Vec<Ack> {
        let mut acks = Vec::from_iter(self.flush());
        if self.settled > 0 {
            self.entries.retain_mut(|(tag, entry)| match entry {
                Entry::Open => true,
                Entry::Settled => {
                    *entry = Entry::Waiting;
                    true
                }
                Entry::Waiting => {
                    acks.push(Ack { tag: *tag, span: Span::One });
                    self.settled -= 1;
                    false
                }
            });
        }
        acks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// The broker's side: applies acks to what it knows as unacked.
    fn apply(unacked: &mut BTreeSet<u64>, settled: &BTreeSet<u64>, ack: Ack) {
        let covered: Vec<u64> = match ack.span {
            Span::One => vec![ack.tag],
            Span::UpTo => unacked.range(..=ack.tag).copied().collect(),
        };
        assert!(unacked.contains(&ack.tag), "an unknown tag closes the channel: {ack:?}");
        for tag in covered {
            assert!(settled.contains(&tag), "acked without being settled: {tag}");
            unacked.remove(&tag);
        }
    }

    fn opened(tags: std::ops::RangeInclusive<u64>) -> Ledger {
        let mut ledger = Ledger::default();
        tags.for_each(|tag| ledger.open(tag));
        ledger
    }

    #[test]
    fn an_ack_is_due_for_a_quarter_of_the_window_or_for_all_that_is_out() {
        let mut ledger = opened(1..=100);
        (1..50).for_each(|tag| ledger.settle(tag));
        assert!(!ledger.is_due(200));
        ledger.settle(50);
        assert!(ledger.is_due(200));
        let mut few = opened(1..=3);
        (1..=2).for_each(|tag| few.settle(tag));
        assert!(!few.is_due(200) && few.is_due(3));
        few.settle(3);
        assert!(few.is_due(200));
        assert_eq!(few.relieve(200), [Ack { tag: 3, span: Span::UpTo }]);
    }

    #[test]
    fn the_first_that_is_not_settled_is_the_oldest_one_out() {
        let mut ledger = opened(4..=7);
        assert_eq!(ledger.first_unsettled(), Some(4));
        ledger.settle(5);
        ledger.settle(4);
        assert_eq!(ledger.first_unsettled(), Some(6));
        ledger.flush();
        assert_eq!(ledger.first_unsettled(), Some(6));
        (6..=7).for_each(|tag| ledger.settle(tag));
        assert_eq!(ledger.first_unsettled(), None);
    }

    #[test]
    fn a_stuck_delivery_gives_back_the_window_once_most_of_it_waits_behind() {
        let mut ledger = opened(1..=200);
        (2..=151).for_each(|tag| ledger.settle(tag));
        assert_eq!(ledger.relieve(200), []);
        ledger.settle(152);
        assert_eq!(ledger.relieve(200), [], "the first time they are only marked");
        assert_eq!(ledger.relieve(200).len(), 151);
        assert_eq!((ledger.unacked(), ledger.unsettled()), (0, 49));
    }

    proptest! {
        #[test]
        fn acks_all_and_only_what_is_settled(
            order in Just((1_u64..120).collect::<Vec<_>>()).prop_shuffle(),
            steps in prop::collection::vec(0_u8..3, 119),
            stuck in 1_u64..120,
        ) {
            let mut ledger = Ledger::default();
            let mut unacked: BTreeSet<u64> = (1..120).collect();
            let mut settled = BTreeSet::new();
            unacked.iter().for_each(|tag| ledger.open(*tag));
            for (tag, step) in order.into_iter().zip(steps) {
                if tag == stuck {
                    continue;
                }
                ledger.settle(tag);
                ledger.settle(tag);
                settled.insert(tag);
                let acks = match step {
                    0 => vec![],
                    1 => Vec::from_iter(ledger.flush()),
                    _ => ledger.sweep(),
                };
                acks.into_iter().for_each(|ack| apply(&mut unacked, &settled, ack));
                prop_assert_eq!(ledger.unacked() + ledger.unsettled(), unacked.len());
            }
            for _ in 0..2 {
                ledger.sweep().into_iter().for_each(|ack| apply(&mut unacked, &settled, ack));
            }
            prop_assert_eq!(unacked, BTreeSet::from([stuck]));
            prop_assert_eq!((ledger.unacked(), ledger.unsettled()), (0, 1));
            ledger.settle(stuck);
            prop_assert_eq!(ledger.flush(), Some(Ack { tag: stuck, span: Span::UpTo }));
            prop_assert_eq!(ledger.flush(), None);
        }
    }

    #[test]
    fn a_run_in_order_costs_one_ack() {
        let mut ledger = Ledger::default();
        (1..=256).for_each(|tag| ledger.open(tag));
        (1..=256).rev().for_each(|tag| ledger.settle(tag));
        assert_eq!(ledger.flush(), Some(Ack { tag: 256, span: Span::UpTo }));
        assert_eq!((ledger.unacked(), ledger.unsettled()), (0, 0));
    }

    #[test]
    fn tags_that_were_never_handed_over_are_never_acked() {
        let mut ledger = Ledger::default();
        ledger.settle(1);
        ledger.open(5);
        ledger.open(8);
        ledger.open(7);
        for tag in [4, 6, 7, 8, 9] {
            ledger.settle(tag);
        }
        assert_eq!((ledger.sweep(), ledger.sweep()), (vec![], vec![Ack { tag: 8, span: Span::One }]));
        ledger.settle(5);
        assert_eq!(ledger.flush(), Some(Ack { tag: 5, span: Span::UpTo }));
        ledger.open(9);
        ledger.settle(9);
        assert_eq!(ledger.flush(), Some(Ack { tag: 9, span: Span::UpTo }));
    }
}
