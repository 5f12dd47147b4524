//! The way to PostgreSQL: what a URL means, TLS, timeouts, and what each refusal asks for.
//!
//! Beside what PostgreSQL's own library reads, Warren always asks for a server that takes writes: of several hosts in the
//! URL the one that is the primary. The URL, where it came from a file, and the files that it names are read again for each
//! connection.
use crate::secrets::Complaints;
use crate::tls::{self, Card, Fault, Unfit};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, SignatureScheme};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{Client, Config, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;
use warren_shared::env::Secret;

/// TLS, where the URL asks for it.
pub type Tls = MakeRustlsConnect;
/// A connection: whoever holds the client polls it.
pub type Connection = tokio_postgres::Connection<Socket, <Tls as MakeTlsConnect<Socket>>::Stream>;

/// How long one host may take to answer.
const CONNECT: Duration = Duration::from_secs(5);
/// What was sent and is not acknowledged for so long ends the connection.
const SILENCE: Duration = Duration::from_secs(20);

/// Why the server cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[error("PostgreSQL at {at}: {problem}{}{cure}", if .cure.is_empty() { "" } else { ": " })]
pub struct PostgresError {
    /// Hosts and database; never user or password.
    pub at: String,
    /// What it said.
    pub problem: String,
    /// What to do; empty where only waiting helps.
    pub cure: &'static str,
}

impl PostgresError {
    /// Whether it may be gone in a moment.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        self.cure.is_empty()
    }
}

/// A database that can be connected to.
#[derive(Clone)]
pub struct Postgres(Arc<Mutex<Present>>);

/// What the URL meant when it was good last.
struct Present {
    url: Secret,
    config: Config,
    tls: Tls,
    complaints: Complaints,
}

impl std::fmt::Debug for Postgres {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Postgres").field(&self.at()).finish()
    }
}

impl Present {
    /// What is in the files now; where that cannot be used, what could be used last.
    fn renew(&mut self) -> (Config, Tls) {
        let mut url = self.url.clone();
        self.complaints.renew(&mut url);
        match meaning(&url) {
            Ok((config, tls)) => {
                self.complaints.settle(DATABASE_URL);
                (self.url, self.config, self.tls) = (url, config, tls);
            }
            Err(problem) => self.complaints.say(DATABASE_URL, &problem),
        }
        (self.config.clone(), self.tls.clone())
    }
}

const DATABASE_URL: &str = "DATABASE_URL";

impl Postgres {
    /// Reads `postgres://user:password@host:port/database` and the parameters `sslmode` (disable, prefer, require, verify-ca,
    /// verify-full), `sslrootcert`, `sslcert`, `sslkey`, with their meaning in PostgreSQL's own library. `prefer` and, without
    /// `sslrootcert`, `require` encrypt without asking who the server is.
    ///
    /// # Errors
    /// What is wrong with it; nothing secret is part of that.
    pub fn parse(url: &Secret) -> Result<Self, String> {
        let (config, tls) = meaning(url)?;
        let present = Present { url: url.clone(), config, tls, complaints: Complaints::default() };
        Ok(Self(Arc::new(Mutex::new(present))))
    }

    /// Connects once.
    ///
    /// # Errors
    /// Why the server cannot be used, and what to do.
    pub async fn connect(&self) -> Result<(Client, Connection), PostgresError> {
        self.open().await.map_err(|error| self.explain(&error))
    }

    /// The same with the error as it came.
    ///
    /// # Errors
    /// What [`Self::explain`] explains.
    pub async fn open(&self) -> Result<(Client, Connection), tokio_postgres::Error> {
        let (config, tls) = self.present().renew();
        config.connect(tls).await
    }

    fn present(&self) -> MutexGuard<'_, Present> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a refusal means.
    #[must_use]
    pub fn explain(&self, error: &tokio_postgres::Error) -> PostgresError {
        PostgresError { at: self.at(), problem: problem(error), cure: cure(error) }
    }

    /// Hosts and database, for a person.
    #[must_use]
    pub fn at(&self) -> String {
        let (mut at, config) = (String::new(), self.present().config.clone());
        for (n, host) in config.get_hosts().iter().enumerate() {
            let ports = config.get_ports();
            let port = ports.get(n).or(ports.first()).copied().unwrap_or(5432);
            let _ = match host {
                Host::Tcp(host) => write!(at, "{}{host}:{port}", if n > 0 { "," } else { "" }),
                #[cfg(unix)]
                Host::Unix(path) => write!(at, "{}{}:{port}", if n > 0 { "," } else { "" }, path.display()),
            };
        }
        let database = config.get_dbname().or(config.get_user()).unwrap_or_default();
        format!("{at}/{database}")
    }
}

fn meaning(url: &Secret) -> Result<(Config, Tls), String> {
    let (base, query) = url.reveal().split_once('?').unwrap_or((url.reveal(), ""));
    let (mut mode, mut root, mut certificate, mut key) = ("prefer".to_owned(), None, None, None);
    let mut rest = String::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = || decoded(value).ok_or_else(|| format!("has a parameter '{name}' that is not well encoded"));
        match name {
            "sslmode" => mode = value()?,
            "sslrootcert" => root = Some(value()?),
            "sslcert" => certificate = Some(value()?),
            "sslkey" => key = Some(value()?),
            _ => rest = format!("{rest}{}{pair}", if rest.is_empty() { "?" } else { "&" }),
        }
    }
    let (asked, check) = match (mode.as_str(), &root) {
        ("disable", _) => (SslMode::Disable, Check::Nothing),
        ("prefer", _) => (SslMode::Prefer, Check::Nothing),
        ("require", None) => (SslMode::Require, Check::Nothing),
        ("require" | "verify-ca", _) => (SslMode::Require, Check::Issuer),
        ("verify-full", _) => (SslMode::Require, Check::IssuerAndName),
        _ => return Err("has an sslmode other than disable, prefer, require, verify-ca and verify-full".into()),
    };
    let form = "is not of the form postgres://user:password@host:5432/database";
    let mut config: Config = format!("{base}{rest}").parse().map_err(|error: tokio_postgres::Error| {
        let why = std::error::Error::source(&error).map(|cause| format!(" ({cause})")).unwrap_or_default();
        format!("{form}{why}")
    })?;
    if config.get_hosts().is_empty() {
        return Err(format!("{form}: it names no host"));
    }
    config.ssl_mode(asked).target_session_attrs(TargetSessionAttrs::ReadWrite);
    config.connect_timeout(config.get_connect_timeout().copied().unwrap_or(CONNECT));
    config.keepalives(true).keepalives_idle(Duration::from_secs(10)).keepalives_interval(Duration::from_secs(5));
    config.keepalives_retries(2).tcp_user_timeout(SILENCE);
    if config.get_application_name().is_none() {
        config.application_name("warren");
    }
    let tls = tls(check, root.as_deref(), certificate.as_deref(), key.as_deref())?;
    Ok((config, MakeRustlsConnect::new(tls)))
}

/// What an error says, causes and all. A statement's parameters are never part of it.
#[must_use]
pub fn problem(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        return format!("{} ({})", db.message(), db.code().code());
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        let _ = write!(text, ": {next}");
        cause = next.source();
    }
    text
}

fn cure(error: &tokio_postgres::Error) -> &'static str {
    let Some(code) = error.code() else {
        if let Some((fault, _)) = Fault::of(error) {
            return fault.cure_of_postgres();
        }
        let mut cause = std::error::Error::source(error);
        while let Some(next) = cause {
            if next.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied) {
                return "it is a read-only replica, point DATABASE_URL at the primary";
            }
            if next.to_string().contains("does not support TLS") {
                return "switch TLS on there, or set sslmode in DATABASE_URL";
            }
            cause = next.source();
        }
        return if error.to_string().contains("configuration") { "correct DATABASE_URL" } else { "" };
    };
    match *code {
        SqlState::INVALID_PASSWORD => "correct user and password in DATABASE_URL",
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
            "create that user, or let it in (pg_hba.conf), or set sslmode, sslcert and sslkey in DATABASE_URL"
        }
        SqlState::INVALID_CATALOG_NAME => "create that database, or correct its name in DATABASE_URL",
        SqlState::INSUFFICIENT_PRIVILEGE => "grant it to the user of DATABASE_URL",
        SqlState::READ_ONLY_SQL_TRANSACTION => "it takes no writes, point DATABASE_URL at the primary",
        SqlState::SYNTAX_ERROR | SqlState::UNDEFINED_FUNCTION | SqlState::FEATURE_NOT_SUPPORTED => {
            "use PostgreSQL 13 or newer"
        }
        _ => "",
    }
}

/// What of the server's certificate is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    Nothing,
    Issuer,
    IssuerAndName,
}

fn tls(check: Check, root: Option<&str>, certificate: Option<&str>, key: Option<&str>) -> Result<ClientConfig, String> {
    let provider = tls::provider();
    let unusable = |name: &str, path: &str, why: &str| format!("names a {name}, '{path}', that cannot be used: {why}");
    let read = |name: &str, path: &str| std::fs::read(path).map_err(|why| unusable(name, path, &why.to_string()));
    let verifier: Arc<dyn ServerCertVerifier> = if check == Check::Nothing {
        Arc::new(Lenient { provider, issuer: None })
    } else {
        let issuers = root.map(|path| read("sslrootcert", path)).transpose()?;
        let verifier = tls::verifier(issuers.as_deref()).map_err(|why| match root {
            Some(path) => unusable("sslrootcert", path, &why),
            None => format!("asks to verify the server, which cannot be done: {why}"),
        })?;
        if check == Check::Issuer { Arc::new(Lenient { provider, issuer: Some(verifier) }) } else { verifier }
    };
    let identity = match (certificate, key) {
        (None, None) => None,
        (Some(path), Some(key)) => {
            let pair = tls::identity(&read("sslcert", path)?, &read("sslkey", key)?);
            Some(pair.map_err(|unfit| match unfit {
                Unfit::Certificate(why) => unusable("sslcert", path, &why),
                Unfit::Key(why) => unusable("sslkey", key, &why),
            })?)
        }
        _ => return Err("names only one of sslcert and sslkey: a client's certificate takes both".into()),
    };
    let mut config = tls::client(verifier, Card::new(identity))?;
    // PostgreSQL 17 wants to be told when nothing was negotiated before; older ones ignore it.
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(config)
}

/// Checks less than the usual: nothing, or all but the name.
#[derive(Debug)]
struct Lenient {
    provider: Arc<CryptoProvider>,
    issuer: Option<Arc<WebPkiServerVerifier>>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let Some(issuer) = &self.issuer else { return Ok(ServerCertVerified::assertion()) };
        match issuer.verify_server_cert(end, chain, name, ocsp, now) {
            Err(TlsError::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        end: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, end, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        end: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, end, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// What a percent-encoded value stands for.
fn decoded(value: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digit = |byte: Option<u8>| (byte? as char).to_digit(16);
            bytes.push(u8::try_from(digit(rest.next())? * 16 + digit(rest.next())?).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Postgres, String> {
        Postgres::parse(&Secret::new(url))
    }

    #[test]
    fn a_url_is_shown_without_its_secrets() {
        let postgres = parse("postgres://me:hidden@db.example:6000,second/orders?sslmode=disable").expect("valid");
        assert_eq!(postgres.at(), "db.example:6000,second:5432/orders");
        assert!(!format!("{postgres:?}").contains("hidden"));
    }

    #[test]
    fn what_is_wrong_is_said_without_secrets() {
        let wrong = [
            ("postgres://me:hidden@db:port/orders", "postgres://user:password@host"),
            ("postgres:///orders", "no host"),
            ("postgres://me:hidden@db/orders?sslmode=maybe", "sslmode"),
            ("postgres://me:hidden@db/orders?sslcert=/a.pem", "only one of"),
            ("postgres://me:hidden@db/orders?sslmode=verify-full&sslrootcert=/not/there", "/not/there"),
            ("postgres://me:hidden@db/orders?sslmode=require&sslrootcert=%2", "sslrootcert"),
            ("postgres://me:hidden@db/orders?what=ever", "what"),
        ];
        for (url, wanted) in wrong {
            let said = parse(url).expect_err(url);
            assert!(said.contains(wanted) && !said.contains("hidden"), "{url}: {said}");
        }
    }
}
