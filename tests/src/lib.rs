//! The laboratory of the end-to-end tests: a broker, worker and publisher processes, and a ledger of what happened.
//!
//! Each test has a vhost, a store and a directory of its own (under `target/`), so tests run side by side. Processes
//! end with the test, by their own pids.
pub mod broker;
pub mod exchange;
pub mod fleet;
pub mod foreign;
pub mod frames;
pub mod lab;
pub mod ledger;
pub mod outbox;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod raw;
pub mod receipt;
pub mod service;
pub mod shop;
pub mod soak;
pub mod tap;
pub mod trace;

pub use broker::Rabbit;
pub use exchange::{exchange, ids};
pub use fleet::{Fleet, Load, Map};
pub use lab::{Lab, event, events, until};
pub use ledger::{Ledger, Sink};
pub use postgres::Postgres;
pub use process::Process;
pub use proxy::{Answers, Proxy};
pub use raw::Raw;
pub use service::Service;
pub use soak::length;
pub use tap::Tap;
pub use trace::{Trace, quantile};
