use super::*;
use warren_shared::fleet::{Held, Kind};
use warren_shared::lane::Lanes;
use warren_shared::topology::QueueType;

fn topology() -> Topology {
    Topology {
        pool: "orders".into(),
        lanes: Lanes::parse("high:6,normal:3").expect("valid"),
        partitions: 3,
        queue_type: QueueType::Quorum,
        order: Order::Key,
        subscriptions: Vec::new(),
    }
}

/// A worker that holds what it should, and all others' queues behind them.
fn word(name: &str, stamp: u64) -> Word {
    let held = |queue| Held { queue, stamp, active: stamp == 1, unacked: 2, rate: 4.5, oldest: Some(stamp * 1000) };
    let held = topology().queues().into_iter().map(held).collect();
    Word { kind: Kind::Beat, name: name.into(), capacity: 64, held, ..Word::ask(name.into()) }
}

fn depths(ready: u32, consumers: u32) -> BTreeMap<String, Option<Depth>> {
    let topology = topology();
    let mut depths: BTreeMap<String, Option<Depth>> =
        topology.queues().into_iter().map(|queue| (queue, Some(Depth { ready, consumers }))).collect();
    let others = LADDER.map(|step| topology.delay(step)).into_iter().chain([topology.dead(), topology.unrouted()]);
    depths.extend(others.map(|queue| (queue, Some(Depth::default()))));
    depths
}

#[test]
fn no_rate_is_nought_and_not_less() {
    let idle = Word { held: Vec::new(), ..word("a", 1) };
    let report = gather(&topology(), &depths(0, 0), vec![idle], 0);
    assert!(!report.table().contains("-0.0"), "{}", report.table());
    let json = serde_json::to_string(&report).expect("plain values");
    assert!(json.contains("\"rate\":0.0") && !json.contains("-0.0"), "{json}");
}

#[test]
fn a_pool_at_work_needs_nobody_and_every_partition_has_its_line() {
    let report = gather(&topology(), &depths(7, 2), vec![word("a", 1), word("b", 2)], 0);
    assert_eq!(report.needs, Vec::<String>::new());
    assert_eq!(report.workers.iter().map(|w| (w.owns, w.stands_by)).collect::<Vec<_>>(), [(3, 3), (3, 3)]);
    for lane in &report.lanes {
        assert_eq!((lane.ready, lane.unacked, lane.oldest_ms), (21, 12, Some(2000)));
        for p in &lane.partitions {
            assert_eq!(p.line, ["a", "b"]);
            assert_ne!(p.owner, p.standby);
        }
    }
    let table = report.table();
    assert!(table.contains("served by a") && table.contains("high (weight 6)"), "{table}");
}

#[test]
fn what_needs_a_person_is_said_with_its_cure() {
    let mut depths = depths(1, 1);
    let topology = topology();
    depths.insert("warren.orders.high.p01".into(), Some(Depth { ready: 5, consumers: 0 }));
    depths.insert("warren.orders.normal.p02".into(), None);
    depths.insert(topology.dead(), Some(Depth { ready: 4, consumers: 0 }));
    depths.insert(topology.unrouted(), Some(Depth { ready: 9, consumers: 0 }));
    let mut sick = word("sick", 1);
    sick.troubles.push("the store refuses".into());
    let report = gather(&topology, &depths, vec![sick], 0);
    let needs = report.needs.join("\n");
    for said in [
        "not declared: warren.orders.normal.p02: run 'warren-worker topology --apply'",
        "no consumer: warren.orders.high.p01",
        "9 in warren.orders.unrouted",
        "4 dead letters: see 'warren-worker dead list'",
        "worker sick: the store refuses",
    ] {
        assert!(needs.contains(said), "{said:?} is not in\n{needs}");
    }
}

#[test]
fn a_consumer_that_does_not_answer_is_noticed_where_events_wait() {
    let needs = |ready| gather(&topology(), &depths(ready, 1), vec![], 0).needs.join("\n");
    assert!(needs(1).contains("who consumes does not answer: warren.orders.high.p00"), "{}", needs(1));
    assert_eq!(needs(0), "");
}
