//! A worker: the parts put together, run, and drained.
use crate::admin::{self, Vitals};
use crate::config::{self, File, Kind, Route, Routes};
use crate::consumer::Subscriptions;
use crate::fleet::{JoinError, Newcomer, Peers, Seats, Supervisor};
use crate::handler::{self, Context, Failure, Handler, InTx, Processes, Reply, Rust};
use crate::job::House;
use crate::load::Gauges;
use crate::memory;
use crate::metrics::{self, names};
use crate::outbox::{self, Outbox};
use crate::pipeline::{self, Order as Command, Parts, Pulse};
use crate::process::{Plans, watch};
use crate::shutdown::Stop;
use crate::store::{Left, Postgres, Sqlite, Store, StoreError, Transactions, Tx};
use crate::trace;
use anyhow::Context as _;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;
use warren_publisher::budget::Budget;
use warren_publisher::declare::{self};
use warren_publisher::pace::paced;
use warren_publisher::postgres::Postgres as Server;
use warren_publisher::publish::Options;
use warren_publisher::{Broker, Publisher, Refused, Seal};
use warren_shared::delivery::Wait;
use warren_shared::env::{Database, Declare, Settings};
use warren_shared::fleet::{Kind as Why, Word};
use warren_shared::pattern::Pattern;
use warren_shared::retry::Policy;
use warren_shared::topology::{Order, Topology};
use warren_shared::{Event, Message};

/// Puts a worker together.
#[derive(Debug)]
pub struct Builder {
    settings: Settings,
    routes: Routes,
    plans: Plans,
    mistakes: Vec<String>,
}

/// A worker that is ready to run.
#[derive(Debug)]
pub struct Worker {
    settings: Settings,
    routes: Routes,
    plans: Plans,
}

impl Worker {
    /// A worker with these settings; the routes that they name come first.
    #[must_use]
    pub fn builder(settings: Settings) -> Builder {
        let (file, mistakes) = match config::read(&settings) {
            Ok(file) => (file, Vec::new()),
            Err(mistakes) => (File::default(), mistakes),
        };
        Builder { settings, routes: file.routes, plans: file.processes, mistakes }
    }
}

impl Builder {
    /// Handles events of a type or pattern with a Rust function.
    #[must_use]
    pub fn handle<F, Fut>(self, on: &str, function: F) -> Self
    where
        F: Fn(Event, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Reply, Failure>> + Send + 'static,
    {
        self.route(on, Kind::Rust(Arc::new(Rust::new(function))))
    }

    /// Handles events inside the store's transaction (PostgreSQL): the function's SQL, the record of the event and what it
    /// emits commit or roll back together, so that the SQL takes effect exactly once. The transaction is rolled back where the
    /// function fails; where the database or another transaction was in the way, the function runs again, uncounted.
    ///
    /// ```no_run
    /// # use warren_worker::{Failure, Reply, Worker};
    /// # fn example(settings: warren_shared::env::Settings) {
    /// Worker::builder(settings).handle_tx("payment.charge", |event, tx, _| async move {
    ///     let payment: serde_json::Value = event.json()?;
    ///     let paid = "UPDATE accounts SET balance = balance - $1 WHERE id = $2 AND balance >= $1";
    ///     let touched = tx.execute(paid, &[&payment["amount"].as_i64(), &payment["account"].as_str()]).await?;
    ///     if touched == 0 {
    ///         return Err(Failure::dead("not enough money"));
    ///     }
    ///     Ok(Reply::done())
    /// });
    /// # }
    /// ```
    #[must_use]
    pub fn handle_tx<F, Fut>(self, on: &str, function: F) -> Self
    where
        F: Fn(Event, Tx, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Reply, Failure>> + Send + 'static,
    {
        self.route(on, Kind::InTx(Arc::new(InTx::new(function))))
    }

    fn route(mut self, on: &str, kind: Kind) -> Self {
        match Pattern::parse(on) {
            Ok(on) => {
                let law = config::law(&self.settings);
                if let Some(other) = self.routes.rival(&on).and_then(|place| self.routes.get(place)) {
                    let cure = Routes::cure(&on, &other.on);
                    self.mistakes.push(format!("the handler of '{on}': the route of '{}' {cure}", other.on));
                }
                self.routes.push(Route::new(on, kind, config::TIMEOUT, law));
            }
            Err(mistake) => self.mistakes.push(mistake),
        }
        self
    }

    /// Handles events whose data is JSON of a Rust type. Data of another shape is dead-lettered.
    #[must_use]
    pub fn handle_json<T, F, Fut>(self, on: &str, function: F) -> Self
    where
        T: serde::de::DeserializeOwned + Send,
        F: Fn(T, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Reply, Failure>> + Send + 'static,
    {
        let function = Arc::new(function);
        self.handle(on, move |event, context| {
            let function = function.clone();
            async move {
                let data = event.json::<T>().map_err(|e| Failure::dead(format!("the data has another shape: {e}")))?;
                function(data, context).await
            }
        })
    }

    /// Lets a key wait while its event fails, as `order: strict` does in a file. For the handler that was added last.
    #[must_use]
    pub fn strict(mut self) -> Self {
        if let Some(route) = self.routes.last_mut() {
            route.law.wait = Wait::InPlace;
        }
        self
    }

    /// How failures are repeated. For the handler that was added last.
    #[must_use]
    pub fn retry(mut self, policy: Policy) -> Self {
        if let Some(route) = self.routes.last_mut() {
            route.law.retry = policy;
        }
        self
    }

    /// How long a call may take; 30 s where nothing is said. For the handler that was added last.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        if let Some(route) = self.routes.last_mut() {
            route.timeout = timeout;
        }
        self
    }

    /// How many calls run at once, at most; as many as the worker allows where nothing is said. For the handler that was
    /// added last.
    #[must_use]
    pub fn concurrency(mut self, calls: std::num::NonZeroUsize) -> Self {
        if let Some(route) = self.routes.last_mut() {
            route.concurrency = Some(calls.get());
        }
        self
    }

    /// The worker, if nothing is wrong with it.
    ///
    /// # Errors
    /// Every mistake in the routes.
    pub fn build(mut self) -> Result<Worker, Vec<String>> {
        for Route { on, law, timeout, .. } in self.routes.iter().filter(|route| is_rust(&route.kind)) {
            let problem = config::too_long(law, *timeout, &self.settings);
            self.mistakes.extend(problem.map(|problem| format!("the handler of '{on}': {problem}")));
        }
        if let (Database::Sqlite(_), Some(route)) =
            (&self.settings.database, self.routes.iter().find(|r| in_tx(&r.kind)))
        {
            self.mistakes.push(format!("the handler of '{}': {}", route.on, StoreError::NoTransactions));
        }
        if self.mistakes.is_empty() {
            Ok(Worker { settings: self.settings, routes: self.routes, plans: self.plans })
        } else {
            Err(self.mistakes)
        }
    }
}

fn in_tx(kind: &Kind) -> bool {
    matches!(kind, Kind::InTx(_))
}

fn is_rust(kind: &Kind) -> bool {
    matches!(kind, Kind::Rust(_)) || in_tx(kind)
}

/// Handlers that finish need this long for commit, confirm and ack.
const SETTLE: Duration = Duration::from_secs(3);

impl Worker {
    /// The business processes.
    pub(crate) fn plans(&self) -> &Plans {
        &self.plans
    }

    /// The topology that it needs.
    #[must_use]
    pub fn topology(&self) -> Topology {
        config::topology(&self.settings, &self.routes)
    }

    /// Runs until told to stop, then drains.
    ///
    /// # Errors
    /// Why it cannot start. Once it runs, it waits for whatever fails.
    pub async fn run(self, mut stop: Stop) -> anyhow::Result<()> {
        let Self { settings, routes, plans } = self;
        let name = worker_name(&settings);
        // Outbox rows belong to one run of one process, whatever its name: the suffix makes a successor a stranger.
        let run = format!("{name}#{}", uuid::Uuid::new_v4().simple());
        let recorder = metrics::install(&settings.pool);
        trace::start(&name).map_err(anyhow::Error::msg)?;
        let topology = config::topology(&settings, &routes);
        let broker = Broker::new(settings.amqp.clone(), format!("warren-worker {name}"));
        // The broker first, which connecting does not change; then the store; then declarations. A start that fails
        // leaves nothing behind.
        let start = async {
            let link = broker.connect_within("publish", settings.connect_timeout).await?;
            let store = open(&settings, &run).await?;
            introduce(&*store, &plans, settings.connect_timeout).await?;
            match settings.declare {
                Declare::Auto => declare::apply(&link, &topology.declarations_but_inflow()).await?,
                Declare::Never => declare::check(&link, &topology.declarations()).await?,
            }
            anyhow::Ok((link, store))
        };
        let (link, store) = tokio::select! {
            biased;
            _ = stop.recv() => return told_early(&name),
            started = start => started?,
        };
        let seal = Seal::new(&settings.payload_keys);
        let limits = seal.within(settings.limits);
        let options = Options { timeout: settings.publish_timeout, seal: seal.clone(), ..Options::default() };
        let publisher = Publisher::start(broker.clone(), link, options);
        let memory = settings.memory.unwrap_or_else(memory::share);
        let subscriptions = Subscriptions::new(
            broker.clone(),
            &topology,
            settings.declare,
            settings.prefetch,
            Budget::new(memory),
            limits,
            seal,
        );
        let outbox = Outbox::start(outbox::Parts {
            store: store.clone(),
            publisher: publisher.clone(),
            subscriptions: subscriptions.clone(),
            pool: settings.pool.clone(),
            dead: topology.dead(),
            worker: name.clone(),
            limits,
        });

        let pulse = Arc::new(Pulse::default());
        pulse.turn();
        let vitals = Vitals {
            pulse: pulse.clone(),
            subscriptions: subscriptions.clone(),
            seats: Arc::new(Seats::default()),
            publisher: publisher.health(),
            outbox: outbox.clone(),
            draining: Arc::new(AtomicBool::new(false)),
        };
        if let Some(address) = settings.admin_addr {
            let serving = admin::serve(address, vitals.clone(), recorder).await;
            serving.with_context(|| format!("WARREN_ADMIN_ADDR: cannot serve on {address}"))?;
        }

        // Nothing is taken before everybody who is there has answered: their stores are compared with ours.
        let me = Word {
            kind: Why::Beat,
            name: name.clone(),
            run: run.clone(),
            since: jiff::Timestamp::now().as_millisecond(),
            settled: false,
            capacity: u32::try_from(settings.concurrency).unwrap_or(u32::MAX),
            running: 0,
            store: store.identity().to_owned(),
            partitions: settings.partitions,
            lanes: settings.lanes.iter().map(|lane| lane.name.clone()).collect(),
            routes: routes.iter().map(|route| route.on.to_string()).collect::<BTreeSet<_>>().into_iter().collect(),
            lacking: Vec::new(),
            version: env!("CARGO_PKG_VERSION").into(),
            clock: 0,
            held: Vec::new(),
            troubles: Vec::new(),
        };
        let clock = subscriptions.clock().clone();
        let join = Newcomer::join(broker, &publisher, &topology, me, clock, settings.connect_timeout);
        let newcomer = tokio::select! {
            biased;
            _ = stop.recv() => return told_early(&name),
            joined = join => joined.map_err(|why| match why {
                JoinError::Broker(error) => anyhow::Error::from(error),
                JoinError::Conflict(conflict) => conflict.into(),
                denied @ JoinError::Denied { .. } => denied.into(),
            })?,
        };

        // Only now: workers that have no route for what flows in know by now that this one has.
        let bound = subscriptions.repair();
        tokio::select! {
            biased;
            _ = stop.recv() => return told_early(&name),
            bound = bound => bound?,
        }

        // All of them share the connections.
        let mut transactions = None;
        let mut in_tx = || match &transactions {
            Some(transactions) => Ok::<Transactions, StoreError>(Clone::clone(transactions)),
            None => Ok(transactions.insert(store.transactions(settings.database_connections)?).clone()),
        };
        let defined = plans.iter().map(|plan| plan.definition.name.clone()).collect();
        let processes: Arc<dyn Handler> = Arc::new(Processes::new(plans, store.clone()));
        let handlers = routes.iter().map(|route| handler::build(route, &processes, &mut in_tx));
        let handlers: Vec<Arc<dyn Handler>> = handlers.collect::<Result<_, _>>()?;
        let peers = Arc::new(Peers::default());
        let running = pipeline::start(Parts {
            routes: routes.clone(),
            handlers: handlers.clone(),
            law: config::law(&settings),
            house: House { topology: topology.clone(), worker: name.clone(), limits, hop_limit: settings.hop_limit },
            context: Context {
                attempt: 1,
                timeout: config::TIMEOUT,
                partition: "".into(),
                pool: settings.pool.as_str().into(),
                limits,
                ..Context::default()
            },
            concurrency: settings.concurrency,
            memory,
            peers: peers.clone(),
            unknown_grace: settings.unknown_grace,
            owned: settings.order == Order::Key,
            store: store.clone(),
            publisher: publisher.clone(),
            outbox: outbox.clone(),
            subscriptions: subscriptions.clone(),
            pulse,
        });
        let keeper = tokio::spawn(keep(store.clone(), outbox.clone(), settings.retention, vitals.pulse.clone()));
        let gauges =
            Gauges::new(vitals.clone(), running.orders.clone(), &topology, settings.concurrency, settings.work_off);
        let gauges = tokio::spawn(gauges.watch());
        let prober = tokio::spawn(probe(publisher.clone(), topology.probe(), subscriptions.clone()));
        let of_bindings = subscriptions.clone();
        let binder = tokio::spawn(async move { of_bindings.keep_bound().await });
        let watcher = tokio::spawn(watch(store.clone(), publisher, topology.clone(), defined));
        let (slots, tasks) = subscriptions.start(&topology, &running.news, &outbox, &store);
        tracing::info!(
            worker = name,
            pool = settings.pool,
            routes = routes.iter().count(),
            partitions = slots.len(),
            "worker '{name}' takes events"
        );
        let mut supervisor =
            Supervisor::start(newcomer, settings.order, subscriptions.clone(), slots, vitals.clone(), peers);

        let conflict = tokio::select! {
            _ = stop.recv() => None,
            conflict = supervisor.conflict() => Some(conflict),
        };
        let timeout = settings.drain_timeout;
        tracing::info!(?timeout, "draining: taking nothing more, finishing what runs (a second signal interrupts it)");
        vitals.draining.store(true, Ordering::Relaxed);
        // Each partition goes to its next owner as soon as nothing of it runs here.
        let told = supervisor.leave().await;
        let soft = timeout.saturating_sub(SETTLE).max(timeout / 2);
        let (tell, drained) = oneshot::channel();
        let _ = running.orders.send(Command::Drain(tell));
        let mut over = Box::pin(futures_util::future::join(drained, futures_util::future::join_all(tasks)));
        let in_time = tokio::select! {
            _ = &mut over => true,
            () = tokio::time::sleep(soft) => false,
            _ = stop.recv() => false,
        };
        if !in_time {
            let _ = running.orders.send(Command::Interrupt);
            if tokio::time::timeout(SETTLE, over).await.is_err() {
                tracing::warn!("some events could not be settled: the broker delivers them again");
            }
        }
        flush(&outbox, SETTLE).await;
        futures_util::future::join_all(handlers.iter().map(|handler| handler.close())).await;
        trace::stop().await;
        keeper.abort();
        prober.abort();
        binder.abort();
        watcher.abort();
        gauges.abort();
        // Whatever it left unfinished comes again, and died of nothing.
        if !matches!(tokio::time::timeout(SETTLE, store.leave()).await, Ok(Ok(()))) {
            tracing::warn!("the store does not take it that this worker ends: its silence will pass for a death");
        }
        let _ = tokio::time::timeout(SETTLE, told).await;
        let _ = tokio::time::timeout(SETTLE, subscriptions.close()).await;
        tracing::info!(worker = name, "drained");
        conflict.map_or(Ok(()), |conflict| Err(conflict.into()))
    }
}

fn told_early(name: &str) -> anyhow::Result<()> {
    tracing::info!(worker = name, "told to stop before it took anything");
    Ok(())
}

/// Waits until everything recorded is published. What is not stays in the store for the next owner.
async fn flush(outbox: &Outbox, patience: Duration) {
    let deadline = tokio::time::Instant::now() + patience;
    while outbox.pending() > outbox.held() {
        if tokio::time::Instant::now() >= deadline {
            tracing::warn!(rows = outbox.pending(), "outgoing events stay in the store for the next worker");
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Tells the store who we are and which definitions we have. A store that was there a moment ago and is gone now is waited for as
/// one that is not there yet.
async fn introduce(store: &dyn Store, plans: &Plans, patience: Duration) -> Result<(), StoreError> {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let told = async {
            store.beat().await?;
            // Instances that begin under these definitions end under them, whatever is deployed meanwhile.
            for plan in plans {
                store.keep(plan.id, plan.state()).await?;
            }
            Ok(())
        };
        match told.await {
            Err(StoreError::Unavailable(why)) if tokio::time::Instant::now() < deadline => {
                tracing::warn!("the store is gone again, trying again: {why}");
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            told => return told,
        }
    }
}

/// Opens the store that the settings name, for a worker's run.
///
/// # Errors
/// Why it cannot be used.
pub async fn open(settings: &Settings, run: &str) -> Result<Arc<dyn Store>, StoreError> {
    match &settings.database {
        Database::Sqlite(path) => Ok(Arc::new(Sqlite::open(Path::new(path), run)?.of_pool(&settings.pool).await?)),
        Database::Postgres(url) => {
            let wrong = |cause| StoreError::Open { path: "DATABASE_URL".into(), cause, cure: "correct it" };
            let server = Server::parse(url).map_err(wrong)?;
            Ok(Arc::new(Postgres::open(&server, &settings.pool, run, settings.connect_timeout).await?))
        }
    }
}

/// The worker's name: as set, else host name and pid.
#[must_use]
pub fn worker_name(settings: &Settings) -> String {
    settings.worker_id.clone().unwrap_or_else(|| {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = host.trim();
        format!("{}-{}", if host.is_empty() { "worker" } else { host }, std::process::id())
    })
}

/// A worker that was not heard of for so long is dead: its outbox rows are published by another.
static SILENT: LazyLock<Duration> = LazyLock::new(|| paced(Duration::from_secs(20)));
/// How often a worker tells the store that it lives.
pub(crate) static BEAT: LazyLock<Duration> = LazyLock::new(|| paced(Duration::from_secs(5)));

/// Tells the store that this worker lives, adopts what dead workers left, and prunes by time.
async fn keep(store: Arc<dyn Store>, outbox: Outbox, retention: Duration, pulse: Arc<Pulse>) {
    let mut tick = tokio::time::interval(*BEAT);
    // Since when our own beats come through: while the store was away nobody's did, and nobody is dead for that.
    let mut beating: Option<tokio::time::Instant> = None;
    loop {
        tick.tick().await;
        let kept = async {
            let begun = tokio::time::Instant::now();
            store.beat().await.inspect_err(|_| beating = None)?;
            pulse.beats.fetch_add(1, Ordering::Relaxed);
            let proven = begun - *beating.get_or_insert(begun) >= *SILENT;
            let rows = if proven { store.adopt(Left::Silent(*SILENT)).await? } else { Vec::new() };
            if !rows.is_empty() {
                tracing::info!(rows = rows.len(), "publishing what dead workers left");
                outbox.push(rows);
            }
            // Workers know the store's time as it was at the last beat of another.
            store.prune(retention + 2 * *BEAT).await
        };
        match kept.await {
            Ok(0) => {}
            Ok(rows) => tracing::debug!(rows, "forgot old ids"),
            Err(error) => {
                metrics::count(names::STORE_ERRORS, 1);
                tracing::warn!(%error, "the store cannot be kept in order now");
            }
        }
    }
}

/// Asks for a confirm of a replicated queue, so that even a worker that has nothing to publish leaves a node that is cut
/// off from the others: it keeps its connections open, and what it took from the queues it leads cannot be acked there.
async fn probe(publisher: Publisher, exchange: String, subscriptions: Arc<Subscriptions>) {
    let mut tick = tokio::time::interval(*BEAT);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut refused_before = false;
    loop {
        tick.tick().await;
        match publisher.publish(Message { exchange: exchange.clone(), ..Message::default() }).await {
            Err(refused @ (Refused::Returned { .. } | Refused::Forbidden(_))) => {
                // Each refusal costs the events a channel.
                if std::mem::replace(&mut refused_before, true) {
                    return tracing::warn!(
                        %refused,
                        "this worker does not find out whether its node is cut off: declare {exchange}, or grant write on it"
                    );
                }
                // Somebody may have deleted it.
                if let Err(error) = subscriptions.repair().await {
                    tracing::warn!(%error, exchange, "the topology cannot be declared again");
                }
            }
            Ok(_) | Err(_) => refused_before = false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_inside_the_transaction_is_a_mistake_where_the_store_has_none() {
        let settings = Settings::read(&std::collections::BTreeMap::new()).expect("the defaults are valid");
        let built = Worker::builder(settings).handle_tx("a.b", |_, _, _| async { Ok(Reply::done()) }).build();
        let mistakes = built.expect_err("SQLite");
        assert!(mistakes[0].contains("'a.b'") && mistakes[0].contains("needs PostgreSQL"), "{mistakes:?}");
    }
}
