//! The second act where the store is PostgreSQL: an order ledger. Each order moves money inside the transaction that records
//! it, while workers and the database's backends are killed; then the balances must add up.
use crate::Demo;
use anyhow::ensure;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::time::Duration;
use tokio_postgres::Client;
use warren_tests::process::{self, Process, command};
use warren_tests::{event, until};

const CUSTOMERS: usize = 100;
const ORDERS: usize = 3000;
const TWICE: usize = 300;
const OPENING: i64 = 10_000;
const PATIENCE: Duration = Duration::from_secs(100);

/// Every twentieth order fails for good, between its two changes.
fn refused(n: usize) -> bool {
    n % 20 == 7
}

fn order(n: usize) -> Value {
    let (from, to) = (n % CUSTOMERS, (n * 7 + 1) % CUSTOMERS);
    let data = json!({"from": from, "to": to, "amount": n % 97 + 1, "fail": refused(n)});
    event(&format!("transfer-{n}"), "transfer.asked", &format!("customer-{from}"), data)
}

pub(crate) async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// A number from the database, also while it recovers.
pub(crate) async fn number(url: &str, sql: &str) -> anyhow::Result<i64> {
    let began = std::time::Instant::now();
    loop {
        let asked = async { anyhow::Ok(connect(url).await?.query_typed(sql, &[]).await?[0].get(0)) };
        match asked.await {
            Err(_) if began.elapsed() < PATIENCE => tokio::time::sleep(Duration::from_millis(200)).await,
            other => return other,
        }
    }
}

pub(crate) async fn run(demo: &Demo, url: &str) -> anyhow::Result<()> {
    println!("\nthe order ledger: each order moves money inside the transaction that records it\n");
    let (accounts, ledger) = (format!("accounts_{}", std::process::id()), format!("ledger_{}", std::process::id()));
    let client = connect(url).await?;
    client
        .batch_execute(&format!(
            "CREATE TABLE {accounts} (id integer PRIMARY KEY, balance bigint NOT NULL);
             CREATE TABLE {ledger} (id text NOT NULL);
             INSERT INTO {accounts} SELECT n, {OPENING} FROM generate_series(0, {CUSTOMERS} - 1) n"
        ))
        .await?;
    let mut environment = demo.environment.clone();
    environment.retain(|(name, _)| name != "WARREN_ROUTES");
    for (name, value) in [("TEST_TRANSFERS", format!("{accounts},{ledger}")), ("WARREN_CRASH_LIMIT", "100".into())] {
        environment.push((name.into(), value));
    }
    let worker = |number: usize| {
        let mut environment = environment.clone();
        environment.push(("WARREN_WORKER_ID".into(), format!("bank-{number}")));
        let mut run = command("warren-test-worker", &environment);
        run.arg(demo.dir.join(format!("bank-{number}.calls")));
        Process::start(run, &demo.dir.join(format!("bank-{number}.log")))
    };
    let mut workers: Vec<Process> = (1..=3).map(worker).collect::<Result<_, _>>()?;
    let taking = |worker: &Process| worker.log().contains("the pool has 3 workers");
    until("three workers share the partitions", PATIENCE, || workers.iter().all(taking)).await?;

    let file = demo.dir.join("transfers.ndjson");
    let lines: Vec<String> = (0..ORDERS).chain(0..TWICE).map(|n| order(n).to_string()).collect();
    std::fs::write(&file, lines.join("\n"))?;
    let mut send = command("warren-publisher", &environment);
    send.arg("send").arg(&file);
    process::expect_exit(&process::output(send, Vec::new()).await?, 0)?;
    demo.say(&format!("{} orders are sent, {TWICE} of them twice, one in twenty of them bad", ORDERS + TWICE));

    let applied = format!("SELECT count(*) FROM {ledger}");
    let (mut killed, mut ended) = (0, 0);
    for round in 1..=5 {
        while number(url, &applied).await? < (ORDERS * round / 7) as i64 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        workers[round % 3].kill().await?;
        workers[round % 3] = worker(3 + round)?;
        killed += 1;
        let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
            WHERE application_name = 'warren' AND usename = current_user AND datname = current_database()";
        ended += number(url, end).await?;
    }
    demo.say(&format!("{killed} workers killed with SIGKILL, {ended} connections ended by the database"));
    let good = (0..ORDERS).filter(|n| !refused(*n)).count();
    while number(url, &applied).await? < good as i64 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let dead = dead(demo, ORDERS - good).await?;
    for worker in &mut workers {
        ensure!(worker.terminate(Duration::from_secs(40)).await?.success(), "a worker drains: {}", worker.log());
    }
    let different = number(url, &format!("SELECT count(DISTINCT id) FROM {ledger}")).await?;
    let sum = number(url, &format!("SELECT sum(balance)::bigint FROM {accounts}")).await?;
    let moved = number(url, &format!("SELECT count(*) FROM {accounts} WHERE balance <> {OPENING}")).await?;
    let total = number(url, &applied).await?;
    client.batch_execute(&format!("DROP TABLE IF EXISTS {accounts}, {ledger}")).await.ok();
    let rows = [
        ("orders", ORDERS.to_string(), format!("{TWICE} of them sent twice")),
        ("applied", total.to_string(), format!("{different} different ones")),
        ("dead", dead.len().to_string(), "refused by the handler, rolled back whole".into()),
        ("accounts changed", moved.to_string(), format!("of {CUSTOMERS}")),
        ("sum of balances", sum.to_string(), format!("{} at the beginning", OPENING * CUSTOMERS as i64)),
    ];
    println!();
    for (name, n, note) in &rows {
        println!("  {name:<20} {n:>8}  {note}");
    }
    println!();
    ensure!(sum == OPENING * CUSTOMERS as i64, "money was made or lost");
    ensure!(total == different && total == good as i64, "orders were applied twice, or lost");
    ensure!(dead.len() == ORDERS - good, "{} of {} bad orders are dead letters", dead.len(), ORDERS - good);
    println!("the balances add up");
    Ok(())
}

/// Waits until so many transfers are dead; returns their ids.
async fn dead(demo: &Demo, expected: usize) -> anyhow::Result<HashSet<String>> {
    let began = std::time::Instant::now();
    loop {
        let mut ids = demo.letters().await?;
        ids.retain(|id| id.starts_with("transfer-"));
        if ids.len() >= expected || began.elapsed() > PATIENCE {
            return Ok(ids);
        }
    }
}
