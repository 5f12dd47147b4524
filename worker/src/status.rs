//! `warren-worker status`: the pool as its workers and the broker tell it.
use crate::fleet;
use crate::store::Count;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;
use warren_publisher::Broker;
use warren_publisher::declare::{self, Depth};
use warren_shared::env::Settings;
use warren_shared::fleet::{Word, line, seats};
use warren_shared::retry::LADDER;
use warren_shared::topology::{Order, Topology};

/// The pool.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pool: String,
    /// What needs a person, each with its cure.
    pub(crate) needs: Vec<String>,
    workers: Vec<Worker>,
    lanes: Vec<Lane>,
    /// Messages that wait, by delay.
    delayed: BTreeMap<&'static str, u32>,
    dead: u32,
    unrouted: u32,
}

#[derive(Debug, Serialize)]
struct Worker {
    name: String,
    run: String,
    version: String,
    /// Seconds since it started, by its clock.
    up: i64,
    capacity: u32,
    running: u32,
    owns: usize,
    stands_by: usize,
    rate: f64,
    troubles: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Lane {
    lane: String,
    weight: u32,
    ready: u32,
    unacked: usize,
    rate: f64,
    oldest_ms: Option<u64>,
    partitions: Vec<Partition>,
}

#[derive(Debug, Serialize)]
struct Partition {
    queue: String,
    /// Who is to take its events, and who is next; all compete where no order is kept.
    owner: Option<String>,
    standby: Option<String>,
    /// The workers in the queue's line, the active one first.
    line: Vec<String>,
    ready: u32,
    consumers: u32,
    unacked: usize,
    rate: f64,
    oldest_ms: Option<u64>,
}

/// Asks broker and workers.
///
/// # Errors
/// The broker cannot be asked.
pub(crate) async fn report(settings: &Settings, topology: &Topology) -> anyhow::Result<Report> {
    let broker = Broker::new(settings.amqp.clone(), "warren-worker status");
    let link = broker.connect_within("status", settings.connect_timeout).await?;
    let partitions = topology.queues();
    let mut queues = partitions.clone();
    queues.extend(LADDER.map(|step| topology.delay(step)));
    queues.extend([topology.dead(), topology.unrouted()]);
    let depths = declare::depths(&link, &queues).await;
    link.close().await;
    let depths = depths?;
    if depths.iter().all(Option::is_none) {
        anyhow::bail!(
            "the broker has no pool '{}': is WARREN_POOL right? 'warren-worker topology --apply' declares it",
            topology.pool
        );
    }
    let words = fleet::ask(broker, topology, settings.connect_timeout, usize::MAX).await?;
    let now = jiff::Timestamp::now().as_millisecond();
    Ok(gather(topology, &queues.into_iter().zip(depths).collect(), words, now))
}

fn gather(topology: &Topology, depths: &BTreeMap<String, Option<Depth>>, words: Vec<Word>, now: i64) -> Report {
    let depth = |queue: &str| depths.get(queue).copied().flatten().unwrap_or_default();
    let queues = topology.queues();
    let lanes = topology.lanes.iter().flat_map(|lane| vec![lane.name.as_str(); topology.partitions.into()]);
    let partitions: Vec<(&str, &str)> = lanes.zip(queues.iter().map(String::as_str)).collect();
    let seats = match topology.order {
        Order::Key => seats(&partitions, words.iter()),
        Order::None => vec![Default::default(); queues.len()],
    };
    let mut needs: Vec<String> = Vec::new();
    let missing: Vec<&str> = depths.iter().filter(|(_, depth)| depth.is_none()).map(|(q, _)| q.as_str()).collect();
    if !missing.is_empty() {
        needs.push(format!("not declared: {}: run 'warren-worker topology --apply'", shorten(&missing)));
    }
    let partition = |queue: &String, seat: &warren_shared::assignment::Seat| {
        let line = line(&words, queue);
        let Depth { ready, consumers } = depth(queue);
        Partition {
            queue: queue.clone(),
            owner: seat.owner.as_ref().map(|member| member.name.clone()),
            standby: seat.standby.as_ref().map(|member| member.name.clone()),
            ready,
            consumers,
            unacked: line.iter().map(|(held, _)| held.unacked).sum(),
            rate: total(line.iter().map(|(held, _)| held.rate)),
            oldest_ms: line.iter().filter_map(|(held, _)| held.oldest).max(),
            line: line.into_iter().map(|(_, name)| name.to_owned()).collect(),
        }
    };
    let mut all: Vec<Partition> = queues.iter().zip(&seats).map(|(queue, seat)| partition(queue, seat)).collect();
    let orphans: Vec<&str> = all.iter().filter(|p| p.consumers == 0).map(|p| p.queue.as_str()).collect();
    if !orphans.is_empty() {
        needs.push(format!("no consumer: {}: start workers", shorten(&orphans)));
    }
    let deaf = |p: &&Partition| p.consumers > 0 && p.line.is_empty() && p.ready > 0;
    let deaf: Vec<&str> = all.iter().filter(deaf).map(|p| p.queue.as_str()).collect();
    if !deaf.is_empty() {
        needs.push(format!(
            "events wait, and who consumes does not answer: {}: look for a frozen or foreign consumer",
            shorten(&deaf)
        ));
    }
    let (dead, unrouted) = (depth(&topology.dead()).ready, depth(&topology.unrouted()).ready);
    if unrouted > 0 {
        needs.push(format!("{unrouted} in {}: a partition's queue or binding is gone, or a lane was taken away: see 'warren-worker topology'", topology.unrouted()));
    }
    if dead > 0 {
        needs.push(format!("{dead} dead letters: see 'warren-worker dead list', then replay or drop them"));
    }
    for word in words.iter().filter(|word| !word.troubles.is_empty()) {
        needs.push(format!("worker {}: {}", word.name, word.troubles.join("; ")));
    }
    let seats = |run: &str, own: bool| {
        let is = |seat: &&warren_shared::assignment::Seat| {
            let member = if own { &seat.owner } else { &seat.standby };
            member.as_ref().is_some_and(|member| member.run == run)
        };
        seats.iter().filter(is).count()
    };
    let workers = words.iter().map(|word| Worker {
        name: word.name.clone(),
        run: word.run.clone(),
        version: word.version.clone(),
        up: (now - word.since).max(0) / 1000,
        capacity: word.capacity,
        running: word.running,
        owns: seats(&word.run, true),
        stands_by: seats(&word.run, false),
        rate: total(word.held.iter().map(|held| held.rate)),
        troubles: word.troubles.clone(),
    });
    let workers = workers.collect();
    let lane = |lane: &warren_shared::lane::Lane| {
        let partitions: Vec<Partition> = all.drain(..usize::from(topology.partitions)).collect();
        Lane {
            lane: lane.name.clone(),
            weight: lane.weight,
            ready: partitions.iter().map(|p| p.ready).sum(),
            unacked: partitions.iter().map(|p| p.unacked).sum(),
            rate: total(partitions.iter().map(|p| p.rate)),
            oldest_ms: partitions.iter().filter_map(|p| p.oldest_ms).max(),
            partitions,
        }
    };
    let lanes = topology.lanes.iter().map(lane).collect();
    let delayed = LADDER.map(|step| (step.name, depth(&topology.delay(step)).ready)).into();
    Report { pool: topology.pool.clone(), needs, workers, lanes, delayed, dead, unrouted }
}

/// A sum of rates. Without any the library's own sum is -0.0.
fn total(rates: impl Iterator<Item = f64>) -> f64 {
    rates.fold(0.0, |sum, rate| sum + rate)
}

/// What is to be said of the bindings where nobody looked at them, to be read after their name.
pub(crate) const UNSEEN: &str = "are not looked at, as AMQP does not show them: workers with WARREN_DECLARE=auto make them again \
                                 once a minute, 'warren-worker topology --apply' at once";

/// What is to be done about instances that are stuck.
pub(crate) fn stuck(count: &Count) -> String {
    let Count { name, states, oldest, .. } = count;
    let (many, are) = if *states == 1 { ("1 instance".into(), "is") } else { (format!("{states} instances"), "are") };
    let since = age(u64::try_from(oldest.as_millis()).ok());
    format!(
        "{many} of process '{name}' {are} stuck, for {since} at the longest: see 'warren-worker process list --status stuck', \
         then resume or cancel"
    )
}

/// The first few names, and how many more there are.
fn shorten(names: &[&str]) -> String {
    let shown = names.iter().take(5).copied().collect::<Vec<_>>().join(", ");
    if names.len() > 5 { format!("{shown} and {} more", names.len() - 5) } else { shown }
}

impl Report {
    /// For people.
    pub(crate) fn table(&self) -> String {
        let mut rows = vec![row(["WORKER", "UP", "RUNS", "OF", "OWNS", "STANDS BY", "EVENTS/S", "VERSION"])];
        rows.extend(self.workers.iter().map(|w| {
            let cells = [w.running.to_string(), w.capacity.to_string(), w.owns.to_string(), w.stands_by.to_string()];
            let [running, capacity, owns, stands_by] = &cells;
            row([
                &w.name,
                &age(Some(w.up.unsigned_abs() * 1000)),
                running,
                capacity,
                owns,
                stands_by,
                &rate(w.rate),
                &w.version,
            ])
        }));
        let mut text = format!("pool {}\n\n{}", self.pool, align(&rows));
        let mut rows = vec![row(["PARTITION", "OWNER", "STANDBY", "READY", "UNACKED", "EVENTS/S", "OLDEST", ""])];
        for lane in &self.lanes {
            let name = format!("{} (weight {})", lane.lane, lane.weight);
            let (ready, unacked) = (lane.ready.to_string(), lane.unacked.to_string());
            rows.push(row([&name, "", "", &ready, &unacked, &rate(lane.rate), &age(lane.oldest_ms), ""]));
            rows.extend(lane.partitions.iter().map(|p| {
                let short = p.queue.rsplit('.').next().unwrap_or_default();
                let name = |name: &Option<String>| name.clone().unwrap_or_else(|| "-".into());
                // While it is handed over, another still serves.
                let note = match (p.line.first(), &p.owner) {
                    (Some(active), Some(owner)) if active != owner => format!("served by {active}"),
                    (None, _) if p.consumers == 0 => "no consumer".into(),
                    _ => String::new(),
                };
                let (ready, unacked) = (p.ready.to_string(), p.unacked.to_string());
                let (owner, standby) = (name(&p.owner), name(&p.standby));
                row([
                    &format!("  {short}"),
                    &owner,
                    &standby,
                    &ready,
                    &unacked,
                    &rate(p.rate),
                    &age(p.oldest_ms),
                    &note,
                ])
            }));
        }
        let delayed: Vec<String> =
            self.delayed.iter().filter(|(_, n)| **n > 0).map(|(step, n)| format!("{n} for {step}")).collect();
        let sum: u32 = self.delayed.values().sum();
        let by = if sum > 0 { format!(" ({})", delayed.join(", ")) } else { String::new() };
        let _ =
            write!(text, "\n{}\ndelayed {sum}{by}   dead {}   unrouted {}\n", align(&rows), self.dead, self.unrouted);
        let _ = writeln!(text, "bindings {UNSEEN}");
        for need in &self.needs {
            let _ = writeln!(text, "needs a person: {need}");
        }
        text
    }
}

fn row(cells: [&str; 8]) -> [String; 8] {
    // A name is somebody's input: it must not move the cursor.
    cells.map(|cell| cell.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
}

fn align(rows: &[[String; 8]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..8).map(width).collect();
    let line = |row: &[String; 8]| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

fn rate(rate: f64) -> String {
    if rate < 10.0 { format!("{rate:.1}") } else { format!("{rate:.0}") }
}

fn age(millis: Option<u64>) -> String {
    let Some(millis) = millis else { return "-".into() };
    match Duration::from_millis(millis).as_secs() {
        0 => format!("{millis}ms"),
        s @ 1..120 => format!("{s}s"),
        s @ 120..7200 => format!("{}m", s / 60),
        s @ 7200..172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
