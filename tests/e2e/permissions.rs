//! Each user of `deploy/rabbitmq/definitions.json` can do its job on a real broker, and nothing else.
use anyhow::{Context, ensure};
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ErrorKind, ExchangeKind};
use serde_json::{Value, json};
use std::time::Duration;
use warren_tests::process::expect_exit;
use warren_tests::raw::free_port;
use warren_tests::{Lab, event, until};

const PATIENCE: Duration = Duration::from_secs(60);
const PASSWORD: &str = "a-password-of-this-test";

/// The users of the definitions, made for this test's vhost and pool; gone with it.
struct Users<'a> {
    lab: &'a Lab,
    names: Vec<String>,
}

impl<'a> Users<'a> {
    fn new(lab: &'a Lab) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(warren_tests::broker::root().join("deploy/rabbitmq/definitions.json"))?;
        let all: Value = serde_json::from_str(&text)?;
        let mut users = Self { lab, names: Vec::new() };
        for user in all["users"].as_array().context("users")? {
            let name = format!("{}-{}", user["name"].as_str().context("a name")?, lab.name);
            let made = json!({"password": PASSWORD, "tags": user["tags"].as_array().context("tags")?.iter()
                .filter_map(Value::as_str).collect::<Vec<_>>().join(",")});
            lab.rabbit.api("PUT", &format!("users/{name}"), Some(made))?;
            users.names.push(name);
        }
        for granted in all["permissions"].as_array().context("permissions")? {
            let user = granted["user"].as_str().context("a user")?;
            let pattern = |of: &str| -> anyhow::Result<String> {
                let pattern = granted[of].as_str().context("a pattern")?;
                ensure!(pattern.starts_with('^') && pattern.ends_with('$'), "{user}: {of} is not anchored: {pattern}");
                Ok(pattern.replace("orders", &lab.name))
            };
            let rights =
                json!({"configure": pattern("configure")?, "write": pattern("write")?, "read": pattern("read")?});
            lab.rabbit.api("PUT", &format!("permissions/{}/{user}-{}", lab.name, lab.name), Some(rights))?;
        }
        Ok(users)
    }

    fn url(&self, user: &str) -> String {
        self.lab.url().replace("guest:guest", &format!("{user}-{}:{PASSWORD}", self.lab.name))
    }

    /// Whether a user may do something; an error where the broker objects for another reason.
    async fn may(&self, user: &str, what: &Deed) -> anyhow::Result<bool> {
        let connection = Connection::connect(&self.url(user), ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        let done = what.perform(&channel).await;
        let _ = connection.close(200, "done".into()).await;
        match done {
            Ok(()) => Ok(true),
            Err(error) => match error.kind() {
                ErrorKind::ProtocolError(amqp) if *amqp.kind() == AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
                    Ok(false)
                }
                _ => Err(error).with_context(|| format!("{user}: {what:?}")),
            },
        }
    }
}

impl Drop for Users<'_> {
    fn drop(&mut self) {
        for name in &self.names {
            self.lab.rabbit.api("DELETE", &format!("users/{name}"), None).ok();
        }
    }
}

#[derive(Clone, Debug)]
enum Deed {
    Publish(String),
    Consume(String),
    DeclareQueue(String),
    DeclareExchange(String),
    DeleteQueue(String),
}

impl Deed {
    async fn perform(&self, channel: &Channel) -> lapin::Result<()> {
        let nothing = FieldTable::default;
        match self {
            Self::Publish(exchange) => {
                channel.confirm_select(ConfirmSelectOptions::default()).await?;
                let options = BasicPublishOptions { mandatory: true, ..Default::default() };
                let properties = BasicProperties::default();
                let sent = channel.basic_publish(exchange.as_str().into(), "nobody".into(), options, b"{}", properties);
                sent.await?.await.map(drop)
            }
            Self::Consume(queue) => {
                let options = BasicConsumeOptions::default();
                channel.basic_consume(queue.as_str().into(), "".into(), options, nothing()).await.map(drop)
            }
            Self::DeclareQueue(queue) => {
                let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
                channel.queue_declare(queue.as_str().into(), options, nothing()).await.map(drop)
            }
            Self::DeclareExchange(name) => {
                let options = ExchangeDeclareOptions { auto_delete: true, ..Default::default() };
                channel.exchange_declare(name.as_str().into(), ExchangeKind::Fanout, options, nothing()).await
            }
            Self::DeleteQueue(queue) => {
                let options = QueueDeleteOptions { if_empty: true, ..Default::default() };
                channel.queue_delete(queue.as_str().into(), options).await.map(drop)
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_user_of_the_definitions_does_its_job_and_nothing_else() -> anyhow::Result<()> {
    let mut lab = Lab::new("permissions")?;
    lab.set("WARREN_LANES", "high:2,normal:1");
    lab.set("WARREN_PARTITIONS", "2");
    let fail = "import json,sys\nfor l in sys.stdin:\n e=json.loads(l)\n v=e['event']\n \
        s='retry' if v['data'].get('fail') and e['attempt']<2 else 'dead' if v['data'].get('bad') else 'done'\n \
        print(json.dumps({'id':v['id'],'source':v['source'],'status':s,'error':'no','emit':[{'type':'test.recorded','data':{'id':v['id']}}] if s=='done' else []}),flush=True)";
    lab.set(
        "WARREN_ROUTES",
        &json!({"routes": [
            {"on": "order.*", "exec": ["python3", "-c", fail], "retry": {"attempts": 3, "backoff": "1s"}},
        ]})
        .to_string(),
    );
    let pool = lab.name.clone();
    let users = Users::new(&lab)?;
    let urls: Vec<String> =
        ["topology", "worker-orders", "operator-orders", "publisher"].iter().map(|u| users.url(u)).collect();
    let as_user = |user: usize| [("AMQP_URL", urls[user].as_str())];

    // Their jobs.
    let run = |user: usize, arguments: Vec<&'static str>| {
        let mut command = warren_tests::process::command("warren-worker", &lab.environment_of("cli", &as_user(user)));
        command.args(arguments);
        warren_tests::process::output(command, Vec::new())
    };
    expect_exit(&run(0, vec!["topology", "--apply"]).await?, 0)?;
    let heard = lab.recorded().await?;
    let address = format!("127.0.0.1:{}", free_port()?);
    let environment = [("AMQP_URL", &*urls[1]), ("WARREN_DECLARE", "never"), ("WARREN_ADMIN_ADDR", &*address)];
    let mut worker = lab.worker_with(&environment)?;
    let all = [
        event("plain", "order.placed", "a", json!({})),
        event("again", "order.placed", "b", json!({"fail": true})),
        event("bad", "order.placed", "c", json!({"bad": true})),
    ];
    let lines: String = all.iter().map(|event| format!("{event}\n")).collect();
    let mut send = warren_tests::process::command("warren-publisher", &lab.environment_of("send", &as_user(3)));
    send.args(["send", "-"]);
    let sent = warren_tests::process::output(send, lines.into_bytes()).await?;
    expect_exit(&sent, 0)?;
    until("two are recorded", PATIENCE, || heard.distinct().len() == 2).await?;
    let dead = || async { anyhow::Ok(lab.depth(&format!("warren.{pool}.dead")).await?.map_or(0, |(ready, _)| ready)) };
    while dead().await? != 1 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (listed, _) = expect_exit(&run(2, vec!["dead", "list", "--json"]).await?, 0)?;
    ensure!(listed.contains("\"bad\""), "{listed}");
    let (status, _) = expect_exit(&run(2, vec!["status", "--json"]).await?, 1)?;
    ensure!(status.contains("\"dead\":1") && status.contains("\"workers\":[{"), "{status}");
    // A worker sees how many there are, and may not take one.
    let seen = || lab.metric(&address, "warren_dead_letters", &[]).is_ok_and(|n| n == Some(1.0));
    until("the worker sees the dead letter", PATIENCE, seen).await?;
    // It is replayed, fails for good again, and is dropped.
    let (replayed, _) = expect_exit(&run(2, vec!["dead", "replay", "--all"]).await?, 0)?;
    ensure!(replayed.contains("\"replayed\":1"), "{replayed}");
    while dead().await? != 1 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (dropped, _) = expect_exit(&run(2, vec!["dead", "drop", "--all"]).await?, 0)?;
    ensure!(dropped.contains("\"dropped\":1"), "{dropped}");
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    for refused in ["ACCESS_REFUSED", "denied", "refuses"] {
        ensure!(!worker.log().contains(refused), "{}", worker.log());
    }

    // And nothing else. A queue and an exchange of another pool stand for all that is not theirs.
    let (connection, channel) = lab.channel().await?;
    channel
        .queue_declare("warren.others.normal.p00".into(), QueueDeclareOptions::default(), FieldTable::default())
        .await?;
    let fanout = ExchangeDeclareOptions::default();
    for name in ["warren.others", "warren.events.more", &format!("warren.{pool}x.dead")] {
        channel.exchange_declare(name.into(), ExchangeKind::Fanout, fanout, FieldTable::default()).await?;
    }
    let own = |rest: &str| format!("warren.{pool}.{rest}");
    let publish = |to: &str| Deed::Publish(to.to_owned());
    let everybody_may_not = [
        publish(""),
        publish("warren.others"),
        publish("warren.events.more"),
        publish(&format!("warren.{pool}x.dead")),
        Deed::Consume("warren.others.normal.p00".into()),
        Deed::DeleteQueue("warren.others.normal.p00".into()),
        Deed::DeclareQueue("mine".into()),
        Deed::DeclareExchange("warren.others.dead".into()),
    ];
    for user in ["topology", "worker-orders", "operator-orders", "publisher", "keda", "monitoring"] {
        for deed in &everybody_may_not {
            ensure!(!users.may(user, deed).await?, "{user} may {deed:?}");
        }
    }
    let table = [
        ("topology", publish("warren.events"), false),
        ("worker-orders", publish("warren.events"), true),
        ("worker-orders", publish(&format!("warren.{pool}")), false),
        ("worker-orders", publish(&own("normal")), false),
        ("worker-orders", publish(&own("unrouted")), false),
        ("worker-orders", Deed::Consume(own("normal.p00")), true),
        ("worker-orders", Deed::Consume(own("dead")), false),
        ("worker-orders", Deed::Consume(own("unrouted")), false),
        ("worker-orders", Deed::Consume(own("delay.1s")), false),
        ("worker-orders", Deed::DeleteQueue(own("normal.p00")), false),
        ("worker-orders", Deed::DeclareQueue(own("normal.p99")), false),
        ("worker-orders", Deed::DeclareExchange(own("dead")), false),
        ("operator-orders", publish("warren.events"), false),
        ("operator-orders", Deed::Consume(own("dead")), true),
        ("operator-orders", Deed::Consume(own("normal.p00")), false),
        ("operator-orders", Deed::DeleteQueue(own("dead")), false),
        ("publisher", publish("warren.events"), true),
        ("publisher", publish(&format!("warren.{pool}")), false),
        ("publisher", Deed::Consume(own("normal.p00")), false),
        ("publisher", Deed::DeclareExchange("warren.events".into()), false),
        ("keda", publish("warren.events"), false),
        ("keda", Deed::Consume(own("normal.p00")), false),
        ("monitoring", publish("warren.events"), false),
        ("monitoring", Deed::Consume(own("dead")), false),
    ];
    for (user, deed, may) in &table {
        ensure!(
            users.may(user, deed).await? == *may,
            "{user}: {deed:?} was to be {}",
            if *may { "allowed" } else { "refused" }
        );
    }
    connection.close(200, "done".into()).await?;
    // KEDA reads depths over the management interface, and changes nothing there.
    let of = |user: &str| format!("{user}-{pool}");
    let queues = lab.rabbit.api_as((&of("keda"), PASSWORD), "GET", &format!("queues/{pool}"), None)?;
    ensure!(queues.as_array().is_some_and(|queues| queues.len() > 8), "{queues}");
    let change = json!({"auto_delete": false, "durable": true, "arguments": {}});
    let made = lab.rabbit.api_as((&of("keda"), PASSWORD), "PUT", &format!("queues/{pool}/mine"), Some(change));
    ensure!(made.is_err(), "keda may declare over the management interface");
    for user in ["topology", "worker-orders", "operator-orders", "publisher"] {
        ensure!(
            lab.rabbit.api_as((&of(user), PASSWORD), "GET", "overview", None).is_err(),
            "{user} may use the management interface"
        );
    }
    Ok(())
}
