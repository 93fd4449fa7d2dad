//! How much of the machine's memory is free.

/// What is taken for free where the system does not say.
const FALLBACK: u64 = 4 << 30;

/// Bytes of main memory that can be used without swapping.
pub fn available() -> u64 {
    std::fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(parse).unwrap_or(FALLBACK)
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
