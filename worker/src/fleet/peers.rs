//! What the other workers of the pool have routes for: while a deploy is in progress, versions differ.
//!
//! The supervisor says what it heard; the pipeline says where an event came that only another's route takes.
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use warren_shared::fleet::Word;
use warren_shared::pattern::Pattern;

/// The others' routes, and the queues in which ours did not suffice.
#[derive(Debug, Default)]
pub struct Peers {
    known: Mutex<Known>,
    lacked: Notify,
}

#[derive(Debug, Default)]
struct Known {
    routes: Vec<Pattern>,
    lacking: BTreeSet<Arc<str>>,
}

impl Peers {
    /// Whether another worker has a route for a type.
    #[must_use]
    pub fn take(&self, kind: &str) -> bool {
        self.known().routes.iter().any(|route| route.matches(kind))
    }

    /// Notes that an event came to a queue which another worker has a route for, and we have not.
    pub(crate) fn lack(&self, queue: &Arc<str>) {
        if self.known().lacking.insert(queue.clone()) {
            self.lacked.notify_one();
        }
    }

    /// Waits until our routes did not suffice in one more queue.
    pub(super) async fn lacked(&self) {
        self.lacked.notified().await;
    }

    /// The queues in which our routes did not suffice.
    pub(super) fn lacking(&self) -> Vec<String> {
        self.known().lacking.iter().map(|queue| queue.to_string()).collect()
    }

    /// Takes in what the others said last.
    pub(super) fn learn<'a>(&self, others: impl Iterator<Item = &'a Word>) {
        // What is no pattern here may be one for a newer version.
        let routes = others.flat_map(|word| &word.routes).collect::<BTreeSet<_>>();
        self.known().routes = routes.into_iter().filter_map(|route| Pattern::parse(route).ok()).collect();
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // No code that holds the lock can panic half-way through a change.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
