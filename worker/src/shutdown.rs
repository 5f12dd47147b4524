//! The signals that end a worker: the first drains, the second interrupts.
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// How a worker is told to end. Each send is one request: the first drains, the second skips ahead.
pub type Stop = mpsc::UnboundedReceiver<()>;

/// Requests from SIGTERM and SIGINT.
///
/// # Errors
/// The handlers cannot be installed.
pub fn signals() -> std::io::Result<Stop> {
    let (tell, stop) = mpsc::unbounded_channel();
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            if tell.send(()).is_err() {
                return;
            }
        }
    });
    Ok(stop)
}
