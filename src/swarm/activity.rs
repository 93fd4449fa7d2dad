//! When streams with each peer last moved bytes.
//!
//! A ping waits behind what is being sent. On a slow line it may be late by more than its time-out
//! while everything is well, so a peer counts as silent only if its streams are still, too. Bytes
//! that were written prove less than bytes that came: the system takes some for a dead peer.
//!
//! Invariant: an entry is that of a connected peer, or one of at most [`ENTRIES_MAX`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::PeerId;

/// Entries beyond which those that no stream uses are dropped: a stream may outlive its peer.
const ENTRIES_MAX: usize = 1024;

/// When bytes of streams came from a peer last, and when some were written to it.
pub(crate) struct Activity {
    epoch: Instant,
    read_ms: AtomicU64,
    wrote_ms: AtomicU64,
}

impl Activity {
    fn new() -> Self {
        // Zero stands for never.
        let epoch = Instant::now() - Duration::from_millis(1);
        Self { epoch, read_ms: AtomicU64::new(0), wrote_ms: AtomicU64::new(0) }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn read(&self) {
        self.read_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    pub(crate) fn wrote(&self) {
        self.wrote_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    fn is_recent(&self, time: &AtomicU64, within: Duration) -> bool {
        let at = time.load(Ordering::Relaxed);
        let age = Duration::from_millis(self.now_ms().saturating_sub(at));
        at > 0 && age <= within
    }

    /// Whether bytes came within this time.
    pub(crate) fn has_read(&self, within: Duration) -> bool {
        self.is_recent(&self.read_ms, within)
    }

    /// Whether bytes were written within this time.
    pub(crate) fn has_written(&self, within: Duration) -> bool {
        self.is_recent(&self.wrote_ms, within)
    }
}

/// Every connected peer's.
#[derive(Clone, Default)]
pub(crate) struct Activities(Arc<Mutex<HashMap<PeerId, Arc<Activity>>>>);

impl Activities {
    pub(crate) fn of(&self, peer: PeerId) -> Arc<Activity> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= ENTRIES_MAX {
            all.retain(|_, activity| Arc::strong_count(activity) > 1);
        }
        Arc::clone(all.entry(peer).or_insert_with(|| Arc::new(Activity::new())))
    }

    /// The peer has gone.
    pub(crate) fn forget(&self, peer: PeerId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_active_for_a_while_after_its_bytes() {
        let all = Activities::default();
        let peer = PeerId::from_seed([1; 32]);
        let activity = all.of(peer);
        let long = Duration::from_secs(1000);
        assert!(!activity.has_read(long) && !activity.has_written(long));
        activity.read();
        assert!(all.of(peer).has_read(long) && !activity.has_written(long));
        activity.wrote();
        assert!(activity.has_written(long));
        all.forget(peer);
        assert!(!all.of(peer).has_read(long), "another connection");
    }
}
