//! When to dial a bootstrap address again, and how each of them fares. Pure: the time is an
//! argument.
//!
//! Invariants: an address is dialled for as long as the node runs; whatever keeps it from leading
//! into the swarm is said once, and again only after it had led there meanwhile.

use std::hash::{DefaultHasher, Hash, Hasher};
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
    /// Nodes never dial it; `failed` says why.
    refused: bool,
    due: Instant,
    wait: Duration,
    max: Duration,
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

/// Pauses between dials of one address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pauses {
    pub(crate) first: Duration,
    /// The longest for the first `near` addresses, and for those after them.
    pub(crate) near_max: Duration,
    pub(crate) near: usize,
    pub(crate) far_max: Duration,
}

/// The bootstrap addresses and their backoff.
pub(crate) struct Redial {
    entries: Vec<Entry>,
    pauses: Pauses,
    /// How long an address may fail, or its peer may take part in nothing, before that is said.
    patience: Duration,
}

impl Redial {
    pub(crate) fn new(
        addresses: impl IntoIterator<Item = Address>,
        pauses: Pauses,
        patience: Duration,
        now: Instant,
    ) -> Self {
        let entry = |(index, address): (usize, Address)| {
            let refused = never_dialled(&address);
            Entry {
                peer: address.peer(),
                refused: refused.is_some(),
                failed: refused.map(|reason| (now, reason.to_owned())),
                address,
                due: now,
                wait: pauses.first,
                max: if index < pauses.near { pauses.near_max } else { pauses.far_max },
                is_foreign: false,
                is_connected: false,
                was_told: false,
            }
        };
        let entries = addresses.into_iter().enumerate().map(entry).collect();
        Self { entries, pauses, patience }
    }

    /// Addresses to dial now. Each is then postponed by its backoff, which doubles until it
    /// connects.
    pub(crate) fn due(
        &mut self,
        now: Instant,
        is_connected: impl Fn(PeerId) -> bool,
    ) -> Vec<Address> {
        let mut dial = Vec::new();
        for entry in self.entries.iter_mut().filter(|entry| !entry.refused) {
            if entry.peer.is_some_and(&is_connected) {
                entry.wait = self.pauses.first;
                entry.due = now + self.pauses.first;
            } else if entry.due <= now {
                dial.push(entry.address.clone());
                entry.due = now + shortened(entry.wait, &entry.address);
                entry.wait = (entry.wait * 2).min(entry.max);
            }
        }
        dial
    }

    /// The network has changed: every address is dialled at once.
    pub(crate) fn hurry(&mut self, now: Instant) {
        for entry in &mut self.entries {
            (entry.due, entry.wait) = (now, self.pauses.first);
        }
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
                    let foreign = "it answers, but is not in a swarm of this name";
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

/// Why an address can never be dialled, if so.
fn never_dialled(address: &Address) -> Option<&'static str> {
    if address.transport() == Transport::WebRtc {
        return Some("WebRTC is for browsers; nodes do not dial it");
    }
    let is_only_a_peer = address.peer().is_some_and(|peer| Address::of_peer(peer) == *address);
    is_only_a_peer.then_some(
        "it names a peer but no place; write where that peer listens before it, such as \
         /ip4/192.0.2.1/tcp/4001/p2p/PEER",
    )
}

/// A pause, up to a quarter shorter: nodes that lost the same address do not dial it in step.
fn shortened(pause: Duration, address: &Address) -> Duration {
    let mut hasher = DefaultHasher::new();
    (std::process::id(), pause, address).hash(&mut hasher);
    pause.mul_f64(1.0 - f64::from(hasher.finish() as u8) / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(3);

    #[test]
    fn waits_double_up_to_the_limit_and_reset_when_connected() {
        let start = Instant::now();
        let (first, max) = (Duration::from_secs(1), Duration::from_secs(4));
        let pauses = Pauses { first, near_max: max, near: 1, far_max: max * 10 };
        let address: Address = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
        let far: Address = "/ip4/127.0.0.1/tcp/2".parse().unwrap();
        let peer = PeerId::from_seed([1; 32]);
        let mut redial = Redial::new([address.clone(), far.clone()], pauses, PATIENCE, start);
        let mut dialled: [Vec<f64>; 2] = Default::default();
        for step in 0..10_000 {
            let now = start + Duration::from_millis(step * 10);
            for due in redial.due(now, |_| false) {
                dialled[usize::from(due == far)].push((now - start).as_secs_f64());
            }
        }
        for (times, max) in dialled.iter().zip([4.0, 40.0]) {
            assert_eq!(times[0], 0.0);
            for (index, pair) in times.windows(2).enumerate() {
                let (pause, most) = (pair[1] - pair[0], f64::powi(2.0, index as i32).min(max));
                assert!(pause <= most + 0.011 && pause >= 0.75 * most, "{index}: {pause}");
            }
        }
        let now = start + Duration::from_secs(101);
        redial.hurry(now);
        assert_eq!(redial.due(now, |_| false).len(), 2, "another network");
        redial.forget_self(&far);

        redial.connected(&address.with_peer(peer), peer);
        let later = start + Duration::from_secs(200);
        assert!(redial.due(later, |other| other == peer).is_empty());
        // Lost again: dialled after the first, short wait.
        assert_eq!(redial.due(later + first, |_| false), std::slice::from_ref(&address));
        redial.forget_self(&address);
        assert!(redial.due(later + max * 9, |_| false).is_empty());
    }

    fn redial(addresses: &[&str], start: Instant) -> Redial {
        let addresses = addresses.iter().map(|text| text.parse().unwrap());
        let (first, max) = (Duration::from_secs(1), Duration::from_secs(15));
        let pauses = Pauses { first, near_max: max, near: 9, far_max: max };
        Redial::new(addresses, pauses, PATIENCE, start)
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
        assert!(said.len() == 1 && said[0].1.contains("not in a swarm of this name"), "{said:?}");
        assert_eq!(redial.report()[0].state, BootstrapState::OtherSwarm);
        assert_eq!(redial.review(at(9), met(false)), []);
        assert_eq!(redial.review(at(10), met(true)), []);
        assert_eq!(redial.report()[0].state, BootstrapState::Connected);
    }

    #[test]
    fn an_address_that_nodes_never_dial_says_so() {
        let start = Instant::now();
        let peer = PeerId::from_seed([1; 32]);
        let alone = format!("/p2p/{peer}");
        let mut redial = redial(&["/ip4/10.0.0.1/udp/1/webrtc-direct", &alone], start);
        assert_eq!(redial.due(start, |_| false), []);
        let said = redial.review(start + PATIENCE, |_| None);
        let [webrtc, alone] = &said[..] else { panic!("{said:?}") };
        assert!(webrtc.1.contains("WebRTC") && alone.1.contains("no place"), "{said:?}");
        // The local network may find the peer all the same.
        let met = |_: PeerId| Some(Met { since: start, is_member: true });
        assert_eq!(redial.review(start + PATIENCE, met), []);
        assert_eq!(redial.report()[1].state, BootstrapState::Connected);
    }
}
