//! The fleet in a world of late words, crashes and newcomers: it always comes to rest with the owner first in line.
use super::*;
use proptest::prelude::*;
use std::collections::{BTreeSet, VecDeque};

/// A queue of a lane that everybody has, and one of a lane that comes with a deploy.
const QUEUES: [&str; 2] = ["q.normal", "q.new"];
const QUEUE: &str = QUEUES[0];
const LANES: [&str; 2] = ["normal", "new"];
const CROWD: usize = 4;

fn partitions(lanes: &[String]) -> Vec<(&'static str, &'static str)> {
    let known = |(lane, _): &(&str, &str)| lanes.iter().any(|l| l == lane);
    LANES.into_iter().zip(QUEUES).filter(known).collect()
}

fn word(name: usize, run: usize) -> Word {
    Word {
        kind: Kind::Beat,
        name: format!("w{name}"),
        run: format!("r{run}"),
        since: run as i64,
        settled: true,
        capacity: 64,
        running: 0,
        store: "s".into(),
        partitions: 16,
        lanes: LANES.map(str::to_owned).into(),
        routes: Vec::new(),
        lacking: Vec::new(),
        version: "1".into(),
        clock: 0,
        held: Vec::new(),
        troubles: Vec::new(),
    }
}

/// A worker and the words on their way to it, by sender.
struct Sim {
    fleet: Fleet,
    clock: Arc<Clock>,
    /// Its stamps in the queues' lines.
    mine: [Option<u64>; 2],
    inbox: Vec<VecDeque<Word>>,
}

#[derive(Default)]
struct World {
    workers: Vec<Option<Sim>>,
    /// The broker's lines: the first is served.
    lines: [Vec<usize>; 2],
    /// Whether events came to a queue that only the new version's routes take.
    news: [bool; 2],
    runs: usize,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    /// A worker starts, of the old version or of the new one, which has one more lane and one more route.
    Start(usize, bool),
    /// The first event of a new type comes to a queue.
    News(usize),
    Leave(usize),
    Crash(usize),
    /// A worker looks at its place and acts.
    Act(usize),
    /// A worker's beat, without its echo.
    Say(usize),
    Hear(usize, usize),
    Echo(usize),
}

impl World {
    fn new() -> Self {
        Self { workers: (0..CROWD).map(|_| None).collect(), ..Self::default() }
    }

    fn say(&mut self, who: usize, kind: Kind) {
        let Some(sim) = &self.workers[who] else { return };
        let word = Word { kind, clock: sim.clock.now(), ..sim.fleet.me().clone() };
        for other in self.workers.iter_mut().flatten() {
            other.inbox[who].push_back(word.clone());
        }
    }

    fn announce(&mut self, who: usize, q: usize, mine: Option<u64>) {
        let Some(sim) = &mut self.workers[who] else { return };
        sim.mine[q] = mine;
        let held = |(queue, stamp): (&str, Option<u64>)| {
            Some(Held { queue: queue.into(), stamp: stamp?, active: false, unacked: 0, rate: 0.0, oldest: None })
        };
        sim.fleet.me_mut().held = QUEUES.into_iter().zip(sim.mine).filter_map(held).collect();
        self.say(who, Kind::Change);
    }

    /// A worker that is served an event without having a route for it says so, if it knows of somebody who has one.
    fn miss(&mut self, who: usize, q: usize) {
        let Some(sim) = &mut self.workers[who] else { return };
        let new = |word: &Word| word.routes.iter().any(|route| route == "new");
        let served = self.news[q] && self.lines[q].first() == Some(&who);
        if served && !new(sim.fleet.me()) && sim.fleet.others().any(new) {
            let lacking = &mut sim.fleet.me_mut().lacking;
            if !lacking.iter().any(|queue| queue == QUEUES[q]) {
                lacking.push(QUEUES[q].into());
                self.say(who, Kind::Change);
            }
        }
    }

    fn view(&self, who: usize, q: usize, patient: bool) -> Option<View> {
        let sim = self.workers[who].as_ref()?;
        let (me, known) = (sim.fleet.me().member(), partitions(&sim.fleet.me().lanes));
        // The old version's lane is the first one of the new.
        let seat = sim.fleet.seats(&known).into_iter().nth(q)?;
        let role = match &seat {
            seat if seat.owner.as_ref() == Some(&me) => Role::Owner,
            seat if seat.standby.as_ref() == Some(&me) => Role::Standby,
            _ => Role::None,
        };
        let (mine, queue) = (sim.mine[q], QUEUES[q]);
        let owner = seat.owner.filter(|owner| *owner != me).and_then(|owner| sim.fleet.place(&owner, queue));
        // The broker serves it, and the owner says that it is there: long enough to be sure, where nothing else happens.
        let inverted = !patient && self.lines[q].first() == Some(&who) && owner < mine;
        Some(View { role, mine, owner, overdue: !patient, inverted })
    }

    fn act(&mut self, who: usize, patient: bool) -> [Step; 2] {
        [0, 1].map(|q| {
            self.miss(who, q);
            let Some(view) = self.view(who, q, patient) else { return Step::Stay };
            let step = step(view);
            if matches!(step, Step::Requeue | Step::Leave) {
                self.lines[q].retain(|w| *w != who);
            }
            match step {
                Step::Stay => {}
                Step::Leave => self.announce(who, q, None),
                Step::Subscribe | Step::Requeue => {
                    self.lines[q].push(who);
                    let stamp = self.workers[who].as_mut().map(|sim| sim.clock.stamp());
                    self.announce(who, q, stamp);
                }
            }
            step
        })
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Start(who, new) if self.workers[who].is_none() => {
                self.runs += 1;
                let clock = Arc::new(Clock::default());
                let mut me = word(who, self.runs);
                me.lanes.truncate(if new { 2 } else { 1 });
                me.routes = if new { vec!["new".into()] } else { Vec::new() };
                let fleet = Fleet::new(me, clock.clone());
                self.workers[who] = Some(Sim { fleet, clock, mine: [None; 2], inbox: vec![VecDeque::new(); CROWD] });
                self.say(who, Kind::Join);
                // All others answer.
                (0..CROWD).filter(|other| *other != who).for_each(|other| self.say(other, Kind::Change));
            }
            Event::Leave(who) | Event::Crash(who) => {
                if matches!(event, Event::Leave(_)) {
                    self.say(who, Kind::Leave);
                }
                self.workers[who] = None;
                self.lines.iter_mut().for_each(|line| line.retain(|w| *w != who));
            }
            Event::Act(who) => {
                self.act(who, true);
            }
            Event::Say(who) => self.say(who, Kind::Beat),
            Event::Hear(who, from) => {
                if let Some(sim) = &mut self.workers[who]
                    && let Some(word) = sim.inbox[from].pop_front()
                {
                    sim.fleet.hear(word);
                }
            }
            Event::Echo(who) => {
                if let Some(sim) = &mut self.workers[who] {
                    let own = sim.fleet.me().clone();
                    sim.fleet.hear(own);
                }
            }
            Event::News(q) => self.news[q] = true,
            Event::Start(..) => {}
        }
    }

    /// Everybody beats, hears and acts, until nobody has anything to do.
    fn rest(&mut self) {
        for _ in 0..30 {
            (0..CROWD).for_each(|who| self.happen(Event::Say(who)));
            for who in 0..CROWD {
                while (0..CROWD).any(|from| self.workers[who].as_ref().is_some_and(|s| !s.inbox[from].is_empty())) {
                    (0..CROWD).for_each(|from| self.happen(Event::Hear(who, from)));
                }
                self.happen(Event::Echo(who));
            }
            for who in 0..CROWD {
                self.act(who, false);
            }
        }
    }

    /// A queue's line as it is to be: the owner, then the standby, of those that can serve it.
    fn wanted(&self, q: usize) -> Vec<Member> {
        let words = || self.workers.iter().flatten().map(|sim| sim.fleet.me());
        let all: Vec<(&str, &str)> = LANES.into_iter().zip(QUEUES).collect();
        let seat = seats(&all, words()).swap_remove(q);
        seat.owner.into_iter().chain(seat.standby).collect()
    }

    fn names(&self, q: usize) -> Vec<Member> {
        self.lines[q].iter().filter_map(|w| self.workers[*w].as_ref()).map(|sim| sim.fleet.me().member()).collect()
    }
}

fn script(deaths: bool) -> impl Strategy<Value = Vec<Event>> {
    let who = || 0..CROWD;
    let step = prop_oneof![
        3 => (who(), any::<bool>()).prop_map(|(who, new)| Event::Start(who, new)),
        // As after a death, the words of a move may cross, and leave a partition alone until they are heard.
        u32::from(deaths) => (0..2_usize).prop_map(Event::News),
        u32::from(deaths) => who().prop_map(Event::Leave),
        u32::from(deaths) => who().prop_map(Event::Crash),
        12 => who().prop_map(Event::Act),
        4 => who().prop_map(Event::Say),
        20 => (who(), who()).prop_map(|(who, from)| Event::Hear(who, from)),
        2 => who().prop_map(Event::Echo),
    ];
    prop::collection::vec(step, 1..150)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_happened_the_line_ends_as_owner_then_standby(script in script(true)) {
        let mut world = World::new();
        script.into_iter().for_each(|event| world.happen(event));
        world.rest();
        for (q, lane) in LANES.into_iter().enumerate() {
            prop_assert_eq!(world.names(q), world.wanted(q));
            // Whoever has a lane serves it, and where new types come, whoever has a route for them.
            let words: Vec<&Word> = world.workers.iter().flatten().map(|sim| sim.fleet.me()).collect();
            let able = |word: &&Word| word.lanes.iter().any(|l| l == lane) && (!world.news[q] || !word.routes.is_empty());
            let able: Vec<Member> = words.into_iter().filter(able).map(Word::member).collect();
            let served = world.names(q).first().cloned();
            prop_assert!(able.is_empty() || served.is_some_and(|served| able.contains(&served)));
        }
        // At rest nobody moves any more.
        for who in 0..CROWD {
            prop_assert_eq!(world.act(who, true), [Step::Stay; 2]);
        }
    }

    #[test]
    fn where_nobody_dies_a_partition_that_is_served_stays_served(script in script(false)) {
        let (mut world, mut served) = (World::new(), [false; 2]);
        for event in script {
            world.happen(event);
            for (line, served) in world.lines.iter().zip(&mut served) {
                prop_assert!(!*served || !line.is_empty());
                *served |= !line.is_empty();
            }
        }
    }
}

#[test]
fn every_view_has_its_step() {
    for role in [Role::Owner, Role::Standby, Role::None] {
        for mine in [None, Some(5)] {
            for owner in [None, Some(3), Some(7)] {
                for (overdue, inverted) in [(false, false), (false, true), (true, false), (true, true)] {
                    let step = step(View { role, mine, owner, overdue, inverted });
                    // Only who has a place can give it up, only who has none can take one.
                    assert_eq!(mine.is_none(), step == Step::Subscribe || (mine.is_none() && step == Step::Stay));
                    // Nobody gives a place up while the owner has none.
                    assert!(owner.is_some() || matches!(step, Step::Stay | Step::Subscribe));
                    // The owner never gives its place up.
                    assert!(role != Role::Owner || matches!(step, Step::Stay | Step::Subscribe));
                }
            }
        }
    }
}

#[test]
fn who_hears_nothing_at_all_keeps_everybody_and_who_hears_itself_gives_the_silent_up() {
    let mut fleet = Fleet::new(word(0, 1), Arc::default());
    assert_eq!(fleet.hear(word(1, 2)), Heard::Joined(word(1, 2).member()));
    let own = word(0, 1);
    for _ in 0..SILENCE {
        assert_eq!(fleet.hear(own.clone()), Heard::Echo(vec![]));
    }
    assert_eq!(fleet.hear(word(1, 2)), Heard::Known);
    for _ in 0..SILENCE {
        assert_eq!(fleet.hear(own.clone()), Heard::Echo(vec![]));
    }
    assert_eq!(fleet.size(), 2);
    assert_eq!(fleet.hear(own), Heard::Echo(vec![word(1, 2).member()]));
    assert_eq!(fleet.size(), 1);
}

#[test]
fn who_leaves_is_gone_at_once() {
    let mut fleet = Fleet::new(word(0, 1), Arc::default());
    fleet.hear(word(1, 2));
    let leave = Word { kind: Kind::Leave, ..word(1, 2) };
    assert_eq!(fleet.hear(leave.clone()), Heard::Left(leave.member()));
    assert_eq!(fleet.hear(leave), Heard::Known);
    assert_eq!(fleet.size(), 1);
}

fn deal(words: &[Word], partitions: &[(&str, &str)]) -> Vec<Seat> {
    seats(partitions, words.iter())
}

fn owners(seats: &[Seat]) -> Vec<&str> {
    seats.iter().map(|seat| seat.owner.as_ref().map_or("-", |owner| owner.name.as_str())).collect()
}

#[test]
fn a_lane_is_shared_out_among_those_who_have_it_and_all_who_know_a_partition_agree() {
    let queues: Vec<String> =
        ["normal", "low", "urgent"].iter().flat_map(|lane| (0..8).map(move |p| format!("{lane}.p{p}"))).collect();
    let lane = |queue: &str| queue.split('.').next().map(str::to_owned).unwrap_or_default();
    let of = |name, lanes: &[&str]| Word { lanes: lanes.iter().map(|l| (*l).into()).collect(), ..word(name, name) };
    // One adds a lane, another takes one away.
    let words = [
        of(0, &["normal", "low"]),
        of(1, &["normal", "low"]),
        of(2, &["normal", "low", "urgent"]),
        of(3, &["urgent", "normal"]),
    ];
    let known = |lanes: &[String]| -> Vec<String> {
        queues.iter().filter(|queue| lanes.contains(&lane(queue))).cloned().collect()
    };
    let mut agreed: BTreeMap<String, Seat> = BTreeMap::new();
    for me in &words {
        let queues = known(&me.lanes);
        let lanes: Vec<String> = queues.iter().map(|queue| lane(queue)).collect();
        let partitions: Vec<(&str, &str)> =
            lanes.iter().zip(&queues).map(|(lane, queue)| (lane.as_str(), queue.as_str())).collect();
        for (queue, seat) in queues.iter().zip(deal(&words, &partitions)) {
            let has = |member: &Option<Member>| {
                let word = words.iter().find(|word| Some(word.member()) == *member);
                word.is_some_and(|word| word.lanes.contains(&lane(queue)))
            };
            assert!(has(&seat.owner) && has(&seat.standby), "{queue}: {seat:?}");
            assert_eq!(*agreed.entry(queue.clone()).or_insert_with(|| seat.clone()), seat, "{queue}");
        }
    }
    assert_eq!(agreed.len(), queues.len(), "a partition that nobody serves");
}

#[test]
fn where_all_have_the_same_lanes_their_shares_of_all_lanes_together_are_even() {
    let words: Vec<Word> = (0..3).map(|n| word(n, n)).collect();
    let queues: Vec<String> = (0..32).map(|p| format!("q{p}")).collect();
    let partitions: Vec<(&str, &str)> =
        queues.iter().enumerate().map(|(p, queue)| (LANES[p / 16], queue.as_str())).collect();
    let seats = deal(&words, &partitions);
    let loads = ["w0", "w1", "w2"].map(|name| owners(&seats).iter().filter(|owner| **owner == name).count());
    assert!(loads.iter().all(|load| (10..=11).contains(load)), "{loads:?}");
}

#[test]
fn a_partition_goes_to_whose_routes_may_suffice_and_stays_where_nobodys_do() {
    let old = |n| Word { routes: vec!["a".into()], ..word(n, n) };
    let new = |n| Word { routes: vec!["a".into(), "b".into()], ..word(n, n) };
    let lacks = |word: Word| Word { lacking: vec![QUEUE.into()], ..word };
    let partition = [(LANES[0], QUEUE)];
    let usual = owners(&deal(&[old(0), old(1), new(2), old(3)], &partition))[0].to_owned();
    // Those with the same routes need not find it out one after the other.
    let seats = deal(&[old(0), lacks(old(1)), new(2), old(3)], &partition);
    assert_eq!((owners(&seats), &seats[0].standby), (vec!["w2"], &None));
    let other = [("normal", "elsewhere")];
    assert_eq!(
        owners(&deal(&[old(0), lacks(old(1)), new(2), old(3)], &other)),
        owners(&deal(&[old(0), old(1), new(2), old(3)], &other)),
        "where nothing was missing, all serve"
    );
    // Neither of the two takes all that comes.
    assert_eq!(owners(&deal(&[old(0), lacks(old(1)), lacks(new(2)), old(3)], &partition)), [usual]);
}

#[test]
fn who_can_serve_something_else_than_before_has_changed() {
    let mut fleet = Fleet::new(word(0, 1), Arc::default());
    fleet.hear(word(1, 2));
    assert_eq!(fleet.hear(word(1, 2)), Heard::Known);
    let lacking = Word { lacking: vec![QUEUE.into()], ..word(1, 2) };
    assert_eq!(fleet.hear(lacking.clone()), Heard::Changed);
    assert_eq!(fleet.hear(lacking), Heard::Known);
}

#[test]
fn of_two_stores_the_newcomer_yields_whatever_the_clocks_say() {
    let settled = |run: usize, settled: bool, store: &str| Word { settled, store: store.into(), ..word(run, run) };
    let yields = |me: Word, other: Word| match Fleet::new(me, Arc::default()).hear(other) {
        Heard::Stranger { yield_to, .. } => Some(yield_to),
        _ => None,
    };
    // Run 9 started last by its clock.
    assert_eq!(yields(settled(1, false, "a"), settled(9, true, "b")), Some(true));
    assert_eq!(yields(settled(9, true, "b"), settled(1, false, "a")), Some(false));
    // Of two newcomers exactly one.
    assert_eq!(yields(settled(1, false, "a"), settled(9, false, "b")), Some(false));
    assert_eq!(yields(settled(9, false, "b"), settled(1, false, "a")), Some(true));
    assert_eq!(yields(settled(1, false, "a"), settled(9, true, "a")), None);
    // Two that work already were cut off from each other: a person has to decide.
    assert_eq!(yields(settled(1, true, "a"), settled(9, true, "b")), Some(false));
}

#[test]
fn a_stranger_is_no_member_and_the_message_names_the_cure() {
    let mut fleet = Fleet::new(word(0, 1), Arc::default());
    let other = Word { partitions: 12, ..word(1, 2) };
    let Heard::Stranger { conflict, .. } = fleet.hear(other) else { panic!("a stranger") };
    assert!(conflict.to_string().contains("WARREN_PARTITIONS=12, this one 16"), "{conflict}");
    let other = Word { store: "t".into(), ..word(1, 2) };
    let Heard::Stranger { conflict, .. } = fleet.hear(other) else { panic!("a stranger") };
    assert!(conflict.to_string().contains("DATABASE_URL"), "{conflict}");
    assert_eq!(fleet.size(), 1);
}

#[test]
fn the_word_of_a_worker_that_names_no_lanes_is_read_as_that_of_one_that_has_all() {
    let mut said = serde_json::to_value(word(1, 2)).expect("serialises");
    ["lanes", "routes", "lacking"].iter().for_each(|field| drop(said.as_object_mut().expect("a table").remove(*field)));
    let read: Word = serde_json::from_value(said).expect("reads");
    assert_eq!(owners(&deal(&[read], &[("any", "q")])), ["w1"]);
}

#[test]
fn words_survive_the_wire() {
    let mut said = word(0, 1);
    said.held.push(Held { queue: QUEUE.into(), stamp: 7, active: true, unacked: 3, rate: 1.5, oldest: Some(20) });
    let text = serde_json::to_string(&said).expect("serialises");
    assert_eq!(serde_json::from_str::<Word>(&text).expect("reads"), said);
    let names: BTreeSet<&str> = ["name", "store", "held"].into();
    assert!(names.iter().all(|name| text.contains(name)), "{text}");
}
