//! What is demanded (issues 3 and 6), and whether the figures meet it.
use crate::results::Results;

/// A demand on one figure.
pub(crate) struct Target {
    pub(crate) what: &'static str,
    path: &'static str,
    bound: Bound,
}

enum Bound {
    AtLeast(f64),
    AtMost(f64),
}
use Bound::{AtLeast, AtMost};

/// A demand, and what became of it.
pub(crate) struct Verdict {
    pub(crate) wanted: String,
    pub(crate) measured: Option<f64>,
    /// None where it was not measured.
    pub(crate) met: Option<bool>,
}

/// All demands.
pub(crate) const TARGETS: [Target; 16] = [
    demand("drain ÷ raw_multiple", "ratios.drain_vs_raw_multiple", AtLeast(0.75)),
    demand("drain ÷ raw_each", "ratios.drain_vs_raw_each", AtLeast(4.0)),
    demand("drain ÷ amqplib_each", "ratios.drain_vs_amqplib", AtLeast(1.0)),
    demand("drain, client CPU, µs an event", "drain.warren_sqlite.cpu_us", AtMost(15.0)),
    demand("exec handler, events/s", "drain.warren_exec.per_s", AtLeast(15_000.0)),
    demand("publish ÷ raw", "ratios.publish_vs_raw", AtLeast(0.9)),
    demand("publish ÷ amqplib", "ratios.publish_vs_amqplib", AtLeast(1.0)),
    demand("p99 at 2,000/s above raw, ms", "ratios.latency_p99_extra_ms", AtMost(5.0)),
    demand("backlog, peak RSS, MB", "backlog.rss_mb", AtMost(64.0)),
    demand("backlog, last ÷ first tenth", "ratios.backlog_last_vs_first", AtLeast(0.9)),
    demand("cost with 10 M ids ÷ 100 k", "ratios.inbox_10m_vs_100k", AtMost(1.3)),
    demand("drain on PostgreSQL ÷ raw_multiple", "ratios.drain_postgres_vs_raw_multiple", AtLeast(0.4)),
    demand("transactional handlers ÷ loop", "ratios.tx_vs_loop", AtLeast(5.0)),
    demand("process, steps/s", "process.warren_sqlite.per_s", AtLeast(3_000.0)),
    demand("process ÷ Celery chain", "ratios.process_vs_celery", AtLeast(10.0)),
    demand("start to first event, ms", "start.ms", AtMost(150.0)),
];

const fn demand(what: &'static str, path: &'static str, bound: Bound) -> Target {
    Target { what, path, bound }
}

impl Target {
    /// Whether the figures meet it.
    pub(crate) fn judge(&self, results: &Results) -> Verdict {
        let measured = results.median(self.path);
        let (wanted, met) = match self.bound {
            AtLeast(bound) => (format!("≥ {bound}"), measured.map(|value| value >= bound)),
            AtMost(bound) => (format!("≤ {bound}"), measured.map(|value| value <= bound)),
        };
        Verdict { wanted, measured, met }
    }
}
