//! Redelivered events: whose starts are recorded, which run alone, and which wait until it is known who died with them.
use super::stations::{Queue, Station};
use super::{Id, News, Pipeline};
use crate::job::{Accusation, Mark};
use crate::store::{Begin, Start};
use crate::worker::BEAT;
use std::sync::atomic::Ordering;
use warren_shared::delivery::{Action, Fact, State};

/// Beats of this worker without one of another: then that one is dead.
const SILENCE: u64 = 4;
/// Stands for the worker that had an event before, where all take from all partitions and nobody knows which it was.
const ANYBODY: &str = "?";

impl Pipeline {
    /// Has the store count a start.
    pub(super) fn mark(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.mark = Mark::Coming;
        self.enqueue(Station::Start, id);
    }

    /// What the store is asked of a start.
    pub(super) fn begins(&self, id: &Id) -> Option<Begin> {
        let job = self.jobs.get(id)?;
        let Action::Record(start) = job.state.action() else { return None };
        let before = match self.parts.owned {
            true => self.before.get(&job.ticket.epoch()).cloned(),
            false => Some(ANYBODY.into()),
        };
        Some(Begin { event: job.suspect()?, before, most: start.most })
    }

    pub(super) fn started(&mut self, id: Id, start: Start) {
        let beats = self.parts.pulse.beats.load(Ordering::Relaxed);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Start { kept, others, failed } = start;
        let (met, proven) = match &job.accusation {
            // Nothing is known yet of who lives.
            None => (others.len(), others.is_empty()),
            Some(accusation) => accusation.judge(&others, beats >= accusation.beats + SILENCE),
        };
        // Who was not named before is watched from now on.
        if job.accusation.as_ref().is_none_or(|accusation| !accusation.names(&others)) {
            job.accusation = Some(Accusation { beats, others });
        }
        self.fact(id, Fact::Recorded { kept, met: u32::try_from(met).unwrap_or(u32::MAX), proven, failed });
        let Some(job) = self.jobs.get_mut(&id) else { return };
        // The law lets it run where its start is recorded, and only there.
        job.mark = if kept { Mark::Present } else { Mark::Absent };
        if !job.ticket.is_live() || !matches!(job.state, State::Running(_)) {
            self.unmark(id);
        }
    }

    /// Asks again at the next beat: who lives beats, too.
    pub(super) fn await_life(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let tell = self.tell.clone();
        let task = tokio::spawn(async move {
            tokio::time::sleep(*BEAT).await;
            let _ = tell.send(News::Waited(id));
        });
        job.abort = Some(task.abort_handle());
    }

    /// A suspect runs when nothing else does, nothing handled is unrecorded and no other's start is counted: a crash
    /// then has one possible cause.
    pub(super) fn turn_of_the_suspects(&mut self) {
        let unrecorded = |s: &Queue| s.busy || !s.waiting.is_empty();
        let before = [Station::Commit, Station::Publish, Station::Start, Station::Unstart];
        let busy = before.iter().any(|s| unrecorded(self.station(*s))) || self.publishing > 0;
        if self.solo.is_none()
            && self.active == self.alone.len()
            && !busy
            && let Some(id) = self.alone.pop_front()
        {
            self.solo = Some(id);
            self.mark(id);
        }
    }
}
