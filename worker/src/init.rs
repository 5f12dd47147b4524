//! What PID 1 of a container has to do: reap.
//!
//! Programs of `exec` routes may leave children behind. When those end, it is PID 1 that has to take note, or they stay in the
//! process table for ever. A worker that is PID 1 starts itself once more as its child and does nothing else itself than reap and
//! pass signals on: what reaps everything would take the ends of programs from the worker, which waits for them.
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, wait};
use std::future::poll_fn;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::task::Poll;
use tokio::signal::unix::{SignalKind, signal};

/// What is passed on to the worker.
const PASSED: [Signal; 6] = [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2];

/// Whether this process is the first of its container.
pub(crate) fn is_due() -> bool {
    std::process::id() == 1
}

/// Runs this program as a child until it ends, and ends as it does.
///
/// # Errors
/// It cannot be started.
pub(crate) fn run() -> io::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        // Before it is started, so that no signal is missed.
        let mut ended = signal(SignalKind::child())?;
        let listen = |sent: Signal| Ok((sent, signal(SignalKind::from_raw(sent.as_raw()))?));
        let mut passed = PASSED.into_iter().map(listen).collect::<io::Result<Vec<_>>>()?;
        let mut arguments = std::env::args_os();
        let mut command = Command::new(std::env::current_exe()?);
        command.arg0(arguments.next().unwrap_or_default()).args(arguments);
        // A group of its own: what a terminal sends comes by us, once.
        let worker = Pid::from_child(&command.process_group(0).spawn()?);
        loop {
            while let Ok(Some((who, status))) = wait(WaitOptions::NOHANG) {
                if who == worker {
                    return Ok(ExitCode::from(code(status)));
                }
            }
            let told = poll_fn(|cx| {
                let mut told =
                    passed.iter_mut().filter_map(|(sent, stream)| stream.poll_recv(cx).is_ready().then_some(*sent));
                told.next().map_or(Poll::Pending, Poll::Ready)
            });
            tokio::select! {
                _ = ended.recv() => {}
                // It may have ended meanwhile: then nobody is there to tell.
                sent = told => drop(kill_process(worker, sent)),
            }
        }
    })
}

/// The exit code that says how a process ended, as a shell puts it.
fn code(status: WaitStatus) -> u8 {
    let signal = || status.terminating_signal().map(|signal| 128 + signal);
    status.exit_status().or_else(signal).and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}
