//! Queues that are full, emptied: from the first delivery to the last ack.
use super::{note, stranger};
use crate::bench::{Bench, say};
use crate::measure;
use crate::peers::{self, POSTGRES};
use crate::results::Results;
use crate::site::Site;
use anyhow::{Context, ensure};
use std::process::Command;

/// Who empties them.
struct Contestant {
    name: &'static str,
    make: Make,
    /// The share of a fast row's events that takes it about as long.
    share: f64,
}

enum Make {
    /// A client of ours.
    Own,
    /// One whose store is on PostgreSQL.
    OnPostgres,
    /// Another make that reads our messages.
    Reader(&'static str),
    /// Another make with messages and queues of its own.
    Stranger,
}

/// Eight partitions, 200 each.
const UNACKED: u64 = 1600;

const fn own(name: &'static str) -> Contestant {
    Contestant { name, make: Make::Own, share: 1.0 }
}

const CONTESTANTS: [Contestant; 8] = [
    own("raw_each"),
    own("raw_multiple"),
    own("warren_sqlite"),
    Contestant { name: "warren_postgres", make: Make::OnPostgres, share: 0.5 },
    Contestant { name: "amqplib_each", make: Make::Reader("amqplib"), share: 1.0 },
    own("warren_exec"),
    Contestant { name: "dramatiq", make: Make::Stranger, share: 0.25 },
    Contestant { name: "celery", make: Make::Stranger, share: 0.1 },
];

pub(super) fn run(bench: &Bench, results: &mut Results) -> anyhow::Result<()> {
    say("drain");
    for round in 1..=bench.plan.rounds {
        for contestant in CONTESTANTS.iter().filter(|contestant| bench.wants(contestant.name)) {
            if let Some(why) = contestant.absent(bench) {
                results.absent(&format!("drain.{}", contestant.name), why);
                continue;
            }
            let measured = contestant.measure(bench).with_context(|| format!("drain: {}", contestant.name))?;
            note(results, &format!("drain.{}", contestant.name), round, measured);
        }
    }
    Ok(())
}

impl Contestant {
    fn absent(&self, bench: &Bench) -> Option<String> {
        match self.make {
            Make::Own => None,
            Make::OnPostgres => bench.peers.absent(POSTGRES),
            Make::Reader(peer) => bench.peers.absent(peer),
            Make::Stranger => bench.peers.absent(self.name),
        }
    }

    fn measure(&self, bench: &Bench) -> anyhow::Result<measure::Figures> {
        let count = (bench.plan.drain as f64 * self.share).ceil() as u64;
        let site = match self.make {
            Make::OnPostgres => bench.site()?.on_postgres()?,
            _ => bench.site()?,
        };
        let ready = self.prepare(bench, &site, count)?;
        let run = bench.run(&ready)?;
        // RabbitMQ 3.10 drops acks that it still buffers when a channel closes, so a few may be left; never more than
        // were unacked at once.
        let left = site.depth(0)?;
        ensure!(left <= UNACKED, "{left} of {count} events are still there: they were not all acked");
        if left > 0 {
            say(&format!("    the broker dropped {left} of its acks when it closed"));
        }
        run.between(count)
    }

    /// Fills the queues; returns who empties them.
    fn prepare(&self, bench: &Bench, site: &Site<'_>, count: u64) -> anyhow::Result<Command> {
        match self.make {
            Make::Own | Make::OnPostgres => {
                site.load(1, count)?;
                bench.client(self.name, site, count)
            }
            Make::Reader(peer) => {
                site.load(1, count)?;
                let mut drain = peers::command(peer, "drain");
                bench.describe(&mut drain, site, count);
                Ok(drain)
            }
            Make::Stranger => stranger(bench, site, self.name, count, 1),
        }
    }
}
