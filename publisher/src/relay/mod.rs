//! `relay`: from an upstream system's outbox table onto the bus, with confirms, in order per key.
//!
//! Rows are published in waves in which each key stands once, and a row goes out only when the one before it of its key
//! is confirmed or marked. So whoever publishes, and however often, the first copies of a key's events are in order: the
//! lock that lets one relay publish at a time only saves repeats.
mod desk;
mod hold;
mod row;
mod wake;
mod wave;

use crate::broker::Broker;
use crate::declare;
use crate::outbox::Table;
use crate::postgres::Postgres;
use crate::publish::{Health, Options, Publisher};
use crate::seal::Seal;
use anyhow::Context;
pub use desk::RelayError;
use desk::{Desk, Keys, Left};
use hold::Holds;
use row::{Row, Sent};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use warren_shared::env::Settings;
use warren_shared::event::Limits;
use warren_shared::topology::Topology;
use wave::Waves;

/// What to relay and how.
#[derive(Clone, Debug)]
pub struct Order {
    /// The table.
    pub table: Table,
    /// How long sent rows are kept.
    pub keep: Duration,
    /// Whether to end.
    pub until: Until,
}

/// When a relay ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// When it is told to.
    Stopped,
    /// When nothing waits.
    Empty,
}

/// What a relay did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Account {
    /// Rows that the broker confirmed, repeats included.
    pub published: u64,
    /// Rows that got an error.
    pub refused: u64,
    /// Rows that are there at the end and not published, whatever the reason; none where nobody looked.
    pub left: Option<u64>,
}

/// How often a relay looks by itself: for rows if it publishes, for the lock if it stands by.
const LOOK: Duration = Duration::from_secs(1);
/// How long the broker is left alone where it took nothing of a whole turn.
const LULL: Duration = Duration::from_millis(50);
/// How often it is said who holds rows.
const NAMED: Duration = Duration::from_secs(10);
/// Rows that wait for their mark: where there are more, nothing is published before some are marked.
const UNMARKED: usize = 2000;
/// The pauses between two connections.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(5)];

/// Makes the table where it is missing; false if it was there.
///
/// # Errors
/// Why it cannot be made.
pub async fn make(postgres: &Postgres, table: &Table, patience: Duration) -> anyhow::Result<bool> {
    within(patience, || Desk::make(postgres, table)).await
}

/// Relays until it ends.
///
/// # Errors
/// Broker or database cannot be used at the start. Later it waits for them.
pub async fn relay(settings: &Settings, postgres: &Postgres, order: Order) -> anyhow::Result<Account> {
    let stop = crate::process::interrupted();
    let mut stopped = stop.clone();
    let (desk, publisher) = tokio::select! {
        biased;
        _ = stopped.wait_for(|stop| *stop) => return Ok(Account::default()),
        begun = begin(settings, postgres, &order.table) => begun?,
    };
    tokio::spawn(report(publisher.health()));
    let relay = Relay {
        wake: wake::listen(postgres.clone()),
        postgres: postgres.clone(),
        stop,
        publisher,
        patience: settings.publish_timeout,
        limits: settings.limits,
        order,
        holds: Holds::default(),
        unmarked: Vec::new(),
        warned: None,
        named: None,
        account: Account::default(),
    };
    relay.run(desk).await
}

async fn begin(settings: &Settings, postgres: &Postgres, table: &Table) -> anyhow::Result<(Desk, Publisher)> {
    let patience = settings.connect_timeout;
    let desk = within(patience, || Desk::open(postgres, table, settings.limits)).await?;
    let broker = Broker::new(settings.amqp.clone(), "warren-publisher relay");
    let link = broker.connect_within("publish", patience).await?;
    let bus = declare::check(&link, &Topology::bus()).await;
    bus.context("make the bus with 'warren-publisher declare'")?;
    let seal = Seal::new(&settings.payload_keys);
    let options = Options { timeout: settings.publish_timeout, seal, ..Options::default() };
    Ok((desk, Publisher::start(broker, link, options)))
}

/// Tries for so long where waiting may help.
async fn within<T, F>(patience: Duration, attempt: impl Fn() -> F) -> anyhow::Result<T>
where
    F: Future<Output = Result<T, RelayError>>,
{
    let (started, mut pause) = (Instant::now(), PAUSES[0]);
    loop {
        match attempt().await {
            Ok(done) => return Ok(done),
            Err(error) if !error.is_passing() => return Err(error.into()),
            Err(error) if started.elapsed() + pause > patience => {
                return Err(error).context(format!("no database for {patience:?} (WARREN_CONNECT_TIMEOUT)"));
            }
            Err(error) => tracing::info!(%error, "no database yet, trying again"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES[1]);
    }
}

struct Relay {
    postgres: Postgres,
    publisher: Publisher,
    order: Order,
    limits: Limits,
    wake: Arc<Notify>,
    stop: watch::Receiver<bool>,
    holds: Holds,
    /// Rows that the broker has and that somebody has locked: they are not published again, and marked as soon as they can be.
    unmarked: Vec<Sent>,
    /// How long `Until::Empty` waits for rows that the broker does not take.
    patience: Duration,
    /// When it was last said that keys are held.
    warned: Option<Instant>,
    /// When it was last said who holds rows.
    named: Option<Instant>,
    account: Account,
}

impl Relay {
    async fn run(mut self, desk: Desk) -> anyhow::Result<Account> {
        let (mut desk, mut pause) = (Some(desk), PAUSES[0]);
        while !self.is_stopped() {
            let opened = match desk.take() {
                Some(desk) => Ok(desk),
                None => self.open().await,
            };
            let since = Instant::now();
            let served = match opened {
                Ok(desk) => self.serve(&desk).await,
                Err(error) => Err(error),
            };
            match served {
                Ok(left) => {
                    self.account.left = left.map(|left| (left.unsent + left.refused).unsigned_abs());
                    break;
                }
                Err(error) if error.is_passing() => tracing::warn!(%error, "no database, connecting again"),
                Err(error) => tracing::error!(%error, "the outbox cannot be used, trying again"),
            }
            if since.elapsed() > PAUSES[1] {
                pause = PAUSES[0];
            }
            self.rest(pause).await;
            pause = (pause * 2).min(PAUSES[1]);
        }
        Ok(self.account)
    }

    async fn open(&mut self) -> Result<Desk, RelayError> {
        let desk = Desk::open(&self.postgres, &self.order.table, self.limits).await?;
        tracing::info!(at = self.postgres.at(), "connected to the database again");
        Ok(desk)
    }

    /// Waits for its turn, then publishes. Ends when it is told to, or, if it is to end by itself, with what is left.
    async fn serve(&mut self, desk: &Desk) -> Result<Option<Left>, RelayError> {
        let is_ending = self.order.until == Until::Empty;
        let mut waits = false;
        while !desk.lead().await? {
            if is_ending {
                let left = desk.left().await?;
                if left.unsent == 0 {
                    return Ok(Some(left));
                }
            }
            if !std::mem::replace(&mut waits, true) {
                tracing::info!(table = %self.order.table, "another relay publishes, this one stands by");
            }
            self.rest(LOOK).await;
            if self.is_stopped() {
                return Ok(None);
            }
        }
        tracing::info!(table = %self.order.table, at = self.postgres.at(), "this relay publishes");
        let (mut progressed, mut swept) = (Instant::now(), None::<Instant>);
        while !self.is_stopped() {
            let before = self.account.published + self.account.refused;
            let nothing = match self.turn(desk, &mut swept).await {
                // The connection is as good as before: leaving it would only hand the turn to another relay, which waits as well.
                Err(error @ RelayError::Locked { .. }) => {
                    self.name(&error.to_string(), "no row of it can be published, trying again");
                    self.rest(LOOK).await;
                    true
                }
                turned => turned?,
            };
            if self.account.published + self.account.refused > before {
                progressed = Instant::now();
            }
            let through = nothing && self.holds.is_empty() && self.unmarked.is_empty();
            if is_ending && (through || progressed.elapsed() > self.patience) {
                return self.left(desk).await;
            }
            if nothing && swept.is_some() {
                self.idle().await;
            }
        }
        if is_ending { self.left(desk).await } else { Ok(None) }
    }

    /// What is left; none where somebody has locked the table.
    async fn left(&self, desk: &Desk) -> Result<Option<Left>, RelayError> {
        match desk.left().await {
            Err(RelayError::Locked { .. }) => Ok(None),
            left => left.map(Some),
        }
    }

    /// Publishes what can be, and once a second does the rest. Returns whether there was nothing to publish.
    async fn turn(&mut self, desk: &Desk, swept: &mut Option<Instant>) -> Result<bool, RelayError> {
        let before = self.account.published + self.account.refused;
        // What the broker has and no mark tells is kept in mind: so much, and no more.
        let rows = if self.unmarked.len() < UNMARKED { self.take(desk).await? } else { Vec::new() };
        let nothing = rows.is_empty();
        if !nothing {
            let ended = Waves::new(self, desk).publish(rows).await?;
            if self.account.published + self.account.refused == before {
                self.rest(LULL).await;
            }
            if ended.is_paused() {
                self.rest(LOOK).await;
            }
        }
        if swept.is_none_or(|at| at.elapsed() > LOOK) {
            self.unmarked = desk.mark_free(std::mem::take(&mut self.unmarked)).await?;
            if !self.unmarked.is_empty() {
                self.locked(desk, &[]).await;
            }
            let more = desk.sweep(self.order.keep).await?;
            *swept = (!more).then(Instant::now);
        }
        Ok(nothing)
    }

    /// Rows of keys that are not held, and of those that may be tried again. Each key comes from one of the two, so it is in
    /// order; and however many keys are held, the others do not stand behind them.
    async fn take(&mut self, desk: &Desk) -> Result<Vec<Row>, RelayError> {
        let due = self.holds.due(Instant::now());
        let unmarked: Vec<i64> = self.unmarked.iter().map(Sent::id).collect();
        let mut rows = desk.take(Keys::AllBut(&self.holds.keys()), &unmarked).await?;
        if !due.is_empty() {
            let again = desk.take(Keys::Only(&due), &unmarked).await?;
            if again.is_empty() {
                // Somebody deleted them.
                due.iter().for_each(|key| self.holds.release(key));
            }
            rows.extend(again);
        }
        // A row that somebody has locked may be changed or deleted: it waits for that, and what follows of its key waits with it.
        let (mut held, mut holders) = (HashSet::new(), Vec::new());
        for row in &mut rows {
            if let Some(holder) = row.holder.take() {
                held.insert(row.key.clone());
                holders.push(holder);
            }
        }
        if !held.is_empty() {
            held.iter().for_each(|key| self.holds.hold(key, Instant::now()));
            rows.retain(|row| !held.contains(&row.key));
            self.locked(desk, &holders).await;
        }
        Ok(rows)
    }

    /// Says who holds rows, from time to time.
    async fn locked(&mut self, desk: &Desk, holders: &[String]) {
        if self.named.is_none_or(|at| at.elapsed() > NAMED) {
            let by = desk.blocker(holders).await;
            let what = format!("rows of {} are locked by {by}", self.order.table);
            self.name(&what, "their keys wait, others go on");
        }
    }

    fn name(&mut self, what: &str, then: &str) {
        if self.named.is_none_or(|at| at.elapsed() > NAMED) {
            self.named = Some(Instant::now());
            tracing::warn!("{what}; {then}");
        }
    }

    fn is_stopped(&self) -> bool {
        *self.stop.borrow()
    }

    /// Waits, unless it is told to stop.
    async fn rest(&mut self, pause: Duration) {
        let _ = tokio::time::timeout(pause, self.stop.wait_for(|stop| *stop)).await;
    }

    /// Waits for rows: told of, found by looking, or of a key that was held.
    async fn idle(&mut self) {
        let due = self.holds.next().map_or(LOOK, |due| due.saturating_duration_since(Instant::now()).min(LOOK));
        tokio::select! {
            _ = self.stop.wait_for(|stop| *stop) => {}
            () = self.wake.notified() => {}
            () = tokio::time::sleep(due) => {}
        }
    }
}

/// Says once when publishing stalls and why, and once when it goes on.
async fn report(health: watch::Receiver<Health>) {
    let tell = |now: &Health| match now {
        Health::Open => tracing::info!("publishing goes on"),
        Health::Connecting => tracing::warn!("no broker: connecting again, the rows wait"),
        Health::Blocked(why) => tracing::warn!(why, "the broker takes nothing for now, the rows wait"),
    };
    Health::follow(health, tell).await;
}
