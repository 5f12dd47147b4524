//! `warren-publisher relay` beside transactions that hold the outbox' rows: what is locked waits, the others go on, and the
//! log names who holds it.
use anyhow::ensure;
use std::time::{Duration, Instant};
use tokio_postgres::Client;
use warren_tests::outbox::{Outbox, number};
use warren_tests::{Process, ids, until};

const PATIENCE: Duration = Duration::from_secs(60);

/// A transaction that a person left open.
async fn hoarder(outbox: &Outbox, sql: &str) -> anyhow::Result<(Client, i64)> {
    let client = outbox.client().await?;
    client.batch_execute(&format!("SET application_name = 'hoarder'; BEGIN; {sql}")).await?;
    let pid = number(&client, "SELECT pg_backend_pid()::bigint").await?;
    Ok((client, pid))
}

async fn insert(client: &Client, ids: &[(&str, &str)]) -> anyhow::Result<()> {
    let sql = "INSERT INTO warren_outbox (event_id, source, type, key) VALUES ($1, '/s', 'order.a', $2)";
    for (id, key) in ids {
        client.execute(sql, &[id, key]).await?;
    }
    Ok(())
}

async fn publishing(outbox: &Outbox, arguments: &[&str]) -> anyhow::Result<Process> {
    let relay = outbox.relay("relay", arguments)?;
    until("it publishes", PATIENCE, || relay.log().contains("this relay publishes")).await?;
    Ok(relay)
}

/// Neither the database nor another relay is to blame.
fn blames_nobody_else(relay: &Process) -> anyhow::Result<()> {
    let log = relay.log();
    ensure!(!log.contains("no database") && !log.contains("another relay"), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_row_holds_its_key_alone_and_its_holder_is_named() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-lock-row").await?;
    let sink = outbox.sink().await?;
    let client = outbox.client().await?;
    insert(&client, &[("a1", "a"), ("b1", "b"), ("a2", "a"), ("c1", "c")]).await?;
    let (hoarder, pid) = hoarder(&outbox, "SELECT FROM warren_outbox WHERE event_id = 'a1' FOR UPDATE").await?;
    let relay = publishing(&outbox, &[]).await?;
    until("the others go", PATIENCE, || sink.heard().len() == 2).await?;
    let name = format!("hoarder (pid {pid}, user warren, idle in transaction");
    until("the holder is named", PATIENCE, || relay.log().contains(&name)).await?;
    // What came later goes at once, but for the key that waits.
    let since = Instant::now();
    insert(&client, &[("a3", "a"), ("d1", "d")]).await?;
    until("the next goes", PATIENCE, || sink.heard().len() == 3).await?;
    println!("beside a locked row another goes after {:?}", since.elapsed());
    // What its holder makes of the row counts.
    hoarder.batch_execute("DELETE FROM warren_outbox WHERE event_id = 'a1'; COMMIT").await?;
    until("the key goes on", PATIENCE, || sink.heard().len() == 5).await?;
    outbox.empty().await?;
    let heard: Vec<String> = sink.heard().iter().map(|event| event.id().to_owned()).collect();
    ensure!(heard == ["b1", "c1", "d1", "a2", "a3"], "{heard:?}");
    blames_nobody_else(&relay)?;
    println!("ledger: published 5, confirmed 5, repeats 0, inversions 0, lost 0");
    outbox.lab.tell();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_of_sent_rows_that_was_left_open_stops_neither_rows_nor_sweeps() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-lock-sent").await?;
    let client = outbox.client().await?;
    insert(&client, &[("a1", "a"), ("b1", "b")]).await?;
    outbox.once(0).await?;
    let (hoarder, _) = hoarder(&outbox, "DELETE FROM warren_outbox WHERE sent_at IS NOT NULL").await?;
    let relay = publishing(&outbox, &["--keep", "1s"]).await?;
    insert(&client, &[("a2", "a"), ("c1", "c")]).await?;
    let since = Instant::now();
    let later = "SELECT count(*) FROM warren_outbox WHERE event_id IN ('a2', 'c1')";
    while number(&client, later).await? > 0 {
        ensure!(since.elapsed() < PATIENCE, "they stay: {}", relay.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    hoarder.batch_execute("ROLLBACK").await?;
    while number(&client, "SELECT count(*) FROM warren_outbox").await? > 0 {
        ensure!(since.elapsed() < PATIENCE, "the first two stay: {}", relay.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let heard = ids(&outbox.lab.take_all("warren.events.order").await?);
    ensure!(heard.len() == 4, "{heard:?}");
    blames_nobody_else(&relay)?;
    println!("ledger: published 4, confirmed 4, repeats 0, inversions 0, lost 0");
    outbox.lab.tell();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_cannot_be_marked_are_not_published_again_and_marked_later() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-lock-mark").await?;
    let sink = outbox.sink().await?;
    let client = outbox.client().await?;
    let mut relay = publishing(&outbox, &[]).await?;
    relay.freeze().await?;
    insert(&client, &[("a1", "a"), ("a2", "a"), ("b1", "b")]).await?;
    // As CREATE INDEX does: rows may be read, and none may be written.
    let (hoarder, pid) = hoarder(&outbox, "LOCK TABLE warren_outbox IN SHARE MODE").await?;
    relay.signal(rustix::process::Signal::CONT)?;
    until("all are published", PATIENCE, || sink.heard().len() == 3).await?;
    until("the holder is named", PATIENCE, || relay.log().contains(&format!("hoarder (pid {pid}"))).await?;
    // Three looks: whoever forgot what the broker has would publish it again.
    tokio::time::sleep(Duration::from_secs(3)).await;
    ensure!(number(&client, "SELECT count(sent_at) FROM warren_outbox").await? == 0, "marked?");
    hoarder.batch_execute("COMMIT").await?;
    outbox.empty().await?;
    ensure!(sink.heard().len() == 3, "repeats: {}", relay.log());
    blames_nobody_else(&relay)?;
    ensure!(relay.terminate(Duration::from_secs(15)).await?.code() == Some(0), "{}", relay.log());
    println!("ledger: published 3, confirmed 3, repeats 0, inversions 0, lost 0");
    outbox.lab.tell();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_table_is_waited_for_by_the_relay_that_publishes() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-lock-table").await?;
    let client = outbox.client().await?;
    let relay = publishing(&outbox, &[]).await?;
    let (hoarder, pid) = hoarder(&outbox, "LOCK TABLE warren_outbox").await?;
    until("the holder is named", PATIENCE, || relay.log().contains(&format!("hoarder (pid {pid}"))).await?;
    // One that starts meanwhile says the same, and does not wait for ever.
    let mut more = outbox.lab.environment.clone();
    more.push(("WARREN_CONNECT_TIMEOUT".into(), "1s".into()));
    let mut command = warren_tests::process::command("warren-publisher", &more);
    command.args(["relay", "--once"]);
    let output = warren_tests::process::output(command, Vec::new()).await?;
    let (_, stderr) = warren_tests::process::expect_exit(&output, 69)?;
    ensure!(stderr.contains("is locked by hoarder"), "{stderr}");
    hoarder.batch_execute("COMMIT").await?;
    insert(&client, &[("a1", "a")]).await?;
    outbox.empty().await?;
    let heard = ids(&outbox.lab.take_all("warren.events.order").await?);
    ensure!(heard == ["a1"], "{heard:?}");
    blames_nobody_else(&relay)?;
    println!("ledger: published 1, confirmed 1, repeats 0, inversions 0, lost 0");
    outbox.lab.tell();
    Ok(())
}
