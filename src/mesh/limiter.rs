//! Limits the bytes a second that this node sends or receives: a bucket shared by several tasks,
//! and waiting for it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::core::Bucket;

/// A limit, or none.
pub(super) struct Limiter(Option<Mutex<Bucket>>);

impl Limiter {
    /// `rate` in bytes a second.
    pub(super) fn new(rate: Option<u64>) -> Self {
        Self(rate.map(|rate| Mutex::new(Bucket::new(Instant::now(), rate))))
    }

    pub(super) const fn is_limited(&self) -> bool {
        self.0.is_some()
    }

    /// Counts bytes. Returns how long to wait for them.
    pub(super) fn take(&self, bytes: u64) -> Duration {
        let Some(bucket) = &self.0 else { return Duration::ZERO };
        bucket.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now(), bytes)
    }

    /// Counts bytes and waits for them.
    pub(super) async fn pass(&self, bytes: u64) {
        let wait = self.take(bytes);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Whether the limit, not the peers, sets the pace at the moment.
    pub(super) fn is_the_brake(&self, now: Instant) -> bool {
        let Some(bucket) = &self.0 else { return false };
        bucket.lock().unwrap_or_else(PoisonError::into_inner).is_empty(now)
    }
}
