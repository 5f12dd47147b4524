//! The connection: reached with back-off, watched for blocks, its refusals translated into causes with cures.
use crate::sieve;
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties, Error, ErrorKind};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use warren_shared::env::Secret;

/// Why there is no connection. The message names the cure.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BrokerError {
    /// `AMQP_URL` is no URL.
    #[error("AMQP_URL is not a URL of the form amqp://user:password@host:port/vhost: {0}")]
    Url(String),
    /// Nobody answers.
    #[error("no broker answers at {address} ({cause}): start it, or correct AMQP_URL")]
    Unreachable {
        /// Host and port.
        address: String,
        /// What the operating system said.
        cause: String,
    },
    /// Wrong user or password.
    #[error("the broker at {address} refuses user '{user}': correct user and password in AMQP_URL")]
    Credentials {
        /// Host and port.
        address: String,
        /// The user.
        user: String,
    },
    /// No such vhost, or no permission for it.
    #[error(
        "the broker refuses vhost '{vhost}' ({cause}): create it and grant user '{user}' access, or correct AMQP_URL"
    )]
    Vhost {
        /// The vhost.
        vhost: String,
        /// The user.
        user: String,
        /// What the broker said.
        cause: String,
    },
    /// The connection ended, or an operation on it failed.
    #[error("the broker connection failed: {0}")]
    Lost(String),
}

impl BrokerError {
    /// Whether trying again without a change may help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Lost(_))
    }

    /// What the broker or the library said of a connection in use.
    #[must_use]
    pub fn lost(error: &Error) -> Self {
        Self::Lost(describe(error))
    }
}

/// How long a broker may take from the first byte to an open connection.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Seconds of `?heartbeat=` where the URL says nothing.
const HEARTBEAT: u16 = 10;

/// Who sets a heartbeat of N seconds expects a silent peer to be given up after 2 N. RabbitMQ looks once an interval and
/// does so after two to three of them: it is asked for two thirds.
fn interval(heartbeat: u16) -> u16 {
    // Dividing first, as the product may be too large.
    if heartbeat == 0 { 0 } else { (heartbeat / 3 * 2 + heartbeat % 3 * 2 / 3).max(1) }
}

/// How to reach the broker.
#[derive(Clone, Debug)]
pub struct Broker {
    url: Secret,
    name: String,
    nodes: Arc<Nodes>,
}

/// Which of the listed nodes serves us. All connections of a process are to one node: where it is cut off from the others,
/// the process is as a whole, and the fleet sees it.
#[derive(Debug)]
struct Nodes {
    /// Counts on with each node that is left; the current one is its remainder.
    turn: AtomicUsize,
    /// Connections that were opened before this turn are closed.
    given_up: watch::Sender<usize>,
}

impl Nodes {
    /// Goes to the next node, unless somebody did already.
    fn leave(&self, turn: usize) {
        let _ = self.turn.compare_exchange(turn, turn.wrapping_add(1), Ordering::AcqRel, Ordering::Acquire);
    }
}

/// An open connection, and whether the broker blocks it.
#[derive(Debug)]
pub struct Link {
    connection: Arc<Connection>,
    blocked: watch::Receiver<Option<String>>,
    nodes: Arc<Nodes>,
    turn: usize,
}

impl Broker {
    /// The broker at a URL, or at several of one cluster with commas between them; `name` is shown in the broker's list of
    /// connections.
    #[must_use]
    pub fn new(url: Secret, name: impl Into<String>) -> Self {
        // The first is chosen by chance, so that a fleet spreads over a cluster. Half the range never overflows.
        let turn = RandomState::new().hash_one(0) as usize / 2;
        let nodes = Nodes { turn: AtomicUsize::new(turn), given_up: watch::channel(turn).0 };
        Self { url, name: name.into(), nodes: Arc::new(nodes) }
    }

    /// Connects once, to the first node that answers: the one that serves us, or the next in the list.
    ///
    /// # Errors
    /// Says why not, and what to do.
    pub async fn connect(&self, purpose: &str) -> Result<Link, BrokerError> {
        let urls: Vec<&str> = self.url.reveal().split(',').map(str::trim).collect();
        let mut why = BrokerError::Lost("no URL".into());
        for _ in &urls {
            let turn = self.nodes.turn.load(Ordering::Acquire);
            match self.connect_to(urls[turn % urls.len()], turn, purpose).await {
                Ok(link) => return Ok(link),
                Err(error) => {
                    self.nodes.leave(turn);
                    why = error;
                }
            }
        }
        Err(why)
    }

    async fn connect_to(&self, url: &str, turn: usize, purpose: &str) -> Result<Link, BrokerError> {
        // The parser's error may hold the URL, and with it the password.
        let mut uri: AMQPUri = url.parse().map_err(|_| BrokerError::Url("it cannot be parsed".into()))?;
        uri.query.heartbeat = Some(interval(uri.query.heartbeat.unwrap_or(HEARTBEAT)));
        uri.query.connection_timeout.get_or_insert(5000);
        let name = format!("{} ({purpose})", self.name);
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        // The library bounds the TCP connection, not what follows: whatever accepts and says nothing would hold us for ever.
        let connecting = tokio::time::timeout(HANDSHAKE, sieve::connect(uri.clone(), properties));
        let connection = match connecting.await {
            Ok(connected) => connected.map_err(|error| refusal(&uri, &error))?,
            Err(_) => {
                let address = format!("{}:{}", uri.authority.host, uri.authority.port);
                let cause = format!("it accepts the connection and does not answer within {HANDSHAKE:?}");
                return Err(BrokerError::Unreachable { address, cause });
            }
        };
        let connection = Arc::new(connection);
        let (tell, blocked) = watch::channel(None);
        let (events, status) = (connection.events_listener(), connection.status().clone());
        let (of, nodes) = (Arc::downgrade(&connection), self.nodes.clone());
        tokio::spawn(async move {
            use futures_util::StreamExt;
            let mut given_up = nodes.given_up.subscribe();
            let mut events = std::pin::pin!(events);
            loop {
                let event = tokio::select! {
                    event = events.next() => event,
                    _ = async { given_up.wait_for(|first| turn < *first).await.is_ok() } => {
                        if let Some(connection) = of.upgrade() {
                            close(&connection).await;
                        }
                        return;
                    }
                };
                match event {
                    None => return,
                    Some(lapin::Event::ConnectionBlocked(reason)) => drop(tell.send_replace(Some(reason))),
                    Some(lapin::Event::ConnectionUnblocked) => drop(tell.send_replace(None)),
                    // A channel's error is told here too; the connection outlives it.
                    Some(lapin::Event::Error(_)) if !status.connected() => return nodes.leave(turn),
                    Some(_) => {}
                }
            }
        });
        Ok(Link { connection, blocked, nodes: self.nodes.clone(), turn })
    }

    /// Connects, and tries for so long where the broker is not there yet.
    ///
    /// # Errors
    /// The last reason; at once where no waiting helps.
    pub async fn connect_within(&self, purpose: &str, patience: Duration) -> Result<Link, BrokerError> {
        use backon::{BackoffBuilder, ExponentialBuilder};
        let started = tokio::time::Instant::now();
        let delays = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(3))
            .with_jitter()
            .without_max_times();
        for delay in delays.build() {
            match self.connect(purpose).await {
                Err(error) if error.is_transient() && started.elapsed() + delay < patience => {
                    tracing::info!(%error, "not connected yet, trying again");
                    tokio::time::sleep(delay).await;
                }
                result => return result,
            }
        }
        Err(BrokerError::Lost("gave up".into()))
    }

    /// Connects, however long it takes.
    pub async fn connect_for_ever(&self, purpose: &str) -> Link {
        loop {
            match self.connect_within(purpose, Duration::from_secs(3600)).await {
                Ok(link) => return link,
                Err(error) => {
                    // Credentials may be rotating, a vhost may be restored: it stays a wait, not an end.
                    tracing::error!(%error, "the broker refuses the connection, trying again in 5 s");
                    tokio::time::sleep(Duration::from_secs(5)).await;
                }
            }
        }
    }
}

impl Link {
    /// The connection.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Why the broker blocks publishing now, if it does.
    #[must_use]
    pub fn blocked(&self) -> watch::Receiver<Option<String>> {
        self.blocked.clone()
    }

    /// Whether it can be used.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.connection.status().connected()
    }

    /// Closes it in order; a connection that cannot be closed in two seconds is left to the operating system.
    pub async fn close(&self) {
        close(&self.connection).await;
    }

    /// Its node is there and does not do its work: no connection of this process stays with it.
    pub fn give_up(&self) {
        self.nodes.leave(self.turn);
        self.nodes.given_up.send_if_modified(|before| {
            let more = self.turn >= *before;
            *before = (*before).max(self.turn + 1);
            more
        });
    }
}

async fn close(connection: &Connection) {
    let _ = tokio::time::timeout(Duration::from_secs(2), connection.close(200, "done".into())).await;
}

fn refusal(uri: &AMQPUri, error: &Error) -> BrokerError {
    let address = format!("{}:{}", uri.authority.host, uri.authority.port);
    let user = uri.authority.userinfo.username.clone();
    match error.kind() {
        ErrorKind::ProtocolError(amqp) => match amqp.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => BrokerError::Credentials { address, user },
            AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED | AMQPHardError::INVALIDPATH) => {
                BrokerError::Vhost { vhost: uri.vhost.clone(), user, cause: amqp.get_message().to_string() }
            }
            _ => BrokerError::Lost(describe(error)),
        },
        // Older brokers drop the connection where the password is wrong; all else that fails here is the way there.
        _ => BrokerError::Unreachable { address, cause: describe(error) },
    }
}

/// An error of the library in words, without Debug output that could hold a message.
#[must_use]
pub fn describe(error: &Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(amqp) => amqp.get_message().to_string(),
        ErrorKind::IOError(io) => io.to_string(),
        ErrorKind::MissingHeartbeatError => "no heartbeat from the broker".into(),
        ErrorKind::InvalidChannelState(..) => "the channel is closed".into(),
        ErrorKind::InvalidConnectionState(..) => "the connection is closed".into(),
        ErrorKind::ParsingError(_) => "the broker sent a frame that cannot be read".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_left_once_however_many_connections_it_had() {
        let nodes = Nodes { turn: AtomicUsize::new(7), given_up: watch::channel(7).0 };
        nodes.leave(7);
        nodes.leave(7);
        assert_eq!(nodes.turn.load(Ordering::Acquire), 8);
        // Of the node that serves now nobody complained.
        nodes.leave(6);
        assert_eq!(nodes.turn.load(Ordering::Acquire), 8);
    }

    #[test]
    fn two_thirds_of_the_heartbeat_are_asked_for_and_none_where_none_is_wanted() {
        assert_eq!([0, 1, 2, 3, 5, 10, 60, u16::MAX].map(interval), [0, 1, 1, 2, 3, 6, 40, 43_690]);
    }
}
