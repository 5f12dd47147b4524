//! How the broker is reached: a URL, and single parts that stand in for its own.
//!
//! The parts are taken as they are, nothing in them is percent-encoded: a password may hold any character.
use crate::env::Mistake;
use crate::secret::Secret;

/// How the broker is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Amqp {
    /// `amqp://user:password@host:port/vhost`; of a cluster several, by comma.
    pub url: Secret,
    /// Hosts in place of that of each URL.
    pub hosts: Vec<String>,
    /// The port in place of that of each URL.
    pub port: Option<u16>,
    /// The vhost in place of that of each URL.
    pub vhost: Option<String>,
    /// The user in place of that of each URL.
    pub user: Option<Secret>,
    /// The password in place of that of each URL.
    pub password: Option<Secret>,
    /// Certificates (PEM) of the only issuers that are trusted; none = those that this system trusts.
    pub ca: Option<Secret>,
    /// Our certificate and its chain (PEM).
    pub cert: Option<Secret>,
    /// The private key to it (PEM).
    pub key: Option<Secret>,
}

impl From<Secret> for Amqp {
    fn from(url: Secret) -> Self {
        let (user, password, ca, cert, key) = (None, None, None, None, None);
        Self { url, hosts: Vec::new(), port: None, vhost: None, user, password, ca, cert, key }
    }
}

/// The parameters of a URL that mean something.
const PARAMETERS: [&str; 5] = ["auth_mechanism", "channel_max", "connection_timeout", "frame_max", "heartbeat"];

/// One URL, and the host in place of its own.
pub type Node<'a> = (&'a str, Option<&'a str>);

impl Amqp {
    /// The nodes, each once.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node<'_>> {
        let mut nodes = Vec::new();
        for url in self.urls() {
            let hosts = self.hosts.iter().map(|host| Some(host.as_str()));
            let own = self.hosts.is_empty().then_some(None);
            for node in hosts.chain(own).map(|host| (url, host)) {
                if !nodes.contains(&node) {
                    nodes.push(node);
                }
            }
        }
        nodes
    }

    /// All that may be rotated, by the variable's name.
    pub fn secrets(&mut self) -> impl Iterator<Item = &mut Secret> {
        let Self { url, user, password, ca, cert, key, .. } = self;
        [Some(url), user.as_mut(), password.as_mut(), ca.as_mut(), cert.as_mut(), key.as_mut()].into_iter().flatten()
    }

    /// What contradicts itself. A half of the credentials never becomes guest's, and what was made for TLS never goes in
    /// plain.
    #[must_use]
    pub fn mistakes(&self) -> Vec<Mistake> {
        let mut mistakes = Vec::new();
        let mut mistake = |variable: String, problem: &str| {
            let mistake = Mistake { variable, problem: problem.into() };
            if !mistakes.contains(&mistake) {
                mistakes.push(mistake);
            }
        };
        let url_variable = || self.url.variable("AMQP_URL");
        for url in self.urls() {
            let Some(rest) = url.strip_prefix("amqp://").or(url.strip_prefix("amqps://")) else {
                mistake(url_variable(), "is not a URL of the form amqp://user:password@host:port/vhost");
                continue;
            };
            let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
            let login = authority.rsplit_once('@').map_or("", |(login, _)| login);
            let (user, password) = login.split_once(':').map_or((login, None), |(user, word)| (user, Some(word)));
            let external = rest.to_ascii_lowercase().contains("auth_mechanism=external");
            if !external && let (Some(user), None, None) = (&self.user, &self.password, password) {
                mistake(
                    user.variable("AMQP_USER"),
                    "has no password: set AMQP_PASSWORD or AMQP_PASSWORD_FILE, or write it into AMQP_URL",
                );
            }
            if let (None, Some(password), "") = (&self.user, &self.password, user) {
                mistake(
                    password.variable("AMQP_PASSWORD"),
                    "belongs to no user: set AMQP_USER, or write the user into AMQP_URL",
                );
            }
            let in_tls = url.starts_with("amqps://");
            for (name, secret) in [("AMQP_CA", &self.ca), ("AMQP_CERT", &self.cert), ("AMQP_KEY", &self.key)] {
                if let Some(secret) = secret
                    && !in_tls
                {
                    mistake(secret.variable(name), "is for TLS, which AMQP_URL does not ask for: write amqps:// there");
                }
            }
            if external && (!in_tls || self.cert.is_none()) {
                let problem = "asks for auth_mechanism=external, a login by certificate: write amqps:// and set \
                               AMQP_CERT_FILE and AMQP_KEY_FILE";
                mistake(url_variable(), problem);
            }
        }
        match (&self.cert, &self.key) {
            (Some(cert), None) => mistake(cert.variable("AMQP_CERT"), "takes its private key: set AMQP_KEY_FILE"),
            (None, Some(key)) => mistake(key.variable("AMQP_KEY"), "takes its certificate: set AMQP_CERT_FILE"),
            _ => {}
        }
        mistakes
    }

    /// What in the URLs changes nothing, each a sentence: parameters that other clients know.
    #[must_use]
    pub fn ignored(&self) -> Vec<String> {
        let mut all = Vec::new();
        for url in self.urls() {
            let parameters = url.split_once('?').map_or("", |(_, rest)| rest.split('#').next().unwrap_or_default());
            for parameter in parameters.split('&').filter(|parameter| !parameter.is_empty()) {
                let name = parameter.split('=').next().unwrap_or_default();
                if PARAMETERS.contains(&name) {
                    continue;
                }
                let cure = match name {
                    "cacertfile" | "certfile" | "keyfile" | "verify" | "ssl_options" => {
                        "; certificates are named by AMQP_CA_FILE, AMQP_CERT_FILE and AMQP_KEY_FILE".to_owned()
                    }
                    _ => format!("; known are {}", PARAMETERS.join(", ")),
                };
                // What is no name may be a part of a password.
                let is_name = name.len() <= 40 && name.chars().all(|c| c.is_ascii_alphabetic() || c == '_');
                let shown = if is_name && !parameters.contains('@') { format!("'{name}'") } else { "one".to_owned() };
                let said = format!("the parameter {shown} is not known and changes nothing{cure}");
                if !all.contains(&said) {
                    all.push(said);
                }
            }
        }
        all
    }

    fn urls(&self) -> impl Iterator<Item = &str> {
        self.url.reveal().split(',').map(str::trim)
    }
}

/// Reads a list of hosts.
pub(crate) fn hosts(value: &str) -> Result<Vec<String>, String> {
    let host = |host: &str| {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let is_address = bare.parse::<std::net::IpAddr>().is_ok();
        let legal = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_');
        if bare.is_empty() || !is_address && !bare.chars().all(legal) {
            return Err(format!("'{host}' is not a host: write names or addresses by comma, the port in AMQP_PORT"));
        }
        Ok(bare.to_owned())
    };
    value.split(',').map(str::trim).filter(|part| !part.is_empty()).map(host).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::Settings;

    fn read(pairs: &[(&str, &str)]) -> Result<Amqp, Vec<String>> {
        let map = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Settings::read(&map).map(|s| s.amqp).map_err(|all| all.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn an_empty_environment_is_guest_on_this_machine() {
        let amqp = read(&[("AMQP_HOST", ""), ("AMQP_USER", ""), ("AMQP_CA", "")]).expect("valid");
        assert_eq!(amqp, Amqp::from(Secret::new("amqp://guest:guest@127.0.0.1:5672/%2f")));
        assert_eq!(amqp.nodes(), [("amqp://guest:guest@127.0.0.1:5672/%2f", None)]);
    }

    #[test]
    fn each_host_stands_in_every_url_once() {
        let amqp = read(&[("AMQP_URL", "amqp://a/x,amqp://b/x, amqp://a/x"), ("AMQP_HOST", "n1, [::1],n1")]);
        let amqp = amqp.expect("valid");
        let nodes = [("amqp://a/x", "n1"), ("amqp://a/x", "::1"), ("amqp://b/x", "n1"), ("amqp://b/x", "::1")];
        assert_eq!(amqp.nodes(), nodes.map(|(url, host)| (url, Some(host))));
    }

    #[test]
    fn a_user_alone_is_never_guest_and_neither_is_a_password() {
        let user = |url: &str| read(&[("AMQP_URL", url), ("AMQP_USER", "shop")]).expect_err(url);
        for url in ["amqp://host/v", "amqp://guest@host/v", ""] {
            assert_eq!(user(url).len(), 1);
            assert!(user(url)[0].starts_with("AMQP_USER: has no password"), "{url}");
        }
        let password = read(&[("AMQP_PASSWORD", "hunter2")]).expect_err("whose?");
        assert!(password[0].starts_with("AMQP_PASSWORD: belongs to no user"), "{password:?}");
        assert!(read(&[("AMQP_URL", "amqp://shop@host"), ("AMQP_PASSWORD", "x")]).is_ok());
        assert!(read(&[("AMQP_URL", "amqp://guest:old@host"), ("AMQP_USER", "shop")]).is_ok());
        let parts = read(&[("AMQP_USER", "shop"), ("AMQP_PASSWORD", "p@ss/%2f:#?")]).expect("valid");
        assert_eq!(parts.url.reveal(), "amqp://127.0.0.1:5672/%2f");
        assert_eq!(parts.password.expect("set").reveal(), "p@ss/%2f:#?");
    }

    #[test]
    fn what_is_for_tls_is_not_sent_in_plain_and_a_certificate_has_its_key() {
        let said = read(&[("AMQP_CA", "x"), ("AMQP_CERT", "hunter2")]).expect_err("plain");
        let wanted = ["AMQP_CA: is for TLS", "AMQP_CERT: is for TLS", "AMQP_CERT: takes its private key"];
        assert!(said.iter().zip(wanted).all(|(said, wanted)| said.starts_with(wanted)), "{said:?}");
        let mixed = [("AMQP_URL", "amqps://a,amqp://b"), ("AMQP_CA", "x")];
        assert_eq!(read(&mixed).expect_err("one in plain").len(), 1);
        for url in ["amqps://a/?auth_mechanism=external", "amqp://a/?auth_mechanism=EXTERNAL"] {
            let said = read(&[("AMQP_URL", url)]).expect_err("no certificate");
            assert!(said[0].starts_with("AMQP_URL: asks for auth_mechanism=external"), "{said:?}");
        }
        let external = [("AMQP_URL", "amqps://a/?auth_mechanism=external"), ("AMQP_CERT", "c"), ("AMQP_KEY", "k")];
        assert!(read(&external).is_ok());
    }

    #[test]
    fn parameters_that_change_nothing_are_named_and_no_password_is() {
        let said = |url: &str| read(&[("AMQP_URL", url)]).expect("valid").ignored().join("\n");
        assert_eq!(said("amqp://a/v?heartbeat=5&frame_max=8192&channel_max=9&connection_timeout=1000"), "");
        assert_eq!(said("amqp://a:b@c/v"), "");
        let other = said("amqp://a/v?hearbeat=5&frame_max=8192,amqp://b/v?hearbeat=5");
        assert_eq!(other.lines().count(), 1, "{other}");
        assert!(
            other.starts_with("the parameter 'hearbeat' is not known and changes nothing; known are auth"),
            "{other}"
        );
        assert!(said("amqps://a/v?cacertfile=/ca.pem").contains("AMQP_CA_FILE"));
        for url in ["amqp://a:1?hunter=2@host/v", "amqp://a/v?hunter2=%20"] {
            assert!(!said(url).contains("hunter"), "{}", said(url));
        }
    }

    #[test]
    fn a_wrong_part_is_named_with_the_cure_and_its_file() {
        let said = read(&[("AMQP_HOST", "rabbit:5672"), ("AMQP_PORT", "0"), ("AMQP_CA_FILE", "/ca"), ("AMQP_CA", "x")]);
        let said = said.expect_err("wrong").join("\n");
        for wanted in
            ["AMQP_HOST: 'rabbit:5672' is not a host", "AMQP_PORT: '0' is not a number", "AMQP_CA_FILE: is for"]
        {
            assert!(said.contains(wanted), "{wanted}: {said}");
        }
    }
}
