//! The three hosts: what a Rust function, an HTTP service and a program do when an event's extension `script` tells them.
//!
//! The HTTP host reads and writes CloudEvents with code of its own: what it shares with the handler, it could not test.
use super::service::{Request, Said, Service, response};
use crate::config::Command;
use crate::handler::http::Http;
use crate::handler::{Call, Context, Endpoint, Failure, Handler, Outcome, Reply, Rust, exec::Exec};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Barrier;
use warren_shared::{Event, Limits};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Rust,
    Http,
    Exec,
}

/// How many calls `meet` waits for.
pub(super) const ALL: usize = 50;

/// A handler of some kind, and the host behind it.
pub(super) struct Stage {
    pub(super) handler: Box<dyn Handler>,
    _service: Option<Service>,
}

impl Stage {
    pub(super) async fn open(kind: Kind) -> Self {
        let barrier = Arc::new(Barrier::new(ALL));
        match kind {
            Kind::Rust => {
                let handler = Rust::new(move |event, context| act(event, context, barrier.clone()));
                Self { handler: Box::new(handler), _service: None }
            }
            Kind::Http => {
                let says = move |request| -> BoxFuture<'static, Said> { Box::pin(serve(request, barrier.clone())) };
                let service = Service::start(says).await;
                let endpoint = Endpoint::parse(&format!("http://{}/hook?key=hidden", service.address)).expect("a URL");
                Self { handler: Box::new(Http::new(endpoint)), _service: Some(service) }
            }
            Kind::Exec => {
                let program = concat!(env!("CARGO_MANIFEST_DIR"), "/src/handler/conformance/program.py");
                Self::running(&["python3", program])
            }
        }
    }

    /// Nobody is behind it.
    pub(super) fn down(kind: Kind) -> Self {
        match kind {
            Kind::Rust => panic!("a function is always there"),
            Kind::Http => {
                // A port of this machine that was free a moment ago.
                let port =
                    std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
                let endpoint = Endpoint::parse(&format!("http://127.0.0.1:{port}/hook")).expect("a URL");
                Self { handler: Box::new(Http::new(endpoint)), _service: None }
            }
            Kind::Exec => Self::running(&["/no/such/program"]),
        }
    }

    fn running(argv: &[&str]) -> Self {
        let command = Command { argv: argv.iter().map(ToString::to_string).collect(), processes: 1 };
        Self { handler: Box::new(Exec::start(command)), _service: None }
    }

    pub(super) async fn outcome(&self, call: Call) -> Outcome {
        self.handler.handle(call).await
    }

    /// The result of a call that is done.
    pub(super) async fn result(&self, call: Call) -> Value {
        match self.outcome(call).await {
            Outcome::Done(reply) => reply.result.map_or(Value::Null, |json| json.parse().expect("JSON")),
            other => panic!("{other:?}"),
        }
    }
}

fn number(script: &Value, name: &str) -> u64 {
    script[name].as_u64().expect("a number")
}

/// The Rust function.
async fn act(event: Event, context: Context, barrier: Arc<Barrier>) -> Result<Reply, Failure> {
    let script = event.extension("script").map(ToString::to_string).unwrap_or_default();
    let script: Value = serde_json::from_str(&script)?;
    let result = |value: Value| Ok(Reply::done().result(value));
    match script["do"].as_str().expect("a word") {
        "reply" => {
            let none = Vec::new();
            let emit = script.get("emit").and_then(Value::as_array).unwrap_or(&none);
            let emit = emit.iter().enumerate().map(|(i, partial)| made(&event, i, partial));
            Ok(Reply {
                result: script.get("result").cloned().map(Into::into),
                emit: emit.collect::<Result<_, _>>()?,
                ..Reply::default()
            })
        }
        "empty" => Ok(Reply::done()),
        "retry" => match script.get("after").and_then(Value::as_str) {
            Some(after) => Err(Failure::retry_after("asked to", warren_shared::env::duration(after).expect("valid"))),
            None => Err(Failure::retry("asked to")),
        },
        "dead" => Err(Failure::dead("asked to")),
        "tell" => {
            let told: Value = serde_json::from_str(&event.to_json())?;
            let trace = event.extension("traceparent").map(ToString::to_string);
            let key = format!("{:?}", event.identity());
            result(json!({"event": told, "attempt": context.attempt, "key": key, "trace": trace}))
        }
        "measure" => result(event.json::<String>()?.len().into()),
        "fill" => {
            let text = "z".repeat(number(&script, "bytes") as usize);
            match script["in"].as_str() {
                Some("result") => result(text.into()),
                _ => Ok(Reply::done().emit(made(&event, 0, &json!({"type": "filled", "data": text}))?)),
            }
        }
        "wait" => {
            tokio::time::sleep(Duration::from_millis(number(&script, "ms"))).await;
            result(script["result"].clone())
        }
        "meet" => {
            barrier.wait().await;
            result(script["result"].clone())
        }
        "crash" => panic!("asked to"),
        "hang" => std::future::pending().await,
        other => panic!("no Rust function does '{other}'"),
    }
}

/// What other kinds leave to Warren, a function says itself: the event's id and source.
fn made(cause: &Event, index: usize, partial: &Value) -> Result<Event, Failure> {
    let id = cause.identity().derive(&format!("emit {index}"));
    let mut whole = json!({"specversion": "1.0", "id": id, "source": "/warren/tests"});
    let members = partial.as_object().expect("an object").clone();
    whole.as_object_mut().expect("an object").extend(members);
    Event::from_json(whole.to_string().as_bytes(), Limits::default()).map_err(Failure::dead)
}

/// The HTTP service.
async fn serve(request: Request, barrier: Arc<Barrier>) -> Said {
    let script: Value = serde_json::from_str(&decoded(request.header("ce-script")?)).expect("a script");
    let json = |value: &Value| response(200, &[("Content-Type", "application/json")], value.to_string().as_bytes());
    match script["do"].as_str().expect("a word") {
        "reply" => match (script.get("emit").and_then(Value::as_array), script.get("result")) {
            (Some(emit), _) => emitted(emit, script["form"].as_str()),
            (None, Some(result)) => json(result),
            (None, None) => response(200, &[], b""),
        },
        "reply raw" => {
            let text = script["json"].as_str().expect("text");
            response(200, &[("content-type", "application/json")], text.as_bytes())
        }
        "empty" => response(204, &[], b""),
        "twice" => {
            let second = json(&"the second answer".into())?;
            json(&script["result"]).map(|first| [first, second].concat())
        }
        "retry" => match script.get("after").and_then(Value::as_str) {
            Some(after) => response(503, &[("retry-after", after.trim_end_matches('s'))], b"secret words"),
            None => response(503, &[], b"secret words"),
        },
        "dead" => response(422, &[("content-type", "text/plain")], b"secret words"),
        "malformed" => response(200, &[("content-type", "application/json; charset=utf-8")], b"{\"secret\": words"),
        "tell" => {
            let attempt: u32 = request.header("warren-attempt")?.parse().expect("a number");
            let (key, trace) = (request.header("idempotency-key"), request.header("traceparent"));
            json(&json!({"event": told(&request), "attempt": attempt, "key": key, "trace": trace}))
        }
        "measure" => json(&told(&request)["data"].as_str().expect("a text").len().into()),
        "fill" => {
            let text = Value::from("z".repeat(number(&script, "bytes") as usize));
            match script["in"].as_str() {
                Some("result") => json(&text),
                _ => emitted(&[json!({"type": "filled", "data": text})], None),
            }
        }
        "wait" => {
            tokio::time::sleep(Duration::from_millis(number(&script, "ms"))).await;
            json(&script["result"])
        }
        "meet" => {
            barrier.wait().await;
            json(&script["result"])
        }
        "crash" => None,
        "hang" => std::future::pending().await,
        other => panic!("no service does '{other}'"),
    }
}

/// Events as a response: one in structured form unless the script names a form, several as a batch.
fn emitted(emit: &[Value], form: Option<&str>) -> Said {
    let whole = |kind: &str, body: &Value| response(200, &[("content-type", kind)], body.to_string().as_bytes());
    match (form, emit) {
        (Some("binary"), [one]) => {
            let mut members = one.as_object().expect("an object").clone();
            let data = members.remove("data");
            let kind = members.remove("datacontenttype").or(data.as_ref().map(|_| "application/json".into()));
            let body = match (members.remove("data_base64"), data) {
                (Some(bytes), _) => BASE64.decode(bytes.as_str().expect("text")).expect("base64"),
                (None, Some(Value::String(text))) if kind != Some("application/json".into()) => text.into_bytes(),
                (None, data) => data.map(|data| data.to_string().into_bytes()).unwrap_or_default(),
            };
            let mut head: Vec<(String, String)> =
                members.iter().map(|(name, value)| (format!("CE-{name}"), encoded(&plain(value)))).collect();
            head.extend(kind.map(|kind| ("Content-Type".into(), plain(&kind))));
            let head: Vec<(&str, &str)> = head.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
            response(200, &head, &body)
        }
        (None, [one]) => whole("application/cloudevents+json; charset=UTF-8", one),
        _ => whole("application/cloudevents-batch+json", &emit.into()),
    }
}

/// The event in a request, as the JSON format writes it.
fn told(request: &Request) -> Value {
    let attributes = request.headers().filter_map(|(name, value)| Some((name.strip_prefix("ce-")?, decoded(value))));
    let mut event: Map<String, Value> = attributes.map(|(name, value)| (name.into(), value.into())).collect();
    let kind = request.header("content-type").unwrap_or_default();
    if !kind.is_empty() {
        event.insert("datacontenttype".into(), kind.into());
    }
    if request.body.is_empty() {
    } else if kind.contains("json") {
        event.insert("data".into(), serde_json::from_slice(&request.body).expect("JSON"));
    } else if kind.starts_with("text/") {
        event.insert("data".into(), String::from_utf8(request.body.clone()).expect("UTF-8").into());
    } else {
        event.insert("data_base64".into(), BASE64.encode(&request.body).into());
    }
    Value::Object(event)
}

/// A scalar as HTTP carries it: as text.
pub(super) fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Encodes every byte but letters and digits: more than must be, which readers accept.
fn encoded(text: &str) -> String {
    let one = |byte: u8| {
        if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02x}") }
    };
    text.bytes().map(one).collect()
}

fn decoded(text: &str) -> String {
    assert!(text.bytes().all(|byte| (b'!'..=b'~').contains(&byte) && byte != b'"'), "not encoded: {text}");
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(&part[..2], 16).expect("two digits"));
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).expect("UTF-8")
}
