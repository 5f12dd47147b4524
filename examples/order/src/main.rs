//! The worker of the order process: all that `order.yaml` says, and one handler in Rust, which ships.
//!
//! usage: warren-order COMMAND    the commands and the environment of `warren-worker`; `WARREN_CONFIG=examples/order/order.yaml`
//!
//! A parcel is a file in `$ORDER_DIR/parcels`, named after the instance: the function may run more than once, and finds it. With
//! PostgreSQL it is a row of `$ORDER_TABLE` (`CREATE TABLE parcels (instance text, address text)`), inserted inside the store's
//! transaction: exactly once, without looking.
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use warren_shared::Event;
use warren_shared::env::Database;
use warren_worker::{Failure, Reply, cli};

/// The data of `shipping.create`, as the step's `with` makes it.
#[derive(Deserialize)]
struct Shipment {
    address: String,
}

fn main() -> ExitCode {
    cli::main_with(|settings, worker| {
        let variable = |name, default: &str| std::env::var(name).unwrap_or_else(|_| default.into());
        if matches!(settings.database, Database::Postgres(_)) {
            let insert: Arc<str> = format!("INSERT INTO {} VALUES ($1, $2)", variable("ORDER_TABLE", "parcels")).into();
            return Ok(worker.handle_tx("shipping.create", move |event, tx, _| {
                let insert = insert.clone();
                async move {
                    let (instance, address) = asked(&event)?;
                    tx.execute(&insert, &[&instance, &address]).await?;
                    Ok(shipped(&instance))
                }
            }));
        }
        let parcels = PathBuf::from(variable("ORDER_DIR", "target/order")).join("parcels");
        Ok(worker.handle("shipping.create", move |event, _| ship(event, parcels.clone())))
    })
}

/// Whose parcel it is, and where it goes.
fn asked(event: &Event) -> Result<(String, String), Failure> {
    let instance = event.extension("processid").ok_or_else(|| Failure::dead("no step of a process"))?.to_string();
    let Shipment { address } = event.json()?;
    // Trying again cannot help: the step fails, and what the order took is given back.
    if address == "nowhere" { Err(Failure::dead("nobody delivers there")) } else { Ok((instance, address)) }
}

async fn ship(event: Event, parcels: PathBuf) -> Result<Reply, Failure> {
    let (instance, address) = asked(&event)?;
    let parcel = parcels.join(instance.replace('/', "-"));
    // What fails here comes again.
    tokio::task::spawn_blocking(move || pack(&parcel, &address))
        .await
        .map_err(Failure::retry)?
        .map_err(Failure::retry)?;
    Ok(shipped(&instance))
}

/// The file is there whole, or not at all.
fn pack(parcel: &Path, address: &str) -> std::io::Result<()> {
    if parcel.exists() {
        return Ok(());
    }
    parcel.parent().map_or(Ok(()), std::fs::create_dir_all)?;
    let new = parcel.with_extension("new");
    std::fs::write(&new, address)?;
    std::fs::File::open(&new)?.sync_all()?;
    std::fs::rename(&new, parcel)
}

fn shipped(instance: &str) -> Reply {
    Reply::done().result(serde_json::json!({ "parcel": instance }))
}
