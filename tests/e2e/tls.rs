//! TLS with a CA of our own and clients' certificates, on a real broker and a real database: whoever is not who they ought to
//! be is refused at once, with a cure, and nothing is said in plain.
use crate::certificates::{Authority, Pair};
use anyhow::{Context, ensure};
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use warren_tests::process::expect_exit;
use warren_tests::raw::free_port;
use warren_tests::{Lab, Postgres, Rabbit, Tap, event, until};

const PATIENCE: Duration = Duration::from_secs(90);
/// What waiting does not cure is said sooner than that.
const CONNECT_TIMEOUT: &str = "60s";
const AT_ONCE: Duration = Duration::from_secs(30);

/// A broker that speaks with TLS clients alone that it knows, and a tap before it.
struct Site {
    lab: Lab,
    ca: Authority,
    dir: PathBuf,
    tap: Tap,
}

impl Site {
    async fn new(name: &str) -> anyhow::Result<Self> {
        let ca = Authority::new("ours")?;
        let dir = warren_tests::broker::scratch().join(format!("{name}-pki"));
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("ca.pem"), &ca.pem)?;
        let port = free_port()?;
        let conf = format!(
            "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {0}/ca.pem\nssl_options.certfile = {0}/server.pem\n\
             ssl_options.keyfile = {0}/server.key\nssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n\
             auth_mechanisms.1 = PLAIN\nauth_mechanisms.2 = EXTERNAL\nssl_cert_login_from = common_name\n",
            dir.display()
        );
        ca.server("127.0.0.1")?.write(&dir, "server")?;
        let files = [("test.conf", conf.as_str()), ("plugins", "rabbitmq_auth_mechanism_ssl\n")];
        let mut lab = Lab::on_broker(Rabbit::private_with_files(name, &files)?, name)?;
        let tap = Tap::before(port).await?;
        ca.client("shop")?.write(&dir, "client")?;
        lab.set("AMQP_URL", &format!("amqps://guest:guest@{}/{name}", tap.address));
        lab.set("WARREN_CONNECT_TIMEOUT", CONNECT_TIMEOUT);
        lab.set("AMQP_CA_FILE", &dir.join("ca.pem").display().to_string());
        lab.set("AMQP_CERT_FILE", &dir.join("client.pem").display().to_string());
        lab.set("AMQP_KEY_FILE", &dir.join("client.key").display().to_string());
        Ok(Self { lab, ca, dir, tap })
    }

    /// The broker shows this certificate from now on.
    fn serve(&self, pair: &Pair) -> anyhow::Result<()> {
        pair.write(&self.dir, "server")?;
        self.lab.rabbit.ctl("eval ssl:clear_pem_cache().").map(|_| ())
    }

    /// Every command is refused with all of these words, and the broker heard nothing but TLS.
    async fn refused(&self, code: i32, words: &[&str]) -> anyhow::Result<()> {
        let _ = self.tap.sent();
        for arguments in [&["run"][..], &["check"]] {
            let began = Instant::now();
            let (stdout, stderr) = expect_exit(&self.lab.run(arguments).await?, code)?;
            let all = stdout + &stderr;
            let missing: Vec<_> = words.iter().filter(|word| !all.contains(**word)).collect();
            ensure!(missing.is_empty(), "{arguments:?}: {missing:?} is not in:\n{all}");
            ensure!(began.elapsed() < AT_ONCE, "{:?}:\n{all}", began.elapsed());
        }
        nothing_in_plain(&self.tap.sent(), 0)
    }
}

/// After so many bytes there is nothing but TLS, and neither a protocol's header nor a login is anywhere.
fn nothing_in_plain(sent: &[u8], from: usize) -> anyhow::Result<()> {
    ensure!(sent.get(from).is_none_or(|first| *first == 0x16), "no TLS handshake: {:?}", sent.get(from..from + 8));
    for word in ["AMQP", "PLAIN", "guest", "warren"] {
        ensure!(!sent.windows(word.len()).any(|bytes| bytes == word.as_bytes()), "'{word}' was sent in plain");
    }
    Ok(())
}

#[tokio::test]
async fn a_broker_is_trusted_by_its_certificate_alone_on_its_own_broker() -> anyhow::Result<()> {
    let mut site = Site::new("tls-broker").await?;
    site.lab.declare().await?;
    let mut worker = site.lab.worker()?;
    site.lab.send(&[event("e", "order.placed", "k", json!({}))]).await?;
    site.lab.settled(1, PATIENCE).await?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    nothing_in_plain(&site.tap.sent(), 0)?;

    let good = site.ca.server("127.0.0.1")?;
    site.serve(&site.ca.expired("127.0.0.1")?)?;
    site.refused(69, &["expired", "renew the broker's certificate"]).await?;
    site.serve(&site.ca.server("rabbit.example")?)?;
    site.refused(69, &["rabbit.example", "reach the broker by a name in its certificate"]).await?;
    site.serve(&Authority::new("ours")?.server("127.0.0.1")?)?;
    site.refused(69, &["set AMQP_CA_FILE"]).await?;
    site.serve(&good)?;

    // Without AMQP_CA the system's issuers are asked, and ours is none of them.
    let ca = site.dir.join("ca.pem").display().to_string();
    site.lab.set("AMQP_CA_FILE", "");
    site.refused(69, &["set AMQP_CA_FILE"]).await?;
    // A CA that is trusted elsewhere is not trusted here.
    let other = site.lab.path("other.pem");
    std::fs::write(&other, Authority::new("theirs")?.pem)?;
    site.lab.set("AMQP_CA_FILE", &other.display().to_string());
    site.refused(69, &["set AMQP_CA_FILE"]).await?;
    site.lab.set("AMQP_CA_FILE", &ca);

    let (cert, key) = Authority::new("theirs")?.client("shop")?.write(&site.lab.dir, "stranger")?;
    site.lab.set("AMQP_CERT_FILE", &cert.display().to_string());
    site.lab.set("AMQP_KEY_FILE", &key.display().to_string());
    site.refused(69, &["have the broker trust who issued them"]).await?;
    site.lab.set("AMQP_CERT_FILE", "");
    site.refused(64, &["AMQP_KEY_FILE: takes its certificate"]).await?;
    site.lab.set("AMQP_KEY_FILE", "");
    site.refused(69, &["set AMQP_CERT_FILE and AMQP_KEY_FILE"]).await?;

    // PEM that cannot be read is a mistake in the configuration.
    site.lab.set("AMQP_CERT_FILE", &site.dir.join("client.pem").display().to_string());
    site.lab.set("AMQP_KEY_FILE", &site.dir.join("server.key").display().to_string());
    site.refused(64, &["AMQP_KEY_FILE: cannot be used: it is not the key to the certificate"]).await?;
    std::fs::write(&other, "no certificate")?;
    site.lab.set("AMQP_CA_FILE", &other.display().to_string());
    site.refused(64, &["AMQP_CA_FILE: cannot be used: it holds no certificate"]).await?;
    // What is made for TLS is not used in plain.
    site.lab.set("AMQP_URL", &format!("amqp://guest:guest@{}/tls-broker", site.tap.address));
    site.refused(64, &["AMQP_CA_FILE: is for TLS", "write amqps://"]).await
}

#[tokio::test]
async fn a_port_that_speaks_no_tls_is_named_and_hears_nothing_in_plain() -> anyhow::Result<()> {
    let mut lab = Lab::new("tls-plain-port")?;
    let (login, address) = lab.rabbit.amqp.rsplit_once('@').context("an address")?;
    let port = address.rsplit_once(':').context("a port")?.1.parse()?;
    let tap = Tap::before(port).await?;
    let url = format!("{}@{}/tls-plain-port", login.replace("amqp:", "amqps:"), tap.address);
    lab.set("AMQP_URL", &url);
    let (_, stderr) = expect_exit(&lab.run(&["run"]).await?, 69)?;
    ensure!(stderr.contains("use the broker's TLS port"), "{stderr}");
    nothing_in_plain(&tap.sent(), 0)
}

#[tokio::test]
async fn a_certificate_logs_in_as_its_common_name_on_its_own_broker() -> anyhow::Result<()> {
    let mut site = Site::new("tls-external").await?;
    let url = format!("amqps://{}/tls-external?auth_mechanism=external", site.tap.address);
    site.lab.set("AMQP_URL", &url);
    site.refused(69, &["takes no login by certificate", "create the user that the certificate names"]).await?;
    let rabbit = &site.lab.rabbit;
    rabbit.api("PUT", "users/shop", Some(json!({"password_hash": "", "tags": ""})))?;
    let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
    rabbit.api("PUT", "permissions/tls-external/shop", Some(all))?;
    let mut worker = site.lab.worker()?;
    until("it takes events", PATIENCE, || worker.log().contains("takes events")).await.with_context(|| worker.log())?;
    site.lab.send(&[event("e", "order.placed", "k", json!({}))]).await?;
    site.lab.settled(1, PATIENCE).await?;
    let users = || {
        let all = site.lab.rabbit.api("GET", "vhosts/tls-external/connections", None).unwrap_or_default();
        let ours = all.as_array().into_iter().flatten();
        ours.map(|c| (c["user"].clone(), c["auth_mechanism"].clone(), c["ssl"].clone())).collect::<Vec<_>>()
    };
    until("the connections are listed", PATIENCE, || !users().is_empty()).await?;
    let wanted = (json!("shop"), json!("EXTERNAL"), json!(true));
    ensure!(users().iter().all(|user| *user == wanted), "{:?}", users());
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    nothing_in_plain(&site.tap.sent(), 0)
}

#[tokio::test]
async fn a_worker_waits_for_a_certificate_to_be_renewed_on_its_own_broker() -> anyhow::Result<()> {
    let site = Site::new("tls-renewal").await?;
    site.lab.declare().await?;
    let mut worker = site.lab.worker()?;
    until("it takes events", PATIENCE, || worker.log().contains("takes events")).await.with_context(|| worker.log())?;
    // The broker's certificate expires, and connections end.
    site.serve(&site.ca.expired("127.0.0.1")?)?;
    // As far as the broker lists them already.
    let cut = || site.lab.close_connections("").is_ok();
    until("it says why", PATIENCE, || cut() && worker.log().contains("renew the broker's certificate")).await?;
    // The new one is another CA's, which only the file tells; and the client has got a new one, too.
    let next = Authority::new("next")?;
    std::fs::write(site.dir.join("ca.pem"), format!("{}{}", site.ca.pem, next.pem))?;
    next.client("shop")?.write(&site.dir, "client")?;
    site.serve(&next.server("127.0.0.1")?)?;
    site.lab.send(&[event("e", "order.placed", "k", json!({}))]).await?;
    site.lab.settled(1, PATIENCE).await?;
    ensure!(worker.is_running(), "{}", worker.log());
    ensure!(worker.log().contains("AMQP_CA_FILE: the file has a new value"), "{}", worker.log());
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    nothing_in_plain(&site.tap.sent(), 0)
}

#[tokio::test]
async fn an_own_database_is_trusted_by_its_certificate_alone() -> anyhow::Result<()> {
    let mut lab = Lab::new("tls-postgres")?.with_store(Postgres::private("tls-postgres")?);
    lab.set("WARREN_CONNECT_TIMEOUT", CONNECT_TIMEOUT);
    lab.declare().await?;
    let ca = Authority::new("ours")?;
    let url = lab.postgres.as_ref().context("a database")?.url().to_owned();
    let (login, place) = url.rsplit_once('@').context("a login")?;
    let (server, database) = place.split_once('/').context("a database")?;
    let tap = Tap::before(server.rsplit_once(':').context("a port")?.1.parse()?).await?;
    std::fs::write(lab.path("ca.pem"), &ca.pem)?;
    ca.client("warren")?.write(&lab.dir, "client")?;
    Authority::new("theirs")?.client("warren")?.write(&lab.dir, "stranger")?;
    let base = format!("{login}@{}/{database}?sslmode=verify-full", tap.address);
    let root = |file: &str| format!("&sslrootcert={}", lab.path(file).display());
    let own = |name: &str| format!("&sslcert={0}.pem&sslkey={0}.key", lab.path(name).display());
    let (trusted, client) = (root("ca.pem"), own("client"));
    std::fs::write(lab.path("garbage.pem"), "no certificate")?;
    let hba = "host all postgres 127.0.0.1/32 scram-sha-256\n\
               hostssl all warren 127.0.0.1/32 scram-sha-256 clientcert=verify-full\n";
    let conf = "ssl = on\nssl_cert_file = 'server.pem'\nssl_key_file = 'server.key'\nssl_ca_file = 'ca.pem'\n";
    let serve = |lab: &Lab, pair: &Pair| {
        let files = [
            ("server.pem", pair.cert.as_bytes()),
            ("server.key", pair.key.as_bytes()),
            ("ca.pem", ca.pem.as_bytes()),
            ("pg_hba.conf", hba.as_bytes()),
        ];
        lab.postgres.as_ref().context("a database")?.set(conf, &files)
    };
    let good = ca.server("127.0.0.1")?;
    let cases = [
        (&good, format!("{base}{trusted}{client}"), 0, ["ok       store", ""]),
        (
            &ca.expired("127.0.0.1")?,
            format!("{base}{trusted}{client}"),
            69,
            ["expired", "renew the server's certificate"],
        ),
        (
            &ca.server("db.example")?,
            format!("{base}{trusted}{client}"),
            69,
            ["db.example", "by a name in its certificate"],
        ),
        (
            &Authority::new("theirs")?.server("127.0.0.1")?,
            format!("{base}{trusted}{client}"),
            69,
            ["UnknownIssuer", "set sslrootcert in DATABASE_URL"],
        ),
        (&good, format!("{base}{trusted}"), 69, ["valid client certificate", "sslcert and sslkey"]),
        (&good, format!("{base}{trusted}{}", own("stranger")), 69, ["alert", "renew sslcert and sslkey"]),
        (&good, format!("{base}{}{client}", root("garbage.pem")), 64, ["garbage.pem", "it holds no certificate"]),
    ];
    let mut shown = "";
    for (server, url, code, words) in cases {
        if shown != server.cert {
            serve(&lab, server)?;
            shown = &server.cert;
        }
        lab.environment.retain(|(name, _)| name != "DATABASE_URL");
        lab.environment.push(("DATABASE_URL".into(), url));
        for command in if code == 0 { &["check"][..] } else { &["check", "run"] } {
            let began = Instant::now();
            let (stdout, stderr) = expect_exit(&lab.run(&[command]).await?, code).with_context(|| words.join(", "))?;
            let all = stdout + &stderr;
            ensure!(words.iter().all(|word| all.contains(word)), "{command}, wanted {words:?}:\n{all}");
            ensure!(began.elapsed() < AT_ONCE, "{:?}:\n{all}", began.elapsed());
        }
        // First the question whether there is TLS.
        nothing_in_plain(&tap.sent(), 8)?;
    }
    Ok(())
}
