//! The figures: a value a round for each path such as `drain.raw_each.per_s`; medians, and ratios round by round.
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// All figures.
#[derive(Debug, Default)]
pub(crate) struct Results {
    values: BTreeMap<String, BTreeMap<u32, f64>>,
    absent: BTreeMap<String, String>,
}

/// A ratio's name, what stands above the line, and what below.
const RATIOS: [(&str, &str, &str); 14] = [
    ("drain_vs_raw_multiple", "drain.warren_sqlite.per_s", "drain.raw_multiple.per_s"),
    ("drain_vs_raw_each", "drain.warren_sqlite.per_s", "drain.raw_each.per_s"),
    ("drain_vs_amqplib", "drain.warren_sqlite.per_s", "drain.amqplib_each.per_s"),
    ("drain_vs_celery", "drain.warren_sqlite.per_s", "drain.celery.per_s"),
    ("drain_vs_dramatiq", "drain.warren_sqlite.per_s", "drain.dramatiq.per_s"),
    ("drain_postgres_vs_raw_multiple", "drain.warren_postgres.per_s", "drain.raw_multiple.per_s"),
    ("tx_vs_loop", "tx.warren.per_s", "tx.loop.per_s"),
    ("process_vs_celery", "process.warren_sqlite.per_s", "process.celery_chain.per_s"),
    ("process_postgres_vs_celery", "process.warren_postgres.per_s", "process.celery_chain.per_s"),
    ("publish_vs_raw", "publish.warren.per_s", "publish.raw.per_s"),
    ("publish_vs_amqplib", "publish.warren.per_s", "publish.amqplib.per_s"),
    // Cost per event, so the other way round.
    ("inbox_10m_vs_100k", "inbox.100k.per_s", "inbox.10m.per_s"),
    ("inbox_cpu_10m_vs_100k", "inbox.10m.cpu_us", "inbox.100k.cpu_us"),
    ("backlog_last_vs_first", "backlog.last_tenth_per_s", "backlog.first_tenth_per_s"),
];

impl Results {
    /// Notes a value.
    pub(crate) fn put(&mut self, path: &str, round: u32, value: f64) {
        self.values.entry(path.to_owned()).or_default().insert(round, value);
    }

    /// Notes that a row has no values, and why.
    pub(crate) fn absent(&mut self, row: &str, why: String) {
        self.absent.insert(row.to_owned(), why);
    }

    /// Why a row has no values.
    pub(crate) fn why_absent(&self) -> &BTreeMap<String, String> {
        &self.absent
    }

    /// The median over the rounds.
    pub(crate) fn median(&self, path: &str) -> Option<f64> {
        let mut values: Vec<f64> = self.values.get(path)?.values().copied().collect();
        values.sort_by(f64::total_cmp);
        let (low, high) = (values.get((values.len().checked_sub(1)?) / 2)?, values.get(values.len() / 2)?);
        Some(low.midpoint(*high))
    }

    /// The smallest and the largest value.
    pub(crate) fn range(&self, path: &str) -> Option<(f64, f64)> {
        let values = self.values.get(path)?.values();
        let spread = (f64::INFINITY, f64::NEG_INFINITY);
        Some(values.fold(spread, |(low, high), value| (low.min(*value), high.max(*value))))
    }

    /// The rows of a group, in alphabetical order.
    pub(crate) fn rows(&self) -> Vec<String> {
        let row = |path: &String| path.strip_suffix(".per_s").map(str::to_owned);
        self.values.keys().filter_map(row).chain(self.absent.keys().cloned()).collect()
    }

    /// Makes the ratios: of the values of the same round, because what drifts drifts for both.
    pub(crate) fn compare(&mut self) {
        for (name, above, below) in RATIOS {
            self.derive(&format!("ratios.{name}"), above, below, |above, below| above / below);
        }
        let extra = |warren: f64, raw: f64| warren - raw;
        self.derive("ratios.latency_p99_extra_ms", "latency.warren.p99_ms", "latency.raw.p99_ms", extra);
        self.derive("ratios.latency_p50_extra_ms", "latency.warren.p50_ms", "latency.raw.p50_ms", extra);
    }

    fn derive(&mut self, path: &str, one: &str, other: &str, how: impl Fn(f64, f64) -> f64) {
        let (Some(one), Some(other)) = (self.values.get(one), self.values.get(other)) else { return };
        let both = one.iter().filter_map(|(round, value)| Some((*round, how(*value, *other.get(round)?))));
        let derived = both.collect();
        self.values.insert(path.to_owned(), derived);
    }

    /// The medians as a tree, rows that are absent as null, every value below `samples`.
    pub(crate) fn json(&self) -> Value {
        let mut tree = json!({});
        for path in self.values.keys() {
            place(&mut tree, path, json!(self.median(path).map(rounded)));
        }
        for row in self.absent.keys() {
            place(&mut tree, row, Value::Null);
        }
        let samples = |values: &BTreeMap<u32, f64>| values.values().map(|value| rounded(*value)).collect::<Vec<_>>();
        let samples: Map<String, Value> =
            self.values.iter().map(|(path, values)| (path.clone(), json!(samples(values)))).collect();
        tree["absent"] = json!(self.absent);
        tree["samples"] = Value::Object(samples);
        tree
    }
}

fn place(tree: &mut Value, path: &str, value: Value) {
    let spot = path.split('.').fold(tree, |tree, name| &mut tree[name]);
    *spot = value;
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_the_same_round_and_reported_by_their_median() {
        let mut results = Results::default();
        for (round, warren, raw) in [(1, 10.0, 20.0), (2, 30.0, 40.0), (3, 90.0, 100.0)] {
            results.put("drain.warren_sqlite.per_s", round, warren);
            results.put("drain.raw_multiple.per_s", round, raw);
        }
        results.absent("drain.celery", "no network".into());
        results.compare();
        assert_eq!(results.median("ratios.drain_vs_raw_multiple"), Some(0.75));
        assert_eq!(results.median("ratios.drain_vs_raw_each"), None);
        let json = results.json();
        assert_eq!(json["drain"]["warren_sqlite"]["per_s"], 30.0);
        assert_eq!(json["drain"]["celery"], Value::Null);
        assert_eq!(json["absent"]["drain.celery"], "no network");
    }
}
