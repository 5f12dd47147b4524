//! The handler contract: an event and its context in, an outcome out. Handlers return, they do not send.
//!
//! A new kind of handler is a file here, a variant of `config::Kind` and a line in [`build`].
#[cfg(test)]
mod conformance;
mod emit;
mod exec;
mod filtered;
mod gather;
mod http;
mod line;
mod local;
mod log;
mod process;
mod program;
mod rust;
mod tx;

pub use gather::Gathering;
pub(crate) use gather::OVERDUE;
pub use http::{Endpoint, Header, HttpService, RETRY_ON};
pub(crate) use process::Processes;
pub use rust::{Failure, Rust};
pub use tx::InTx;

use crate::config::{Kind, Route};
use crate::store::{Change, Entry, Kept, Recorded, StoreError, Transactions};
use futures_util::future::BoxFuture;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;
use warren_publisher::log::panic_text;
use warren_shared::Message;
use warren_shared::event::{Event, Limits, Unreadable};
use warren_shared::json::Json;
use warren_shared::structured::Defaults;

/// One call of a handler.
#[derive(Clone, Debug)]
pub struct Call {
    /// The event.
    pub event: Event,
    /// What the handler may ask.
    pub context: Context,
    /// What is recorded of it where the handler runs inside the store's transaction.
    pub(crate) entry: Entry,
    /// The state that it asked for, where it did.
    pub(crate) kept: Option<(Uuid, Option<Kept>)>,
}

/// What surrounds a call.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// The attempt that this call is, counted from 1.
    pub attempt: u32,
    /// How long the handler may take.
    pub timeout: Duration,
    /// The queue that the event came from.
    pub partition: Arc<str>,
    /// The pool; emitted events come from it.
    pub pool: Arc<str>,
    /// How large results and emitted events may be.
    pub limits: Limits,
    /// What repeats of the same work are told by. The event's own, but for a step of a process: there all attempts at the step
    /// of an instance have one, and all attempts to take it back another.
    pub idempotency_key: Uuid,
    /// How many events caused one another until this one.
    pub(crate) hops: u32,
}

/// What a handler did.
#[derive(Debug)]
pub enum Outcome {
    /// It succeeded.
    Done(Reply),
    /// It failed; trying again may help.
    Retry {
        /// Why.
        error: String,
        /// Not before so long.
        after: Option<Duration>,
    },
    /// It did not begin: nothing was done, and trying again may help.
    NotNow {
        /// Why.
        error: String,
        /// Not before so long.
        after: Option<Duration>,
    },
    /// It refused: nothing was done, and trying again cannot help.
    Dead {
        /// Why.
        error: String,
    },
    /// It failed, trying again cannot help, and nobody can tell whether it was done: its answer cannot be understood.
    Unclear {
        /// Why.
        error: String,
    },
    /// The call was ended from outside and does not count.
    Interrupted,
    /// It needs this state first: it is called again with it.
    Needs(Uuid),
    /// It succeeded, or was known, inside the store's transaction, which has ended.
    Recorded {
        /// What became of it.
        recorded: Recorded,
        /// What the new rows of the outbox send.
        out: Vec<Message>,
        /// The result.
        result: Option<Json>,
    },
}

/// What a successful handler returns.
#[derive(Debug, Default)]
pub struct Reply {
    /// The result, as it was written: its numbers keep their digits.
    pub result: Option<Json>,
    /// Events to publish, in this order.
    pub emit: Vec<Event>,
    /// Events for this pool, each after a time.
    pub(crate) later: Vec<(Duration, Event)>,
    /// It only looked on: a process that asks for a step is not answered.
    pub(crate) looked_on: bool,
    /// Its route's filter took it for done.
    pub(crate) filtered: bool,
    /// What becomes of the state that the call was given.
    pub(crate) change: Option<Change>,
    /// How many events caused one another until those of this reply; else one more than until the call's.
    pub(crate) hops: Option<u32>,
}

impl Reply {
    /// Nothing to say.
    #[must_use]
    pub fn done() -> Self {
        Self::default()
    }

    /// Nothing to say, also not to a process.
    pub(crate) fn looked_on() -> Self {
        Self { looked_on: true, ..Self::default() }
    }

    /// Bytes of the bodies in it.
    pub(crate) fn weight(&self) -> usize {
        let bodies = self.emit.iter().chain(self.later.iter().map(|(_, event)| event));
        let sent: usize = bodies.filter_map(|event| Some(event.data()?.as_bytes().len())).sum();
        let result = self.result.as_ref().map_or(0, |result| result.get().len());
        sent + result + self.change.as_ref().map_or(0, |change| change.state.body.len())
    }

    /// The same with a result: what a process gets as the answer of its step. A `serde_json::Value`, or a
    /// `Box<RawValue>` where numbers are to keep more digits than `f64` has.
    #[must_use]
    pub fn result(mut self, result: impl Into<Json>) -> Self {
        self.result = Some(result.into());
        self
    }

    /// The same with one more event to publish.
    #[must_use]
    pub fn emit(mut self, event: Event) -> Self {
        self.emit.push(event);
        self
    }
}

/// A handler, however it runs.
pub trait Handler: Send + Sync + 'static {
    /// Handles one event. Dropping the future ends the call.
    fn handle(&self, call: Call) -> BoxFuture<'static, Outcome>;

    /// Ends what the handler started. No call is running any more.
    fn close(&self) -> BoxFuture<'static, ()> {
        Box::pin(async {})
    }
}

/// What a panic in a handler's code means, ours or a function's: its event failed, and nothing else.
pub(crate) fn panicked(panic: &(dyn Any + Send)) -> Outcome {
    Outcome::Retry { error: format!("the handler panicked: {}", panic_text(panic)), after: None }
}

/// Begins a call. What panics before there is a future has failed, too.
pub(crate) fn begin(handler: &dyn Handler, call: Call) -> BoxFuture<'static, Outcome> {
    catch_unwind(AssertUnwindSafe(|| handler.handle(call)))
        .unwrap_or_else(|panic| Box::pin(std::future::ready(panicked(&*panic))))
}

/// Makes a route's handler. `processes` takes the events of all processes; `transactions` are asked for by those that need them.
///
/// # Errors
/// The store has none.
pub fn build(
    route: &Route,
    processes: &Arc<dyn Handler>,
    transactions: impl FnOnce() -> Result<Transactions, StoreError>,
) -> Result<Arc<dyn Handler>, StoreError> {
    let mut transform = route.transform.clone();
    let handler: Arc<dyn Handler> = match &route.kind {
        Kind::Exec(command) => Arc::new(exec::Exec::start(command.clone())),
        Kind::Http(service) => Arc::new(http::Http::new(service.clone())),
        Kind::Log => Arc::new(log::Log),
        Kind::Emit(kind) => Arc::new(emit::Emit { kind: kind.clone(), transform: transform.take() }),
        Kind::Gather(gathering) => Arc::new(gather::Gather(gathering.clone())),
        Kind::Process => processes.clone(),
        Kind::Rust(handler) => handler.clone(),
        Kind::InTx(handler) => handler.on(transactions()?),
    };
    if route.condition.is_none() && transform.is_none() {
        return Ok(handler);
    }
    let condition = route.condition.clone();
    Ok(Arc::new(filtered::Filtered { condition, transform, inner: handler }))
}

impl Call {
    /// What the `index`th emitted event takes where it says nothing: an id derived from this event's identity (so a
    /// second run emits the same ids), this event's key and trace.
    #[must_use]
    pub fn defaults(&self, index: usize) -> Defaults {
        let trace = self.event.extension("traceparent").map(ToString::to_string);
        Defaults {
            id: self.event.identity().derive(&format!("emit {index}")),
            source: format!("/warren/{}", self.context.pool),
            time: jiff::Timestamp::now().to_string(),
            key: self.event.key().into_owned(),
            trace,
        }
    }

    /// Reads an emitted event, which may leave out everything but its `type`.
    ///
    /// # Errors
    /// Says why it is not an event.
    pub fn emitted(&self, index: usize, json: &[u8]) -> Result<Event, Unreadable> {
        Event::from_partial(json, self.context.limits, self.defaults(index))
    }

    /// Reads a result, JSON; `null` is none. It travels as an event's data, so it must be what data must be.
    ///
    /// # Errors
    /// Says why it is none, without quoting it.
    pub fn result(&self, json: &[u8]) -> Result<Option<Json>, String> {
        let Limits { body, depth } = self.context.limits;
        if json.len() > body {
            return Err(format!("result: it has {} bytes, the limit is {body}", json.len()));
        }
        let json = warren_shared::json::check(json, depth).map_err(|error| format!("result: {error}"))?;
        Ok(Some(json).filter(|json| json.get() != "null"))
    }

    /// A reply of a handler that makes its events itself, held to what the others' replies are held to: its events get
    /// key, trace and time of the call where they have none, and nothing is larger than the limits allow.
    pub(crate) fn held_to(&self, mut reply: Reply) -> Result<Reply, String> {
        let fit = |(i, event): (usize, Event)| {
            let size = event.data().map_or(0, |data| data.as_bytes().len());
            let fits = size <= self.context.limits.body;
            let fits = fits.then_some(event).ok_or(Unreadable::TooLarge { size, limit: self.context.limits.body });
            fits.and_then(|event| event.with_defaults(self.defaults(i))).map_err(|error| format!("emit[{i}]: {error}"))
        };
        let emit = std::mem::take(&mut reply.emit).into_iter().enumerate().map(fit).collect::<Result<_, _>>()?;
        let result = reply.result.take().map(|json| self.result(json.get().as_bytes())).transpose()?.flatten();
        Ok(Reply { result, emit, ..reply })
    }
}
