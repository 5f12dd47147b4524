//! What the laws cost an event, in nanoseconds: the part of the data path that no broker, store or handler explains.
//!
//! `cargo bench -p warren-bench --bench laws` measures, in about 20 s; with `-- --test` each runs once.
use criterion::{BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput, measurement::WallTime};
use std::hint::black_box;
use std::time::Duration;
use warren_shared::acks::Ledger;
use warren_shared::delivery::{Fact, Law, State, Wait, next};
use warren_shared::pattern::Pattern;
use warren_shared::retry::{Failure, Policy};
use warren_shared::schedule::Schedule;
use warren_shared::{Event, Identity, Limits, Message};

fn main() -> anyhow::Result<()> {
    let mut criterion = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .sample_size(20)
        .configure_from_args();
    ledger(&mut criterion);
    schedule(&mut criterion);
    codec(&mut criterion)?;
    pattern(&mut criterion)?;
    delivery(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}

/// A prefetch full of tags is opened and settled, then acked: each law's cost is that of one event.
fn ledger(criterion: &mut Criterion) {
    const PREFETCH: u64 = 256;
    let in_order: Vec<u64> = (0..PREFETCH).collect();
    // An odd stride visits every place of a power of two once.
    let shuffled: Vec<u64> = (0..PREFETCH).map(|i| i * 77 % PREFETCH).collect();
    let mut group = events(criterion, "ledger", PREFETCH);
    for (name, order) in [("in order", &in_order), ("shuffled", &shuffled)] {
        let (mut ledger, mut tag) = (Ledger::default(), 1);
        group.bench_function(name, |b| b.iter(|| round(&mut ledger, &mut tag, order)));
    }
    // The handler of one delivery takes long; 20,000 behind it are done with, and the next prefetch comes.
    let stuck = || {
        let mut ledger = Ledger::default();
        (1..20_000).for_each(|tag| ledger.open(tag));
        (2..20_000).for_each(|tag| ledger.settle(tag));
        black_box((ledger.sweep(), ledger.sweep()));
        ledger
    };
    group.bench_function("behind a stuck one", |b| {
        b.iter_batched_ref(stuck, |ledger| round(ledger, &mut 20_000, &in_order), BatchSize::LargeInput);
    });
}

/// Settles 32 at a time: what a batch of the store commits.
fn round(ledger: &mut Ledger, tag: &mut u64, order: &[u64]) {
    let first = *tag;
    *tag += order.len() as u64;
    (first..*tag).for_each(|tag| ledger.open(tag));
    for batch in order.chunks(32) {
        batch.iter().for_each(|place| ledger.settle(first + place));
        black_box(ledger.flush());
    }
    black_box((ledger.sweep(), ledger.sweep()));
}

/// One event comes, one goes, beside 10,000 that wait, in three lanes.
fn schedule(criterion: &mut Criterion) {
    const WAITING: u64 = 10_000;
    let mut group = events(criterion, "schedule", 1);
    for keys in [10_000, 1] {
        let mut schedule = Schedule::new([6, 3, 1]);
        let mut n = 0_u64;
        let mut push = |schedule: &mut Schedule<u64, u64>| {
            n += 1;
            // Keys come as hashes: neighbours are far apart.
            let key = (n % keys).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            schedule.push(key, (n % 3) as usize, 0, n / 30, n);
        };
        (0..WAITING).for_each(|_| push(&mut schedule));
        group.bench_function(BenchmarkId::new("push, take, finish; keys", keys), |b| {
            b.iter(|| {
                push(&mut schedule);
                if let Some((key, value)) = schedule.take() {
                    black_box(value);
                    schedule.finish(&key);
                }
            });
        });
    }
}

fn codec(criterion: &mut Criterion) -> anyhow::Result<()> {
    let limits = Limits::default();
    let event = event()?;
    let binary = Message::write(&event, "warren.events");
    let structured = Message {
        content_type: Some("application/cloudevents+json; charset=utf-8".into()),
        body: event.to_json().into_bytes(),
        ..Message::default()
    };
    let plain = Message { headers: Vec::new(), app_id: Some("shop".into()), ..binary.clone() };
    let mut group = events(criterion, "codec", 1);
    for (name, message) in [("read binary", &binary), ("read structured", &structured), ("read plain", &plain)] {
        message.read(limits, String::new)?;
        group.bench_function(name, |b| b.iter(|| message.read(limits, String::new)));
    }
    group.bench_function("write binary", |b| b.iter(|| Message::write(black_box(&event), "warren.events")));
    group.bench_function("write structured", |b| b.iter(|| black_box(&event).to_json()));
    group.bench_function("identity", |b| b.iter(|| Identity::of(black_box(event.source()), black_box(event.id()))));
    Ok(())
}

/// 256 bytes of JSON data, and the attributes that publishers usually set.
fn event() -> anyhow::Result<Event> {
    let mut data = br#"{"order":4711,"customer":"c-0815","total":99.5,"pad":""#.to_vec();
    data.resize(254, b'x');
    data.extend(b"\"}");
    Ok(Event::new("7d444840-9dc0-11d1-b245-5ffdce74fad2", "/shop/orders", "order.placed")?
        .with("time", "2025-01-02T03:04:05.678Z".into())?
        .with("partitionkey", "c-0815".into())?
        .with_json(&data, Limits::default())?)
}

fn pattern(criterion: &mut Criterion) -> anyhow::Result<()> {
    let mut group = events(criterion, "pattern", 1);
    for text in ["order.placed", "order.*", "#", "order.#.late"] {
        let pattern = Pattern::parse(text).map_err(anyhow::Error::msg)?;
        group.bench_function(text, |b| b.iter(|| pattern.matches(black_box("order.placed"))));
    }
    Ok(())
}

/// The whole life of a delivery by the table.
fn delivery(criterion: &mut Criterion) -> anyhow::Result<()> {
    let law = Law { retry: Policy::default(), wait: Wait::InLadder, crash_limit: 3 };
    let done = [Fact::Fresh { attempt: 1 }, Fact::Succeeded, Fact::Committed, Fact::Acked];
    let failed = Fact::Failed { failure: Failure::Transient { after: None }, chance: 0.5 };
    let parked = [Fact::Fresh { attempt: 1 }, failed, Fact::Confirmed, Fact::Acked];
    let mut group = events(criterion, "delivery", 1);
    for (name, facts) in [("handled", &done), ("parked", &parked)] {
        live(facts, &law)?;
        group.bench_function(name, |b| b.iter(|| live(black_box(facts), black_box(&law))));
    }
    Ok(())
}

fn live(facts: &[Fact], law: &Law) -> anyhow::Result<State> {
    let mut state = State::Received;
    for fact in facts {
        let (to, action) = next(state, *fact, law)?;
        black_box(action);
        state = to;
    }
    Ok(state)
}

/// A group whose figures are read as events, `count` an iteration.
fn events<'a>(criterion: &'a mut Criterion, name: &str, count: u64) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(count));
    group
}
