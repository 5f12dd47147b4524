//! `/livez`, `/readyz`, `/startupz`, `/metrics`.
use crate::consumer::Subscriptions;
use crate::fleet::Seats;
use crate::outbox::Outbox;
use crate::pipeline::Pulse;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use warren_publisher::publish::Health;

/// What the probes look at.
#[derive(Clone, Debug)]
pub struct Vitals {
    /// The pipeline's signs of life.
    pub pulse: Arc<Pulse>,
    /// The subscriptions.
    pub subscriptions: Arc<Subscriptions>,
    /// How many there should be.
    pub seats: Arc<Seats>,
    /// The publisher's connection.
    pub publisher: watch::Receiver<Health>,
    /// What is recorded and not yet published.
    pub outbox: Outbox,
    /// Whether the worker is draining.
    pub draining: Arc<AtomicBool>,
}

/// The loop turns every second; a process whose loop stands for so long is better replaced.
const STALLED: Duration = Duration::from_secs(30);

impl Vitals {
    /// Whether the process itself works. Never asks the broker: an outage must not restart the fleet.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.pulse.silence() < STALLED
    }

    /// Why the worker has not begun yet; empty once it has, whatever comes later.
    #[must_use]
    pub fn beginning(&self) -> Vec<String> {
        if self.seats.wanted().is_some() { Vec::new() } else { vec!["joining the pool".into()] }
    }

    /// Why the worker takes no events now; empty where it does.
    #[must_use]
    pub fn reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.draining.load(Ordering::Relaxed) {
            reasons.push("draining".into());
        }
        let consuming = self.subscriptions.consuming();
        match self.seats.wanted() {
            None => reasons.push("joining the pool".into()),
            Some(wanted) if consuming < wanted => {
                reasons.push(format!("subscribed to {consuming} of {wanted} partitions"));
            }
            Some(_) => {}
        }
        match &*self.publisher.borrow() {
            Health::Open => {}
            Health::Connecting => reasons.push("the publishing connection is being reached".into()),
            Health::Blocked(why) => reasons.push(format!("the broker blocks publishing: {why}")),
        }
        if self.pulse.store_fails.load(Ordering::Relaxed) {
            reasons.push("the store refuses".into());
        }
        reasons
    }
}

/// Serves the probes until the process ends.
///
/// # Errors
/// The address cannot be bound.
pub async fn serve(address: SocketAddr, vitals: Vitals, metrics: Option<PrometheusHandle>) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    tracing::info!(%address, "serving /livez, /readyz, /startupz and /metrics");
    let (live, start) = (vitals.clone(), vitals.clone());
    let router = Router::new()
        .route(
            "/livez",
            get(move || async move { answer(if live.is_alive() { vec![] } else { vec!["stalled".into()] }, None) }),
        )
        .route("/startupz", get(move || async move { answer(start.beginning(), None) }))
        .route("/readyz", get(move || async move { answer(vitals.reasons(), vitals.outbox.trouble()) }))
        .route(
            "/metrics",
            get(move || async move {
                let text = metrics.map(|handle| handle.render()).unwrap_or_default();
                ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text)
            }),
        );
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the admin server ended");
        }
    });
    Ok(())
}

/// The reasons say no; a note is something that a person should know of a worker that works.
fn answer(reasons: Vec<String>, note: Option<String>) -> impl IntoResponse {
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut body = serde_json::json!({"ok": reasons.is_empty(), "reasons": reasons});
    if let Some(note) = note {
        body["note"] = note.into();
    }
    let body = body.to_string();
    (status, [(header::CONTENT_TYPE, "application/json")], body)
}

/// A probe's answer.
#[derive(Debug)]
pub struct Answer {
    /// Whether it is yes.
    pub good: bool,
    /// The JSON, with the reasons.
    pub body: String,
}

/// How long a probe may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// Asks the worker that serves on this machine.
///
/// # Errors
/// Nobody answers in time.
pub async fn ask(address: SocketAddr, probe: &str) -> std::io::Result<Answer> {
    let asked = async {
        let mut stream = TcpStream::connect(nearby(address)).await?;
        stream.write_all(format!("GET /{probe} HTTP/1.0\r\n\r\n").as_bytes()).await?;
        let mut text = String::new();
        stream.take(64 << 10).read_to_string(&mut text).await?;
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        Ok(Answer { good: head.split(' ').nth(1) == Some("200"), body: body.into() })
    };
    tokio::time::timeout(PATIENCE, asked).await.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?
}

/// Who listens on every address is asked at the loopback.
fn nearby(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        ip if !ip.is_unspecified() => address,
        IpAddr::V4(_) => (Ipv4Addr::LOCALHOST, address.port()).into(),
        IpAddr::V6(_) => (Ipv6Addr::LOCALHOST, address.port()).into(),
    }
}
