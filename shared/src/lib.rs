//! What is true without I/O: the event schema, the topology as values, every decision.
//!
//! Architecture invariant: nothing here reads a clock, a socket, a file, the environment or a random number. Time,
//! chance and configuration are arguments, so every law can be run through all of its states in a test.
#![warn(clippy::print_stdout)]

pub mod acks;
pub mod amqp;
pub mod assignment;
pub mod dead;
pub mod delivery;
mod encoding;
pub mod env;
pub mod event;
pub mod fleet;
pub mod gather;
pub mod json;
pub mod lane;
pub mod load;
pub mod number;
pub mod pattern;
pub mod process;
pub mod retry;
pub mod schedule;
pub mod seal;
pub mod secret;
pub mod structured;
pub mod topology;
pub mod wire;

#[cfg(test)]
mod explore;

pub use event::{Data, Event, Identity, Limits, Unreadable, Value};
pub use wire::{Incoming, Message};
