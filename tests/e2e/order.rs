//! The example's order process on a real broker: a service over HTTP, a program and a Rust function.
use anyhow::ensure;
use serde_json::Value;
use std::time::{Duration, Instant};
use warren_tests::lab::{Lab, until};
use warren_tests::ledger::Sink;
use warren_tests::length;
use warren_tests::shop::{ARTICLES, Shop, order, sold};

const PATIENCE: Duration = Duration::from_secs(120);

fn shop_of(lab: &mut Lab) -> anyhow::Result<Shop> {
    let shop = Shop::open(&lab.path("shop"), &ARTICLES.map(|(sku, _)| (sku, 10_000)))?;
    lab.set("WARREN_ROUTES", &shop.definition()?);
    // Its parcels are files with SQLite, and rows with PostgreSQL: these books know the files.
    lab.set("DATABASE_URL", &format!("sqlite://{}", lab.path("orders.db").display()));
    Ok(shop)
}

async fn listen(lab: &Lab, word: &str) -> anyhow::Result<Sink> {
    Sink::listen(&lab.url(), word, "warren.events", &format!("order.{word}")).await
}

#[tokio::test]
async fn a_service_that_is_down_takes_no_order_back_and_is_not_stormed() -> anyhow::Result<()> {
    const ORDERS: usize = 150;
    let down = Duration::from_secs(length(15, 60));
    let mut lab = Lab::new("order-down")?;
    let shop = shop_of(&mut lab)?;
    let _payments = shop.payments().await?;
    lab.declare().await?;
    let (completed, compensated) = (listen(&lab, "completed").await?, listen(&lab, "compensated").await?);
    let workers =
        ["w1", "w2"].map(|name| shop.worker(&lab.environment_of(name, &[]), &lab.path(&format!("{name}.log"))));
    let _workers = workers.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    // Each customer can pay for one order.
    let orders: Vec<Value> = (0..ORDERS).map(|n| order(n, ORDERS)).collect();
    let bad = orders.iter().filter(|order| order["data"]["address"] == "nowhere").count();
    let half = ORDERS / 2;
    lab.send(&orders[..half]).await?;
    let ended = || completed.distinct().len() + compensated.distinct().len();
    until("half of them have ended", PATIENCE, || ended() == half).await?;
    shop.shut(true)?;
    let (before, began) = (compensated.distinct().len(), Instant::now());
    lab.send(&orders[half..]).await?;
    until("each was tried", PATIENCE, || shop.requests("503") >= ORDERS - half).await?;
    tokio::time::sleep(down.saturating_sub(began.elapsed())).await;
    let asked = shop.requests("503") as f64 / (ORDERS - half) as f64;
    println!("{asked:.1} requests for each order while the service was down for {down:?}");
    ensure!(ended() == half && compensated.distinct().len() == before, "an order ended without the service");
    // 1 s, doubling up to 30 s, with full jitter: seven fit into a quarter of a minute, a dozen into a whole one.
    ensure!((length(1.5, 2.0)..length(10.0, 16.0)).contains(&asked), "{asked} requests an order");
    shop.shut(false)?;
    until("all have ended", PATIENCE, || ended() == ORDERS).await?;
    ensure!(compensated.distinct().len() == bad, "{} were taken back, not {bad}", compensated.distinct().len());
    let data: Vec<Value> = completed.distinct().iter().map(|end| Ok(end.json()?)).collect::<anyhow::Result<_>>()?;
    let (books, sold) = (shop.books()?, sold(&data)?);
    ensure!(books.add_up(&sold), "{books:?} {sold:?}");
    lab.tell();
    Ok(())
}
