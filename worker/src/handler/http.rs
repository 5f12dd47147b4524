//! Handlers that are HTTP services: an event is a POST in CloudEvents' binary mode, its answer the response.
//!
//! Nothing of a body ever reaches an error: errors are logged.
mod client;
mod headers;

pub use headers::Header;

use super::line::plain;
use super::{Call, Handler, Outcome, Reply, local};
use client::{Broken, Client};
use futures_util::future::BoxFuture;
use headers::Headers;
use hyper::body::Bytes;
use hyper::header::{
    ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
    RETRY_AFTER, USER_AGENT,
};
use hyper::{StatusCode, Uri};
use jiff::fmt::rfc2822::DateTimeParser;
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::time::Duration;
use url::Url;
use warren_shared::event::{Data, Event, Unreadable, Value};
use warren_shared::json::without_bom;
use warren_shared::process::wire::idempotency_key;
use warren_shared::retry::LONGEST;

/// Statuses that are tried again where a route does not say which: 409 is what a service answers whose first attempt with this
/// `Idempotency-Key` still runs.
pub const RETRY_ON: [u16; 1] = [409];

/// An HTTP service, as a route describes it.
#[derive(Clone, Debug)]
pub struct HttpService {
    /// Where it takes events.
    pub endpoint: Endpoint,
    /// Statuses that are tried again, beside 408, 425, 429, 5xx and every 4xx with `Retry-After`.
    pub retry_on: Vec<u16>,
    /// What its requests carry beside the event.
    pub headers: Vec<Header>,
}

impl From<Endpoint> for HttpService {
    fn from(endpoint: Endpoint) -> Self {
        Self { endpoint, retry_on: RETRY_ON.into(), headers: Vec::new() }
    }
}

/// Where a service takes events. Shown without its query, which may hold a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint(Url);

impl Endpoint {
    /// Reads `http://host:port/path` or `https://…`.
    ///
    /// # Errors
    /// What is wrong with it and what to do, to be read after its name; nothing of the URL is part of that.
    pub fn parse(url: &str) -> Result<Self, String> {
        let form = "write it like http://payments:8080/charge";
        let url = Url::parse(url).map_err(|error| format!("is not a URL ({error}): {form}"))?;
        if !["http", "https"].contains(&url.scheme()) {
            return Err(format!("begins neither with http:// nor with https://: {form}"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("holds a user or a password: take them out, URLs are shown to people".into());
        }
        if url.fragment().is_some() {
            return Err("holds a fragment, which is never sent: take it out, or write # as %23".into());
        }
        url.as_str().parse::<Uri>().map_err(|error| format!("is not a URL ({error}): {form}"))?;
        Ok(Self(url))
    }

    fn uri(&self) -> Uri {
        self.0.as_str().parse().expect("it was tried when it was read")
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = self.0.as_str();
        f.write_str(whole.split_once('?').map_or(whole, |(shown, _)| shown))
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({self})")
    }
}

/// A service that is called.
pub(super) struct Http(Arc<Called>);

struct Called {
    client: Client,
    endpoint: Endpoint,
    retry_on: Vec<u16>,
    headers: Headers,
}

impl Http {
    /// Where TLS is asked for, the machine's root certificates are trusted.
    pub(super) fn new(service: impl Into<HttpService>) -> Self {
        let service = service.into();
        let (mut roots, endpoint) = (RootCertStore::empty(), &service.endpoint);
        if endpoint.0.scheme() == "https" {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                tracing::warn!(%endpoint, "no root certificate is on this machine: {endpoint} cannot be trusted, install some");
            }
        }
        Self::trusting(roots, service)
    }

    fn trusting(roots: RootCertStore, service: impl Into<HttpService>) -> Self {
        let HttpService { endpoint, retry_on, headers } = service.into();
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let tls = tls.with_safe_default_protocol_versions().expect("ring has what TLS 1.2 and 1.3 need");
        let client = Client::new(endpoint.uri(), tls.with_root_certificates(roots).with_no_client_auth());
        Self(Arc::new(Called { client, endpoint, retry_on, headers: Headers::new(headers) }))
    }
}

impl Handler for Http {
    fn handle(&self, call: Call) -> BoxFuture<'static, Outcome> {
        let called = self.0.clone();
        Box::pin(async move {
            let (timeout, endpoint) = (call.context.timeout, &called.endpoint);
            loop {
                let (error, is_reached) = match tokio::time::timeout(timeout, called.ask(&call)).await {
                    Ok(Ok(outcome)) => return outcome,
                    Ok(Err(Broken::Here(trouble))) => {
                        local::wait_for_it_to_pass(&format!("POST {endpoint}"), &trouble).await;
                        continue;
                    }
                    Ok(Err(Broken::There(error))) => (error, true),
                    Ok(Err(Broken::Away(error))) => (error, false),
                    Err(_) => (format!("no answer within {timeout:?}"), true),
                };
                let (error, after) = (format!("POST {endpoint}: {error}"), None);
                return if is_reached { Outcome::Retry { error, after } } else { Outcome::NotNow { error, after } };
            }
        })
    }
}

impl Called {
    /// One request and what its response means.
    async fn ask(&self, call: &Call) -> Result<Outcome, Broken> {
        let data = Bytes::from(call.event.data().map(|data| data.as_bytes().to_vec()).unwrap_or_default());
        let mut head = head(call);
        // The client names no length where there is no body, and some servers insist on one (411).
        head.insert(CONTENT_LENGTH, data.len().into());
        self.headers.add_to(&mut head);
        let mut response = self.client.post(&head, &data).await?;
        // A secret that was rotated a moment ago is no fault of the event.
        let is_denied = matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
        if is_denied && self.headers.are_newer_than(&head) {
            self.headers.add_to(&mut head);
            response = self.client.post(&head, &data).await?;
        }
        let (parts, incoming) = response.into_parts();
        if !parts.status.is_success() {
            return Ok(self.refused(parts.status, &parts.headers));
        }
        let reply = match client::body(incoming, call.context.limits.body).await? {
            Some(body) => reply(call, &parts.headers, &body),
            None => Err(format!("it has more than {} bytes", call.context.limits.body)),
        };
        // As with a program: whoever answers wrongly does it again.
        let wrong = |error| Outcome::Unclear {
            error: format!("POST {}: the service's answer is wrong: {error}", self.endpoint),
        };
        Ok(reply.map_or_else(wrong, Outcome::Done))
    }

    /// What a status other than 2xx means.
    fn refused(&self, status: StatusCode, head: &HeaderMap) -> Outcome {
        let reason = status.canonical_reason().unwrap_or("a status without a name");
        let error = format!("POST {}: {} {reason}", self.endpoint, status.as_u16());
        match status.as_u16() {
            425 | 429 => Outcome::NotNow { error, after: after(head) },
            408 | 500..=599 => Outcome::Retry { error, after: after(head) },
            code if self.retry_on.contains(&code) => Outcome::Retry { error, after: after(head) },
            // Who says when to come again does not mean "never".
            400..=499 if head.contains_key(RETRY_AFTER) => Outcome::Retry { error, after: after(head) },
            300..=399 => {
                let cure = "redirects are not followed, name the final address in 'http'";
                Outcome::Unclear { error: format!("{error}: {cure}") }
            }
            400..=499 => Outcome::Dead { error },
            _ => Outcome::Unclear { error },
        }
    }
}

/// The event's attributes, and what a service needs beside them.
fn head(call: &Call) -> HeaderMap {
    let (event, mut head) = (&call.event, HeaderMap::new());
    let mut put = |name: &str, value: &str| {
        let name = HeaderName::try_from(format!("ce-{name}")).expect("attributes have names of a-z and 0-9");
        head.insert(name, HeaderValue::try_from(encoded(value)).expect("what is encoded is printable ASCII"));
    };
    put("specversion", "1.0");
    put("id", event.id());
    put("source", event.source());
    put("type", event.kind());
    for (name, value) in [("subject", event.subject()), ("time", event.time()), ("dataschema", event.schema())] {
        if let Some(value) = value {
            put(name, value);
        }
    }
    event.extensions().for_each(|(name, value)| put(name, &value.to_string()));
    // JSON is what data without a type is; HTTP has no such rule.
    let json = || matches!(event.data(), Some(Data::Json(_))).then_some("application/json");
    let content_type = event.content_type().or_else(json).map(HeaderValue::from_str);
    if let Some(Ok(content_type)) = content_type {
        head.insert(CONTENT_TYPE, content_type);
    }
    for name in ["traceparent", "tracestate"] {
        if let Some(Ok(value)) = event.extension(name).map(|value| HeaderValue::from_str(&value.to_string())) {
            head.insert(name, value);
        }
    }
    // What is compressed would have to be bounded twice.
    head.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    head.insert(ACCEPT, HeaderValue::from_static("*/*"));
    head.insert(USER_AGENT, HeaderValue::from_static(concat!("warren/", env!("CARGO_PKG_VERSION"))));
    head.insert("warren-attempt", call.context.attempt.into());
    let key = idempotency_key(event, &event.identity()).to_string();
    head.insert("idempotency-key", HeaderValue::try_from(key).expect("a UUID is ASCII"));
    head
}

/// `Retry-After`: seconds or a date. What is neither asks for nothing.
fn after(head: &HeaderMap) -> Option<Duration> {
    let text = head.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // So many digits that they fit nowhere are a long time, too.
        Duration::from_secs(text.parse().unwrap_or(u64::MAX))
    } else {
        let date = DateTimeParser::new().relaxed_weekday(true).parse_timestamp(text).ok()?;
        Duration::try_from(date.duration_since(jiff::Timestamp::now())).ok()?
    };
    Some(wait.min(LONGEST))
}

/// What a 2xx says: events, a result, or nothing.
fn reply(call: &Call, head: &HeaderMap, body: &[u8]) -> Result<Reply, String> {
    let content_type = head.get(CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let content_type = content_type.as_deref().unwrap_or_default();
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let is_event = essence.starts_with("application/cloudevents");
    if !is_event && head.keys().any(|name| name.as_str().starts_with("ce-")) {
        return Ok(Reply::done().emit(event(call, head, content_type, body).map_err(|error| error.to_string())?));
    }
    let body = without_bom(body);
    if body.is_empty() {
        return Ok(Reply::done());
    }
    let encoding = head.get(CONTENT_ENCODING).map(|value| String::from_utf8_lossy(value.as_bytes()));
    if let Some(encoding) = encoding.filter(|encoding| !encoding.trim().eq_ignore_ascii_case("identity"))
        && (is_event || essence == "application/json")
    {
        return Err(format!("its body is encoded ('{}'), though 'identity' was asked for", plain(&encoding, 64)));
    }
    match essence.as_str() {
        "application/json" => Ok(Reply { result: call.result(body)?, ..Reply::default() }),
        "application/cloudevents+json" => {
            call.emitted(0, body).map(|event| Reply::done().emit(event)).map_err(|error| error.to_string())
        }
        "application/cloudevents-batch+json" => {
            let list: Vec<&RawValue> = serde_json::from_slice(body).map_err(|_| "the batch is not a list of events")?;
            let read = |(i, raw): (usize, &&RawValue)| {
                call.emitted(i, raw.get().as_bytes()).map_err(|error| format!("event {i} of the batch: {error}"))
            };
            Ok(Reply { emit: list.iter().enumerate().map(read).collect::<Result<_, _>>()?, ..Reply::default() })
        }
        _ if is_event => Err(format!("events of the type '{}' are not read, only JSON", plain(&essence, 64))),
        _ => Ok(Reply::done()),
    }
}

/// The event that a response in binary mode is. It may leave out everything but its type.
fn event(call: &Call, head: &HeaderMap, content_type: &str, body: &[u8]) -> Result<Event, Unreadable> {
    let mut said = BTreeMap::new();
    for (header, value) in head {
        let Some(name) = header.as_str().strip_prefix("ce-") else { continue };
        let wrong = |problem: &str| Unreadable::Attribute { name: plain(name, 64), problem: problem.into() };
        let value = decoded(value.as_bytes()).ok_or_else(|| wrong("is not UTF-8"))?;
        if said.insert(name, value).is_some() {
            return Err(wrong("stands twice"));
        }
    }
    if let Some(version) = said.remove("specversion").filter(|version| version != "1.0") {
        return Err(Unreadable::SpecVersion(plain(&version, 64)));
    }
    let defaults = call.defaults(0);
    let kind = said.remove("type").ok_or(Unreadable::Missing("type"))?;
    let id = said.remove("id").unwrap_or_else(|| defaults.id.clone());
    let source = said.remove("source").unwrap_or_else(|| defaults.source.clone());
    let mut event = Event::new(id, source, kind)?;
    for (name, value) in said {
        event = event.with(name, Value::Text(value))?;
    }
    if !content_type.is_empty() {
        event = event.with("datacontenttype", content_type.into())?;
    }
    event.with_body(body, call.context.limits)?.with_defaults(defaults)
}

/// An attribute's value as a header's: all but printable ASCII, and of that space, quote and per cent, is encoded.
fn encoded(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'!'..=b'~' if !matches!(byte, b'"' | b'%') => out.push(char::from(byte)),
            _ => write!(out, "%{byte:02X}").expect("a string takes all that is written"),
        }
    }
    out
}

/// What a header's value stands for; none where that is not UTF-8. Quotes around it come from older senders.
fn decoded(value: &[u8]) -> Option<String> {
    let quoted = value.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\""));
    let (value, is_quoted) = quoted.map_or((value, false), |inner| (inner, true));
    let (mut bytes, mut rest) = (Vec::with_capacity(value.len()), value);
    while let [first, after @ ..] = rest {
        let digit = |at: usize| after.get(at).and_then(|byte| char::from(*byte).to_digit(16));
        let (byte, taken) = match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => (u8::try_from(high * 16 + low).ok()?, 3),
            (b'\\', ..) if is_quoted && !after.is_empty() => (after[0], 2),
            _ => (*first, 1),
        };
        bytes.push(byte);
        rest = &rest[taken..];
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
