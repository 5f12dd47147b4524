//! What stands in the way of a start: one clear message, the right exit code, and nothing half done.
use anyhow::{Context, ensure};
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use serde_json::json;
use std::time::Duration;
use warren_tests::process::{self, expect_exit};
use warren_tests::raw::free_port;
use warren_tests::{Lab, event, until};

const PATIENCE: Duration = Duration::from_secs(120);

/// No output may show it.
const PASSWORD: &str = "Pl4nted-s3cret";

/// Starts a worker that must fail; returns what it said, which must not hold the password.
async fn refused(lab: &Lab, code: i32) -> anyhow::Result<String> {
    said(lab, &["run"], code).await
}

async fn said(lab: &Lab, arguments: &[&str], code: i32) -> anyhow::Result<String> {
    said_with(lab, &[], arguments, code).await
}

async fn said_with(lab: &Lab, more: &[(&str, &str)], arguments: &[&str], code: i32) -> anyhow::Result<String> {
    let mut command = process::command("warren-worker", &lab.environment);
    command.args(arguments).envs(more.iter().copied());
    let (stdout, stderr) = expect_exit(&process::output(command, Vec::new()).await?, code)?;
    let all = stdout + &stderr;
    ensure!(!all.contains(PASSWORD), "a password is shown:\n{all}");
    Ok(all)
}

fn holds(text: &str, wanted: &[&str]) -> anyhow::Result<()> {
    let missing: Vec<_> = wanted.iter().filter(|wanted| !text.contains(**wanted)).collect();
    ensure!(missing.is_empty(), "{missing:?} is not in:\n{text}");
    Ok(())
}

/// A user of the broker with this test's password and these permissions; gone with the test.
struct User<'a> {
    lab: &'a Lab,
    name: String,
}

impl<'a> User<'a> {
    fn new(lab: &'a Lab, configure: &str, write: &str, read: &str) -> anyhow::Result<Self> {
        let name = format!("user-of-{}", lab.name);
        let rabbit = &lab.rabbit;
        rabbit.api("PUT", &format!("users/{name}"), Some(json!({"password": PASSWORD, "tags": ""})))?;
        let permissions = json!({"configure": configure, "write": write, "read": read});
        rabbit.api("PUT", &format!("permissions/{}/{name}", lab.name), Some(permissions))?;
        Ok(Self { lab, name })
    }

    fn url(&self) -> String {
        self.lab.url().replace("guest:guest", &format!("{}:{PASSWORD}", self.name))
    }
}

impl Drop for User<'_> {
    fn drop(&mut self) {
        self.lab.rabbit.api("DELETE", &format!("users/{}", self.name), None).ok();
    }
}

#[tokio::test]
async fn a_broker_that_refuses_or_is_not_there_is_named_with_the_cure() -> anyhow::Result<()> {
    let mut lab = Lab::new("startup-broker")?;
    lab.set("WARREN_CONNECT_TIMEOUT", "2s");
    let url = lab.url();
    let port = free_port()?;
    let address = lab.rabbit.amqp.rsplit('@').next().context("an address")?.to_owned();
    for (url, wanted) in [
        (url.replace("guest:guest", &format!("guest:{PASSWORD}")), vec!["refuses user 'guest'", &address]),
        (url.replace("guest:guest", &format!("nobody:{PASSWORD}")), vec!["refuses user 'nobody'"]),
        (format!("amqp://guest:{PASSWORD}@127.0.0.1:{port}/x"), vec!["no broker answers at 127.0.0.1", "start it"]),
        (format!("{}/startup-nowhere", lab.rabbit.amqp), vec!["refuses vhost 'startup-nowhere'", "create it"]),
    ] {
        lab.set("AMQP_URL", &url);
        for arguments in [&["run"][..], &["topology"], &["dead", "list"], &["check"]] {
            holds(&said(&lab, arguments, 69).await?, &wanted).with_context(|| format!("{arguments:?}"))?;
        }
    }
    lab.set("AMQP_URL", &url);
    lab.rabbit.api("DELETE", &format!("permissions/{}/guest", lab.name), None)?;
    holds(&refused(&lab, 69).await?, &["refuses vhost 'startup-broker'", "grant user 'guest' access"])
}

/// A limit of this test's vhost, which goes with it.
fn limit(lab: &Lab, name: &str, value: u32) -> anyhow::Result<()> {
    lab.rabbit.api("PUT", &format!("vhost-limits/{}/{name}", lab.name), Some(json!({"value": value}))).map(drop)
}

#[tokio::test]
async fn a_limit_of_the_broker_is_told_as_such() -> anyhow::Result<()> {
    let mut lab = Lab::new("startup-limits")?;
    lab.set("WARREN_CONNECT_TIMEOUT", "1s");
    limit(&lab, "max-queues", 5)?;
    // The safety nets and two partitions; what was made is said, as it stays.
    let queues = |lab: &Lab| Ok::<_, anyhow::Error>(lab.names()?.iter().filter(|n| n.starts_with("queues")).count());
    let text = said(&lab, &["topology", "--apply"], 69).await?;
    holds(&text, &["refuses the queue warren.startup-limits.normal.p02", "queue limit", "were made before and stay"])?;
    ensure!(!text.contains("nothing was changed") && queues(&lab)? == 5, "{text}");
    holds(&refused(&lab, 69).await?, &["refuses the queue", "queue limit", "nothing was changed"])?;
    limit(&lab, "max-queues", 100)?;
    lab.declare().await?;
    limit(&lab, "max-connections", 0)?;
    let text = refused(&lab, 69).await?;
    holds(&text, &["takes no connection now", "limit", "raise the limit"])?;
    ensure!(!text.contains("create it"), "{text}");
    Ok(())
}

#[tokio::test]
async fn a_parameter_of_the_url_that_means_nothing_is_warned_about() -> anyhow::Result<()> {
    let mut lab = Lab::new("startup-parameters")?;
    lab.set("AMQP_URL", &format!("{}?heartbeat=5&hearbeat=5&verify=verify_peer", lab.url()));
    let text = said(&lab, &["check"], 0).await?;
    holds(&text, &["AMQP_URL: the parameter 'hearbeat' is not known", "the parameter 'verify'", "AMQP_CA_FILE"])
}

#[tokio::test]
async fn check_sees_bindings_and_policies_where_it_may_and_says_so_where_not() -> anyhow::Result<()> {
    let mut lab = Lab::new("startup-behind")?;
    lab.declare().await?;
    let pool = lab.name.clone();
    let unseen = ["note     bindings: are not looked at", "note     policies: are not seen", "WARREN_MANAGEMENT_URL"];
    holds(&said(&lab, &["check"], 0).await?, &unseen)?;
    holds(&said(&lab, &["topology"], 0).await?, &["the bindings, which are not looked at"])?;
    let management = lab.rabbit.management.first().context("a management interface")?.clone();
    let with = |login: &str| management.replace("http://", &format!("http://{login}@"));
    lab.set("WARREN_MANAGEMENT_URL", &with(&format!("nobody:{PASSWORD}")));
    holds(&said(&lab, &["check"], 0).await?, &["policies: are not seen", "401", "'management'"])?;
    lab.set("WARREN_MANAGEMENT_URL", &with("guest:guest"));
    let told = async |wanted: &str| {
        let since = std::time::Instant::now();
        loop {
            let mut command = process::command("warren-worker", &lab.environment);
            command.arg("check");
            let output = process::output(command, Vec::new()).await?;
            // The interface gathers what it tells of queues every five seconds.
            let text = String::from_utf8(output.stdout)?;
            if text.contains(wanted) {
                return Ok((output.status.code(), text));
            }
            ensure!(since.elapsed() < PATIENCE, "{wanted} is not in:\n{text}");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let (code, text) = told("ok       policies").await?;
    holds(&text, &["ok       bindings"])?;
    ensure!(code == Some(0), "{text}");

    let policy = json!({"pattern": ".*", "definition": {"delivery-limit": 5}, "apply-to": "queues"});
    lab.rabbit.api("PUT", &format!("policies/{pool}/everything"), Some(policy))?;
    let (_connection, channel) = lab.channel().await?;
    let (queue, lane) = (format!("warren.{pool}.normal.p01"), format!("warren.{pool}.normal"));
    channel.queue_unbind((&*queue).into(), (&*lane).into(), "1".into(), FieldTable::default()).await?;
    let policy = format!("warren.{pool}.normal.p00 and 2 more: the policy 'everything' sets delivery-limit 5");
    let binding = format!("{lane} -> {queue} (1)");
    let (code, text) = told(&policy).await?;
    holds(&text, &[&format!("bindings: to be made: {binding}")])?;
    ensure!(code == Some(1), "{text}");
    lab.set("WARREN_DECLARE", "never");
    holds(&said(&lab, &["check"], 69).await?, &[&policy, &format!("missing on the broker: {binding}")])
}

#[tokio::test]
async fn a_queue_with_other_arguments_is_named_and_nothing_is_created() -> anyhow::Result<()> {
    let lab = Lab::new("startup-mismatch")?;
    let (connection, channel) = lab.channel().await?;
    let queue = "warren.startup-mismatch.normal.p01";
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.into(), durable, FieldTable::default()).await?;
    connection.close(200, "declared".into()).await?;
    let before = lab.names()?;
    ensure!(before == [format!("queues {queue}")], "{before:?}");
    // The broker names one argument, the first in its own order.
    let different = format!("{queue}: x-dead-letter-exchange is none, wanted warren.startup-mismatch.dead");
    let wanted = [&*different, "nothing was changed", "another WARREN_POOL"];
    holds(&refused(&lab, 64).await?, &wanted)?;
    holds(&said(&lab, &["topology", "--apply"], 64).await?, &wanted)?;
    holds(&said(&lab, &["topology"], 64).await?, &["DIFFERENT", &different])?;
    holds(&said(&lab, &["check"], 64).await?, &["problem", &different])?;
    ensure!(lab.names()? == before, "something was created: {:?}", lab.names()?);
    Ok(())
}

#[tokio::test]
async fn a_pool_of_other_variables_is_not_changed_by_a_start() -> anyhow::Result<()> {
    let mut lab = Lab::new("startup-variables")?;
    lab.declare().await?;
    let before = lab.names()?;
    for (variable, value, back, wanted) in [
        ("WARREN_ORDER", "none", "key", "p00: x-single-active-consumer is true, wanted none"),
        ("WARREN_QUEUE_TYPE", "classic", "quorum", "p00: x-dead-letter-strategy is at-least-once, wanted none"),
    ] {
        lab.set(variable, value);
        holds(&refused(&lab, 64).await?, &[wanted, "nothing was changed", "set the variables back"])?;
        lab.set(variable, back);
    }
    ensure!(lab.names()? == before, "{:?}", lab.names()?);
    Ok(())
}

#[tokio::test]
async fn a_broker_without_the_plugin_is_named_with_the_cure_on_its_own_broker() -> anyhow::Result<()> {
    let lab = Lab::with_own_broker("startup-plugin")?;
    // As if it had never been enabled.
    lab.rabbit.ctl("eval rabbit_registry:unregister(exchange,<<\"x-consistent-hash\">>).")?;
    let text = refused(&lab, 69).await?;
    holds(
        &text,
        &["no exchange type 'x-consistent-hash'", "rabbitmq-plugins enable rabbitmq_consistent_hash_exchange"],
    )?;
    ensure!(lab.names()?.is_empty(), "something was created: {:?}", lab.names()?);
    Ok(())
}

#[tokio::test]
async fn a_user_who_may_not_declare_is_told_so_and_nothing_is_created() -> anyhow::Result<()> {
    let lab = Lab::new("startup-permission")?;
    let user = User::new(&lab, "^$", "^warren\\.", "^warren\\.")?;
    let url = user.url();
    let text = said_with(&lab, &[("AMQP_URL", &url)], &["run"], 69).await?;
    holds(&text, &["the broker denies it", "grant the user configure", "WARREN_DECLARE=never"])?;
    ensure!(lab.names()?.is_empty(), "something was created: {:?}", lab.names()?);
    let text = said_with(&lab, &[("AMQP_URL", &url), ("WARREN_DECLARE", "never")], &["run"], 69).await?;
    holds(&text, &["missing on the broker", "warren.startup-permission.normal.p00", "topology --apply"])?;
    ensure!(lab.names()?.is_empty(), "something was created: {:?}", lab.names()?);
    Ok(())
}

#[tokio::test]
async fn a_worker_that_may_not_declare_works_with_a_topology_that_is_there() -> anyhow::Result<()> {
    let lab = Lab::new("startup-never")?;
    lab.declare().await?;
    let user = User::new(&lab, "^$", "^warren\\.", "^warren\\.")?;
    let text = said_with(&lab, &[("AMQP_URL", &user.url()), ("WARREN_DECLARE", "never")], &["run"], 69).await?;
    holds(
        &text,
        &["the broker denies the worker its place in the fleet", r"'^warren\.startup-never\.fleet\.[0-9a-f]+$'"],
    )?;
    let user = User::new(&lab, r"^warren\.startup-never\.fleet\.", r"^warren\.", r"^warren\.")?;
    let mut worker = lab.worker_with(&[("AMQP_URL", &user.url()), ("WARREN_DECLARE", "never")])?;
    // A retry and a dead letter are published by the same user.
    let retry = event("r", "order.placed", "b", json!({"fail": 1}));
    let dead = event("d", "order.placed", "c", json!({"dead": true}));
    lab.send(&[event("e", "order.placed", "a", json!({})), retry, dead]).await?;
    lab.settled(3, PATIENCE).await?;
    lab.dead_letters(1, PATIENCE).await?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    ensure!(!worker.log().contains(PASSWORD) && !worker.log().contains("ERROR"), "{}", worker.log());
    Ok(())
}

#[tokio::test]
async fn an_exchange_of_another_team_that_is_missing_is_named_and_nothing_is_created() -> anyhow::Result<()> {
    let mut lab = Lab::new("startup-foreign")?;
    lab.set("WARREN_SUBSCRIBE", "orders-exchange:order.#");
    let wanted = ["'orders-exchange' of WARREN_SUBSCRIBE does not exist", "its owner must declare it"];
    holds(&refused(&lab, 69).await?, &wanted)?;
    holds(&said(&lab, &["check"], 69).await?, &["problem", wanted[0], wanted[1]])?;
    let plan = said(&lab, &["topology"], 0).await?;
    holds(&plan, &["exchange orders-exchange (of another team)", "its owner must declare it"])?;
    ensure!(lab.names()?.is_empty(), "something was created: {:?}", lab.names()?);
    Ok(())
}

#[tokio::test]
async fn every_mistake_in_the_configuration_is_listed_at_once() -> anyhow::Result<()> {
    let mut lab = Lab::new("startup-mistakes")?;
    for (variable, value) in [
        ("AMQP_URL", &*format!("http://user:{PASSWORD}@host")),
        ("DATABASE_URL", &*format!("mysql://root:{PASSWORD}@host")),
        ("WARREN_PARTITIONS", "0"),
        ("WARREN_LANES", "high:6"),
        ("WARREN_ORDER", "fifo"),
        ("WARREN_DRAIN_TIMEOUT", "25 parsecs"),
        ("WARREN_PREFETCH", "lots"),
    ] {
        lab.set(variable, value);
    }
    let names = ["AMQP_URL:", "DATABASE_URL:", "WARREN_PARTITIONS:", "WARREN_LANES:", "WARREN_ORDER:"];
    for arguments in [&["run"][..], &["check"], &["topology"], &["dead", "list"]] {
        let text = said(&lab, arguments, 64).await?;
        holds(&text, &names)?;
        holds(&text, &["7 mistakes", "WARREN_DRAIN_TIMEOUT:", "WARREN_PREFETCH:", "nothing was changed"])?;
    }
    Ok(())
}

#[tokio::test]
async fn every_mistake_in_the_routes_is_listed_at_once() -> anyhow::Result<()> {
    let mut lab = Lab::new("startup-routes")?;
    let wanted = ["route 1 (on: a.b): 'timeout'", "route 2: 'on' is missing", "route 3 (on: c): 'retri' is unknown"];
    let routes = "routes: [{on: a.b, log: {}, timeout: soon}, {log: {}}, {on: c, log: {}, retri: {}}]";
    lab.set("WARREN_ROUTES", routes);
    holds(&refused(&lab, 64).await?, &wanted)?;
    let file = lab.path("routes.yaml");
    std::fs::write(&file, routes)?;
    lab.set("WARREN_ROUTES", "");
    lab.set("WARREN_CONFIG", file.to_str().context("UTF-8")?);
    let text = refused(&lab, 64).await?;
    holds(&text, &wanted)?;
    holds(&text, &["routes.yaml:1: route 1"])?;
    lab.set("WARREN_CONFIG", "/no/such/file.yaml");
    holds(&refused(&lab, 64).await?, &["WARREN_CONFIG", "cannot read '/no/such/file.yaml'"])
}

#[tokio::test]
async fn check_reports_problems_of_routes_store_and_topology_together() -> anyhow::Result<()> {
    let mut lab = Lab::new("startup-check")?;
    let healthy = said(&lab, &["check"], 0).await?;
    holds(&healthy, &["ok       configuration and routes", "ok       store", "ok       broker", "to be declared"])?;
    ensure!(lab.names()?.is_empty(), "check changes nothing: {:?}", lab.names()?);

    let (connection, channel) = lab.channel().await?;
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    for partition in ["p00", "p02"] {
        let queue = format!("warren.startup-check.normal.{partition}");
        channel.queue_declare(queue.as_str().into(), durable, FieldTable::default()).await?;
    }
    connection.close(200, "declared".into()).await?;
    std::fs::write(lab.path("file"), "")?;
    lab.set("DATABASE_URL", &format!("sqlite://{}/warren.db", lab.path("file").display()));
    lab.set("WARREN_ROUTES", "routes: [{on: a.b}, {log: {}}]");
    let text = said(&lab, &["check"], 69).await?;
    holds(&text, &["route 1 (on: a.b): a route has exactly one of", "route 2: 'on' is missing", "problem  store"])?;
    holds(&text, &["ok       broker", "normal.p00: x-dead", "normal.p02: x-dead"])
}

#[tokio::test]
async fn an_unknown_variable_of_ours_is_warned_about() -> anyhow::Result<()> {
    let lab = Lab::new("startup-unknown")?;
    let text = said_with(&lab, &[("WARREN_PREFECTH", "5")], &["topology"], 0).await?;
    holds(&text, &["WARN", "WARREN_PREFECTH is not a variable of Warren", "--help"])
}

#[tokio::test]
async fn secrets_can_come_from_files() -> anyhow::Result<()> {
    let mut lab = Lab::new("startup-files")?;
    let (amqp, database) = (lab.path("amqp-url"), lab.path("database-url"));
    std::fs::write(&amqp, format!("{}\n", lab.url()))?;
    std::fs::write(&database, format!("sqlite://{}\n", lab.path("warren.db").display()))?;
    lab.environment.retain(|(name, _)| name != "AMQP_URL" && name != "DATABASE_URL");
    lab.set("AMQP_URL_FILE", amqp.to_str().context("UTF-8")?);
    lab.set("DATABASE_URL_FILE", database.to_str().context("UTF-8")?);
    lab.declare().await?;
    let mut worker = lab.worker()?;
    lab.send(&[event("e", "order.placed", "k", json!({}))]).await?;
    lab.settled(1, PATIENCE).await?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());

    holds(
        &said_with(&lab, &[("AMQP_URL", "amqp://x")], &["run"], 64).await?,
        &["AMQP_URL_FILE: is set beside AMQP_URL"],
    )?;
    lab.set("AMQP_URL_FILE", "/no/such/secret");
    holds(&refused(&lab, 64).await?, &["AMQP_URL_FILE: cannot read '/no/such/secret'"])
}

#[tokio::test]
async fn help_lists_every_variable_and_wrong_usage_is_64() -> anyhow::Result<()> {
    let lab = Lab::new("startup-help")?;
    let help = said(&lab, &["--help"], 0).await?;
    for variable in warren_shared::env::VARIABLES {
        ensure!(help.contains(variable.name), "{} is not in:\n{help}", variable.name);
    }
    for command in ["run", "check", "topology", "dead"] {
        ensure!(help.contains(command), "{command} is not in:\n{help}");
    }
    for arguments in [&["walk"][..], &["run", "--fast"], &[], &["dead"], &["dead", "show"]] {
        said(&lab, arguments, 64).await.with_context(|| format!("{arguments:?}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn the_plan_shows_what_is_missing_before_and_all_of_it_after() -> anyhow::Result<()> {
    let lab = Lab::new("startup-plan")?;
    let before = said(&lab, &["topology"], 0).await?;
    holds(
        &before,
        &["missing   queue    warren.startup-plan.normal.p02", "'warren-worker topology --apply' declares them"],
    )?;
    ensure!(lab.names()?.is_empty(), "a plan changes nothing: {:?}", lab.names()?);
    said(&lab, &["topology", "--apply"], 0).await?;
    let after = said(&lab, &["topology"], 0).await?;
    holds(&after, &["there     queue    warren.startup-plan.normal.p02", "the broker has all of it"])?;
    ensure!(!after.contains("missing"), "{after}");
    let names = lab.names()?;
    said(&lab, &["topology", "--apply"], 0).await?;
    ensure!(lab.names()? == names, "declaring again changes nothing: {:?}", lab.names()?);
    Ok(())
}

#[tokio::test]
async fn eight_workers_that_start_at_once_make_store_and_topology_together() -> anyhow::Result<()> {
    let lab = Lab::new("startup-eight")?;
    let mut workers = (0..8).map(|_| lab.worker()).collect::<anyhow::Result<Vec<_>>>()?;
    until("all take events", PATIENCE, || workers.iter().all(|worker| worker.log().contains("takes events")))
        .await
        .with_context(|| lab.logs())?;
    let recorded = lab.recorded().await?;
    let ids = lab.send(&warren_tests::events(200, 20)).await?;
    lab.settled(200, PATIENCE).await?;
    until("all heard", PATIENCE, || recorded.distinct().len() >= 200).await?;
    let ledger = warren_tests::Ledger::of(&ids, &recorded, &lab.dead().await?)?;
    ensure!(ledger.adds_up() && ledger.handled == 200, "{ledger:?}");
    for worker in &mut workers {
        ensure!(worker.is_running() && !worker.log().contains("ERROR"), "{}", worker.log());
    }
    Ok(())
}

#[tokio::test]
async fn of_several_nodes_the_first_that_answers_is_taken() -> anyhow::Result<()> {
    let mut lab = Lab::new("startup-nodes")?;
    let nobody = format!("amqp://guest:guest@127.0.0.1:{}/startup-nodes", free_port()?);
    let all = format!("{nobody},{},{nobody}", lab.url());
    lab.set("AMQP_URL", &all);
    lab.declare().await?;
    let mut worker = lab.worker()?;
    // Each begins at a node chosen by chance.
    for n in 0..4 {
        lab.send(&[event(&format!("e{n}"), "order.placed", "k", json!({}))]).await?;
    }
    lab.settled(4, PATIENCE).await?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    lab.set("AMQP_URL", &format!("{},http://elsewhere", lab.url()));
    holds(&said(&lab, &["check"], 64).await?, &["AMQP_URL: is not a URL of the form"])
}
