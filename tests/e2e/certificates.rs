//! Certificates of a CA that exists for one test.
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use std::path::{Path, PathBuf};

/// A CA.
#[derive(Debug)]
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate, as PEM.
    pub(crate) pem: String,
}

/// A certificate and its private key, as PEM.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    /// The certificate.
    pub(crate) cert: String,
    /// The key.
    pub(crate) key: String,
}

impl Authority {
    /// A new one of this name.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn new(name: &str) -> anyhow::Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// The certificate of a server of this name or address.
    ///
    /// # Errors
    /// That is no name.
    pub(crate) fn server(&self, name: &str) -> anyhow::Result<Pair> {
        self.issue(CertificateParams::new([name.to_owned()])?, name)
    }

    /// The same, but no longer valid.
    ///
    /// # Errors
    /// That is no name.
    pub(crate) fn expired(&self, name: &str) -> anyhow::Result<Pair> {
        let mut params = CertificateParams::new([name.to_owned()])?;
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
        self.issue(params, name)
    }

    /// The certificate of a client whose common name is this.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn client(&self, name: &str) -> anyhow::Result<Pair> {
        self.issue(CertificateParams::default(), name)
    }

    fn issue(&self, mut params: CertificateParams, name: &str) -> anyhow::Result<Pair> {
        params.distinguished_name = Default::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        Ok(Pair { cert: params.signed_by(&key, &self.issuer)?.pem(), key: key.serialize_pem() })
    }
}

impl Pair {
    /// Writes `NAME.pem` and `NAME.key` into a directory; returns their paths.
    ///
    /// # Errors
    /// They cannot be written.
    pub(crate) fn write(&self, dir: &Path, name: &str) -> anyhow::Result<(PathBuf, PathBuf)> {
        let (cert, key) = (dir.join(format!("{name}.pem")), dir.join(format!("{name}.key")));
        std::fs::write(&cert, &self.cert)?;
        std::fs::write(&key, &self.key)?;
        Ok((cert, key))
    }
}
