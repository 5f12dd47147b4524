//! `log: {}`: writes the event's identity to the log and is done. Never its data.
use super::{Call, Handler, Outcome, Reply};
use futures_util::future::BoxFuture;

#[derive(Debug)]
pub(super) struct Log;

impl Handler for Log {
    fn handle(&self, call: Call) -> BoxFuture<'static, Outcome> {
        let event = &call.event;
        tracing::info!(
            id = event.id(),
            source = event.source(),
            r#type = event.kind(),
            key = %event.key(),
            partition = &*call.context.partition,
            attempt = call.context.attempt,
            trace_id = event.trace_id(),
            "event {} of {}",
            event.id(),
            event.kind()
        );
        Box::pin(std::future::ready(Outcome::Done(Reply::looked_on())))
    }
}
