//! The ack ledger: turns completions in any order into the fewest acks.
//!
//! Law: a tag is acked once, only after it was settled, and `multiple` never covers a tag that is not settled. A
//! delivery that is stuck holds nobody: what settled behind it is acked alone once it has waited one flush.
use std::collections::BTreeMap;

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
    /// Settled, and left over by a flush before.
    Waiting,
}

/// The tags of one channel that are not acked.
#[derive(Debug, Default)]
pub struct Ledger {
    entries: BTreeMap<u64, Entry>,
    settled: usize,
}

impl Ledger {
    /// The broker handed over this tag.
    pub fn open(&mut self, tag: u64) {
        self.entries.insert(tag, Entry::Open);
    }

    /// The tag may be acked. Settling twice, or a tag of no delivery, changes nothing.
    pub fn settle(&mut self, tag: u64) {
        if let Some(entry @ Entry::Open) = self.entries.get_mut(&tag) {
            *entry = Entry::Settled;
            self.settled += 1;
        }
    }

    /// Deliveries that are not settled.
    #[must_use]
    pub fn unsettled(&self) -> usize {
        self.entries.len() - self.settled
    }

    /// Whether something settled waits for an ack: flush again soon.
    #[must_use]
    pub fn wants_flush(&self) -> bool {
        self.settled > 0
    }

    /// The acks to send now.
    pub fn flush(&mut self) -> Vec<Ack> {
        let mut acks = Vec::new();
        if self.settled == 0 {
            return acks;
        }
        let mut prefix = None;
        while let Some(first) = self.entries.first_entry() {
            if *first.get() == Entry::Open {
                break;
            }
            prefix = Some(*first.key());
            first.remove();
            self.settled -= 1;
        }
        acks.extend(prefix.map(|tag| Ack { tag, span: Span::UpTo }));
        if self.settled > 0 {
            self.entries.retain(|tag, entry| match entry {
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

    proptest! {
        #[test]
        fn acks_all_and_only_what_is_settled(order in Just((1_u64..120).collect::<Vec<_>>()).prop_shuffle(), flushes in prop::collection::vec(any::<bool>(), 119), stuck in 1_u64..120) {
            let mut ledger = Ledger::default();
            let mut unacked: BTreeSet<u64> = (1..120).collect();
            let mut settled = BTreeSet::new();
            unacked.iter().for_each(|tag| ledger.open(*tag));
            for (tag, flush) in order.into_iter().zip(flushes) {
                if tag == stuck {
                    continue;
                }
                ledger.settle(tag);
                ledger.settle(tag);
                settled.insert(tag);
                if flush {
                    ledger.flush().into_iter().for_each(|ack| apply(&mut unacked, &settled, ack));
                }
            }
            for _ in 0..2 {
                ledger.flush().into_iter().for_each(|ack| apply(&mut unacked, &settled, ack));
            }
            prop_assert_eq!(unacked, BTreeSet::from([stuck]));
            prop_assert!(!ledger.wants_flush());
            prop_assert_eq!(ledger.unsettled(), 1);
            ledger.settle(stuck);
            prop_assert_eq!(ledger.flush(), vec![Ack { tag: stuck, span: Span::UpTo }]);
        }
    }

    #[test]
    fn a_run_in_order_costs_one_ack() {
        let mut ledger = Ledger::default();
        (1..=256).for_each(|tag| ledger.open(tag));
        (1..=256).rev().for_each(|tag| ledger.settle(tag));
        assert_eq!(ledger.flush(), vec![Ack { tag: 256, span: Span::UpTo }]);
    }
}
