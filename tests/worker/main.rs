//! A worker with a Rust handler that notes every call: fast enough to load a fleet on two cores.
//!
//! usage: warren-test-worker FILE    environment as for `warren-worker run`
//!
//! Each call appends two lines to FILE, which no other process writes to: `b <ns> <id> <key> <sequence> <attempt>` when
//! it begins, `e <ns> <id>` when it ends (the clock is the machine's). Every call emits one event under an id of its own:
//! an effect that is recorded twice shows as two.
//!
//! With TEST_ORDER=strict a key waits while its event fails, a second at most between two of a thousand attempts.
//!
//! With TEST_TRANSFERS=accounts,transfers it moves money instead, inside the store's transaction: `transfer.#` with {"from": A,
//! "to": B, "amount": N} changes two rows of the first table and adds one to the second, which would show a second time as a
//! second row.
//! {"fail": true} fails for good between the two.
//!
//! What an event's data asks for happens: {"sleep": S} takes S seconds, {"fail_until": MS} fails until that time (since 1970),
//! {"fail": N} fails the first N attempts.
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use warren_publisher::process::{self, Spare};
use warren_shared::env::Reader;
use warren_shared::retry::Policy;
use warren_shared::{Event, Limits, Value};
use warren_tests::trace::now;
use warren_worker::{Context, Failure, Reply, Tx, Worker, shutdown};

#[derive(serde::Deserialize, Default)]
struct Wish {
    sleep: Option<f64>,
    fail_until: Option<i64>,
    #[serde(default)]
    fail: u32,
}

fn main() -> ExitCode {
    let settings = match process::settings(Reader::Worker) {
        Ok(settings) => settings,
        Err(code) => return code,
    };
    let Some(path) = std::env::args().nth(1) else { return ExitCode::from(64) };
    let Ok(file) = std::fs::OpenOptions::new().create(true).append(true).open(path) else { return ExitCode::FAILURE };
    let file = Arc::new(Mutex::new(file));
    let handle = move |event: Event, cx: Context| {
        let file = file.clone();
        async move {
            let sequence = event.extension("sequence").map_or_else(|| "-".into(), ToString::to_string);
            note(&file, &format!("b {} {} {} {sequence} 1\n", now(), event.id(), event.key()));
            let wish: Wish = event.json().unwrap_or_default();
            if let Some(seconds) = wish.sleep {
                tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
            }
            let early = wish.fail_until.is_some_and(|until| jiff::Timestamp::now().as_millisecond() < until);
            let failed = early || cx.attempt <= wish.fail;
            note(&file, &format!("e {} {}\n", now(), event.id()));
            if failed {
                return Err(Failure::retry("not yet"));
            }
            recorded(&event, &sequence)
        }
    };
    let ran = process::run(Spare::One, async move {
        let mut builder = Worker::builder(settings);
        builder = match std::env::var("TEST_TRANSFERS").ok().as_deref().and_then(|tables| tables.split_once(',')) {
            Some((accounts, transfers)) => {
                let change = format!("UPDATE {accounts} SET balance = balance + $1 WHERE id = $2");
                let tables: Tables = Arc::new((change, format!("INSERT INTO {transfers} VALUES ($1)")));
                builder.handle_tx("transfer.#", move |event, tx, _| transfer(event, tx, tables.clone()))
            }
            None => builder.handle("order.#", handle),
        };
        if std::env::var("TEST_ORDER").is_ok_and(|order| order == "strict") {
            let (backoff, max) = (Duration::from_millis(500), Duration::from_secs(1));
            builder = builder.strict().retry(Policy { attempts: 1000, backoff, max }).timeout(Duration::from_secs(1));
        }
        let worker = builder.build().map_err(|mistakes| anyhow::anyhow!("{mistakes:?}"))?;
        worker.run(shutdown::signals()?).await.map(|()| ExitCode::SUCCESS)
    });
    ran.unwrap_or_else(|error| process::fail(&error))
}

#[derive(serde::Deserialize)]
struct Transfer {
    from: i32,
    to: i32,
    amount: i64,
    #[serde(default)]
    fail: bool,
    #[serde(default)]
    sleep: f64,
}

/// The statement that changes an account, and the one that notes a transfer.
type Tables = Arc<(String, String)>;

async fn transfer(event: Event, tx: Tx, tables: Tables) -> Result<Reply, Failure> {
    let Transfer { from, to, amount, fail, sleep } = event.json()?;
    let (change, note) = &*tables;
    tokio::time::sleep(Duration::from_secs_f64(sleep)).await;
    tx.execute(change, &[&-amount, &from]).await?;
    if fail {
        return Err(Failure::dead("the other bank refuses"));
    }
    tx.execute(change, &[&amount, &to]).await?;
    tx.execute(note, &[&event.id()]).await?;
    recorded(&event, "-")
}

/// Emits an event under an id of its own.
fn recorded(event: &Event, sequence: &str) -> Result<Reply, Failure> {
    let entry = Event::new(uuid::Uuid::new_v4().to_string(), "/tests", "test.recorded")
        .and_then(|entry| entry.with("partitionkey", Value::Text(event.key().into_owned())))
        .and_then(|entry| {
            entry.with_json(
                format!("{{\"id\":\"{}\",\"sequence\":\"{sequence}\"}}", event.id()).as_bytes(),
                Limits::default(),
            )
        });
    Ok(Reply::done().emit(entry.map_err(Failure::dead)?))
}

/// One write a line, so that a kill cuts none in two.
fn note(file: &Mutex<std::fs::File>, line: &str) {
    if let Ok(mut file) = file.lock() {
        let _ = file.write_all(line.as_bytes());
    }
}
