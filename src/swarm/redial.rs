//! When to dial a bootstrap address again. Pure: the time is an argument.

use std::time::{Duration, Instant};

use crate::{Address, PeerId};

/// One address that should stay connected.
struct Entry {
    address: Address,
    /// From the address, or learned when the peer first answered.
    peer: Option<PeerId>,
    due: Instant,
    wait: Duration,
}

/// The bootstrap addresses and their backoff.
pub(crate) struct Redial {
    entries: Vec<Entry>,
    first: Duration,
    max: Duration,
}

impl Redial {
    pub(crate) fn new(
        addresses: impl IntoIterator<Item = Address>,
        first: Duration,
        max: Duration,
        now: Instant,
    ) -> Self {
        let entries = addresses
            .into_iter()
            .map(|address| Entry { peer: address.peer(), address, due: now, wait: first })
            .collect();
        Self { entries, first, max }
    }

    /// Addresses to dial now. Each is then postponed by its backoff, which doubles until it
    /// connects.
    pub(crate) fn due(
        &mut self,
        now: Instant,
        is_connected: impl Fn(PeerId) -> bool,
    ) -> Vec<Address> {
        let mut dial = Vec::new();
        for entry in &mut self.entries {
            if entry.peer.is_some_and(&is_connected) {
                entry.wait = self.first;
                entry.due = now + self.first;
            } else if entry.due <= now {
                dial.push(entry.address.clone());
                entry.due = now + entry.wait;
                entry.wait = (entry.wait * 2).min(self.max);
            }
        }
        dial
    }

    /// Records which peer answered at a dialled address.
    pub(crate) fn connected(&mut self, address: &Address, peer: PeerId) {
        for entry in &mut self.entries {
            if entry.address.without_peer() == address.without_peer() {
                entry.peer = Some(peer);
            }
        }
    }

    /// Drops entries that turned out to be this node itself.
    pub(crate) fn forget_self(&mut self, address: &Address) {
        self.entries.retain(|entry| entry.address.without_peer() != address.without_peer());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_limit_and_reset_when_connected() {
        let start = Instant::now();
        let (first, max) = (Duration::from_secs(1), Duration::from_secs(4));
        let address: Address = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
        let peer = PeerId::from_seed([1; 32]);
        let mut redial = Redial::new([address.clone()], first, max, start);
        let mut dialled = Vec::new();
        for second in 0..16 {
            let now = start + Duration::from_secs(second);
            if !redial.due(now, |_| false).is_empty() {
                dialled.push(second);
            }
        }
        assert_eq!(dialled, [0, 1, 3, 7, 11, 15]);

        redial.connected(&address.with_peer(peer), peer);
        let later = start + Duration::from_secs(100);
        assert!(redial.due(later, |other| other == peer).is_empty());
        // Lost again: dialled after the first, short wait.
        assert_eq!(redial.due(later + first, |_| false), std::slice::from_ref(&address));
        redial.forget_self(&address);
        assert!(redial.due(later + max * 9, |_| false).is_empty());
    }
}
