//! A store that cannot be used, or is full for a while.
use anyhow::{Context, ensure};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use warren_tests::process::expect_exit;
use warren_tests::raw::free_port;
use warren_tests::{Lab, Ledger, Postgres, event, events, until};

const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test]
async fn a_store_that_cannot_be_opened_is_named_with_the_cure() -> anyhow::Result<()> {
    let mut lab = Lab::new("storage-open")?;
    let (file, text) = (lab.path("file"), lab.path("text.db"));
    std::fs::write(&file, "")?;
    std::fs::write(&text, "This is a shopping list and no database.\n".repeat(100))?;
    let under = file.join("warren.db");
    let nowhere = lab.path("no/such/directory/warren.db");
    for (path, cure) in [
        (&under, "set DATABASE_URL to another place"),
        (&nowhere, "set DATABASE_URL to another place"),
        (&text, "the file is something else"),
    ] {
        let path = path.to_str().context("UTF-8")?;
        lab.set("DATABASE_URL", &format!("sqlite://{path}"));
        for command in ["run", "check"] {
            let (stdout, stderr) = expect_exit(&lab.run(&[command]).await?, 69)?;
            let all = stdout + &stderr;
            ensure!(all.contains(path) && all.contains(cure), "{command}: {all}");
        }
    }
    ensure!(std::fs::read_to_string(&text)?.starts_with("This is a shopping list"), "the file was changed");
    ensure!(lab.names()?.is_empty(), "something was declared: {:?}", lab.names()?);
    Ok(())
}

/// A disk of a megabyte or two, and a file that fills it.
struct SmallDisk {
    dir: PathBuf,
}

impl SmallDisk {
    /// None, and says so, where this user may not mount.
    fn mount(dir: &Path) -> anyhow::Result<Option<Self>> {
        std::fs::create_dir_all(dir)?;
        // What a killed run left.
        while Command::new("umount").arg(dir).output().is_ok_and(|output| output.status.success()) {}
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "warren"]).arg(dir).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Ok(Some(Self { dir: dir.to_owned() }));
        }
        eprintln!("SKIPPED: a full disk needs the right to mount a small one");
        Ok(None)
    }

    fn fill(&self) -> anyhow::Result<()> {
        use std::io::Write;
        let mut file = std::fs::File::create(self.dir.join("filler"))?;
        for size in [64 << 10, 4096] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
        Ok(())
    }

    fn make_room(&self) -> anyhow::Result<()> {
        Ok(std::fs::remove_file(self.dir.join("filler"))?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg("--lazy").arg(&self.dir).output().ok();
    }
}

/// A lab whose store is on a small disk. The disk ends before the lab.
async fn on_a_small_disk(name: &str) -> anyhow::Result<Option<(SmallDisk, Lab, String)>> {
    // Outside the lab's own directory, which the next run deletes.
    let Some(disk) = SmallDisk::mount(&warren_tests::broker::scratch().join(format!("disk-of-{name}")))? else {
        return Ok(None);
    };
    let mut lab = Lab::new(name)?;
    let store = disk.dir.join("warren.db");
    lab.set("DATABASE_URL", &format!("sqlite://{}", store.display()));
    // Where the lab's counts look.
    std::os::unix::fs::symlink(&store, lab.path("warren.db"))?;
    let address = format!("127.0.0.1:{}", free_port()?);
    lab.set("WARREN_ADMIN_ADDR", &address);
    lab.declare().await?;
    Ok(Some((disk, lab, address)))
}

/// Events large enough that a full disk notices them.
fn heavy(count: usize) -> Vec<serde_json::Value> {
    let mut events = events(count, 10);
    for event in &mut events {
        event["data"]["dead"] = json!(true);
        event["data"]["fill"] = json!("x".repeat(4000));
    }
    events
}

#[tokio::test]
async fn a_worker_whose_disk_is_full_says_so_and_goes_on_when_there_is_room() -> anyhow::Result<()> {
    let Some((disk, lab, address)) = on_a_small_disk("storage-full").await? else { return Ok(()) };
    let mut worker = lab.worker()?;
    lab.send(&events(20, 5)).await?;
    lab.settled(20, PATIENCE).await?;
    disk.fill()?;
    let mut more = heavy(40);
    more.iter_mut().for_each(|event| event["id"] = json!(format!("more-{}", event["id"])));
    let ids = lab.send(&more).await?;
    until("the worker says so", PATIENCE, || worker.log().contains("nothing is acked meanwhile")).await?;
    // Not only at the moment of a failed write: what can be read meanwhile does not make it well.
    until("not ready", PATIENCE, || lab.page(&address, "/readyz").is_ok_and(|(status, _)| status == 503)).await?;
    for _ in 0..20 {
        let ready = lab.page(&address, "/readyz")?;
        ensure!(ready.0 == 503 && ready.1.contains("the store refuses"), "{ready:?}");
        lab.send(&[event("same", "order.placed", "another", json!({}))]).await?;
    }
    ensure!(lab.page(&address, "/livez")?.0 == 200, "a full disk is no reason to restart");
    ensure!(lab.letters().await?.is_empty(), "a letter of what was not recorded");
    disk.make_room()?;
    lab.settled(61, PATIENCE).await.with_context(|| lab.logs())?;
    let letters = lab.dead_letters(40, PATIENCE).await?;
    ensure!(ids.iter().all(|id| letters.iter().filter(|letter| letter.id == *id).count() == 1), "{}", letters.len());
    ensure!(worker.is_running() && worker.log().contains("full"), "{}", worker.log());
    until("ready again", PATIENCE, || lab.page(&address, "/readyz").is_ok_and(|(status, _)| status == 200)).await?;
    let calls = lab.calls().len();
    ensure!(calls == 61, "a commit is repeated, not a handler: {calls} calls");
    Ok(())
}

#[tokio::test]
async fn nothing_is_acked_while_the_disk_is_full() -> anyhow::Result<()> {
    let Some((disk, lab, _)) = on_a_small_disk("storage-acks").await? else { return Ok(()) };
    let recorded = lab.recorded().await?;
    let mut worker = lab.worker()?;
    until("it takes events", PATIENCE, || worker.log().contains("takes events")).await?;
    disk.fill()?;
    let ids = lab.send(&heavy(40)).await?;
    until("the worker says so", PATIENCE, || worker.log().contains("nothing is acked meanwhile")).await?;
    // One event of each key: the next ones wait until it is recorded.
    until("the handlers ran", PATIENCE, || lab.calls().len() >= 10).await?;
    worker.kill().await?;
    disk.make_room()?;
    // Whatever had been acked would be missing now.
    let _second = lab.worker()?;
    lab.settled(40, PATIENCE).await.with_context(|| lab.logs())?;
    lab.dead_letters(40, PATIENCE).await?;
    let ledger = Ledger::of(&ids, &recorded, &lab.dead().await?)?;
    ensure!(ledger.lost == 0 && ledger.dead.values().sum::<usize>() == 40, "{ledger:?}");
    Ok(())
}

#[tokio::test]
async fn a_start_on_a_full_disk_names_the_cure() -> anyhow::Result<()> {
    let Some((disk, lab, _)) = on_a_small_disk("storage-start").await? else { return Ok(()) };
    disk.fill()?;
    let (stdout, stderr) = expect_exit(&lab.run(&["run"]).await?, 69)?;
    let all = stdout + &stderr;
    ensure!(all.contains("make room on the disk") && all.contains("warren.db"), "{all}");
    Ok(())
}

/// Three events in the midst of others make what the store refuses to hold.
async fn what_cannot_be_held_dies_alone(
    mut lab: Lab,
    refuse: impl AsyncFnOnce(&Lab) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let routes = lab.fresh_route("}, {on: odd, emit: order.unholdable");
    lab.set("WARREN_ROUTES", &routes);
    lab.declare().await?;
    let heard = lab.recorded().await?;
    let mut all = events(300, 20);
    for (n, at) in [(1, 30), (2, 100), (3, 101)] {
        all.insert(at, event(&format!("odd-{n}"), "odd", &format!("k{n}"), json!({})));
    }
    // The schema is made by the first that opens it.
    lab.run(&["check"]).await?;
    refuse(&lab).await?;
    let ids = lab.send(&all).await?;
    let mut worker = lab.worker()?;
    let ledger = lab.account(&ids, &heard, PATIENCE).await?;
    let mut dead = lab.dead().await?;
    dead.sort();
    let expected = ["odd-1", "odd-2", "odd-3"].map(|id| (id.to_owned(), "unstorable".to_owned()));
    ensure!(dead == expected, "{dead:?}{}", lab.logs());
    ensure!(ledger.adds_up() && ledger.handled == 300, "{ledger:?}");
    lab.calls_in_order()?;
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    ensure!(lab.starts() == 0 && lab.queued().await? == 0, "{} starts, {} queued", lab.starts(), lab.queued().await?);
    Ok(())
}

#[tokio::test]
async fn what_a_file_cannot_hold_dies_alone_with_the_reason() -> anyhow::Result<()> {
    let mut lab = Lab::new("storage-odd")?;
    let path = lab.path("warren.db");
    lab.set("DATABASE_URL", &format!("sqlite://{}", path.display()));
    lab.postgres = None;
    what_cannot_be_held_dies_alone(lab, async |_| {
        Ok(rusqlite::Connection::open(&path)?.execute_batch(
            "CREATE TRIGGER never BEFORE INSERT ON outbox WHEN instr(NEW.envelope, 'order.unholdable')
                 BEGIN SELECT RAISE(ABORT, 'unholdable'); END",
        )?)
    })
    .await
}

#[tokio::test]
async fn what_a_database_cannot_hold_dies_alone_with_the_reason() -> anyhow::Result<()> {
    let lab = Lab::new("storage-odd-pg")?.with_store(Postgres::shared("storage-odd-pg")?);
    what_cannot_be_held_dies_alone(lab, async |lab| {
        let client = lab.postgres.as_ref().context("a database")?.client().await?;
        let never = "ALTER TABLE {s}.outbox ADD CHECK (position('order.unholdable' in envelope) = 0)";
        Ok(client.batch_execute(&lab.in_schema(never)).await?)
    })
    .await
}
