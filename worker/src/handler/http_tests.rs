//! What only HTTP has: statuses, headers, connections, redirects, TLS.
use super::*;
use crate::handler::Context;
use crate::handler::conformance::service::{Request, Said, Service, response};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;
use tokio::io::AsyncReadExt;

const MINUTE: Duration = Duration::from_secs(60);

fn endpoint(address: impl fmt::Display) -> Endpoint {
    Endpoint::parse(&format!("http://{address}/hook?key=hidden")).expect("a URL")
}

fn http(service: &Service) -> Http {
    Http::new(endpoint(service.address))
}

fn call(id: &str) -> Call {
    let context =
        Context { attempt: 1, timeout: MINUTE, partition: "p00".into(), pool: "tests".into(), ..Default::default() };
    let event = Event::new(id, "/tests", "thing.done").and_then(|e| e.with_json(b"{\"a\": 1}", Default::default()));
    Call { event: event.expect("valid"), context, entry: Default::default(), kept: None }
}

/// What becomes of a call, in a word or with its error.
fn word(outcome: Outcome) -> String {
    match outcome {
        Outcome::Done(Reply { result, emit, .. }) => {
            let kinds: Vec<&str> = emit.iter().map(Event::kind).collect();
            let result = result.as_ref().map_or("null", |json| json.get());
            format!("done {result} {}", kinds.join(" ")).trim_end().to_owned()
        }
        Outcome::Retry { error, after } | Outcome::NotNow { error, after } => {
            let after = after.map_or_else(String::new, |after| format!(" after {}", after.as_secs()));
            format!("retry{after}: {error}")
        }
        Outcome::Dead { error } | Outcome::Unclear { error } => format!("dead: {error}"),
        other => panic!("{other:?}"),
    }
}

/// What becomes of a call that is answered so; the service's address is not part of it.
async fn answered(said: Said) -> String {
    let service = Service::saying(said).await;
    let outcome = word(http(&service).handle(call("1")).await);
    assert!(!outcome.contains("hidden") && !outcome.contains("secret"), "{outcome}");
    outcome.replace(&format!("POST http://{}/hook: ", service.address), "")
}

#[tokio::test]
async fn a_request_is_an_event_in_binary_mode() {
    let (note, noted) = (Arc::new(Mutex::new(None::<Request>)), |note: &Mutex<Option<Request>>| {
        note.lock().expect("not poisoned").take().expect("a request")
    });
    let to = note.clone();
    let service = Service::start(move |request| {
        *to.lock().expect("not poisoned") = Some(request);
        Box::pin(std::future::ready(response(200, &[], b"")))
    });
    let service = service.await;
    let http = http(&service);
    let mut all = call("ü 1");
    for (name, value) in [
        ("subject", "a b"),
        ("time", "2026-01-02T03:04:05Z"),
        ("dataschema", "https://e/s?v=1"),
        ("partitionkey", "100% \"k\"~!"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tracestate", "a=1, b=2"),
        ("empty", ""),
    ] {
        all.event = all.event.with(name, value.into()).expect(name);
    }
    all.event = all.event.with("count", Value::Int(-7)).and_then(|e| e.with("flag", Value::Bool(true))).expect("valid");
    all.context.attempt = 3;
    assert_eq!(word(http.handle(all.clone()).await), "done null");
    let request = noted(&note);
    assert_eq!(
        (request.line.as_str(), request.body.as_slice()),
        ("POST /hook?key=hidden HTTP/1.1", &b"{\"a\": 1}"[..])
    );
    let mut found: Vec<String> = request.headers().map(|(name, value)| format!("{name}: {value}")).collect();
    found.sort();
    let key = format!("idempotency-key: {:?}", all.event.identity());
    let host = format!("host: {}", service.address);
    let agent = format!("user-agent: warren/{}", env!("CARGO_PKG_VERSION"));
    let wanted = [
        "accept-encoding: identity",
        "accept: */*",
        "ce-count: -7",
        "ce-dataschema: https://e/s?v=1",
        "ce-empty: ",
        "ce-flag: true",
        "ce-id: %C3%BC%201",
        "ce-partitionkey: 100%25%20%22k%22~!",
        "ce-source: /tests",
        "ce-specversion: 1.0",
        "ce-subject: a%20b",
        "ce-time: 2026-01-02T03:04:05Z",
        "ce-traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "ce-tracestate: a=1,%20b=2",
        "ce-type: thing.done",
        "content-length: 8",
        "content-type: application/json",
        &host,
        &key,
        "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate: a=1, b=2",
        &agent,
        "warren-attempt: 3",
    ];
    assert_eq!(found, wanted);

    let untyped =
        Event::from_json(br#"{"specversion":"1.0","id":"1","source":"/s","type":"a","data":5}"#, Default::default());
    http.handle(Call { event: untyped.expect("valid"), ..call("1") }).await;
    assert_eq!(noted(&note).header("content-type"), Some("application/json"), "JSON is what data without a type is");
    http.handle(Call { event: Event::new("1", "/s", "a").expect("valid"), ..call("1") }).await;
    let request = noted(&note);
    assert_eq!((request.header("content-type"), request.header("content-length")), (None, Some("0")));
}

#[tokio::test]
async fn every_status_has_its_meaning() {
    for (statuses, wanted) in [
        (&[200, 201, 202, 203, 204, 206, 299][..], "done null"),
        (&[408, 425, 429, 500, 501, 502, 503, 504, 507, 599], "retry after 7: "),
        (&[400, 401, 403, 404, 405, 409, 410, 413, 415, 418, 422, 426, 428, 431, 451, 499], "retry after 7: "),
        (&[300, 301, 302, 303, 304, 307, 308, 399], "dead: "),
    ] {
        for status in statuses {
            let body: &[u8] = if *status == 304 { b"" } else { b"secret words" };
            let found =
                answered(response(*status, &[("retry-after", "7"), ("content-type", "text/plain")], body)).await;
            assert!(found.starts_with(wanted), "{status}: {found}");
            assert!(*status < 300 || found.contains(&format!(": {status} ")), "{status}: {found}");
        }
    }
    for (statuses, wanted) in [
        (&[408, 409, 425, 429, 500, 503][..], "retry: "),
        (&[400, 401, 403, 404, 405, 410, 413, 415, 418, 422, 423, 426, 428, 431, 451, 499], "dead: "),
    ] {
        for status in statuses {
            let found = answered(response(*status, &[], b"")).await;
            assert!(found.starts_with(wanted), "{status}: {found}");
        }
    }
    // Whoever asks for another try may say it so that nobody understands when.
    assert!(answered(response(404, &[("retry-after", "soon")], b"")).await.starts_with("retry: "));
    assert_eq!(answered(response(503, &[], b"")).await, "retry: 503 Service Unavailable");
    assert_eq!(answered(response(404, &[], b"")).await, "dead: 404 Not Found");
    assert_eq!(answered(response(599, &[], b"")).await, "retry: 599 a status without a name");
}

#[tokio::test]
async fn a_route_says_which_statuses_are_tried_again() {
    let said = async |retry_on: &[u16], status: u16| {
        let service = Service::saying(response(status, &[], b"")).await;
        let route = HttpService { retry_on: retry_on.into(), ..endpoint(service.address).into() };
        word(Http::new(route).handle(call("1")).await).split(':').next().map(str::to_owned)
    };
    for (retry_on, status, wanted) in [
        (&[404, 423][..], 404, "retry"),
        (&[404, 423], 423, "retry"),
        // What is listed is the list.
        (&[404, 423], 409, "dead"),
        (&[], 409, "dead"),
        (&[], 429, "retry"),
        (&[], 503, "retry"),
    ] {
        assert_eq!(said(retry_on, status).await.as_deref(), Some(wanted), "{retry_on:?} {status}");
    }
}

#[tokio::test]
async fn errors_name_method_host_and_path_and_no_secret() {
    let service = Service::saying(response(500, &[], b"secret")).await;
    let (host, http) = (service.address, http(&service));
    let said = word(http.handle(call("1")).await);
    assert_eq!(said, format!("retry: POST http://{host}/hook: 500 Internal Server Error"));
    drop(service);
    let mut gone = word(http.handle(call("1")).await);
    // The connection that was open may break first.
    if !gone.contains("cannot connect") {
        gone = word(http.handle(call("1")).await);
    }
    let wanted = format!("retry: POST http://{host}/hook: cannot connect: Connection refused (os error 111)");
    assert_eq!(gone, wanted);
    let nowhere = Http::new(Endpoint::parse("http://nowhere.invalid/x?key=hidden").expect("a URL"));
    let nowhere = word(nowhere.handle(call("1")).await);
    assert!(nowhere.starts_with("retry: POST http://nowhere.invalid/x: cannot connect: failed to lookup"), "{nowhere}");
}

#[test]
fn the_wait_that_is_asked_for_is_seconds_or_a_date() {
    let asked = |text: &str| {
        let value = HeaderValue::from_str(text).expect("a header");
        after(&HeaderMap::from_iter([(RETRY_AFTER, value)])).map(|wait| wait.as_secs())
    };
    for (text, wanted) in [
        ("0", Some(0)),
        ("120", Some(120)),
        (" 5 ", Some(5)),
        ("86401", Some(86_400)),
        ("99999999999999999999999", Some(86_400)),
        ("Fri, 31 Dec 2999 23:59:59 GMT", Some(86_400)),
        ("Sun, 06 Nov 1994 08:49:37 GMT", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("", None),
    ] {
        assert_eq!(asked(text), wanted, "{text}");
    }
    let date = jiff::Timestamp::now() + Duration::from_secs(3600);
    let date = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&date).expect("a date");
    let wait = asked(&date).expect("a wait");
    assert!((3590..=3600).contains(&wait), "{date}: {wait}");
    assert_eq!(after(&HeaderMap::new()), None);
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let target = Service::saying(response(200, &[], b"")).await;
    let location = format!("http://{}/elsewhere", target.address);
    for status in [301, 302, 303, 307, 308] {
        let found = answered(response(status, &[("location", &location)], b"")).await;
        assert!(found.starts_with("dead: ") && found.contains("redirects are not followed, name the final"), "{found}");
    }
    assert_eq!(target.seen.connections.load(SeqCst), 0);
}

#[test]
fn attributes_are_encoded_as_the_binding_says() {
    for (text, header) in [
        ("plain/~!#$&'()*+,-.:;<=>?@[\\]^_`{|}", "plain/~!#$&'()*+,-.:;<=>?@[\\]^_`{|}"),
        ("a b", "a%20b"),
        ("\"q\"", "%22q%22"),
        ("100%", "100%25"),
        ("%41", "%2541"),
        ("Euro € 😀", "Euro%20%E2%82%AC%20%F0%9F%98%80"),
        ("", ""),
    ] {
        assert_eq!(encoded(text), header);
        assert_eq!(decoded(header.as_bytes()).as_deref(), Some(text));
    }
    for (header, text) in [
        (&b"%e2%82%ac"[..], Some("€")),
        (b"%41%62c", Some("Abc")),
        (b"\"a b\"", Some("a b")),
        (b"\"a \\\"b\\\" \\\\ c\"", Some("a \"b\" \\ c")),
        (b"a\\b", Some("a\\b")),
        (b"\"", Some("\"")),
        (b"100%", Some("100%")),
        (b"%4", Some("%4")),
        (b"%zz", Some("%zz")),
        (b"%+1", Some("%+1")),
        ("€".as_bytes(), Some("€")),
        (b"%C0%A0", None),
        (b"\xff", None),
    ] {
        assert_eq!(decoded(header).as_deref(), text, "{}", String::from_utf8_lossy(header));
    }
}

#[tokio::test]
async fn a_response_is_read_by_its_type() {
    let ok = |kind: &str, body: &str| answered(response(200, &[("content-type", kind)], body.as_bytes()));
    assert_eq!(ok("application/json", "{\"a\":1}").await, "done {\"a\":1}");
    assert_eq!(ok("Application/JSON; charset=utf-8", "[1]").await, "done [1]");
    assert_eq!(ok("application/json", "").await, "done null");
    // As it is written, and whatever stands before it.
    let digits = "[12345678901234567890123,12345678901234567.89,1.10,-0.0,1E2]";
    assert_eq!(ok("application/json", digits).await, format!("done {digits}"));
    assert_eq!(ok("application/json", "\u{feff}").await, "done null");
    assert_eq!(ok("application/json; charset=utf-8", "\u{feff}{\"a\":1.0}").await, "done {\"a\":1.0}");
    assert_eq!(ok("application/cloudevents+json", "\u{feff}{\"type\":\"x\"}").await, "done null x");
    assert_eq!(ok("application/cloudevents-batch+json", "\u{feff}[{\"type\":\"x\"}]").await, "done null x");
    for kind in ["text/html", "text/plain", "application/problem+json", "application/hal+json", "nonsense"] {
        assert_eq!(ok(kind, "{\"secret\":1}").await, "done null", "{kind}");
    }
    assert_eq!(answered(response(200, &[], b"{}")).await, "done null", "without a type it is none that is read");
    let wrong = "dead: the service's answer is wrong: ";
    assert_eq!(
        ok("application/json", "{\"secret\":").await,
        format!("{wrong}result: not valid JSON at line 1, column 10")
    );
    assert_eq!(ok("Application/CloudEvents+JSON", "{\"type\":\"x\"}").await, "done null x");
    assert_eq!(ok("application/cloudevents+json", "").await, "done null");
    assert!(ok("application/cloudevents+json", "[]").await.starts_with(wrong));
    assert_eq!(ok("application/cloudevents-batch+json", "[{\"type\":\"x\"},{\"type\":\"y\"}]").await, "done null x y");
    let batch = ok("application/cloudevents-batch+json", "[{\"type\":\"x\"},{\"type\":\"\"}]").await;
    assert_eq!(batch, format!("{wrong}event 1 of the batch: the attribute 'type' is empty"));
    for body in ["{}", "[", "[{\"secret\":1}] []"] {
        let found = ok("application/cloudevents-batch+json", body).await;
        assert_eq!(found, format!("{wrong}the batch is not a list of events"), "{body}");
    }
    let avro = ok("application/cloudevents+avro", "x").await;
    assert_eq!(avro, format!("{wrong}events of the type 'application/cloudevents+avro' are not read, only JSON"));
}

#[tokio::test]
async fn an_event_in_a_response_in_binary_mode_is_read_strictly() {
    let ok = |head: &[(&str, &str)]| answered(response(202, head, b"{}"));
    assert_eq!(ok(&[("ce-type", "x"), ("content-type", "application/json")]).await, "done null x");
    assert_eq!(answered(response(204, &[("CE-Type", "x")], b"")).await, "done null x", "an event may have no data");
    let wrong = "dead: the service's answer is wrong: ";
    for (head, why) in [
        (&[("ce-id", "1")][..], "the attribute 'type' is missing"),
        (&[("ce-type", "x"), ("ce-type", "x")], "the attribute 'type' stands twice"),
        (&[("ce-type", "x"), ("ce-note", "%C0%A0")], "the attribute 'note' is not UTF-8"),
        (&[("ce-type", "x"), ("ce-id", "")], "the attribute 'id' is empty"),
        (&[("ce-type", "x"), ("ce-data", "1")], "the attribute 'data' is not an extension"),
        (&[("ce-type", "x"), ("ce-time", "now")], "the attribute 'time' is not an RFC 3339 time"),
        (&[("ce-type", "x"), ("ce-a_b", "1")], "the attribute 'a_b' has a name that is not of a-z and 0-9, at most 64"),
        (&[("ce-type", "x"), ("ce-note", "a%0ab")], "the attribute 'note' holds control characters"),
    ] {
        assert_eq!(ok(head).await, format!("{wrong}{why}"));
    }
    // The type of the body decides first.
    let both = [("ce-type", "x"), ("content-type", "application/cloudevents+json")];
    assert_eq!(answered(response(200, &both, b"{\"type\":\"y\"}")).await, "done null y");
    let bad = [("ce-type", "x"), ("content-type", "application/json")];
    assert!(answered(response(200, &bad, b"{secret")).await.starts_with(&format!("{wrong}the body is not valid JSON")));
}

#[tokio::test]
async fn a_response_that_breaks_off_is_tried_again() {
    for bytes in [
        &b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nsecret"[..],
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nsecre\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-",
        b"",
        b"secret nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nsecret\r\n",
    ] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let http = Http::new(endpoint(listener.local_addr().expect("bound")));
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a client");
            let mut heard = [0; 4096];
            let _ = stream.read(&mut heard).await;
            tokio::io::AsyncWriteExt::write_all(&mut stream, bytes).await.expect("written");
        });
        let found = word(http.handle(call("1")).await);
        assert!(found.contains(": the connection broke: ") && found.starts_with("retry: "), "{found}");
        assert!(!found.contains("secre") && !found.contains("hidden"), "{found}");
        server.await.expect("no panic");
    }
}

#[tokio::test]
async fn no_more_is_read_than_a_body_may_have() {
    let service = Service::start(|_| {
        // It announces little, or nothing, and goes on for ever.
        let chunk = format!("10000\r\n{}\r\n", "x".repeat(1 << 16));
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
        Box::pin(std::future::ready(Some(format!("{head}{}", chunk.repeat(64)).into_bytes())))
    });
    let service = service.await;
    let mut call = call("1");
    call.context.limits.body = 1000;
    let found = word(http(&service).handle(call.clone()).await);
    assert!(found.ends_with("the service's answer is wrong: it has more than 1000 bytes"), "{found}");

    let exact = response(200, &[("content-type", "application/json")], format!("\"{}\"", "x".repeat(998)).as_bytes());
    let service = Service::saying(exact).await;
    assert!(word(http(&service).handle(call.clone()).await).starts_with("done \"xxx"));
    call.context.limits.body = 999;
    assert!(word(http(&service).handle(call).await).starts_with("dead: "));
}

/// A server that does with the nth request, whichever connection it comes by, what is told; counted from 0.
async fn telling(says: impl Fn(usize) -> Said + Send + Sync + 'static) -> Service {
    let asked = std::sync::atomic::AtomicUsize::new(0);
    Service::start(move |_| Box::pin(std::future::ready(says(asked.fetch_add(1, SeqCst))))).await
}

#[tokio::test]
async fn a_connection_that_was_used_before_and_breaks_is_called_again_at_once() {
    let seen = |service: &Service| (service.seen.connections.load(SeqCst), service.seen.requests.load(SeqCst));
    let done = || response(200, &[], b"");
    let service = telling(move |n| if n == 1 { None } else { done() }).await;
    let http = http(&service);
    assert_eq!(word(http.handle(call("1")).await), "done null");
    assert_eq!(word(http.handle(call("2")).await), "done null", "it is no attempt");
    assert_eq!(seen(&service), (2, 3));

    // Who brings the service down each time pays at the second.
    let service = telling(move |n| if n == 0 { done() } else { None }).await;
    let http = self::http(&service);
    assert_eq!(word(http.handle(call("1")).await), "done null");
    assert!(word(http.handle(call("2")).await).contains("the connection broke: "));
    assert_eq!(seen(&service), (2, 3));

    // Nobody closes a new connection for having been idle.
    let service = telling(|_| None).await;
    assert!(word(self::http(&service).handle(call("1")).await).contains("the connection broke: "));
    assert_eq!(seen(&service), (1, 1));
}

#[tokio::test]
async fn only_what_breaks_before_any_answer_is_called_again() {
    for (last, is_reset, wanted, requests) in [
        // A part of an answer is one: the service was there, and broke.
        (&b"HTTP/1.1 200 OK\r\ncontent-"[..], false, "retry", 2),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhal", false, "retry", 2),
        (b"", false, "done", 3),
        (b"", true, "done", 3),
    ] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let http = Http::new(endpoint(listener.local_addr().expect("bound")));
        let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = asked.clone();
        let server = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.expect("a client");
                let mut heard = [0; 4096];
                while let Ok(1..) = stream.read(&mut heard).await {
                    let n = count.fetch_add(1, SeqCst);
                    let said = if n == 1 { last } else { b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n" };
                    tokio::io::AsyncWriteExt::write_all(&mut stream, said).await.expect("written");
                    if n == 1 {
                        // Without a farewell it is a reset.
                        let _ = is_reset.then(|| stream.set_zero_linger());
                        break;
                    }
                }
            }
        });
        assert_eq!(word(http.handle(call("1")).await), "done null");
        let found = word(http.handle(call("2")).await);
        assert!(found.starts_with(wanted), "{found}");
        assert_eq!(asked.load(SeqCst), requests, "{found}");
        server.abort();
    }
}

#[tokio::test]
async fn an_answer_that_comes_before_the_request_is_over_is_read() {
    let mut large = call("1");
    let body = format!("\"{}\"", "x".repeat(8 << 20));
    large.event = large.event.with_json(body.as_bytes(), Default::default()).expect("within the limits");
    for taken in [1, 1 << 12, 1 << 20] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let server = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.expect("a client");
                let _ = stream.read_exact(&mut vec![0; taken]).await;
                let said = b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                tokio::io::AsyncWriteExt::write_all(&mut stream, said).await.expect("written");
                // It is closed with most of the request unread: the client's next write fails.
            }
        });
        for _ in 0..20 {
            let found = word(Http::new(endpoint(address)).handle(large.clone()).await);
            assert_eq!(found, format!("dead: POST http://{address}/hook: 413 Payload Too Large"), "after {taken}");
        }
        server.abort();
    }
}

#[tokio::test]
async fn an_answer_that_comes_before_the_request_is_over_is_read_through_tls() {
    // It answers what it has read first, and closes.
    let tls = Tls::start();
    let mut roots = RootCertStore::empty();
    roots.add(tls.certificate.clone()).expect("a root");
    let mut large = call("1");
    let body = format!("\"{}\"", "x".repeat(8 << 20));
    large.event = large.event.with_json(body.as_bytes(), Default::default()).expect("within the limits");
    for _ in 0..10 {
        let http = Http::trusting(roots.clone(), tls.endpoint("127.0.0.1"));
        assert_eq!(word(http.handle(large.clone()).await), "done null");
    }
}

#[tokio::test]
async fn a_worker_without_file_descriptors_fails_no_event_of_a_service() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let service = Service::saying(response(200, &[], b"")).await;
    let (http, before) = (http(&service), getrlimit(Resource::Nofile));
    setrlimit(Resource::Nofile, Rlimit { current: Some(0), maximum: before.maximum }).expect("lower is always allowed");
    let mut call = http.handle(call("1"));
    let waits = tokio::time::timeout(Duration::from_millis(1500), &mut call).await;
    setrlimit(Resource::Nofile, before).expect("as it was");
    assert!(waits.is_err(), "no socket can be had, which is no attempt: {waits:?}");
    assert_eq!(word(call.await), "done null");
}

#[tokio::test]
async fn headers_come_from_files_that_are_read_again() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let write = |token: &str| std::fs::write(file.path(), format!("Bearer {token}\n")).expect("written");
    write("one");
    let path = file.path().to_str().expect("UTF-8").to_owned();
    let secret = warren_shared::secret::File { variable: "headers.Authorization".into(), path };
    let header = |name: &str, value| Header::new(name, value).expect("legal");
    let headers = vec![
        header("Authorization", warren_shared::secret::Secret::new("Bearer one").of(Some(secret))),
        header("X-Team", warren_shared::secret::Secret::new("blue")),
        header("User-Agent", warren_shared::secret::Secret::new("us")),
    ];
    // The service takes one token, and counts those of others.
    let (good, others) =
        (Arc::new(Mutex::new("Bearer one".to_owned())), Arc::new(std::sync::atomic::AtomicUsize::new(0)));
    let (takes, refused) = (good.clone(), others.clone());
    let service = Service::start(move |request| {
        assert_eq!((request.header("x-team"), request.header("user-agent")), (Some("blue"), Some("us")));
        let is_good = request.header("authorization") == Some(&*takes.lock().expect("not poisoned"));
        refused.fetch_add(usize::from(!is_good), SeqCst);
        Box::pin(std::future::ready(response(if is_good { 200 } else { 401 }, &[], b"")))
    });
    let service = service.await;
    let http = Http::new(HttpService { headers, ..endpoint(service.address).into() });
    assert_eq!(word(http.handle(call("1")).await), "done null");

    // Rotated, and the old one refused at once: no event dies of that.
    write("two");
    *good.lock().expect("not poisoned") = "Bearer two".into();
    assert_eq!(word(http.handle(call("2")).await), "done null");
    assert!(others.load(SeqCst) <= 1);
    // The service is the last to learn of it: the events fail until then, and what they say holds no token.
    write("three");
    let denied = word(http.handle(call("3")).await);
    assert!(denied == "done null" || denied.ends_with("/hook: 401 Unauthorized"), "{denied}");
    *good.lock().expect("not poisoned") = "Bearer three".into();
    assert_eq!(word(http.handle(call("4")).await), "done null");

    // Rotated while a request was on its way.
    write("four");
    let (path, to) = (file.path().to_owned(), good.clone());
    let rotating = Service::start(move |request| {
        let mut good = to.lock().expect("not poisoned");
        if request.header("authorization") == Some("Bearer four") {
            std::fs::write(&path, "Bearer three").expect("written");
            *good = "Bearer three".into();
        }
        let is_good = request.header("authorization") == Some(&good);
        Box::pin(std::future::ready(response(if is_good { 200 } else { 403 }, &[], b"")))
    });
    let rotating = rotating.await;
    let secret = warren_shared::secret::File {
        variable: "headers.Authorization".into(),
        path: file.path().to_str().expect("UTF-8").into(),
    };
    let headers = vec![header("Authorization", warren_shared::secret::Secret::new("Bearer four").of(Some(secret)))];
    let other = Http::new(HttpService { headers, ..endpoint(rotating.address).into() });
    assert_eq!(word(other.handle(call("1")).await), "done null");
    assert_eq!(rotating.seen.requests.load(SeqCst), 2);

    // What no header can have is not sent: the last good value is.
    std::fs::write(file.path(), "Bearer\nfour").expect("written");
    *good.lock().expect("not poisoned") = "Bearer five".into();
    let denied = word(http.handle(call("5")).await);
    assert!(denied.ends_with("/hook: 401 Unauthorized"), "{denied}");
    drop(file);
    *good.lock().expect("not poisoned") = "Bearer three".into();
    assert_eq!(word(http.handle(call("6")).await), "done null");
}

#[tokio::test]
async fn a_body_that_is_encoded_all_the_same_is_named() {
    let said = async |kind: &str| {
        let head = [("content-type", kind), ("content-encoding", "gzip")];
        answered(response(200, &head, b"\x1f\x8b\x08secret")).await
    };
    let wrong = "dead: the service's answer is wrong: its body is encoded ('gzip'), though 'identity' was asked for";
    assert_eq!(said("application/json").await, wrong);
    assert_eq!(said("application/cloudevents+json").await, wrong);
    assert_eq!(said("text/html").await, "done null");
    let head = [("content-type", "application/json"), ("content-encoding", "Identity")];
    assert_eq!(answered(response(200, &head, b"1")).await, "done 1");
}

#[tokio::test]
async fn the_deadline_covers_the_body() {
    let service = Service::start(|_| {
        // The head comes, and the connection stays: the body has one byte too few.
        Box::pin(std::future::ready(Some(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhalf".to_vec())))
    });
    let (service, mut call) = (service.await, call("1"));
    call.context.timeout = Duration::from_millis(200);
    let found = word(http(&service).handle(call).await);
    assert_eq!(found, format!("retry: POST http://{}/hook: no answer within 200ms", service.address));
}

#[tokio::test]
async fn connections_are_used_again() {
    let service = Service::saying(response(200, &[("content-type", "application/json")], b"1")).await;
    let http = http(&service);
    for _ in 0..20 {
        assert_eq!(word(http.handle(call("1")).await), "done 1");
    }
    let seen = |of: &std::sync::atomic::AtomicUsize| of.load(SeqCst);
    assert_eq!((seen(&service.seen.connections), seen(&service.seen.requests)), (1, 20));
}

#[tokio::test]
async fn a_refusal_costs_no_connection() {
    let service = Service::saying(response(503, &[], b"try later")).await;
    let http = http(&service);
    for _ in 0..10 {
        assert!(word(http.handle(call("1")).await).starts_with("retry: "));
    }
    assert_eq!(service.seen.connections.load(SeqCst), 1);
}

#[tokio::test]
async fn a_dropped_call_ends_its_request() {
    let service = Service::start(|_| Box::pin(std::future::pending())).await;
    let call = http(&service).handle(call("1"));
    assert!(tokio::time::timeout(Duration::from_millis(300), call).await.is_err());
    let left = async {
        while service.seen.left.load(SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), left).await.expect("the service sees that nobody waits");
}

#[test]
fn proxies_of_the_environment_are_not_used() {
    let mut itself = std::process::Command::new(std::env::current_exe().expect("this program"));
    itself.args(["--exact", "handler::http::tests::connections_are_used_again"]);
    for name in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        itself.env(name, "http://127.0.0.1:1");
    }
    let run = itself.env_remove("NO_PROXY").env_remove("no_proxy").output().expect("it starts");
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && said.contains("1 passed"), "{said}");
}

/// A certificate for 127.0.0.1 that signs itself, and a server with it that answers `done`.
struct Tls {
    certificate: CertificateDer<'static>,
    port: u16,
}

impl Tls {
    fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let file = |name: &str| directory.path().join(name).display().to_string();
        let (key, certificate) = (file("key.pem"), file("certificate.pem"));
        let made = std::process::Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout", &key, "-out", &certificate])
            .output();
        let made = made.expect("openssl is installed");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let certificate = CertificateDer::from_pem_file(certificate).expect("a certificate");
        let key = PrivateKeyDer::from_pem_file(key).expect("a key");
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|config| config.with_no_client_auth().with_single_cert(vec![certificate.clone()], key));
        let config = Arc::new(config.expect("a server"));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        std::thread::spawn(move || {
            use std::io::{Read, Write};
            for stream in listener.incoming().map_while(Result::ok) {
                // Else its answer waits here behind what is not acknowledged yet, and is thrown away by a close.
                let _ = stream.set_nodelay(true);
                let connection = rustls::ServerConnection::new(config.clone()).expect("a connection");
                let mut stream = rustls::StreamOwned::new(connection, stream);
                let mut heard = [0; 4096];
                if stream.read(&mut heard).is_ok() {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                }
            }
        });
        Self { certificate, port }
    }

    fn endpoint(&self, host: &str) -> Endpoint {
        Endpoint::parse(&format!("https://{host}:{}/hook?key=hidden", self.port)).expect("a URL")
    }
}

#[tokio::test]
async fn a_service_is_trusted_only_with_a_certificate_that_is() {
    let tls = Tls::start();
    let said = async |http: Http| word(http.handle(call("1")).await);
    let mut roots = RootCertStore::empty();
    roots.add(tls.certificate.clone()).expect("a root");
    assert_eq!(said(Http::trusting(roots.clone(), tls.endpoint("127.0.0.1"))).await, "done null");

    let untrusted = said(Http::new(tls.endpoint("127.0.0.1"))).await;
    let wanted = format!("retry: POST https://127.0.0.1:{}/hook: cannot connect: invalid peer certificate: ", tls.port);
    assert!(untrusted.starts_with(&wanted), "{untrusted}");
    let other_name = said(Http::trusting(roots.clone(), tls.endpoint("localhost"))).await;
    assert!(
        other_name.contains("cannot connect: invalid peer certificate: certificate not valid for name"),
        "{other_name}"
    );

    let plain = Service::saying(response(200, &[], b"")).await;
    let endpoint = Endpoint::parse(&format!("https://{}/hook", plain.address)).expect("a URL");
    let plain = said(Http::trusting(roots, endpoint)).await;
    assert!(plain.starts_with("retry: ") && plain.contains("cannot connect: "), "{plain}");
}

#[tokio::test]
async fn only_a_4xx_and_a_service_that_is_not_there_are_certain_to_have_done_nothing() {
    for (status, certain) in [(425, true), (429, true), (408, false), (500, false), (503, false)] {
        match http(&Service::saying(response(status, &[], b"")).await).handle(call("1")).await {
            Outcome::NotNow { .. } => assert!(certain, "{status}"),
            Outcome::Retry { .. } => assert!(!certain, "{status}"),
            other => panic!("{status}: {other:?}"),
        }
    }
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.and_then(|listener| listener.local_addr());
    let away = Http::new(endpoint(nobody.expect("an address"))).handle(call("1")).await;
    assert!(matches!(away, Outcome::NotNow { .. }), "{away:?}");
    for (status, body, certain) in [
        (400, &b"no"[..], true),
        (422, b"", true),
        (499, b"", true),
        (302, b"", false),
        (399, b"", false),
        (200, b"{\"paid\": ", false),
        (201, b"nonsense", false),
        (200, b"{\"a\":1,\"a\":2}", false),
    ] {
        let service = Service::saying(response(status, &[("content-type", "application/json")], body)).await;
        match http(&service).handle(call("1")).await {
            Outcome::Dead { .. } => assert!(certain, "{status}"),
            Outcome::Unclear { .. } => assert!(!certain, "{status}"),
            other => panic!("{status}: {other:?}"),
        }
    }
}
