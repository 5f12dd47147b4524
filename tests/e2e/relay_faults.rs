//! `warren-publisher relay` under load, and whoever dies meanwhile: all that is committed arrives, in order per key.
use anyhow::ensure;
use std::time::{Duration, Instant};
use warren_tests::outbox::{Outbox, Writers};
use warren_tests::{Lab, Postgres, Process, until};

const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_committed_row_arrives_in_order_though_relays_are_killed() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-kills").await?;
    let sink = outbox.sink().await?;
    let mut relays: Vec<Process> = (0..3).map(|i| outbox.relay(&format!("r{i}"), &[])).collect::<Result<_, _>>()?;
    let writers = Writers::start(outbox.postgres.url(), 4, Duration::from_millis(2));
    // Whoever publishes is killed, and sometimes whoever does not.
    for round in 0..12 {
        let heard = sink.heard().len();
        let since = Instant::now();
        while sink.heard().len() < heard + 200 {
            ensure!(since.elapsed() < PATIENCE, "nothing is published any more{}", outbox.lab.logs());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let victim = loop {
            match relays.iter().position(|relay| relay.log().contains("this relay publishes")) {
                _ if round % 4 == 3 => break round % 3,
                Some(leader) => break leader,
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        relays[victim].kill().await?;
        std::fs::remove_file(outbox.lab.path(&format!("r{victim}.log")))?;
        relays[victim] = outbox.relay(&format!("r{victim}"), &[])?;
    }
    let written = writers.end().await?;
    outbox.account(&written, &sink).await?;
    ensure!(written.unknown.is_empty(), "the database never went");
    for relay in &mut relays {
        let status = relay.terminate(Duration::from_secs(15)).await?;
        ensure!(status.code() == Some(0), "{status}: {}", relay.log());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_told_to_stop_leaves_no_repeats_to_the_next() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-stop").await?;
    let sink = outbox.sink().await?;
    let writers = Writers::start(outbox.postgres.url(), 2, Duration::from_millis(2));
    for round in 0..4 {
        let mut relay = outbox.relay(&format!("r{round}"), &[])?;
        until("it publishes", PATIENCE, || relay.log().contains("this relay publishes")).await?;
        let (heard, since) = (sink.heard().len(), Instant::now());
        while sink.heard().len() < heard + 100 {
            ensure!(since.elapsed() < PATIENCE, "nothing is published{}", outbox.lab.logs());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let status = relay.terminate(Duration::from_secs(15)).await?;
        ensure!(status.code() == Some(0), "{status}: {}", relay.log());
        let account = relay.account()?;
        ensure!(account["published"].as_u64() >= Some(1), "{account}");
    }
    let written = writers.end().await?;
    outbox.once(0).await?;
    ensure!(outbox.account(&written, &sink).await? == 0, "repeats");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_relay_is_replaced_and_harms_nobody_when_it_thaws() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-freeze").await?;
    let sink = outbox.sink().await?;
    let mut first = outbox.relay("first", &[])?;
    until("it publishes", PATIENCE, || first.log().contains("this relay publishes")).await?;
    let second = outbox.relay("second", &[])?;
    until("it stands by", PATIENCE, || second.log().contains("stands by")).await?;
    let writers = Writers::start(outbox.postgres.url(), 2, Duration::from_millis(20));
    until("it publishes", PATIENCE, || sink.heard().len() > 50).await?;
    first.freeze().await?;
    let since = Instant::now();
    until("it takes over", PATIENCE, || second.log().contains("this relay publishes")).await?;
    println!("taken over after {:?}", since.elapsed());
    let heard = sink.heard().len();
    until("it publishes", PATIENCE, || sink.heard().len() > heard + 200).await?;
    first.signal(rustix::process::Signal::CONT)?;
    until("it notices", PATIENCE, || first.log().contains("stands by")).await?;
    let written = writers.end().await?;
    outbox.account(&written, &sink).await?;
    ensure!(first.terminate(Duration::from_secs(15)).await?.code() == Some(0), "{}", first.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_arrives_though_its_own_broker_is_killed() -> anyhow::Result<()> {
    let name = "relay-own-broker";
    let outbox = Outbox::of(Lab::with_own_broker(name)?, Postgres::shared(name)?).await?;
    let sink = outbox.sink().await?;
    let _relays = [outbox.relay("r0", &[])?, outbox.relay("r1", &[])?];
    let writers = Writers::start(outbox.postgres.url(), 2, Duration::from_millis(4));
    // Some seconds: a quorum queue of 3.10 that is a second old when its only node is killed has no leader ever after (seen in three
    // of four runs: "leader call - leader not known", and nothing is confirmed).
    until("it publishes", PATIENCE, || sink.heard().len() > 3000).await?;
    outbox.lab.rabbit.kill()?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    outbox.lab.rabbit.start()?;
    let heard = sink.heard().len();
    if let Err(error) = until("it goes on", PATIENCE, || sink.heard().len() > heard + 300).await {
        let queues = format!("list_queues -p {name} name type state messages_ready messages_unacknowledged consumers");
        let queues = outbox.lab.rabbit.ctl(&queues)?;
        return Err(error.context(format!("{queues}{}", outbox.lab.logs())));
    }
    let written = writers.end().await?;
    outbox.account(&written, &sink).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_arrives_though_the_database_is_killed_and_frozen() -> anyhow::Result<()> {
    let name = "relay-own-database";
    let outbox = Outbox::of(Lab::new(name)?, Postgres::private(name)?).await?;
    let sink = outbox.sink().await?;
    let _relays = [outbox.relay("r0", &[])?, outbox.relay("r1", &[])?];
    let writers = Writers::start(outbox.postgres.url(), 2, Duration::from_millis(4));
    let goes_on = async |more: usize| {
        let heard = sink.heard().len();
        until("it publishes", PATIENCE, || sink.heard().len() > heard + more).await
    };
    goes_on(300).await?;
    outbox.postgres.kill()?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    outbox.postgres.start()?;
    goes_on(300).await?;
    outbox.postgres.freeze()?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    outbox.postgres.thaw()?;
    goes_on(300).await?;
    let written = writers.end().await?;
    outbox.account(&written, &sink).await?;
    Ok(())
}
