//! What the system's allocator keeps of freed memory.
//!
//! glibc grows up to eight heaps a core, each for some threads, and each keeps what was freed in it
//! below something still in use. It also raises the size from which a block is mapped on its own to
//! that of the largest block freed so far, up to 32 MiB, so ranges and weights end up in those
//! heaps. A node that loads and drops models by the hour then holds twice what it uses. Here the
//! heaps are few, a large block goes back to the system when it is freed, and once a minute so do
//! the free pages between small blocks.
//!
//! Tried instead, a node that runs and removes 40 small models one after another: 95 MB as it was,
//! 48 MB so, 73 MB with jemalloc, 109 MB with mimalloc. Other systems keep their own settings.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// How often the heaps' free pages are given back. It takes milliseconds.
const TRIM_EVERY: Duration = Duration::from_secs(60);

/// Heaps for all threads together. Small blocks come from caches of the threads' own.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const HEAPS: i32 = 4;

/// Blocks of at least so many bytes are mapped on their own.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED: i32 = 1 << 20;

/// Sets few heaps and mapped large blocks for the process. To be called before threads exist.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub fn set_up() {
    for (setting, value) in [(libc::M_ARENA_MAX, HEAPS), (libc::M_MMAP_THRESHOLD, MAPPED)] {
        // SAFETY: `mallopt` takes two integers by value, touches no memory of ours, and is called
        // before a second thread exists. It answers 0 for a value it does not accept.
        if unsafe { libc::mallopt(setting, value) } == 0 {
            tracing::debug!(setting, value, "the allocator refuses a setting");
        }
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn set_up() {}

/// Gives the heaps' free pages back.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
fn trim() {
    // SAFETY: `malloc_trim` takes an integer, locks each heap while it looks for pages that hold
    // nothing, and changes no block in use. Any thread may call it at any time.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn trim() {}

/// Gives free pages back again and again, as long as the node runs.
pub async fn stay_small(stopping: CancellationToken) {
    loop {
        tokio::select! {
            () = stopping.cancelled() => return,
            () = tokio::time::sleep(TRIM_EVERY) => {}
        }
        // A panic in there is reported where it happens.
        let _ = tokio::task::spawn_blocking(trim).await;
    }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use super::*;

    /// Bytes of this process's memory that are resident.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
    }

    /// One test, because both halves look at the whole process's memory.
    #[test]
    fn freed_memory_goes_back_to_the_system_though_small_blocks_between_it_stay() {
        large_blocks_when_freed();
        pages_when_trimmed();
    }

    fn large_blocks_when_freed() {
        const BLOCK: usize = 2 << 20;
        const COUNT: usize = 128;
        set_up();
        // glibc would now keep blocks up to this size in its heaps.
        drop(std::hint::black_box(vec![1_u8; 16 << 20]));
        let before = resident();
        let (large, small): (Vec<_>, Vec<_>) =
            (0..COUNT).map(|_| (vec![1_u8; BLOCK], vec![1_u8; 4096])).unzip();
        let held = resident();
        assert!(held >= before + COUNT * BLOCK, "{held} of {before}");
        drop(std::hint::black_box(large));
        let after = resident();
        assert!(after < before + COUNT * BLOCK / 4, "{after} of {before}, {held} at most");
        drop(std::hint::black_box(small));
    }

    fn pages_when_trimmed() {
        const BLOCK: usize = 64 << 10;
        const COUNT: usize = 2048;
        let (dropped, kept): (Vec<_>, Vec<_>) =
            (0..COUNT).map(|_| (vec![1_u8; BLOCK], vec![1_u8; 256])).unzip();
        let held = resident();
        drop(std::hint::black_box(dropped));
        trim();
        let after = resident();
        assert!(after + COUNT * BLOCK * 3 / 4 < held, "{after} of {held}");
        drop(std::hint::black_box(kept));
    }
}
