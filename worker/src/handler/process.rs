//! Events of business processes: what starts an instance, what answers its steps, its timers, and a person's orders.
use super::{Call, Handler, Outcome, Reply};
use crate::pipeline::chance;
use crate::process::{Due, Plan, Plans, Record, Scene};
use crate::store::{Kept, Store};
use futures_util::future::BoxFuture;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use uuid::Uuid;
use warren_shared::Event;
use warren_shared::process::wire::{self, CANCEL, DONE, FAILED, Failed, Name, RESUME, TIMER, Try};
use warren_shared::process::{Direction, Fact};

/// All processes of a pool.
#[derive(Clone)]
pub(crate) struct Processes(Arc<Inner>);

struct Inner {
    plans: Plans,
    store: Arc<dyn Store>,
    /// Definitions that instances began under, today's and those of other days.
    known: Mutex<HashMap<Uuid, Arc<Plan>>>,
}

/// What an event means to an instance.
enum Role {
    Starts,
    Answers(Try),
    Timer,
    Cancels,
    Resumes,
}

impl Processes {
    pub(crate) fn new(plans: Plans, store: Arc<dyn Store>) -> Self {
        let known = plans.iter().map(|plan| (plan.id, plan.clone())).collect();
        Self(Arc::new(Inner { plans, store, known: Mutex::new(known) }))
    }
}

impl Handler for Processes {
    fn handle(&self, call: Call) -> BoxFuture<'static, Outcome> {
        let inner = self.0.clone();
        Box::pin(async move {
            match inner.handle(call).await {
                Ok(outcome) => outcome,
                Err(error) => Outcome::Dead { error },
            }
        })
    }
}

impl Inner {
    async fn handle(&self, mut call: Call) -> Result<Outcome, String> {
        // An event that belongs to an instance may start another one, where nobody here knows that instance.
        let of_one = role(&call.event).zip(Name::of(&call.event));
        let starts = || {
            let plan = self.started_by(&call.event)?;
            Some((Role::Starts, Name::started_by(&plan.definition.name, &call.event)))
        };
        let given = call.kept.take();
        let (role, name, kept) = match (of_one, given) {
            (Some((role, name)), Some((id, Some(kept)))) if id == name.id => (role, name, Some(kept)),
            (Some((_, name)), None) => return Ok(Outcome::Needs(name.id)),
            (_, given) => match (starts(), given) {
                (Some((role, name)), Some((id, kept))) if id == name.id => (role, name, kept),
                (Some((_, name)), _) => return Ok(Outcome::Needs(name.id)),
                (None, _) => {
                    // An answer to a process of another pool, or for an instance that is long forgotten.
                    tracing::debug!(id = call.event.id(), r#type = call.event.kind(), "it belongs to no instance here");
                    return Ok(Outcome::Done(Reply::done()));
                }
            },
        };
        let (plan, record) = match (&role, &kept) {
            // The same event again: the instance is there.
            (Role::Starts, Some(_)) => return Ok(Outcome::Done(Reply::done())),
            (_, None) => {
                let plan = self.started_by(&call.event).ok_or("nothing begins with it")?;
                let record = Record::new(&plan, &call.event, call.context.hops);
                (plan, record)
            }
            (_, Some(kept)) => {
                let record = Record::read(&kept.state);
                let record = record.map_err(|error| format!("the state of {name} cannot be read: {error}"))?;
                match self.plan(record.definition).await {
                    Ok(plan) => (plan, record),
                    Err(error) => return Ok(Outcome::Retry { error: format!("{name}: {error}"), after: None }),
                }
            }
        };
        if !plan.computes() {
            return decide(&call, &name, role, kept.as_ref(), record, &plan).map(Outcome::Done);
        }
        let decided = tokio::task::spawn_blocking(move || decide(&call, &name, role, kept.as_ref(), record, &plan));
        decided.await.map_err(|error| format!("the decision broke off: {error}"))?.map(Outcome::Done)
    }

    /// The process that begins with an event.
    fn started_by(&self, event: &Event) -> Option<Arc<Plan>> {
        let starts = self.plans.iter().filter(|plan| plan.definition.on.matches(event.kind()));
        starts.max_by_key(|plan| plan.definition.on.rank()).cloned()
    }

    /// The definition that an instance began under.
    async fn plan(&self, id: Uuid) -> Result<Arc<Plan>, String> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = known().get(&id).cloned() {
            return Ok(plan);
        }
        let plan = Plan::load(&*self.store, id).await?;
        Ok(known().entry(id).or_insert(Arc::new(plan)).clone())
    }
}

/// What an event means to the instance that it names.
fn role(event: &Event) -> Option<Role> {
    match event.kind() {
        TIMER => Some(Role::Timer),
        CANCEL => Some(Role::Cancels),
        RESUME => Some(Role::Resumes),
        _ if wire::is_answer(event) => Try::of(event).map(Role::Answers),
        _ => None,
    }
}

/// What follows from an event.
fn decide(
    call: &Call,
    name: &Name,
    role: Role,
    kept: Option<&Kept>,
    mut record: Record,
    plan: &Plan,
) -> Result<Reply, String> {
    let (event, now) = (&call.event, jiff::Timestamp::now().as_millisecond());
    let was = record.instance.clone();
    let facts = match role {
        Role::Starts => {
            record.note(now, format!("begun by {} {}", event.kind(), event.id()));
            vec![Fact::Begun]
        }
        Role::Timer => {
            let Due { due } = event.json().map_err(|error| format!("no timer: {error}"))?;
            record.woken(due, now)
        }
        Role::Cancels => {
            record.note(now, "cancelled by a person".into());
            vec![Fact::Cancelled]
        }
        Role::Resumes => {
            record.note(now, "resumed by a person".into());
            vec![Fact::Resumed]
        }
        Role::Answers(asked) => vec![answered(&mut record, event, &asked, plan, now)?],
    };
    let scene = Scene { plan, name, pool: &call.context.pool, limits: call.context.limits, now, chance: chance() };
    let turn = record.take(facts, &scene).map_err(|error| format!("{name}: {error}"))?;
    if record.instance == was && kept.is_some() && turn.emit.is_empty() && turn.later.is_none() {
        tracing::debug!(instance = %name, r#type = event.kind(), "it changes nothing");
        return Ok(Reply::done());
    }
    let change = record.change(name, kept)?;
    let later = turn.later.into_iter().collect();
    Ok(Reply { emit: turn.emit, later, change: Some(change), hops: Some(record.hops()), ..Reply::default() })
}

/// What an answer means; its result is kept.
fn answered(record: &mut Record, event: &Event, asked: &Try, plan: &Plan, now: i64) -> Result<Fact, String> {
    let Try { step: name, direction, attempt } = asked;
    let of = |step: &usize| {
        let defined = &plan.definition.steps[*step];
        let kind = if *direction == Direction::Do { Some(&defined.action) } else { defined.undo.as_ref() };
        let answer = kind.and_then(|kind| event.kind().strip_prefix(kind.as_str()));
        answer.is_some_and(|ending| ending == DONE || ending == FAILED)
    };
    let step = plan.definition.place(name).filter(of);
    let step = step.ok_or_else(|| format!("'{}' answers no step '{asked}' of its process", event.kind()))?;
    let (direction, attempt) = (*direction, *attempt);
    if event.kind().ends_with(DONE) {
        record.note(now, format!("{asked} done"));
        record.answered(name, direction, Ok(wire::result(event)));
        return Ok(Fact::Done { step, direction, attempt });
    }
    let failed = Failed::of(event);
    let error: String = failed.error.chars().take(200).collect();
    record.note(now, format!("{asked} failed: {}: {error}", failed.reason));
    let (permanent, certain) = (failed.reason == "permanent", failed.is_certain());
    record.answered(name, direction, Err(failed));
    Ok(Fact::Failed { step, direction, attempt, permanent, certain })
}
