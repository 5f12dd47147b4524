//! What bounds a run of jq: one meter a thread, which the interpreter and its values pass again and again.
//!
//! jaq asks its data for the table of the program at every evaluation of a term ([`beat`] sits there), and computes with
//! values of ours ([`beat`] and [`spend`] sit in their operators). Whoever exceeds a limit leaves by unwinding, past `try`
//! and `?` of the program; [`bounded`] catches it. No panic hook hears of it.
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

/// A run may use so much of its thread's stack. Threads have 2 MiB; what is left is for dropping and printing values, which
/// are at most [`DEPTH`](super::value::DEPTH) levels deep.
const STACK: usize = 1 << 20;
/// The clock is read once in so many beats.
const PACE: u32 = 64;
/// All values of a run together, beyond what one may have.
const ALL: usize = 1 << 30;
/// What one value may have beyond 32 times the input.
const ONE: usize = 64 << 20;

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// Its time is over.
    Late,
    /// It calls itself too often, or a value is nested too deep.
    Deep,
    /// It makes too much.
    Large,
}

struct Meter {
    /// None outside of runs.
    until: Cell<Option<Instant>>,
    beats: Cell<u32>,
    bottom: Cell<usize>,
    left: Cell<usize>,
    one: Cell<usize>,
}

thread_local! {
    static METER: Meter = const {
        Meter {
            until: Cell::new(None),
            beats: Cell::new(0),
            bottom: Cell::new(0),
            left: Cell::new(0),
            one: Cell::new(usize::MAX),
        }
    };
}

/// Runs a function that passes the meter, for an input of so many bytes. All that it makes has to end in it.
pub(super) fn bounded<T>(time: Duration, input: usize, run: impl FnOnce() -> T) -> Result<T, Option<Stop>> {
    let one = ONE.saturating_add(input.saturating_mul(32));
    METER.with(|meter| {
        meter.until.set(Instant::now().checked_add(time));
        meter.beats.set(0);
        meter.bottom.set(here());
        meter.left.set(one.saturating_add(ALL));
        meter.one.set(one);
    });
    let ended = catch_unwind(AssertUnwindSafe(run));
    METER.with(|meter| meter.until.set(None));
    ended.map_err(|cause| cause.downcast_ref::<Stop>().copied())
}

/// Passes by: the run ends here where its time or its stack has.
pub(super) fn beat() {
    METER.with(|meter| {
        let Some(until) = meter.until.get() else { return };
        if meter.bottom.get().abs_diff(here()) > STACK {
            stop(Stop::Deep);
        }
        let beats = meter.beats.get().wrapping_add(1);
        meter.beats.set(beats);
        if beats.is_multiple_of(PACE) && Instant::now() > until {
            stop(Stop::Late);
        }
    });
}

/// Makes so many bytes of values; to be called before they are made, where that is known.
pub(super) fn spend(bytes: usize) {
    METER.with(|meter| {
        if meter.until.get().is_some() {
            match meter.left.get().checked_sub(bytes) {
                Some(left) => meter.left.set(left),
                None => stop(Stop::Large),
            }
        }
    });
}

/// What one value may have, in bytes.
pub(super) fn most() -> usize {
    METER.with(|meter| meter.one.get())
}

/// Ends the run.
pub(super) fn stop(why: Stop) -> ! {
    resume_unwind(Box::new(why))
}

fn here() -> usize {
    let local = 0_u8;
    std::ptr::from_ref(&local).addr()
}
