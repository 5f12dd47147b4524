//! The exam, and what only a server can do wrong. Each test has a schema of its own on the private server of
//! `scripts/postgres`.
use super::*;
use crate::store::exam::{Candidate, Model, exam};
use crate::store::{Change, Outcome};
use std::process::Command;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::runtime::Runtime;
use warren_shared::Message;
use warren_shared::env::Secret;

/// Where connections are opened whose tests are not asynchronous.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));

/// The server of `DATABASE_URL`, else the one that `scripts/test` has started, else the private one, started if need be.
static URL: LazyLock<String> = LazyLock::new(|| {
    let named = |variable| std::env::var(variable).ok().filter(|url| url.starts_with("postgres"));
    if let Some(url) = named("DATABASE_URL").or_else(|| named("WARREN_TEST_POSTGRES")) {
        return url;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/postgres");
    let output = Command::new(script).arg("start").output().expect("it can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
});

fn server() -> Server {
    Server::parse(&Secret::new(URL.as_str())).expect("a URL")
}

/// A pool that is dropped with its schema.
struct Pool(String);

impl Pool {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self(format!("exam-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)))
    }

    async fn open(&self, worker: &str) -> Postgres {
        Postgres::open(&server(), &self.0, worker, Duration::from_secs(10)).await.expect("it opens")
    }

    /// Runs statements as nobody's worker.
    async fn sql(&self, sql: &str) -> Vec<tokio_postgres::SimpleQueryMessage> {
        let (client, connection) = server().connect().await.expect("it connects");
        tokio::spawn(connection);
        client.simple_query(&sql.replace("{s}", &schema::name(&self.0))).await.expect("it is done")
    }

    /// A number that SQL answers with.
    async fn number(&self, sql: &str) -> i64 {
        let number = |message: &tokio_postgres::SimpleQueryMessage| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
            _ => None,
        };
        self.sql(sql).await.iter().find_map(number).expect("a number")
    }
}

/// Waits on the other runtime, from wherever.
fn wait<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    let (tell, told) = std::sync::mpsc::channel();
    RUNTIME.spawn(async move { drop(tell.send(work.await)) });
    told.recv().expect("it ends")
}

impl Drop for Pool {
    fn drop(&mut self) {
        let pool = Self(std::mem::take(&mut self.0));
        if !pool.0.is_empty() {
            wait(async move {
                pool.sql("SET client_min_messages = error; DROP SCHEMA IF EXISTS {s} CASCADE").await;
                std::mem::forget(pool);
            });
        }
    }
}

fn candidate() -> Candidate {
    let pool = Arc::new(Pool::new());
    let kept = pool.clone();
    let open = move |worker: &str| -> Arc<dyn Store> {
        let (pool, worker) = (pool.clone(), worker.to_owned());
        Arc::new(wait(async move { pool.open(&worker).await }))
    };
    Candidate { open: Box::new(open), _keep: Box::new(kept) }
}

exam!(candidate());

fn first(event: &str) -> Begin {
    Begin { event: Identity::of("/tests", event), before: None, most: 0 }
}

fn effect(id: &str, outcome: Outcome, replayed: u32) -> Effect {
    let seen = Some(Seen { identity: Identity::of("/tests", id), replayed });
    Effect { seen, outcome, started: None, partition: "p00".into(), out: vec![Message::default()], change: None }
}

async fn commit(store: &Postgres, effects: Vec<Effect>) -> Vec<bool> {
    let recorded = store.commit(Arc::new(effects)).await.expect("takes them");
    recorded.iter().map(|recorded| matches!(recorded, Recorded::Fresh(..))).collect()
}

async fn knows(store: &Postgres, id: &str, replayed: u32) -> bool {
    let asked = vec![Seen { identity: Identity::of("/tests", id), replayed }];
    store.look(asked).await.expect("answers")[0].is_some()
}

/// Two phases on: what is recorded now lies in another period than what comes.
async fn next_period(store: &Postgres) {
    let phase = || store.0.periods().phase;
    let from = phase();
    while phase() < from + 2 {
        store.prune(Duration::from_millis(1)).await.expect("answers");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_workers_make_the_schema_at_once() {
    let pool = Arc::new(Pool::new());
    let workers = (0..8).map(|n| {
        let pool = pool.clone();
        tokio::spawn(async move { pool.open(&n.to_string()).await.identity().to_owned() })
    });
    let identities: Vec<String> =
        futures_util::future::join_all(workers).await.into_iter().map(|joined| joined.expect("no panic")).collect();
    assert!(identities.iter().all(|identity| *identity == identities[0]), "{identities:?}");
}

#[tokio::test]
async fn a_row_of_the_outbox_that_cannot_be_read_keeps_no_other_from_its_next_owner() {
    let pool = Pool::new();
    commit(&pool.open("a").await, ["1", "2", "3"].map(|id| effect(id, Outcome::Done, 0)).into()).await;
    pool.sql("UPDATE {s}.outbox SET envelope = '{' WHERE id = (SELECT min(id) FROM {s}.outbox)").await;
    let adopted = pool.open("b").await.adopt(Left::In("p00".into())).await.expect("answers");
    assert_eq!((adopted.len(), pool.number("SELECT count(*) FROM {s}.outbox").await), (2, 3));
}

/// A change of a state whose key is this text.
fn keyed(id: &str, key: &str) -> Effect {
    let [kind, name, status] = ["gather", "all", "open"].map(str::to_owned);
    let state = State { kind, name, status, key: key.into(), ended: false, due: None, body: Vec::new() };
    Effect { change: Some(Change { id: Uuid::new_v4(), found: 0, state }), ..effect(id, Outcome::Done, 0) }
}

#[tokio::test]
async fn what_the_server_cannot_hold_is_refused_whole_and_for_good() {
    let pool = Pool::new();
    let store = pool.open("a").await;
    pool.sql("ALTER TABLE {s}.states ADD CHECK (key <> 'never')").await;
    for key in ["a\0b", "never"] {
        let effects = vec![keyed("1", "good"), keyed("2", key), effect("3", Outcome::Done, 0)];
        let refused = store.commit(Arc::new(effects)).await;
        assert!(matches!(refused, Err(StoreError::Refused(_))), "{key:?}: {refused:?}");
        assert!(!knows(&store, "1", 0).await && !knows(&store, "3", 0).await, "a part of the batch was recorded");
    }
    assert_eq!(commit(&store, vec![keyed("1", "good"), effect("3", Outcome::Done, 0)]).await, [true, true]);
    let gone = pool.sql("ALTER TABLE {s}.states RENAME TO elsewhere");
    gone.await;
    let passing = store.commit(Arc::new(vec![keyed("4", "good")])).await;
    assert!(matches!(passing, Err(StoreError::Unavailable(_))), "{passing:?}");
}

#[tokio::test]
async fn a_newer_schema_is_used_as_long_as_it_only_adds() {
    let pool = Pool::new();
    let older = pool.open("a").await;
    let add = "UPDATE {s}.meta SET value = '999' WHERE name = 'version'; ALTER TABLE {s}.starts ADD COLUMN later text";
    pool.sql(add).await;
    // Who runs goes on, and another of this version may start.
    assert_eq!(commit(&older, vec![effect("1", Outcome::Done, 0)]).await, [true]);
    let another = pool.open("b").await;
    assert!(knows(&another, "1", 0).await);
    another.start(vec![first("2")]).await.expect("answers");
    pool.sql("UPDATE {s}.meta SET value = '999' WHERE name = 'needs'").await;
    match Postgres::open(&server(), &pool.0, "c", Duration::ZERO).await {
        Err(StoreError::Newer { found: 999, known }) => assert_eq!(known, i64::from(schema::KNOWN)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn pools_share_a_database_and_nothing_else() {
    let (ours, theirs) = (Pool::new(), Pool::new());
    let (a, b) = (ours.open("a").await, theirs.open("a").await);
    assert_ne!(a.identity(), b.identity());
    assert_eq!(commit(&a, vec![effect("1", Outcome::Done, 0)]).await, [true]);
    assert_eq!(commit(&b, vec![effect("1", Outcome::Done, 0)]).await, [true], "the same event is every pool's");
    assert!(b.adopt(Left::Silent(Duration::ZERO)).await.expect("answers").is_empty());
}

#[tokio::test]
async fn a_commit_waits_for_the_disk_whatever_the_default_is() {
    let pool = Pool::new();
    let open = async |setting: &str| {
        let url = format!("{}?options=-c%20synchronous_commit%3D{setting}", URL.as_str());
        let server = Server::parse(&Secret::new(url)).expect("a URL");
        let store = Postgres::open(&server, &pool.0, setting, Duration::from_secs(10)).await.expect("it opens");
        let rows = store.0.write("SELECT current_setting('synchronous_commit')", &[]).await.expect("answers");
        rows[0].get::<_, String>(0)
    };
    assert_eq!((open("off").await.as_str(), open("local").await.as_str()), ("on", "local"));
}

#[test]
fn names_of_schemas_are_short_and_different() {
    let long = |end: char| format!("{}{end}", "p".repeat(63));
    let names = ["a-b", "a", &long('x'), &long('y')].map(schema::name);
    assert_eq!(names[..2], ["warren_a_b", "warren_a"]);
    assert!(names[2] != names[3] && names.iter().all(|name| name.len() <= 63), "{names:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_workers_that_race_through_changing_periods_one_records_each_event() {
    let pool = Arc::new(Pool::new());
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let turner = {
        let (pool, stop) = (pool.clone(), stop.clone());
        tokio::spawn(async move {
            let store = pool.open("turner").await;
            let mut turns = 0;
            // Within the hour nothing is forgotten: every table that is added is one more to look at.
            while turns < 60 && !stop.load(Ordering::Relaxed) {
                let before = store.0.periods().phase;
                periods_turn(&store).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
                turns += store.0.periods().phase - before;
            }
            turns
        })
    };
    // Each of them records all events, in batches of different sizes and from different ends.
    let workers = (0..4_usize).map(|worker| {
        let pool = pool.clone();
        tokio::spawn(async move {
            let store = pool.open(&worker.to_string()).await;
            let mut ids: Vec<usize> = (0..1500).collect();
            if worker % 2 == 1 {
                ids.reverse();
            }
            let mut fresh = Vec::new();
            for batch in ids.chunks(1 + worker * 5) {
                let effects = batch.iter().map(|id| effect(&id.to_string(), Outcome::Done, 0)).collect();
                let recorded = commit(&store, effects).await;
                fresh.extend(batch.iter().zip(recorded).filter(|(_, fresh)| *fresh).map(|(id, _)| *id));
            }
            fresh
        })
    });
    let mut fresh: Vec<usize> = Vec::new();
    for worker in futures_util::future::join_all(workers).await {
        fresh.extend(worker.expect("no panic"));
    }
    stop.store(true, Ordering::Relaxed);
    let turns = turner.await.expect("no panic");
    fresh.sort_unstable();
    assert_eq!(fresh, (0..1500).collect::<Vec<_>>(), "each once");
    assert!(turns >= 4, "the periods changed {turns} times");
    assert_eq!(pool.number("SELECT count(*) FROM {s}.outbox").await, 1500, "and its effect once");
}

/// Goes on to the next phase, whatever the time; forgets nothing.
async fn periods_turn(store: &Postgres) {
    let lease = store.0.sessions.lease().await.expect("a connection");
    let age = format!("UPDATE {}.phase SET since = since - interval '1 hour'", store.0.schema);
    lease.batch_execute(&age).await.expect("done");
    lease.keep();
    store.prune(Duration::from_secs(3600)).await.expect("answers");
}

#[tokio::test]
async fn a_period_goes_whole_with_its_deaths_and_no_other() {
    let pool = Pool::new();
    let (ours, theirs) = (pool.open("a").await, pool.open("b").await);
    let named = |what: &str, outcome| (0..50).map(|n| effect(&format!("{what} {n}"), outcome, 0)).collect::<Vec<_>>();
    commit(&ours, named("old", Outcome::Dead)).await;
    next_period(&ours).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let moment = Instant::now();
    commit(&theirs, named("young", Outcome::Dead)).await;
    assert_eq!(pool.number("SELECT count(*) FROM {s}.periods").await, 2);
    // Until it is told, the other one looks at tables that are gone.
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        ours.prune(moment.elapsed() + Duration::from_millis(100)).await.expect("answers");
    }
    for store in [&ours, &theirs] {
        assert!(!knows(store, "old 7", 0).await && knows(store, "young 7", 0).await);
        assert!(!knows(store, "young 7", 1).await, "a replay of the dead is a new chance");
    }
    assert_eq!(pool.number("SELECT count(*) FROM {s}.dead").await, 50, "the deaths of what is known, and no others");
    assert_eq!(commit(&theirs, named("old", Outcome::Done)).await, [true; 50], "what is forgotten is new");
    assert!(knows(&ours, "old 7", 9).await, "a success is final");
    let tables = "SELECT count(*) FROM pg_tables WHERE schemaname = '{s}' AND tablename LIKE 'inbox%'";
    assert!(pool.number(tables).await <= 4);
}

/// As far as the store is concerned, a step of the server's clock by a month is that everything in it was written a month before.
#[tokio::test]
async fn a_step_of_the_clock_makes_nothing_older() {
    let pool = Pool::new();
    let store = pool.open("a").await;
    commit(&store, vec![effect("1", Outcome::Done, 0)]).await;
    next_period(&store).await;
    commit(&store, vec![effect("2", Outcome::Dead, 0)]).await;
    store.start(vec![first("start")]).await.expect("answers");
    store.beat().await.expect("takes it");
    let month = 30 * 86_400_000_i64;
    let earlier = format!(
        "UPDATE {{s}}.phase SET since = since - interval '30 days'; UPDATE {{s}}.periods SET closed = closed - interval '30 days';
         UPDATE {{s}}.starts SET at = at - interval '30 days'; UPDATE {{s}}.workers SET seen = seen - interval '30 days';
         UPDATE {{s}}.meta SET value = (value::bigint - {month})::text WHERE name = 'time'"
    );
    pool.sql(&earlier).await;
    let store = pool.open("b").await;
    store.beat().await.expect("takes it");
    let phase = store.0.periods().phase;
    for _ in 0..4 {
        assert_eq!(store.prune(Duration::from_secs(7 * 86_400)).await.expect("answers"), 0);
    }
    assert_eq!(store.0.periods().phase, phase, "a period gave way");
    assert!(knows(&store, "1", 0).await && knows(&store, "2", 0).await);
    assert_eq!(store.adopt(Left::Silent(Duration::from_secs(20))).await.expect("answers"), []);
    assert_eq!(pool.number("SELECT count(*) FROM {s}.starts").await, 1);
}

#[tokio::test]
async fn the_time_to_remember_a_replay_begins_anew() {
    let pool = Pool::new();
    let store = pool.open("a").await;
    commit(&store, vec![effect("1", Outcome::Dead, 0)]).await;
    next_period(&store).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let moment = Instant::now();
    assert_eq!(commit(&store, vec![effect("1", Outcome::Done, 1)]).await, [true]);
    // The period of its death goes.
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        store.prune(moment.elapsed() + Duration::from_millis(100)).await.expect("answers");
        assert!(knows(&store, "1", 0).await);
    }
    assert_eq!(pool.number("SELECT min(period) FROM {s}.periods").await, 1);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(6))]
    #[test]
    fn two_workers_and_every_change_of_period_agree_with_the_simplest_inbox(
        batches in proptest::collection::vec(
            (0_usize..2, proptest::bool::ANY, proptest::collection::vec((0_u16..60, 0_u32..3, 0_u8..4), 1..20)), 1..25),
    ) {
        let (pool, runtime) = (Pool::new(), Runtime::new().expect("a runtime"));
        let stores = runtime.block_on(async { [pool.open("a").await, pool.open("b").await] });
        let mut model = Model::default();
        for (who, turn, batch) in batches {
            if turn {
                runtime.block_on(periods_turn(&stores[0]));
            }
            let outcome = |dice: u8| if dice == 0 { Outcome::Dead } else { Outcome::Done };
            let effects: Vec<Effect> =
                batch.iter().map(|(id, replayed, dice)| effect(&id.to_string(), outcome(*dice), *replayed)).collect();
            let known: Vec<bool> = batch.iter().map(|(id, replayed, _)| model.knows(*id, *replayed)).collect();
            let seen = effects.iter().filter_map(|e| e.seen).collect();
            let looked = runtime.block_on(async { stores[1 - who].look(seen).await });
            let looked: Vec<bool> = looked.expect("answers").iter().map(Option::is_some).collect();
            proptest::prop_assert_eq!(looked, known);
            let fresh: Vec<bool> = batch.iter().map(|(id, r, dice)| model.record(*id, *r, outcome(*dice))).collect();
            proptest::prop_assert_eq!(runtime.block_on(commit(&stores[who], effects)), fresh);
        }
    }
}

/// A handler's work in a transaction: what became of it, as text.
async fn within<Fut>(store: &Postgres, id: &str, work: impl FnOnce(Tx) -> Fut) -> Result<String, StoreError>
where
    Fut: Future<Output = Result<Vec<Message>, String>>,
{
    let seen = Some(Seen { identity: Identity::of("/tests", id), replayed: 0 });
    let entry = Entry { seen, started: None, partition: "p00".into() };
    let transactions = store.transactions(4)?;
    Ok(match transactions.run(&entry, Duration::from_secs(5), work).await? {
        Ended::Recorded(Recorded::Fresh(_, rows), out) => format!("fresh {} {}", rows.len(), out.len()),
        Ended::Recorded(Recorded::Recovered(_, rows), _) => format!("recovered {}", rows.len()),
        Ended::Recorded(Recorded::Superseded(_), _) => "superseded".into(),
        Ended::Recorded(Recorded::Outdated, _) => "outdated".into(),
        Ended::Failed(why) => why,
    })
}

#[tokio::test]
async fn a_handler_s_statements_its_event_and_what_it_sends_are_one() {
    let pool = Pool::new();
    let store = pool.open("a").await;
    pool.sql("CREATE TABLE {s}.money (n bigint PRIMARY KEY)").await;
    let insert = format!("INSERT INTO {}.money VALUES ($1)", store.0.schema);
    let rows = async || pool.number("SELECT count(*) * 100 + (SELECT count(*) FROM {s}.outbox) FROM {s}.money").await;

    let good = within(&store, "1", async |tx| {
        tx.execute(&insert, &[&1_i64]).await.map_err(|error| error.to_string())?;
        Ok(vec![Message::default()])
    });
    assert_eq!((good.await.expect("done").as_str(), rows().await), ("fresh 1 1", 101));
    let again = within(&store, "1", async |_| panic!("it is known"));
    assert_eq!(again.await.expect("done"), "superseded");

    let failed = within(&store, "2", async |tx| {
        tx.execute(&insert, &[&2_i64]).await.map_err(|error| error.to_string())?;
        Err("no".into())
    });
    assert_eq!((failed.await.expect("done").as_str(), rows().await), ("no", 101));
    assert!(!knows(&store, "2", 0).await);

    // What it does not notice, or does not want to.
    let swallowed = within(&store, "3", async |tx| {
        assert!(tx.execute(&insert, &[&1_i64]).await.is_err_and(|error| error.code().is_some()));
        Ok(vec![Message::default()])
    });
    assert!(swallowed.await.expect("done").contains("a statement of its transaction had failed"));
    for ended in ["COMMIT", "ROLLBACK", "COMMIT; BEGIN"] {
        let own = within(&store, "4", async |tx| {
            tx.execute(&insert, &[&4_i64]).await.ok();
            for statement in ended.split("; ") {
                tx.query_typed(statement, &[]).await.map_err(|error| error.to_string())?;
            }
            Ok(vec![Message::default()])
        });
        let said = own.await.expect("done");
        assert!(said.contains("not its own") || said == "superseded", "{ended}: {said}");
        if ended == "ROLLBACK" {
            assert!(!said.is_empty());
        }
    }
    assert_eq!(pool.number("SELECT count(*) FROM {s}.outbox").await, 1, "nothing is sent outside the transaction");
}

#[tokio::test]
async fn a_transaction_that_is_kept_beyond_its_call_does_nothing() {
    let pool = Pool::new();
    let store = pool.open("a").await;
    let (keep, kept) = tokio::sync::oneshot::channel();
    let done = within(&store, "1", async |tx| {
        keep.send(tx).map_err(|_| "gone".to_owned())?;
        Ok(Vec::new())
    });
    assert_eq!(done.await.expect("done"), "fresh 0 0");
    let tx: Tx = kept.await.expect("kept");
    assert!(matches!(tx.query_typed("SELECT 1", &[]).await, Err(TxError::Ended)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_transactions_with_one_event_the_second_waits_and_finds_it_done() {
    let pool = Arc::new(Pool::new());
    let runs = Arc::new(AtomicU32::new(0));
    let workers = (0..4).map(|worker| {
        let (pool, runs) = (pool.clone(), runs.clone());
        tokio::spawn(async move {
            let store = pool.open(&worker.to_string()).await;
            let mut fresh = 0;
            for id in 0..40 {
                let work = async |tx: Tx| {
                    runs.fetch_add(1, Ordering::Relaxed);
                    tx.query_typed("SELECT pg_sleep(0.002)", &[]).await.map_err(|error| error.to_string())?;
                    Ok(vec![Message::default()])
                };
                fresh += u32::from(within(&store, &id.to_string(), work).await.expect("done") == "fresh 1 1");
            }
            fresh
        })
    });
    let fresh: u32 = futures_util::future::join_all(workers).await.into_iter().map(|f| f.expect("no panic")).sum();
    assert_eq!((fresh, runs.load(Ordering::Relaxed)), (40, 40), "no second one even began");
}

#[tokio::test]
async fn a_commit_whose_answer_was_lost_is_ours_whoever_adopted_its_rows() {
    let pool = Pool::new();
    let (ours, theirs) = (pool.open("a").await, pool.open("b").await);
    let lost = effect("1", Outcome::Done, 0);
    let Recorded::Fresh(_, rows) = &ours.commit(Arc::new(vec![lost.clone()])).await.expect("takes it")[0] else {
        panic!("it is new")
    };
    ours.0.doubt(lost.seen.expect("set").identity);
    // While nobody could beat, another one took us for dead.
    assert_eq!(theirs.adopt(Left::Silent(Duration::ZERO)).await.expect("answers").len(), 1);
    // Once more, and it looks different: a dead letter says when it was written.
    let message = Message { body: b"later".to_vec(), ..Message::default() };
    let again = Effect { out: vec![message], ..lost.clone() };
    match &ours.commit(Arc::new(vec![again.clone()])).await.expect("takes it")[..] {
        [Recorded::Recovered(_, again)] => {
            assert_eq!(again.iter().map(|row| row.id).collect::<Vec<_>>(), *rows);
            assert_eq!(again[0].message, lost.out[0], "as it stands there");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(theirs.adopt(Left::In("p00".into())).await.expect("answers").len(), 1, "they were ours again");
    assert_eq!(commit(&ours, vec![again]).await, [false], "no doubt is left");
}
