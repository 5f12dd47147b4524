//! What the broker sends, made harmless before the AMQP library reads it.
//!
//! The library ends the connection over a short string that is not UTF-8, and reads nested headers by recursion until
//! its stack is gone. The broker delivers such a message again, so one of them would stop a pool for ever. Here both are
//! changed in place, length and all: a byte that is not UTF-8 becomes U+001A (the "substitute" character, which no
//! attribute may hold, so the message is dead-lettered as unreadable), and a table or list nested too deep becomes a
//! value of bytes. The payload is never touched.
//!
//! TLS is done here too, for the library's own would trust the system's issuers beside the one that is asked for.
use crate::budget::Budget;
use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_io::{AsyncRead, AsyncWrite};
use futures_rustls::TlsConnector;
use futures_rustls::client::TlsStream;
use futures_util::Stream;
use futures_util::future::Either;
use lapin::tcp::AMQPUriTcpExt;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{AsyncTcpStream, Connection, ConnectionProperties};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

/// Connects through a sieve, and in TLS where that is asked for.
///
/// # Errors
/// What the library says.
pub(crate) async fn connect(
    uri: AMQPUri,
    properties: ConnectionProperties,
    tls: Option<ClientConfig>,
    budget: Option<Arc<Budget>>,
) -> lapin::Result<Connection> {
    let tokio = Tokio::current();
    let runtime = Runtime::new(RuntimeParts::new(tokio.clone(), Sieving(tokio.clone())));
    let tls = tls.map(|config| TlsConnector::from(Arc::new(config)));
    let connect = async move |uri: AMQPUri, _: Runtime<RuntimeParts<Tokio, Sieving>>| {
        // Whatever the scheme, the library makes a connection and no TLS.
        let bare = AMQPUri { scheme: AMQPScheme::AMQP, ..uri };
        let plain = AMQPUriTcpExt::connect_async(&bare, &Runtime::new(tokio.clone())).await?;
        let AsyncTcpStream::Plain(plain) = plain else {
            return Err(io::Error::other("the library's own TLS is not in use").into());
        };
        let stream = match (uri.scheme, &tls) {
            (AMQPScheme::AMQP, None) => Either::Left(plain),
            (AMQPScheme::AMQPS, Some(tls)) => {
                let name = ServerName::try_from(bare.authority.host);
                let name = name.map_err(|_| io::Error::other("the host is no name that a certificate can have"))?;
                Either::Right(tls.connect(name, plain).await?)
            }
            _ => return Err(io::Error::other("TLS where the URL asks for it, and nowhere else").into()),
        };
        let gate = budget.clone().map(|budget| Gate { budget, tokio: tokio.clone(), beat: None, pending: 0 });
        Ok(AsyncTcpStream::Plain(Sieve { gate, ..Sieve::new(stream) }))
    };
    Connection::connector(uri, runtime, connect, properties).await
}

type Tcp = <Tokio as Reactor>::TcpStream;
/// In plain, or in TLS.
type Inner = Either<Tcp, TlsStream<Tcp>>;

/// The reactor of tokio, with another type of stream.
#[derive(Clone, Debug)]
struct Sieving(Tokio);

impl Reactor for Sieving {
    type TcpStream = Sieve<Inner>;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move { Ok(Sieve::new(Either::Left(connecting.await?))) }
    }
}

/// Bytes that are read at once.
const READ: usize = 64 << 10;
/// Tables and lists deeper than this become bytes: beyond every limit that can be set, harmless to any stack.
const DEPTH: usize = 128;
/// A control frame beyond this is passed on as it is: the library refuses what exceeds the negotiated size.
const FRAME: usize = 16 << 20;

/// A heartbeat of the broker's.
const HEARTBEAT: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 0xCE];
/// How often the library hears one while nothing is read: it would take the silence for the end of the connection.
const BEAT: Duration = Duration::from_secs(1);

/// Lets nothing through while a budget is used up. The broker's own bytes wait in the connection meanwhile, its heartbeats
/// with them: the library is given others, and gives the broker its own.
struct Gate {
    budget: Arc<Budget>,
    tokio: Tokio,
    /// Until the next heartbeat.
    beat: Option<Pin<Box<<Tokio as Reactor>::Sleep>>>,
    /// Bytes of a heartbeat that are still to be given.
    pending: usize,
}

impl Gate {
    /// Bytes to give instead of the broker's; none where those may come.
    fn poll(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<Option<usize>> {
        while self.pending == 0 {
            if self.budget.has_room(cx.waker()) {
                self.beat = None;
                return Poll::Ready(None);
            }
            let beat = self.beat.get_or_insert_with(|| Box::pin(self.tokio.sleep(BEAT)));
            ready!(beat.as_mut().poll(cx));
            (self.beat, self.pending) = (None, HEARTBEAT.len());
        }
        let rest = &HEARTBEAT[HEARTBEAT.len() - self.pending..];
        let n = into.len().min(rest.len());
        into[..n].copy_from_slice(&rest[..n]);
        self.pending -= n;
        Poll::Ready(Some(n))
    }
}

/// A stream whose incoming frames are mended.
struct Sieve<S> {
    inner: S,
    /// Room for what is read; only ever zeroed when it grows, as most reads are much shorter.
    bytes: Vec<u8>,
    /// Up to here it was read.
    end: usize,
    /// Up to here it was handed on.
    taken: usize,
    /// Up to here it is mended.
    clean: usize,
    /// Bytes of a payload that are still to come.
    passing: usize,
    /// Bounds what is held of what was read.
    gate: Option<Gate>,
}

impl<S> Sieve<S> {
    fn new(inner: S) -> Self {
        Self { inner, bytes: Vec::new(), end: 0, taken: 0, clean: 0, passing: 0, gate: None }
    }

    /// Mends what is there as far as it is whole.
    fn sift(&mut self) {
        loop {
            let rest = &mut self.bytes[self.clean..self.end];
            if self.passing > 0 {
                let passed = self.passing.min(rest.len());
                self.clean += passed;
                self.passing -= passed;
                if passed == 0 {
                    return;
                }
                continue;
            }
            let &mut [kind, _, _, a, b, c, d, ..] = rest else { return };
            let size = u32::from_be_bytes([a, b, c, d]) as usize;
            // Head and end mark beside the content.
            let whole = size.saturating_add(8);
            let mend = match kind {
                1 => method,
                2 => header,
                _ => |_: &mut [u8]| (),
            };
            if !matches!(kind, 1 | 2) || size > FRAME {
                self.passing = whole;
            } else if rest.len() < whole {
                return;
            } else {
                mend(&mut rest[7..7 + size]);
                self.clean += whole;
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Sieve<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        while this.taken == this.clean {
            // Only between two frames.
            if this.passing == 0
                && let Some(gate) = &mut this.gate
                && let Some(n) = ready!(gate.poll(cx, into))
            {
                return Poll::Ready(Ok(n));
            }
            this.bytes.copy_within(this.taken..this.end, 0);
            this.end -= this.taken;
            (this.taken, this.clean) = (0, 0);
            // A frame that is not whole yet takes more room, as long as it is here.
            if this.end == 0 {
                this.bytes.resize(READ, 0);
                this.bytes.shrink_to(4 * READ);
            } else if this.bytes.len() < this.end + READ {
                this.bytes.resize(this.end + READ, 0);
            }
            match ready!(Pin::new(&mut this.inner).poll_read(cx, &mut this.bytes[this.end..]))? {
                0 => return Poll::Ready(Ok(0)),
                read => this.end += read,
            }
            this.sift();
        }
        let n = into.len().min(this.clean - this.taken);
        into[..n].copy_from_slice(&this.bytes[this.taken..this.taken + n]);
        this.taken += n;
        Poll::Ready(Ok(n))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Sieve<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

/// The content of a frame, walked once. Nothing is mended after what cannot be read: the library says what it is.
struct Walk<'a> {
    rest: &'a mut [u8],
}

/// `basic.deliver` and `basic.return` carry names that a publisher chose.
fn method(content: &mut [u8]) {
    let kind = content.get(..4).map(<[u8]>::to_vec);
    let mut walk = Walk { rest: content };
    let _ = match kind.as_deref() {
        Some([0, 60, 0, 60]) => walk.deliver(),
        Some([0, 60, 0, 50]) => walk.returned(),
        _ => None,
    };
}

/// Properties, in the order of their flags.
fn header(content: &mut [u8]) {
    let _ = Walk { rest: content }.properties();
}

impl<'a> Walk<'a> {
    fn deliver(&mut self) -> Option<()> {
        self.take(4)?;
        self.short()?;
        self.take(9)?;
        self.short()?;
        self.short()
    }

    fn returned(&mut self) -> Option<()> {
        self.take(6)?;
        self.short()?;
        self.short()?;
        self.short()
    }

    fn properties(&mut self) -> Option<()> {
        self.take(12)?;
        let flags = self.take(2)?;
        let flags = u16::from_be_bytes([flags[0], flags[1]]);
        for bit in (0..16).rev().filter(|bit| flags & (1 << bit) != 0) {
            match bit {
                13 => {
                    let table = self.long()?;
                    fields(table, 1);
                }
                11 | 12 => {
                    self.take(1)?;
                }
                6 => {
                    self.take(8)?;
                }
                2..=15 => self.short()?,
                // More flags would follow: no property has them.
                _ => return None,
            }
        }
        Some(())
    }

    fn take(&mut self, n: usize) -> Option<&'a mut [u8]> {
        if self.rest.len() < n {
            return None;
        }
        let (taken, rest) = std::mem::take(&mut self.rest).split_at_mut(n);
        self.rest = rest;
        Some(taken)
    }

    fn long(&mut self) -> Option<&'a mut [u8]> {
        let size = self.take(4)?;
        let size = u32::from_be_bytes([size[0], size[1], size[2], size[3]]);
        self.take(size as usize)
    }

    fn short(&mut self) -> Option<()> {
        let size = self.take(1)?[0];
        substitute(self.take(size.into())?);
        Some(())
    }

    fn value(&mut self, depth: usize) -> Option<()> {
        let kind = self.take(1)?;
        let size = match kind[0] {
            b'V' => 0,
            b't' | b'b' | b'B' => 1,
            b's' | b'u' | b'U' => 2,
            b'i' | b'I' | b'f' => 4,
            b'D' => 5,
            b'l' | b'L' | b'd' | b'T' => 8,
            b'S' | b'x' => return self.long().map(|_| ()),
            b'A' | b'F' if depth > DEPTH => {
                kind[0] = b'x';
                return self.long().map(|_| ());
            }
            b'A' => {
                let mut items = Walk { rest: self.long()? };
                while !items.rest.is_empty() {
                    items.value(depth + 1)?;
                }
                return Some(());
            }
            b'F' => {
                fields(self.long()?, depth + 1);
                return Some(());
            }
            _ => return None,
        };
        self.take(size).map(|_| ())
    }
}

fn fields(table: &mut [u8], depth: usize) {
    let mut walk = Walk { rest: table };
    while !walk.rest.is_empty() {
        if walk.short().and_then(|()| walk.value(depth)).is_none() {
            return;
        }
    }
}

/// Makes UTF-8 of it without changing its length.
fn substitute(mut text: &mut [u8]) {
    while let Err(error) = std::str::from_utf8(text) {
        let from = error.valid_up_to();
        let to = error.error_len().map_or(text.len(), |n| from + n);
        text[from..to].fill(0x1a);
        text = &mut text[to..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, content: &[u8]) -> Vec<u8> {
        let size = u32::try_from(content.len()).expect("small").to_be_bytes();
        [&[kind, 0, 1][..], &size, content, &[0xce]].concat()
    }

    /// A content header with these flags and properties.
    fn head(flags: u16, properties: &[u8]) -> Vec<u8> {
        frame(2, &[&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2][..], &flags.to_be_bytes(), properties].concat())
    }

    fn sifted(stream: &[u8], chunk: usize) -> Vec<u8> {
        let mut sieve = Sieve::new(());
        for part in stream.chunks(chunk) {
            sieve.bytes.extend_from_slice(part);
            sieve.end += part.len();
            sieve.sift();
        }
        assert_eq!(sieve.clean, stream.len());
        sieve.bytes
    }

    /// A stream that brings at most so much at once.
    struct Drip<'a>(&'a [u8], usize);

    impl AsyncRead for Drip<'_> {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
            let n = self.1.min(self.0.len()).min(into.len());
            into[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Poll::Ready(Ok(n))
        }
    }

    #[test]
    fn what_is_whole_comes_through_however_it_is_cut_and_room_is_given_back() {
        let huge = frame(1, &vec![7; 20 * READ]);
        let stream = [frame(8, b""), huge, frame(3, &[9; 3 * READ]), frame(1, b"method"), frame(8, b"")].concat();
        for (chunk, taken) in [(1000, 17), (READ, 5), (3 * READ, READ)] {
            let mut sieve = Sieve::new(Drip(&stream, chunk));
            let (mut out, mut into) = (Vec::new(), vec![0; taken]);
            while let Poll::Ready(Ok(n @ 1..)) =
                Pin::new(&mut sieve).poll_read(&mut Context::from_waker(std::task::Waker::noop()), &mut into)
            {
                out.extend_from_slice(&into[..n]);
            }
            assert!(out == stream, "cut by {chunk}, taken by {taken}");
            assert!(sieve.bytes.capacity() <= 4 * READ, "{} bytes are kept", sieve.bytes.capacity());
        }
    }

    #[test]
    fn short_strings_become_utf8_and_everything_else_stays() {
        let deliver = [&[0, 60, 0, 60, 1, b'c', 0, 0, 0, 0, 0, 0, 0, 7, 0][..], b"\x01x", b"\x04caf\xe9"].concat();
        let properties =
            [&b"\x05a/\xffb\xc3"[..], b"\0\0\0\x0b\x03h\xe9d", b"S\0\0\0\x02\xff\xfe", b"\x02\x04id\xe9\xe8"];
        let head = head(1 << 15 | 1 << 13 | 1 << 12 | 1 << 7, &properties.concat());
        let body = frame(3, b"\xff\xfe\xce\x01");
        let stream = [frame(1, &deliver), head, body.clone(), frame(8, b"")].concat();
        for chunk in [1, 3, 7, 1000] {
            let out = sifted(&stream, chunk);
            assert_eq!(out.len(), stream.len());
            let text = String::from_utf8_lossy(&out);
            assert!(text.contains("caf\u{1a}") && text.contains("a/\u{1a}b\u{1a}"), "{text:?}");
            assert!(text.contains("h\u{1a}d") && text.contains("id\u{1a}\u{1a}"), "{text:?}");
            // A header's value and the payload may be anything.
            assert!(out.windows(3).any(|bytes| bytes == b"\x02\xff\xfe"));
            assert!(out.windows(body.len()).any(|bytes| bytes == body));
        }
    }

    #[test]
    fn nesting_ends_at_the_limit_and_costs_no_stack() {
        let mut value = Vec::new();
        for inner in (0..26_000_u32).rev() {
            value.push(b'A');
            value.extend((inner * 5).to_be_bytes());
        }
        let table = [&b"\x01h"[..], &value].concat();
        let size = u32::try_from(table.len()).expect("small").to_be_bytes();
        let stream = head(1 << 13, &[&size[..], &table].concat());
        let out = sifted(&stream, 4096);
        let changed: Vec<(u8, u8)> = stream.iter().copied().zip(out).filter(|(a, b)| a != b).collect();
        assert_eq!(changed, [(b'A', b'x')]);
    }

    #[test]
    fn what_is_cut_short_is_passed_on_as_it_is() {
        for content in [&b""[..], b"\0\x3c", b"\0\x3c\0\x3c\xff", &[0, 60, 0, 60, 1, b'c', 0]] {
            for kind in [1, 2] {
                let stream = frame(kind, content);
                assert_eq!(sifted(&stream, 1), stream);
            }
        }
        let stream = head(1 << 13 | 1 << 7, b"\0\0\0\x04\x01hZ\xff\x02\xff\xff");
        let out = sifted(&stream, 5);
        assert!(out.ends_with(b"\x01hZ\xff\x02\x1a\x1a\xce"), "an unknown type ends the table, not the frame: {out:?}");
    }
}
