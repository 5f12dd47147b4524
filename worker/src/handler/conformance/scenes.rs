//! Cases that take more than one call. Each is a test of its own for each kind.
use super::hosts::{ALL, Kind, Stage};
use super::{call, call_of, seen};
use crate::handler::{Call, Outcome};
use futures_util::future::join_all;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use warren_shared::Event;

macro_rules! scenes {
    (all: $($all:ident)+; not_rust: $($some:ident)+;) => {
        scenes! { Rust rust: $($all)+ }
        scenes! { Http http: $($all)+ $($some)+ }
        scenes! { Exec exec: $($all)+ $($some)+ }
    };
    ($kind:ident $room:ident: $($scene:ident)+) => {
        mod $room {
            $(
                #[tokio::test]
                async fn $scene() {
                    super::$scene(super::Kind::$kind).await;
                }
            )+
        }
    };
}

scenes! {
    all:
        ids_of_emitted_events_are_the_same_in_a_second_run
        emitted_events_take_key_trace_and_time_where_they_have_none
        the_idempotency_key_belongs_to_the_event_and_not_to_the_attempt
        a_crash_leaves_its_neighbours_alone
        a_hang_leaves_its_neighbours_alone
        a_slow_call_holds_no_other
        fifty_calls_at_once_get_each_its_own_answer
        a_dropped_call_ends_and_the_next_is_answered
        large_data_comes_and_goes;
    // A function returns once, and is always there.
    not_rust:
        a_second_answer_is_nobodys
        who_is_not_there_is_tried_again;
}

async fn emitted(stage: &Stage, call: Call) -> Vec<Event> {
    match stage.outcome(call).await {
        Outcome::Done(reply) => reply.emit,
        other => panic!("{other:?}"),
    }
}

fn ids(events: &[Event]) -> Vec<&str> {
    events.iter().map(Event::id).collect()
}

async fn ids_of_emitted_events_are_the_same_in_a_second_run(kind: Kind) {
    let stage = Stage::open(kind).await;
    for script in [
        r#"{"do":"reply","emit":[{"type":"a"},{"type":"a"}]}"#,
        r#"{"do":"reply","emit":[{"type":"a"}]}"#,
        r#"{"do":"reply","form":"binary","emit":[{"type":"a"}]}"#,
    ] {
        let first = call("1", script);
        let mut again = first.clone();
        again.context.attempt = 2;
        let (first, again) = (emitted(&stage, first).await, emitted(&stage, again).await);
        assert_eq!(ids(&first), ids(&again), "{kind:?}, {script}");
        let derived: Vec<String> = (0..first.len()).map(|i| call("1", script).defaults(i).id).collect();
        assert_eq!(ids(&first), derived, "{kind:?}, {script}: the ids are the same whatever the kind");
        let other = emitted(&stage, call("2", script)).await;
        assert!(ids(&first).iter().all(|id| !ids(&other).contains(id)), "{kind:?}: another event emits others");
        assert!(first.iter().all(|event| event.source() == "/warren/tests"), "{kind:?}");
    }
    let named =
        emitted(&stage, call("1", r#"{"do":"reply","form":"binary","emit":[{"type":"a","id":"i","source":"/s"}]}"#));
    let named = named.await;
    assert_eq!((named[0].id(), named[0].source()), ("i", "/s"), "{kind:?}");
}

const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const OTHER: &str = "00-1af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

async fn emitted_events_take_key_trace_and_time_where_they_have_none(kind: Kind) {
    let stage = Stage::open(kind).await;
    let cause = || {
        let event = Event::new("1", "/tests", "thing.done").expect("valid").with("partitionkey", "köy 1".into());
        event.and_then(|event| event.with("traceparent", TRACE.into())).expect("valid")
    };
    let emit = json!([
        {"type": "bare"},
        {"type": "keyed", "partitionkey": "own"},
        {"type": "about", "subject": "s"},
        {"type": "traced", "traceparent": OTHER, "time": "2026-01-01T00:00:00Z"},
    ]);
    let wanted = [("köy 1", TRACE), ("own", TRACE), ("s", TRACE), ("köy 1", OTHER)];
    let check = |events: &[Event], wanted: &[(&str, &str)]| {
        assert_eq!(events.len(), wanted.len(), "{kind:?}");
        for (event, (key, trace)) in events.iter().zip(wanted) {
            assert_eq!(event.key(), *key, "{kind:?}, {}", event.kind());
            let found = event.extension("traceparent").map(ToString::to_string);
            assert_eq!(found.as_deref(), Some(*trace), "{kind:?}, {}", event.kind());
            assert!(event.time().is_some(), "{kind:?}, {}", event.kind());
        }
    };
    let all = emitted(&stage, call_of(cause(), &json!({"do": "reply", "emit": emit}).to_string())).await;
    check(&all, &wanted);
    assert_eq!(all[3].time(), Some("2026-01-01T00:00:00Z"), "{kind:?}");
    for form in [Value::Null, "binary".into()] {
        for (i, wanted) in wanted.iter().enumerate() {
            let script = json!({"do": "reply", "form": form, "emit": [emit[i]]});
            check(&emitted(&stage, call_of(cause(), &script.to_string())).await, &[*wanted]);
        }
    }
    let untraced = emitted(&stage, call("no trace, no key", r#"{"do":"reply","emit":[{"type":"a"}]}"#)).await;
    assert_eq!((untraced[0].key().as_ref(), untraced[0].extension("traceparent")), ("no trace, no key", None));
}

async fn the_idempotency_key_belongs_to_the_event_and_not_to_the_attempt(kind: Kind) {
    let stage = Stage::open(kind).await;
    let mut keys = Vec::new();
    for (id, source, attempt) in [("1", "/a", 1), ("1", "/a", 7), ("2", "/a", 1), ("1", "/b", 1)] {
        let event = Event::new(id, source, "a.b").and_then(|event| event.with("traceparent", TRACE.into()));
        let mut call = call_of(event.expect("valid"), r#"{"do":"tell"}"#);
        call.context.attempt = attempt;
        let told = stage.result(call).await;
        assert_eq!((&told["attempt"], &told["trace"]), (&attempt.into(), &TRACE.into()), "{kind:?}");
        keys.push(told["key"].as_str().expect("a key").to_owned());
    }
    assert_eq!(keys[0], keys[1], "{kind:?}");
    assert!(keys[0] != keys[2] && keys[0] != keys[3] && keys[2] != keys[3], "{kind:?}: {keys:?}");
}

/// What a script does between calls that are slow and well.
async fn among_neighbours(kind: Kind, script: &str, timeout: Duration) {
    let stage = Stage::open(kind).await;
    assert_eq!(stage.result(call("warm", r#"{"do":"wait","ms":1,"result":0}"#)).await, 0, "{kind:?}");
    let slow = |n: usize| call(&format!("n{n}"), &json!({"do": "wait", "ms": 600, "result": n}).to_string());
    let mut bad = call("bad", script);
    bad.context.timeout = timeout;
    let before = join_all((0..3).map(|n| stage.result(slow(n))));
    let after = join_all((3..6).map(|n| stage.result(slow(n))));
    let (before, bad, after) = tokio::join!(before, stage.outcome(bad), after);
    assert_eq!((before, after), (vec![json!(0), json!(1), json!(2)], vec![json!(3), json!(4), json!(5)]), "{kind:?}");
    assert_eq!(seen(bad).0, json!({"retry": null}), "{kind:?}");
}

async fn a_crash_leaves_its_neighbours_alone(kind: Kind) {
    among_neighbours(kind, r#"{"do":"crash"}"#, super::MINUTE).await;
}

async fn a_hang_leaves_its_neighbours_alone(kind: Kind) {
    among_neighbours(kind, r#"{"do":"hang"}"#, Duration::from_millis(100)).await;
}

async fn a_slow_call_holds_no_other(kind: Kind) {
    let stage = Stage::open(kind).await;
    let slow = stage.outcome(call("slow", r#"{"do":"hang"}"#));
    let quick = join_all((0..20).map(|n| stage.result(call(&n.to_string(), r#"{"do":"wait","ms":1,"result":1}"#))));
    tokio::select! {
        slow = slow => panic!("{kind:?}: {slow:?}"),
        quick = quick => assert_eq!(quick, vec![json!(1); 20], "{kind:?}"),
    }
}

async fn fifty_calls_at_once_get_each_its_own_answer(kind: Kind) {
    let stage = Stage::open(kind).await;
    let meet = |n: usize| call(&n.to_string(), &json!({"do": "meet", "all": ALL, "result": n}).to_string());
    // None is answered before all are there.
    let results = join_all((0..ALL).map(|n| stage.result(meet(n)))).await;
    assert_eq!(results, (0..ALL).map(Value::from).collect::<Vec<_>>(), "{kind:?}");
}

async fn a_dropped_call_ends_and_the_next_is_answered(kind: Kind) {
    let stage = Stage::open(kind).await;
    let hang = tokio::time::timeout(Duration::from_millis(300), stage.outcome(call("left", r#"{"do":"hang"}"#)));
    assert!(hang.await.is_err(), "{kind:?}");
    let begun = Instant::now();
    assert_eq!(stage.result(call("stays", r#"{"do":"wait","ms":1,"result":2}"#)).await, 2, "{kind:?}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{kind:?}: it did not wait for the one that was dropped");
}

async fn large_data_comes_and_goes(kind: Kind) {
    const SIZE: usize = 3 << 20;
    let stage = Stage::open(kind).await;
    let text = format!("\"{}\"", "y".repeat(SIZE));
    let event = Event::new("in", "/tests", "a.b").and_then(|event| event.with_json(text.as_bytes(), super::LIMITS));
    assert_eq!(stage.result(call_of(event.expect("valid"), r#"{"do":"measure"}"#)).await, SIZE, "{kind:?}");
    let fill = json!({"do": "fill", "in": "result", "bytes": SIZE}).to_string();
    assert_eq!(stage.result(call("out", &fill)).await.as_str().map(str::len), Some(SIZE), "{kind:?}");
    let fill = json!({"do": "fill", "in": "emit", "bytes": SIZE}).to_string();
    let events = emitted(&stage, call("event", &fill)).await;
    assert_eq!(events[0].json::<String>().expect("a text").len(), SIZE, "{kind:?}");
}

async fn a_second_answer_is_nobodys(kind: Kind) {
    let stage = Stage::open(kind).await;
    for n in 0..5 {
        let twice = call(&format!("t{n}"), &json!({"do": "twice", "result": n}).to_string());
        assert_eq!(stage.result(twice).await, n, "{kind:?}");
        let next = call(&format!("n{n}"), &json!({"do": "reply", "result": -n}).to_string());
        assert_eq!(stage.result(next).await, -n, "{kind:?}");
    }
}

async fn who_is_not_there_is_tried_again(kind: Kind) {
    let stage = Stage::down(kind);
    for id in ["1", "2"] {
        let (found, error) = seen(stage.outcome(call(id, r#"{"do":"reply"}"#)).await);
        assert_eq!(found, json!({"retry": null}), "{kind:?}");
        assert!(error.contains("cannot start") || error.contains("Connection refused"), "{kind:?}: {error}");
    }
}
