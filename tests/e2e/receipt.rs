//! A real process log through a fleet that is killed: what comes out must be the log's own directly-follows graph.
use anyhow::{Context, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::time::Duration;
use warren_shared::topology::BUS;
use warren_tests::{Lab, Sink, broker::root, until};

const PATIENCE: Duration = Duration::from_secs(200);

#[tokio::test]
async fn the_receipt_log_comes_out_as_its_own_directly_follows_graph_across_kills() -> anyhow::Result<()> {
    let data = root().join("../shared/data");
    let Ok(file) = std::fs::File::open(data.join("receipt.ndjson.gz")) else {
        println!("SKIPPED: there is no {}/receipt.ndjson.gz, so this proves nothing here", data.display());
        return Ok(());
    };
    let mut log = Vec::new();
    flate2::read::GzDecoder::new(file).read_to_end(&mut log)?;
    let wanted: Value = serde_json::from_str(&std::fs::read_to_string(data.join("receipt.dfg.json"))?)?;
    let count = usize::try_from(wanted["events"].as_u64().context("the number of events")?)?;

    let mut lab = Lab::new("receipt")?;
    let (echo, calls) = (root().join("tests/handlers/echo.py"), lab.path("calls"));
    let (echo, calls) = (echo.display(), calls.display());
    lab.set(
        "WARREN_ROUTES",
        &format!("routes: [{{on: 'receipt.#', exec: [python3, '{echo}', seen.receipt, '{calls}']}}]"),
    );
    lab.declare().await?;
    let seen = Sink::listen(&lab.url(), "seen", BUS, "seen.receipt").await?;

    let mut fleet = vec![lab.worker()?, lab.worker()?];
    let kills = async {
        for at in [count / 4, count / 2] {
            lab.progressed(at, PATIENCE).await?;
            let active = fleet.iter().position(|worker| worker.log().contains("first delivery from"));
            fleet.remove(active.context("nobody is active")?).kill().await?;
            println!("killed the active worker at {} of {count}", lab.inbox());
            fleet.push(lab.worker()?);
        }
        ensure!(lab.inbox() < count, "the kills came too late");
        anyhow::Ok(())
    };
    let (sent, killed) = tokio::join!(lab.send_raw(log, &[]), kills);
    killed?;
    let (account, stderr) = sent?;
    ensure!(account["confirmed"] == wanted["events"], "{account}\n{stderr}");
    lab.settled(count, PATIENCE).await?;
    until("all heard", PATIENCE, || seen.distinct().len() >= count).await?;

    let found = graph(&seen)?;
    println!(
        "{count} events of {} cases, {} repeats by id",
        found["cases"],
        seen.heard().len() - seen.distinct().len()
    );
    for part in ["events", "cases", "starts", "ends", "directly_follows"] {
        ensure!(found[part] == wanted[part], "{part}: found {}\nwanted {}", found[part], wanted[part]);
    }
    ensure!(lab.dead().await?.is_empty(), "{:?}", lab.dead().await?);
    let programs: std::collections::HashSet<String> =
        std::fs::read_to_string(lab.path("calls"))?.lines().map(str::to_owned).collect();
    ensure!(programs.len() >= 3, "{} programs handled events: the kills hit nobody who worked", programs.len());
    for mut worker in fleet {
        ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    }
    ensure!(lab.starts() == 0 && lab.queued().await? == 0, "{} starts, {} queued", lab.starts(), lab.queued().await?);
    Ok(())
}

/// The directly-follows graph of what was heard, in the form of `receipt.dfg.json`.
fn graph(seen: &Sink) -> anyhow::Result<Value> {
    let (mut last, mut starts, mut follows) = (HashMap::new(), BTreeMap::new(), BTreeMap::new());
    let events = seen.distinct();
    for event in &events {
        let data: Value = event.json()?;
        let text = |name: &str| data[name].as_str().map(str::to_owned).with_context(|| format!("no {name} in {data}"));
        let (case, activity) = (text("case")?, text("type")?);
        match last.insert(case, activity.clone()) {
            None => *starts.entry(activity).or_insert(0) += 1,
            Some(before) => *follows.entry(format!("{before} > {activity}")).or_insert(0) += 1,
        }
    }
    let mut ends = BTreeMap::new();
    last.values().for_each(|activity| *ends.entry(activity.clone()).or_insert(0) += 1);
    let cases = last.len();
    Ok(serde_json::json!(
        {"events": events.len(), "cases": cases, "starts": starts, "ends": ends, "directly_follows": follows}
    ))
}
