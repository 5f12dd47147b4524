//! Messages of systems that know nothing of Warren: what their handler sees, and what is kept of the promises.
use anyhow::{Context, ensure};
use lapin::ExchangeKind;
use lapin::options::ExchangeDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashSet};
use std::time::Duration;
use warren_tests::process::expect_exit;
use warren_tests::raw::free_port;
use warren_tests::{Lab, Raw, foreign, until};

const PATIENCE: Duration = Duration::from_secs(90);

async fn theirs(lab: &Lab, exchange: &str) -> anyhow::Result<()> {
    let (connection, channel) = lab.channel().await?;
    let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare(exchange.into(), ExchangeKind::Topic, options, FieldTable::default()).await?;
    Ok(connection.close(200, "declared".into()).await?)
}

/// A pool that takes `order.#` from an upstream team's own exchange, with the acting handler.
async fn pool(name: &str) -> anyhow::Result<Lab> {
    let mut lab = Lab::new(name)?;
    theirs(&lab, "orders-exchange").await?;
    lab.set("WARREN_SUBSCRIBE", "orders-exchange:order.#");
    lab.set("WARREN_ROUTES", &format!("routes: [{}]", lab.actor_route("order.#", "")));
    lab.declare().await?;
    Ok(lab)
}

fn attribute<'a>(event: &'a Value, name: &str) -> &'a str {
    event[name].as_str().unwrap_or_default()
}

#[tokio::test]
async fn a_plain_message_of_an_upstream_team_becomes_an_event_with_its_properties() -> anyhow::Result<()> {
    let Some(python) = foreign::python()? else { return Ok(()) };
    let lab = pool("foreign-plain").await?;
    let _worker = lab.worker()?;
    let full = json!({
        "key": "order.placed.eu", "body": "{\"total\": 12.5}", "content_type": "application/json",
        "message_id": "m-1", "correlation_id": "customer-7", "type": "order.placed", "app_id": "shop",
        "timestamp": 1_700_000_000, "headers": {"tenant": "acme", "retries": 3, "X-Odd": "stays behind"},
    });
    let bare = json!({"key": "order.bare", "body": "{\"total\": 1}", "message_id": "m-2"});
    lab.upstream(&python, "orders-exchange", &[full, bare]).await?;
    until("both handled", PATIENCE, || lab.acts().len() >= 2).await?;

    let acts = lab.acts_of("m-1");
    let event = &acts.first().context("the full message")?["event"];
    for (name, wanted) in [
        ("type", "order.placed"),
        ("source", "shop"),
        ("time", "2023-11-14T22:13:20Z"),
        ("partitionkey", "customer-7"),
        ("datacontenttype", "application/json"),
        ("specversion", "1.0"),
        ("tenant", "acme"),
    ] {
        ensure!(attribute(event, name) == wanted, "{name} is not '{wanted}': {event}");
    }
    ensure!(event["retries"] == 3 && event["data"] == json!({"total": 12.5}), "{event}");
    ensure!(!event.to_string().contains("stays behind"), "{event}");

    let acts = lab.acts_of("m-2");
    let event = &acts.first().context("the bare message")?["event"];
    ensure!(attribute(event, "type") == "order.bare", "without a type property the routing key is the type: {event}");
    ensure!(attribute(event, "source") == "/amqp/orders-exchange", "{event}");
    ensure!(event["data"] == json!({"total": 1}), "{event}");
    Ok(())
}

/// Values as the frameworks of other systems write them.
#[tokio::test]
async fn bodies_and_attributes_of_other_makes_are_read_as_what_they_are() -> anyhow::Result<()> {
    use std::io::Write;
    let lab = pool("foreign-makes").await?;
    let _worker = lab.worker()?;
    let data = br#"{"total":12.5}"#;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(data)?;
    let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    zlib.write_all(data)?;
    let json = |id: &str, body: &[u8]| Raw::new("order.placed", body).content_type("application/json").id(id).key("k");
    let encoded = |raw: Raw, name: &str| raw.with(|properties| properties.with_content_encoding(name.into()));
    let specversion = [("specversion", "1.0"), ("id", "bound"), ("source", "/s"), ("type", "order.placed")];
    let bound = json("bound", data).attributes("cloudEvents:", &specversion).with(|properties| {
        let mut headers = properties.headers().clone().unwrap_or_default();
        headers.insert("cloudEvents:time".into(), AMQPValue::Timestamp(1_700_000_000));
        headers.insert("cloudEvents:subject".into(), AMQPValue::Void);
        properties.with_headers(headers)
    });
    let messages = [
        encoded(json("gzip", &gzip.finish()?), "gzip"),
        encoded(json("deflate", &zlib.finish()?), "deflate"),
        encoded(json("utf-8", data), "utf-8"),
        json("marked", &[b"\xef\xbb\xbf", &data[..]].concat()),
        json("latin", b"caf\xe9").content_type("text/plain; charset=iso-8859-1"),
        bound,
        encoded(json("last", data), "identity"),
    ];
    lab.publish(&messages).await?;
    until("all handled", PATIENCE, || !lab.acts_of("last").is_empty()).await?;
    for id in ["gzip", "deflate", "utf-8", "marked", "bound", "last"] {
        let acts = lab.acts_of(id);
        let event = &acts.first().context(id)?["event"];
        ensure!(event["data"] == json!({"total": 12.5}), "{id}: {event}");
    }
    let acts = lab.acts_of("latin");
    ensure!(acts.first().context("latin")?["event"]["data_base64"] == "Y2Fm6Q==", "{acts:?}");
    let acts = lab.acts_of("bound");
    let event = &acts.first().context("bound")?["event"];
    ensure!(attribute(event, "time") == "2023-11-14T22:13:20Z" && event["subject"].is_null(), "{event}");
    Ok(())
}

#[tokio::test]
async fn repeats_of_a_plain_message_with_an_id_are_absorbed() -> anyhow::Result<()> {
    let Some(python) = foreign::python()? else { return Ok(()) };
    let lab = pool("foreign-repeats").await?;
    let _worker = lab.worker()?;
    let same = json!({"key": "order.placed", "message_id": "same", "correlation_id": "k", "app_id": "shop"});
    let other = json!({"key": "order.placed", "message_id": "same", "correlation_id": "k", "app_id": "another shop"});
    let last = json!({"key": "order.placed", "message_id": "last", "correlation_id": "k", "app_id": "shop"});
    lab.upstream(&python, "orders-exchange", &[same.clone(), same.clone(), same.clone()]).await?;
    lab.upstream(&python, "orders-exchange", &[same, other, last]).await?;
    // One key: whatever came before the last is settled before it.
    until("the last", PATIENCE, || !lab.acts_of("last").is_empty()).await?;
    let sources: Vec<_> = lab.acts_of("same").iter().map(|act| act["event"]["source"].clone()).collect();
    ensure!(sources == [json!("shop"), json!("another shop")], "{sources:?}");
    Ok(())
}

#[tokio::test]
async fn messages_without_an_id_are_handled_counted_and_warned_about_once() -> anyhow::Result<()> {
    let Some(python) = foreign::python()? else { return Ok(()) };
    let mut lab = pool("foreign-anonymous").await?;
    let address = format!("127.0.0.1:{}", free_port()?);
    lab.set("WARREN_ADMIN_ADDR", &address);
    let mut worker = lab.worker()?;
    let message = |n: u32| json!({"key": "order.placed", "body": format!("{{\"n\": {n}}}"), "correlation_id": "k"});
    let messages: Vec<Value> = (0..5).map(message).collect();
    lab.upstream(&python, "orders-exchange", &messages).await?;
    until("all handled", PATIENCE, || lab.acts().len() >= 5).await?;
    let numbers: Vec<_> = lab.acts().iter().map(|act| act["event"]["data"]["n"].clone()).collect();
    ensure!(numbers == [0, 1, 2, 3, 4], "{numbers:?}");
    let ids: HashSet<_> = lab.acts().iter().map(|act| act["event"]["id"].to_string()).collect();
    ensure!(ids.len() == 5, "each gets an id of its own: {ids:?}");

    let counted = lab.metric(&address, "warren_anonymous_total", &[])?;
    ensure!(counted == Some(5.0), "{counted:?}");
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    let warnings = worker.log().matches("came without message_id").count();
    ensure!(warnings == 1, "{warnings} warnings: {}", worker.log());
    Ok(())
}

#[tokio::test]
async fn events_as_amqp_1_0_libraries_write_them_are_read() -> anyhow::Result<()> {
    let lab = pool("foreign-amqp10").await?;
    let _worker = lab.worker()?;
    let attributes = [
        ("specversion", "1.0"),
        ("id", "a-1"),
        ("source", "/sdk"),
        ("type", "order.placed"),
        ("subject", "order/7"),
        ("time", "2026-01-02T03:04:05Z"),
        ("tenant", "acme"),
    ];
    let message = Raw::new("order.placed", "{\"n\":1}").to("orders-exchange").content_type("application/json");
    lab.publish(&[message.attributes("cloudEvents:", &attributes)]).await?;
    until("handled", PATIENCE, || !lab.acts_of("a-1").is_empty()).await?;
    let event = lab.acts_of("a-1")[0]["event"].clone();
    for (name, wanted) in attributes {
        ensure!(attribute(&event, name) == wanted, "{name} is not '{wanted}': {event}");
    }
    ensure!(event["data"] == json!({"n": 1}), "{event}");
    Ok(())
}

#[tokio::test]
async fn the_lane_header_chooses_the_lane_and_an_unknown_lane_is_normal() -> anyhow::Result<()> {
    let mut lab = Lab::new("foreign-lanes")?;
    theirs(&lab, "orders-exchange").await?;
    lab.set("WARREN_SUBSCRIBE", "orders-exchange:order.#");
    lab.set("WARREN_LANES", "high:6,normal:3,low:1");
    lab.set("WARREN_PARTITIONS", "1");
    let address = format!("127.0.0.1:{}", free_port()?);
    lab.set("WARREN_ADMIN_ADDR", &address);
    lab.declare().await?;
    let message = |id: &str, lane: &str| {
        let message = Raw::new("order.placed", "{}").to("orders-exchange").id(id).key(id);
        if lane.is_empty() { message } else { message.header("warren-lane", lane) }
    };
    let lanes = [("a", "high"), ("b", "low"), ("c", "low"), ("d", ""), ("e", "normal"), ("f", "express"), ("g", "")];
    lab.publish(&lanes.map(|(id, lane)| message(id, lane))).await?;
    let _worker = lab.worker()?;
    lab.settled(lanes.len(), PATIENCE).await?;
    for (lane, count) in [("high", 1), ("low", 2), ("normal", 4)] {
        let handled = || lab.metric(&address, "warren_handled_total", &[("lane", lane)]).ok().flatten();
        until(lane, PATIENCE, || handled() == Some(f64::from(count))).await?;
    }
    Ok(())
}

#[tokio::test]
async fn messages_of_a_fanout_exchange_get_the_type_that_the_subscription_names() -> anyhow::Result<()> {
    let mut lab = Lab::new("foreign-fanout")?;
    let (_connection, channel) = lab.channel().await?;
    let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
    // As MassTransit calls it.
    let exchange = "Shop:OrderPlaced";
    channel.exchange_declare(exchange.into(), ExchangeKind::Fanout, options, FieldTable::default()).await?;
    lab.set("WARREN_ROUTES", &format!("routes: [{}]", lab.actor_route("order.placed", "")));
    lab.set("WARREN_SUBSCRIBE", &format!("{exchange}:#"));
    let (check, _) = expect_exit(&lab.run(&["check"]).await?, 0)?;
    ensure!(check.contains("write Shop:OrderPlaced:#=order.placed to name its type"), "{check}");
    lab.set("WARREN_SUBSCRIBE", &format!("{exchange}:#=order.placed"));
    let (check, _) = expect_exit(&lab.run(&["check"]).await?, 0)?;
    ensure!(!check.contains("to name its type"), "{check}");
    lab.declare().await?;
    let _worker = lab.worker()?;
    let message = |id: &str, body: &str| Raw::new("", body).to(exchange).id(id).content_type("application/json");
    lab.publish(&[message("m-1", "{\"n\": 1}"), message("broken", "{")]).await?;
    until("handled", PATIENCE, || !lab.acts_of("m-1").is_empty()).await?;
    let event = lab.acts_of("m-1")[0]["event"].clone();
    ensure!(attribute(&event, "type") == "order.placed", "{event}");
    ensure!(attribute(&event, "source") == "/amqp/Shop:OrderPlaced", "{event}");
    // What cannot be read keeps the type as well, so a replay has it.
    lab.dead_letters(1, PATIENCE).await?;
    let (listed, _) = expect_exit(&lab.run(&["dead", "list", "--json", "--type", "order.placed"]).await?, 0)?;
    ensure!(listed.contains("\"broken\""), "it is not listed: {listed}");
    Ok(())
}

#[tokio::test]
async fn a_priority_on_an_ordered_queue_is_warned_about_once() -> anyhow::Result<()> {
    let lab = pool("foreign-priority").await?;
    let mut worker = lab.worker()?;
    let message = |id: &str, priority: u8| {
        Raw::new("order.placed", "{}").to("orders-exchange").id(id).key("k").with(|p| p.with_priority(priority))
    };
    lab.publish(&[message("none", 0), message("jms", 4)]).await?;
    until("both handled", PATIENCE, || lab.acts().len() == 2).await?;
    ensure!(!worker.log().contains("AMQP priority"), "{}", worker.log());
    lab.publish(&[message("a", 9), message("b", 5)]).await?;
    until("all handled", PATIENCE, || lab.acts().len() == 4).await?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    ensure!(worker.log().matches("came with the AMQP priority").count() == 1, "{}", worker.log());
    let (check, _) = expect_exit(&lab.run(&["check"]).await?, 0)?;
    ensure!(check.contains("higher AMQP priority overtake"), "{check}");
    Ok(())
}

#[tokio::test]
async fn a_binding_that_somebody_takes_away_is_made_again() -> anyhow::Result<()> {
    let mut lab = pool("foreign-unbound").await?;
    lab.set("WARREN_TEST_PACE", "0.05");
    let worker = lab.worker()?;
    let message = |id: &str| Raw::new("order.placed", "{}").to("orders-exchange").id(id);
    lab.publish(&[message("before")]).await?;
    until("handled", PATIENCE, || !lab.acts_of("before").is_empty()).await?;
    // As an upstream team does that deploys its exchange anew.
    let (_connection, channel) = lab.channel().await?;
    channel.exchange_delete("orders-exchange".into(), Default::default()).await?;
    until("it is missed", PATIENCE, || worker.log().contains("'orders-exchange' of WARREN_SUBSCRIBE does not exist"))
        .await?;
    theirs(&lab, "orders-exchange").await?;
    let bound = || {
        let path = format!("exchanges/{}/orders-exchange/bindings/source", lab.name);
        lab.rabbit.api("GET", &path, None).is_ok_and(|all| all.as_array().is_some_and(|all| !all.is_empty()))
    };
    until("it is bound again", PATIENCE, bound).await?;
    lab.publish(&[message("after")]).await?;
    until("handled", PATIENCE, || !lab.acts_of("after").is_empty()).await
}

#[tokio::test]
async fn a_connection_carries_sixteen_channels_also_when_one_of_them_is_opened_again() -> anyhow::Result<()> {
    let mut lab = Lab::new("foreign-channels")?;
    lab.set("WARREN_PARTITIONS", "16");
    lab.declare().await?;
    let _worker = lab.worker()?;
    // Each partition's consumer, and its connection.
    let consumers = || {
        let all = lab.rabbit.api("GET", &format!("consumers/{}", lab.name), None).unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let of = |c: &Value| {
            let consumer = (text(&c["consumer_tag"]), text(&c["channel_details"]["connection_name"]));
            (text(&c["queue"]["name"]), consumer)
        };
        let partitions = all.as_array().into_iter().flatten().map(of).filter(|(queue, _)| queue.contains(".normal.p"));
        partitions.collect::<BTreeMap<_, _>>()
    };
    until("all are consumed", PATIENCE, || consumers().len() == 16).await?;
    let queue = format!("warren.{}.normal.p03", lab.name);
    let before = consumers()[&queue].clone();
    let (_connection, channel) = lab.channel().await?;
    channel.queue_delete((&*queue).into(), Default::default()).await?;
    let is_new = || consumers().get(&queue).is_some_and(|now| now.0 != before.0);
    until("it is declared and consumed again", PATIENCE, is_new).await?;
    let connections: HashSet<String> = consumers().into_values().map(|(_, connection)| connection).collect();
    ensure!(connections.len() == 1, "{connections:?}");
    Ok(())
}

#[tokio::test]
async fn classic_queues_let_a_higher_priority_overtake() -> anyhow::Result<()> {
    let mut lab = Lab::new("foreign-classic")?;
    lab.set("WARREN_QUEUE_TYPE", "classic");
    lab.set("WARREN_PARTITIONS", "1");
    lab.set("WARREN_CONCURRENCY", "1");
    lab.set("WARREN_PREFETCH", "1");
    lab.declare().await?;
    let message =
        |id: &str, priority| Raw::new("order.placed", "{}").id(id).key(id).with(|p| p.with_priority(priority));
    // All wait in the queue before the worker comes.
    let queued: Vec<Raw> =
        (0..4).flat_map(|n| [message(&format!("low{n}"), 1), message(&format!("high{n}"), 9)]).collect();
    lab.publish(&queued).await?;
    let mut worker = lab.worker()?;
    lab.settled(queued.len(), PATIENCE).await?;
    let order: Vec<String> = lab.calls().into_iter().map(|[_, id, ..]| id).collect();
    let wanted = ["high0", "high1", "high2", "high3", "low0", "low1", "low2", "low3"];
    ensure!(order == wanted, "{order:?}");
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    Ok(())
}

#[tokio::test]
async fn without_order_two_workers_share_every_partition_and_handle_everything_once() -> anyhow::Result<()> {
    let mut lab = Lab::new("foreign-unordered")?;
    lab.set("WARREN_ORDER", "none");
    lab.set("WARREN_PARTITIONS", "1");
    lab.set("WARREN_PREFETCH", "10");
    lab.declare().await?;
    let recorded = lab.recorded().await?;
    let mut events = warren_tests::events(300, 30);
    for event in &mut events {
        event["data"]["sleep"] = json!(0.005);
    }
    let ids = lab.send(&events).await?;
    let (_one, _two) = (lab.worker()?, lab.worker()?);
    lab.settled(300, PATIENCE).await?;
    until("all heard", PATIENCE, || recorded.distinct().len() >= 300).await?;
    let ledger = warren_tests::Ledger::of(&ids, &recorded, &lab.dead().await?)?;
    ensure!(ledger.lost == 0 && ledger.twice == 0 && ledger.handled == 300, "{ledger:?}");
    let mut by_program: BTreeMap<String, usize> = BTreeMap::new();
    lab.calls().into_iter().for_each(|[pid, ..]| *by_program.entry(pid).or_default() += 1);
    ensure!(by_program.len() == 2, "one worker did it all: {by_program:?}");
    Ok(())
}
