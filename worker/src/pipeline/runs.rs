//! Handlers running: together, or alone where one may have killed the process.
use super::stations::{Queue, Station};
use super::{Id, News, Pipeline, chance};
use crate::fault;
use crate::handler::{self, Call, Context};
use crate::job::Mark;
use crate::metrics::{self, names};
use crate::store::Start;
use std::time::{Duration, Instant};
use warren_shared::delivery::{Action, Fact, State};
use warren_shared::retry::Failure;

impl Pipeline {
    pub(super) fn launch(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let (Action::Run(run), Some(event), Some(place)) = (job.state.action(), job.event().cloned(), job.route())
        else {
            return;
        };
        let (Some(route), Some(handler)) = (self.parts.routes.get(place), self.parts.handlers.get(place)) else {
            return;
        };
        let context = Context { timeout: route.timeout, ..self.parts.context.clone() };
        let call = handler.handle(Call { event, attempt: run.attempt, context });
        let (tell, since) = (self.tell.clone(), Instant::now());
        let task = tokio::spawn(async move {
            let outcome = call.await;
            metrics::observe(names::HANDLER_SECONDS, since.elapsed().as_secs_f64());
            let _ = tell.send(News::Handled(id, outcome));
        });
        job.abort = Some(task.abort_handle());
    }

    pub(super) fn handled(&mut self, id: Id, outcome: handler::Outcome) {
        fault::point("handled");
        // An interrupt and the answer may cross.
        let Some(job) = self.jobs.get_mut(&id).filter(|job| matches!(job.state, State::Running(_))) else { return };
        let failed = |failure| Fact::Failed { failure, chance: chance() };
        let fact = match outcome {
            handler::Outcome::Done(reply) => {
                job.reply = reply;
                Fact::Succeeded
            }
            handler::Outcome::Retry { error, after } => {
                job.error = error;
                failed(Failure::Transient { after })
            }
            handler::Outcome::Dead { error } => {
                job.error = error;
                failed(Failure::Permanent)
            }
            handler::Outcome::Interrupted => Fact::Interrupted,
        };
        self.fact(id, fact);
        let Some(job) = self.jobs.get(&id) else { return };
        if let (Action::Park { after, .. } | Action::Hold(_, after), Some(event)) = (job.state.action(), job.event()) {
            metrics::count(names::RETRIED, 1);
            let error: String = job.error.chars().take(200).collect();
            tracing::info!(
                id = event.id(),
                r#type = event.kind(),
                error,
                "event '{}' failed, next attempt in {after:.1?}",
                event.id()
            );
        }
    }

    pub(super) fn hold(&mut self, id: Id, failed: u32, after: Duration) {
        if self.solo == Some(id) {
            self.solo = None;
        }
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let (store, tell, suspect) = (self.parts.store.clone(), self.tell.clone(), job.suspect());
        let task = tokio::spawn(async move {
            // A note that is lost costs repeated attempts after a crash, not the event.
            if let Some(suspect) = suspect
                && let Err(error) = store.note(suspect, failed).await
            {
                tracing::warn!(%error, "a failed attempt cannot be noted");
            }
            tokio::time::sleep(after).await;
            let _ = tell.send(News::Waited(id));
        });
        job.abort = Some(task.abort_handle());
    }

    pub(super) fn started(&mut self, id: Id, start: Start) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.mark = Mark::Present;
        match job.state {
            // Its turn has come: what the store knew was told before.
            State::Running(_) => self.launch(id),
            // It was interrupted meanwhile.
            State::Leaving(_) => self.unmark(id),
            _ => self.fact(id, Fact::Recorded { unfinished: start.unfinished, failed: start.failed }),
        }
        if self.jobs.get(&id).is_some_and(|job| !job.ticket.is_live()) {
            self.unmark(id);
        }
    }

    pub(super) fn unstarted(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.mark = Mark::Absent;
        if matches!(job.state, State::Leaving(_)) {
            self.fact(id, Fact::Released);
        }
    }

    /// Has the store count a start.
    pub(super) fn mark(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.mark = Mark::Coming;
        self.enqueue(Station::Start, id);
    }

    /// Takes the record of a start back, whatever becomes of the job.
    pub(super) fn unmark(&mut self, id: Id) {
        if let Some(job) = self.jobs.get_mut(&id).filter(|job| job.mark == Mark::Present) {
            job.mark = Mark::Going;
            self.enqueue(Station::Unstart, id);
        }
    }

    /// A suspect runs when nothing else does, nothing handled is unrecorded and no other's start is counted: a crash
    /// then has one possible cause.
    pub(super) fn turn_of_the_suspects(&mut self) {
        let unrecorded = |s: &Queue| s.busy || !s.waiting.is_empty();
        let before = [Station::Commit, Station::Publish, Station::Start, Station::Unstart];
        let busy = before.iter().any(|s| unrecorded(&self.stations[s]));
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
