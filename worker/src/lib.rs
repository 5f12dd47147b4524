//! AMQP in, stores, handlers: the shell around the laws. Embed it with [`Worker::builder`], or run `warren-worker`.
//!
//! ```no_run
//! use warren_worker::{Reply, Worker};
//! # async fn f(settings: warren_shared::env::Settings) -> anyhow::Result<()> {
//! let worker = Worker::builder(settings)
//!     .handle("order.placed", |event, _cx| async move {
//!         println!("order {}", event.id());
//!         Ok(Reply::done())
//!     })
//!     .build()
//!     .map_err(|mistakes| anyhow::anyhow!(mistakes.join("\n")))?;
//! worker.run(warren_worker::shutdown::signals()?).await
//! # }
//! ```
#![warn(clippy::print_stdout)]

pub mod admin;
pub mod cli;
pub mod config;
pub mod consumer;
pub mod dead;
mod fault;
pub mod fleet;
pub mod handler;
mod init;
mod job;
mod jq;
mod load;
mod management;
mod memory;
pub mod metrics;
pub mod outbox;
mod pile;
pub mod pipeline;
mod process;
pub mod shutdown;
mod status;
pub mod store;
mod trace;
pub mod worker;

pub use handler::{Context, Failure, Reply};
pub use store::{Tx, TxError};
pub use tokio_postgres;
pub use worker::Worker;
