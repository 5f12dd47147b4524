//! An HTTP server for tests that says exactly what it is told to, right or wrong.
use futures_util::future::BoxFuture;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A request as it came over the wire.
#[derive(Clone, Debug)]
pub(in crate::handler) struct Request {
    /// Method, target, version.
    pub(in crate::handler) line: String,
    /// Names in lower case.
    head: Vec<(String, String)>,
    pub(in crate::handler) body: Vec<u8>,
}

impl Request {
    /// A header that stands there once.
    pub(in crate::handler) fn header(&self, name: &str) -> Option<&str> {
        let mut all = self.head.iter().filter(|(found, _)| found == name);
        let (first, second) = (all.next(), all.next());
        assert!(second.is_none(), "'{name}' stands twice");
        first.map(|(_, value)| value.as_str())
    }

    pub(in crate::handler) fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.head.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

/// What the server does with a request: these bytes, or none and an end of the connection.
pub(in crate::handler) type Said = Option<Vec<u8>>;

/// A response with a body of known length.
pub(in crate::handler) fn response(status: u16, head: &[(&str, &str)], body: &[u8]) -> Said {
    let head: String = head.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    // A 204 has no body, and must not announce one.
    let length = if status == 204 { String::new() } else { format!("content-length: {}\r\n", body.len()) };
    Some([format!("HTTP/1.1 {status} As Told\r\n{head}{length}\r\n").as_bytes(), body].concat())
}

/// The server. It ends when it is dropped.
pub(in crate::handler) struct Service {
    pub(in crate::handler) address: SocketAddr,
    /// Connections that were opened, requests that came, clients that left before their answer.
    pub(in crate::handler) seen: Arc<Seen>,
    task: JoinHandle<()>,
}

#[derive(Default)]
pub(in crate::handler) struct Seen {
    pub(in crate::handler) connections: AtomicUsize,
    pub(in crate::handler) requests: AtomicUsize,
    pub(in crate::handler) left: AtomicUsize,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Service {
    /// Serves what the function says. To be called inside a runtime.
    pub(in crate::handler) async fn start<F>(says: F) -> Self
    where
        F: Fn(Request) -> BoxFuture<'static, Said> + Send + Sync + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let (says, seen) = (Arc::new(says), Arc::<Seen>::default());
        let counted = seen.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                counted.connections.fetch_add(1, SeqCst);
                connections.spawn(serve(stream, says.clone(), counted.clone()));
            }
        });
        Self { address, seen, task }
    }

    /// The same answer to whatever comes.
    pub(in crate::handler) async fn saying(said: Said) -> Self {
        Self::start(move |_| Box::pin(std::future::ready(said.clone()))).await
    }
}

async fn serve<F>(stream: TcpStream, says: Arc<F>, seen: Arc<Seen>)
where
    F: Fn(Request) -> BoxFuture<'static, Said> + Send + Sync + 'static,
{
    let mut stream = BufReader::new(stream);
    while let Some(request) = read(&mut stream).await {
        seen.requests.fetch_add(1, SeqCst);
        // Nothing is sent ahead, so whatever can be read here is the end.
        let said = tokio::select! {
            said = says(request) => said,
            _ = stream.fill_buf() => {
                seen.left.fetch_add(1, SeqCst);
                None
            }
        };
        match said {
            Some(bytes) if stream.write_all(&bytes).await.is_ok() => {}
            _ => return,
        }
    }
}

async fn read(stream: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut lines = Vec::new();
    loop {
        let mut line = Vec::new();
        stream.read_until(b'\n', &mut line).await.ok().filter(|n| *n > 0)?;
        match String::from_utf8(line).expect("what is sent is ASCII").trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let mut lines = lines.into_iter();
    let line = lines.next()?;
    let split = |line: String| line.split_once(':').map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned()));
    let head = lines.map(|line| split(line).expect("a header has a colon")).collect();
    let mut request = Request { line, head, body: Vec::new() };
    let length = request.header("content-length").map_or(0, |length| length.parse().expect("a number"));
    request.body = vec![0; length];
    stream.read_exact(&mut request.body).await.ok()?;
    Some(request)
}
