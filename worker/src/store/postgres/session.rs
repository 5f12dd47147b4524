//! Connections to the database, and what its refusals mean for a call.
use crate::store::StoreError;
use deadpool_postgres::{Connect, Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime};
use futures_util::future::{BoxFuture, join3};
use std::ops::Deref;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Config, Row};
use warren_publisher::pace::paced;
use warren_publisher::postgres::{Postgres as Server, problem};

/// How long a call may take; the server is told less, so that it gives up first.
pub(super) static PATIENCE: LazyLock<Duration> = LazyLock::new(|| paced(Duration::from_secs(20)));
/// A statement's parameters.
pub(super) type Values<'a> = &'a [(&'a (dyn ToSql + Sync), Type)];

/// Connections, at most so many.
#[derive(Clone, Debug)]
pub(super) struct Sessions {
    pool: Pool,
    server: Server,
}

impl Sessions {
    pub(super) fn new(server: Server, most: usize) -> Result<Self, StoreError> {
        let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = Manager::from_connect(Config::new(), Present(server.clone()), recycling);
        let pool = Pool::builder(manager).max_size(most).runtime(Runtime::Tokio1).create_timeout(Some(*PATIENCE));
        let pool = pool.build().map_err(|error| StoreError::Unavailable(error.to_string()))?;
        Ok(Self { pool, server })
    }

    /// A connection for one call.
    pub(super) async fn lease(&self) -> Result<Lease, StoreError> {
        match self.pool.get().await {
            Ok(object) => Ok(Lease(Some(object))),
            Err(PoolError::Backend(error)) => Err(self.refusal(&error)),
            Err(error) => Err(StoreError::Unavailable(format!("PostgreSQL at {}: {error}", self.server.at()))),
        }
    }

    /// What an error of a connection attempt means.
    pub(super) fn refusal(&self, error: &tokio_postgres::Error) -> StoreError {
        let why = self.server.explain(error);
        if why.is_passing() {
            return StoreError::Unavailable(why.to_string());
        }
        StoreError::Open { path: why.at, cause: why.problem, cure: why.cure }
    }
}

/// Connects as the URL has it now: it may have been rotated.
struct Present(Server);

impl Connect for Present {
    fn connect(&self, _: &Config) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), tokio_postgres::Error>> {
        Box::pin(async {
            let (client, connection) = self.0.open().await?;
            // Whoever uses the client hears how it ended.
            Ok((client, tokio::spawn(async { drop(connection.await) })))
        })
    }
}

/// A connection that is closed when its call does not end well: nobody else meets what it left.
#[derive(Debug)]
pub(super) struct Lease(Option<Object>);

impl Lease {
    /// The call ended well: others may use the connection.
    pub(super) fn keep(mut self) {
        self.0 = None;
    }

    /// One statement in a transaction, all in one flight.
    pub(super) async fn transact(
        &self,
        begin: &str,
        sql: &str,
        values: Values<'_>,
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        let (begun, rows, ended) =
            join3(self.batch_execute(begin), self.query_typed(sql, values), self.batch_execute("COMMIT")).await;
        begun?;
        let rows = rows?;
        ended.map(|()| rows)
    }
}

impl Deref for Lease {
    type Target = Object;

    fn deref(&self) -> &Object {
        match &self.0 {
            Some(object) => object,
            None => unreachable!("only `keep` takes it, and it consumes the lease"),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(object) = self.0.take() {
            drop(Object::take(object));
        }
    }
}

impl From<tokio_postgres::Error> for StoreError {
    fn from(error: tokio_postgres::Error) -> Self {
        let said = format!("PostgreSQL: {}", problem(&error));
        if is_of_the_data(&error) { Self::Refused(said) } else { Self::Unavailable(said) }
    }
}

/// Whether the server, or the library that speaks to it, refuses the values of a statement: data exceptions, constraints,
/// and limits of a program, a row or a message. The same values would be refused again.
fn is_of_the_data(error: &tokio_postgres::Error) -> bool {
    match error.code() {
        Some(code) => matches!(&code.code()[..2], "22" | "23" | "54"),
        // The library has no name for these two.
        None => {
            let said = error.to_string();
            said.starts_with("error serializing parameter") || said.starts_with("error encoding message")
        }
    }
}

/// Work of the store on a connection that it has, no longer than any call may take.
pub(super) async fn in_time<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let silent = || StoreError::Unavailable(format!("PostgreSQL: no answer within {:?}", *PATIENCE));
    tokio::time::timeout(*PATIENCE, work).await.map_err(|_| silent())?
}

/// The beginning of a transaction, with more to select. Nothing is set for the session and no statement has a name: the next
/// transaction may meet another connection of a pooler.
pub(super) fn begin(more: &str) -> String {
    begin_within(paced(Duration::from_secs(15)), more)
}

/// The same, where a statement may take so long; and who holds the transaction open may be silent not much longer. Where the
/// server's default is not to wait for its disk, this one waits: what is acked afterwards exists nowhere else.
pub(super) fn begin_within(statement: Duration, more: &str) -> String {
    // Shorter than a statement may take, so that it is told who waits for whom.
    let lock = paced(Duration::from_secs(5)).as_millis();
    let (statement, silence) = (statement.as_millis(), statement.as_millis() + lock);
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED; SELECT set_config('synchronous_commit',
             CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, true),
         set_config('lock_timeout', '{lock}ms', true),
         set_config('statement_timeout', '{statement}ms', true),
         set_config('idle_in_transaction_session_timeout', '{silence}ms', true){more}"
    )
}
