//! The exam, and what only a server can do wrong. Each test has a schema of its own on the private server of
//! `scripts/postgres`.
use super::*;
use crate::store::Outcome;
use crate::store::exam::{Candidate, exam};
use std::process::Command;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::runtime::Runtime;
use warren_shared::env::Secret;

/// Where connections are opened whose tests are not asynchronous.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));

/// The private server, started if need be.
static URL: LazyLock<String> = LazyLock::new(|| {
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
