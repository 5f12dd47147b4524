//! How much memory there is: what the bodies of events may take is a share of it.
use std::path::Path;

/// Of all memory, bodies that are held take one part of so many: while a handler runs there are copies of its event's, and as much
/// again may be on its way out.
const PARTS: usize = 8;
/// Less would not even hold a body of the usual limit.
const LEAST: usize = 16 << 20;

/// The bytes of bodies that may be held: a part of what this container, or else this machine, has.
pub(crate) fn share() -> usize {
    (limit(Path::new("/")) / PARTS).max(LEAST)
}

/// The bytes that this process may use: the smallest of what its control groups and the machine have.
fn limit(root: &Path) -> usize {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    // Version 2 says "max" where there is none, version 1 a number that no machine has.
    let groups = ["sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let groups = groups.iter().filter_map(|path| read(path)?.trim().parse::<usize>().ok());
    let machine = read("proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        Some(line.trim().trim_end_matches(" kB").parse::<usize>().ok()? << 10)
    });
    groups.chain(machine).min().unwrap_or(LEAST * PARTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_of_what_there_is_counts() {
        let root = tempfile::tempdir().expect("a directory");
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("it has one")).expect("made");
            std::fs::write(path, text).expect("written");
        };
        assert_eq!(limit(root.path()), 128 << 20, "nothing is known");
        write("proc/meminfo", "MemTotal:        2097152 kB\nMemFree: 1 kB\n");
        assert_eq!(limit(root.path()), 2 << 30);
        write("sys/fs/cgroup/memory.max", "max\n");
        assert_eq!(limit(root.path()), 2 << 30);
        write("sys/fs/cgroup/memory.max", "536870912\n");
        assert_eq!(limit(root.path()), 512 << 20);
        write("sys/fs/cgroup/memory.max", "max\n");
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(limit(root.path()), 2 << 30);
    }
}
