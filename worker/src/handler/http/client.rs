//! The HTTP client: one pool of connections for each service, over HTTP/1.1.
//!
//! The only file that knows hyper's client. It adds to it what nobody but the connection itself can tell: whether a connection broke
//! on which earlier requests were answered, and what a service said before it stopped reading.
use crate::handler::local;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::HeaderMap;
use hyper::http::Extensions;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::{Request, Response, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::client::legacy::{Client as Pool, Error};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::TcpStream;

/// Idle connections are closed first on this side: common servers do it after 5 s, and a request that crosses that on its
/// way has to be called again.
const IDLE: Duration = Duration::from_secs(4);
/// A connection that carries nothing is asked so often whether its peer is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why no answer came.
#[derive(Debug)]
pub(super) enum Broken {
    /// This process or its machine has no means to call: no event is to blame.
    Here(io::Error),
    /// No connection came about: the service has nothing of it.
    Away(String),
    /// The way there or back, or the service.
    There(String),
}

/// A client of one service. It is called directly: proxies that the environment names are not used.
#[derive(Clone)]
pub(super) struct Client {
    pooled: Pool<Connector, Full<Bytes>>,
    /// Opens a connection for each request.
    fresh: Pool<Connector, Full<Bytes>>,
    uri: Uri,
}

impl Client {
    pub(super) fn new(uri: Uri, tls: rustls::ClientConfig) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(KEEP_ALIVE));
        let https = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
        let connector = Connector(https.wrap_connector(tcp));
        let mut pool = Pool::builder(TokioExecutor::new());
        pool.timer(TokioTimer::new()).pool_timer(TokioTimer::new()).pool_idle_timeout(IDLE);
        let pooled = pool.build(connector.clone());
        Self { pooled, fresh: pool.pool_max_idle_per_host(0).build(connector), uri }
    }

    /// Posts a body and returns the response's head. Where a connection breaks on which earlier requests were answered, before
    /// anything of this answer came, the service has most likely closed it for being idle: it is called again at once, on a new
    /// one. What comes of that counts, so an event that brings the service down does it twice an attempt, not once a connection.
    pub(super) async fn post(&self, head: &HeaderMap, body: &Bytes) -> Result<Response<Incoming>, Broken> {
        let request = || {
            let mut request = Request::post(self.uri.clone()).body(Full::new(body.clone())).unwrap_or_default();
            *request.headers_mut() = head.clone();
            request
        };
        // What went out on it may have arrived.
        let mut again = false;
        let asked = match self.pooled.request(request()).await {
            Err(error) if Uses::of(&error).is_some_and(|uses| uses.broke_between(&error)) => {
                again = true;
                self.fresh.request(request()).await
            }
            asked => asked,
        };
        match asked {
            Ok(response) => Ok(response),
            Err(error) => Err(self.broken(&error, again).await),
        }
    }

    async fn broken(&self, error: &Error, again: bool) -> Broken {
        let (host, port) = (self.uri.host().unwrap_or_default(), self.uri.port_u16());
        let port = port.unwrap_or(if self.uri.scheme_str() == Some("https") { 443 } else { 80 });
        let trouble = match local::trouble(error) {
            None if error.is_connect() => local::trouble_to_connect(error, (host.trim_matches(['[', ']']), port)).await,
            trouble => trouble,
        };
        if let Some(trouble) = trouble {
            return Broken::Here(trouble);
        }
        match error.is_connect() {
            true if again => Broken::There(why(error, "cannot connect")),
            true => Broken::Away(why(error, "cannot connect")),
            false => Broken::There(why(error, BROKE)),
        }
    }
}

const BROKE: &str = "the connection broke";

/// Reads a body; none where it is larger than the limit. What a service announces reserves no memory.
pub(super) async fn body(mut incoming: Incoming, limit: usize) -> Result<Option<Vec<u8>>, Broken> {
    let mut body = Vec::new();
    while let Some(frame) = incoming.frame().await {
        let frame = frame.map_err(|error| Broken::There(why(&error, BROKE)))?;
        let Some(chunk) = frame.data_ref() else { continue };
        if body.len() + chunk.len() > limit {
            return Ok(None);
        }
        body.extend_from_slice(chunk);
    }
    Ok(Some(body))
}

/// What happened, and its innermost cause.
fn why(error: &(dyn std::error::Error + 'static), what: &str) -> String {
    let cause = local::causes(error).last().map(ToString::to_string).unwrap_or_default();
    format!("{what}: {}", crate::handler::line::plain(&cause, 255))
}

/// Opens connections that say how they were used.
#[derive(Clone)]
struct Connector(HttpsConnector<HttpConnector>);

impl tower_service::Service<Uri> for Connector {
    type Response = Line;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Line, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.0.call(uri);
        Box::pin(async move { Ok(Line { wire: connecting.await?, uses: Uses::default(), is_deaf: false }) })
    }
}

/// How a connection was used.
#[derive(Clone, Default)]
struct Uses(Arc<Used>);

#[derive(Default)]
struct Used {
    /// An earlier request was answered on it.
    again: AtomicBool,
    /// Reads that returned, be it with the end of the stream, since something was written last.
    reads: AtomicU32,
}

impl Uses {
    fn of(error: &Error) -> Option<Self> {
        let mut extras = Extensions::new();
        error.connect_info()?.get_extras(&mut extras);
        extras.remove()
    }

    /// Whether it broke on an earlier answer's heels: the end of the stream is a read as well, a reset is none.
    fn broke_between(&self, error: &Error) -> bool {
        let ended = local::causes(error).any(|cause| {
            cause
                .downcast_ref::<hyper::Error>()
                .is_some_and(|error| error.is_incomplete_message() || error.is_canceled())
        });
        self.0.again.load(Relaxed) && self.0.reads.load(Relaxed) <= u32::from(ended)
    }
}

/// A connection.
struct Line {
    wire: MaybeHttpsStream<TokioIo<TcpStream>>,
    uses: Uses,
    /// The service takes no more. It may have answered before that (413), so what is written goes nowhere and reading goes on.
    is_deaf: bool,
}

impl Line {
    fn write(
        &mut self,
        len: usize,
        write: impl FnOnce(Pin<&mut MaybeHttpsStream<TokioIo<TcpStream>>>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if self.uses.0.reads.swap(0, Relaxed) > 0 {
            self.uses.0.again.store(true, Relaxed);
        }
        if !self.is_deaf {
            match ready!(write(Pin::new(&mut self.wire))) {
                Err(error) if is_gone(&error) => self.is_deaf = true,
                written => return Poll::Ready(written),
            }
        }
        Poll::Ready(Ok(len))
    }
}

/// Whether nobody takes what is written any more.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset)
}

impl Read for Line {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.wire).poll_read(cx, buf))?;
        self.uses.0.reads.fetch_add(1, Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl Write for Line {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.write(buf.len(), |wire| wire.poll_write(cx, buf))
    }

    fn is_write_vectored(&self) -> bool {
        self.wire.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(bufs.iter().map(|buf| buf.len()).sum(), |wire| wire.poll_write_vectored(cx, bufs))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_deaf {
            return Poll::Ready(Ok(()));
        }
        match ready!(Pin::new(&mut self.wire).poll_flush(cx)) {
            Err(error) if is_gone(&error) => self.is_deaf = true,
            flushed => return Poll::Ready(flushed),
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_shutdown(cx)
    }
}

impl Connection for Line {
    fn connected(&self) -> Connected {
        self.wire.connected().extra(self.uses.clone())
    }
}
