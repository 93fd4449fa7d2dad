//! The machine's memory: how much is free, and the page size that this process uses.

/// Assumed to be free if the system does not say.
const FALLBACK: u64 = 4 << 30;

/// Bytes of main memory that can be used without swapping.
pub fn available() -> u64 {
    std::fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(parse).unwrap_or(FALLBACK)
}

/// Sets whether the kernel keeps this process's memory in small pages from now on. A node that only
/// stores and serves touches little of the memory that its index reserves (sled: 41 counters of
/// half a megabyte that are never written), and huge pages would make 20 MiB of it resident. An
/// engine's weights benefit from huge pages. Has no effect if the system does not offer the choice.
pub fn use_small_pages(small: bool) {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::thread::disable_transparent_huge_pages(small) {
        tracing::debug!(%error, "choosing the size of pages");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = small;
}

/// `MemAvailable` of Linux' /proc/meminfo, in bytes.
fn parse(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn small_pages_are_asked_for_and_given_back() {
        use rustix::thread::transparent_huge_pages_are_disabled;
        for small in [true, false] {
            use_small_pages(small);
            assert_eq!(transparent_huge_pages_are_disabled().unwrap(), small);
        }
    }

    #[test]
    fn available_memory_is_read_or_left_to_the_fallback() {
        let text = "MemTotal:       24689764 kB\nMemAvailable:   23000000 kB\nBuffers: 1 kB\n";
        assert_eq!(parse(text), Some(23_000_000 * 1024));
        for bad in ["", "MemAvailable: much", "MemAvailable: 12 MB", "MemTotal: 5 kB"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert!(available() > 0);
    }
}
