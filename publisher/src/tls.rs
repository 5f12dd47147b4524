//! TLS of a client: who is trusted, who we are, and what each refusal asks for.
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{ResolvesClientCert, Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, CertificateError, ClientConfig, Error, RootCertStore, SignatureScheme};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The cryptography that all of this rests on.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// A verifier that trusts only these issuers (PEM), or those that the system trusts.
pub(crate) fn verifier(issuers: Option<&[u8]>) -> Result<Arc<WebPkiServerVerifier>, String> {
    let mut roots = RootCertStore::empty();
    match issuers {
        Some(pem) => {
            roots.add_parsable_certificates(certificates(pem)?);
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err(match issuers {
            Some(_) => "it holds no certificate of an issuer".into(),
            None => "this system trusts no issuer: install its CA certificates, or name the issuer to trust".into(),
        });
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
    verifier.map_err(|why| why.to_string())
}

/// Our certificate with its chain, and its key (both PEM).
pub(crate) fn identity(certificate: &[u8], key: &[u8]) -> Result<Arc<CertifiedKey>, Unfit> {
    let chain = certificates(certificate).map_err(Unfit::Certificate)?;
    // The parser's error may quote what it read.
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| Unfit::Key("it holds no private key in PEM".into()))?;
    match CertifiedKey::from_der(chain, key, &provider()) {
        Ok(pair) => Ok(Arc::new(pair)),
        Err(Error::InconsistentKeys(_)) => Err(Unfit::Key("it is not the key to the certificate".into())),
        Err(why) => Err(Unfit::Key(why.to_string())),
    }
}

/// What of a pair cannot be used, and why.
#[derive(Debug)]
pub(crate) enum Unfit {
    Certificate(String),
    Key(String),
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let all = all.map_err(|_| "it is not well-formed PEM".to_owned())?;
    if all.is_empty() { Err("it holds no certificate in PEM".into()) } else { Ok(all) }
}

/// A client that shows this certificate to whoever asks for one.
pub(crate) fn client(verifier: Arc<dyn ServerCertVerifier>, card: Arc<Card>) -> Result<ClientConfig, String> {
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|why| format!("TLS cannot be used: {why}"))?;
    let mut config = builder.dangerous().with_custom_certificate_verifier(verifier).with_client_cert_resolver(card);
    // Connections are few: each proves anew who the server is.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Who we are, and whether anybody asked.
#[derive(Debug, Default)]
pub(crate) struct Card {
    identity: Option<Arc<CertifiedKey>>,
    asked: AtomicBool,
}

impl Card {
    pub(crate) fn new(identity: Option<Arc<CertifiedKey>>) -> Arc<Self> {
        Arc::new(Self { identity, asked: AtomicBool::new(false) })
    }

    /// Whether the server asked who we are, and we had nothing to show.
    pub(crate) fn was_missed(&self) -> bool {
        self.identity.is_none() && self.asked.load(Ordering::Acquire)
    }
}

impl ResolvesClientCert for Card {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.asked.store(true, Ordering::Release);
        self.identity.clone()
    }

    fn has_certs(&self) -> bool {
        self.identity.is_some()
    }
}

/// What a refusal is about. None of these goes away by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The server's certificate is not valid at this time.
    Time,
    /// It is for another name.
    Name,
    /// Nobody whom we trust has issued it.
    Issuer,
    /// It is not to be trusted for another reason.
    Certificate,
    /// The server wants a certificate of ours.
    Unknown,
    /// The server does not want ours.
    Refused,
    /// That is no TLS.
    Plain,
}

impl Fault {
    /// What an error is about, if it is about that, and what it says.
    pub(crate) fn of(error: &(dyn std::error::Error + 'static)) -> Option<(Self, String)> {
        let mut next = Some(error);
        while let Some(error) = next {
            // An I/O error holds the error it was made of beside its sources.
            let inner = error.downcast_ref::<io::Error>().and_then(|io| io.get_ref()?.downcast_ref::<Error>());
            if let Some(tls) = inner.or_else(|| error.downcast_ref::<Error>()) {
                return Self::of_tls(tls).map(|fault| (fault, tls.to_string()));
            }
            next = error.source();
        }
        None
    }

    fn of_tls(error: &Error) -> Option<Self> {
        use AlertDescription as Alert;
        Some(match error {
            Error::InvalidCertificate(why) => match why {
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. } => Self::Time,
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => Self::Name,
                // The latter: somebody of the same name as the issuer that is trusted.
                CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::Issuer,
                _ => Self::Certificate,
            },
            Error::AlertReceived(Alert::CertificateRequired) => Self::Unknown,
            Error::AlertReceived(
                Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied,
            ) => Self::Refused,
            Error::InvalidMessage(_) => Self::Plain,
            _ => return None,
        })
    }

    /// What to do about the broker's.
    pub(crate) fn cure_of_broker(self) -> &'static str {
        match self {
            Self::Time => "renew the broker's certificate, or set the clock right",
            Self::Name => "reach the broker by a name in its certificate, or have one issued for this name",
            Self::Issuer => "set AMQP_CA_FILE to the certificate of the CA that issued the broker's",
            Self::Certificate => "correct the broker's certificate, or AMQP_CA_FILE",
            Self::Unknown => "set AMQP_CERT_FILE and AMQP_KEY_FILE, as the broker asks for a client's certificate",
            Self::Refused => "renew AMQP_CERT_FILE and AMQP_KEY_FILE, or have the broker trust who issued them",
            Self::Plain => "use the broker's TLS port in AMQP_URL",
        }
    }

    /// What to do about PostgreSQL's.
    pub(crate) fn cure_of_postgres(self) -> &'static str {
        match self {
            Self::Time => "renew the server's certificate, or set the clock right",
            Self::Name => "reach the server by a name in its certificate, or have one issued for this name",
            Self::Issuer => "set sslrootcert in DATABASE_URL to the certificate of the CA that issued the server's",
            Self::Certificate => "correct the server's certificate, or sslrootcert in DATABASE_URL",
            Self::Unknown => "set sslcert and sslkey in DATABASE_URL, as the server asks for a client's certificate",
            Self::Refused => "renew sslcert and sslkey of DATABASE_URL, or have the server trust who issued them",
            Self::Plain => "switch TLS on there, or correct the port in DATABASE_URL",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_that_cannot_be_used_is_described_and_never_quoted() {
        let secret = b"-----BEGIN PRIVATE KEY-----\naHVudGVyMg==\n-----END PRIVATE KEY-----\n";
        let said = verifier(Some(secret)).expect_err("no certificate");
        assert_eq!(said, "it holds no certificate in PEM");
        for pem in [&b"hunter2"[..], b"", b"-----BEGIN CERTIFICATE-----\nhunter2"] {
            let said = format!("{:?} {:?}", verifier(Some(pem)).err(), identity(pem, secret).err());
            assert!(!said.contains("hunter") && said.contains("PEM"), "{said}");
        }
        let garbage = b"-----BEGIN CERTIFICATE-----\naHVudGVyMg==\n-----END CERTIFICATE-----\n";
        assert!(verifier(Some(garbage)).is_err_and(|said| said == "it holds no certificate of an issuer"));
        assert!(matches!(identity(garbage, b"hunter2"), Err(Unfit::Key(said)) if !said.contains("hunter2")));
    }

    #[test]
    fn a_refusal_is_found_behind_io_errors() {
        let expired = Error::InvalidCertificate(CertificateError::Expired);
        let io = io::Error::new(io::ErrorKind::InvalidData, expired);
        assert!(matches!(Fault::of(&io), Some((Fault::Time, said)) if said.contains("Expired")));
        assert!(Fault::of(&io::Error::from(io::ErrorKind::ConnectionReset)).is_none());
        let alert = Error::AlertReceived(AlertDescription::CertificateRequired);
        assert!(matches!(Fault::of(&alert), Some((Fault::Unknown, _))));
        assert!(Fault::of(&Error::AlertReceived(AlertDescription::InternalError)).is_none(), "it may pass");
    }
}
