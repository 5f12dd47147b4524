//! Business processes: what is defined, and what happens to an instance after each fact.
//!
//! A process is a graph of steps. Each step asks for something by an event (`do`) and takes it back by another (`undo`). The
//! law here says what is asked for when; who evaluates conditions, keeps instances and sends events is the worker.
mod definition;
mod instance;
pub mod wire;

pub use definition::{Definition, Draft, Mistake, Step};
pub use instance::{Command, Direction, End, Fact, Going, Instance, Place, State, Wait};
