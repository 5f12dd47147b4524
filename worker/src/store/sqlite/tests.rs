//! The exam, and what only a file can do wrong.
use super::*;
use crate::store::Outcome;
use crate::store::exam::{Candidate, Model, exam};
use std::sync::Barrier;
use warren_shared::Message;

fn candidate() -> Candidate {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("warren.db");
    let open = move |worker: &str| -> Arc<dyn Store> { Arc::new(Sqlite::open(&path, worker).expect("it opens")) };
    Candidate { open: Box::new(open), _keep: Box::new(directory) }
}

exam!(candidate());

fn first(event: &str) -> Begin {
    Begin { event: Identity::of("/tests", event), before: None, most: 0 }
}

fn effect(id: &str, size: usize) -> Effect {
    let seen = Some(Seen { identity: Identity::of("/tests", id), replayed: 0 });
    let out = vec![Message { body: vec![b'x'; size], ..Message::default() }];
    Effect { seen, outcome: Outcome::Done, started: None, partition: "p00".into(), out, change: None }
}

/// Cannot be opened; says why, and what to do.
fn refuses(path: &Path, wanted: &str) {
    match Sqlite::open(path, "a") {
        Err(StoreError::Open { path: named, cause, cure }) => {
            assert_eq!(named, path.display().to_string());
            assert!(!cause.is_empty());
            assert!(cure.contains(wanted), "{cure}");
        }
        other => panic!("{path:?}: {other:?}"),
    }
}

#[test]
fn eight_workers_open_a_new_file_at_once() {
    for _ in 0..10 {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("warren.db");
        let line = Barrier::new(8);
        let open = |worker: usize| {
            line.wait();
            Sqlite::open(&path, &worker.to_string()).map(|store| store.identity)
        };
        let open = &open;
        let identities: Vec<String> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|worker| scope.spawn(move || open(worker))).collect();
            threads.into_iter().map(|t| t.join().expect("no panic").expect("it opens")).collect()
        });
        assert!(identities.iter().all(|identity| *identity == identities[0]), "{identities:?}");
    }
}

#[tokio::test]
async fn what_the_file_cannot_hold_is_refused_whole_and_for_good() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("warren.db");
    let store = Sqlite::open(&path, "a").expect("it opens");
    let refuse =
        "CREATE TRIGGER never BEFORE INSERT ON outbox WHEN length(NEW.body) = 7 BEGIN SELECT RAISE(ABORT, 'no'); END";
    Connection::open(&path).and_then(|c| c.execute_batch(refuse)).expect("made");
    let refused = store.commit(Arc::new(vec![effect("1", 1), effect("2", 7)])).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    let recorded = store.commit(Arc::new(vec![effect("1", 1)])).await.expect("takes it");
    assert!(matches!(recorded[..], [Recorded::Fresh(..)]), "a part of the batch was recorded: {recorded:?}");
}

#[tokio::test]
async fn a_row_of_the_outbox_that_cannot_be_read_keeps_no_other_from_its_next_owner() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("warren.db");
    let effects = ["1", "2", "3"].map(|id| effect(id, 1));
    let _ = Sqlite::open(&path, "a").expect("it opens").commit(Arc::new(effects.into())).await.expect("takes them");
    let odd = "UPDATE outbox SET envelope = '{' WHERE id = (SELECT min(id) FROM outbox)";
    let other = Connection::open(&path).expect("it opens");
    other.execute(odd, []).expect("done");
    let adopted = Sqlite::open(&path, "b").expect("it opens").adopt(Left::In("p00".into())).await.expect("answers");
    let there = other.query_row("SELECT count(*) FROM outbox", [], |row| row.get::<_, i64>(0)).expect("a number");
    assert_eq!((adopted.len(), there), (2, 3));
}

#[test]
fn a_new_file_is_read_by_its_user_alone_and_one_that_is_there_stays_as_it_is() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("warren.db");
    let mode = |file: &str| {
        let metadata = std::fs::metadata(directory.path().join(file)).expect("it is there");
        metadata.permissions().mode() & 0o777
    };
    let store = Sqlite::open(&path, "a").expect("it opens");
    assert_eq!(["warren.db", "warren.db-wal", "warren.db-shm"].map(mode), [0o600; 3]);
    drop(store);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("ours");
    let _store = Sqlite::open(&path, "b").expect("it opens");
    assert_eq!(mode("warren.db"), 0o640);
}

#[test]
fn a_file_of_a_newer_version_is_left_alone() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("warren.db");
    drop(Sqlite::open(&path, "a").expect("it opens"));
    let newer = SCHEMA.len() as i64 + 1;
    Connection::open(&path).and_then(|c| c.pragma_update(None, "user_version", newer)).expect("set");
    match Sqlite::open(&path, "a") {
        Err(StoreError::Newer { found, known }) => assert_eq!((found, known), (newer, newer - 1)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_cannot_be_a_store_is_refused_with_a_cure() {
    let directory = tempfile::tempdir().expect("a directory");
    let text = directory.path().join("notes.txt");
    std::fs::write(&text, "no database at all, but long enough to be looked at ".repeat(100)).expect("written");
    refuses(&text, "set DATABASE_URL to another");
    assert!(std::fs::read_to_string(&text).expect("still text").starts_with("no database"));
    refuses(&directory.path().join("missing/warren.db"), "directory");
    refuses(directory.path(), "directory");
    refuses(Path::new("/dev/null/warren.db"), "directory");
    refuses(Path::new("/proc/warren.db"), "directory");
}

#[test]
fn a_database_of_somebody_else_is_left_alone() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("theirs.db");
    Connection::open(&path).and_then(|c| c.execute_batch("CREATE TABLE theirs (x)")).expect("made");
    refuses(&path, "set DATABASE_URL to another");
    let tables =
        Connection::open(&path).and_then(|c| c.query_row("SELECT count(*) FROM sqlite_master", [], |r| r.get(0)));
    assert_eq!(tables, Ok(1_i64));
}

#[tokio::test]
async fn a_full_disk_changes_nothing_and_is_no_end() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("warren.db");
    let store = Sqlite::open(&path, "a").expect("it opens");
    assert!(matches!(store.commit(Arc::new(vec![effect("1", 10)])).await.expect("room")[..], [Recorded::Fresh(..)]));
    let limit =
        |pages: i64| store.run(move |tx| tx.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(())));
    limit(1).await.expect("set to what there is");

    let large = Arc::new(vec![effect("2", 10), effect("3", 1 << 20)]);
    for _ in 0..2 {
        match store.commit(large.clone()).await {
            Err(StoreError::Unavailable(cause)) => assert!(cause.contains("full"), "{cause}"),
            other => panic!("{other:?}"),
        }
    }
    let asked = ["1", "2", "3"].map(|id| Seen { identity: Identity::of("/tests", id), replayed: 0 }).to_vec();
    let known: Vec<bool> = store.look(asked).await.expect("answers").iter().map(Option::is_some).collect();
    assert_eq!(known, [true, false, false], "nothing of the batch is there");

    limit(1 << 30).await.expect("room again");
    let recorded = store.commit(large).await.expect("room");
    assert!(matches!(recorded[..], [Recorded::Fresh(..), Recorded::Fresh(..)]), "{recorded:?}");
    let rows = Sqlite::open(&path, "b").expect("it opens").adopt(Left::In("p00".into())).await.expect("answers");
    assert_eq!(rows.iter().map(|row| row.message.body.len()).collect::<Vec<_>>(), [10, 10, 1 << 20]);
}

#[tokio::test]
async fn a_store_that_another_holds_locked_is_read_and_says_so_when_written() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("warren.db");
    let store = Sqlite::open(&path, "a").expect("it opens");
    store.run(|tx| tx.busy_timeout(Duration::from_millis(50))).await.expect("set");
    let other = Connection::open(&path).expect("it opens");
    other.execute_batch("BEGIN IMMEDIATE").expect("locked");
    let seen = vec![effect("1", 0).seen.expect("set")];
    assert!(store.look(seen.clone()).await.expect("reading never waits")[0].is_none());
    let effects = Arc::new(vec![effect("1", 0)]);
    assert!(
        matches!(store.commit(effects.clone()).await, Err(StoreError::Unavailable(cause)) if cause.contains("locked"))
    );
    other.execute_batch("ROLLBACK").expect("free");
    assert!(matches!(store.commit(effects).await.expect("free")[..], [Recorded::Fresh(..)]));
}

#[tokio::test]
async fn the_file_is_durable_by_its_settings() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Sqlite::open(&directory.path().join("warren.db"), "a").expect("it opens");
    let ask = |pragma: &'static str| {
        store
            .run(move |tx| tx.query_row(&format!("PRAGMA {pragma}"), [], |row| row.get::<_, rusqlite::types::Value>(0)))
    };
    assert_eq!(ask("journal_mode").await.expect("answers"), rusqlite::types::Value::Text("wal".into()));
    assert_eq!(ask("synchronous").await.expect("answers"), rusqlite::types::Value::Integer(2));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]
    #[test]
    fn three_processes_and_every_seal_agree_with_the_simplest_inbox(
        batches in proptest::collection::vec(
            (0_usize..3, proptest::collection::vec((0_u16..1500, 0_u32..3, 0_u8..6), 1..90)), 1..40),
        reopened in 0_usize..40,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("warren.db");
        let open = |worker: usize| Sqlite::open(&path, &worker.to_string()).expect("it opens");
        let mut stores = [open(0), open(1), open(2)];
        let mut model = Model::default();
        for (step, (who, batch)) in batches.into_iter().enumerate() {
            if step == reopened {
                stores[who] = open(who);
            }
            let seen = |(id, replayed): (u16, u32)| Seen { identity: Identity::of("/m", &id.to_string()), replayed };
            let outcome = |dice: u8| if dice == 0 { Outcome::Dead } else { Outcome::Done };
            let effects: Vec<Effect> = batch.iter().map(|(id, replayed, dice)| Effect {
                seen: Some(seen((*id, *replayed))), outcome: outcome(*dice), started: None,
                partition: "p00".into(), out: Vec::new(), change: None,
            }).collect();
            let known: Vec<bool> = batch.iter().map(|(id, replayed, _)| model.knows(*id, *replayed)).collect();
            let looked = runtime.block_on(stores[(who + 1) % 3].look(effects.iter().filter_map(|e| e.seen).collect()));
            let looked: Vec<bool> = looked.expect("answers").iter().map(Option::is_some).collect();
            proptest::prop_assert_eq!(looked, known);
            let fresh: Vec<bool> = batch.iter().map(|(id, r, dice)| model.record(*id, *r, outcome(*dice))).collect();
            let recorded = runtime.block_on(stores[who].commit(Arc::new(effects))).expect("takes them");
            let recorded: Vec<bool> = recorded.iter().map(|r| matches!(r, Recorded::Fresh(..))).collect();
            proptest::prop_assert_eq!(recorded, fresh);
        }
    }
}

#[tokio::test]
async fn a_run_is_forgotten_whole_with_the_deaths_in_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("warren.db");
    let (ours, theirs) = (Sqlite::open(&path, "a").expect("it opens"), Sqlite::open(&path, "b").expect("it opens"));
    let (old, young) = (named("old", 300, Outcome::Dead), named("young", 300, Outcome::Dead));
    ours.commit(Arc::new(old.clone())).await.expect("takes them");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let moment = Instant::now();
    theirs.commit(Arc::new(young.clone())).await.expect("takes them");
    assert_eq!((known(&ours, &old).await, known(&theirs, &young).await), (300, 300));

    assert_eq!(ours.prune(moment.elapsed() + Duration::from_millis(100)).await.expect("answers"), 300);
    assert_eq!(deaths(&ours).await, 300, "the deaths of what is known, and no others");
    for store in [&ours, &Sqlite::open(&path, "c").expect("it opens")] {
        assert_eq!((known(store, &old).await, known(store, &young).await), (0, 300));
    }
    // A death that is forgotten leaves nothing behind: the event is new, and its success is one.
    let done: Vec<Effect> = old.into_iter().map(|effect| Effect { outcome: Outcome::Done, ..effect }).collect();
    let recorded = ours.commit(Arc::new(done.clone())).await.expect("takes them");
    assert!(recorded.iter().all(|recorded| matches!(recorded, Recorded::Fresh(..))));
    assert_eq!(known(&ours, &replayed(&done)).await, 300, "a success is final");
}

#[tokio::test]
async fn what_is_too_little_for_a_run_is_forgotten_too() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Sqlite::open(&directory.path().join("warren.db"), "a").expect("it opens");
    let (old, young) = (named("old", 10, Outcome::Dead), named("young", 20, Outcome::Dead));
    store.commit(Arc::new(old.clone())).await.expect("takes them");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let moment = Instant::now();
    store.commit(Arc::new(young.clone())).await.expect("takes them");

    assert_eq!(store.prune(moment.elapsed() + Duration::from_millis(100)).await.expect("answers"), 10);
    assert_eq!((known(&store, &old).await, known(&store, &young).await), (0, 20));
    assert_eq!(deaths(&store).await, 20);
}

#[tokio::test]
async fn every_old_outcome_and_start_is_counted_as_it_goes() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Sqlite::open(&directory.path().join("warren.db"), "a").expect("it opens");
    store.commit(Arc::new(named("old", 2000, Outcome::Done))).await.expect("takes them");
    store.start(vec![first("old start")]).await.expect("answers");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let moment = Instant::now();
    store.commit(Arc::new(named("young", 2000, Outcome::Done))).await.expect("takes them");
    store.start(vec![first("young start")]).await.expect("answers");
    let mut gone = 0;
    for _ in 0..256 {
        gone += store.prune(moment.elapsed() + Duration::from_millis(100)).await.expect("answers");
    }
    assert_eq!(gone, 2001);
}

/// As far as the store is concerned, a step of the clock by a month is that everything in it was written a month before.
#[tokio::test]
async fn a_step_of_the_clock_makes_nothing_older() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("warren.db");
    let store = Sqlite::open(&path, "a").expect("it opens");
    let (sealed, recent) = (named("sealed", 300, Outcome::Dead), named("recent", 20, Outcome::Done));
    store.commit(Arc::new(sealed.clone())).await.expect("takes them");
    store.commit(Arc::new(recent.clone())).await.expect("takes them");
    store.start(vec![first("start")]).await.expect("answers");
    store.beat().await.expect("takes it");
    drop(store);
    let month = 30 * 86_400_000_i64;
    let earlier = format!(
        "UPDATE inbox SET at = at - {month}; UPDATE runs SET newest = newest - {month}; UPDATE dead SET at = at - {month};
         UPDATE starts SET at = at - {month}; UPDATE workers SET seen = seen - {month};
         UPDATE meta SET value = value - {month} WHERE name = 'time'"
    );
    Connection::open(&path).and_then(|connection| connection.execute_batch(&earlier)).expect("done");
    let store = Sqlite::open(&path, "b").expect("it opens");
    store.beat().await.expect("takes it");
    for _ in 0..256 {
        assert_eq!(store.prune(Duration::from_secs(7 * 86_400)).await.expect("answers"), 0);
    }
    assert_eq!((known(&store, &sealed).await, known(&store, &recent).await), (300, 20));
    assert_eq!(deaths(&store).await, 300);
    // Nor is a worker silent that was heard of a moment ago.
    assert_eq!(store.adopt(Left::Silent(Duration::from_secs(20))).await.expect("answers"), []);
}

#[tokio::test]
async fn a_file_belongs_to_the_pool_that_used_it_first() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("warren.db");
    let open = |worker: &str| Sqlite::open(&path, worker).expect("it opens");
    for worker in ["a", "b"] {
        open(worker).of_pool("orders").await.expect("it is ours");
    }
    match open("c").of_pool("payments").await {
        Err(StoreError::Open { cause, cure, .. }) => {
            assert!(cause.contains("'orders'") && cause.contains("'payments'") && cure.contains("DATABASE_URL"));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_death_is_remembered_as_long_as_the_run_that_it_is_in() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Sqlite::open(&directory.path().join("warren.db"), "a").expect("it opens");
    let dead = named("dead", 10, Outcome::Dead);
    store.commit(Arc::new(named("run", 300, Outcome::Done))).await.expect("takes them");
    store.commit(Arc::new(dead.clone())).await.expect("takes them");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let moment = Instant::now();
    // Sealed in one run with what comes now, which is younger.
    store.commit(Arc::new(named("young", 300, Outcome::Done))).await.expect("takes them");

    assert_eq!(store.prune(moment.elapsed() + Duration::from_millis(100)).await.expect("answers"), 300);
    assert_eq!(known(&store, &dead).await, 10);
    assert_eq!(deaths(&store).await, 10, "else they would pass for successes");
    assert_eq!(known(&store, &replayed(&dead)).await, 0, "a replay is still a new chance");
}

/// So many effects with names of their own.
fn named(what: &str, count: usize, outcome: Outcome) -> Vec<Effect> {
    let name = |i| Effect { outcome, out: vec![], ..effect(&format!("{what} {i}"), 0) };
    (0..count).map(name).collect()
}

/// The same, each from its next replay.
fn replayed(effects: &[Effect]) -> Vec<Effect> {
    let later = |effect: &Effect| Effect {
        seen: effect.seen.map(|seen| Seen { replayed: seen.replayed + 1, ..seen }),
        ..effect.clone()
    };
    effects.iter().map(later).collect()
}

/// How many of them have an outcome that stands.
async fn known(store: &Sqlite, effects: &[Effect]) -> usize {
    let answers = store.look(effects.iter().filter_map(|effect| effect.seen).collect()).await.expect("answers");
    answers.iter().filter(|known| known.is_some()).count()
}

async fn deaths(store: &Sqlite) -> i64 {
    let count = |tx: &Transaction<'_>| tx.query_row("SELECT count(*) FROM dead", [], |row| row.get(0));
    store.run(count).await.expect("answers")
}
