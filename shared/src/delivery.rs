//! The life of one delivery, from receipt to settlement: the whole law as one table.
//!
//! ```text
//!            known ──────────────────────────────────────────────▶ Safe ──▶ Settled
//!            unreadable ─▶ Burying ── confirmed ─────────────────▶ Safe
//! Received ─ early ──────▶ Parking ── confirmed ─(Leaving)───────▶ Safe
//!            routed elsewhere ▶ Unroutable ── waited ─▶ Condemned
//!            fresh ──────▶ Running ── succeeded ─▶ Succeeded ─────▶ Safe     (committed, or superseded)
//!                             ▲                       ├ outdated: the state that it rests on has changed
//!                             │                       └ refused: the store cannot hold it ─▶ Condemned
//!            redelivered ▶ Suspected ─ recorded ─▶ Running | Suspected, alone | Accused | Condemned
//!                             ▲                                   Accused ── waited ─▶ Suspected
//!                          Running ── failed ────▶ Parking | Holding ─▶ Running | Condemned
//!                                                  Condemned ─────▶ Safe     (committed, or superseded)
//!            gone, interrupted ─(Leaving)─▶ Abandoned: the broker delivers it again
//! ```
//!
//! A first delivery takes the fast path: nothing is written before its handler runs. A redelivered event's start is
//! recorded first, beside those of workers that had it before and neither finished it nor gave it back. They died with it, or
//! lost their connection and live. Until `crash_limit` of them are known to be dead it is not condemned; where so many may be,
//! it waits until that is known. Of the deaths in company one counts at most where that leaves one to spare, whoever of them was
//! to blame: each further one it died alone. Success and death commit in one store transaction with what they send (results, the dead
//! letter), so no event is ever both done and dead.
use crate::retry::{Failure, Policy, Verdict};
use std::time::Duration;

/// Where a delivery stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    /// The broker handed it over; whether it is known is being looked up.
    Received,
    /// It was delivered before; this start is being recorded.
    Suspected {
        /// The attempt that it will be.
        attempt: u32,
        /// What is recorded.
        start: Start,
    },
    /// Only another worker of the pool has a route for it: it waits in place for that one to take its partition.
    Unroutable,
    /// So many workers may have died with it that it would be to blame: which of them live is being found out.
    Accused {
        /// The attempt that it will be.
        attempt: u32,
    },
    /// Its handler runs.
    Running(Run),
    /// It waits in place for its next attempt, and its key with it.
    Holding {
        /// The run that failed.
        run: Run,
        /// How long it waits.
        after: Duration,
    },
    /// The handler succeeded; the effect is being recorded.
    Succeeded(Run),
    /// It will not be tried again; verdict and dead letter are being recorded.
    Condemned(Doom),
    /// A copy is on its way to a delay queue.
    Parking {
        /// How long the copy waits.
        after: Duration,
        /// The attempt that the copy will be.
        attempt: u32,
        /// Whether a record of this start must go.
        record: Record,
    },
    /// It is no event; a copy is on its way to the dead letters.
    Burying,
    /// The record of its start is being taken back.
    Leaving(Exit),
    /// Nothing is lost if the broker forgets this delivery.
    Safe,
    /// Acknowledged.
    Settled,
    /// Left to the broker, which delivers it again.
    Abandoned,
}

/// One run of a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The attempt, counted from 1.
    pub attempt: u32,
    /// Who may run beside it.
    pub company: Company,
    /// Whether its start was recorded.
    pub record: Record,
}

/// A start to record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// It is recorded where no more other workers may have died with it; else this only asks. To repeat it does no harm.
    pub most: u32,
    /// Who may run beside it: alone it is recorded when nothing else runs.
    pub company: Company,
}

/// Who may run beside a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Company {
    /// Others.
    Shared,
    /// Nobody: it may be what killed the process.
    Alone,
}

/// Whether a start was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// The fast path.
    Absent,
    /// The store holds it.
    Present,
}

/// Why an event is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doom {
    /// No route takes its type.
    NoRoute,
    /// Too many events caused one another until this one: they go round in a circle.
    Loop,
    /// The handler said that trying again cannot help.
    Permanent {
        /// Attempts made.
        attempts: u32,
    },
    /// The attempts are used up.
    Exhausted {
        /// Attempts made.
        attempts: u32,
    },
    /// Its runs killed the process too often.
    Crash {
        /// Workers that died with it.
        attempts: u32,
    },
    /// The handler succeeded, and the store cannot hold what comes of it.
    Unstorable {
        /// Attempts made.
        attempts: u32,
    },
    /// It is to be tried again later, and the broker will never take the copy that waits.
    Unsendable {
        /// Attempts made.
        attempts: u32,
    },
}

/// Where to go once the record is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A copy is confirmed.
    Safe,
    /// The broker keeps it.
    Abandoned,
}

/// What the shell learned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fact {
    /// It is no event.
    Unreadable,
    /// It came before its time.
    Early {
        /// What is left.
        remaining: Duration,
        /// The attempt that it is.
        attempt: u32,
    },
    /// Its outcome is recorded already.
    Known,
    /// It has no outcome, and no route takes it.
    Unrouted,
    /// It has no outcome, and too many events caused one another until it.
    Looped,
    /// It has no outcome, and only another worker of the pool has a route for it.
    RoutedElsewhere,
    /// It has no outcome and the broker delivers it for the first time.
    Fresh {
        /// The attempt that it is.
        attempt: u32,
    },
    /// It has no outcome and the broker delivers it again.
    Redelivered {
        /// The attempt that it is.
        attempt: u32,
    },
    /// The start is recorded, or asked for in vain.
    Recorded {
        /// Whether it is recorded.
        kept: bool,
        /// Other workers that may have died with it.
        met: u32,
        /// Whether each of them is known to be dead.
        proven: bool,
        /// Attempts that failed in place before.
        failed: u32,
    },
    /// The handler succeeded.
    Succeeded,
    /// The handler failed.
    Failed {
        /// How.
        failure: Failure,
        /// The jitter, 0..1.
        chance: f64,
    },
    /// The run, or its wait, was ended by a drain: it does not count.
    Interrupted,
    /// The wait in place is over.
    Waited,
    /// The outcome is recorded.
    Committed,
    /// Another copy's outcome was recorded first; ours was dropped whole.
    Superseded,
    /// The state that the effect rests on was changed by another event meanwhile; ours was dropped whole.
    Outdated,
    /// The store cannot hold the effect, or the broker the copy, however often they are asked; they have nothing of it.
    Refused,
    /// The broker has the copy.
    Confirmed,
    /// The record of the start is gone.
    Released,
    /// The ack is on its way.
    Acked,
    /// The channel ended: the broker delivers it again.
    Gone,
    /// The action did not work; it is safe to do again, later.
    Broken,
}

/// What the shell must do next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Action {
    /// Look up its identity.
    Look,
    /// Record its start, and tell the earlier ones.
    Record(Start),
    /// Wait for a sign of life of those who had it before; the key waits too.
    Prove,
    /// Call the handler.
    Run(Run),
    /// Wait for somebody who has a route for it, within the grace; the key waits too.
    Await,
    /// Note the failed attempt, then wait; the key waits too.
    Hold(Run, Duration),
    /// Record effect, results and outgoing events in one transaction.
    CommitDone,
    /// Record the verdict and the dead letter in one transaction.
    CommitDead(Doom),
    /// Publish a copy to the delay ladder and wait for the confirm.
    Park {
        /// How long it waits there.
        after: Duration,
        /// The attempt that it will be.
        attempt: u32,
    },
    /// Publish the message as it is to the dead letters and wait for the confirm.
    Bury,
    /// Take the record of the start back.
    Release,
    /// Acknowledge.
    Ack,
    /// Nothing is left to do.
    Stop,
}

/// What bounds a delivery's life.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Law {
    /// The route's retry policy.
    pub retry: Policy,
    /// Where a retry waits.
    pub wait: Wait,
    /// Deaths of the process after which an event is to blame, at least 2.
    pub crash_limit: u32,
}

impl Law {
    /// The first question about a redelivered event. Where two deaths condemn there is none to spare for company.
    fn suspicion(&self) -> Start {
        Start { most: u32::from(self.crash_limit > 2), company: Company::Shared }
    }
}

/// Where a retry waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// In the delay ladder; its key goes on (`order: relaxed`).
    InLadder,
    /// In place; its key waits (`order: strict`).
    InPlace,
}

/// A fact that cannot follow a state.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{fact:?} cannot follow {state:?}")]
pub struct Illegal {
    /// The state.
    pub state: State,
    /// The fact.
    pub fact: Fact,
}

impl State {
    /// The action that a state calls for; [`Fact::Broken`] repeats it.
    #[must_use]
    pub fn action(self) -> Action {
        match self {
            Self::Received => Action::Look,
            Self::Suspected { start, .. } => Action::Record(start),
            Self::Accused { .. } => Action::Prove,
            Self::Unroutable => Action::Await,
            Self::Running(run) => Action::Run(run),
            Self::Holding { run, after } => Action::Hold(run, after),
            Self::Succeeded(_) => Action::CommitDone,
            Self::Condemned(why) => Action::CommitDead(why),
            Self::Parking { after, attempt, .. } => Action::Park { after, attempt },
            Self::Burying => Action::Bury,
            Self::Leaving(_) => Action::Release,
            Self::Safe => Action::Ack,
            Self::Settled | Self::Abandoned => Action::Stop,
        }
    }
}

/// The law: total, with no clock, no I/O and no chance.
///
/// # Errors
/// The fact cannot follow the state: the shell has a fault.
pub fn next(state: State, fact: Fact, law: &Law) -> Result<(State, Action), Illegal> {
    use {Fact as F, State as S};
    let to = match (state, fact) {
        (S::Settled | S::Abandoned, _) => return Err(Illegal { state, fact }),
        (S::Running(_), F::Broken | F::Gone) => return Err(Illegal { state, fact }),
        (same, F::Broken) => same,

        (S::Received, F::Known) => S::Safe,
        (S::Received, F::Unreadable) => S::Burying,
        (S::Received, F::Early { remaining, attempt }) => {
            S::Parking { after: remaining, attempt, record: Record::Absent }
        }
        (S::Received, F::Unrouted) | (S::Unroutable, F::Waited) => S::Condemned(Doom::NoRoute),
        (S::Received, F::RoutedElsewhere) => S::Unroutable,
        (S::Received, F::Looped) => S::Condemned(Doom::Loop),
        (S::Received, F::Fresh { attempt }) => {
            S::Running(Run { attempt, company: Company::Shared, record: Record::Absent })
        }
        (S::Received, F::Redelivered { attempt }) | (S::Accused { attempt }, F::Waited) => {
            S::Suspected { attempt, start: law.suspicion() }
        }

        (
            S::Suspected { attempt, start: Start { company: Company::Shared, .. } },
            F::Recorded { kept, met, proven, failed },
        ) => {
            if kept {
                S::Running(Run { attempt: attempt.max(failed + 1), company: Company::Shared, record: Record::Present })
            } else if met < law.crash_limit {
                S::Suspected { attempt, start: Start { most: u32::MAX, company: Company::Alone } }
            } else if proven {
                S::Condemned(Doom::Crash { attempts: met })
            } else {
                S::Accused { attempt }
            }
        }
        // What was known before may be this very start, if its first answer was lost.
        (S::Suspected { attempt, start: Start { company, .. } }, F::Recorded { failed, .. }) => {
            S::Running(Run { attempt: attempt.max(failed + 1), company, record: Record::Present })
        }

        (S::Running(run), F::Succeeded) => S::Succeeded(run),
        (S::Running(run), F::Failed { failure, chance }) => {
            match (law.retry.judge(run.attempt, failure, chance), law.wait) {
                (Verdict::Retry(after), Wait::InLadder) => {
                    S::Parking { after, attempt: run.attempt + 1, record: run.record }
                }
                (Verdict::Retry(after), Wait::InPlace) => S::Holding { run, after },
                (Verdict::GiveUp, _) if failure == Failure::Permanent => {
                    S::Condemned(Doom::Permanent { attempts: run.attempt })
                }
                (Verdict::GiveUp, _) => S::Condemned(Doom::Exhausted { attempts: run.attempt }),
            }
        }
        // The note of the failure ended its starts; the next one waits for its turn again.
        (S::Holding { run: Run { attempt, company: Company::Alone, .. }, .. }, F::Waited) => {
            S::Suspected { attempt: attempt + 1, start: Start { most: u32::MAX, company: Company::Alone } }
        }
        (S::Holding { run, .. }, F::Waited) => S::Running(Run { attempt: run.attempt + 1, ..run }),

        // A copy of a delivery that the broker will repeat would only double it.
        (S::Running(run) | S::Holding { run, .. }, F::Interrupted) | (S::Holding { run, .. }, F::Gone) => {
            leave(run.record, Exit::Abandoned)
        }
        (S::Parking { record, .. }, F::Gone) => leave(record, Exit::Abandoned),
        (S::Suspected { .. } | S::Received | S::Unroutable | S::Accused { .. } | S::Burying | S::Safe, F::Gone)
        | (S::Unroutable | S::Accused { .. }, F::Interrupted) => S::Abandoned,

        // An outcome is recorded even where the channel is gone: the redelivery finds it.
        (S::Succeeded(_) | S::Condemned(_), F::Committed | F::Superseded) => S::Safe,
        // The same attempt: it did not fail.
        (S::Succeeded(run), F::Outdated) => S::Running(run),
        (S::Parking { attempt, .. }, F::Refused) => {
            S::Condemned(Doom::Unsendable { attempts: attempt.saturating_sub(1) })
        }
        (S::Succeeded(run), F::Refused) => S::Condemned(Doom::Unstorable { attempts: run.attempt }),
        (S::Parking { record, .. }, F::Confirmed) => leave(record, Exit::Safe),
        (S::Burying, F::Confirmed) => S::Safe,

        (S::Leaving(Exit::Safe), F::Released) => S::Safe,
        (S::Leaving(Exit::Abandoned), F::Released) => S::Abandoned,
        (S::Safe, F::Acked) => S::Settled,

        (state, fact) => return Err(Illegal { state, fact }),
    };
    Ok((to, to.action()))
}

fn leave(record: Record, exit: Exit) -> State {
    match (record, exit) {
        (Record::Present, exit) => State::Leaving(exit),
        (Record::Absent, Exit::Safe) => State::Safe,
        (Record::Absent, Exit::Abandoned) => State::Abandoned,
    }
}

#[cfg(test)]
#[path = "delivery_tests.rs"]
mod tests;
