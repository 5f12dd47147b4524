//! Handlers running: together, or alone where one may have killed the process.
use super::stations::Station;
use super::{Id, News, Pipeline, chance};
use crate::fault;
use crate::handler::{self, Call, Context};
use crate::job::{Job, Mark};
use crate::store::Kept;
use crate::trace::{self, Span};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use metrics::Histogram;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;
use warren_shared::delivery::{Action, Fact, State};
use warren_shared::process::wire::idempotency_key;
use warren_shared::retry::Failure;

/// Handlers that end at once may share a task for so long.
const BRIEF: Duration = Duration::from_micros(500);
/// A note that the store refused is tried again after so long.
const AGAIN: Duration = Duration::from_secs(1);

/// A handler's call.
pub(super) struct Started {
    id: Id,
    call: BoxFuture<'static, handler::Outcome>,
    seconds: Histogram,
    span: Span,
}

impl Started {
    /// The call's outcome; a panic is one as well, so that it costs no other call of its turn.
    fn outcome(&mut self) -> impl Future<Output = handler::Outcome> {
        let guarded = AssertUnwindSafe(&mut self.call).catch_unwind();
        guarded.map(|ended| ended.unwrap_or_else(|panic| handler::panicked(&*panic)))
    }

    async fn alone(
        mut self,
        since: Instant,
        tell: mpsc::UnboundedSender<News>,
        mut interrupted: watch::Receiver<bool>,
    ) {
        let outcome = tokio::select! {
            biased;
            _ = interrupted.wait_for(|interrupted| *interrupted) => handler::Outcome::Interrupted,
            outcome = self.outcome() => outcome,
        };
        self.seconds.record(since.elapsed().as_secs_f64());
        self.span.end(&outcome);
        let _ = tell.send(News::Handled(vec![(self.id, outcome)]));
    }
}

/// Runs calls. One task polls each once; only what does not end at once, or comes after one that computes for long, costs a task
/// of its own.
async fn run(calls: Vec<Started>, tell: mpsc::UnboundedSender<News>, interrupted: watch::Receiver<bool>) {
    let mut calls = calls.into_iter();
    let (begun, mut ended) = (Instant::now(), Vec::with_capacity(calls.len()));
    let mut now = begun;
    let alone = |call: Started, since| drop(tokio::spawn(call.alone(since, tell.clone(), interrupted.clone())));
    while now - begun < BRIEF
        && let Some(mut started) = calls.next()
    {
        let since = now;
        let outcome = started.outcome().now_or_never();
        now = Instant::now();
        match outcome {
            Some(outcome) => {
                started.seconds.record((now - since).as_secs_f64());
                started.span.end(&outcome);
                ended.push((started.id, outcome));
            }
            None => alone(started, since),
        }
    }
    calls.for_each(|started| alone(started, now));
    let _ = tell.send(News::Handled(ended));
}

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
        let partition = job.ticket.place().queue.clone();
        let context = Context {
            attempt: run.attempt,
            timeout: route.timeout,
            partition,
            idempotency_key: job.identity().map_or_else(Uuid::nil, |identity| idempotency_key(&event, identity)),
            hops: job.hops,
            ..self.parts.context.clone()
        };
        let (event, span) = trace::begin(event, &context);
        let kept = job.kept.clone();
        let call = Call { event, context, entry: job.entry(), kept };
        let call = handler::begin(&**handler, call);
        let lane = job.ticket.place().lane;
        if run.attempt == 1
            && let Some(age) = job.lag()
        {
            self.meters.lane(lane).wait.record(age);
        }
        self.calls.push(Started { id, call, seconds: self.meters.of(lane, Some(place)).seconds.clone(), span });
    }

    /// Runs what was launched in this turn.
    pub(super) fn start_calls(&mut self) {
        if !self.calls.is_empty() {
            let calls = std::mem::take(&mut self.calls);
            tokio::spawn(run(calls, self.tell.clone(), self.interrupted.subscribe()));
        }
    }

    pub(super) fn handled(&mut self, id: Id, outcome: handler::Outcome) {
        fault::point("handled");
        // An interrupt and the answer may cross.
        let Some(job) = self.jobs.get_mut(&id).filter(|job| matches!(job.state, State::Running(_))) else { return };
        let failed = |failure| Fact::Failed { failure, chance: chance() };
        let fact = match outcome {
            handler::Outcome::Done(reply) => {
                let before = std::mem::replace(&mut job.weight, reply.weight());
                self.replies = self.replies - before + job.weight;
                job.reply = reply;
                Fact::Succeeded
            }
            handler::Outcome::Recorded { recorded, out, result } => {
                job.reply.result = result;
                job.recorded = Some((recorded, out));
                Fact::Succeeded
            }
            // It runs again with what it asked for, in the same attempt.
            handler::Outcome::Needs(state) => {
                job.needs = Some(state);
                return self.enqueue(Station::Load, id);
            }
            handler::Outcome::Retry { error, after } => {
                (job.error, job.untouched) = (error, false);
                failed(Failure::Transient { after })
            }
            handler::Outcome::NotNow { error, after } => {
                job.error = error;
                failed(Failure::Transient { after })
            }
            handler::Outcome::Dead { error } => {
                job.error = error;
                failed(Failure::Permanent)
            }
            handler::Outcome::Unclear { error } => {
                (job.error, job.untouched, job.unclear) = (error, false, true);
                failed(Failure::Permanent)
            }
            handler::Outcome::Interrupted => Fact::Interrupted,
        };
        self.fact(id, fact);
        let Some(job) = self.jobs.get(&id) else { return };
        if let (Action::Park { after, .. } | Action::Hold(_, after), Some(event)) = (job.state.action(), job.event()) {
            self.meters.of(job.ticket.place().lane, job.route()).retried.increment(1);
            let error: String = job.error.chars().take(200).collect();
            tracing::info!(
                id = event.id(),
                r#type = event.kind(),
                key = %event.key(),
                partition = &*job.ticket.place().queue,
                attempt = job.attempt(),
                trace_id = event.trace_id(),
                error,
                "event '{}' failed, next attempt in {after:.1?}",
                event.id()
            );
        }
    }

    pub(super) fn loaded(&mut self, id: Id, kept: Option<Kept>) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| matches!(job.state, State::Running(_))) else { return };
        job.kept = job.needs.take().map(|state| (state, kept));
        self.launch(id);
    }

    /// Another worker has a route for it: the pool learns that ours do not suffice there, and gives it the partition.
    pub(super) fn await_route(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let queue = &job.ticket.place().queue;
        self.parts.peers.lack(queue);
        let (tell, grace) = (self.tell.clone(), self.parts.unknown_grace);
        if let Some(event) = job.event() {
            tracing::warn!(
                id = event.id(),
                r#type = event.kind(),
                key = %event.key(),
                partition = &**queue,
                "event '{}' waits {grace:?} at most: only another worker of this pool has a route for its type",
                event.id()
            );
        }
        let task = tokio::spawn(async move {
            tokio::time::sleep(grace).await;
            let _ = tell.send(News::Waited(id));
        });
        job.abort = Some(task.abort_handle());
    }

    pub(super) fn hold(&mut self, id: Id, failed: u32, after: Duration) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.noted = true;
        let (store, tell, suspect) = (self.parts.store.clone(), self.tell.clone(), job.suspect());
        let task = tokio::spawn(async move {
            // Before anything else may begin: a death while its start counts would be laid at its door.
            while let Some(suspect) = suspect
                && let Err(error) = store.note(suspect, failed).await
            {
                tracing::warn!(%error, "a failed attempt cannot be noted, trying again: its key waits");
                tokio::time::sleep(AGAIN).await;
            }
            let _ = tell.send(News::Noted(id));
            tokio::time::sleep(after).await;
            let _ = tell.send(News::Waited(id));
        });
        job.abort = Some(task.abort_handle());
    }

    /// A wait in place is over, unless a drain ended it just before.
    pub(super) fn waited(&mut self, id: Id) {
        if self.jobs.get(&id).is_some_and(Job::waits) {
            self.fact(id, Fact::Waited);
        }
    }

    /// The failed attempt is noted, which ended its start.
    pub(super) fn noted(&mut self, id: Id) {
        if let Some(job) = self.jobs.get_mut(&id).filter(|job| job.mark == Mark::Present) {
            job.mark = Mark::Absent;
        }
        if self.solo == Some(id) {
            self.solo = None;
        }
    }

    pub(super) fn unstarted(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.mark = Mark::Absent;
        if matches!(job.state, State::Leaving(_)) {
            self.fact(id, Fact::Released);
        }
    }

    /// Takes the record of a start back, whatever becomes of the job.
    pub(super) fn unmark(&mut self, id: Id) {
        if let Some(job) = self.jobs.get_mut(&id).filter(|job| job.mark == Mark::Present) {
            job.mark = Mark::Going;
            self.enqueue(Station::Unstart, id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::{Outcome, Reply};
    use std::collections::BTreeMap;

    /// Panics before there is a future, as `log` could.
    struct Hasty;

    impl handler::Handler for Hasty {
        fn handle(&self, call: Call) -> BoxFuture<'static, Outcome> {
            panic!("event {}", call.event.id())
        }
    }

    fn context() -> Context {
        let (partition, pool, limits) = ("p00".into(), "tests".into(), Default::default());
        Context { attempt: 1, timeout: BRIEF, partition, pool, limits, ..Context::default() }
    }

    fn event() -> warren_shared::Event {
        warren_shared::Event::new("1", "/tests", "a.b").expect("valid")
    }

    async fn done(waits: u32) -> Outcome {
        for _ in 0..waits {
            tokio::task::yield_now().await;
        }
        Outcome::Done(Reply::done())
    }

    async fn broken(waits: u32) -> Outcome {
        done(waits).await;
        panic!("a bug")
    }

    #[tokio::test]
    async fn of_calls_that_run_together_only_the_one_that_panics_fails() {
        let calls: [BoxFuture<'static, Outcome>; 6] = [
            Box::pin(done(0)),
            Box::pin(broken(0)),
            Box::pin(done(3)),
            Box::pin(broken(3)),
            handler::begin(&Hasty, Call { event: event(), context: context(), entry: Default::default(), kept: None }),
            Box::pin(done(0)),
        ];
        let started = |(id, call)| Started {
            id: id as Id,
            call,
            seconds: Histogram::noop(),
            span: trace::begin(event(), &context()).1,
        };
        let (tell, mut told) = mpsc::unbounded_channel();
        let (_interrupt, interrupted) = watch::channel(false);
        run(calls.into_iter().enumerate().map(started).collect(), tell, interrupted).await;
        let mut outcomes = BTreeMap::new();
        while let Some(News::Handled(handled)) = told.recv().await {
            for (id, outcome) in handled {
                let word = match outcome {
                    Outcome::Done(_) => "done".to_owned(),
                    Outcome::Retry { error, after: None } => error,
                    other => panic!("{other:?}"),
                };
                assert!(outcomes.insert(id, word).is_none(), "call {id} has two outcomes");
            }
        }
        let bug = "the handler panicked: a bug";
        let wanted = ["done", bug, "done", bug, "the handler panicked: event 1", "done"];
        assert_eq!(outcomes.into_values().collect::<Vec<_>>(), wanted);
    }
}
