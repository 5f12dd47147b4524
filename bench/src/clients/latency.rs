//! From publish to handled, at an even pace.
use super::{FLUSH, Task, raw, say, warren};
use crate::events::Said;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Events of the first second, in which connections are made and memory is touched, do not count.
pub(crate) const PER_SECOND: u64 = 2000;

/// Microseconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

#[derive(Clone, Default)]
struct Times(Arc<Mutex<Vec<u64>>>);

impl Times {
    fn note(&self, said: &Said) {
        let took = now().saturating_sub(said.sent);
        if said.n >= PER_SECOND {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(took);
        }
    }

    fn report(&self) {
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        times.sort_unstable();
        let at = |share: f64| {
            let place = (times.len() as f64 * share) as usize;
            times.get(place.min(times.len().saturating_sub(1))).map_or(0.0, |us| *us as f64 / 1000.0)
        };
        let result = serde_json::json!({"p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1.0)});
        say(&format!("result {result}"));
    }
}

/// By hand, acks coalesced for five milliseconds at most.
pub(crate) async fn raw(task: Task) -> anyhow::Result<()> {
    let times = Times::default();
    let noted = times.clone();
    let read = move |body: &[u8]| {
        if let Ok(said) = serde_json::from_slice::<Said>(body) {
            noted.note(&said);
        }
    };
    raw::take(task, raw::Acks::Multiple { flush: Some(FLUSH) }, read).await?;
    times.report();
    Ok(())
}

/// By Warren.
pub(crate) async fn warren(task: Task) -> anyhow::Result<()> {
    let times = Times::default();
    let noted = times.clone();
    let read = move |event: &warren_shared::Event| {
        if let Ok(said) = event.json::<Said>() {
            noted.note(&said);
        }
    };
    warren::take(task, read).await?;
    times.report();
    Ok(())
}
