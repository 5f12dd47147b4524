//! End-to-end: real processes on a real broker, killed, cut, flooded; then the ledger must add up.
#![expect(missing_docs, reason = "tests")]

mod basics;
