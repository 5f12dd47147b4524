//! Handlers that are Rust functions inside the store's transaction.
use super::rust::{Failure, ended};
use super::{Call, Context, Handler, Outcome, Reply};
use crate::job::{answer, outgoing};
use crate::metrics::{self, names};
use crate::pipeline::chance;
use crate::store::{Ended, Transactions, Tx};
use futures_util::future::BoxFuture;
use std::sync::Arc;
use std::time::Duration;
use warren_shared::Event;

type Function = dyn Fn(Event, Tx, Context) -> BoxFuture<'static, Result<Reply, Failure>> + Send + Sync;

/// A Rust function that takes part in the store's transaction.
#[derive(Clone)]
pub struct InTx(Arc<Function>);

impl std::fmt::Debug for InTx {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InTx")
    }
}

impl InTx {
    /// Wraps a function. It must not block its thread.
    pub fn new<F, Fut>(function: F) -> Self
    where
        F: Fn(Event, Tx, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Reply, Failure>> + Send + 'static,
    {
        Self(Arc::new(move |event, tx, context| Box::pin(function(event, tx, context))))
    }

    /// The handler, with the transactions that it runs in.
    pub(super) fn on(&self, transactions: Transactions) -> Arc<dyn Handler> {
        Arc::new(Running { function: self.0.clone(), transactions })
    }
}

struct Running {
    function: Arc<Function>,
    transactions: Transactions,
}

/// Between two tries of a transaction: at first, as another one was in the way; and where the database is.
const SHORTEST: Duration = Duration::from_millis(5);
const LONGEST: Duration = Duration::from_millis(2_560);

/// What of a call was not done.
struct Undone(Outcome);

impl From<String> for Undone {
    fn from(error: String) -> Self {
        Self(Outcome::Retry { error, after: None })
    }
}

impl Handler for Running {
    fn handle(&self, call: Call) -> BoxFuture<'static, Outcome> {
        let (function, transactions) = (self.function.clone(), self.transactions.clone());
        Box::pin(async move {
            let mut pause = SHORTEST;
            loop {
                let (event, context, timeout) = (call.event.clone(), call.context.clone(), call.context.timeout);
                let (cause, pool, limits) = (event.clone(), context.pool.clone(), context.limits);
                let hops = context.hops;
                // The result stays beside the transaction, which knows only what it sends.
                let mut result = None;
                let work = async |tx: Tx| {
                    let function = function.clone();
                    match ended(&call, async move { function(event, tx, context).await }).await {
                        Outcome::Done(reply) => {
                            let answer = answer(&cause, Ok(reply.result.as_ref()), &pool, limits);
                            let after = |event: &Event| outgoing(event).after_hops(hops + 1);
                            let out = reply.emit.iter().chain(&answer).map(after).collect();
                            result = reply.result;
                            Ok(out)
                        }
                        other => Err(Undone(other)),
                    }
                };
                match transactions.run(&call.entry, timeout, work).await {
                    Ok(Ended::Recorded(recorded, out)) => return Outcome::Recorded { recorded, out, result },
                    Ok(Ended::Failed(Undone(outcome))) => return outcome,
                    // Neither its fault nor an attempt: the whole of it runs again when the way is free.
                    Err(error) => {
                        metrics::count(names::STORE_ERRORS, 1);
                        // The first time, and every few seconds while it lasts.
                        if pause == SHORTEST || pause == LONGEST {
                            tracing::warn!(
                                id = call.event.id(),
                                r#type = call.event.kind(),
                                %error,
                                "event '{}' runs again: its transaction could not be ended",
                                call.event.id()
                            );
                        }
                        tokio::time::sleep(pause.mul_f64(0.5 + chance())).await;
                        pause = (pause * 2).min(LONGEST);
                    }
                }
            }
        })
    }
}
