//! A real PostgreSQL: a fresh database on the shared private server, or on one that a test may break.
use crate::broker::{root, scratch};
use anyhow::{Context, ensure};
use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;
use tokio::runtime::Runtime;

/// A database of this test's own, and its server.
#[derive(Debug)]
pub struct Postgres {
    url: String,
    name: String,
    /// The directory of a private server.
    dir: Option<PathBuf>,
}

impl Postgres {
    /// A fresh database on the server that all tests share: started here if it does not run.
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
        let mut postgres = Self { url: String::new(), name: name.into(), dir };
        if let (None, Some(server)) = (&postgres.dir, given()) {
            let (place, _) = server.rsplit_once('/').context("DATABASE_URL names no database")?;
            postgres.url = format!("{place}/{name}");
            for sql in
                [format!("DROP DATABASE IF EXISTS \"{name}\" WITH (FORCE)"), format!("CREATE DATABASE \"{name}\"")]
            {
                ask(&server, &sql)?;
            }
            return Ok(postgres);
        }
        if postgres.dir.is_some() {
            postgres.script(&["stop", "--wipe", "--immediate"]).ok();
        }
        postgres.start()?;
        let url = postgres.script(&["url"])?;
        let (server, _) = url.rsplit_once('/').context("a URL with a database")?;
        postgres.url = format!("{server}/{name}");
        let drop = format!("DROP DATABASE IF EXISTS \"{name}\" WITH (FORCE)");
        let create = format!("CREATE DATABASE \"{name}\" OWNER warren");
        postgres.script(&["psql", "-qc", &drop, "-c", &create])?;
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
        let (client, connection) = tokio_postgres::connect(&self.url, tokio_postgres::NoTls).await?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(client)
    }

    /// A number that a query answers with; from wherever, as it waits on threads of its own.
    ///
    /// # Errors
    /// The server does not take it, or answers with something else.
    pub fn number(&self, sql: &str) -> anyhow::Result<i64> {
        ask(&self.url, sql)?.context("no number")
    }

    /// Statements of the superuser, in this database.
    ///
    /// # Errors
    /// What the server said.
    pub fn superuser(&self, sql: &str) -> anyhow::Result<()> {
        ensure!(self.dir.is_some() || given().is_none(), "of a server that DATABASE_URL names, no superuser is known");
        self.script(&["psql", "-qd", &self.name, "-v", "ON_ERROR_STOP=1", "-c", sql]).map(|_| ())
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
        } else if let Some(server) = given() {
            ask(&server, &format!("DROP DATABASE IF EXISTS \"{}\" WITH (FORCE)", self.name)).ok();
        } else {
            let drop = format!("DROP DATABASE IF EXISTS \"{}\" WITH (FORCE)", self.name);
            self.script(&["psql", "-qc", &drop]).ok();
        }
    }
}

/// The server that `DATABASE_URL` names: its user must be allowed to create databases.
fn given() -> Option<String> {
    std::env::var("DATABASE_URL").ok().filter(|url| url.starts_with("postgres"))
}

/// Asks for a number, if there is an answer; from wherever, as it waits on threads of its own.
fn ask(url: &str, sql: &str) -> anyhow::Result<Option<i64>> {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
    });
    let (url, sql) = (url.to_owned(), sql.to_owned());
    let (tell, told) = std::sync::mpsc::channel();
    RUNTIME.spawn(async move {
        let asked = async {
            let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await?;
            tokio::spawn(connection);
            anyhow::Ok(client.query_typed(&sql, &[]).await?.first().map(|row| row.try_get(0)).transpose()?)
        };
        let _ = tell.send(asked.await);
    });
    told.recv()?
}
