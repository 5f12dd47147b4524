//! `where` and `transform` before any kind of handler: whether it gets an event, and with which data.
use super::{Call, Handler, Outcome, Reply, panicked};
use crate::jq::{self, Jq, JqError, Limits, TIME};
use futures_util::future::BoxFuture;
use std::sync::Arc;
use warren_shared::Event;
use warren_shared::event::{Data, Unreadable, Value};

pub(super) struct Filtered {
    pub(super) condition: Option<Jq>,
    pub(super) transform: Option<Jq>,
    pub(super) inner: Arc<dyn Handler>,
}

impl Handler for Filtered {
    fn handle(&self, mut call: Call) -> BoxFuture<'static, Outcome> {
        let inner = self.inner.clone();
        let (condition, transform) = (self.condition.clone(), self.transform.clone());
        Box::pin(async move {
            // Whoever handles it may be another pool.
            let filtered = || Outcome::Done(Reply { filtered: true, ..Reply::looked_on() });
            if let Some(condition) = condition {
                match run(condition, "where", &call).await {
                    Ok(outputs) if jq::holds(&outputs) => {}
                    Ok(_) => return filtered(),
                    Err(outcome) => return outcome,
                }
            }
            if let Some(transform) = transform {
                let mut outputs = match run(transform, "transform", &call).await {
                    Ok(outputs) => outputs,
                    Err(outcome) => return outcome,
                };
                let several = outputs.len();
                let Some(data) = outputs.pop() else { return filtered() };
                if several > 1 {
                    let error =
                        format!("transform: it returned {several} values, and a handler gets one: collect them in [ ]");
                    return Outcome::Dead { error };
                }
                match with_data(&call, &data) {
                    Ok(event) => call.event = event,
                    Err(error) => return Outcome::Dead { error: format!("transform: the data is wrong: {error}") },
                }
            }
            inner.handle(call).await
        })
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.inner.close()
    }
}

fn with_data(call: &Call, data: &[u8]) -> Result<Event, Unreadable> {
    let mut event = call.event.clone();
    if !matches!(event.data(), Some(Data::Json(_))) {
        event = event.with("datacontenttype", Value::Text("application/json".into()))?;
    }
    event.with_json(data, call.context.limits)
}

/// Runs a program on a call's event, beside the threads that others wait for.
///
/// # Errors
/// The outcome of a program that fails: dead, as it would fail again.
pub(super) async fn run(program: Jq, field: &str, call: &Call) -> Result<Vec<Vec<u8>>, Outcome> {
    let (event, limits) = (call.event.clone(), Limits { time: TIME, output: call.context.limits.body });
    let running = tokio::task::spawn_blocking(move || program.run(event.to_json().as_bytes(), limits));
    match running.await {
        Ok(ended) => ended.map_err(|error: JqError| Outcome::Dead { error: format!("{field}: {error}") }),
        // It panicked, or the worker ends before it could begin.
        Err(ended) => Err(ended.try_into_panic().map_or(Outcome::Interrupted, |panic| panicked(&*panic))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::emit::Emit;
    use super::*;
    use crate::handler::Context;
    use crate::store::Entry;
    use std::time::Duration;
    use warren_shared::event::Limits as Size;

    /// Says what it got.
    struct Echo;

    impl Handler for Echo {
        fn handle(&self, call: Call) -> BoxFuture<'static, Outcome> {
            Box::pin(async move { Outcome::Done(Reply::done().emit(call.event)) })
        }
    }

    fn call(event: Event) -> Call {
        let entry = Entry { seen: None, started: None, partition: "p".into() };
        let timeout = Duration::from_secs(1);
        let context = Context {
            attempt: 1,
            timeout,
            partition: "p00".into(),
            pool: "orders".into(),
            limits: Size::default(),
            ..Default::default()
        };
        Call { event, context, entry, kept: None }
    }

    fn order(data: &str) -> Event {
        let text = format!(
            r#"{{"specversion":"1.0","id":"1","source":"/s","type":"order.viewed","partitionkey":"k","traceparent":"t","data":{data}}}"#
        );
        Event::from_json(text.as_bytes(), Size::default()).expect("valid")
    }

    fn program(text: &str) -> Option<Jq> {
        (!text.is_empty()).then(|| Jq::compile(text).expect("valid"))
    }

    async fn through(condition: &str, transform: &str, event: Event) -> Outcome {
        let (condition, transform) = (program(condition), program(transform));
        Filtered { condition, transform, inner: Arc::new(Echo) }.handle(call(event)).await
    }

    fn emitted(outcome: Outcome) -> Vec<Event> {
        match outcome {
            Outcome::Done(reply) => reply.emit,
            other => panic!("{other:?}"),
        }
    }

    fn dead(outcome: Outcome) -> String {
        match outcome {
            Outcome::Dead { error } => error,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn only_what_the_condition_holds_for_is_handled() {
        for (condition, handled) in [
            (".data.total > 100", true),
            (".data.total < 100", false),
            (".data.total", true),
            (".data.nothing", false),
            ("empty", false),
            (".type == \"order.viewed\" and .partitionkey == \"k\"", true),
        ] {
            let events = emitted(through(condition, "", order(r#"{"total":101}"#)).await);
            assert_eq!(events.len(), usize::from(handled), "{condition}");
        }
        let error = dead(through(".data | keys", "", order("5")).await);
        assert_eq!(error, "where: cannot use number as iterable (array or object)");
        assert!(dead(through("last(repeat(1))", "", order("5")).await).starts_with("where: it took longer than"));
    }

    #[tokio::test]
    async fn a_handler_gets_the_one_value_that_the_transform_makes() {
        let events = emitted(through("", "{n: .data.id}", order(r#"{"id":1.50}"#)).await);
        assert_eq!(events[0].data().expect("data").as_bytes(), br#"{"n":1.50}"#);
        assert_eq!((events[0].id(), events[0].kind(), &*events[0].key()), ("1", "order.viewed", "k"));
        assert!(emitted(through("", "empty", order("1")).await).is_empty());
        assert!(dead(through("", ".data[]", order("[1,2]")).await).contains("2 values, and a handler gets one"));
        assert!(dead(through("", "nan", order("1")).await).starts_with("transform: the data is wrong: "));
        let text =
            r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","datacontenttype":"text/plain","data":"a,b"}"#;
        let event = Event::from_json(text.as_bytes(), Size::default()).expect("valid");
        let events = emitted(through("", ".data / \",\"", event).await);
        assert_eq!(events[0].data(), Some(&order(r#"["a","b"]"#).data().expect("data").clone()));
        assert_eq!(events[0].content_type(), Some("application/json"));
    }

    #[tokio::test]
    async fn emit_makes_an_event_of_every_output_in_their_order() {
        let emit = |transform: &str| Emit { kind: "order.large".into(), transform: program(transform) };
        let events = emitted(emit(".data[] | {n: .}").handle(call(order("[1,2]"))).await);
        let data: Vec<&[u8]> = events.iter().map(|event| event.data().expect("data").as_bytes()).collect();
        assert_eq!(data, [br#"{"n":1}"#, br#"{"n":2}"#]);
        assert!(events.iter().all(|event| event.kind() == "order.large" && event.key() == "k"));
        assert!(events.iter().all(|event| event.source() == "/warren/orders"));
        assert!(events.iter().all(|event| event.extension("traceparent").is_some_and(|t| t.to_string() == "t")));
        let again = emitted(emit(".data[] | {n: .}").handle(call(order("[1,2]"))).await);
        assert_eq!((again[0].id(), again[1].id()), (events[0].id(), events[1].id()), "a second run emits the same ids");
        assert_ne!(events[0].id(), events[1].id());
        assert!(emitted(emit("empty").handle(call(order("1"))).await).is_empty());
        let error = dead(emit(".data | keys").handle(call(order("1"))).await);
        assert!(error.starts_with("transform: cannot use number"), "{error}");
    }

    #[tokio::test]
    async fn emit_without_a_transform_passes_the_data_on_as_it_came() {
        for body in [
            r#""data":{"a":1.50}"#,
            r#""datacontenttype":"text/plain","data":"a \"b\"""#,
            r#""datacontenttype":"image/png","data_base64":"AAEC""#,
            r#""subject":"s""#,
        ] {
            let text = format!(r#"{{"specversion":"1.0","id":"1","source":"/s","type":"t",{body}}}"#);
            let event = Event::from_json(text.as_bytes(), Size::default()).expect("valid");
            let events = emitted(Emit { kind: "u".into(), transform: None }.handle(call(event.clone())).await);
            assert_eq!(events.len(), 1);
            assert_eq!(events[0].data(), event.data(), "{body}");
            assert_eq!(events[0].content_type(), event.content_type(), "{body}");
        }
    }
}
