//! Two versions of a worker in one pool, as in the middle of a deploy.
use anyhow::ensure;
use serde_json::json;
use std::time::Duration;
use warren_tests::{Lab, event, events, until};

const PATIENCE: Duration = Duration::from_secs(120);

/// The ledger's route for `order.#`, and one more of the same handler.
fn with_parcels(lab: &Lab) -> String {
    let orders = lab.fresh_route("");
    let (_, handler) = orders.split_once("exec: ").unwrap_or_default();
    let handler = handler.trim_end_matches("}]");
    format!("{}, {{on: 'parcel.#', exec: {handler}}}]", orders.trim_end_matches(']'))
}

#[tokio::test]
async fn a_lane_that_a_deploy_adds_is_served_while_old_workers_serve_the_others() -> anyhow::Result<()> {
    let mut lab = Lab::new("deploys-lane")?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(""));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let mut fleet = vec![lab.worker()?, lab.worker()?];
    lab.balanced(2, PATIENCE).await?;
    lab.set("WARREN_LANES", "normal:1,high:3");
    fleet.extend([lab.worker()?, lab.worker()?]);
    let (map, _) = lab.until_map(4, PATIENCE, |map| map.settled && map.workers == 4).await?;
    let by_old = |queue: &&String| ["w0", "w1"].contains(&map.active[*queue].as_str());
    let queues: Vec<&String> = map.active.keys().collect();
    ensure!(queues.len() == 6, "{map:?}");
    ensure!(queues.iter().filter(|queue| queue.contains(".high.")).all(|queue| !by_old(queue)), "{map:?}");
    ensure!(queues.iter().any(by_old), "the old ones serve nothing any more: {map:?}");
    let mut all = events(200, 20);
    all.extend((0..200).map(|n| {
        let mut event = event(&format!("u{n}"), "order.placed", &format!("u{}", n % 20), json!({}));
        event["priority"] = json!(8);
        event["sequence"] = json!(format!("{:06}", n / 20 + 1));
        event
    }));
    let ids = lab.send(&all).await?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 400, "{ledger:?}{}", lab.logs());
    lab.calls_in_order()?;
    // Nobody moves any more.
    let again = lab.map(4).await?;
    ensure!(again.active == map.active, "{map:?}\n{again:?}");
    for worker in &mut fleet {
        ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    }
    Ok(())
}

#[tokio::test]
async fn events_of_a_route_that_a_deploy_adds_wait_for_a_worker_that_has_it() -> anyhow::Result<()> {
    let mut lab = Lab::new("deploys-route")?;
    lab.set("WARREN_ROUTES", &lab.fresh_route(""));
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let mut old = [lab.worker()?, lab.worker()?];
    lab.balanced(2, PATIENCE).await?;
    let routes = with_parcels(&lab);
    lab.set("WARREN_ROUTES", &routes);
    let mut new = lab.worker()?;
    let parcel = |n: usize| {
        let mut event = event(&format!("p{n}"), "parcel.sent", &format!("k{}", n % 20), json!({}));
        event["sequence"] = json!(format!("{:06}", 100 + n / 20));
        event
    };
    // From the first moment on in which somebody subscribes to it.
    until("parcels are bound", PATIENCE, || {
        let bound = lab.rabbit.api("GET", &format!("exchanges/{0}/warren.{0}/bindings/destination", lab.name), None);
        bound.is_ok_and(|bound| bound.to_string().contains("parcel.#"))
    })
    .await?;
    let mut all = events(400, 20);
    all.extend((0..400).map(parcel));
    let ids = lab.send(&all).await?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 800 && ledger.dead.is_empty(), "{ledger:?}{}", lab.logs());
    lab.calls_in_order()?;
    let waited: usize = old.iter().map(|worker| worker.log().matches("only another worker of this pool").count()).sum();
    ensure!(waited > 0, "no old worker met an event of the new route{}", lab.logs());
    for worker in old.iter_mut().chain([&mut new]) {
        ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    }
    ensure!(lab.starts() == 0 && lab.queued().await? == 0, "{} starts, {} queued", lab.starts(), lab.queued().await?);
    Ok(())
}

#[tokio::test]
async fn what_nobody_takes_over_within_the_grace_is_a_dead_letter() -> anyhow::Result<()> {
    let mut lab = Lab::new("deploys-grace")?;
    // All take from all partitions: none can be given away.
    lab.set("WARREN_ORDER", "none");
    lab.set("WARREN_ROUTES", &lab.fresh_route(""));
    lab.set("WARREN_UNKNOWN_GRACE", "3s");
    lab.declare().await?;
    let _old = lab.worker()?;
    until("the old one takes events", PATIENCE, || lab.connections("w0 (consume)").is_ok_and(|c| !c.is_empty()))
        .await?;
    let routes = with_parcels(&lab);
    lab.set("WARREN_ROUTES", &routes);
    let mut new = lab.worker()?;
    until("the new one takes events", PATIENCE, || new.log().contains("takes events")).await?;
    let all: Vec<_> = (0..60).map(|n| event(&format!("p{n}"), "parcel.sent", &format!("k{n}"), json!({}))).collect();
    lab.send(&all).await?;
    lab.settled(60, PATIENCE).await?;
    let dead = lab.dead().await?;
    ensure!(!dead.is_empty() && dead.len() < 60 && dead.iter().all(|(_, why)| why == "no-route"), "{dead:?}");
    ensure!(new.terminate(PATIENCE).await?.success(), "{}", new.log());
    // Nobody has a route for it any more: it does not wait.
    lab.send(&[event("late", "parcel.sent", "k", json!({}))]).await?;
    lab.settled(61, PATIENCE).await?;
    ensure!(lab.dead().await?.len() == dead.len() + 1);
    Ok(())
}
