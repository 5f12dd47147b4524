//! The fleet in a world of late words, crashes and newcomers: it always comes to rest with the owner first in line.
use super::*;
use crate::assignment::assign;
use proptest::prelude::*;
use std::collections::{BTreeSet, VecDeque};

const QUEUE: &str = "q";
const CROWD: usize = 4;

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
    mine: Option<u64>,
    inbox: Vec<VecDeque<Word>>,
}

#[derive(Default)]
struct World {
    workers: Vec<Option<Sim>>,
    /// The broker's line: the first is served.
    line: Vec<usize>,
    runs: usize,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Start(usize),
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

    fn announce(&mut self, who: usize, mine: Option<u64>) {
        let Some(sim) = &mut self.workers[who] else { return };
        sim.mine = mine;
        let held = |stamp| Held { queue: QUEUE.into(), stamp, active: false, unacked: 0, rate: 0.0, oldest: None };
        sim.fleet.me_mut().held = mine.map(held).into_iter().collect();
        self.say(who, Kind::Change);
    }

    fn view(&self, who: usize, patient: bool) -> Option<View> {
        let sim = self.workers[who].as_ref()?;
        let seat = assign(&[QUEUE.into()], &sim.fleet.members()).pop()?;
        let me = sim.fleet.me().member();
        let role = match &seat {
            seat if seat.owner.as_ref() == Some(&me) => Role::Owner,
            seat if seat.standby.as_ref() == Some(&me) => Role::Standby,
            _ => Role::None,
        };
        let owner = seat.owner.filter(|owner| *owner != me).and_then(|owner| sim.fleet.place(&owner, QUEUE));
        // The broker serves it, and the owner says that it is there: long enough to be sure, where nothing else happens.
        let inverted = !patient && self.line.first() == Some(&who) && owner < sim.mine;
        Some(View { role, mine: sim.mine, owner, overdue: !patient, inverted })
    }

    fn act(&mut self, who: usize, patient: bool) -> Step {
        let Some(view) = self.view(who, patient) else { return Step::Stay };
        let step = step(view);
        if matches!(step, Step::Requeue | Step::Leave) {
            self.line.retain(|w| *w != who);
        }
        match step {
            Step::Stay => {}
            Step::Leave => self.announce(who, None),
            Step::Subscribe | Step::Requeue => {
                self.line.push(who);
                let stamp = self.workers[who].as_mut().map(|sim| sim.clock.stamp());
                self.announce(who, stamp);
            }
        }
        step
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Start(who) if self.workers[who].is_none() => {
                self.runs += 1;
                let clock = Arc::new(Clock::default());
                let fleet = Fleet::new(word(who, self.runs), clock.clone());
                self.workers[who] = Some(Sim { fleet, clock, mine: None, inbox: vec![VecDeque::new(); CROWD] });
                self.say(who, Kind::Join);
                // All others answer.
                (0..CROWD).filter(|other| *other != who).for_each(|other| self.say(other, Kind::Change));
            }
            Event::Leave(who) | Event::Crash(who) => {
                if matches!(event, Event::Leave(_)) {
                    self.say(who, Kind::Leave);
                }
                self.workers[who] = None;
                self.line.retain(|w| *w != who);
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
            Event::Start(_) => {}
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

    fn living(&self) -> BTreeMap<Member, u32> {
        self.workers.iter().flatten().map(|sim| (sim.fleet.me().member(), 64)).collect()
    }

    fn names(&self) -> Vec<Member> {
        self.line.iter().filter_map(|w| self.workers[*w].as_ref()).map(|sim| sim.fleet.me().member()).collect()
    }
}

fn script(deaths: bool) -> impl Strategy<Value = Vec<Event>> {
    let who = || 0..CROWD;
    let step = prop_oneof![
        3 => who().prop_map(Event::Start),
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
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_happened_the_line_ends_as_owner_then_standby(script in script(true)) {
        let mut world = World::new();
        script.into_iter().for_each(|event| world.happen(event));
        world.rest();
        let seat = assign(&[QUEUE.into()], &world.living()).pop().expect("one partition");
        let wanted: Vec<Member> = seat.owner.into_iter().chain(seat.standby).collect();
        prop_assert_eq!(world.names(), wanted);
        // At rest nobody moves any more.
        for who in 0..CROWD {
            prop_assert_eq!(world.act(who, true), Step::Stay);
        }
    }

    #[test]
    fn where_nobody_dies_a_partition_that_is_served_stays_served(script in script(false)) {
        let (mut world, mut served) = (World::new(), false);
        for event in script {
            world.happen(event);
            prop_assert!(!served || !world.line.is_empty());
            served |= !world.line.is_empty();
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
    assert_eq!(fleet.members().len(), 2);
    assert_eq!(fleet.hear(own), Heard::Echo(vec![word(1, 2).member()]));
    assert_eq!(fleet.members().len(), 1);
}

#[test]
fn who_leaves_is_gone_at_once() {
    let mut fleet = Fleet::new(word(0, 1), Arc::default());
    fleet.hear(word(1, 2));
    let leave = Word { kind: Kind::Leave, ..word(1, 2) };
    assert_eq!(fleet.hear(leave.clone()), Heard::Left(leave.member()));
    assert_eq!(fleet.hear(leave), Heard::Known);
    assert_eq!(fleet.members().len(), 1);
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
    assert_eq!(fleet.members().len(), 1);
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
