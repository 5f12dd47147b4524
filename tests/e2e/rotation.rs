//! Secrets that change while a process runs: it goes on with the new ones, and nothing is lost.
use anyhow::{Context, ensure};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;
use warren_tests::{Lab, Postgres, event, events, until};

const PATIENCE: Duration = Duration::from_secs(90);

/// A user of the broker with this name; gone with the test.
struct User<'a>(&'a Lab, &'a str);

impl<'a> User<'a> {
    fn new(lab: &'a Lab, name: &'a str, password: &str) -> anyhow::Result<Self> {
        let user = Self(lab, name);
        user.has(password)?;
        let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
        lab.rabbit.api("PUT", &format!("permissions/{}/{name}", lab.name), Some(all))?;
        Ok(user)
    }

    fn has(&self, password: &str) -> anyhow::Result<()> {
        let user = json!({"password": password, "tags": ""});
        self.0.rabbit.api("PUT", &format!("users/{}", self.1), Some(user)).map(|_| ())
    }
}

impl Drop for User<'_> {
    fn drop(&mut self) {
        self.0.rabbit.api("DELETE", &format!("users/{}", self.1), None).ok();
    }
}

/// The broker's settings in single parts, user and password in files.
fn in_parts(lab: &mut Lab, user: &str) -> anyhow::Result<PathBuf> {
    let (_, address) = lab.rabbit.amqp.rsplit_once('@').context("an address")?;
    let (host, port) = address.rsplit_once(':').context("a port")?;
    let (host, port, name) = (host.to_owned(), port.to_owned(), lab.name.clone());
    let (name_file, password_file) = (lab.path("user"), lab.path("password"));
    std::fs::write(&name_file, format!("{user}\n"))?;
    lab.environment.retain(|(name, _)| name != "AMQP_URL");
    lab.set("AMQP_HOST", &host);
    lab.set("AMQP_PORT", &port);
    lab.set("AMQP_VHOST", &name);
    lab.set("AMQP_USER_FILE", name_file.to_str().context("UTF-8")?);
    lab.set("AMQP_PASSWORD_FILE", password_file.to_str().context("UTF-8")?);
    Ok(password_file)
}

/// Ends the worker's connections, as far as the broker lists them already.
fn cut(lab: &Lab) -> bool {
    lab.close_connections("warren-worker").is_ok()
}

#[tokio::test]
async fn a_worker_goes_on_with_the_brokers_new_password_and_loses_nothing() -> anyhow::Result<()> {
    let mut lab = Lab::new("rotation-broker")?;
    let password = in_parts(&mut lab, "rotation-broker")?;
    let user = User::new(&lab, "rotation-broker", "One0: /%2f@#?ü")?;
    std::fs::write(&password, "One0: /%2f@#?ü\n")?;
    lab.declare().await?;
    let recorded = lab.recorded().await?;
    let mut worker = lab.worker()?;
    until("it takes events", PATIENCE, || worker.log().contains("takes events")).await.with_context(|| worker.log())?;
    let mut all = events(600, 20);
    let third = all.split_off(400);
    let second = all.split_off(200);
    let mut ids = lab.send(&all).await?;

    // The broker knows the new password before the file has it: the worker is refused, and waits.
    user.has("Two2")?;
    until("it is refused", PATIENCE, || cut(&lab) && worker.log().contains("refuses user 'rotation-broker'")).await?;
    std::fs::write(&password, "Two2\n")?;
    ids.extend(lab.send(&second).await?);
    lab.settled(400, PATIENCE).await?;
    ensure!(worker.log().contains("AMQP_PASSWORD_FILE: the file has a new value"), "{}", worker.log());

    // While the file is not there the last password is used, which is said once.
    std::fs::rename(&password, lab.path("away"))?;
    until("it says so", PATIENCE, || cut(&lab) && worker.log().contains("the last good value stays in use")).await?;
    std::fs::rename(lab.path("away"), &password)?;
    ids.extend(lab.send(&third).await?);
    let account = lab.account(&ids, &recorded, PATIENCE).await?;
    ensure!(account.adds_up() && account.handled == 600, "{account}{}", lab.logs());
    lab.calls_in_order()?;
    ensure!(worker.is_running(), "{}", worker.log());
    ensure!(worker.log().matches("the last good value stays in use").count() == 1, "{}", worker.log());
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    let log = worker.log();
    ensure!(!log.contains("One0") && !log.contains("Two2"), "a password is shown:\n{log}");
    Ok(())
}

#[tokio::test]
async fn a_publisher_that_sends_goes_on_with_the_new_password() -> anyhow::Result<()> {
    let mut lab = Lab::new("rotation-send")?;
    let password = in_parts(&mut lab, "rotation-send")?;
    let user = User::new(&lab, "rotation-send", "One0")?;
    std::fs::write(&password, "One0")?;
    lab.declare().await?;
    let mut sender = lab.sender(&events(15_000, 20), &["--rate", "1000"])?;
    // The broker lists them every few seconds.
    until("it sends", PATIENCE, || lab.connections("publish").is_ok_and(|names| !names.is_empty())).await?;
    user.has("Two2")?;
    std::fs::write(&password, "Two2")?;
    until("its connection is closed", PATIENCE, || lab.close_connections("publish").is_ok_and(|n| n > 0)).await?;
    ensure!(sender.wait(PATIENCE).await?.success(), "{}", sender.log());
    let account = sender.account()?;
    ensure!(account["confirmed"] == 15_000, "{account}");
    ensure!(sender.log().contains("publishing goes on"), "{}", sender.log());
    Ok(())
}

#[tokio::test]
async fn a_worker_goes_on_with_the_databases_new_password_and_loses_nothing() -> anyhow::Result<()> {
    let mut lab = Lab::new("rotation-postgres")?.with_store(Postgres::shared("rotation-postgres")?);
    let url = lab.postgres.as_ref().context("a database")?.url().to_owned();
    let superuser = |lab: &Lab, sql: &str| lab.postgres.as_ref().context("a database")?.superuser(sql);
    // A role of this test's own, as the shared one is everybody's; what it makes is the shared one's.
    let make = "DROP ROLE IF EXISTS rotated; CREATE ROLE rotated LOGIN PASSWORD 'One1' IN ROLE warren; \
                ALTER ROLE rotated SET role = 'warren'";
    superuser(&lab, make)?;
    let theirs = |password: &str| {
        let place = url.rsplit_once('@').map_or("", |(_, place)| place);
        format!("postgres://rotated:{password}@{place}\n")
    };
    let file = lab.path("database-url");
    std::fs::write(&file, theirs("One1"))?;
    lab.environment.retain(|(name, _)| name != "DATABASE_URL");
    lab.set("DATABASE_URL_FILE", file.to_str().context("UTF-8")?);
    lab.declare().await?;
    let recorded = lab.recorded().await?;
    let mut worker = lab.worker()?;
    until("it takes events", PATIENCE, || worker.log().contains("takes events")).await.with_context(|| worker.log())?;
    let mut all = events(400, 20);
    let rest = all.split_off(200);
    let mut ids = lab.send(&all).await?;
    lab.progressed(100, PATIENCE).await?;
    superuser(&lab, "ALTER ROLE rotated PASSWORD 'Two2'")?;
    std::fs::write(&file, theirs("Two2"))?;
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'rotated'";
    superuser(&lab, end)?;
    ids.extend(lab.send(&rest).await?);
    let account = lab.account(&ids, &recorded, PATIENCE).await?;
    ensure!(account.adds_up() && account.handled == 400, "{account}{}", lab.logs());
    ensure!(worker.log().contains("DATABASE_URL_FILE: the file has a new value"), "{}", worker.log());
    // And after it was refused for a while.
    superuser(&lab, "ALTER ROLE rotated PASSWORD 'Three3'")?;
    superuser(&lab, end)?;
    lab.send(&[event("last", "order.placed", "k", json!({}))]).await?;
    until("it is refused", PATIENCE, || worker.log().contains("password authentication failed")).await?;
    std::fs::write(&file, theirs("Three3"))?;
    lab.settled(401, PATIENCE).await?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    let log = worker.log();
    ensure!(!["rotated:", "One1", "Two2", "Three3"].iter().any(|word| log.contains(word)), "{log}");
    superuser(&lab, "DROP ROLE rotated")
}
