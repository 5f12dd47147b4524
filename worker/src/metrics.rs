//! Every metric's name once, with what it means; and the handles of what is counted at each event.
//!
//! One table makes the names' descriptions and the section of `docs/operations.md`; a test holds them together. Labels are closed
//! sets: lanes and routes come from the configuration, reasons from the code. All carry the label `pool`.
use crate::config::Routes;
use metrics::{Counter, Gauge, Histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;
use warren_shared::lane::Lanes;

/// The names. Units are in them.
#[expect(missing_docs, reason = "the table below describes each")]
pub mod names {
    pub const BUILD: &str = "warren_build_info";
    pub const RECEIVED: &str = "warren_received_total";
    pub const HANDLED: &str = "warren_handled_total";
    pub const FILTERED: &str = "warren_filtered_total";
    pub const DUPLICATES: &str = "warren_duplicates_total";
    pub const RETRIED: &str = "warren_retried_total";
    pub const DEAD: &str = "warren_dead_total";
    pub const ANONYMOUS: &str = "warren_anonymous_total";
    pub const EMITTED: &str = "warren_emitted_total";
    pub const UNHEARD: &str = "warren_unheard_total";
    pub const HANDLER_SECONDS: &str = "warren_handler_seconds";
    pub const WAIT_SECONDS: &str = "warren_wait_seconds";
    pub const END_TO_END_SECONDS: &str = "warren_end_to_end_seconds";
    pub const COMMIT_SECONDS: &str = "warren_commit_seconds";
    pub const COMMIT_EVENTS: &str = "warren_commit_events";
    pub const ACK_EVENTS: &str = "warren_ack_events";
    pub const IN_FLIGHT: &str = "warren_in_flight";
    pub const RUNNING: &str = "warren_running";
    pub const WAITING: &str = "warren_waiting";
    pub const OUTBOX: &str = "warren_outbox_pending";
    pub const OUTBOX_HELD: &str = "warren_outbox_held";
    pub const OUTBOX_AGE: &str = "warren_outbox_age_seconds";
    pub const STORE_ERRORS: &str = "warren_store_errors_total";
    pub const BLOCKED: &str = "warren_blocked_seconds_total";
    pub const DRAINING: &str = "warren_draining";
    pub const WORKERS: &str = "warren_fleet_workers";
    pub const OWNED: &str = "warren_partitions_owned";
    pub const CONSUMING: &str = "warren_partitions_consuming";
    pub const MOVES: &str = "warren_handovers_total";
    pub const RECONNECTS: &str = "warren_reconnects_total";
    pub const SILENCES: &str = "warren_silences_total";
    pub const PROVED: &str = "warren_last_consumption_timestamp_seconds";
    pub const LOG_DROPPED: &str = "warren_log_dropped_total";
    pub const DEAD_LETTERS: &str = "warren_dead_letters";
    pub const UNROUTED: &str = "warren_unrouted";
    pub const CAPACITY: &str = "warren_capacity";
    pub const BACKLOG: &str = "warren_backlog_events";
    pub const ARRIVALS: &str = "warren_arrival_rate";
    pub const RATE: &str = "warren_service_rate";
    pub const SERVICE: &str = "warren_service_seconds";
    pub const STAY: &str = "warren_sojourn_seconds";
    pub const INSIDE: &str = "warren_in_system";
    pub const UTILIZATION: &str = "warren_utilization_ratio";
    pub const WORK: &str = "warren_work_seconds";
    pub const WANTED: &str = "warren_workers_wanted";
    pub const INSTANCES: &str = "warren_process_instances";
    pub const UNCHANGED: &str = "warren_process_unchanged_seconds";
}
use names as n;

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// What is.
    Gauge,
    /// `_bucket`, `_sum` and `_count`.
    Histogram,
}

/// One metric: a row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Its labels, beside `pool`.
    pub labels: &'static [&'static str],
    /// What it means.
    pub help: &'static str,
}

const fn row(kind: Kind, name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind, labels, help }
}

const LANE: &[&str] = &["lane"];
const PROCESS: &[&str] = &["process", "status"];
const ROUTE: &[&str] = &["lane", "route"];

/// All metrics. What is not here does not exist.
#[rustfmt::skip]
pub const METRICS: &[Metric] = &[
    row(Kind::Gauge, n::BUILD, &["version"], "1; the version is in the label"),
    row(Kind::Counter, n::RECEIVED, ROUTE, "deliveries taken from the broker; `route` is the pattern that takes the event, empty where none does"),
    row(Kind::Counter, n::HANDLED, ROUTE, "events whose effect was recorded"),
    row(Kind::Counter, n::FILTERED, ROUTE, "of these, those that `where` or `transform` took for done"),
    row(Kind::Counter, n::DUPLICATES, ROUTE, "deliveries of events whose outcome was recorded before"),
    row(Kind::Counter, n::RETRIED, ROUTE, "failed attempts that will be repeated"),
    row(Kind::Counter, n::DEAD, &["lane", "route", "reason"], "dead letters"),
    row(Kind::Counter, n::ANONYMOUS, &[], "messages without an id: have their publisher set `message_id`"),
    row(Kind::Counter, n::EMITTED, &[], "outgoing events that the broker confirmed"),
    row(Kind::Counter, n::UNHEARD, &[], "outgoing events that nobody subscribes to"),
    row(Kind::Histogram, n::HANDLER_SECONDS, ROUTE, "time in handlers"),
    row(Kind::Histogram, n::WAIT_SECONDS, LANE, "from an event's `time` (its publisher's clock) to the start of its handler; without a `time` it is not counted"),
    row(Kind::Histogram, n::END_TO_END_SECONDS, LANE, "from an event's `time` until its outcome is recorded"),
    row(Kind::Histogram, n::COMMIT_SECONDS, &[], "time of a commit"),
    row(Kind::Histogram, n::COMMIT_EVENTS, &[], "events in a commit"),
    row(Kind::Histogram, n::ACK_EVENTS, &[], "deliveries that an ack covers"),
    row(Kind::Gauge, n::IN_FLIGHT, LANE, "deliveries that are here and not yet settled"),
    row(Kind::Gauge, n::RUNNING, &[], "handlers that run"),
    row(Kind::Gauge, n::WAITING, &[], "deliveries that wait here for their turn"),
    row(Kind::Gauge, n::OUTBOX, &[], "outgoing messages that are recorded and not yet confirmed"),
    row(Kind::Gauge, n::OUTBOX_HELD, &[], "outgoing messages whose destination refuses them for now; /readyz says why"),
    row(Kind::Gauge, n::OUTBOX_AGE, &[], "how long the oldest of them has waited"),
    row(Kind::Counter, n::STORE_ERRORS, &[], "calls that the store refused; they are repeated"),
    row(Kind::Counter, n::BLOCKED, &[], "seconds in which this worker could not publish: no connection, or an alarm of the broker"),
    row(Kind::Gauge, n::DRAINING, &[], "1 while it drains"),
    row(Kind::Gauge, n::WORKERS, &[], "workers of the pool that this one knows of, itself too"),
    row(Kind::Gauge, n::OWNED, &[], "partitions that this worker is to take events from"),
    row(Kind::Gauge, n::CONSUMING, &[], "partitions that it subscribes to, active or standing by"),
    row(Kind::Counter, n::MOVES, &[], "partitions that it handed over to another"),
    row(Kind::Counter, n::RECONNECTS, &[], "subscriptions that ended and were opened again"),
    row(Kind::Counter, n::SILENCES, &[], "subscriptions to which the broker delivered nothing although events waited: they were replaced"),
    row(Kind::Gauge, n::PROVED, &[], "when it last had proof that it consumes: a delivery came, or its queue was seen empty; seconds since 1970"),
    row(Kind::Counter, n::LOG_DROPPED, &[], "log lines that were dropped, as nobody read stderr as fast as they came"),
    row(Kind::Gauge, n::DEAD_LETTERS, &[], "what waits in the pool's dead queue; every worker sees the same"),
    row(Kind::Gauge, n::UNROUTED, &[], "what waits in the pool's unrouted queue, which must stay empty; every worker sees the same"),
    row(Kind::Gauge, n::CAPACITY, &[], "handlers that it may run at once"),
    row(Kind::Gauge, n::BACKLOG, &[], "events in the queues that it serves, ready and in flight"),
    row(Kind::Gauge, n::ARRIVALS, &[], "λ: events a second that come into these queues"),
    row(Kind::Gauge, n::RATE, &[], "μ: events a second that it can do"),
    row(Kind::Gauge, n::SERVICE, &[], "how long an event holds a place for handlers, on average"),
    row(Kind::Gauge, n::STAY, &[], "W: how long a delivery stays here, on average"),
    row(Kind::Gauge, n::INSIDE, &[], "L: deliveries here, on average"),
    row(Kind::Gauge, n::UTILIZATION, &[], "the part of its places for handlers that is taken, 0 to 1"),
    row(Kind::Gauge, n::WORK, &[], "how long it would work on its backlog: backlog × service time ÷ places"),
    row(Kind::Gauge, n::WANTED, &[], "how many workers like this one its queues call for, to keep up and to be through with the backlog within `WARREN_WORK_OFF`; the sum over a pool is the number of its workers"),
    row(Kind::Gauge, n::INSTANCES, PROCESS, "instances of business processes that have not ended, by status (running, compensating, stuck); `process` is empty where there is none; every worker sees the same"),
    row(Kind::Gauge, n::UNCHANGED, PROCESS, "for how long the one of them that changed longest ago has not changed"),
];

/// The table as `docs/operations.md` shows it.
#[must_use]
pub fn markdown() -> String {
    let mut text = String::from("| name | labels | kind | meaning |\n|---|---|---|---|\n");
    for m in METRICS {
        let kind = format!("{:?}", m.kind).to_lowercase();
        let labels: Vec<String> = m.labels.iter().map(|label| format!("`{label}`")).collect();
        let _ = writeln!(text, "| `{}` | {} | {kind} | {} |", m.name, labels.join(", "), m.help);
    }
    text
}

const SECONDS: [f64; 17] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 600.0];
const EVENTS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Installs the recorder and describes every metric. A second worker in one process shares the first's.
pub fn install(pool: &str) -> Option<PrometheusHandle> {
    let builder = PrometheusBuilder::new()
        .add_global_label("pool", pool)
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)
        .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("_events".into()), &EVENTS))
        .ok()?;
    let handle = builder.install_recorder().ok()?;
    for m in METRICS {
        match m.kind {
            Kind::Counter => metrics::describe_counter!(m.name, m.help),
            Kind::Gauge => metrics::describe_gauge!(m.name, m.help),
            Kind::Histogram => metrics::describe_histogram!(m.name, m.help),
        }
        // What has no labels is there from the start: an alert on a first increase needs the zero before it.
        if m.kind == Kind::Counter && m.labels.is_empty() {
            count(m.name, 0);
        }
    }
    metrics::gauge!(n::BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    // Observations gather in memory until somebody reads them; nobody may.
    let upkeep = handle.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            upkeep.run_upkeep();
        }
    });
    Some(handle)
}

/// Counts.
pub fn count(name: &'static str, n: u64) {
    metrics::counter!(name).increment(n);
}

/// Sets a gauge.
pub fn set(name: &'static str, value: f64) {
    metrics::gauge!(name).set(value);
}

/// A histogram, for many observations in a row.
pub fn histogram(name: &'static str) -> Histogram {
    metrics::histogram!(name)
}

/// Adds an observation.
pub fn observe(name: &'static str, value: f64) {
    metrics::histogram!(name).record(value);
}

/// What is counted at each event, looked up once.
pub(crate) struct Meters {
    lanes: Vec<LaneMeters>,
    pub(crate) commit_seconds: Histogram,
    pub(crate) commit_events: Histogram,
}

/// Of a lane.
pub(crate) struct LaneMeters {
    name: String,
    pub(crate) in_flight: Gauge,
    pub(crate) wait: Histogram,
    pub(crate) end_to_end: Histogram,
    /// One a route, and last those of events that no route takes.
    routes: Vec<RouteMeters>,
}

/// Of a lane's events that one route takes.
pub(crate) struct RouteMeters {
    route: Arc<str>,
    pub(crate) received: Counter,
    pub(crate) handled: Counter,
    pub(crate) filtered: Counter,
    pub(crate) duplicates: Counter,
    pub(crate) retried: Counter,
    pub(crate) seconds: Histogram,
}

impl Meters {
    pub(crate) fn new(lanes: &Lanes, routes: &Routes) -> Self {
        let of_route = |lane: &str, route: Arc<str>| {
            let labels = || [("lane", lane.to_owned()), ("route", route.to_string())];
            RouteMeters {
                received: metrics::counter!(n::RECEIVED, &labels()),
                handled: metrics::counter!(n::HANDLED, &labels()),
                filtered: metrics::counter!(n::FILTERED, &labels()),
                duplicates: metrics::counter!(n::DUPLICATES, &labels()),
                retried: metrics::counter!(n::RETRIED, &labels()),
                seconds: metrics::histogram!(n::HANDLER_SECONDS, &labels()),
                route,
            }
        };
        let of_lane = |lane: &str| {
            let patterns = routes.iter().map(|route| Arc::from(route.on.as_str())).chain([Arc::from("")]);
            LaneMeters {
                name: lane.to_owned(),
                in_flight: metrics::gauge!(n::IN_FLIGHT, "lane" => lane.to_owned()),
                wait: metrics::histogram!(n::WAIT_SECONDS, "lane" => lane.to_owned()),
                end_to_end: metrics::histogram!(n::END_TO_END_SECONDS, "lane" => lane.to_owned()),
                routes: patterns.map(|route| of_route(lane, route)).collect(),
            }
        };
        Self {
            lanes: lanes.iter().map(|lane| of_lane(&lane.name)).collect(),
            commit_seconds: histogram(n::COMMIT_SECONDS),
            commit_events: histogram(n::COMMIT_EVENTS),
        }
    }

    /// All lanes, in their order.
    pub(crate) fn lanes(&self) -> &[LaneMeters] {
        &self.lanes
    }

    /// Those of a lane.
    pub(crate) fn lane(&self, lane: usize) -> &LaneMeters {
        &self.lanes[lane]
    }

    /// Those of a lane's events that a route takes, or none does.
    pub(crate) fn of(&self, lane: usize, route: Option<usize>) -> &RouteMeters {
        let routes = &self.lanes[lane].routes;
        &routes[route.unwrap_or(routes.len() - 1)]
    }

    /// A dead letter. Rare, and of more reasons than anybody wants handles for.
    pub(crate) fn dead(&self, lane: usize, route: Option<usize>, reason: &'static str) {
        let (lane, route) = (self.lanes[lane].name.clone(), self.of(lane, route).route.to_string());
        metrics::counter!(n::DEAD, "lane" => lane, "route" => route, "reason" => reason).increment(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_md_shows_this_table() {
        let text = include_str!("../../docs/operations.md");
        let (begin, end) = ("<!-- metrics: begin -->\n", "<!-- metrics: end -->");
        let shown = text.split_once(begin).and_then(|(_, rest)| rest.split_once(end)).map(|(table, _)| table);
        assert_eq!(shown, Some(markdown().as_str()), "docs/operations.md, between its marks");
    }

    #[test]
    fn names_follow_the_conventions_and_stand_once() {
        for (n, m) in METRICS.iter().enumerate() {
            assert!(METRICS[..n].iter().all(|other| other.name != m.name), "{}", m.name);
            assert_eq!(m.name.ends_with("_total"), m.kind == Kind::Counter, "{}", m.name);
            assert!(m.name.starts_with("warren_") && !m.help.is_empty(), "{}", m.name);
        }
    }
}
