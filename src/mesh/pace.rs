//! When the transfers with one peer last made progress, over all of its streams.
//!
//! On a slow line the streams to one peer take turns: one that waits for its turn is late, not
//! dead. So a stream has stalled only if nothing at all arrived from its peer.
//!
//! Invariant: the recorded times never go back.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use doppler_ids::PeerId;

use super::options::PACES_MAX;

/// When bytes last moved, and when some were last proved.
pub(super) struct Pace {
    epoch: Instant,
    moved_ms: AtomicU64,
    proved_ms: AtomicU64,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { epoch: now, moved_ms: AtomicU64::new(0), proved_ms: AtomicU64::new(0) }
    }

    fn note(&self, time: &AtomicU64, now: Instant) {
        let since = now.saturating_duration_since(self.epoch).as_millis();
        time.fetch_max(u64::try_from(since).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn read(&self, time: &AtomicU64) -> Instant {
        self.epoch + Duration::from_millis(time.load(Ordering::Relaxed))
    }

    /// Call when bytes of a transfer have arrived or were taken.
    pub(super) fn moved(&self, now: Instant) {
        self.note(&self.moved_ms, now);
    }

    pub(super) fn moved_at(&self) -> Instant {
        self.read(&self.moved_ms)
    }

    /// Call when bytes of an answer were proved.
    pub(super) fn proved(&self, now: Instant) {
        self.note(&self.proved_ms, now);
    }

    pub(super) fn proved_at(&self) -> Instant {
        self.read(&self.proved_ms)
    }
}

/// The paces of connected peers.
#[derive(Default)]
pub(super) struct Paces(Mutex<HashMap<PeerId, Arc<Pace>>>);

impl Paces {
    pub(super) fn of(&self, peer: PeerId) -> Arc<Pace> {
        let mut paces = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if paces.len() >= PACES_MAX {
            paces.retain(|_, pace| Arc::strong_count(pace) > 1);
        }
        let pace = paces.entry(peer).or_insert_with(|| Arc::new(Pace::new(Instant::now())));
        Arc::clone(pace)
    }

    /// Call when the peer has gone.
    pub(super) fn forget(&self, peer: PeerId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer);
    }
}
