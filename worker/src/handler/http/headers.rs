//! Headers that a route gives its requests, some of them secrets from files, which are read again.
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use std::sync::{Mutex, MutexGuard, PoisonError};
use warren_publisher::secrets::Complaints;
use warren_shared::secret::Secret;

/// What Warren itself sets, or HTTP needs for its own ends.
const OURS: [&str; 16] = [
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "idempotency-key",
    "keep-alive",
    "te",
    "traceparent",
    "tracestate",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "warren-attempt",
];

/// A header of a route.
#[derive(Clone, Debug)]
pub struct Header {
    name: HeaderName,
    value: Secret,
}

impl Header {
    /// A header that is sent with each request.
    ///
    /// # Errors
    /// What is wrong with it, to be read after its name; nothing of the value is part of that.
    pub fn new(name: &str, value: Secret) -> Result<Self, String> {
        let name =
            HeaderName::try_from(name).map_err(|_| "is no name of a header: it has letters, digits and - alone")?;
        if name.as_str().starts_with("ce-") || OURS.contains(&name.as_str()) {
            return Err("is set by Warren: leave it out".into());
        }
        match legal(&value) {
            Some(_) => Ok(Self { name, value }),
            None => {
                Err("has a value that no header can have: it is empty, or holds line ends or control characters".into())
            }
        }
    }
}

fn legal(value: &Secret) -> Option<HeaderValue> {
    let mut header = HeaderValue::from_str(value.reveal().trim()).ok().filter(|header| !header.is_empty())?;
    header.set_sensitive(true);
    Some(header)
}

/// The headers of a route at work.
pub(super) struct Headers(Mutex<State>);

struct State {
    all: Vec<Header>,
    /// The last good values.
    good: HeaderMap,
    complaints: Complaints,
}

impl Headers {
    pub(super) fn new(all: Vec<Header>) -> Self {
        let good = all.iter().filter_map(|header| Some((header.name.clone(), legal(&header.value)?))).collect();
        Self(Mutex::new(State { all, good, complaints: Complaints::default() }))
    }

    /// Adds them to a request's, with what is in their files now.
    pub(super) fn add_to(&self, head: &mut HeaderMap) {
        head.extend(self.renewed().good.clone());
    }

    /// Whether one of them is another now than a request had.
    pub(super) fn are_newer_than(&self, head: &HeaderMap) -> bool {
        self.renewed().good.iter().any(|(name, value)| head.get(name) != Some(value))
    }

    fn renewed(&self) -> MutexGuard<'_, State> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.renew();
        state
    }
}

impl State {
    fn renew(&mut self) {
        for Header { name, value } in &mut self.all {
            let Some(file) = value.file().cloned() else { continue };
            self.complaints.renew(value);
            match legal(value) {
                Some(header) => _ = self.good.insert(name.clone(), header),
                None => self.complaints.say(&file.variable, "it holds what no header can have"),
            }
        }
    }
}
