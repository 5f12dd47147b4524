//! The store is PostgreSQL: effects inside its transaction happen once, and whatever happens to the server, the work goes on.
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use warren_tests::{Fleet, Lab, Postgres, Process, event, length, until};

const PATIENCE: Duration = Duration::from_secs(180);
const ACCOUNTS: usize = 200;
const OPENING: i64 = 1_000_000;

/// A lab on a database of its own, whose workers handle `order.#` in Rust.
async fn lab(name: &str, postgres: Postgres, more: &[(&str, &str)]) -> anyhow::Result<Lab> {
    let mut lab = Lab::new(name)?.with_store(postgres);
    lab.set("WARREN_ROUTES", "");
    lab.set("WARREN_SUBSCRIBE", "order.#,transfer.#");
    more.iter().for_each(|(variable, value)| lab.set(variable, value));
    lab.declare().await?;
    lab.gather().await?;
    Ok(lab)
}

impl Bank {
    async fn open(lab: &Lab) -> anyhow::Result<()> {
        let client = lab.postgres.as_ref().context("a database")?.client().await?;
        let sql = format!(
            "CREATE TABLE accounts (id integer PRIMARY KEY, balance bigint NOT NULL);
             CREATE TABLE transfers (id text NOT NULL);
             INSERT INTO accounts SELECT n, {OPENING} FROM generate_series(0, {ACCOUNTS} - 1) n"
        );
        Ok(client.batch_execute(&sql).await?)
    }

    fn number(lab: &Lab, sql: &str) -> anyhow::Result<i64> {
        lab.postgres.as_ref().context("a database")?.number(sql)
    }

    /// No money is made or lost, now or ever.
    fn balances(lab: &Lab) -> anyhow::Result<()> {
        let sum = Self::number(lab, "SELECT sum(balance)::bigint FROM accounts")?;
        ensure!(sum == OPENING * ACCOUNTS as i64, "the balances are {sum}");
        Ok(())
    }
}

/// The business: accounts, and a row for each transfer that was applied.
struct Bank;

/// Random, but the same for everybody who asks for the same.
fn dice(of: &str, sides: u64) -> u64 {
    warren_shared::Identity::of("/dice", of).as_u64s().1 % sides
}

fn fails(n: usize) -> bool {
    dice(&format!("fail {n}"), 20) == 0
}

/// The transfer of this number: one in twenty fails for good.
fn transfer(n: usize) -> Value {
    let account = |what: &str| dice(&format!("{what} {n}"), ACCOUNTS as u64);
    let (from, to, amount) = (account("from"), account("to"), dice(&format!("amount {n}"), 500));
    let data = json!({"from": from, "to": to, "amount": amount, "fail": fails(n)});
    event(&format!("t{n}"), "transfer.asked", &format!("k{}", n % 100), data)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn money_moves_once_through_kills_of_both_on_an_own_database() -> anyhow::Result<()> {
    let postgres = Postgres::private("money")?;
    let lab =
        lab("pg-money", postgres, &[("TEST_TRANSFERS", "accounts,transfers"), ("WARREN_CRASH_LIMIT", "100")]).await?;
    Bank::open(&lab).await?;
    let mut fleet = Fleet::default();
    fleet.scale(&lab, 3).await?;
    lab.balanced(3, PATIENCE).await?;
    // One in ten is published twice.
    let load = lab.load_of(60, &[], |n| transfer(if n % 11 == 10 { n - 7 } else { n }))?;
    lab.progressed(100, PATIENCE).await?;

    let (mut workers, mut backends) = (0, 0);
    while workers + backends < length(16, 100) {
        let before = lab.inbox();
        let victim = fleet.workers.keys().nth(dice(&format!("victim {workers}"), 3) as usize).cloned();
        let mut victim = fleet.workers.remove(&victim.context("three run")?).context("it runs")?;
        victim.kill().await?;
        fleet.start(&lab)?;
        workers += 1;
        // A worker's backend in the middle of something, if there is one: the server then restarts all of them.
        let pid = "SELECT pid::bigint FROM pg_stat_activity WHERE application_name = 'warren'
            ORDER BY state = 'idle', random() LIMIT 1";
        let mut found = None;
        until("a worker is connected", PATIENCE, || {
            found = Bank::number(&lab, pid).ok();
            found.is_some()
        })
        .await?;
        let pid = rustix::process::Pid::from_raw(i32::try_from(found.unwrap_or(0))?).context("a pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
        backends += 1;
        // It goes on, and what is seen in between adds up.
        until("work goes on", PATIENCE, || lab.inbox() > before).await.with_context(|| lab.logs())?;
        until("the balances can be asked", PATIENCE, || Bank::balances(&lab).is_ok()).await?;
    }
    let ids = load.finish().await?;
    let distinct: HashSet<&String> = ids.iter().collect();
    let ledger = lab.tally(&ids, PATIENCE).await?;
    Bank::balances(&lab)?;
    let applied = Bank::number(&lab, "SELECT count(*) FROM transfers")?;
    let different = Bank::number(&lab, "SELECT count(DISTINCT id) FROM transfers")?;
    let failing = distinct.iter().filter(|id| fails(id[1..].parse().unwrap_or_default())).count();
    println!("{workers} workers and {backends} backends killed; {applied} transfers applied, {different} different");
    ensure!(applied == different && different as usize == distinct.len() - failing, "{ledger}");
    ensure!(ledger.adds_up() && ledger.dead.values().sum::<usize>() == failing, "{ledger}{}", lab.logs());
    ensure!(ledger.dead.keys().all(|reason| reason == "permanent"), "{ledger}");
    fleet.stop(&lab).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_workers_with_the_same_event_at_the_same_time_apply_it_once() -> anyhow::Result<()> {
    let more = [("TEST_TRANSFERS", "accounts,transfers"), ("WARREN_ORDER", "none"), ("WARREN_PREFETCH", "1")];
    let lab = lab("pg-same", Postgres::shared("pg-same")?, &more).await?;
    Bank::open(&lab).await?;
    let transfers: Vec<Value> = (0..600).map(transfer).flat_map(|event| [event.clone(), event]).collect();
    let ids = lab.send(&transfers).await?;
    let mut fleet = Fleet::default();
    fleet.scale(&lab, 3).await?;
    let ledger = lab.tally(&ids, PATIENCE).await?;
    lab.at_rest(PATIENCE).await?;
    Bank::balances(&lab)?;
    let applied = Bank::number(&lab, "SELECT count(*) FROM transfers")?;
    ensure!(ledger.adds_up() && ledger.handled == applied as usize, "{ledger}: {applied} applied");
    ensure!(ledger.handled == (0..600).filter(|n| !fails(*n)).count(), "{ledger}");
    fleet.stop(&lab).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_that_wait_for_a_connection_wait_for_other_handlers_and_not_for_the_database() -> anyhow::Result<()> {
    let more = [("TEST_TRANSFERS", "accounts,transfers"), ("WARREN_DATABASE_CONNECTIONS", "1")];
    let lab = lab("pg-queue", Postgres::shared("pg-queue")?, &more).await?;
    Bank::open(&lab).await?;
    // One after the other: the last one waits longer than any call of the store may take (20 s, in tests 4).
    let slow = |n: usize| {
        let data = json!({"from": n, "to": n + 10, "amount": 1, "sleep": 2.5});
        event(&format!("t{n}"), "transfer.asked", &format!("k{n}"), data)
    };
    let ids = lab.send(&(0..4).map(slow).collect::<Vec<_>>()).await?;
    let mut fleet = Fleet::default();
    fleet.scale(&lab, 1).await?;
    let ledger = lab.tally(&ids, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.handled == 4, "{ledger}");
    let log = fleet.workers["w0"].log();
    ensure!(!log.contains("runs again"), "the database was blamed:\n{log}");
    fleet.stop(&lab).await
}

/// Workers under load while something happens to the database. They stop taking, dead-letter nothing, and go on by themselves.
async fn survives(
    name: &str,
    postgres: Postgres,
    fault: impl AsyncFnOnce(&Lab) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let lab = lab(name, postgres, &[]).await?;
    let mut fleet = Fleet::default();
    fleet.scale(&lab, 2).await?;
    lab.balanced(2, PATIENCE).await?;
    let load = lab.load(300, 60)?;
    lab.progressed(600, PATIENCE).await?;
    let began = Instant::now();
    fault(&lab).await?;
    let (lasted, before) = (began.elapsed(), lab.inbox());
    lab.progressed(before + 600, PATIENCE).await?;
    println!("{name}: lasted {lasted:.1?}, 600 more recorded {:.1?} after it", began.elapsed() - lasted);
    let ids = load.finish().await?;
    let ledger = lab.tally(&ids, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.dead.is_empty(), "{ledger}{}", lab.logs());
    ensure!(lab.starts() == 0, "{} starts are left", lab.starts());
    ensure!(lab.queued().await? == 0, "{} deliveries were not acked", lab.queued().await?);
    fleet.stop(&lab).await
}

/// Handler calls so far.
fn calls(lab: &Lab) -> anyhow::Result<usize> {
    Ok(warren_tests::Trace::read(&lab.dir)?.calls.len())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_own_database_that_is_gone_is_waited_for() -> anyhow::Result<()> {
    survives("pg-gone", Postgres::private("gone")?, async |lab| {
        let postgres = lab.postgres.as_ref().context("a database")?;
        postgres.stop_immediately()?;
        tokio::time::sleep(Duration::from_secs(length(3, 8))).await;
        let before = calls(lab)?;
        tokio::time::sleep(Duration::from_secs(length(4, 12))).await;
        let after = calls(lab)?;
        ensure!(before == after, "they take events although nothing can be recorded: {before}, then {after} calls");
        postgres.start()
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_own_database_that_freezes_is_waited_for() -> anyhow::Result<()> {
    survives("pg-frozen", Postgres::private("frozen")?, async |lab| {
        let postgres = lab.postgres.as_ref().context("a database")?;
        postgres.freeze()?;
        // Longer than a call of the store may take, which a test's pace makes four seconds.
        tokio::time::sleep(Duration::from_secs(6)).await;
        postgres.thaw()
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_somebody_holds_is_waited_for() -> anyhow::Result<()> {
    survives("pg-locked", Postgres::shared("pg-locked")?, async |lab| {
        let mut client = lab.postgres.as_ref().context("a database")?.client().await?;
        let held = client.transaction().await?;
        held.batch_execute(&lab.in_schema("LOCK TABLE {s}.inbox_0, {s}.outbox IN ACCESS EXCLUSIVE MODE")).await?;
        // Longer than several waits for a lock, of a second each at a test's pace.
        tokio::time::sleep(Duration::from_secs(6)).await;
        Ok(held.commit().await?)
    })
    .await
}

/// A proxy that passes everything but, each so often, the answer to a COMMIT: the connection ends instead.
async fn cutting_proxy(url: &str, every: usize) -> anyhow::Result<String> {
    let (scheme, rest) = url.split_once("://").context("a URL")?;
    let (user, place) = rest.split_once('@').context("a user")?;
    let (server, database) = place.split_once('/').context("a database")?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let server = server.to_owned();
    tokio::spawn(async move {
        let commits = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        while let Ok((client, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(&server).await else { continue };
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            tokio::spawn(pass(client, server, commits.clone(), every));
        }
    });
    Ok(format!("{scheme}://{user}@127.0.0.1:{port}/{database}?sslmode=disable"))
}

async fn pass(
    mut client: TcpStream,
    mut server: TcpStream,
    commits: std::sync::Arc<std::sync::atomic::AtomicUsize>,
    every: usize,
) -> std::io::Result<()> {
    let (mut there, mut back) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut cut = false;
    loop {
        tokio::select! {
            read = client.read(&mut there) => {
                let read = read?;
                if read == 0 { return Ok(()); }
                if there[..read].windows(7).any(|window| window == b"COMMIT\0") {
                    let n = commits.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
                    cut |= n.is_multiple_of(every);
                }
                server.write_all(&there[..read]).await?;
            }
            read = server.read(&mut back) => {
                let read = read?;
                if read == 0 { return Ok(()); }
                // 'C', a length, "COMMIT": it has happened, and nobody will hear of it.
                if cut && back[..read].windows(7).any(|window| window == b"COMMIT\0") { return Ok(()); }
                client.write_all(&back[..read]).await?;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_whose_answers_are_lost_are_resolved() -> anyhow::Result<()> {
    let mut lab = lab("pg-cut", Postgres::shared("pg-cut")?, &[]).await?;
    let direct = lab.environment.clone();
    let url = lab.postgres.as_ref().context("a database")?.url().to_owned();
    lab.set("DATABASE_URL", &cutting_proxy(&url, 20).await?);
    let mut fleet = Fleet::default();
    fleet.scale(&lab, 2).await?;
    lab.balanced(2, PATIENCE).await?;
    let load = lab.load(150, 60)?;
    lab.progressed(2_000, PATIENCE).await?;
    let ids = load.finish().await?;
    let ledger = lab.tally(&ids, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.dead.is_empty() && ledger.twice == 0, "{ledger}{}", lab.logs());
    let cuts = lab.logs().matches("the store refuses").count();
    ensure!(cuts > 0, "nothing was cut{}", lab.logs());
    fleet.stop(&lab).await?;
    lab.environment = direct;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transfers_whose_commits_answers_are_lost_are_applied_once() -> anyhow::Result<()> {
    let mut lab = lab("pg-cut-tx", Postgres::shared("pg-cut-tx")?, &[("TEST_TRANSFERS", "accounts,transfers")]).await?;
    Bank::open(&lab).await?;
    let url = lab.postgres.as_ref().context("a database")?.url().to_owned();
    lab.set("DATABASE_URL", &cutting_proxy(&url, 10).await?);
    let mut fleet = Fleet::default();
    fleet.scale(&lab, 2).await?;
    let load = lab.load_of(60, &[], transfer)?;
    lab.progressed(800, PATIENCE).await?;
    let ids = load.finish().await?;
    let ledger = lab.tally(&ids, PATIENCE).await?;
    Bank::balances(&lab)?;
    let applied = Bank::number(&lab, "SELECT count(*) FROM transfers")?;
    ensure!(ledger.adds_up() && ledger.handled == applied as usize, "{ledger}: {applied} applied{}", lab.logs());
    ensure!(lab.logs().contains("runs again"), "nothing was cut{}", lab.logs());
    fleet.stop(&lab).await
}

#[tokio::test]
async fn an_own_database_that_cannot_be_used_is_named_with_the_cure() -> anyhow::Result<()> {
    let mut lab = Lab::new("pg-errors")?.with_store(Postgres::private("errors")?);
    lab.set("WARREN_CONNECT_TIMEOUT", "2s");
    let postgres = lab.postgres.as_ref().context("a database")?;
    let (url, replica) = (postgres.url().to_owned(), postgres.replica()?);
    let (scheme, rest) = url.split_once("://").context("a URL")?;
    let (_, place) = rest.split_once('@').context("a user")?;
    let (server, database) = place.split_once('/').context("a database")?;
    let free = warren_tests::raw::free_port()?;
    let cases = [
        (
            format!("{scheme}://warren:hidden@{place}"),
            69,
            "password authentication failed",
            "correct user and password",
        ),
        (format!("{scheme}://warren:warren@{server}/nowhere"), 69, "does not exist", "create that database"),
        (format!("{scheme}://warren:warren@127.0.0.1:{free}/{database}"), 69, "refused", ""),
        (replica, 69, "does not allow writes", "the primary"),
        (format!("{url}?sslmode=require"), 69, "TLS", "sslmode"),
        (format!("{url}?sslmode=verify-full&sslrootcert=/no/such/file"), 64, "/no/such/file", "sslrootcert"),
        (
            format!("{scheme}://warren:hidden@{server}:what/{database}"),
            64,
            "DATABASE_URL",
            "postgres://user:password@host",
        ),
    ];
    for (url, code, problem, cure) in cases {
        lab.set("DATABASE_URL", &url);
        for command in ["run", "check"] {
            let (stdout, stderr) = warren_tests::process::expect_exit(&lab.run(&[command]).await?, code)?;
            let all = stdout + &stderr;
            ensure!(all.contains(problem) && all.contains(cure), "{command}, wanted '{problem}', '{cure}': {all}");
            ensure!(!all.contains("hidden"), "{command} shows a secret: {all}");
        }
    }
    lab.set("DATABASE_URL", &url);
    // Makes the schema.
    lab.run(&["check"]).await?;
    let client = lab.postgres.as_ref().context("a database")?.client().await?;
    client
        .batch_execute(&lab.in_schema("UPDATE {s}.meta SET value = '999' WHERE name IN ('version', 'needs')"))
        .await?;
    let (_, stderr) = warren_tests::process::expect_exit(&lab.run(&["run"]).await?, 69)?;
    ensure!(stderr.contains("schema 999") && stderr.contains("start the newer version"), "{stderr}");
    Ok(())
}

/// PgBouncer in transaction mode before a database: its URL. None, and it says so, where it cannot be had.
fn pooler(lab: &Lab) -> anyhow::Result<Option<(Process, String)>> {
    let base = warren_tests::broker::scratch().parent().context("target")?.join("pgbouncer");
    let unpacked = base.join("usr/sbin/pgbouncer");
    let installed = std::path::Path::new("/usr/sbin/pgbouncer");
    let program = if installed.exists() { installed.to_owned() } else { unpacked };
    if !program.exists() {
        // Unpacked and not installed: no service of the system's is started.
        std::fs::create_dir_all(&base)?;
        let get = "apt-get download pgbouncer libc-ares2 && for package in *.deb; do dpkg -x $package .; done";
        let got = std::process::Command::new("sh").args(["-c", get]).current_dir(&base).output();
        if !program.exists() {
            eprintln!("SKIPPED: no pgbouncer here, and its package cannot be had: {got:?}");
            return Ok(None);
        }
    }
    let url = lab.postgres.as_ref().context("a database")?.url();
    let place = url.split_once('@').context("a user")?.1;
    let (server, database) = place.split_once('/').context("a database")?;
    let (host, server_port) = server.split_once(':').context("a port")?;
    let port = warren_tests::raw::free_port()?;
    // Read by another user than root, whom PgBouncer refuses: not below a directory that only root may enter.
    let dir = std::env::temp_dir().join(format!("warren-pooler-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let (ini, users) = (dir.join("pgbouncer.ini"), dir.join("users"));
    std::fs::write(&users, "\"warren\" \"warren\"\n")?;
    let settings = format!(
        "[databases]\n* = host={host} port={server_port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
         unix_socket_dir =\nauth_type = plain\nauth_file = {}\npool_mode = transaction\ndefault_pool_size = 5\n",
        users.display()
    );
    std::fs::write(&ini, settings)?;
    let mut command = std::process::Command::new(&program);
    command.env("LD_LIBRARY_PATH", base.join("usr/lib/x86_64-linux-gnu"));
    if rustix::process::getuid().is_root() {
        command.args(["-u", "nobody"]);
    }
    command.arg(&ini);
    let running = Process::start(command, &lab.path("pooler.log"))?;
    Ok(Some((running, format!("postgres://warren:warren@127.0.0.1:{port}/{database}"))))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_by_transactions_may_stand_between() -> anyhow::Result<()> {
    let mut lab = lab("pg-pooler", Postgres::shared("pg-pooler")?, &[]).await?;
    let Some((_pooler, url)) = pooler(&lab)? else { return Ok(()) };
    lab.set("DATABASE_URL", &url);
    let mut fleet = Fleet::default();
    fleet.scale(&lab, 3).await?;
    lab.balanced(3, PATIENCE).await?;
    let load = lab.load(150, 60)?;
    lab.progressed(600, PATIENCE).await?;
    let victim = fleet.workers.keys().next().cloned().context("three run")?;
    fleet.workers.remove(&victim).context("it runs")?.kill().await?;
    lab.progressed(lab.inbox() + 600, PATIENCE).await?;
    let ids = load.finish().await?;
    let ledger = lab.tally(&ids, PATIENCE).await?;
    ensure!(ledger.adds_up() && ledger.dead.is_empty(), "{ledger}{}", lab.logs());
    fleet.stop(&lab).await
}

/// Certificates made here: of an authority, of a server by it for this name, and of another authority.
fn certificates(lab: &Lab, name: &str) -> anyhow::Result<()> {
    let commands = [
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ours -keyout ca.key -out ca.pem \
         -addext basicConstraints=critical,CA:TRUE"
            .to_owned(),
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=theirs -keyout other.key \
         -out other.pem -addext basicConstraints=critical,CA:TRUE"
            .to_owned(),
        "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=server -keyout server.key -out server.csr".to_owned(),
        format!("printf 'subjectAltName={name}\n' >san"),
        "openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san -out server.pem".to_owned(),
    ];
    for command in commands {
        let output = std::process::Command::new("sh").args(["-c", &command]).current_dir(&lab.dir).output()?;
        ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

#[tokio::test]
async fn an_own_database_is_reached_by_tls_as_sslmode_says_and_never_by_less() -> anyhow::Result<()> {
    let mut lab = Lab::new("pg-tls")?.with_store(Postgres::private("tls")?);
    lab.declare().await?;
    let url = lab.postgres.as_ref().context("a database")?.url().to_owned();
    let (ours, theirs) = (lab.path("ca.pem"), lab.path("other.pem"));
    // By address, then under a name that is not the one in the URL.
    for (name, right) in [("IP:127.0.0.1", true), ("DNS:elsewhere.example", false)] {
        certificates(&lab, name)?;
        let files = [
            ("server.pem", std::fs::read(lab.path("server.pem"))?),
            ("server.key", std::fs::read(lab.path("server.key"))?),
        ];
        let files = files.each_ref().map(|(name, content)| (*name, content.as_slice()));
        lab.postgres
            .as_ref()
            .context("a database")?
            .set("ssl = on\nssl_cert_file = 'server.pem'\nssl_key_file = 'server.key'\n", &files)?;
        let (ours, theirs) = (ours.display(), theirs.display());
        let cases = [
            ("sslmode=require".to_owned(), true),
            (format!("sslmode=verify-ca&sslrootcert={ours}"), true),
            (format!("sslmode=verify-ca&sslrootcert={theirs}"), false),
            (format!("sslmode=require&sslrootcert={theirs}"), false),
            (format!("sslmode=verify-full&sslrootcert={ours}"), right),
            (format!("sslmode=verify-full&sslrootcert={theirs}"), false),
            // Of the system's authorities none made it.
            ("sslmode=verify-full".to_owned(), false),
        ];
        for (parameters, good) in cases {
            lab.set("DATABASE_URL", &format!("{url}?{parameters}"));
            let (stdout, stderr) =
                warren_tests::process::expect_exit(&lab.run(&["check"]).await?, if good { 0 } else { 69 })
                    .with_context(|| format!("{name}: {parameters}"))?;
            ensure!(good || stdout.contains("certificate"), "{name}: {parameters}: {stdout}{stderr}");
        }
    }
    Ok(())
}
