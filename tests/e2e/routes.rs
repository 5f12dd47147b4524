//! Routes that filter, transform, emit, gather and call services, on a real broker and store.
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use warren_shared::Event;
use warren_shared::topology::BUS;
use warren_tests::lab::{Lab, event, until};
use warren_tests::{Service, Sink, receipt::Receipt};

const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test]
async fn events_are_filtered_transformed_and_emitted() -> anyhow::Result<()> {
    let mut lab = Lab::new("routes-emit")?;
    lab.set(
        "WARREN_ROUTES",
        "
routes:
  - on: order.viewed
    where: .data.total > 100
    transform: '.data.items[] | {order: $__loc__.line, item: .}'
    emit: item.wanted
  - on: item.wanted
    log: {}
",
    );
    // `$__loc__` is no part of the language here.
    let check = lab.run(&["check"]).await?;
    ensure!(check.status.code() == Some(64), "{}", String::from_utf8_lossy(&check.stdout));
    lab.set(
        "WARREN_ROUTES",
        "
routes:
  - on: order.viewed
    where: .data.total > 100
    transform: '.id as $id | .data.items[] | {order: $id, item: .}'
    emit: item.wanted
",
    );
    lab.declare().await?;
    let wanted = Sink::listen(&lab.url(), "wanted", BUS, "item.wanted").await?;
    let _worker = lab.worker()?;
    let viewed = |n: usize, total: Value, items: Value| {
        event(&format!("v{n}"), "order.viewed", &format!("k{n}"), json!({"total": total, "items": items}))
    };
    lab.send(&[
        viewed(1, json!(50), json!(["a"])),
        viewed(2, json!(150), json!(["b", "c"])),
        viewed(3, json!(200), json!([])),
        viewed(4, json!(200), json!("no list")),
        viewed(5, json!(300), json!(["d"])),
    ])
    .await?;
    lab.settled(5, PATIENCE).await?;
    until("all are heard", PATIENCE, || wanted.distinct().len() == 3).await?;
    let items: BTreeSet<String> = wanted
        .distinct()
        .iter()
        .map(|event| event.json::<Value>().map(|data| format!("{} {} {}", data["order"], data["item"], event.key())))
        .collect::<Result<_, _>>()?;
    ensure!(
        items == BTreeSet::from(["\"v2\" \"b\" k2", "\"v2\" \"c\" k2", "\"v5\" \"d\" k5"].map(str::to_owned)),
        "{items:?}"
    );
    let dead = lab.dead().await?;
    ensure!(dead == [("v4".to_owned(), "permanent".to_owned())], "{dead:?}");
    Ok(())
}

fn member(group: &str, n: usize, size: Option<usize>) -> Value {
    let mut event = event(&format!("{group}-{n}"), "parcel.weighed", &format!("parcel-{group}-{n}"), json!({"n": n}));
    event["groupid"] = json!(group);
    if let Some(size) = size {
        event["groupsize"] = json!(size);
    }
    event
}

#[tokio::test]
async fn groups_become_one_event_each_whoever_handles_their_members_and_dies() -> anyhow::Result<()> {
    const GROUPS: usize = 40;
    let mut lab = Lab::new("routes-gather")?;
    lab.set("WARREN_ROUTES", "routes: [{on: parcel.weighed, gather: {emit: order.weighed}}]");
    lab.set("WARREN_CRASH_LIMIT", "100");
    lab.declare().await?;
    let gathered = Sink::listen(&lab.url(), "gathered", BUS, "order.weighed").await?;
    let mut fleet = [lab.worker()?, lab.worker()?];
    // Members of a group have keys of their own, so they meet at the group from several partitions and workers.
    let mut all: Vec<Value> =
        (0..25).flat_map(|n| (0..GROUPS).map(move |group| member(&format!("g{group}"), n, Some(25)))).collect();
    let again: Vec<Value> = all.iter().step_by(7).cloned().collect();
    all.extend(again);
    let (sent, killed) = tokio::join!(lab.send(&all), async {
        for round in 0..4 {
            lab.progressed(150 * (round + 1), PATIENCE).await?;
            let victim = &mut fleet[round % 2];
            victim.kill().await?;
            *victim = lab.worker()?;
        }
        anyhow::Ok(())
    });
    sent?;
    killed?;
    until("all groups are there", PATIENCE, || gathered.distinct().len() >= GROUPS).await?;
    lab.settled(25 * GROUPS, PATIENCE).await?;
    let mut seen = BTreeSet::new();
    for event in gathered.distinct() {
        let data: Value = event.json()?;
        let members: BTreeSet<u64> =
            data["members"].as_array().context("a list")?.iter().filter_map(|m| m["n"].as_u64()).collect();
        ensure!(members.iter().copied().eq(0..25) && data["complete"] == true && data["count"] == 25, "{data}");
        ensure!(seen.insert(event.key().into_owned()), "{} twice", event.key());
    }
    ensure!(seen.len() == GROUPS && lab.dead().await?.is_empty(), "{seen:?}");
    Ok(())
}

#[tokio::test]
async fn a_group_is_closed_by_its_deadline_and_what_comes_later_is_told() -> anyhow::Result<()> {
    let mut lab = Lab::new("routes-deadline")?;
    lab.set("WARREN_ROUTES", "routes: [{on: parcel.weighed, gather: {emit: order.weighed, deadline: 2s}}]");
    lab.declare().await?;
    let gathered = Sink::listen(&lab.url(), "gathered", BUS, "order.weighed").await?;
    let _worker = lab.worker()?;
    lab.send(&[member("late", 0, None), member("late", 1, None), member("full", 0, Some(2)), member("full", 1, None)])
        .await?;
    until("both are closed", PATIENCE, || gathered.distinct().len() == 2).await?;
    let by_group = |events: Vec<Event>| -> anyhow::Result<BTreeMap<String, (bool, u64)>> {
        let one = |event: &Event| {
            let data: Value = event.json()?;
            Ok((event.key().into_owned(), (data["complete"] == true, data["count"].as_u64().context("a count")?)))
        };
        events.iter().map(one).collect()
    };
    let found = by_group(gathered.distinct())?;
    ensure!(found == BTreeMap::from([("full".into(), (true, 2)), ("late".into(), (false, 2))]), "{found:?}");
    lab.send(&[member("late", 2, None), member("full", 2, Some(2))]).await?;
    let mut dead = Vec::new();
    for _ in 0..100 {
        dead = lab.dead().await?;
        if dead.len() == 2 {
            break;
        }
    }
    ensure!(dead.len() == 2 && dead.iter().all(|(_, reason)| reason == "permanent"), "{dead:?}");
    ensure!(gathered.distinct().len() == 2, "a closed group was opened again");
    Ok(())
}

/// A real process log, through a route that filters, transforms and gathers per case.
#[tokio::test]
async fn the_receipt_log_gathered_by_case_is_its_own_directly_follows_graph() -> anyhow::Result<()> {
    let Some(mut receipt) = Receipt::read()? else { return Ok(()) };
    let number = |part: &str| receipt.wanted[part].as_u64().with_context(|| part.to_owned());
    let (events, cases) = (number("events")?, number("cases")?);

    let mut lab = Lab::new("routes-receipt")?;
    lab.set(
        "WARREN_ROUTES",
        "
routes:
  - on: receipt.#
    where: .data.activity != null
    transform: '.type'
    gather: {emit: case.gathered, group: .subject, deadline: 40s}
",
    );
    lab.declare().await?;
    let gathered = Sink::listen(&lab.url(), "gathered", BUS, "case.gathered").await?;
    let _worker = lab.worker()?;
    let (account, stderr) = lab.send_raw(std::mem::take(&mut receipt.log), &[]).await?;
    ensure!(account["confirmed"] == events, "{account}\n{stderr}");
    until("all cases are there", PATIENCE, || gathered.distinct().len() as u64 >= cases).await?;
    let list = |case: &Event| -> anyhow::Result<Vec<String>> {
        Ok(serde_json::from_value(case.json::<Value>()?["members"].clone())?)
    };
    let lists: Vec<Vec<String>> = gathered.distinct().iter().map(list).collect::<Result<_, _>>()?;
    ensure!(lists.iter().all(|list| !list.is_empty()), "a case without members");
    receipt.is_graph_of(lists.iter().map(Vec::as_slice))?;
    Ok(())
}

#[tokio::test]
async fn a_service_over_http_is_called_so_often_at_once_as_its_route_says_and_holds_nobody_else_up()
-> anyhow::Result<()> {
    const EVENTS: usize = 90;
    let mut lab = Lab::new("routes-http")?;
    let service = Service::start(Duration::from_millis(60)).await?;
    let routes = format!(
        "routes:\n  - {{on: order.placed, http: '{}', concurrency: 3, retry: {{attempts: 5, backoff: 100ms}}}}\n  \
         - {{on: order.viewed, emit: test.viewed}}",
        service.url
    );
    lab.set("WARREN_ROUTES", &routes);
    lab.declare().await?;
    let served = Sink::listen(&lab.url(), "served", "warren.events", "test.served").await?;
    let viewed = Sink::listen(&lab.url(), "viewed", "warren.events", "test.viewed").await?;
    let _worker = lab.worker()?;
    let make = |n: usize, kind: &str| event(&format!("{kind}-{n}"), kind, &format!("{kind}-{n}"), json!({}));
    lab.send(&(0..EVENTS).map(|n| make(n, "order.placed")).collect::<Vec<_>>()).await?;
    lab.send(&(0..EVENTS).map(|n| make(n, "order.viewed")).collect::<Vec<_>>()).await?;
    until("the others have gone by", PATIENCE, || viewed.distinct().len() == EVENTS).await?;
    let slow = served.distinct().len();
    ensure!(slow < EVENTS, "all {EVENTS} slow ones were done before the quick ones behind them");
    until("all are served", PATIENCE, || served.distinct().len() == EVENTS).await?;
    until("nothing is left", PATIENCE, || lab.outbox() == 0).await?;
    let seen = service.seen();
    ensure!(seen.most == 3, "{} at once", seen.most);
    ensure!(
        seen.calls.len() == EVENTS && seen.calls.iter().all(|(id, calls)| *calls == 1 + u32::from(id.ends_with('0')))
    );
    let alike = |keys: &Vec<String>| !keys[0].is_empty() && keys.iter().all(|key| *key == keys[0]);
    ensure!(seen.keys.values().all(alike), "an event has several idempotency keys");
    let keys: std::collections::HashSet<&String> = seen.keys.values().flatten().collect();
    ensure!(keys.len() == EVENTS, "{} idempotency keys", keys.len());
    // What the service answers with has the key of its cause.
    ensure!(served.distinct().iter().all(|event| event.key().starts_with("order.placed-")));
    println!("{slow} of the slow ones were done when the quick ones behind them were");
    lab.tell();
    Ok(())
}
