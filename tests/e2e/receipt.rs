//! A real process log through a fleet that is killed: what comes out must be the log's own directly-follows graph.
use anyhow::{Context, ensure};
use serde_json::Value;
use std::collections::HashMap;
use std::time::Duration;
use warren_shared::topology::BUS;
use warren_tests::{Lab, Sink, broker::root, receipt::Receipt, until};

const PATIENCE: Duration = Duration::from_secs(200);

#[tokio::test]
async fn the_receipt_log_comes_out_as_its_own_directly_follows_graph_across_kills() -> anyhow::Result<()> {
    let Some(mut receipt) = Receipt::read()? else { return Ok(()) };
    let count = usize::try_from(receipt.wanted["events"].as_u64().context("the number of events")?)?;

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
    let (sent, killed) = tokio::join!(lab.send_raw(std::mem::take(&mut receipt.log), &[]), kills);
    killed?;
    let (account, stderr) = sent?;
    ensure!(account["confirmed"] == receipt.wanted["events"], "{account}\n{stderr}");
    lab.settled(count, PATIENCE).await?;
    until("all heard", PATIENCE, || seen.distinct().len() >= count).await?;

    let cases = cases(&seen)?;
    let repeats = seen.heard().len() - seen.distinct().len();
    println!("{count} events of {} cases, {repeats} repeats by id", cases.len());
    receipt.is_graph_of(cases.values().map(Vec::as_slice))?;
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

/// The types that were heard of each case, in their order.
fn cases(seen: &Sink) -> anyhow::Result<HashMap<String, Vec<String>>> {
    let mut cases: HashMap<String, Vec<String>> = HashMap::new();
    for event in seen.distinct() {
        let data: Value = event.json()?;
        let text = |name: &str| data[name].as_str().map(str::to_owned).with_context(|| format!("no {name} in {data}"));
        cases.entry(text("case")?).or_default().push(text("type")?);
    }
    Ok(cases)
}
