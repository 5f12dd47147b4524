//! A service over HTTP that counts who calls it.
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// What it saw.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Calls of each event, by its id.
    pub calls: BTreeMap<String, u32>,
    /// The idempotency keys of each event.
    pub keys: BTreeMap<String, Vec<String>>,
    /// Calls that run now, and at most.
    pub running: usize,
    /// Calls that ran at once at most.
    pub most: usize,
}

/// A service: each call takes so long; the first one of every tenth event is answered with 503 and `Retry-After: 1`, the
/// others with an event of the type `test.served`, whose data is the event's id.
#[derive(Debug)]
pub struct Service {
    /// Its address.
    pub url: String,
    seen: Arc<Mutex<Seen>>,
    task: tokio::task::JoinHandle<()>,
}

impl Service {
    /// Starts it on a free port.
    ///
    /// # Errors
    /// There is none.
    pub async fn start(takes: Duration) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}/", listener.local_addr()?);
        let seen = Arc::<Mutex<Seen>>::default();
        let shared = seen.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, takes, shared.clone()));
            }
        });
        Ok(Self { url, seen, task })
    }

    /// What it saw.
    #[must_use]
    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(stream: TcpStream, takes: Duration, seen: Arc<Mutex<Seen>>) -> anyhow::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut headers = BTreeMap::new();
        let mut line = String::new();
        while stream.read_line(&mut line).await? > 0 && line != "\r\n" {
            if let Some((name, value)) = line.trim_end().split_once(": ") {
                headers.insert(name.to_lowercase(), value.to_owned());
            }
            line.clear();
        }
        let Some(id) = headers.get("ce-id").cloned() else { return Ok(()) };
        let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        stream.read_exact(&mut vec![0; length]).await?;
        let calls = {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.running += 1;
            seen.most = seen.most.max(seen.running);
            seen.keys.entry(id.clone()).or_default().push(headers.get("idempotency-key").cloned().unwrap_or_default());
            let calls = seen.calls.entry(id.clone()).or_default();
            *calls += 1;
            *calls
        };
        tokio::time::sleep(takes).await;
        seen.lock().unwrap_or_else(PoisonError::into_inner).running -= 1;
        let answer = if calls == 1 && id.ends_with('0') {
            "HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n".to_owned()
        } else {
            let body = format!("{{\"id\":\"{id}\"}}");
            let length = body.len();
            format!(
                "HTTP/1.1 200 OK\r\nce-type: test.served\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
            )
        };
        stream.write_all(answer.as_bytes()).await?;
    }
}
