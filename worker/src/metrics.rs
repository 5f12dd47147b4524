//! Every metric's name once, and the little that the rest needs to count.
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

/// The names. Units are in them; labels are closed sets (lane, reason, route).
#[expect(missing_docs, reason = "each is described where it is registered, below")]
pub mod names {
    pub const RECEIVED: &str = "warren_received_total";
    pub const HANDLED: &str = "warren_handled_total";
    pub const FILTERED: &str = "warren_filtered_total";
    pub const DUPLICATES: &str = "warren_duplicates_total";
    pub const RETRIED: &str = "warren_retried_total";
    pub const DEAD: &str = "warren_dead_total";
    pub const ANONYMOUS: &str = "warren_anonymous_total";
    pub const EMITTED: &str = "warren_emitted_total";
    pub const UNHEARD: &str = "warren_unheard_total";
    pub const RECONNECTS: &str = "warren_reconnects_total";
    pub const SILENCES: &str = "warren_silences_total";
    pub const STORE_ERRORS: &str = "warren_store_errors_total";
    pub const RUNNING: &str = "warren_running";
    pub const WAITING: &str = "warren_waiting";
    pub const OUTBOX: &str = "warren_outbox_pending";
    pub const OWNED: &str = "warren_partitions_owned";
    pub const WORKERS: &str = "warren_fleet_workers";
    pub const MOVES: &str = "warren_handovers_total";
    pub const CONSUMING: &str = "warren_partitions_consuming";
    pub const HANDLER_SECONDS: &str = "warren_handler_seconds";
    pub const COMMIT_SECONDS: &str = "warren_commit_seconds";
    pub const COMMIT_EVENTS: &str = "warren_commit_events";
}

/// Installs the recorder and describes every metric. A second worker in one process shares the first's.
pub fn install() -> Option<PrometheusHandle> {
    use metrics::{describe_counter, describe_gauge, describe_histogram};
    use metrics_exporter_prometheus::Matcher;
    let seconds = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
    let events = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &seconds)
        .and_then(|b| b.set_buckets_for_metric(Matcher::Full(names::COMMIT_EVENTS.into()), &events))
        .ok()?;
    let handle = builder.install_recorder().ok()?;
    describe_counter!(names::RECEIVED, "deliveries taken from the broker, by lane");
    describe_counter!(names::HANDLED, "events whose effect was recorded, by lane");
    describe_counter!(names::FILTERED, "events that their route's filter took for done, by route");
    describe_counter!(names::DUPLICATES, "deliveries of events whose outcome was recorded before");
    describe_counter!(names::RETRIED, "failed attempts that will be repeated");
    describe_counter!(names::DEAD, "dead letters, by reason");
    describe_counter!(names::ANONYMOUS, "messages without an id, which cannot be deduplicated");
    describe_counter!(names::EMITTED, "outgoing events that the broker confirmed");
    describe_counter!(names::UNHEARD, "outgoing events that nobody subscribes to");
    describe_counter!(names::RECONNECTS, "subscriptions that ended and were opened again");
    describe_counter!(names::SILENCES, "subscriptions to which the broker delivered nothing although events waited");
    describe_counter!(names::STORE_ERRORS, "calls that the store refused; they are repeated");
    describe_gauge!(names::RUNNING, "handlers that run");
    describe_gauge!(names::WAITING, "deliveries that wait in this worker");
    describe_gauge!(names::OUTBOX, "outgoing messages that are recorded and not yet confirmed");
    describe_gauge!(names::OWNED, "partitions that this worker is to take events from");
    describe_gauge!(names::WORKERS, "workers of the pool that this one knows of, itself too");
    describe_counter!(names::MOVES, "partitions that this worker handed over to another");
    describe_gauge!(names::CONSUMING, "partitions that this worker subscribes to, active or standing by");
    describe_histogram!(names::HANDLER_SECONDS, "time in handlers");
    describe_histogram!(names::COMMIT_SECONDS, "time of a commit");
    describe_histogram!(names::COMMIT_EVENTS, "events in a commit");
    // Observations gather in memory until somebody reads them; nobody may.
    let upkeep = handle.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(std::time::Duration::from_secs(5)).await;
            upkeep.run_upkeep();
        }
    });
    Some(handle)
}

/// Counts.
pub fn count(name: &'static str, n: u64) {
    metrics::counter!(name).increment(n);
}

/// Counts under a label.
pub fn count_by(name: &'static str, label: &'static str, value: impl Into<metrics::SharedString>, n: u64) {
    metrics::counter!(name, label => value.into()).increment(n);
}

/// Sets a gauge.
pub fn set(name: &'static str, value: usize) {
    metrics::gauge!(name).set(value as f64);
}

/// A histogram, for many observations in a row.
pub fn histogram(name: &'static str) -> metrics::Histogram {
    metrics::histogram!(name)
}

/// Adds an observation.
pub fn observe(name: &'static str, value: f64) {
    metrics::histogram!(name).record(value);
}
