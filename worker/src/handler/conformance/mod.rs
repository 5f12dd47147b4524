//! One exam for all kinds of handlers: the same event, the same script, the same outcome.
//!
//! [`SAID`] asks what an answer means, [`HEARD`] what a handler is told, `scenes.rs` what takes more than one call. Where a
//! kind has no such case, the row says why. One thing differs that no row can show: a program's line without an end could be the
//! answer to any of its events, so they are tried again; a body without an end belongs to its call, which is dead.
mod hosts;
mod scenes;
pub(super) mod service;

use super::{Call, Context, Outcome};
use hosts::{Kind, Stage, plain};
use serde_json::{Value, json};
use std::time::Duration;
use warren_shared::event::{Event, Limits};

/// A case: what the handler is asked to do, and what must come of it.
struct Case {
    name: &'static str,
    script: &'static str,
    expected: &'static str,
    /// What the error says, whatever the kind.
    error: &'static str,
    limits: Limits,
    timeout: Duration,
    /// Where there is no such case, and why.
    absent: &'static [(Kind, &'static str)],
}

const MINUTE: Duration = Duration::from_secs(60);
const LIMITS: Limits = Limits { body: 16 << 20, depth: 64 };
const DONE: &str = r#"{"done": {"result": null, "emit": []}}"#;
const RETRY: &str = r#"{"retry": null}"#;
const DEAD: &str = r#"{"dead": true}"#;

/// A typed reply cannot be malformed: what a function cannot build, it cannot return.
const TYPED: &[(Kind, &str)] = &[(Kind::Rust, "a reply is a typed value, and an event that exists is valid")];
const ONE_ANSWER: &[(Kind, &str)] = &[
    (Kind::Rust, "a function returns for the call that was made"),
    (Kind::Http, "a response belongs to the request on its connection; nothing in it names an event"),
];
const ONE_OR_THE_OTHER: &[(Kind, &str)] = &[(Kind::Http, "a response is either events or a result")];

const fn case(name: &'static str, script: &'static str, expected: &'static str) -> Case {
    Case { name, script, expected, error: "", limits: LIMITS, timeout: MINUTE, absent: &[] }
}

const SAID: &[Case] = &[
    case("done", r#"{"do":"reply"}"#, DONE),
    case("the emptiest of replies", r#"{"do":"empty"}"#, DONE),
    case(
        "a result that is an object",
        r#"{"do":"reply","result":{"b":[1,null],"a":"ü"}}"#,
        r#"{"done":{"result":{"b":[1,null],"a":"ü"},"emit":[]}}"#,
    ),
    case("a result that is a list", r#"{"do":"reply","result":[1,"2"]}"#, r#"{"done":{"result":[1,"2"],"emit":[]}}"#),
    case("a result that is a text", r#"{"do":"reply","result":"x"}"#, r#"{"done":{"result":"x","emit":[]}}"#),
    case("a result that is a number", r#"{"do":"reply","result":0}"#, r#"{"done":{"result":0,"emit":[]}}"#),
    case("a result that is false", r#"{"do":"reply","result":false}"#, r#"{"done":{"result":false,"emit":[]}}"#),
    case("a result that is null is none", r#"{"do":"reply","result":null}"#, DONE),
    case(
        "one event",
        r#"{"do":"reply","emit":[{"type":"a.b","data":{"n":[1]}}]}"#,
        r#"{"done":{"result":null,"emit":[["a.b",{"n":[1]}]]}}"#,
    ),
    case(
        "one event, its attributes in headers where there are any",
        r#"{"do":"reply","form":"binary","emit":[{"type":"a.b","data":{"n":[1]},"key1":"ü %41 \"x\""}]}"#,
        r#"{"done":{"result":null,"emit":[["a.b",{"n":[1]},"ü %41 \"x\""]]}}"#,
    ),
    case(
        "one event without data, in headers",
        r#"{"do":"reply","form":"binary","emit":[{"type":"a.b"}]}"#,
        r#"{"done":{"result":null,"emit":[["a.b",null]]}}"#,
    ),
    case(
        "one event of bytes, in headers",
        r#"{"do":"reply","form":"binary","emit":[{"type":"a.b","datacontenttype":"image/x","data_base64":"/wD+"}]}"#,
        r#"{"done":{"result":null,"emit":[["a.b","bytes 255 0 254"]]}}"#,
    ),
    case(
        "several events keep their order",
        r#"{"do":"reply","emit":[{"type":"c"},{"type":"a","data":1},{"type":"b","data":"t","datacontenttype":"text/plain"}]}"#,
        r#"{"done":{"result":null,"emit":[["c",null],["a",1],["b","text t"]]}}"#,
    ),
    case("a list of no events", r#"{"do":"reply","emit":[]}"#, DONE),
    Case {
        absent: ONE_OR_THE_OTHER,
        ..case(
            "a result and an event",
            r#"{"do":"reply","result":5,"emit":[{"type":"a"}]}"#,
            r#"{"done":{"result":5,"emit":[["a",null]]}}"#,
        )
    },
    case("try again", r#"{"do":"retry"}"#, RETRY),
    case("try again later", r#"{"do":"retry","after":"5s"}"#, r#"{"retry":5.0}"#),
    case("never again", r#"{"do":"dead"}"#, DEAD),
    Case {
        timeout: Duration::from_millis(300),
        error: "no answer within 300ms",
        ..case("too slow", r#"{"do":"hang"}"#, RETRY)
    },
    Case {
        timeout: Duration::from_secs(10),
        ..case("slow, and in time", r#"{"do":"wait","ms":400,"result":1}"#, r#"{"done":{"result":1,"emit":[]}}"#)
    },
    case("a crash", r#"{"do":"crash"}"#, RETRY),
    case("good again after a crash", r#"{"do":"reply"}"#, DONE),
    Case {
        limits: Limits { body: 1000, depth: 64 },
        error: "1000",
        ..case("too large a result", r#"{"do":"fill","in":"result","bytes":1001}"#, DEAD)
    },
    Case {
        limits: Limits { body: 1000, depth: 64 },
        error: "1000",
        ..case("too large an event", r#"{"do":"fill","in":"emit","bytes":1001}"#, DEAD)
    },
    Case {
        limits: Limits { body: 16 << 20, depth: 3 },
        error: "nested deeper than 3 levels",
        ..case("too deep a result", r#"{"do":"reply","result":[[[[]]]]}"#, DEAD)
    },
    Case { absent: TYPED, error: "answer is wrong", ..case("a malformed reply", r#"{"do":"malformed"}"#, DEAD) },
    Case {
        absent: TYPED,
        error: "names a member twice",
        ..case("a result with two values for a name", r#"{"do":"reply raw","json":"{\"a\":1,\"a\":2}"}"#, DEAD)
    },
    Case {
        absent: TYPED,
        error: "the attribute 'type' is missing",
        ..case("an event without a type", r#"{"do":"reply","emit":[{"data":1}]}"#, DEAD)
    },
    Case {
        absent: TYPED,
        error: "the attribute 'type' is missing",
        ..case(
            "an event without a type, in headers",
            r#"{"do":"reply","form":"binary","emit":[{"subject":"s"}]}"#,
            DEAD,
        )
    },
    Case {
        absent: TYPED,
        error: "only '1.0' is understood",
        ..case(
            "an event of another version",
            r#"{"do":"reply","form":"binary","emit":[{"type":"a","specversion":"0.3"}]}"#,
            DEAD,
        )
    },
    Case {
        absent: TYPED,
        error: "the attribute 'type' is missing",
        ..case("a bad event among good ones", r#"{"do":"reply","emit":[{"type":"a"},{},{"type":"b"}]}"#, DEAD)
    },
    Case {
        absent: ONE_ANSWER,
        ..case(
            "an answer for an event that nobody asked about",
            r#"{"do":"stranger","result":1}"#,
            r#"{"done":{"result":1,"emit":[]}}"#,
        )
    },
];

/// Makes an event of one that has an id, a source and a type.
type Made = fn(Event) -> Option<Event>;

/// What a handler must be told as it is: the event, by name.
const HEARD: &[(&str, Made)] = &[
    ("no data", Some),
    ("JSON", |event| event.with_json(r#"{"a": [1, 2.5, {"ü": null}]}"#.as_bytes(), LIMITS).ok()),
    ("JSON on several lines", |event| event.with_json(b"{\r\n  \"a\":\n [1,\n2]}", LIMITS).ok()),
    ("JSON's null", |event| event.with_json(b"null", LIMITS).ok()),
    ("text", |event| body(event, "text/plain; charset=utf-8", "line 1\nlíne 2".as_bytes())),
    ("bytes that are not UTF-8", |event| body(event, "application/octet-stream", b"\xff\xfe\x00\r\n\x80")),
    ("bytes of all kinds", |event| body(event, "image/png", &(0..=255).collect::<Vec<u8>>())),
    ("text that is no text", |event| body(event, "application/xml", b"<a>\n</a>")),
    ("a key of many alphabets", |event| event.with("partitionkey", "ключ 鍵 \u{1F600}".into()).ok()),
    ("an extension that HTTP must encode", |event| {
        event.with("note", "100% \"quoted\" back\\slash, a;b: ü, %41".into()).ok()?.with("empty", "".into()).ok()
    }),
    ("all attributes", |event| {
        let all = [
            ("subject", "s/ü 1"),
            ("time", "2026-01-02T03:04:05.678Z"),
            ("dataschema", "https://example.org/schema?v=1#a"),
            ("partitionkey", "k"),
            ("sequence", "00012"),
            ("priority", "9"),
            ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            ("0name1", "v"),
        ];
        let event = all.into_iter().try_fold(event, |event, (name, value)| event.with(name, value.into())).ok()?;
        let event = event.with("flag", warren_shared::event::Value::Bool(true)).ok()?;
        event.with("count", warren_shared::event::Value::Int(-7)).ok()?.with_json(b"[]", LIMITS).ok()
    }),
    ("an id that needs care", |_| Event::new("ü✓\"'\\ %20\u{1F600}", "/te sts/ü?x=%2F", "thing.done").ok()),
];

fn body(event: Event, kind: &str, bytes: &[u8]) -> Option<Event> {
    event.with("datacontenttype", kind.into()).ok()?.with_body(bytes, LIMITS).ok()
}

fn call(id: &str, script: &str) -> Call {
    call_of(Event::new(id, "/tests", "thing.done").expect("valid"), script)
}

fn call_of(event: Event, script: &str) -> Call {
    let event = event.with("script", script.into()).expect("a script is a text");
    let context = Context {
        attempt: 1,
        timeout: MINUTE,
        partition: "p00".into(),
        pool: "tests".into(),
        limits: LIMITS,
        ..Default::default()
    };
    Call { event, context, entry: Default::default(), kept: None }
}

/// An outcome as the tables write it, and its error.
fn seen(outcome: Outcome) -> (Value, String) {
    match outcome {
        Outcome::Done(reply) => {
            let emit: Vec<Value> = reply.emit.iter().map(shown).collect();
            // A null that is a result would look like none.
            let result = reply.result.map(|json| json.parse().expect("JSON"));
            let result = result.map(|value: Value| if value.is_null() { json!("a null") } else { value });
            (json!({"done": {"result": result, "emit": emit}}), String::new())
        }
        Outcome::Retry { error, after } | Outcome::NotNow { error, after } => {
            (json!({"retry": after.map(|after| after.as_secs_f64())}), error)
        }
        Outcome::Dead { error } | Outcome::Unclear { error } => (json!({"dead": true}), error),
        other => panic!("{other:?}"),
    }
}

/// Type, data, and an extension if it is there.
fn shown(event: &Event) -> Value {
    use warren_shared::event::Data;
    let data = match event.data() {
        None => Value::Null,
        Some(Data::Json(json)) => serde_json::from_str(json.get()).expect("JSON"),
        Some(Data::Text(text)) => format!("text {text}").into(),
        Some(Data::Bytes(bytes)) => {
            let bytes: Vec<String> = bytes.iter().map(u8::to_string).collect();
            format!("bytes {}", bytes.join(" ")).into()
        }
    };
    let extension = event.extension("key1").map(|value| value.to_string().into());
    Value::Array([event.kind().into(), data].into_iter().chain(extension).collect())
}

async fn said(kind: Kind) {
    let (stage, mut failures) = (Stage::open(kind).await, Vec::new());
    for case in SAID.iter().filter(|case| case.absent.iter().all(|(absent, _)| *absent != kind)) {
        let mut call = call(case.name, case.script);
        (call.context.limits, call.context.timeout) = (case.limits, case.timeout);
        let (found, error) = seen(stage.outcome(call).await);
        let expected: Value = serde_json::from_str(case.expected).expect("a table holds JSON");
        if found != expected {
            failures.push(format!("{kind:?}, {}: {found} (error: {error}), expected {expected}", case.name));
        } else if !error.contains(case.error) || ["secret", "hidden", "zzz"].iter().any(|word| error.contains(word)) {
            failures.push(format!("{kind:?}, {}: the error says: {error}", case.name));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

async fn heard(kind: Kind) {
    // HTTP knows no types: there every attribute is a text.
    let as_text = |mut event: Value| {
        for (name, value) in event.as_object_mut().expect("an object") {
            if !["data", "data_base64"].contains(&name.as_str()) {
                *value = plain(value).into();
            }
        }
        event
    };
    let (stage, mut failures) = (Stage::open(kind).await, Vec::new());
    for (name, event) in HEARD {
        let event = event(Event::new(*name, "/tests", "thing.done").expect("valid")).expect(name);
        let call = call_of(event, r#"{"do":"tell"}"#);
        let sent: Value = serde_json::from_str(&call.event.to_json()).expect("JSON");
        let told = stage.result(call).await["event"].take();
        let (sent, told) = if kind == Kind::Http { (as_text(sent), as_text(told)) } else { (sent, told) };
        if sent != told {
            failures.push(format!("{kind:?} is told of {name}: {told}, but it was {sent}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

macro_rules! exam {
    ($($kind:ident $said:ident $heard:ident;)+) => {$(
        #[tokio::test]
        async fn $said() {
            said(Kind::$kind).await;
        }

        #[tokio::test]
        async fn $heard() {
            heard(Kind::$kind).await;
        }
    )+};
}

exam! {
    Rust what_a_rust_function_says_is_understood a_rust_function_is_told_all_of_an_event;
    Http what_an_http_service_says_is_understood an_http_service_is_told_all_of_an_event;
    Exec what_a_program_says_is_understood a_program_is_told_all_of_an_event;
}

#[test]
fn most_cases_are_the_same_for_all_kinds_and_the_others_say_why() {
    let whole = SAID.iter().filter(|case| case.absent.is_empty()).count();
    assert!(whole + HEARD.len() >= 25, "{whole} and {}", HEARD.len());
    let mut names: Vec<&str> = SAID.iter().map(|case| case.name).chain(HEARD.iter().map(|(name, _)| *name)).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), SAID.len() + HEARD.len(), "every case has a name of its own");
    assert!(SAID.iter().flat_map(|case| case.absent).all(|(_, why)| !why.is_empty()));
}
