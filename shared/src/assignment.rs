//! Who takes which partition: bounded-load rendezvous hashing, the same answer on every worker that asks.
//!
//! Every worker gets its quota by capacity, exactly: for equal capacities, most and fewest differ by one at most. Each
//! pair of partition and worker has a hash; pairs are served in its order while the worker has room, so a partition
//! moves only where it must (figures in the tests). The standby is whoever would own the partition if its owner were
//! gone: a failover is already the final answer.
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// A worker, as the assignment sees it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Member {
    /// Its name: a restart under the same name gets the same partitions.
    pub name: String,
    /// Tells two runs of one name apart.
    pub run: String,
}

/// Who serves a partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// Takes its events; none where there is no member.
    pub owner: Option<Member>,
    /// Next in line; none where there is only one member.
    pub standby: Option<Member>,
}

/// A seat for each partition. `members` are all that live, with their capacities.
#[must_use]
pub fn assign(partitions: &[String], members: &BTreeMap<Member, u32>) -> Vec<Seat> {
    let crowd = Crowd::new(partitions, members);
    let owners = crowd.owners(None);
    let without: BTreeMap<usize, Vec<Option<usize>>> =
        owners.iter().flatten().collect::<BTreeSet<_>>().into_iter().map(|m| (*m, crowd.owners(Some(*m)))).collect();
    let name = |m: usize| crowd.members[m].0.clone();
    let seat = |(partition, owner): (usize, &Option<usize>)| Seat {
        owner: owner.map(name),
        standby: owner.and_then(|owner| without.get(&owner)?.get(partition).copied().flatten()).map(name),
    };
    owners.iter().enumerate().map(seat).collect()
}

struct Crowd<'a> {
    partitions: usize,
    members: Vec<(&'a Member, u32)>,
    /// (partition, member), the closest first.
    pairs: Vec<(u64, usize, usize)>,
}

impl<'a> Crowd<'a> {
    fn new(partitions: &[String], members: &'a BTreeMap<Member, u32>) -> Self {
        let members: Vec<_> = members.iter().map(|(member, capacity)| (member, *capacity)).collect();
        let mut pairs = Vec::with_capacity(partitions.len() * members.len());
        for (p, partition) in partitions.iter().enumerate() {
            for (m, (member, _)) in members.iter().enumerate() {
                pairs.push((hash(&[partition, &member.name]), p, m));
            }
        }
        // Two runs of one name hash alike; their places in the map decide.
        pairs.sort_unstable();
        Self { partitions: partitions.len(), members, pairs }
    }

    /// Each partition's owner, with one member left out.
    fn owners(&self, gone: Option<usize>) -> Vec<Option<usize>> {
        let mut room = self.quotas(gone);
        let mut owners = vec![None; self.partitions];
        for (_, p, m) in &self.pairs {
            if owners[*p].is_none() && room[*m] > 0 {
                room[*m] -= 1;
                owners[*p] = Some(*m);
            }
        }
        owners
    }

    /// Shares by capacity, what is left over to the largest fractions.
    fn quotas(&self, gone: Option<usize>) -> Vec<usize> {
        let capacity = |m: usize| if Some(m) == gone { 0 } else { u64::from(self.members[m].1.max(1)) };
        let all = (0..self.members.len()).map(capacity).sum::<u64>().max(1);
        let share = |m: usize| self.partitions as u64 * capacity(m);
        let mut quotas: Vec<usize> = (0..self.members.len()).map(|m| (share(m) / all) as usize).collect();
        let mut by_fraction: Vec<usize> = (0..self.members.len()).filter(|m| Some(*m) != gone).collect();
        by_fraction.sort_by_key(|m| (std::cmp::Reverse(share(*m) % all), hash(&[&self.members[*m].0.name]), *m));
        let left = self.partitions - quotas.iter().sum::<usize>();
        by_fraction.into_iter().take(left).for_each(|m| quotas[m] += 1);
        quotas
    }
}

/// Stable over versions and machines: all members must agree, also while a new version is rolled out.
fn hash(parts: &[&str]) -> u64 {
    Uuid::new_v5(&Uuid::NAMESPACE_OID, parts.join("\0").as_bytes()).as_u64_pair().0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn member(name: &str) -> Member {
        Member { name: name.into(), run: "1".into() }
    }

    fn members(numbers: impl IntoIterator<Item = usize>) -> BTreeMap<Member, u32> {
        numbers.into_iter().map(|n| (member(&format!("worker-{n}")), 64)).collect()
    }

    fn partitions(count: usize) -> Vec<String> {
        (0..count).map(|p| format!("warren.orders.normal.p{p:02}")).collect()
    }

    fn loads(seats: &[Seat], members: &BTreeMap<Member, u32>) -> Vec<usize> {
        members.keys().map(|m| seats.iter().filter(|seat| seat.owner.as_ref() == Some(m)).count()).collect()
    }

    fn moved(before: &[Seat], after: &[Seat]) -> usize {
        before.iter().zip(after).filter(|(a, b)| a.owner != b.owner).count()
    }

    /// What must move: the seats of those who left, or what the others have above their new quota.
    fn ideal(before: &[Seat], after: &[Seat], all: &BTreeMap<Member, u32>) -> usize {
        loads(before, all).into_iter().zip(loads(after, all)).map(|(b, a)| b.saturating_sub(a)).sum()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn each_gets_its_quota_and_everybody_computes_the_same(
            count in 1..100_usize,
            capacities in prop::collection::btree_map("[a-z]{1,8}", 1..200_u32, 1..12),
        ) {
            let members: BTreeMap<Member, u32> = capacities.iter().map(|(n, c)| (member(n), *c)).collect();
            let partitions = partitions(count);
            let seats = assign(&partitions, &members);
            prop_assert_eq!(seats.len(), count);
            let all: u64 = members.values().map(|c| u64::from(*c)).sum();
            for (load, capacity) in loads(&seats, &members).into_iter().zip(members.values()) {
                let exact = count as f64 * f64::from(*capacity) / all as f64;
                prop_assert!((load as f64 - exact).abs() < 1.0, "{load} for {exact}");
            }
            for seat in &seats {
                let owner = seat.owner.as_ref();
                prop_assert!(owner.is_some());
                prop_assert_eq!(seat.standby.is_some(), members.len() > 1);
                prop_assert!(seat.standby.as_ref() != owner);
            }
            // The order in which a worker heard of the others, or of the partitions, plays no part.
            let shuffled: Vec<String> = partitions.iter().rev().cloned().collect();
            let mut again = assign(&shuffled, &members.iter().rev().map(|(m, c)| (m.clone(), *c)).collect());
            again.reverse();
            prop_assert_eq!(&again, &seats);
        }

        #[test]
        fn equal_capacities_differ_by_one_at_most(count in 1..200_usize, crowd in 1..24_usize) {
            let members = members(0..crowd);
            let loads = loads(&assign(&partitions(count), &members), &members);
            prop_assert!(loads.iter().max().zip(loads.iter().min()).is_some_and(|(max, min)| max - min <= 1), "{loads:?}");
        }

        #[test]
        fn the_standby_is_who_owns_it_when_the_owner_is_gone(count in 1..60_usize, crowd in 2..10_usize, gone in 0..10_usize) {
            let (partitions, mut members) = (partitions(count), members(0..crowd));
            let before = assign(&partitions, &members);
            let leaver = member(&format!("worker-{}", gone % crowd));
            members.remove(&leaver);
            for (before, after) in before.iter().zip(assign(&partitions, &members)) {
                if before.owner.as_ref() == Some(&leaver) {
                    prop_assert_eq!(&before.standby, &after.owner);
                }
            }
        }

        /// One worker's join or leave moves what it must, and at most as much again as cascades from full to full.
        #[test]
        fn a_join_or_a_leave_moves_little(count in 24..100_usize, crowd in 1..9_usize, gone in 0..9_usize) {
            let (partitions, few) = (partitions(count), members((0..=crowd).filter(|n| *n != gone % (crowd + 1))));
            let many = members(0..=crowd);
            let (a, b) = (assign(&partitions, &few), assign(&partitions, &many));
            let must = ideal(&a, &b, &many).max(ideal(&b, &a, &many));
            prop_assert!(moved(&a, &b) <= 2 * must + 2, "{} moved, {must} had to", moved(&a, &b));
        }
    }

    #[test]
    fn one_three_eight_two_moves_at_most_a_fifth_more_than_it_must() {
        // Names as a StatefulSet gives them, and as a Deployment does.
        for names in 0..20 {
            let crowd = |n: usize| -> BTreeMap<Member, u32> {
                let name = |i| {
                    if names == 0 { format!("worker-{i}") } else { format!("w-{}", hash(&[&format!("{names}/{i}")])) }
                };
                (0..n).map(|i| (member(&name(i)), 64)).collect()
            };
            let (partitions, all) = (partitions(48), crowd(8));
            let steps = [1, 3, 8, 2].map(|n| assign(&partitions, &crowd(n)));
            let (mut sum, mut must) = (0, 0);
            for pair in steps.windows(2) {
                sum += moved(&pair[0], &pair[1]);
                must += ideal(&pair[0], &pair[1], &all);
            }
            assert!(sum * 10 <= must * 12, "{sum} moved, {must} had to");
        }
    }

    #[test]
    fn two_runs_of_one_name_share_what_one_would_have() {
        let mut members = members(0..3);
        members.insert(Member { name: "worker-1".into(), run: "2".into() }, 64);
        let loads = loads(&assign(&partitions(40), &members), &members);
        assert_eq!(loads, [10; 4]);
    }

    #[test]
    fn nobody_is_an_answer() {
        assert_eq!(assign(&partitions(2), &BTreeMap::new()), vec![Seat::default(); 2]);
    }
}
