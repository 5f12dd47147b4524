//! `/livez`, `/readyz`, `/metrics`.
use crate::consumer::Subscriptions;
use crate::fleet::Seats;
use crate::pipeline::Pulse;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// Whether the worker is draining.
    pub draining: Arc<AtomicBool>,
}

/// The loop turns every second; a process whose loop stands for so long is better replaced.
const STALLED_MS: i64 = 30_000;

impl Vitals {
    /// Whether the process itself works. Never asks the broker: an outage must not restart the fleet.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        jiff::Timestamp::now().as_millisecond() - self.pulse.turned.load(Ordering::Relaxed) < STALLED_MS
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
    tracing::info!(%address, "serving /livez, /readyz and /metrics");
    let live = vitals.clone();
    let router = Router::new()
        .route(
            "/livez",
            get(move || async move { answer(if live.is_alive() { vec![] } else { vec!["stalled".into()] }) }),
        )
        .route("/readyz", get(move || async move { answer(vitals.reasons()) }))
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

fn answer(reasons: Vec<String>) -> impl IntoResponse {
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::json!({"ok": reasons.is_empty(), "reasons": reasons}).to_string();
    (status, [(header::CONTENT_TYPE, "application/json")], body)
}
