//! A transaction an event: Warren's handlers inside the store's transaction, and the loop that is written by hand.
use super::note;
use crate::bench::{Bench, say};
use crate::clients::tx::ACCOUNTS;
use crate::peers::POSTGRES;
use crate::results::Results;
use crate::site::Site;
use anyhow::{Context, ensure};

/// Who, and the share of a fast row's events that takes it about as long.
const CONTESTANTS: [(&str, f64); 2] = [("loop", 0.05), ("warren", 0.4)];

pub(super) fn run(bench: &Bench, results: &mut Results) -> anyhow::Result<()> {
    say("tx");
    for round in 1..=bench.plan.rounds {
        for (name, share) in CONTESTANTS.into_iter().filter(|(name, _)| bench.wants(name)) {
            let row = format!("tx.{name}");
            if let Some(why) = bench.peers.absent(POSTGRES) {
                results.absent(&row, why);
                continue;
            }
            let count = (bench.plan.drain as f64 * share).ceil() as u64;
            let site = bench.site()?.on_postgres()?;
            tables(bench, &site)?;
            site.load(1, count)?;
            let run = bench.run(&bench.client(&format!("tx_{name}"), &site, count)?).context(row.clone())?;
            let database = site.database().context("it has a database")?;
            let done = database.number("SELECT sum(balance)::bigint FROM account")?;
            ensure!(u64::try_from(done).ok() == Some(count), "{row}: {count} events made {done} changes");
            note(results, &row, round, run.between(count)?);
        }
    }
    Ok(())
}

/// What the handler's statement changes, and the inbox of the loop by hand.
pub(crate) fn tables(bench: &Bench, site: &Site<'_>) -> anyhow::Result<()> {
    let sql = format!(
        "CREATE TABLE account (id integer PRIMARY KEY, balance bigint NOT NULL);
         INSERT INTO account SELECT n, 0 FROM generate_series(0, {ACCOUNTS} - 1) n;
         CREATE TABLE inbox (identity uuid PRIMARY KEY)"
    );
    bench.runtime.block_on(async {
        let client = site.database().context("it has a database")?.client().await?;
        client.batch_execute(&sql).await?;
        // Not while a client is measured.
        Ok(client.batch_execute("VACUUM ANALYZE account").await?)
    })
}
