//! Results by group: many events become one, when all are there or the time is over.
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A group of results.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Group {
    /// Its members' ids and data, in the order in which they came; forgotten once it is closed.
    members: Vec<(String, Box<RawValue>)>,
    /// How many it has, once somebody said so.
    size: Option<u64>,
    /// How it was closed.
    closed: Option<Closed>,
}

/// How a group was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Closed {
    /// All members were there.
    Complete,
    /// The time was over.
    Overdue,
}

/// What a member means to its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// More are to come.
    Waits,
    /// It was the last one.
    Closes,
    /// It was here before.
    Known,
    /// The group is closed.
    Late(Closed),
    /// It says another size than the group has.
    Misfit {
        /// What it says.
        said: u64,
        /// What the others said, or how many there are already.
        known: u64,
    },
}

impl Group {
    /// Takes a member; its data is what the group's event holds of it. Of what was taken before nothing is changed.
    pub fn take(&mut self, member: &str, data: Box<RawValue>, size: Option<u64>) -> Taken {
        if let Some(closed) = self.closed {
            return Taken::Late(closed);
        }
        if self.members.iter().any(|(id, _)| id == member) {
            return Taken::Known;
        }
        let count = self.members.len() as u64;
        match (size, self.size) {
            (Some(said), Some(known)) if said != known => return Taken::Misfit { said, known },
            (Some(said), None) if said <= count => return Taken::Misfit { said, known: count + 1 },
            _ => {}
        }
        self.size = self.size.or(size);
        self.members.push((member.into(), data));
        if self.size == Some(count + 1) {
            self.closed = Some(Closed::Complete);
            return Taken::Closes;
        }
        Taken::Waits
    }

    /// Closes it, as its time is over; whether it was open.
    pub fn overdue(&mut self) -> bool {
        let open = self.closed.is_none();
        self.closed.get_or_insert(Closed::Overdue);
        open
    }

    /// How it was closed.
    #[must_use]
    pub fn closed(&self) -> Option<Closed> {
        self.closed
    }

    /// Its members' data, in the order in which they came. It forgets them.
    pub fn give(&mut self) -> Vec<Box<RawValue>> {
        std::mem::take(&mut self.members).into_iter().map(|(_, data)| data).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(n: u32) -> Box<RawValue> {
        RawValue::from_string(n.to_string()).expect("JSON")
    }

    /// Every order of three members, each of which comes twice, with the time being over at every point.
    #[test]
    fn every_order_with_repeats_closes_once_with_each_member_once() {
        let comings = [0, 1, 2, 0, 1, 2];
        let mut orders = vec![Vec::new()];
        for _ in 0..comings.len() {
            let longer = |order: Vec<usize>| {
                let left = (0..6).filter(|n| !order.contains(n)).map(|n| [&order[..], &[n]].concat());
                left.collect::<Vec<_>>()
            };
            orders = orders.into_iter().flat_map(longer).collect();
        }
        assert_eq!(orders.len(), 720);
        for (order, end) in orders.iter().flat_map(|order| (0..=6).map(move |end| (order, end))) {
            let (mut group, mut closings, mut seen) = (Group::default(), 0, Vec::new());
            for (turn, coming) in order.iter().enumerate() {
                if turn == end && group.overdue() {
                    closings += 1;
                    assert_eq!(group.give().len(), seen.len());
                }
                let member = comings[*coming];
                match group.take(&member.to_string(), data(member), Some(3)) {
                    Taken::Waits => {
                        assert!(!seen.contains(&member) && seen.len() < 2);
                        seen.push(member);
                    }
                    Taken::Closes => {
                        seen.push(member);
                        closings += 1;
                        let given: Vec<String> = group.give().iter().map(|data| data.get().to_owned()).collect();
                        assert_eq!(given, seen.iter().map(ToString::to_string).collect::<Vec<_>>());
                        assert_eq!(given.len(), 3);
                    }
                    Taken::Known => assert!(seen.contains(&member)),
                    Taken::Late(closed) => {
                        assert_eq!(closed == Closed::Complete, seen.len() == 3);
                    }
                    misfit => panic!("{misfit:?}"),
                }
            }
            assert_eq!(closings, 1, "{order:?}, over at {end}");
        }
    }

    #[test]
    fn a_size_may_come_late_and_must_fit() {
        let mut group = Group::default();
        assert_eq!(group.take("a", data(1), None), Taken::Waits);
        assert_eq!(group.take("b", data(2), Some(1)), Taken::Misfit { said: 1, known: 2 });
        assert_eq!(group.take("b", data(2), Some(3)), Taken::Waits);
        assert_eq!(group.take("c", data(3), Some(4)), Taken::Misfit { said: 4, known: 3 });
        assert_eq!(group.take("c", data(3), None), Taken::Closes);
        assert_eq!(group.closed(), Some(Closed::Complete));
        assert_eq!(group.take("d", data(4), None), Taken::Late(Closed::Complete));
        assert!(!group.overdue());
    }
}
