//! Subscriptions: deliveries come in, proofs go out as acks.
//!
//! One task a partition, one channel a task. However a consumer ends (error, cancel, closed channel or connection, a
//! queue that is gone, a hand-over), the way on is the same: a new channel, a new epoch, consume again if that is still
//! wanted. A ticket belongs to the epoch that it came from, so an ack can never reach another channel.
mod links;
mod subscription;

pub use links::Subscriptions;
pub use subscription::{Slot, Standing, Want};

use crate::store::Committed;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use warren_publisher::Confirmed;
use warren_publisher::budget::Share;
use warren_shared::acks::Ledger;
use warren_shared::{Incoming, Message, Unreadable};

/// Why the broker may forget a delivery.
#[derive(Debug)]
pub enum Proof {
    /// The store has its outcome.
    Committed(Committed),
    /// The broker has another copy.
    Confirmed(Confirmed),
}

/// A partition's place in the topology.
#[derive(Debug)]
pub struct Place {
    /// The lane's place in the lanes.
    pub lane: usize,
    /// The lane's name.
    pub lane_name: String,
    /// The queue.
    pub queue: Arc<str>,
}

/// The duty to settle one delivery. Without an ack the broker delivers it again when the channel ends; a hand-over waits
/// until no ticket is left.
///
/// ```compile_fail
/// fn f(ticket: warren_worker::consumer::Ticket) {
///     ticket.ack(); // no proof, no ack
/// }
/// ```
#[derive(Debug)]
#[must_use]
pub struct Ticket {
    epoch: Arc<Epoch>,
    tag: u64,
    /// Of the memory for what is held.
    _share: Share,
}

impl Ticket {
    /// Acknowledges, with the next flush of its channel. A no-op where the channel has ended.
    pub fn ack(self, _proof: Proof) {
        self.epoch.ledger().settle(self.tag);
        self.epoch.settled.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the broker still waits for this delivery's ack.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.epoch.live.load(Ordering::Acquire)
    }

    /// Whether work on it may begin: not where the channel ended, nor where the partition is handed over.
    #[must_use]
    pub fn may_begin(&self) -> bool {
        self.is_live() && !self.epoch.leaving.load(Ordering::Acquire)
    }

    /// The channel's number, unique in this process.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch.number
    }

    /// The partition.
    #[must_use]
    pub fn place(&self) -> &Arc<Place> {
        &self.epoch.place
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.epoch.tickets.fetch_sub(1, Ordering::AcqRel);
        self.epoch.flush.notify_one();
    }
}

/// One channel's life.
#[derive(Debug)]
pub struct Epoch {
    number: u64,
    place: Arc<Place>,
    ledger: Mutex<Ledger>,
    live: AtomicBool,
    /// The partition is handed over: what has not begun does not begin.
    leaving: AtomicBool,
    /// Tickets out.
    tickets: AtomicUsize,
    received: AtomicU64,
    settled: AtomicU64,
    /// When the first of each batch happened, in milliseconds since 1970, by its tag.
    ages: Mutex<VecDeque<(u64, i64)>>,
    flush: Notify,
}

impl Epoch {
    fn new(number: u64, place: Arc<Place>) -> Self {
        Self {
            number,
            place,
            ledger: Mutex::default(),
            live: AtomicBool::new(true),
            leaving: AtomicBool::new(false),
            tickets: AtomicUsize::new(0),
            received: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            ages: Mutex::default(),
            flush: Notify::new(),
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }

    /// Deliveries that came: where there is one, this is the queue's active consumer.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Deliveries that were acknowledged.
    #[must_use]
    pub fn settled(&self) -> u64 {
        self.settled.load(Ordering::Relaxed)
    }

    /// Deliveries that are not settled.
    #[must_use]
    pub fn unacked(&self) -> usize {
        self.ledger().unsettled()
    }

    /// When the oldest of them happened, in milliseconds since 1970.
    #[must_use]
    pub fn oldest(&self) -> Option<i64> {
        let first = self.ledger().first_unsettled()?;
        let mut ages = lock(&self.ages);
        while ages.get(1).is_some_and(|(tag, _)| *tag <= first) {
            ages.pop_front();
        }
        ages.front().map(|(_, at)| *at)
    }
}

/// No code that holds one of these locks can panic half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A delivery as it arrives.
#[derive(Debug)]
pub struct Arrival {
    /// The duty to settle it.
    pub ticket: Ticket,
    /// Whether the broker delivered it before.
    pub redelivered: bool,
    /// The event; or the message that is none, and why.
    pub content: Result<Incoming, Box<(Message, Unreadable)>>,
    /// When the event happened, in milliseconds since 1970, if it tells.
    pub born: Option<i64>,
}

/// What subscriptions tell the pipeline.
#[derive(Debug)]
pub enum News {
    /// Deliveries of one epoch, in order.
    Arrived(Vec<Arrival>),
    /// An epoch is handed over: what has not begun is given back, what runs ends first.
    Leaving(u64),
    /// An epoch ended; the broker delivers again what it held.
    Ended(u64),
}
