//! The end: nothing more is taken, what runs finishes, what cannot is interrupted.
use super::{Id, Pipeline};
use crate::job::Job;
use tokio::sync::oneshot;
use warren_shared::delivery::{Fact, State};

impl Pipeline {
    pub(super) fn drain(&mut self, tell: oneshot::Sender<()>) {
        self.draining = true;
        self.drained = Some(tell);
        self.epochs.clear();
        for id in self.schedule.discard(|_| true) {
            self.jobs.remove(&id);
        }
        for (key, id) in self.places.discard(|_| true) {
            self.jobs.remove(&id);
            self.schedule.finish(&key);
        }
        self.leave_holds(|_| true, Fact::Interrupted);
        for id in std::mem::take(&mut self.alone) {
            self.fact(id, Fact::Gone);
        }
    }

    pub(super) fn interrupt(&mut self) {
        let running = |job: &Job| matches!(job.state, State::Running(_));
        let ids: Vec<Id> = self.jobs.iter().filter(|(_, job)| running(job)).map(|(id, _)| *id).collect();
        if !ids.is_empty() {
            tracing::warn!(events = ids.len(), "the drain is over: handlers are interrupted, their events come again");
        }
        self.interrupted.send_replace(true);
        for id in ids {
            self.fact(id, Fact::Interrupted);
        }
    }

    /// Ends waits in place.
    pub(super) fn leave_holds(&mut self, which: impl Fn(&Job) -> bool, fact: Fact) {
        let held: Vec<Id> = self.jobs.iter().filter(|(_, j)| j.waits() && which(j)).map(|(id, _)| *id).collect();
        for id in held {
            if let Some(abort) = self.jobs.get_mut(&id).and_then(|job| job.abort.take()) {
                abort.abort();
            }
            self.fact(id, fact);
        }
    }
}
