//! The process's allocator, and what it keeps of freed memory.
//!
//! A node loads and drops models by the hour, on dozens of threads. glibc's allocator keeps up to
//! 200 kB of freed small blocks for each thread, and the pages around them; over a hundred models
//! a node grows by a tenth while what it uses stays the same. jemalloc keeps blocks of one size
//! together. Here it has one arena for all threads, small caches of their own, and gives pages back
//! a second after they were freed.
//!
//! A node that runs and removes 120 small models one after another, its memory after 20 and at the
//! end: 35 and 33 to 36 MB so; 45 and 49 MB with glibc's, four arenas and a `malloc_trim` each
//! minute; 46 and 52 MB with jemalloc's usual thread caches and two arenas. Systems other than
//! Linux keep their own allocator.

#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Options as in jemalloc(3), TUNING.
#[cfg(target_os = "linux")]
const OPTIONS: &[u8] = b"narenas:1,lg_tcache_max:8,dirty_decay_ms:1000,muzzy_decay_ms:0\0";

/// What jemalloc reads when it starts: `const char *malloc_conf`, under the library's prefix.
// SAFETY: jemalloc declares this symbol for programs to define. It is a pointer to a string that
// ends with a zero byte, lives as long as the program and is never written to.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
#[unsafe(export_name = "_rjem_malloc_conf")]
#[used]
static CONFIGURATION: &u8 = &OPTIONS[0];

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::time::{Duration, Instant};

    /// Bytes of this process's memory that are resident.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
    }

    /// By default jemalloc takes ten seconds to give pages back, smoothly.
    #[test]
    fn freed_memory_goes_back_to_the_system_though_small_blocks_between_it_stay() {
        const BLOCK: usize = 64 << 10;
        const COUNT: usize = 2048;
        let (dropped, kept): (Vec<_>, Vec<_>) =
            (0..COUNT).map(|_| (vec![1_u8; BLOCK], vec![1_u8; 256])).unzip();
        let held = resident();
        drop(std::hint::black_box(dropped));
        // Pages are given back in passing, while something is allocated.
        let freed = Instant::now();
        while resident() + COUNT * BLOCK * 3 / 4 > held {
            assert!(freed.elapsed() < Duration::from_secs(5), "{} of {held}", resident());
            drop(std::hint::black_box(vec![1_u8; BLOCK]));
        }
        drop(std::hint::black_box(kept));
    }
}
