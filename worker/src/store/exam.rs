//! The exam that every store passes, a case a function; [`exam!`] makes a test of each.
mod states;

use super::{Begin, Effect, Left, Outcome, Recorded, Row, Seen, Start, Store};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};
use warren_shared::{Identity, Message};

/// Opens a store for the worker of this name.
type Open = dyn Fn(&str) -> Arc<dyn Store> + Send + Sync;

/// An empty store of some kind, opened by one worker after the other.
pub(super) struct Candidate {
    pub(super) open: Box<Open>,
    /// What must live as long as the store.
    pub(super) _keep: Box<dyn std::any::Any + Send>,
}

/// What the inbox must answer, in the simplest way: the outcome of each event, and up to which replay it is dead.
#[derive(Default)]
pub(super) struct Model(HashMap<u16, Option<u32>>);

impl Model {
    pub(super) fn knows(&self, id: u16, replayed: u32) -> bool {
        self.0.get(&id).is_some_and(|death| death.is_none_or(|until| until >= replayed))
    }

    pub(super) fn record(&mut self, id: u16, replayed: u32, outcome: Outcome) -> bool {
        let fresh = !self.knows(id, replayed);
        if fresh {
            self.0.insert(id, (outcome == Outcome::Dead).then_some(replayed));
        }
        fresh
    }
}

/// Makes a test of every case, so that a failure says which one.
macro_rules! exam {
    ($candidate:expr) => {
        $crate::store::exam::exam! { $candidate =>
            what_is_committed_is_known
            a_second_commit_is_dropped_whole
            a_replay_of_the_dead_is_a_new_chance
            done_is_final
            a_batch_keeps_the_first_of_two_copies
            what_has_no_identity_is_always_fresh
            the_outbox_keeps_the_order_of_commits
            a_partition_s_rows_are_adopted_once
            only_rows_of_the_silent_are_adopted
            rows_that_are_given_up_are_adopted_by_whoever_asks
            published_rows_are_forgotten
            starts_are_known_by_their_workers_until_they_end
            who_had_the_partition_before_had_its_event_where_nothing_is_recorded
            a_partition_is_known_to_be_whose_until_it_is_given_back
            a_worker_that_ends_well_did_not_die_with_its_events
            a_commit_ends_the_start
            only_what_is_old_is_pruned
            the_identity_is_the_store_s
            what_was_committed_outlives_the_worker
            of_racing_workers_one_commits
            a_state_changes_with_its_event
            what_rests_on_an_outdated_state_is_dropped_whole
            of_two_changes_in_a_batch_the_second_is_outdated
            a_known_event_changes_no_state
            racing_workers_count_a_state_up_without_a_gap
            states_are_listed_and_the_ended_ones_forgotten
            what_is_due_is_found_until_it_is_not
            what_has_not_ended_is_counted_by_name_and_status
            nothing_asked_is_nothing_done
        }
    };
    ($candidate:expr => $($case:ident)*) => {
        $(
            #[tokio::test]
            async fn $case() {
                $crate::store::exam::$case(&$candidate).await;
            }
        )*
    };
}
pub(super) use exam;
pub(super) use states::*;

fn identity(id: &str) -> Identity {
    Identity::of("/exam", id)
}

fn seen(id: &str, replayed: u32) -> Seen {
    Seen { identity: identity(id), replayed }
}

fn message(id: &str) -> Message {
    let mut message = Message { exchange: "warren.events".into(), routing_key: "a.b".into(), ..Message::default() };
    message.message_id = Some(id.into());
    message.set("warren-lane", "high");
    message.set("n", 7_i64);
    message.body = [id.as_bytes(), b"\0\xff"].concat();
    message
}

/// An event's success, which sends one message of the same id.
fn done(id: &str) -> Effect {
    let partition = "p00".into();
    Effect {
        seen: Some(seen(id, 0)),
        outcome: Outcome::Done,
        started: None,
        partition,
        out: vec![message(id)],
        change: None,
    }
}

fn dead(id: &str, replayed: u32) -> Effect {
    Effect { seen: Some(seen(id, replayed)), outcome: Outcome::Dead, ..done(id) }
}

fn ids(rows: &[Row]) -> Vec<&str> {
    rows.iter().map(|row| row.message.message_id.as_deref().unwrap_or_default()).collect()
}

async fn commit(store: &Arc<dyn Store>, effects: Vec<Effect>) -> Vec<Recorded> {
    store.commit(Arc::new(effects)).await.expect("it takes them")
}

/// Commits one effect; whether it was fresh.
async fn is_fresh(store: &Arc<dyn Store>, effect: Effect) -> bool {
    matches!(commit(store, vec![effect]).await[..], [Recorded::Fresh(..)])
}

async fn is_known(store: &Arc<dyn Store>, id: &str, replayed: u32) -> bool {
    store.look(vec![seen(id, replayed)]).await.expect("it answers")[0].is_some()
}

/// Makes everything ours and returns all rows, in order.
async fn outbox(candidate: &Candidate) -> Vec<Row> {
    (candidate.open)("auditor").adopt(Left::Silent(Duration::ZERO)).await.expect("it answers")
}

/// A moment that lies clearly after all that was done and before all that will be.
async fn moment() -> Instant {
    let apart = Duration::from_millis(400);
    tokio::time::sleep(apart).await;
    let moment = Instant::now();
    tokio::time::sleep(apart).await;
    moment
}

pub(super) async fn what_is_committed_is_known(candidate: &Candidate) {
    let (ours, theirs) = ((candidate.open)("a"), (candidate.open)("b"));
    assert!(!is_known(&ours, "1", 0).await);
    assert!(is_fresh(&ours, done("1")).await);
    for store in [&ours, &theirs] {
        let asked = vec![seen("0", 0), seen("1", 0), seen("2", 0), seen("1", 0)];
        let known: Vec<bool> = store.look(asked).await.expect("answers").iter().map(Option::is_some).collect();
        assert_eq!(known, [false, true, false, true], "one answer a question, in their order");
    }
}

pub(super) async fn a_second_commit_is_dropped_whole(candidate: &Candidate) {
    let (ours, theirs) = ((candidate.open)("a"), (candidate.open)("b"));
    assert!(is_fresh(&ours, done("1")).await);
    assert!(!is_fresh(&ours, done("1")).await);
    assert!(!is_fresh(&theirs, done("1")).await);
    assert!(!is_fresh(&theirs, dead("1", 0)).await);
    assert_eq!(ids(&outbox(candidate).await), ["1"], "what the later ones would send is dropped with them");
}

pub(super) async fn a_replay_of_the_dead_is_a_new_chance(candidate: &Candidate) {
    let store = (candidate.open)("a");
    assert!(is_fresh(&store, dead("1", 0)).await);
    assert!(is_known(&store, "1", 0).await);
    assert!(!is_fresh(&store, done("1")).await, "the dead stays dead without a replay");

    assert!(!is_known(&store, "1", 1).await, "its replay runs");
    assert!(is_fresh(&store, dead("1", 1)).await);
    assert!(is_known(&store, "1", 1).await && is_known(&store, "1", 0).await);
    assert!(!is_fresh(&store, dead("1", 1)).await);
    assert!(!is_fresh(&store, dead("1", 0)).await, "an old copy comes too late");

    let success = Effect { seen: Some(seen("1", 5)), ..done("1") };
    assert!(!is_known(&store, "1", 5).await);
    assert!(is_fresh(&store, success).await);
    assert!(is_known(&store, "1", 5).await && is_known(&store, "1", 0).await);
    assert_eq!(ids(&outbox(candidate).await), ["1", "1", "1"]);
}

pub(super) async fn done_is_final(candidate: &Candidate) {
    let store = (candidate.open)("a");
    assert!(is_fresh(&store, done("1")).await);
    for replayed in [0, 1, u32::MAX] {
        assert!(is_known(&store, "1", replayed).await);
        assert!(!is_fresh(&store, dead("1", replayed)).await);
        assert!(!is_fresh(&store, Effect { seen: Some(seen("1", replayed)), ..done("1") }).await);
    }
}

pub(super) async fn a_batch_keeps_the_first_of_two_copies(candidate: &Candidate) {
    let store = (candidate.open)("a");
    let recorded = commit(&store, vec![done("1"), done("2"), dead("1", 0), done("3")]).await;
    let fresh: Vec<bool> = recorded.iter().map(|r| matches!(r, Recorded::Fresh(..))).collect();
    assert_eq!(fresh, [true, true, false, true]);
    assert!(is_known(&store, "1", 9).await, "it is done, not dead");
    assert_eq!(ids(&outbox(candidate).await), ["1", "2", "3"]);
}

pub(super) async fn what_has_no_identity_is_always_fresh(candidate: &Candidate) {
    let store = (candidate.open)("a");
    for _ in 0..2 {
        assert!(is_fresh(&store, Effect { seen: None, ..done("1") }).await);
    }
    assert!(!is_known(&store, "1", 0).await);
    assert_eq!(ids(&outbox(candidate).await), ["1", "1"]);
}

pub(super) async fn the_outbox_keeps_the_order_of_commits(candidate: &Candidate) {
    let (ours, theirs) = ((candidate.open)("a"), (candidate.open)("b"));
    let mut told = Vec::new();
    for (turn, store) in [&ours, &theirs, &ours].into_iter().enumerate() {
        let names: Vec<String> = (0..3).map(|i| format!("{turn}.{i}")).collect();
        let out = names.iter().map(|name| message(name)).collect();
        let silent = Effect { out: Vec::new(), ..done(&format!("nothing {turn}")) };
        for recorded in commit(store, vec![silent, Effect { out, ..done(&format!("three {turn}")) }]).await {
            let Recorded::Fresh(_, rows) = recorded else { panic!("not fresh") };
            told.extend(rows.into_iter().enumerate().map(|(i, row)| (row, format!("{turn}.{i}"))));
        }
    }
    assert!(told.is_sorted_by(|a, b| a.0 < b.0), "ids ascend: {told:?}");
    let rows = outbox(candidate).await;
    assert_eq!(rows.iter().map(|row| row.id).collect::<Vec<_>>(), told.iter().map(|t| t.0).collect::<Vec<_>>());
    for (row, (_, name)) in rows.iter().zip(&told) {
        assert_eq!((&row.message, &*row.partition), (&message(name), "p00"), "it comes back as it was");
    }
}

pub(super) async fn a_partition_s_rows_are_adopted_once(candidate: &Candidate) {
    let (ours, theirs, third) = ((candidate.open)("a"), (candidate.open)("b"), (candidate.open)("c"));
    commit(&ours, vec![done("1"), Effect { partition: "p01".into(), ..done("other") }]).await;
    commit(&theirs, vec![done("2")]).await;
    commit(&ours, vec![done("3")]).await;
    let p00 = || Left::In("p00".into());
    assert_eq!(ids(&theirs.adopt(p00()).await.expect("answers")), ["1", "3"], "not its own, not the other's");
    assert_eq!(ids(&theirs.adopt(p00()).await.expect("answers")), [""; 0], "they are its own now");
    assert_eq!(
        ids(&third.adopt(p00()).await.expect("answers")),
        ["1", "2", "3"],
        "all, in order, from whoever has them"
    );
    assert_eq!(ids(&ours.adopt(Left::In("p01".into())).await.expect("answers")), [""; 0]);
    assert_eq!(ids(&ours.adopt(Left::In("p77".into())).await.expect("answers")), [""; 0]);
}

pub(super) async fn only_rows_of_the_silent_are_adopted(candidate: &Candidate) {
    let [silent, alive, ours, unheard] = ["a", "b", "c", "d"].map(|name| (candidate.open)(name));
    for (store, id) in [(&silent, "1"), (&alive, "2"), (&ours, "3"), (&silent, "4")] {
        store.beat().await.expect("takes it");
        commit(store, vec![done(id)]).await;
    }
    let none = ours.adopt(Left::Silent(Duration::from_secs(3600))).await.expect("answers");
    assert_eq!(ids(&none), [""; 0], "all were heard of within the hour");
    let moment = moment().await;
    alive.beat().await.expect("takes it");
    assert_eq!(ids(&ours.adopt(Left::Silent(moment.elapsed())).await.expect("answers")), ["1", "4"]);
    assert_eq!(ids(&ours.adopt(Left::Silent(moment.elapsed())).await.expect("answers")), [""; 0]);
    // Who never beat is not known to live; a worker beats before it takes anything.
    commit(&unheard, vec![done("5")]).await;
    assert_eq!(ids(&ours.adopt(Left::Silent(moment.elapsed())).await.expect("answers")), ["5"]);
    assert_eq!(ids(&alive.adopt(Left::In("p00".into())).await.expect("answers")), ["1", "3", "4", "5"]);
}

pub(super) async fn rows_that_are_given_up_are_adopted_by_whoever_asks(candidate: &Candidate) {
    let (ours, theirs) = ((candidate.open)("a"), (candidate.open)("b"));
    let mut ids = Vec::new();
    for recorded in commit(&ours, ["1", "2", "3"].map(done).into()).await {
        let Recorded::Fresh(_, rows) = recorded else { panic!("not fresh") };
        ids.extend(rows);
    }
    ours.beat().await.expect("takes it");
    theirs.beat().await.expect("takes it");
    ours.give_up(ids[..2].to_vec()).await.expect("takes it");
    let silent = || Left::Silent(Duration::from_secs(60));
    let adopted = |rows: Vec<Row>| rows.iter().map(|row| row.id).collect::<Vec<_>>();
    assert_eq!(adopted(theirs.adopt(silent()).await.expect("answers")), ids[..2], "ours is not silent");
    theirs.give_up(ids[..1].to_vec()).await.expect("takes it");
    // Ours again, where we are the next.
    assert_eq!(adopted(ours.adopt(Left::In("p00".into())).await.expect("answers")), ids[..2]);
}

pub(super) async fn published_rows_are_forgotten(candidate: &Candidate) {
    let store = (candidate.open)("a");
    let mut rows = Vec::new();
    for recorded in commit(&store, (0..10).map(|i| done(&i.to_string())).collect()).await {
        let Recorded::Fresh(_, mut ids) = recorded else { panic!("not fresh") };
        rows.append(&mut ids);
    }
    let (gone, left) = (rows[..7].to_vec(), &rows[7..]);
    for _ in 0..2 {
        store.sent(gone.clone()).await.expect("repeating it is harmless");
    }
    assert_eq!(outbox(candidate).await.iter().map(|row| row.id).collect::<Vec<_>>(), left);
    store.sent(left.to_vec()).await.expect("takes it");
    let Recorded::Fresh(_, later) = &commit(&store, vec![done("later")]).await[0] else { panic!("not fresh") };
    assert!(later[0] > rows[9], "an id is never used again");
}

pub(super) async fn starts_are_known_by_their_workers_until_they_end(candidate: &Candidate) {
    let (ours, theirs) = ((candidate.open)("a"), (candidate.open)("b"));
    let [x, y, z] = ["x", "y", "z"].map(identity);
    let none: [&str; 0] = [];
    assert_eq!(others(&begin(&ours, 0, &[y, x]).await), [none, none], "nobody else had them");
    assert_eq!(others(&begin(&ours, 0, &[x]).await), [none], "to repeat it does no harm");
    let asked = begin(&theirs, 0, &[x, z, x]).await;
    assert_eq!(others(&asked), [vec!["a"], vec![], vec!["a"]]);
    assert_eq!(asked.iter().map(|start| start.kept).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!(others(&begin(&ours, 0, &[x]).await), [none], "a question records nothing");
    assert!(begin(&theirs, 1, &[x]).await[0].kept);
    assert_eq!(others(&begin(&ours, 1, &[x, z]).await), [["b"], ["b"]]);

    ours.unstart(vec![x, y, y, identity("never")]).await.expect("taking back too much is harmless");
    assert_eq!(others(&begin(&theirs, 0, &[x, y]).await), [none, none]);

    ours.note(x, 4).await.expect("takes it");
    let noted = begin(&ours, 0, &[x]).await;
    assert_eq!((others(&noted), noted[0].failed), (vec![none.to_vec()], 4), "a note ends the starts");
    ours.unstart(vec![x, x]).await.expect("takes it");
    assert_eq!(begin(&ours, 0, &[x]).await[0].failed, 4, "a drain forgets no failure");
}

pub(super) async fn who_had_the_partition_before_had_its_event_where_nothing_is_recorded(candidate: &Candidate) {
    let ours = (candidate.open)("a");
    let asked = |event: &str, before: Option<&str>, most| {
        let begin = Begin { event: identity(event), before: before.map(Into::into), most };
        let answer = ours.start(vec![begin]);
        async move { answer.await.expect("answers").remove(0) }
    };
    assert_eq!(others(&[asked("1", Some("x"), 0).await]), [["x"]]);
    assert_eq!(others(&[asked("1", None, 0).await]), [[""; 0]], "it was not recorded, so neither was the other");
    assert_eq!(others(&[asked("2", Some("x"), 1).await]), [["x"]]);
    assert_eq!(others(&[asked("2", Some("y"), 9).await]), [["x"]], "what is recorded is known better");
    assert_eq!(others(&[asked("3", Some("a"), 0).await]), [[""; 0]], "oneself is no other");
}

pub(super) async fn a_partition_is_known_to_be_whose_until_it_is_given_back(candidate: &Candidate) {
    let [a, b, c] = ["a", "b", "c"].map(|name| (candidate.open)(name));
    let p = || Arc::<str>::from("p00");
    let own = async |store: &Arc<dyn Store>| store.own(p()).await.expect("answers").map(|owner| owner.to_string());
    assert_eq!(own(&a).await, None);
    assert_eq!(own(&a).await, None, "it was ours");
    assert_eq!(own(&b).await.as_deref(), Some("a"));
    a.disown(p()).await.expect("takes it");
    assert_eq!(own(&c).await.as_deref(), Some("b"), "only the owner gives it back");
    c.disown(p()).await.expect("takes it");
    assert_eq!(own(&a).await, None);
    assert_eq!(a.own("p01".into()).await.expect("answers"), None);
    a.leave().await.expect("takes it");
    assert_eq!(own(&b).await, None, "who ends well gives all back");
}

pub(super) async fn a_worker_that_ends_well_did_not_die_with_its_events(candidate: &Candidate) {
    let [a, b, c] = ["a", "b", "c"].map(|name| (candidate.open)(name));
    for store in [&a, &b] {
        store.beat().await.expect("takes it");
        begin(store, 9, &[identity("1")]).await;
    }
    let told = begin(&c, 0, &[identity("1")]).await;
    assert_eq!(others(&told), [["a", "b"]]);
    let first: Vec<Option<i64>> = told[0].others.iter().map(|other| other.seen).collect();
    assert!(first.iter().all(Option::is_some), "{told:?}");
    a.leave().await.expect("takes it");
    let _ = moment().await;
    b.beat().await.expect("takes it");
    let told = begin(&c, 0, &[identity("1")]).await;
    assert_eq!(others(&told), [["b"]]);
    assert!(told[0].others[0].seen > first[1], "a sign of life: {told:?}, {first:?}");
    // Who is forgotten for its silence gives none.
    let _ = moment().await;
    c.beat().await.expect("takes it");
    c.adopt(Left::Silent(Duration::from_millis(100))).await.expect("answers");
    let told = begin(&c, 0, &[identity("1")]).await;
    assert_eq!(
        (others(&told), told[0].others[0].seen),
        (vec![vec!["b"]], None),
        "but the one that ended well is still known"
    );
}

/// The others that each answer names.
fn others(starts: &[Start]) -> Vec<Vec<&str>> {
    starts.iter().map(|start| start.others.iter().map(|other| other.run.as_str()).collect()).collect()
}

/// Starts where so many others may be known.
async fn begin(store: &Arc<dyn Store>, most: u32, events: &[Identity]) -> Vec<Start> {
    let begin = |event: &Identity| Begin { event: *event, before: None, most };
    store.start(events.iter().map(begin).collect()).await.expect("answers")
}

pub(super) async fn a_commit_ends_the_start(candidate: &Candidate) {
    let (store, other) = ((candidate.open)("a"), (candidate.open)("b"));
    let [x, y] = ["x", "y"].map(identity);
    begin(&store, 1, &[x, y]).await;
    store.note(x, 3).await.expect("takes it");
    let nothing = Start { kept: true, ..Start::default() };
    assert!(is_fresh(&store, Effect { started: Some(x), ..done("x") }).await);
    assert_eq!(begin(&other, 9, &[x]).await[0], nothing);
    assert!(!is_fresh(&store, Effect { started: Some(x), ..done("x") }).await);
    let after = begin(&store, 9, &[x]).await;
    assert_eq!(after[0], nothing, "a superseded one has ended too");
    assert_eq!(others(&begin(&other, 9, &[y]).await), [["a"]], "its neighbour has not");
}

pub(super) async fn only_what_is_old_is_pruned(candidate: &Candidate) {
    let store = (candidate.open)("a");
    let names = |what: &str| (0..2000).map(|i| format!("{what} {i}")).collect::<Vec<_>>();
    let (old, young) = (names("old"), names("young"));
    let effects = |names: &[String]| names.iter().map(|name| done(name)).collect::<Vec<_>>();
    commit(&store, effects(&old)).await;
    begin(&store, 1, &[identity("old start")]).await;
    let before = Instant::now();
    let _ = moment().await;
    // A worker prunes every few seconds; a store may make room for what comes next.
    for _ in 0..3 {
        store.prune(before.elapsed() / 2).await.expect("answers");
    }
    let moment = moment().await;
    commit(&store, effects(&young)).await;
    begin(&store, 1, &[identity("young start")]).await;

    for _ in 0..256 {
        store.prune(moment.elapsed()).await.expect("answers");
    }
    let known = |names: &[String]| store.look(names.iter().map(|name| seen(name, 0)).collect());
    assert!(known(&old).await.expect("answers").iter().all(Option::is_none));
    assert!(known(&young).await.expect("answers").iter().all(Option::is_some));
    let other = (candidate.open)("b");
    let starts = begin(&other, 0, &[identity("old start"), identity("young start")]).await;
    assert_eq!(others(&starts), [vec![], vec!["a"]]);
    assert_eq!(outbox(candidate).await.len(), 4000, "what is not sent is never pruned");
}

pub(super) async fn the_identity_is_the_store_s(candidate: &Candidate) {
    let first = (candidate.open)("a").identity().to_owned();
    assert!(!first.is_empty());
    let (again, other) = ((candidate.open)("a"), (candidate.open)("b"));
    assert_eq!([again.identity(), other.identity()], [&first, &first]);
}

pub(super) async fn what_was_committed_outlives_the_worker(candidate: &Candidate) {
    let store = (candidate.open)("a");
    // The caller is dropped by a drain, the commit is not.
    drop(store.commit(Arc::new(vec![done("unheard")])));
    assert!(is_fresh(&store, done("1")).await);
    begin(&store, 1, &[identity("2")]).await;
    drop(store);
    let successor = (candidate.open)("b");
    assert!(is_known(&successor, "1", 0).await);
    assert_eq!(others(&begin(&successor, 1, &[identity("2")]).await), [["a"]]);
    assert_eq!(ids(&successor.adopt(Left::In("p00".into())).await.expect("answers")), ["unheard", "1"]);
}

pub(super) async fn of_racing_workers_one_commits(candidate: &Candidate) {
    const EVENTS: usize = 200;
    let workers = ["a", "b", "c"].map(|name| (candidate.open)(name));
    let race = |(turn, store): (usize, Arc<dyn Store>)| {
        tokio::spawn(async move {
            let mut fresh = Vec::new();
            // Everyone goes the same way, from another place: they meet again and again.
            let order: Vec<usize> = (0..EVENTS).map(|i| (i + turn * 7) % EVENTS).collect();
            for batch in order.chunks(10) {
                store.adopt(Left::In("elsewhere".into())).await.expect("reading before writing gets in nobody's way");
                let recorded = commit(&store, batch.iter().map(|i| done(&i.to_string())).collect()).await;
                for (i, recorded) in batch.iter().zip(recorded) {
                    if let Recorded::Fresh(_, rows) = recorded {
                        fresh.push((*i, rows[0]));
                    }
                }
            }
            fresh
        })
    };
    let mut winners = HashMap::new();
    for fresh in futures_util::future::join_all(workers.into_iter().enumerate().map(race)).await {
        for (event, row) in fresh.expect("it does not panic") {
            assert!(winners.insert(event, row).is_none(), "{event} has two outcomes");
        }
    }
    assert_eq!(winners.len(), EVENTS);
    let rows = outbox(candidate).await;
    assert_eq!(ids(&rows).into_iter().collect::<BTreeSet<_>>().len(), EVENTS);
    assert!(
        rows.iter()
            .all(|row| ids(std::slice::from_ref(row))[0].parse().is_ok_and(|event: usize| winners[&event] == row.id))
    );
}

pub(super) async fn nothing_asked_is_nothing_done(candidate: &Candidate) {
    let store = (candidate.open)("a");
    assert!(store.look(Vec::new()).await.expect("answers").is_empty());
    assert!(begin(&store, 1, &[]).await.is_empty());
    assert!(commit(&store, Vec::new()).await.is_empty());
    store.unstart(Vec::new()).await.expect("takes it");
    store.sent(Vec::new()).await.expect("takes it");
    assert_eq!(store.prune(Duration::from_secs(1)).await.expect("answers"), 0);
}
