//! Which connected peers are alive, whatever their pings say.
//!
//! A ping waits behind what is being sent. On a slow line it may be late by more than its time-out
//! while everything is well, so a peer counts as silent only if nothing else says that it is alive.
//! Bytes that came over the connection prove it, whatever they belong to (`counted`). Where they
//! are counted by stream (QUIC, WebRTC) so does gossip, because a peer that only receives a long
//! answer sends heartbeats. Bytes that were written prove less, because the system
//! takes some for a dead peer. So do the peer's own messages that others passed on: it lives, but
//! this connection may be broken; or other connections fill the line, and its turn will come.
//!
//! Invariant: an entry is that of a connected peer, or one of at most [`ENTRIES_MAX`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::PeerId;
use crate::options::{PING_INTERVAL, PING_TIMEOUT, PINGS_LOST_MAX};

/// Entries beyond which those that no stream uses are dropped: a stream may outlive its peer.
const ENTRIES_MAX: usize = 1024;

/// How long a sign of life counts: a ping and its time-out.
const LATE: Duration = Duration::from_secs(PING_INTERVAL.as_secs() + PING_TIMEOUT.as_secs());

/// When bytes came from a peer last, of streams, of gossip or of anything, when some were written to
/// it, and when others passed its messages on.
pub(crate) struct Activity {
    epoch: Instant,
    read_ms: AtomicU64,
    gossip_ms: AtomicU64,
    came_ms: AtomicU64,
    wrote_ms: AtomicU64,
    heard_ms: AtomicU64,
}

impl Activity {
    fn new() -> Self {
        // Zero stands for never.
        let epoch = Instant::now() - Duration::from_millis(1);
        let never = || AtomicU64::new(0);
        Self {
            epoch,
            read_ms: never(),
            gossip_ms: never(),
            came_ms: never(),
            wrote_ms: never(),
            heard_ms: never(),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn read(&self) {
        self.read_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Bytes of anything came over a connection.
    pub(crate) fn came(&self) {
        self.came_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    pub(crate) fn wrote(&self) {
        self.wrote_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Gossip came from it, whoever wrote it.
    pub(crate) fn gossiped(&self) {
        self.gossip_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// A message of its own came, whoever passed it on.
    pub(crate) fn heard(&self) {
        self.heard_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    fn is_recent(&self, time: &AtomicU64, within: Duration) -> bool {
        let at = time.load(Ordering::Relaxed);
        let age = Duration::from_millis(self.now_ms().saturating_sub(at));
        at > 0 && age <= within
    }

    fn reset(&self) {
        let Self { epoch: _, read_ms, gossip_ms, came_ms, wrote_ms, heard_ms } = self;
        for time in [read_ms, gossip_ms, came_ms, wrote_ms, heard_ms] {
            time.store(0, Ordering::Relaxed);
        }
    }

    /// Whether bytes of its streams came within this time.
    pub(crate) fn has_read(&self, within: Duration) -> bool {
        self.is_recent(&self.read_ms, within)
    }

    /// Whether the peer is alive although so many pings in a row failed.
    pub(crate) fn is_alive(&self, pings_lost: u32) -> bool {
        let is_recent = |time| self.is_recent(time, LATE);
        let came = [&self.read_ms, &self.gossip_ms, &self.came_ms].into_iter().any(is_recent);
        let may_be = is_recent(&self.wrote_ms) || is_recent(&self.heard_ms);
        came || may_be && pings_lost <= PINGS_LOST_MAX
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

    /// The peer has gone. What still counts for it (a stream, a connection that is being made) counts
    /// from now on.
    pub(crate) fn forget(&self, peer: PeerId) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match all.get(&peer) {
            Some(activity) if Arc::strong_count(activity) > 1 => activity.reset(),
            _ => drop(all.remove(&peer)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_alive_for_a_while_after_its_bytes() {
        let all = Activities::default();
        let peer = PeerId::from_seed([1; 32]);
        for sign in [Activity::read, Activity::gossiped, Activity::came] {
            assert!(!all.of(peer).is_alive(1));
            sign(&all.of(peer));
            assert!(all.of(peer).is_alive(1) && all.of(peer).is_alive(1000));
            all.forget(peer);
        }
        assert!(!all.of(peer).is_alive(1), "another connection");
    }

    #[test]
    fn a_connection_in_the_making_counts_after_the_last_one_ended() {
        let all = Activities::default();
        let peer = PeerId::from_seed([1; 32]);
        let new = all.of(peer);
        new.came();
        all.forget(peer);
        assert!(!all.of(peer).is_alive(1));
        new.came();
        assert!(all.of(peer).is_alive(1));
    }

    #[test]
    fn what_was_written_and_what_others_pass_on_excuse_a_few_lost_pings() {
        for sign in [Activity::wrote, Activity::heard] {
            let activity = Activity::new();
            sign(&activity);
            assert!(activity.is_alive(PINGS_LOST_MAX) && !activity.is_alive(PINGS_LOST_MAX + 1));
        }
    }

    #[test]
    fn a_sign_of_life_is_forgotten() {
        let mut activity = Activity::new();
        let signs =
            [Activity::read, Activity::gossiped, Activity::came, Activity::wrote, Activity::heard];
        for sign in signs {
            sign(&activity);
        }
        activity.epoch -= LATE;
        assert!(activity.is_alive(1), "just not");
        activity.epoch -= Duration::from_millis(1500);
        assert!(!activity.is_alive(1));
    }
}
