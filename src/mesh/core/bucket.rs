//! Limits the bytes a second that pass: a token bucket.
//!
//! Invariant: in any period of time, no more passes than the rate allows plus one burst.

use std::time::{Duration, Instant};

use super::limits::LIMIT_BURST;

/// A caller may use the bytes at once and is told how long to wait before it continues, so callers
/// share the rate in the order in which they arrive.
#[derive(Debug)]
pub struct Bucket {
    /// Bytes a second.
    rate: f64,
    /// Bytes that may pass now. Negative if bytes are owed.
    level: f64,
    at: Instant,
}

impl Bucket {
    /// A full bucket. `rate` is in bytes a second.
    pub fn new(now: Instant, rate: u64) -> Self {
        let rate = rate.max(1) as f64;
        Self { rate, level: rate * LIMIT_BURST.as_secs_f64(), at: now }
    }

    fn fill(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + seconds * self.rate).min(self.rate * LIMIT_BURST.as_secs_f64());
        self.at = now.max(self.at);
    }

    /// Takes these bytes and returns how long to wait.
    pub fn take(&mut self, now: Instant, bytes: u64) -> Duration {
        self.fill(now);
        self.level -= bytes as f64;
        Duration::from_secs_f64((-self.level / self.rate).clamp(0.0, 3600.0))
    }

    /// Whether a caller would have to wait.
    pub fn is_empty(&mut self, now: Instant) -> bool {
        self.fill(now);
        self.level <= 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_keeps_to_the_rate() {
        let start = Instant::now();
        let (rate, piece) = (1_000_000_u64, 16_384_u64);
        let mut bucket = Bucket::new(start, rate);
        let (mut now, mut passed) = (start, 0_u64);
        while now < start + Duration::from_secs(20) {
            now += bucket.take(now, piece);
            passed += piece;
        }
        let allowed = 20.0 * rate as f64 + rate as f64 * LIMIT_BURST.as_secs_f64();
        assert!((passed as f64) < allowed + 2.0 * piece as f64, "{passed}");
        assert!(passed as f64 > 0.99 * 20.0 * rate as f64, "{passed}");
    }

    #[test]
    fn idling_saves_up_one_burst_only() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start, 1_000_000);
        let later = start + Duration::from_secs(3600);
        let burst = (1e6 * LIMIT_BURST.as_secs_f64()) as u64;
        assert_eq!(bucket.take(later, burst), Duration::ZERO);
        let wait = bucket.take(later, 500_000);
        assert!(wait > Duration::from_millis(499) && wait < Duration::from_millis(501), "{wait:?}");
        // A clock that steps back changes nothing.
        assert!(bucket.take(start, 0) > Duration::from_millis(499));
    }
}
