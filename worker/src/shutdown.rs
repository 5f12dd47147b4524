//! The signals that end a worker: the first drains, the second interrupts.
use tokio::sync::mpsc;
use warren_publisher::process::Requests;

/// How a worker is told to end. Each send is one request: the first drains, the second skips ahead.
pub type Stop = mpsc::UnboundedReceiver<()>;

/// Requests from SIGTERM and SIGINT; from SIGHUP only the first, and none where it is ignored (`nohup`).
///
/// # Errors
/// The handlers cannot be installed.
pub fn signals() -> std::io::Result<Stop> {
    let (tell, stop) = mpsc::unbounded_channel();
    let mut requests = Requests::listen()?;
    tokio::spawn(async move {
        loop {
            requests.next().await;
            if tell.send(()).is_err() {
                return;
            }
        }
    });
    Ok(stop)
}
