//! When to dial a bootstrap address again, and how each of them fares. Pure: the time is an
//! argument.
//!
//! Invariant: whatever keeps an address from leading into the swarm is said once, and again only
//! after it had led there meanwhile.

use std::time::{Duration, Instant};

use crate::{Address, PeerId, Transport};

/// A bootstrap address and how it fares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bootstrap {
    pub address: Address,
    /// From the address, or learned when it first answered.
    pub peer: Option<PeerId>,
    pub state: BootstrapState,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootstrapState {
    /// It is being dialled.
    Trying,
    /// Its peer is connected, by whatever address.
    Connected,
    /// Its peer is connected and takes part in none of this node's topics.
    OtherSwarm,
    /// The last dial failed; it is dialled again.
    Failed { reason: String },
}

/// What is known of a peer that an address led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Met {
    pub(crate) since: Instant,
    /// It takes part in one of this node's topics.
    pub(crate) is_member: bool,
}

/// One address that should stay connected.
struct Entry {
    address: Address,
    peer: Option<PeerId>,
    due: Instant,
    wait: Duration,
    /// Since when it has failed, and why it did last.
    failed: Option<(Instant, String)>,
    is_foreign: bool,
    is_connected: bool,
    was_told: bool,
}

impl Entry {
    fn state(&self) -> BootstrapState {
        match &self.failed {
            _ if self.is_foreign => BootstrapState::OtherSwarm,
            _ if self.is_connected => BootstrapState::Connected,
            Some((_, reason)) => BootstrapState::Failed { reason: reason.clone() },
            None => BootstrapState::Trying,
        }
    }
}

/// The bootstrap addresses and their backoff.
pub(crate) struct Redial {
    entries: Vec<Entry>,
    first: Duration,
    max: Duration,
    /// How long an address may fail, or its peer may take part in nothing, before that is said.
    patience: Duration,
}

impl Redial {
    pub(crate) fn new(
        addresses: impl IntoIterator<Item = Address>,
        first: Duration,
        max: Duration,
        patience: Duration,
        now: Instant,
    ) -> Self {
        let entry = |address: Address| Entry {
            peer: address.peer(),
            failed: (address.transport() == Transport::WebRtc)
                .then(|| (now, "WebRTC is for browsers; nodes do not dial it".to_owned())),
            address,
            due: now,
            wait: first,
            is_foreign: false,
            is_connected: false,
            was_told: false,
        };
        let entries = addresses.into_iter().map(entry).collect();
        Self { entries, first, max, patience }
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
        for entry in self.at(address) {
            entry.peer = Some(peer);
        }
    }

    /// A dial of an address failed.
    pub(crate) fn failed(&mut self, now: Instant, address: &Address, reason: &str) {
        for entry in self.at(address) {
            let since = entry.failed.as_ref().map_or(now, |(since, _)| *since);
            entry.failed = Some((since, reason.to_owned()));
        }
    }

    /// A peer cannot be reached or kept, whatever the address. A reason that is known already
    /// says more than that it is refused since.
    pub(crate) fn failed_peer(&mut self, now: Instant, peer: PeerId, reason: &str) {
        for entry in self.entries.iter_mut().filter(|entry| entry.peer == Some(peer)) {
            entry.failed.get_or_insert_with(|| (now, reason.to_owned()));
        }
    }

    /// Drops entries that turned out to be this node itself.
    pub(crate) fn forget_self(&mut self, address: &Address) {
        self.entries.retain(|entry| entry.address.without_peer() != address.without_peer());
    }

    /// Looks at who is connected; what is to be said now, of which address.
    pub(crate) fn review(
        &mut self,
        now: Instant,
        met: impl Fn(PeerId) -> Option<Met>,
    ) -> Vec<(Address, String)> {
        let patience = self.patience;
        let mut say = Vec::new();
        for entry in &mut self.entries {
            let met = entry.peer.and_then(&met);
            entry.is_connected = met.is_some();
            entry.is_foreign = met.is_some_and(|met| !met.is_member && met.since + patience <= now);
            let problem = match (met, &entry.failed) {
                (Some(met), _) => {
                    entry.failed = None;
                    entry.was_told &= !met.is_member;
                    let foreign = "it answers, but takes part in no swarm of this name";
                    entry.is_foreign.then(|| foreign.to_owned())
                }
                (None, Some((since, reason))) if *since + patience <= now => Some(reason.clone()),
                (None, _) => None,
            };
            if let Some(problem) = problem.filter(|_| !entry.was_told) {
                entry.was_told = true;
                say.push((entry.address.clone(), problem));
            }
        }
        say
    }

    /// How every address fares.
    pub(crate) fn report(&self) -> Vec<Bootstrap> {
        let report = |entry: &Entry| Bootstrap {
            address: entry.address.clone(),
            peer: entry.peer,
            state: entry.state(),
        };
        self.entries.iter().map(report).collect()
    }

    fn at(&mut self, address: &Address) -> impl Iterator<Item = &mut Entry> {
        let bare = address.without_peer();
        self.entries.iter_mut().filter(move |entry| entry.address.without_peer() == bare)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(3);

    #[test]
    fn waits_double_up_to_the_limit_and_reset_when_connected() {
        let start = Instant::now();
        let (first, max) = (Duration::from_secs(1), Duration::from_secs(4));
        let address: Address = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
        let peer = PeerId::from_seed([1; 32]);
        let mut redial = Redial::new([address.clone()], first, max, PATIENCE, start);
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

    fn redial(addresses: &[&str], start: Instant) -> Redial {
        let addresses = addresses.iter().map(|text| text.parse().unwrap());
        Redial::new(addresses, Duration::from_secs(1), Duration::from_secs(60), PATIENCE, start)
    }

    #[test]
    fn a_dead_address_is_told_once_with_its_reason_and_again_after_it_lived() {
        let start = Instant::now();
        let peer = PeerId::from_seed([1; 32]);
        let named = format!("/ip4/10.0.0.1/tcp/1/p2p/{peer}");
        let mut redial = redial(&["/ip4/10.0.0.2/tcp/2", &named], start);
        let (bare, named) = ("/ip4/10.0.0.2/tcp/2".parse().unwrap(), named.parse().unwrap());
        let at = |second| start + Duration::from_secs(second);
        let nobody = |_: PeerId| None;
        assert_eq!(redial.review(at(9), nobody), [], "nothing has failed yet");
        assert_eq!(redial.report()[0].state, BootstrapState::Trying);
        redial.failed(at(9), &bare, "connection refused");
        redial.failed_peer(at(9), peer, "no route");
        redial.failed_peer(at(9), peer, "refused since");
        let failed = BootstrapState::Failed { reason: "no route".into() };
        assert_eq!(redial.report()[1].state, failed);
        assert_eq!(redial.review(at(10), nobody), [], "another address may lead there yet");
        let told = [(bare.clone(), "connection refused".to_owned()), (named, "no route".into())];
        assert_eq!(redial.review(at(12), nobody), told);
        redial.failed(at(13), &bare, "connection refused");
        assert_eq!(redial.review(at(99), nobody), [], "once");
        // It answers, and is lost again.
        redial.connected(&bare, PeerId::from_seed([2; 32]));
        let met = |_: PeerId| Some(Met { since: at(100), is_member: true });
        assert_eq!(redial.review(at(100), met), []);
        assert!(redial.report().iter().all(|one| one.state == BootstrapState::Connected));
        redial.failed(at(101), &bare, "gone");
        assert_eq!(redial.review(at(104), nobody), [(bare, "gone".to_owned())]);
    }

    #[test]
    fn a_peer_of_another_swarm_is_told_once_it_had_time_to_say_so() {
        let start = Instant::now();
        let peer = PeerId::from_seed([1; 32]);
        let text = format!("/ip4/10.0.0.1/tcp/1/p2p/{peer}");
        let mut redial = redial(&[&text], start);
        let at = |second| start + Duration::from_secs(second);
        let met = |is_member| move |_: PeerId| Some(Met { since: start, is_member });
        assert_eq!(redial.review(at(1), met(false)), []);
        assert_eq!(redial.report()[0].state, BootstrapState::Connected);
        let said = redial.review(at(3), met(false));
        assert!(said.len() == 1 && said[0].1.contains("no swarm of this name"), "{said:?}");
        assert_eq!(redial.report()[0].state, BootstrapState::OtherSwarm);
        assert_eq!(redial.review(at(9), met(false)), []);
        assert_eq!(redial.review(at(10), met(true)), []);
        assert_eq!(redial.report()[0].state, BootstrapState::Connected);
    }

    #[test]
    fn an_address_that_nodes_never_dial_says_so() {
        let start = Instant::now();
        let mut redial = redial(&["/ip4/10.0.0.1/udp/1/webrtc-direct"], start);
        let said = redial.review(start + PATIENCE, |_| None);
        assert!(said.len() == 1 && said[0].1.contains("WebRTC"), "{said:?}");
    }
}
