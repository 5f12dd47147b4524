//! What the kernel says of a client: processor time and memory of all processes of its session.
use std::time::{Duration, Instant};

/// The processes of a session. A client is started as the leader of one, so that its children are counted too.
#[derive(Debug)]
pub(crate) struct Session {
    leader: u32,
    members: Vec<u32>,
    scanned: Instant,
}

/// Looking through all of /proc costs a millisecond that the client would have to wait for.
const RESCAN: Duration = Duration::from_millis(500);

impl Session {
    /// The session of a leader.
    pub(crate) fn of(leader: u32) -> Self {
        Self { leader, members: vec![leader], scanned: Instant::now() }
    }

    fn scan(&mut self) {
        self.scanned = Instant::now();
        let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let leader = i64::from(self.leader);
        self.members = pids.filter(|pid| stat(*pid).is_some_and(|stat| stat.session == leader)).collect();
    }

    /// Processor time of all of them until now, reaped children included.
    pub(crate) fn cpu(&mut self) -> Duration {
        self.scan();
        let ticks: u64 = self.members.iter().filter_map(|pid| stat(*pid)).map(|stat| stat.ticks).sum();
        Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }

    /// Resident bytes of all of them now.
    pub(crate) fn memory(&mut self) -> u64 {
        if self.scanned.elapsed() > RESCAN {
            self.scan();
        }
        let pages = |pid: &u32| -> Option<u64> {
            let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
            text.split(' ').nth(1)?.parse().ok()
        };
        self.members.iter().filter_map(pages).sum::<u64>() * rustix::param::page_size() as u64
    }

    /// The kernel's own record of the peak, where the session is one process.
    pub(crate) fn peak(&self) -> Option<u64> {
        let [only] = self.members.as_slice() else { return None };
        let status = std::fs::read_to_string(format!("/proc/{only}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    }

    /// Ends all of them.
    pub(crate) fn kill(&mut self) {
        self.scan();
        for pid in &self.members {
            if let Some(pid) = rustix::process::Pid::from_raw(pid.cast_signed()) {
                // One that has ended meanwhile is no loss.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

struct Stat {
    session: i64,
    ticks: u64,
}

/// proc(5): the fields after the name, which is in parentheses and may hold anything.
fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text[text.rfind(')')? + 2..].split(' ').collect();
    // The first of these is the third of the file; 14 to 17 are user, system, and both of reaped children.
    let session = fields.get(3)?.parse().ok()?;
    let ticks = fields.get(11..15)?.iter().filter_map(|field| field.parse::<u64>().ok()).sum();
    Some(Stat { session, ticks })
}
