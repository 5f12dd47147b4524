//! What every store does with states.
use super::*;
use crate::store::{Change, Kept, Listed, State};
use uuid::Uuid;

fn state(status: &str, body: &str) -> State {
    let [kind, name, key] = ["process", "order", "k1"].map(str::to_owned);
    State { kind, name, status: status.into(), key, ended: status == "ended", due: None, body: body.into() }
}

fn id(n: u128) -> Uuid {
    // Spread over all slices of a store that prunes by them.
    Uuid::new_v5(&Uuid::NAMESPACE_OID, &n.to_be_bytes())
}

/// An event's success, which turns version `found` of a state into this one.
fn changing(event: &str, n: u128, found: i64, body: &str) -> Effect {
    Effect { change: Some(Change { id: id(n), found, state: state("running", body) }), ..done(event) }
}

async fn load(store: &Arc<dyn Store>, n: u128) -> Option<Kept> {
    store.load(vec![id(n)]).await.expect("answers").pop().expect("an answer each")
}

/// Version and body.
async fn stands(store: &Arc<dyn Store>, n: u128) -> (i64, String) {
    let kept = load(store, n).await;
    kept.map_or((0, String::new()), |kept| (kept.version, String::from_utf8(kept.state.body).expect("text")))
}

fn words(recorded: &[Recorded]) -> Vec<&'static str> {
    let word = |recorded: &Recorded| match recorded {
        Recorded::Fresh(..) => "fresh",
        Recorded::Recovered(..) => "recovered",
        Recorded::Superseded(_) => "superseded",
        Recorded::Outdated => "outdated",
    };
    recorded.iter().map(word).collect()
}

pub(in super::super) async fn a_state_changes_with_its_event(candidate: &Candidate) {
    let store = (candidate.open)("a");
    assert_eq!(load(&store, 1).await, None);
    assert!(is_fresh(&store, changing("1", 1, 0, "one")).await);
    let first = load(&store, 1).await.expect("it is kept");
    assert_eq!((first.version, &first.state), (1, &state("running", "one")));
    let _ = moment().await;
    assert!(is_fresh(&store, changing("2", 1, 1, "two")).await);
    let second = load(&(candidate.open)("b"), 1).await.expect("it is kept");
    assert_eq!((second.version, second.begun), (2, first.begun));
    assert!(second.changed > first.changed, "{second:?}");
    assert_eq!(second.state, state("running", "two"));
    let both = store.load(vec![id(7), id(1)]).await.expect("answers");
    assert!(both[0].is_none() && both[1].as_ref().is_some_and(|kept| kept.version == 2), "{both:?}");
}

pub(in super::super) async fn what_rests_on_an_outdated_state_is_dropped_whole(candidate: &Candidate) {
    let store = (candidate.open)("a");
    commit(&store, vec![changing("1", 1, 0, "one"), changing("2", 2, 0, "other")]).await;
    begin(&store, 1, &[identity("3")]).await;
    let stale = Effect { started: Some(identity("3")), ..changing("3", 1, 0, "again") };
    let ahead = changing("4", 1, 2, "ahead");
    let unknown = changing("5", 9, 1, "no such");
    let recorded = commit(&store, vec![stale, ahead, unknown, changing("6", 2, 1, "next"), done("7")]).await;
    assert_eq!(words(&recorded), ["outdated", "outdated", "outdated", "fresh", "fresh"]);
    assert_eq!((stands(&store, 1).await, stands(&store, 2).await), ((1, "one".into()), (2, "next".into())));
    assert_eq!(stands(&store, 9).await.0, 0);
    for event in ["3", "4", "5"] {
        assert!(!is_known(&store, event, 0).await, "{event}");
    }
    assert_eq!(others(&begin(&(candidate.open)("b"), 0, &[identity("3")]).await), [["a"]], "its start is not over");
    assert_eq!(ids(&outbox(candidate).await), ["1", "2", "6", "7"]);
    assert!(is_fresh(&store, changing("3", 1, 1, "again")).await, "with what stands there now");
}

pub(in super::super) async fn of_two_changes_in_a_batch_the_second_is_outdated(candidate: &Candidate) {
    let store = (candidate.open)("a");
    let new = commit(&store, vec![changing("1", 1, 0, "one"), changing("2", 1, 0, "two")]).await;
    let old = commit(&store, vec![changing("3", 1, 1, "three"), changing("4", 1, 1, "four")]).await;
    assert_eq!((words(&new), words(&old)), (vec!["fresh", "outdated"], vec!["fresh", "outdated"]));
    assert_eq!(stands(&store, 1).await, (2, "three".into()));
    assert!(is_fresh(&store, changing("2", 1, 2, "two")).await);
}

pub(in super::super) async fn a_known_event_changes_no_state(candidate: &Candidate) {
    let store = (candidate.open)("a");
    commit(&store, vec![done("1"), changing("2", 2, 0, "two")]).await;
    let again = vec![changing("1", 1, 0, "new"), changing("2", 2, 1, "old")];
    assert_eq!(words(&commit(&store, again).await), ["superseded", "superseded"]);
    assert_eq!((stands(&store, 1).await.0, stands(&store, 2).await), (0, (1, "two".into())));
    assert!(is_fresh(&store, changing("3", 1, 0, "new")).await, "nothing was left in its place");
    let twice = vec![changing("4", 4, 0, "four"), changing("4", 5, 0, "five")];
    assert_eq!(words(&commit(&store, twice).await), ["fresh", "superseded"]);
    assert_eq!((stands(&store, 4).await, stands(&store, 5).await.0), ((1, "four".into()), 0));
}

pub(in super::super) async fn racing_workers_count_a_state_up_without_a_gap(candidate: &Candidate) {
    const EVENTS: usize = 40;
    let workers = ["a", "b", "c"].map(|name| (candidate.open)(name));
    let count = |(who, store): (usize, Arc<dyn Store>)| {
        tokio::spawn(async move {
            for event in 0..EVENTS {
                // Two states in an order of their own, that nobody may lock another out.
                let mut left: Vec<u128> = if who == 1 { vec![2, 1] } else { vec![1, 2] };
                while !left.is_empty() {
                    let kept = store.load(left.iter().map(|n| id(*n)).collect()).await.expect("answers");
                    let next = |(n, kept): (&u128, Option<Kept>)| {
                        let found = kept.map_or(0, |kept| kept.version);
                        changing(&format!("{who} {event} {n}"), *n, found, &(found + 1).to_string())
                    };
                    let recorded = commit(&store, left.iter().zip(kept).map(next).collect()).await;
                    let mut recorded = recorded.iter();
                    left.retain(|_| matches!(recorded.next(), Some(Recorded::Outdated)));
                }
            }
        })
    };
    for ended in futures_util::future::join_all(workers.into_iter().enumerate().map(count)).await {
        ended.expect("it does not panic");
    }
    let store = (candidate.open)("d");
    for n in [1, 2] {
        assert_eq!(stands(&store, n).await, (3 * EVENTS as i64, (3 * EVENTS).to_string()));
    }
}

pub(in super::super) async fn states_are_listed_and_the_ended_ones_forgotten(candidate: &Candidate) {
    let store = (candidate.open)("a");
    let definition = State { kind: "definition".into(), name: "order".into(), ..state("", "steps") };
    store.keep(id(100), definition.clone()).await.expect("takes it");
    store.keep(id(100), State { body: b"other".to_vec(), ..definition.clone() }).await.expect("takes it");
    assert_eq!(load(&store, 100).await.expect("it is kept").state, definition, "the first one stays");

    let ended = |n: u128| {
        let state = State { name: "parcel".into(), ..state("ended", "over") };
        Effect { change: Some(Change { id: id(n), found: 0, state }), ..done(&format!("e{n}")) }
    };
    commit(&store, vec![ended(1), ended(2), changing("3", 3, 0, "runs"), changing("4", 4, 0, "runs")]).await;
    let moment = moment().await;
    commit(&store, vec![ended(5), changing("6", 4, 1, "runs")]).await;
    let listed = async |name: Option<&str>, status: Option<&str>, most| {
        let [name, status] = [name, status].map(|text| text.map(str::to_owned));
        let listed = store.list(Listed { kind: "process", name, status, most }).await.expect("answers");
        listed.into_iter().map(|(id, _)| id).collect::<Vec<_>>()
    };
    let all = listed(None, None, 10).await;
    assert_eq!(all.iter().collect::<BTreeSet<_>>(), [1, 2, 3, 4, 5].map(id).iter().collect());
    assert_eq!(
        all[..2].iter().collect::<BTreeSet<_>>(),
        [4, 5].map(id).iter().collect(),
        "what changed last comes first"
    );
    assert_eq!(listed(None, None, 1).await.len(), 1);
    assert_eq!(listed(Some("parcel"), None, 10).await.len(), 3);
    assert_eq!(listed(Some("order"), Some("running"), 10).await.len(), 2);
    assert!(listed(Some("order"), Some("ended"), 10).await.is_empty());

    for _ in 0..256 {
        store.prune(moment.elapsed()).await.expect("answers");
    }
    let left = listed(None, None, 10).await;
    assert_eq!(
        left.iter().collect::<BTreeSet<_>>(),
        [3, 4, 5].map(id).iter().collect(),
        "the old ones that ended are gone"
    );
    assert!(load(&store, 100).await.is_some());
}

pub(in super::super) async fn what_is_due_is_found_until_it_is_not(candidate: &Candidate) {
    let store = (candidate.open)("a");
    let due = |event: &str, n: u128, found: i64, due: Option<i64>| {
        let state = State { due, ..state("running", "x") };
        Effect { change: Some(Change { id: id(n), found, state }), ..done(event) }
    };
    commit(&store, vec![due("1", 1, 0, Some(300)), due("2", 2, 0, Some(100)), due("3", 3, 0, None)]).await;
    commit(&store, vec![due("4", 4, 0, Some(-5)), due("5", 5, 0, Some(200))]).await;
    let found = async |before, most| {
        let found = store.due("process", before, most).await.expect("answers");
        assert!(found.iter().all(|due| due.name == "order"), "{found:?}");
        found.into_iter().map(|due| (due.id, due.at)).collect::<Vec<_>>()
    };
    assert_eq!(found(300, 10).await, [(id(4), -5), (id(2), 100), (id(5), 200)]);
    assert_eq!(found(i64::MAX, 2).await, [(id(4), -5), (id(2), 100)]);
    assert!(store.due("gather", 1_000, 10).await.expect("answers").is_empty());
    commit(&store, vec![due("6", 4, 1, None), due("7", 2, 1, Some(250)), due("8", 3, 1, Some(1))]).await;
    assert_eq!(found(300, 10).await, [(id(3), 1), (id(5), 200), (id(2), 250)]);
    assert_eq!(load(&store, 2).await.map(|kept| kept.state.due), Some(Some(250)));
}

pub(in super::super) async fn what_has_not_ended_is_counted_by_name_and_status(candidate: &Candidate) {
    let store = (candidate.open)("a");
    let at = |event: &str, n: u128, name: &str, status: &str| {
        let state = State { name: name.into(), ..state(status, "x") };
        Effect { change: Some(Change { id: id(n), found: 0, state }), ..done(event) }
    };
    assert!(store.count("process").await.expect("answers").is_empty());
    commit(&store, vec![at("1", 1, "order", "stuck")]).await;
    let moment = moment().await;
    let others = [at("2", 2, "order", "stuck"), at("3", 3, "order", "running"), at("4", 4, "order", "ended")];
    commit(&store, others.into_iter().chain([at("5", 5, "parcel", "stuck")]).collect()).await;
    let mut counts = store.count("process").await.expect("answers");
    counts.sort_by_key(|count| (count.name.clone(), count.status.clone()));
    let shown: Vec<_> = counts.iter().map(|count| (&*count.name, &*count.status, count.states)).collect();
    assert_eq!(shown, [("order", "running", 1), ("order", "stuck", 2), ("parcel", "stuck", 1)]);
    assert!(counts[1].oldest >= moment.elapsed() && counts[1].oldest > counts[2].oldest, "{counts:?}");
    assert!(store.count("gather").await.expect("answers").is_empty());
}
