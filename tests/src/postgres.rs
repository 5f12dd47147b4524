//! A real PostgreSQL: a fresh database on the shared private server, or on one that a test may break.
use crate::broker::{root, scratch};
use anyhow::{Context, anyhow, ensure};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};
use tokio::runtime::Runtime;

/// A database of this test's own, and its server.
#[derive(Debug)]
pub struct Postgres {
    url: String,
    name: String,
    /// The server as somebody who may create databases there: its superuser, but where DATABASE_URL names the server.
    admin: String,
    /// The directory of a private server.
    dir: Option<PathBuf>,
    /// Tests ask often: a connection, kept until it breaks.
    asking: Mutex<Option<tokio_postgres::Client>>,
}

impl Postgres {
    /// A fresh database on the server that all tests share: the one of DATABASE_URL, else the one that `scripts/test` has started
    /// and names in WARREN_TEST_POSTGRES_ADMIN, else one that is started here.
    ///
    /// # Errors
    /// The server cannot be had.
    pub fn shared(name: &str) -> anyhow::Result<Self> {
        Self::on(None, name)
    }

    /// A fresh database on a server of its own, which the test may break.
    ///
    /// # Errors
    /// The server cannot be had.
    pub fn private(name: &str) -> anyhow::Result<Self> {
        Self::on(Some(scratch().join(format!("postgres-{name}"))), name)
    }

    fn on(dir: Option<PathBuf>, name: &str) -> anyhow::Result<Self> {
        let (url, admin, asking) = (String::new(), String::new(), Mutex::default());
        let mut postgres = Self { url, name: name.into(), admin, dir, asking };
        if postgres.dir.is_some() {
            postgres.script(&["stop", "--wipe", "--immediate"]).ok();
        }
        let named = std::env::var("WARREN_TEST_POSTGRES_ADMIN").ok().filter(|url| !url.is_empty());
        let mut user = "warren:warren".to_owned();
        postgres.admin = match (&postgres.dir, given(), named) {
            (None, Some(given), _) => {
                let (_, rest) = given.split_once("://").context("DATABASE_URL is no URL")?;
                user = rest.split_once('@').context("DATABASE_URL names no user")?.0.to_owned();
                given
            }
            (None, None, Some(named)) => named,
            _ => {
                postgres.start()?;
                postgres.script(&["url", "--superuser"])?
            }
        };
        let (server, _) = postgres.admin.rsplit_once('/').context("a URL with a database")?;
        let place = server.rsplit_once('@').context("a URL with a user")?.1;
        postgres.url = format!("postgres://{user}@{place}/{name}");
        let (role, _) = user.split_once(':').unwrap_or((&user, ""));
        // One at a time: neither may stand in a transaction.
        ask(&postgres.admin, &format!("DROP DATABASE IF EXISTS \"{name}\" WITH (FORCE)"))?;
        ask(&postgres.admin, &format!("CREATE DATABASE \"{name}\" OWNER {role}"))?;
        Ok(postgres)
    }

    /// `postgres://user:password@host:port/database`; the user owns the database and is no superuser.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A connection, kept going until its client is dropped.
    ///
    /// # Errors
    /// The server does not take it.
    pub async fn client(&self) -> anyhow::Result<tokio_postgres::Client> {
        connect(&self.url).await
    }

    /// A number that a query answers with; from wherever, as it waits on threads of its own.
    ///
    /// # Errors
    /// The server does not take it, or answers with something else.
    pub fn number(&self, sql: &str) -> anyhow::Result<i64> {
        let kept = self.asking.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (client, number) = wait(async {
            let client = match kept.filter(|client| !client.is_closed()) {
                Some(client) => client,
                None => connect(&self.url).await?,
            };
            let number = ask_on(&client, sql).await?;
            Ok((client, number))
        })?;
        *self.asking.lock().unwrap_or_else(PoisonError::into_inner) = Some(client);
        number.context("no number")
    }

    /// Statements of the superuser, in this database.
    ///
    /// # Errors
    /// What the server said.
    pub fn superuser(&self, sql: &str) -> anyhow::Result<()> {
        ensure!(self.dir.is_some() || given().is_none(), "of a server that DATABASE_URL names, no superuser is known");
        let (server, _) = self.admin.rsplit_once('/').context("a URL with a database")?;
        wait(async { Ok(connect(&format!("{server}/{}", self.name)).await?.batch_execute(sql).await?) })
    }

    /// More settings for a private server, and files beside its data; it is started again.
    ///
    /// # Errors
    /// It does not come up.
    pub fn set(&self, conf: &str, files: &[(&str, &[u8])]) -> anyhow::Result<()> {
        let dir = self.dir.as_ref().context("only a private server is set")?;
        self.stop()?;
        std::fs::write(dir.join("conf.d/test.conf"), conf)?;
        let owner = std::fs::metadata(dir.join("pg"))?;
        for (name, content) in files {
            use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
            let path = dir.join("pg").join(name);
            std::fs::write(&path, content)?;
            // The server refuses a key that others may read.
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            chown(&path, Some(owner.uid()), Some(owner.gid()))?;
        }
        self.start()
    }

    /// The URL of a read-only copy of a private server, which is started here and ends with it.
    ///
    /// # Errors
    /// It does not come up.
    pub fn replica(&self) -> anyhow::Result<String> {
        ensure!(self.dir.is_some(), "only a private server has one");
        self.script(&["replica", "start"])?;
        let url = self.script(&["replica", "url"])?;
        let (server, _) = url.rsplit_once('/').context("a URL with a database")?;
        Ok(format!("{server}/{}", self.name))
    }

    /// Starts a private server that was stopped or killed.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(&self) -> anyhow::Result<()> {
        self.script(&["start"]).map(|_| ())
    }

    /// Stops a private server: its clients are told.
    ///
    /// # Errors
    /// It does not stop.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.breaking("stop")
    }

    /// Stops a private server at once: it recovers when it starts again.
    ///
    /// # Errors
    /// It does not stop.
    pub fn stop_immediately(&self) -> anyhow::Result<()> {
        ensure!(self.dir.is_some(), "only a private server may be broken");
        self.script(&["stop", "--immediate"]).map(|_| ())
    }

    /// Kills a private server with SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&self) -> anyhow::Result<()> {
        self.breaking("kill")
    }

    /// Stops a private server in its tracks (SIGSTOP): it is there and does not answer.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze(&self) -> anyhow::Result<()> {
        self.breaking("freeze")
    }

    /// Lets a frozen server go on.
    ///
    /// # Errors
    /// It does not run.
    pub fn thaw(&self) -> anyhow::Result<()> {
        self.breaking("thaw")
    }

    fn breaking(&self, command: &str) -> anyhow::Result<()> {
        ensure!(self.dir.is_some(), "only a private server may be broken");
        self.script(&[command]).map(|_| ())
    }

    fn script(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(root().join("scripts/postgres"));
        if let Some(dir) = &self.dir {
            command.arg("--dir").arg(dir);
        }
        let output = command.args(arguments).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "scripts/postgres {arguments:?}: {said}");
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // A shared server goes on without this database; a private one ends with the test, and its data with it.
        if self.dir.is_some() {
            self.script(&["stop", "--wipe", "--immediate"]).ok();
        } else {
            ask(&self.admin, &format!("DROP DATABASE IF EXISTS \"{}\" WITH (FORCE)", self.name)).ok();
        }
    }
}

/// The server that `DATABASE_URL` names: its user must be allowed to create databases.
fn given() -> Option<String> {
    std::env::var("DATABASE_URL").ok().filter(|url| url.starts_with("postgres"))
}

async fn connect(url: &str) -> anyhow::Result<tokio_postgres::Client> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(client)
}

/// Asks for a number, if there is an answer.
fn ask(url: &str, sql: &str) -> anyhow::Result<Option<i64>> {
    wait(async { ask_on(&connect(url).await?, sql).await })
}

async fn ask_on(client: &tokio_postgres::Client, sql: &str) -> anyhow::Result<Option<i64>> {
    Ok(client.query_typed(sql, &[]).await?.first().map(|row| row.try_get(0)).transpose()?)
}

/// Waits from wherever, also inside of a runtime, on a thread of its own.
fn wait<T: Send>(asked: impl Future<Output = anyhow::Result<T>> + Send) -> anyhow::Result<T> {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
    });
    std::thread::scope(|scope| scope.spawn(|| RUNTIME.block_on(asked)).join()).map_err(|_| anyhow!("it panicked"))?
}
