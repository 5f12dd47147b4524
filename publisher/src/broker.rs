//! The connection: reached with back-off, watched for blocks, its refusals translated into causes with cures.
use crate::budget::Budget;
use crate::secrets::Complaints;
use crate::sieve;
use crate::tls::{self, Card, Fault, Unfit};
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::uri::{AMQPScheme, AMQPUri, SASLMechanism};
use lapin::{Connection, ConnectionProperties, Error, ErrorKind};
use rustls::client::WebPkiServerVerifier;
use rustls::sign::CertifiedKey;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use warren_shared::amqp::{Amqp, Node};
use warren_shared::env::{Mistake, Secret};

/// Why there is no connection. The message names the cure.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BrokerError {
    /// `AMQP_URL`, or a part beside it, cannot be used.
    #[error("{0}")]
    Settings(String),
    /// Nobody answers.
    #[error("no broker answers at {address} ({cause}): start it, or correct AMQP_URL (AMQP_HOST, AMQP_PORT)")]
    Unreachable {
        /// Host and port.
        address: String,
        /// What the operating system said.
        cause: String,
    },
    /// TLS ended where it must: nothing was sent.
    #[error("no trust between us and the broker at {address} ({problem}): {cure}")]
    Tls {
        /// Host and port.
        address: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        cure: &'static str,
    },
    /// The broker does not take our certificate for a login.
    #[error(
        "the broker at {address} takes no login by certificate ({cause}): enable rabbitmq_auth_mechanism_ssl and EXTERNAL \
         there, and create the user that the certificate names"
    )]
    External {
        /// Host and port.
        address: String,
        /// What the broker said.
        cause: String,
    },
    /// Wrong user or password.
    #[error(
        "the broker at {address} refuses user '{user}': correct user and password (AMQP_URL, or AMQP_USER and AMQP_PASSWORD)"
    )]
    Credentials {
        /// Host and port.
        address: String,
        /// The user.
        user: String,
    },
    /// No such vhost, or no permission for it.
    #[error(
        "the broker refuses vhost '{vhost}' ({cause}): create it and grant user '{user}' access, or correct AMQP_URL (AMQP_VHOST)"
    )]
    Vhost {
        /// The vhost.
        vhost: String,
        /// The user.
        user: String,
        /// What the broker said.
        cause: String,
    },
    /// It takes no more connections, or the vhost is not served now.
    #[error(
        "the broker at {address} takes no connection now ({cause}): close others or raise the limit there, then try again"
    )]
    Full {
        /// Host and port.
        address: String,
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
        matches!(self, Self::Unreachable { .. } | Self::Full { .. } | Self::Lost(_))
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
    present: Arc<Mutex<Present>>,
    name: String,
    nodes: Arc<Nodes>,
    /// Bounds what is held of what its connections read.
    budget: Option<Arc<Budget>>,
}

/// The settings as they were good last.
#[derive(Debug)]
struct Present {
    amqp: Amqp,
    complaints: Complaints,
}

/// Settings that can be connected with.
struct Ready {
    uris: Vec<AMQPUri>,
    verifier: Option<Arc<WebPkiServerVerifier>>,
    identity: Option<Arc<CertifiedKey>>,
}

/// What in these settings cannot be used: certificates too, which only this crate reads.
#[must_use]
pub fn mistakes(amqp: &Amqp) -> Vec<Mistake> {
    ready(amqp).err().unwrap_or_default()
}

fn ready(amqp: &Amqp) -> Result<Ready, Vec<Mistake>> {
    let mut mistakes = amqp.mistakes();
    if !mistakes.is_empty() {
        return Err(mistakes);
    }
    let wrong = |secret: &Option<Secret>, name: &str, why: String| Mistake {
        variable: secret.as_ref().map_or_else(|| name.to_owned(), |s| s.variable(name)),
        problem: format!("cannot be used: {why}"),
    };
    let uris: Vec<Option<AMQPUri>> = amqp.nodes().into_iter().map(|node| uri(amqp, node)).collect();
    let uris = uris.into_iter().collect::<Option<Vec<_>>>();
    if uris.is_none() {
        // The parser's error may hold the URL, and with it the password.
        let problem = "is not a URL of the form amqp://user:password@host:port/vhost: it cannot be parsed";
        mistakes.push(Mistake { variable: amqp.url.variable("AMQP_URL"), problem: problem.into() });
    }
    let in_tls = uris.iter().flatten().any(|uri| uri.scheme == AMQPScheme::AMQPS);
    let pem = |secret: &Option<Secret>| secret.as_ref().map(|s| s.reveal().as_bytes().to_vec());
    let verifier = in_tls.then(|| tls::verifier(pem(&amqp.ca).as_deref())).transpose();
    let verifier = verifier.map_err(|why| mistakes.push(wrong(&amqp.ca, "AMQP_CA", why))).ok();
    let pair = pem(&amqp.cert).zip(pem(&amqp.key));
    let identity = pair.map(|(cert, key)| tls::identity(&cert, &key)).transpose();
    let identity = identity.map_err(|unfit| {
        mistakes.push(match unfit {
            Unfit::Certificate(why) => wrong(&amqp.cert, "AMQP_CERT", why),
            Unfit::Key(why) => wrong(&amqp.key, "AMQP_KEY", why),
        });
    });
    match (uris, verifier, identity) {
        (Some(uris), Some(verifier), Ok(identity)) => Ok(Ready { uris, verifier, identity }),
        _ => Err(mistakes),
    }
}

/// A node's URL with the single parts in their places.
fn uri(amqp: &Amqp, (url, host): Node<'_>) -> Option<AMQPUri> {
    let mut uri: AMQPUri = url.parse().ok()?;
    // The parser takes an IPv6 address for no host, and no host for this machine.
    let address = url.split_once("://")?.1.split(['/', '?']).next()?.rsplit('@').next()?;
    if let Some((address, _)) = address.strip_prefix('[').and_then(|address| address.split_once(']')) {
        uri.authority.host = address.to_owned();
    }
    uri.authority.host = host.map_or(uri.authority.host, str::to_owned);
    uri.authority.port = amqp.port.unwrap_or(uri.authority.port);
    uri.vhost = amqp.vhost.clone().unwrap_or(uri.vhost);
    let login = &mut uri.authority.userinfo;
    for (part, secret) in [(&mut login.username, &amqp.user), (&mut login.password, &amqp.password)] {
        if let Some(secret) = secret {
            *part = secret.reveal().to_owned();
        }
    }
    uri.query.heartbeat = Some(interval(uri.query.heartbeat.unwrap_or(HEARTBEAT)));
    uri.query.connection_timeout.get_or_insert(5000);
    Some(uri)
}

impl Present {
    /// What is in the files now; where that cannot be used, what could be used last.
    fn renew(&mut self) -> Result<Ready, BrokerError> {
        let mut next = self.amqp.clone();
        next.secrets().for_each(|secret| self.complaints.renew(secret));
        let ready = match ready(&next) {
            Ok(now) => {
                self.complaints.settle(TOGETHER);
                self.amqp = next;
                Ok(now)
            }
            Err(wrong) if next != self.amqp => {
                let wrong: Vec<String> = wrong.iter().map(ToString::to_string).collect();
                self.complaints.say(TOGETHER, &wrong.join(", "));
                ready(&self.amqp)
            }
            wrong => wrong,
        };
        ready.map_err(|wrong| {
            BrokerError::Settings(wrong.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
        })
    }
}

/// What is said to be wrong where the values do not go together.
const TOGETHER: &str = "AMQP_*_FILE";

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
    pub fn new(amqp: impl Into<Amqp>, name: impl Into<String>) -> Self {
        // The first is chosen by chance, so that a fleet spreads over a cluster. Half the range never overflows.
        let turn = RandomState::new().hash_one(0) as usize / 2;
        let nodes = Nodes { turn: AtomicUsize::new(turn), given_up: watch::channel(turn).0 };
        let present = Present { amqp: amqp.into(), complaints: Complaints::default() };
        Self { present: Arc::new(Mutex::new(present)), name: name.into(), nodes: Arc::new(nodes), budget: None }
    }

    /// The same broker, by connections that read nothing while this budget is used up.
    #[must_use]
    pub fn within(&self, budget: Arc<Budget>) -> Self {
        Self { budget: Some(budget), ..self.clone() }
    }

    /// Connects once, to the first node that answers: the one that serves us, or the next in the list. Secrets are read again
    /// from their files before.
    ///
    /// # Errors
    /// Says why not, and what to do.
    pub async fn connect(&self, purpose: &str) -> Result<Link, BrokerError> {
        let ready = self.present.lock().unwrap_or_else(PoisonError::into_inner).renew()?;
        let mut why = BrokerError::Lost("no URL".into());
        for _ in &ready.uris {
            let turn = self.nodes.turn.load(Ordering::Acquire);
            match self.connect_to(&ready, turn, purpose).await {
                Ok(link) => return Ok(link),
                Err(error) => {
                    self.nodes.leave(turn);
                    why = error;
                }
            }
        }
        Err(why)
    }

    /// The vhost that connections are for.
    #[must_use]
    pub fn vhost(&self) -> String {
        let amqp = self.present.lock().unwrap_or_else(PoisonError::into_inner).amqp.clone();
        amqp.nodes().first().and_then(|node| uri(&amqp, *node)).map_or_else(|| "/".into(), |uri| uri.vhost)
    }

    async fn connect_to(&self, ready: &Ready, turn: usize, purpose: &str) -> Result<Link, BrokerError> {
        let uri = &ready.uris[turn % ready.uris.len()];
        let name = format!("{} ({purpose})", self.name);
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let card = Card::new(ready.identity.clone());
        let tls = match &ready.verifier {
            Some(verifier) if uri.scheme == AMQPScheme::AMQPS => {
                Some(tls::client(verifier.clone(), card.clone()).map_err(BrokerError::Settings)?)
            }
            _ => None,
        };
        // The library bounds the TCP connection, not what follows: whatever accepts and says nothing would hold us for ever.
        let connecting =
            tokio::time::timeout(HANDSHAKE, sieve::connect(uri.clone(), properties, tls, self.budget.clone()));
        let connection = match connecting.await {
            Ok(connected) => connected.map_err(|error| refusal(uri, &error, &card))?,
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

fn refusal(uri: &AMQPUri, error: &Error, card: &Card) -> BrokerError {
    let address = format!("{}:{}", uri.authority.host, uri.authority.port);
    let user = uri.authority.userinfo.username.clone();
    let external = uri.query.auth_mechanism == Some(SASLMechanism::External);
    match error.kind() {
        ErrorKind::ProtocolError(amqp) => match amqp.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) if external => {
                BrokerError::External { address, cause: describe(error) }
            }
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => BrokerError::Credentials { address, user },
            // Limits of a node, a vhost and a user all read so.
            AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)
                if [" is reached", " is down"].iter().any(|word| amqp.get_message().as_str().contains(word)) =>
            {
                BrokerError::Full { address, cause: amqp.get_message().to_string() }
            }
            AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED | AMQPHardError::INVALIDPATH) => {
                BrokerError::Vhost { vhost: uri.vhost.clone(), user, cause: amqp.get_message().to_string() }
            }
            _ => BrokerError::Lost(describe(error)),
        },
        ErrorKind::IOError(io) => {
            if let Some((fault, problem)) = Fault::of(&**io) {
                return BrokerError::Tls { address, problem, cure: fault.cure_of_broker() };
            }
            if card.was_missed() {
                // It says so before it closes the connection, which may be faster than its words.
                let problem = "it asks for our certificate and ends the connection without one".into();
                return BrokerError::Tls { address, problem, cure: Fault::Unknown.cure_of_broker() };
            }
            BrokerError::Unreachable { address, cause: describe(error) }
        }
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
    use warren_shared::env::Settings;

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

    fn reached(pairs: &[(&str, &str)]) -> Vec<AMQPUri> {
        let map = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        ready(&Settings::read(&map).expect("valid").amqp).expect("ready").uris
    }

    #[test]
    fn each_part_stands_in_its_place_whatever_it_holds() {
        let password = "p@ss/w:ord%2f?#[]ü \u{1F511}";
        let parts = [
            ("AMQP_URL", "amqp://old:secret@elsewhere:1/old?heartbeat=3"),
            ("AMQP_HOST", "one,fd00::2"),
            ("AMQP_PORT", "6000"),
            ("AMQP_VHOST", "/shop%2f"),
            ("AMQP_USER", "sh:op"),
            ("AMQP_PASSWORD", password),
        ];
        let uris = reached(&parts);
        let hosts: Vec<_> = uris.iter().map(|uri| uri.authority.host.as_str()).collect();
        assert_eq!(hosts, ["one", "fd00::2"]);
        for uri in uris {
            let login = &uri.authority.userinfo;
            assert_eq!((login.username.as_str(), login.password.as_str()), ("sh:op", password));
            assert_eq!((uri.authority.port, uri.vhost.as_str(), uri.query.heartbeat), (6000, "/shop%2f", Some(2)));
        }
        let whole = reached(&[("AMQP_URL", "amqps://a%40b:%2f%3a@[::1]:7/%2f, amqp://host")]);
        let host = |n: usize| (whole[n].authority.host.as_str(), whole[n].authority.port, whole[n].vhost.as_str());
        assert_eq!((host(0), host(1)), (("::1", 7, "/"), ("host", 5672, "/")));
        assert_eq!(whole[0].authority.userinfo.username, "a@b");
    }

    #[test]
    fn what_cannot_be_used_is_a_mistake_by_name_and_holds_no_secret() {
        let wrong = |pairs: &[(&str, &str)]| {
            let map = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            mistakes(&Settings::read(&map).expect("read").amqp).iter().map(ToString::to_string).collect::<String>()
        };
        let tls =
            [("AMQP_URL", "amqps://me:hunter2@host"), ("AMQP_CA", "hunter2"), ("AMQP_CERT", "x"), ("AMQP_KEY", "y")];
        let said = wrong(&tls);
        assert!(said.contains("AMQP_CA: cannot be used: it holds") && said.contains("AMQP_CERT: cannot"), "{said}");
        let said = said + &wrong(&[("AMQP_URL", "amqp://me:hunter2@host:hunter2/")]);
        assert!(said.contains("AMQP_URL: is not a URL") && !said.contains("hunter2"), "{said}");
        assert_eq!(wrong(&[]), "");
    }

    #[test]
    fn two_thirds_of_the_heartbeat_are_asked_for_and_none_where_none_is_wanted() {
        assert_eq!([0, 1, 2, 3, 5, 10, 60, u16::MAX].map(interval), [0, 1, 1, 2, 3, 6, 40, 43_690]);
    }
}
