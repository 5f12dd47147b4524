//! Trouble of this process or its machine: no file descriptors, no memory, no processes, no ports. It is no attempt of an event,
//! which waits until the trouble is over.
use rustix::io::Errno;
use std::error::Error;
use std::io;
use std::sync::Mutex;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long a call waits before it is tried again.
const WAIT: Duration = Duration::from_secs(1);
/// It is told so often, however many calls meet it.
const TOLD: Duration = Duration::from_secs(10);

/// Whether an error of the operating system is the fault of who asked it, and not of what was asked for.
pub(super) fn is_trouble(error: &io::Error) -> bool {
    let ours = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS, Errno::AGAIN];
    Errno::from_io_error(error).is_some_and(|errno| ours.contains(&errno))
}

/// An error and its causes, outermost first.
pub(super) fn causes<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'e (dyn Error + 'static)| (*error).source())
}

/// The trouble that an error comes from, if it says so.
pub(super) fn trouble(error: &(dyn Error + 'static)) -> Option<io::Error> {
    number(error).map(io::Error::from).filter(is_trouble)
}

fn number(error: &(dyn Error + 'static)) -> Option<Errno> {
    causes(error).find_map(|cause| Errno::from_io_error(cause.downcast_ref::<io::Error>()?))
}

/// The trouble that kept a connection from being opened, where the error does not say so itself.
pub(super) async fn trouble_to_connect(
    error: &(dyn Error + Send + Sync + 'static),
    to: (&str, u16),
) -> Option<io::Error> {
    // Who resolves names may not say why he could not.
    if let Err(trouble) = std::fs::File::open("/dev/null")
        && is_trouble(&trouble)
    {
        return Some(trouble);
    }
    // "Cannot assign requested address" means that all ports towards there are taken, or that there is no way to such an address
    // from here at all, which is a mistake and stays one. UDP has ports of its own: it fails for the second reason only.
    let no_port = number(error).filter(|errno| *errno == Errno::ADDRNOTAVAIL)?;
    let addresses = tokio::net::lookup_host(to).await.ok()?;
    for address in addresses {
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        if let Ok(socket) = tokio::net::UdpSocket::bind(any).await
            && socket.connect(address).await.is_ok()
        {
            return Some(no_port.into());
        }
    }
    None
}

/// Tells of the trouble, and waits a moment.
pub(super) async fn wait_for_it_to_pass(what: &str, trouble: &io::Error) {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let now = Instant::now();
    let is_due = LAST.lock().is_ok_and(|mut last| {
        let is_due = last.is_none_or(|last| now - last >= TOLD);
        if is_due {
            *last = Some(now);
        }
        is_due
    });
    if is_due {
        tracing::error!(
            error = %trouble,
            "{what}: {trouble}: this worker is short of {}; its events wait, and no attempt is counted",
            match Errno::from_io_error(trouble) {
                Some(Errno::MFILE) => "file descriptors (raise LimitNOFILE or ulimit -n, or lower WARREN_CONCURRENCY)",
                Some(Errno::NFILE) => "file descriptors of the machine (fs.file-max)",
                Some(Errno::ADDRNOTAVAIL) => "local ports (net.ipv4.ip_local_port_range, or fewer connections)",
                Some(Errno::AGAIN) => "processes or threads (pids limit, ulimit -u)",
                _ => "memory",
            }
        );
    }
    sleep(WAIT).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_machine_lacks_is_told_from_what_a_service_does() {
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS, Errno::AGAIN] {
            assert!(is_trouble(&errno.into()), "{errno}");
        }
        for errno in
            [Errno::CONNREFUSED, Errno::CONNRESET, Errno::HOSTUNREACH, Errno::NOENT, Errno::ACCESS, Errno::TOOBIG]
        {
            assert!(!is_trouble(&errno.into()), "{errno}");
        }
        assert!(!is_trouble(&io::Error::other("without a number")));
    }

    #[tokio::test]
    async fn an_address_that_cannot_be_reached_from_here_is_no_lack_of_ports() {
        let no_address = io::Error::from(Errno::ADDRNOTAVAIL);
        let lack = trouble_to_connect(&no_address, ("127.0.0.1", 9)).await;
        assert_eq!(lack.and_then(|lack| Errno::from_io_error(&lack)), Some(Errno::ADDRNOTAVAIL));
        // Nobody can connect to a broadcast address, UDP without leave neither.
        assert!(trouble_to_connect(&no_address, ("255.255.255.255", 9)).await.is_none());
        assert!(trouble_to_connect(&io::Error::from(Errno::CONNREFUSED), ("127.0.0.1", 9)).await.is_none());
    }
}
