//! A proxy in front of the broker that reads AMQP frames: it counts what is unconfirmed, and may keep the broker's
//! answers back.
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What happens to the broker's confirms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// They pass.
    Pass,
    /// They come as few and as large as they may: many messages at once, after all that came before.
    Merged,
    /// They, and all that comes after them, wait.
    Wait,
    /// They are lost, and nothing else is: a confirm that got stuck in the broker.
    Lost,
    /// All pass but the one of this message of a channel, counted from 1: its queue is without a leader.
    Without(u64),
    /// They pass, but no channel is ever opened: that answer got stuck.
    Unopened,
    /// They pass, but connections that begin now never get a delivery: the broker has forgotten their consumers.
    Undelivered,
}

/// What went through, over all connections.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Messages published.
    pub published: u64,
    /// The most that were unconfirmed at one time on one connection.
    pub most: usize,
    /// Connections opened.
    pub connections: u64,
}

/// The proxy; it ends with the test's runtime.
#[derive(Debug)]
pub struct Proxy {
    /// The broker's URL, by way of the proxy.
    pub url: String,
    seen: Arc<Mutex<Seen>>,
    answers: watch::Sender<Answers>,
    cuts: watch::Sender<u64>,
    shut: Arc<AtomicBool>,
}

const PUBLISH: [u16; 2] = [60, 40];
const OPENED: [u16; 2] = [20, 11];
const DELIVER: [u16; 2] = [60, 60];
const ACK: [u16; 2] = [60, 80];
const NACK: [u16; 2] = [60, 120];
const CONFIRM_SELECT: [u16; 2] = [85, 10];
const HEADER: usize = 7;

impl Proxy {
    /// A proxy for a broker's URL of the form `amqp://user:password@host:port/vhost`.
    ///
    /// # Errors
    /// The URL has another form, or no port is free.
    pub async fn before(url: &str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let from = url.find('@').map_or(0, |at| at + 1);
        let to = url[from..].find('/').map_or(url.len(), |at| from + at);
        let broker = url[from..to].to_owned();
        let url = format!("{}{}{}", &url[..from], listener.local_addr()?, &url[to..]);
        let (answers, gate) = watch::channel(Answers::Pass);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (cuts, cut) = watch::channel(0);
        let shut = Arc::new(AtomicBool::new(false));
        let proxy = Self { url, seen: seen.clone(), answers, cuts, shut: shut.clone() };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if shut.load(Ordering::Relaxed) {
                    continue;
                }
                let Ok(server) = TcpStream::connect(&broker).await else { continue };
                // As a direct connection would be: no frame waits for the next one.
                let _ = (client.set_nodelay(true), server.set_nodelay(true));
                lock(&seen).connections += 1;
                let open = Arc::new(Mutex::new(Open::default()));
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                let (there, back) = (
                    forward(from_client, to_server, open.clone(), seen.clone()),
                    back(from_server, to_client, open, gate.clone()),
                );
                let mut cut = cut.clone();
                cut.mark_unchanged();
                tokio::spawn(async move {
                    tokio::select! {
                        _ = there => {}
                        _ = back => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Ok(proxy)
    }

    /// What went through.
    #[must_use]
    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// Cuts all connections, wherever in a frame they are.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Cuts all connections, and lets none through any more.
    pub fn shut(&self) {
        self.shut.store(true, Ordering::Relaxed);
        self.cut();
    }

    /// From now on the confirms go this way.
    pub fn answers(&self, answers: Answers) {
        self.answers.send_replace(answers);
    }
}

/// The unconfirmed tags of a connection's one publishing channel.
#[derive(Default)]
struct Open {
    next: u64,
    tags: BTreeSet<u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A whole frame, and the method that it holds.
async fn frame(from: &mut OwnedReadHalf) -> std::io::Result<(Vec<u8>, Option<[u16; 2]>)> {
    let mut bytes = vec![0; HEADER];
    from.read_exact(&mut bytes).await?;
    let size = u32::from_be_bytes([bytes[3], bytes[4], bytes[5], bytes[6]]) as usize;
    bytes.resize(HEADER + size + 1, 0);
    from.read_exact(&mut bytes[HEADER..]).await?;
    let number = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let method = (bytes[0] == 1).then(|| [number(HEADER), number(HEADER + 2)]);
    Ok((bytes, method))
}

async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    open: Arc<Mutex<Open>>,
    seen: Arc<Mutex<Seen>>,
) -> std::io::Result<()> {
    let mut greeting = [0; 8];
    from.read_exact(&mut greeting).await?;
    to.write_all(&greeting).await?;
    loop {
        let (bytes, method) = frame(&mut from).await?;
        match method {
            Some(CONFIRM_SELECT) => *lock(&open) = Open::default(),
            Some(PUBLISH) => {
                let mut open = lock(&open);
                open.next += 1;
                let tag = open.next;
                open.tags.insert(tag);
                let mut seen = lock(&seen);
                seen.published += 1;
                seen.most = seen.most.max(open.tags.len());
            }
            _ => {}
        }
        to.write_all(&bytes).await?;
    }
}

async fn back(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    open: Arc<Mutex<Open>>,
    mut gate: watch::Receiver<Answers>,
) -> std::io::Result<()> {
    let (feed, mut frames) = tokio::sync::mpsc::channel(1000);
    let reading = async move {
        loop {
            let frame = frame(&mut from).await?;
            if feed.send(frame).await.is_err() {
                return Ok(());
            }
        }
    };
    let forgotten = *gate.borrow() == Answers::Undelivered;
    let writing = async move {
        let mut merged = Merged::default();
        // The channels whose content belongs to a delivery.
        let mut delivering = BTreeSet::new();
        loop {
            let next = tokio::select! {
                biased;
                next = frames.recv() => next,
                () = tokio::time::sleep(QUIET), if merged.waits() => {
                    to.write_all(&merged.take(&open)).await?;
                    continue;
                }
            };
            let Some((bytes, method)) = next else { return Ok(()) };
            let channel = [bytes[1], bytes[2]];
            match method {
                Some(DELIVER) => drop(delivering.insert(channel)),
                Some(_) => drop(delivering.remove(&channel)),
                None => {}
            }
            // Heartbeats are of channel 0.
            if forgotten && delivering.contains(&channel) {
                continue;
            }
            if method == Some(OPENED) && *gate.borrow() == Answers::Unopened {
                continue;
            }
            if !matches!(method, Some(ACK | NACK)) {
                to.write_all(&bytes).await?;
                continue;
            }
            let gone = |_| std::io::Error::other("the test ended");
            let answers = *gate.wait_for(|answers| *answers != Answers::Wait).await.map_err(gone)?;
            let at = HEADER + 4;
            let tag = bytes[at..at + 8].iter().fold(0, |tag, byte| tag << 8 | u64::from(*byte));
            let multiple = bytes[at + 8] & 1 == 1;
            match answers {
                Answers::Lost => {}
                Answers::Without(lost) if method == Some(ACK) => {
                    merged.note(&bytes, tag, multiple, &open);
                    merged.tags.remove(&lost);
                    to.write_all(&merged.take(&open)).await?;
                }
                Answers::Merged if method == Some(ACK) => {
                    merged.note(&bytes, tag, multiple, &open);
                    if merged.tags.len() >= MERGED {
                        to.write_all(&merged.take(&open)).await?;
                    }
                }
                _ => {
                    // Before the client can know of it: the count is never too high.
                    settle(&open, tag, multiple);
                    to.write_all(&bytes).await?;
                }
            }
        }
    };
    tokio::select! {
        ended = reading => ended,
        ended = writing => ended,
    }
}

fn settle(open: &Mutex<Open>, tag: u64, multiple: bool) {
    let mut open = lock(open);
    if multiple {
        open.tags = open.tags.split_off(&(tag + 1));
    } else {
        open.tags.remove(&tag);
    }
}

/// How long the broker is silent before what was merged goes on.
const QUIET: std::time::Duration = std::time::Duration::from_millis(2);
/// So many acks are merged at most.
const MERGED: usize = 500;

/// Acks that wait to be told as one.
#[derive(Default)]
struct Merged {
    frame: Vec<u8>,
    tags: BTreeSet<u64>,
}

impl Merged {
    fn waits(&self) -> bool {
        !self.tags.is_empty()
    }

    fn note(&mut self, frame: &[u8], tag: u64, multiple: bool, open: &Mutex<Open>) {
        self.frame = frame.to_vec();
        if multiple {
            self.tags.extend(lock(open).tags.range(..=tag));
        }
        self.tags.insert(tag);
    }

    /// One ack for all from the oldest on that are acked without a gap, and one for each of the rest.
    fn take(&mut self, open: &Mutex<Open>) -> Vec<u8> {
        let tags = std::mem::take(&mut self.tags);
        let unacked = lock(open).tags.iter().find(|tag| !tags.contains(tag)).copied().unwrap_or(u64::MAX);
        let mut bytes = Vec::new();
        let mut answer = |tag: u64, multiple: bool| {
            settle(open, tag, multiple);
            let at = HEADER + 4;
            let mut frame = self.frame.clone();
            frame[at..at + 8].copy_from_slice(&tag.to_be_bytes());
            frame[at + 8] = u8::from(multiple);
            bytes.extend(frame);
        };
        if let Some(last) = tags.range(..unacked).next_back() {
            answer(*last, true);
        }
        tags.range(unacked..).for_each(|tag| answer(*tag, false));
        bytes
    }
}
