//! AMQP out: connect, declare, publish with confirms.
//!
//! Architecture invariant: the AMQP library's types stay in `broker`, `sieve`, `declare`, `codec` and `publish`.
#![warn(clippy::print_stdout)]

pub mod broker;
pub mod budget;
pub mod codec;
pub mod declare;
pub mod lines;
pub mod log;
pub mod outbox;
pub mod pace;
pub mod postgres;
pub mod process;
pub mod publish;
pub mod relay;
pub mod seal;
pub mod secrets;
pub mod send;
mod sieve;
mod tls;

pub use broker::{Broker, BrokerError, Link};
pub use publish::{Confirmed, Publisher, Refused};
pub use seal::Seal;
