//! Handlers that are Rust functions.
use super::{Call, Context, Handler, Outcome, Reply, panicked};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use warren_shared::Event;

/// Why a Rust handler failed. Any error converts into one that is tried again.
#[derive(Debug)]
pub struct Failure {
    error: String,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Retry(Option<Duration>),
    Dead,
}

impl Failure {
    /// Trying again may help.
    pub fn retry(error: impl ToString) -> Self {
        Self { error: error.to_string(), kind: Kind::Retry(None) }
    }

    /// Trying again may help, not before so long.
    pub fn retry_after(error: impl ToString, after: Duration) -> Self {
        Self { error: error.to_string(), kind: Kind::Retry(Some(after)) }
    }

    /// Trying again cannot help.
    pub fn dead(error: impl ToString) -> Self {
        Self { error: error.to_string(), kind: Kind::Dead }
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::retry(error)
    }
}

type Function = dyn Fn(Event, Context) -> BoxFuture<'static, Result<Reply, Failure>> + Send + Sync;

/// A handler that is a Rust function.
#[derive(Clone)]
pub struct Rust(Arc<Function>);

impl std::fmt::Debug for Rust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Rust")
    }
}

impl Rust {
    /// Wraps a function. It must not block its thread: the broker's heartbeats run beside it.
    pub fn new<F, Fut>(function: F) -> Self
    where
        F: Fn(Event, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Reply, Failure>> + Send + 'static,
    {
        Self(Arc::new(move |event, context| Box::pin(function(event, context))))
    }
}

impl Handler for Rust {
    fn handle(&self, call: Call) -> BoxFuture<'static, Outcome> {
        let function = self.0.clone();
        Box::pin(async move {
            let (event, context) = (call.event.clone(), call.context.clone());
            // The function itself may panic before it returns its future.
            ended(&call, async move { function(event, context).await }).await
        })
    }
}

/// How a function ends, one way or the other.
pub(super) async fn ended(call: &Call, work: impl Future<Output = Result<Reply, Failure>>) -> Outcome {
    let timeout = call.context.timeout;
    match tokio::time::timeout(timeout, AssertUnwindSafe(work).catch_unwind()).await {
        Ok(Ok(Ok(reply))) => match call.held_to(reply) {
            Ok(reply) => Outcome::Done(reply),
            Err(error) => Outcome::Unclear { error: format!("the handler's reply is wrong: {error}") },
        },
        Ok(Ok(Err(Failure { error, kind: Kind::Retry(after) }))) => Outcome::Retry { error, after },
        Ok(Ok(Err(Failure { error, kind: Kind::Dead }))) => Outcome::Dead { error },
        Ok(Err(panic)) => panicked(&*panic),
        Err(_) => Outcome::Retry { error: format!("no answer within {timeout:?}"), after: None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warren_shared::Limits;

    async fn outcome<F, Fut>(function: F) -> Outcome
    where
        F: Fn(Event, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Reply, Failure>> + Send + 'static,
    {
        let event = Event::new("1", "/tests", "a.b").expect("valid");
        let timeout = Duration::from_millis(50);
        let context = Context {
            attempt: 1,
            timeout,
            partition: "p00".into(),
            pool: "p".into(),
            limits: Limits::default(),
            ..Default::default()
        };
        Rust::new(function).handle(Call { event, context, entry: Default::default(), kept: None }).await
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_that_is_tried_again() {
        let inside = outcome(|_, _| async { panic!("in the future") }).await;
        assert!(matches!(inside, Outcome::Retry { error, .. } if error == "the handler panicked: in the future"));
        let before = outcome(|event, _| {
            assert!(event.id() != "1", "before there is a future of {}", event.id());
            std::future::ready(Ok(Reply::done()))
        });
        assert!(
            matches!(before.await, Outcome::Retry { error, .. } if error.contains("before there is a future of 1"))
        );
    }

    #[tokio::test]
    async fn a_hang_ends_at_the_timeout() {
        let hung = outcome(|_, _| std::future::pending()).await;
        assert!(matches!(hung, Outcome::Retry { error, .. } if error == "no answer within 50ms"));
    }

    #[tokio::test]
    async fn failures_say_whether_and_when_to_try_again() {
        let failed = outcome(|_, _| async { Ok::<_, Failure>("x".parse::<u8>().map(|_| Reply::done())?) }).await;
        assert!(matches!(failed, Outcome::Retry { after: None, .. }));
        let wait = Duration::from_secs(9);
        let later = outcome(move |_, _| async move { Err(Failure::retry_after("busy", wait)) }).await;
        assert!(matches!(later, Outcome::Retry { after: Some(after), .. } if after == wait));
        let dead = outcome(|_, _| async { Err(Failure::dead("no such order")) }).await;
        assert!(matches!(dead, Outcome::Dead { error } if error == "no such order"));
    }
}
