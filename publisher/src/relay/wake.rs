//! LISTEN on a connection of its own: a relay without work hears of the next row at once.
use crate::outbox::CHANNEL;
use crate::postgres::{Connection, Postgres, PostgresError};
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio_postgres::{AsyncMessage, Client};

/// The longest pause between two attempts to listen. Nothing waits for it: the relay also looks by itself.
const PAUSE: Duration = Duration::from_secs(10);

/// Listens for as long as the process lives.
pub(super) fn listen(postgres: Postgres) -> Arc<Notify> {
    let wake = Arc::new(Notify::new());
    let tell = wake.clone();
    tokio::spawn(async move {
        let mut pause = Duration::from_millis(200);
        loop {
            match heard(&postgres, &tell, &mut pause).await {
                Ok(()) => tracing::debug!("the connection that listens has ended"),
                Err(error) => tracing::debug!(%error, "nothing is heard, the relay looks by itself"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE);
        }
    });
    wake
}

/// Tells of every notification until the connection ends, and of its beginning.
async fn heard(postgres: &Postgres, tell: &Arc<Notify>, pause: &mut Duration) -> Result<(), PostgresError> {
    let (client, connection) = postgres.connect().await?;
    let told = tell.clone();
    let hearing = tokio::spawn(hear(connection, told));
    let listening = subscribe(&client).await.map_err(|error| postgres.explain(&error));
    if listening.is_ok() {
        *pause = Duration::from_millis(200);
        // What was committed before is not told of.
        tell.notify_one();
        let _ = hearing.await;
    } else {
        hearing.abort();
    }
    listening
}

async fn subscribe(client: &Client) -> Result<(), tokio_postgres::Error> {
    client.batch_execute(&format!("LISTEN {CHANNEL}")).await
}

async fn hear(mut connection: Connection, tell: Arc<Notify>) {
    while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
        if matches!(message, AsyncMessage::Notification(_)) {
            tell.notify_one();
        }
    }
}
