//! `warren-worker`: see `warren_worker::cli`.
use std::process::ExitCode;

fn main() -> ExitCode {
    warren_worker::cli::main()
}
