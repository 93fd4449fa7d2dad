//! The progress of a long transfer: bytes done, rate, and time left.
//!
//! Invariant: the bytes done never decrease and never exceed the total.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The period over which the rate is measured. A stall shows soon, a burst does not.
const WINDOW: Duration = Duration::from_secs(5);
/// The most samples kept.
const SAMPLES_MAX: usize = 64;
/// A rate over less time than this would be a guess.
const RATE_AFTER: Duration = Duration::from_millis(500);

/// A reading of a [`Meter`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes.
    pub done: u64,
    pub total: u64,
    /// Recent bytes a second. `None` until it is known.
    pub rate: Option<f64>,
    /// Seconds until the total is reached at this rate.
    pub left_s: Option<f64>,
    /// The peer that is waited for, if the transfer is slow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow: Option<String>,
}

impl Progress {
    /// Below this many bytes per second, a transfer is slow enough to name the peer that it waits
    /// for.
    pub const SLOW: f64 = 256.0 * 1024.0;

    /// Names the peer that is waited for, if the transfer is slow.
    #[must_use]
    pub fn naming(self, slowest: impl FnOnce() -> Option<String>) -> Self {
        let is_slow = self.done < self.total && self.rate.is_some_and(|rate| rate < Self::SLOW);
        let slow = if is_slow { slowest() } else { None };
        Self { slow, ..self }
    }
}

/// Measures one transfer.
#[derive(Debug)]
pub struct Meter {
    total: u64,
    done: u64,
    samples: VecDeque<(Instant, u64)>,
}

impl Meter {
    /// `total` in bytes.
    pub fn new(now: Instant, total: u64) -> Self {
        Self { total, done: 0, samples: VecDeque::from([(now, 0)]) }
    }

    /// Records that `done` bytes, in total, are done by now.
    pub fn note(&mut self, now: Instant, done: u64) -> Progress {
        self.done = done.min(self.total).max(self.done);
        let oldest = |samples: &VecDeque<(Instant, u64)>| samples.front().map(|(at, _)| *at);
        // One sample before the window is kept, so that the rate covers all of it.
        while self.samples.len() > 1
            && self.samples.get(1).is_some_and(|(at, _)| *at + WINDOW <= now)
        {
            self.samples.pop_front();
        }
        let is_due = self
            .samples
            .back()
            .is_none_or(|(at, _)| *at + WINDOW / (SAMPLES_MAX as u32 / 2) <= now);
        if is_due {
            self.samples.push_back((now, self.done));
        }
        if self.samples.len() > SAMPLES_MAX {
            self.samples.pop_front();
        }
        let since =
            oldest(&self.samples).map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let before = self.samples.front().map_or(0, |(_, done)| *done);
        let rate = (since >= RATE_AFTER).then(|| (self.done - before) as f64 / since.as_secs_f64());
        let left_s =
            rate.filter(|rate| *rate > 0.0).map(|rate| (self.total - self.done) as f64 / rate);
        Progress { done: self.done, total: self.total, rate, left_s, slow: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left_follow_what_came_lately() {
        let start = Instant::now();
        let mut meter = Meter::new(start, 100_000);
        let first = meter.note(start, 0);
        assert_eq!(first, Progress { total: 100_000, ..Progress::default() });
        let mut last = first;
        // 1,000 bytes a second for ten seconds, then 4,000.
        for tenth in 1..=100u64 {
            last = meter.note(start + Duration::from_millis(100 * tenth), 100 * tenth);
        }
        assert!((last.rate.unwrap() - 1000.0).abs() < 30.0, "{last:?}");
        assert!((last.left_s.unwrap() - 90.0).abs() < 3.0, "{last:?}");
        for tenth in 101..=180u64 {
            let done = 10_000 + 400 * (tenth - 100);
            last = meter.note(start + Duration::from_millis(100 * tenth), done);
        }
        assert!((last.rate.unwrap() - 4000.0).abs() < 120.0, "{last:?}");
        assert!(meter.samples.len() <= SAMPLES_MAX);
        // A stall: the rate falls to zero, and no time left is given.
        for second in 19..=30u64 {
            last = meter.note(start + Duration::from_secs(second), 42_000);
        }
        assert_eq!((last.rate, last.left_s, last.done), (Some(0.0), None, 42_000));
    }

    #[test]
    fn what_is_done_neither_shrinks_nor_exceeds_the_total() {
        let start = Instant::now();
        let mut meter = Meter::new(start, 10);
        let second = |n| start + Duration::from_secs(n);
        assert_eq!(meter.note(second(1), 8).done, 8);
        assert_eq!(meter.note(second(2), 3).done, 8);
        let end = meter.note(second(3), 99);
        assert_eq!((end.done, end.left_s), (10, Some(0.0)));
        assert_eq!(Meter::new(start, 0).note(second(1), 5).done, 0);
    }
}
