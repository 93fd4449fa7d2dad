//! What a process uses, from /proc, and what its directory takes on disk.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// Clock ticks a second in /proc/PID/stat: USER_HZ, the same on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// One reading.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    pub resident_bytes: u64,
    pub descriptors: u64,
    pub threads: u64,
    /// Since the process began, over all its threads.
    pub processor: Duration,
}

/// Reads a process. `None` if it is gone.
pub fn read(pid: u32) -> Option<Usage> {
    let file = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
    let status = file("status")?;
    let number = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    // The name is in parentheses and may contain anything; the third field follows it.
    let stat = file("stat")?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at - 3)?.parse::<u64>().ok();
    let seconds = (ticks(14)? + ticks(15)?) as f64 / TICKS_PER_SECOND;
    Some(Usage {
        resident_bytes: number("VmRSS:")? * 1024,
        descriptors: fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64,
        threads: number("Threads:")?,
        processor: Duration::from_secs_f64(seconds),
    })
}

/// Bytes of the disk that a directory takes. What goes away meanwhile counts nothing.
pub fn disk_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => disk_bytes(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

#[test]
fn this_process_is_read() {
    let own = read(std::process::id()).unwrap();
    assert!(own.resident_bytes > 1 << 20 && own.descriptors > 2 && own.threads > 1, "{own:?}");
    let dir = tempfile::tempdir().unwrap();
    let before = disk_bytes(dir.path());
    fs::create_dir(dir.path().join("in")).unwrap();
    fs::write(dir.path().join("in/file"), vec![1; 1 << 20]).unwrap();
    assert!(disk_bytes(dir.path()) >= before + (1 << 20));
}
