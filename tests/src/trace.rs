//! What the handlers of a fleet saw, from the notes of `warren-test-worker`: who ran what when.
use anyhow::Context;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

/// One call of a handler.
#[derive(Clone, Debug)]
pub struct Call {
    /// Which worker's.
    pub worker: String,
    /// The event.
    pub id: String,
    /// Its key.
    pub key: String,
    /// Its place among the events of its key.
    pub sequence: u64,
    /// Nanoseconds of the machine's clock.
    pub begin: u64,
    /// None where the worker was killed first.
    pub end: Option<u64>,
}

/// All calls, by their beginning.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// The calls.
    pub calls: Vec<Call>,
}

/// What a trace says of the promises.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Calls, repeats included.
    pub calls: usize,
    /// Distinct events.
    pub events: usize,
    /// Calls of an event that another call had before.
    pub repeats: usize,
    /// First calls of an event that came after a later event of its key.
    pub inversions: usize,
    /// Calls of one key that ran at the same time.
    pub overlaps: usize,
}

impl Trace {
    /// Reads the notes of workers: files `<worker>.calls` of a directory.
    ///
    /// # Errors
    /// They cannot be read, or hold something else.
    pub fn read(dir: &Path) -> anyhow::Result<Self> {
        let mut calls = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "calls") {
                continue;
            }
            let worker = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let text = std::fs::read_to_string(&path)?;
            let mut open: HashMap<&str, usize> = HashMap::new();
            for line in text.lines() {
                let fields: Vec<&str> = line.split(' ').collect();
                match fields[..] {
                    ["b", begin, id, key, sequence, _] => {
                        open.insert(id, calls.len());
                        let (begin, sequence) = (begin.parse()?, sequence.parse().unwrap_or(0));
                        let (worker, id, key) = (worker.clone(), id.to_owned(), key.to_owned());
                        calls.push(Call { worker, id, key, sequence, begin, end: None });
                    }
                    ["e", end, id] => {
                        let call = open.remove(id).context("an end has its beginning")?;
                        calls[call].end = Some(end.parse()?);
                    }
                    _ => anyhow::bail!("{line:?} is no note"),
                }
            }
        }
        calls.sort_by_key(|call| call.begin);
        Ok(Self { calls })
    }

    /// Whether the promises were kept.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let mut verdict = Verdict { calls: self.calls.len(), ..Verdict::default() };
        let mut seen = HashSet::new();
        let mut last: HashMap<&str, &Call> = HashMap::new();
        let mut busy: HashMap<&str, &Call> = HashMap::new();
        for call in &self.calls {
            if !seen.insert(&call.id) {
                verdict.repeats += 1;
            } else if let Some(before) = last.insert(&call.key, call)
                && before.sequence > call.sequence
            {
                verdict.inversions += 1;
                println!(
                    "inversion: {} {} at {} after {} at {}",
                    call.key, call.sequence, call.worker, before.sequence, before.worker
                );
            }
            // Whoever was killed runs no more.
            if let Some(other) = busy.insert(&call.key, call)
                && other.end.is_some_and(|end| end > call.begin)
            {
                verdict.overlaps += 1;
                println!("overlap: {} at {} {} and at {} {}", call.key, other.worker, other.id, call.worker, call.id);
            }
        }
        verdict.events = seen.len();
        verdict
    }

    /// The longest time, in milliseconds, in which each group of keys was not served after a moment; its last call before it
    /// counts as at that moment.
    #[must_use]
    pub fn stills(&self, group: impl Fn(&str) -> Option<String>, since: u64) -> BTreeMap<String, f64> {
        let mut last: BTreeMap<String, u64> = BTreeMap::new();
        let mut stills: BTreeMap<String, f64> = BTreeMap::new();
        for call in &self.calls {
            let Some(group) = group(&call.key) else { continue };
            let before = last.insert(group.clone(), call.begin).unwrap_or(since).max(since);
            let still = call.begin.saturating_sub(before) as f64 / 1e6;
            let longest = stills.entry(group).or_default();
            *longest = longest.max(still);
        }
        stills
    }

    /// How long each group of keys was not served when it went from one worker to another, in milliseconds, sorted.
    #[must_use]
    pub fn gaps(&self, group: impl Fn(&str) -> Option<String>) -> Vec<f64> {
        let mut last: BTreeMap<String, &Call> = BTreeMap::new();
        let mut gaps = Vec::new();
        for call in &self.calls {
            let Some(group) = group(&call.key) else { continue };
            if let Some(before) = last.insert(group, call)
                && before.worker != call.worker
            {
                gaps.push(call.begin.saturating_sub(before.end.unwrap_or(before.begin)) as f64 / 1e6);
            }
        }
        gaps.sort_by(f64::total_cmp);
        gaps
    }
}

/// The clock of the notes.
#[must_use]
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// A quantile of sorted values, 0..1.
#[must_use]
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = (sorted.len() as f64 * part).ceil() as usize;
    sorted.get(place.saturating_sub(1)).copied().unwrap_or(0.0)
}
