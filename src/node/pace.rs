//! How long whoever finds all places taken should wait before asking again. Pure: times come in.
//!
//! Owns the measured time between two places that become free while somebody waits for one. The answer
//! is an estimate between [`RETRY_MIN_S`] and [`RETRY_MAX_S`], never a promise.

use std::time::Instant;

/// The shortest and the longest that a client is told to wait, in seconds.
pub const RETRY_MIN_S: u64 = 1;
pub const RETRY_MAX_S: u64 = 30;
/// How fast the estimate follows measurements.
const GAIN: f64 = 0.3;

/// How fast places become free.
#[derive(Debug, Default)]
pub struct Pace {
    /// Seconds from one free place to the next while somebody waits.
    interval_s: Option<f64>,
    /// Since when somebody has waited for the next one.
    since: Option<Instant>,
}

impl Pace {
    /// Somebody waits for a place.
    pub fn waits(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// A place has become free. `others_wait` says whether somebody still waits for another.
    pub fn freed(&mut self, now: Instant, others_wait: bool) {
        if let Some(since) = self.since.take() {
            let took = now.saturating_duration_since(since).as_secs_f64();
            let known = self.interval_s.map(|before| before + GAIN * (took - before));
            self.interval_s = Some(known.unwrap_or(took));
        }
        self.since = others_wait.then_some(now);
    }

    /// Nobody waits any more, though no place has become free.
    pub const fn nobody_waits(&mut self) {
        self.since = None;
    }

    /// In how many seconds this many places will probably have become free. A place that is late
    /// slows the pace down from the moment at which it is late.
    pub fn retry_s(&self, now: Instant, places: usize) -> u64 {
        let waited =
            self.since.map_or(0.0, |since| now.saturating_duration_since(since).as_secs_f64());
        let usual = self.interval_s.unwrap_or(0.0);
        let left =
            if waited < usual { usual * places as f64 - waited } else { waited * places as f64 };
        // A float becomes the nearest whole number that there is.
        (left.ceil() as u64).clamp(RETRY_MIN_S, RETRY_MAX_S)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A pace at which a place has become free every `every` seconds, and the time of the last.
    fn steady(every: f64) -> (Pace, Instant) {
        let (mut pace, mut now) = (Pace::default(), Instant::now());
        pace.waits(now);
        for _ in 0..40 {
            now += Duration::from_secs_f64(every);
            pace.freed(now, true);
        }
        (pace, now)
    }

    #[test]
    fn whoever_is_refused_is_told_when_so_many_places_will_be_free() {
        let (pace, now) = steady(2.0);
        assert_eq!([1, 3, 10].map(|places| pace.retry_s(now, places)), [2, 6, 20]);
        let later = now + Duration::from_millis(1500);
        assert_eq!([1, 3].map(|places| pace.retry_s(later, places)), [1, 5], "part of it is over");
        let late = now + Duration::from_secs(7);
        assert_eq!(
            [1, 3].map(|places| pace.retry_s(late, places)),
            [7, 21],
            "it has become slower"
        );
    }

    #[test]
    fn nobody_is_told_less_than_a_second_or_more_than_half_a_minute() {
        assert_eq!(Pace::default().retry_s(Instant::now(), 5), RETRY_MIN_S, "nothing is known");
        let (fast, now) = steady(0.001);
        assert_eq!(fast.retry_s(now, 16), RETRY_MIN_S);
        let (slow, now) = steady(500.0);
        assert_eq!(slow.retry_s(now, 1), RETRY_MAX_S);
        assert_eq!(slow.retry_s(now, usize::MAX), RETRY_MAX_S);
        assert_eq!(slow.retry_s(now, 0), RETRY_MIN_S);
        let (mut stuck, began) = (Pace::default(), Instant::now());
        stuck.waits(began);
        assert_eq!(stuck.retry_s(began + Duration::from_secs(12), 1), 12, "none ever became free");
    }

    #[test]
    fn idle_time_is_no_waiting() {
        let (mut pace, now) = steady(2.0);
        pace.freed(now + Duration::from_secs(2), false);
        let hours = now + Duration::from_secs(7200);
        assert_eq!(pace.retry_s(hours, 1), 2);
        pace.waits(hours);
        pace.waits(hours + Duration::from_secs(1));
        pace.freed(hours + Duration::from_secs(2), false);
        assert_eq!(pace.retry_s(hours + Duration::from_secs(99), 1), 2);
        pace.waits(hours);
        pace.nobody_waits();
        assert_eq!(pace.retry_s(hours + Duration::from_secs(99), 1), 2, "they gave up");
    }
}
