//! A real RabbitMQ: the shared private node, or one that a test may break.
use anyhow::{Context, bail, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The administrator of a private node: user and password.
const ADMIN: (&str, &str) = ("guest", "guest");

/// A broker and its management interface.
#[derive(Debug)]
pub struct Rabbit {
    /// `amqp://guest:guest@127.0.0.1:port`, without a vhost.
    pub amqp: String,
    /// `http://127.0.0.1:port`; of a cluster each node's.
    pub management: Vec<String>,
    /// The other nodes of a cluster, as `amqp`.
    pub others: Vec<String>,
    /// The directory of a private node.
    dir: Option<PathBuf>,
}

/// The repository.
#[must_use]
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or_else(|| Path::new("."))
}

/// Where tests write: inside cargo's target directory.
#[must_use]
pub fn scratch() -> PathBuf {
    // A binary is target/<profile>/<name>, a test's target/<profile>/deps/<name>.
    let exe = std::env::current_exe().unwrap_or_default();
    let dir = exe.parent().filter(|dir| dir.ends_with("deps")).unwrap_or(&exe);
    let target = dir.ancestors().nth(2).map_or_else(|| root().join("target"), Path::to_path_buf);
    target.join("e2e")
}

fn script(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(root().join("scripts/rabbitmq")).args(arguments).output()?;
    ensure!(output.status.success(), "scripts/rabbitmq {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn without_vhost(url: &str) -> String {
    let authority = url.find("://").map_or(0, |at| at + 3);
    let end = url[authority..].find('/').map_or(url.len(), |at| authority + at);
    url[..end].to_owned()
}

impl Rabbit {
    /// The broker that all tests share: the one that `scripts/test` has started and names in WARREN_TEST_AMQP and
    /// WARREN_TEST_MANAGEMENT, else one that is started here. `WARREN_TEST_BROKER` names its version.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn shared() -> anyhow::Result<Self> {
        let named = |variable: &str| std::env::var(variable).ok().filter(|value| !value.is_empty());
        let (amqp, management) = match (named("WARREN_TEST_AMQP"), named("WARREN_TEST_MANAGEMENT")) {
            (Some(amqp), Some(management)) => (amqp, management),
            _ => {
                let version = named("WARREN_TEST_BROKER");
                let with = |command: &'static str| {
                    let mut arguments = command.split(' ').collect::<Vec<_>>();
                    arguments.extend(version.iter().flat_map(|version| ["--version", version]));
                    script(&arguments)
                };
                (with("start")?, with("url --management")?)
            }
        };
        Ok(Self { amqp: without_vhost(&amqp), management: vec![management], others: Vec::new(), dir: None })
    }

    /// A node of its own, which the test may kill.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn private(name: &str) -> anyhow::Result<Self> {
        let dir = scratch().join(format!("broker-{name}"));
        let mut rabbit = Self::at(dir);
        rabbit.script("stop --wipe").ok();
        rabbit.start()?;
        rabbit.amqp = without_vhost(&rabbit.script("url")?);
        rabbit.management = vec![rabbit.script("url --management")?];
        Ok(rabbit)
    }

    /// A node of its own with settings for its `rabbitmq.conf`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn private_with(name: &str, conf: &str) -> anyhow::Result<Self> {
        Self::private_with_files(name, &[("test.conf", conf)])
    }

    /// A node of its own with these files in its `conf.d`: settings in `*.conf`, more plugins in `plugins`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn private_with_files(name: &str, files: &[(&str, &str)]) -> anyhow::Result<Self> {
        let dir = scratch().join(format!("broker-{name}"));
        let mut rabbit = Self::at(dir.clone());
        rabbit.script("stop --wipe").ok();
        std::fs::create_dir_all(dir.join("conf.d"))?;
        for (file, text) in files {
            std::fs::write(dir.join("conf.d").join(file), text)?;
        }
        rabbit.start()?;
        rabbit.amqp = without_vhost(&rabbit.script("url")?);
        rabbit.management = vec![rabbit.script("url --management")?];
        Ok(rabbit)
    }

    /// A cluster of three nodes of its own.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn cluster(name: &str) -> anyhow::Result<Self> {
        let mut rabbit = Self::at(scratch().join(format!("cluster-{name}")));
        rabbit.script("cluster stop --wipe").ok();
        rabbit.script("cluster start")?;
        let urls = rabbit.script("cluster url")?;
        let mut urls = urls.split(',').map(|url| without_vhost(url.trim()));
        rabbit.amqp = urls.next().unwrap_or_default();
        rabbit.others = urls.collect();
        let management = rabbit.script("cluster url --management")?;
        rabbit.management = management.split(',').map(|url| url.trim().to_owned()).collect();
        Ok(rabbit)
    }

    fn at(dir: PathBuf) -> Self {
        Self { amqp: String::new(), management: Vec::new(), others: Vec::new(), dir: Some(dir) }
    }

    /// Runs `scripts/rabbitmq cluster …` on a cluster of its own.
    ///
    /// # Errors
    /// What it printed.
    pub fn cluster_do(&self, command: &str) -> anyhow::Result<String> {
        self.script(&format!("cluster {command}"))
    }

    /// Waits until every node runs and any one of them could be missed.
    ///
    /// # Errors
    /// That does not come to be in time.
    pub async fn whole(&self, patience: Duration) -> anyhow::Result<()> {
        let started = Instant::now();
        let safe =
            |node: &String| Self::api_of(node, ADMIN, "GET", "health/checks/node-is-quorum-critical", None).is_ok();
        while !self.management.iter().all(safe) {
            ensure!(started.elapsed() < patience, "the cluster is not whole within {patience:?}");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(())
    }

    fn script(&self, command: &str) -> anyhow::Result<String> {
        let dir = self.dir.as_ref().context("only a private broker may be broken")?;
        let dir = dir.to_str().context("a path of UTF-8")?;
        let version = std::env::var("WARREN_TEST_BROKER").unwrap_or_default();
        let mut arguments: Vec<&str> = command.split(' ').collect();
        arguments.extend(["--dir", dir]);
        if !version.is_empty() {
            arguments.extend(["--version", &version]);
        }
        script(&arguments)
    }

    /// Starts a private node that was stopped or killed.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(&self) -> anyhow::Result<()> {
        self.script("start").map(|_| ())
    }

    /// Stops a private node in order.
    ///
    /// # Errors
    /// It does not stop.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.script("stop").map(|_| ())
    }

    /// Kills a private node with SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&self) -> anyhow::Result<()> {
        self.script("kill").map(|_| ())
    }

    /// Stops a private node in its tracks (SIGSTOP): it is there and does not answer.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze(&self) -> anyhow::Result<()> {
        self.script("freeze").map(|_| ())
    }

    /// Lets a frozen node go on.
    ///
    /// # Errors
    /// It does not run.
    pub fn thaw(&self) -> anyhow::Result<()> {
        self.script("thaw").map(|_| ())
    }

    /// Runs rabbitmqctl on a private node.
    ///
    /// # Errors
    /// What it printed.
    pub fn ctl(&self, command: &str) -> anyhow::Result<String> {
        let dir = self.dir.as_ref().context("only a private broker may be changed")?;
        let mut arguments = vec!["ctl", "--dir", dir.to_str().context("a path of UTF-8")?];
        arguments.extend(command.split(' '));
        script(&arguments)
    }

    /// Asks the management interface. `path` begins after `/api/`.
    ///
    /// # Errors
    /// The broker answers with an error, or not at all.
    pub fn api(&self, method: &str, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
        let mut answer = Err(anyhow::anyhow!("no broker runs"));
        // Of a cluster the first node that answers.
        for management in &self.management {
            answer = Self::api_of(management, ADMIN, method, path, body.clone());
            if answer.is_ok() {
                break;
            }
        }
        answer
    }

    /// The same, for another user than the administrator.
    ///
    /// # Errors
    /// The broker answers with an error, or not at all.
    pub fn api_as(&self, user: (&str, &str), method: &str, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
        let management = self.management.first().context("a management interface")?;
        Self::api_of(management, user, method, path, body)
    }

    fn api_of(
        management: &str,
        (user, password): (&str, &str),
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<Value> {
        use base64::Engine as _;
        let url = format!("{management}/api/{path}");
        let auth = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")));
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(std::time::Duration::from_secs(20)))
            .build();
        let agent: ureq::Agent = config.into();
        let request = ureq::http::Request::builder().method(method).uri(&url).header("authorization", auth);
        let mut response = match body {
            Some(body) => {
                let request = request.header("content-type", "application/json").body(body.to_string())?;
                agent.run(request)?
            }
            None if method == "GET" || method == "DELETE" => agent.run(request.body(())?)?,
            None => agent.run(request.header("content-type", "application/json").body("{}".to_owned())?)?,
        };
        let text = response.body_mut().read_to_string()?;
        if !response.status().is_success() {
            bail!("{method} {path}: {} {text}", response.status());
        }
        Ok(if text.is_empty() { Value::Null } else { serde_json::from_str(&text)? })
    }
}

impl Drop for Rabbit {
    fn drop(&mut self) {
        // A shared node goes on; a private one ends with the test, and its data with it.
        match (&self.dir, self.others.is_empty()) {
            (None, _) => {}
            (Some(_), true) => {
                self.script("kill").ok();
                self.script("stop --wipe").ok();
            }
            (Some(_), false) => {
                (1..=3).for_each(|node| drop(self.cluster_do(&format!("kill {node}"))));
                self.cluster_do("stop --wipe").ok();
            }
        }
    }
}
