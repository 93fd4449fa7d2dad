//! What the mesh knows, behind one lock, and the decisions taken on it.
//!
//! The lock is a plain mutex: it is held for a decision, never across an await,
//! so that a read that is dropped half-way can give back what it took at once.
//! Whoever waits for a decision to change waits on `changed`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use doppler_swarm::{Address, Peer, PeerId, Peers};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use super::announcements::{Announcements, Learned};
use super::membership::{Heard, Membership, bitmap};
use super::options::{
    DIAL_RETRY_FIRST, DIAL_RETRY_MAX, DIAL_TARGET, OWN_PARTS_MAX, PEERS_REMEMBERED_MAX,
    RELAYED_MANIFEST_BYTES_MAX,
};
use super::reputation::{Conduct, Reputation};
use super::scheduler::{Ask, Holder, Outcome, ReadId, Scheduler};
use crate::wire::{ModelHoldings, PartHoldings};
use doppler_store::groups::Chunks;
use doppler_store::signature::SignedModel;
use doppler_store::{ModelId, ShardId};

/// Bytes of objects exchanged with one peer; kept after it has gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Verified bytes received.
    pub bytes_in: u64,
    /// Bytes of objects sent.
    pub bytes_out: u64,
    /// Bytes received and thrown away because they did not match their hash.
    pub rejected: u64,
}

/// What is under way now; all of it is nothing once every peer has gone and its lease has run out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Streams of the shard protocol on which peers ask.
    pub streams: usize,
    /// Peers whose word on what they hold is believed.
    pub leases: usize,
    /// Reads from peers.
    pub reads: usize,
}

/// Counts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Bytes received and proved.
    pub verified_bytes: u64,
    /// Bytes received from peers whose bytes did not match, and thrown away.
    pub rejected_bytes: u64,
    /// Bytes of objects sent to peers.
    pub served_bytes: u64,
    /// Announcements dropped because their signature does not verify.
    pub bad_signatures: u64,
    /// Gossip messages dropped because they were malformed or not their author's to say.
    pub bad_messages: u64,
    /// Gossip messages dropped because their author sends too many, or nothing had room.
    pub ignored_messages: u64,
    /// Times a peer was banned.
    pub bans: u64,
    /// Requests that were asked of a second peer because the first was late or silent.
    pub hedges: u64,
    /// Streams refused because there were too many, from one peer or from all.
    pub refused_streams: u64,
    /// Connections that failed at a private swarm's door, this node's or the peer's.
    pub refused_peers: u64,
}

struct Dialling {
    next: Instant,
    wait: std::time::Duration,
}

/// Everything behind the lock.
#[derive(Default)]
pub(super) struct State {
    pub(super) membership: Membership,
    pub(super) announcements: Announcements,
    pub(super) reputation: Reputation,
    pub(super) scheduler: Scheduler,
    /// Where each read takes its orders.
    pub(super) orders: BTreeMap<ReadId, mpsc::Sender<Ask>>,
    pub(super) peers: Peers,
    pub(super) counts: Counts,
    pub(super) traffic: BTreeMap<PeerId, Traffic>,
    /// Streams served now.
    pub(super) serving: usize,
    dialling: BTreeMap<PeerId, Dialling>,
}

/// Who could serve an object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Holders {
    /// Connected and trusted.
    pub(super) ready: Vec<(PeerId, Chunks)>,
    /// Known by a lease, but not connected.
    pub(super) away: Vec<(PeerId, Chunks)>,
    /// Connected, but through a relay that may not carry this.
    pub(super) relayed: Vec<(PeerId, Chunks)>,
}

impl State {
    pub(super) fn holders(&self, now: Instant, shard: ShardId) -> Holders {
        let mut holders = Holders::default();
        for (peer, chunks) in self.membership.holders(now, shard) {
            if self.reputation.is_shunned(now, peer) {
                continue;
            }
            match self.peers.get(&peer) {
                Some(connected) if connected.path.is_direct() || self.may_relay(shard) => {
                    holders.ready.push((peer, chunks));
                }
                Some(_) => holders.relayed.push((peer, chunks)),
                None => holders.away.push((peer, chunks)),
            }
        }
        holders
    }

    /// Whether an object is small and needed enough to go over a relay: a manifest.
    pub(super) fn may_relay(&self, shard: ShardId) -> bool {
        may_relay(&self.announcements, shard)
    }

    pub(super) fn load(&self) -> Load {
        let (leases, reads) = (self.membership.peers().count(), self.orders.len());
        Load { streams: self.serving, leases, reads }
    }

    /// Gives every read its orders.
    pub(super) fn assign(&mut self, now: Instant, hedge: bool) {
        let Self { scheduler, membership, reputation, peers, announcements, .. } = self;
        let asks = scheduler.schedule(now, hedge, &|shard| {
            let holders = membership.holders(now, shard).into_iter();
            let relay = may_relay(announcements, shard);
            let in_reach =
                |peer: &PeerId| peers.get(peer).is_some_and(|p| relay || p.path.is_direct());
            holders
                .filter(|(peer, _)| in_reach(peer) && !reputation.is_shunned(now, *peer))
                .map(|(peer, chunks)| Holder { peer, chunks, score: reputation.score(peer) })
                .collect()
        });
        for ask in asks {
            let sent = self.orders.get(&ask.read).map(|orders| orders.try_send(ask));
            if !matches!(sent, Some(Ok(()))) {
                // A read that is slow to take its orders: its bytes are to do again.
                self.scheduler.end(now, ask.read, ask.request, Outcome::Failed, 0);
            }
        }
    }

    /// Takes in an announcement; its models' holders protect them from being pushed out.
    pub(super) fn learn(&mut self, now: Instant, signed: SignedModel, own: bool) -> Learned {
        let Self { announcements, membership, .. } = self;
        let learned = announcements
            .learn(now, signed, own, |model| membership.holders_of_model(now, model) > 0);
        match learned {
            Learned::Bad(_) => self.counts.bad_signatures += 1,
            Learned::Full => self.counts.ignored_messages += 1,
            Learned::New | Learned::Known => {}
        }
        learned
    }

    /// Takes in what an author says it holds; true if anybody could act on it.
    pub(super) fn hear(
        &mut self,
        now: Instant,
        author: PeerId,
        holdings: crate::wire::Holdings,
    ) -> bool {
        let heard = self.membership.hear(now, author, holdings);
        if heard == Heard::Full {
            self.counts.ignored_messages += 1;
        }
        heard == Heard::Changed
    }

    /// What this node holds, for gossip.
    pub(super) fn own_holdings(
        &self,
        held: &BTreeSet<ShardId>,
        parts: &BTreeMap<ShardId, Chunks>,
    ) -> Vec<ModelHoldings> {
        let mut room = OWN_PARTS_MAX;
        let entry = |(model, list): (&ModelId, &[ShardId])| {
            let mut told = Vec::new();
            for (object, id) in list.iter().enumerate().filter(|_| !parts.is_empty()) {
                if let (Some(chunks), Ok(object)) = (parts.get(id), u32::try_from(object))
                    && !held.contains(id)
                    && room > 0
                {
                    told.push(PartHoldings { object, chunks: *chunks });
                    room -= 1;
                }
            }
            ModelHoldings {
                model: *model,
                manifest: held.contains(&model.manifest()),
                objects: bitmap(list.len(), |bit| {
                    list.get(bit).is_some_and(|id| held.contains(id))
                }),
                parts: told,
            }
        };
        self.membership.lists().map(entry).collect()
    }

    /// Notes conduct; the end of a ban, if there is a new one.
    pub(super) fn note(&mut self, now: Instant, peer: PeerId, conduct: Conduct) -> Option<Instant> {
        let ban = self.reputation.note(now, peer, conduct);
        self.counts.bans += u64::from(ban.is_some());
        ban
    }

    pub(super) fn traffic(&mut self, peer: PeerId) -> &mut Traffic {
        if self.traffic.len() >= PEERS_REMEMBERED_MAX && !self.traffic.contains_key(&peer) {
            let least = self.traffic.iter().min_by_key(|(_, t)| t.bytes_in + t.bytes_out);
            if let Some(least) = least.map(|(peer, _)| *peer) {
                self.traffic.remove(&least);
            }
        }
        self.traffic.entry(peer).or_default()
    }

    /// Of `wanted`, who should be dialled now and where. Each dial puts the next one off.
    pub(super) fn take_dials(
        &mut self,
        now: Instant,
        wanted: impl IntoIterator<Item = PeerId>,
    ) -> Vec<(PeerId, Vec<Address>)> {
        let mut dial = Vec::new();
        for peer in &wanted.into_iter().collect::<Vec<_>>() {
            if self.peers.contains_key(peer) || self.reputation.is_banned(now, *peer) {
                continue;
            }
            let addresses = self.membership.addresses(*peer);
            let entry = self
                .dialling
                .entry(*peer)
                .or_insert(Dialling { next: now, wait: DIAL_RETRY_FIRST });
            if entry.next <= now && !addresses.is_empty() {
                entry.next = now + entry.wait;
                entry.wait = (entry.wait * 2).min(DIAL_RETRY_MAX);
                dial.push((*peer, addresses));
            }
        }
        dial
    }

    /// Peers worth a connection before anybody needs them.
    pub(super) fn worth_dialling(&self, own: PeerId) -> Vec<PeerId> {
        let room = DIAL_TARGET.saturating_sub(self.peers.len());
        let away = self.membership.peers().filter(|peer| !self.peers.contains_key(peer));
        away.filter(|peer| *peer != own).take(room).collect()
    }

    /// When a dial that was put off may be tried again.
    pub(super) fn next_dial(&self, wanted: &[(PeerId, Chunks)]) -> Option<Instant> {
        let wanted = wanted.iter().filter_map(|(peer, _)| self.dialling.get(peer));
        wanted.map(|entry| entry.next).min()
    }

    /// The connected peers changed; returns those that went away, or to whom another way
    /// leads now: that one has to be measured afresh.
    pub(super) fn connected(&mut self, peers: Peers) -> Vec<PeerId> {
        let moved = |(id, peer): &(&PeerId, &Peer)| {
            peers.get(id).is_none_or(|now| now.path.is_direct() != peer.path.is_direct())
        };
        let gone: Vec<PeerId> = self.peers.iter().filter(moved).map(|(id, _)| *id).collect();
        for peer in gone.iter().filter(|peer| peers.contains_key(peer)) {
            self.scheduler.links.renew(*peer);
        }
        for peer in peers.keys() {
            self.dialling.remove(peer);
        }
        self.peers = peers;
        gone
    }

    /// Forgets what no lease covers; true if that was anything.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let changed = self.membership.expire(now);
        let members: BTreeSet<PeerId> = self.membership.peers().collect();
        self.dialling.retain(|peer, _| members.contains(peer));
        changed
    }
}

fn may_relay(announcements: &Announcements, shard: ShardId) -> bool {
    let size = announcements.manifest_size(shard);
    size.is_some_and(|size| size <= RELAYED_MANIFEST_BYTES_MAX)
}

/// The state, and the bell that rings when a decision on it may come out differently.
pub(super) struct Shared {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    stirred: watch::Sender<u64>,
    models: watch::Sender<Arc<Vec<SignedModel>>>,
}

impl Shared {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            changed: watch::Sender::new(0),
            stirred: watch::Sender::new(0),
            models: watch::Sender::new(Arc::default()),
        }
    }

    /// Locks the state. A panic elsewhere leaves counts off by one at worst, so
    /// a poisoned lock is taken all the same.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes whoever watches the mesh.
    pub(super) fn ring(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    /// Who holds what, or who is connected, changed: wakes the reads too.
    pub(super) fn stir(&self) {
        self.stirred.send_modify(|version| *version += 1);
        self.ring();
    }

    pub(super) fn stirred(&self) -> watch::Receiver<u64> {
        self.stirred.subscribe()
    }

    pub(super) fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Publishes the list of known models to those who watch it.
    pub(super) fn publish_models(&self) {
        let models = self.lock().announcements.all();
        self.models.send_replace(Arc::new(models));
    }

    pub(super) fn models(&self) -> watch::Receiver<Arc<Vec<SignedModel>>> {
        self.models.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use doppler_swarm::Path;

    use super::*;
    use crate::wire::Holdings;

    fn connected(peer: PeerId, path: Path) -> Peers {
        let remote: Address = "/ip4/10.0.0.1/tcp/1".parse().unwrap();
        let peer_info = Peer {
            remote,
            path,
            dialled: None,
            offers_relay: false,
            listens: Vec::new(),
            agent: None,
            connected_at: Instant::now(),
            topics: BTreeSet::new(),
        };
        Arc::new(BTreeMap::from([(peer, peer_info)]))
    }

    #[test]
    fn shards_are_asked_for_only_where_no_relay_lies_between() {
        let (now, peer) = (Instant::now(), PeerId::from_seed([1; 32]));
        let (model, shard) = (ModelId::of(b"model"), ShardId::of(b"shard"));
        let mut state = State::default();
        state.membership.register(model, vec![shard]).unwrap();
        let entry = ModelHoldings { model, manifest: true, objects: vec![1], parts: Vec::new() };
        let holdings = Holdings {
            peer: peer.to_bytes(),
            sequence: 1,
            lease: Duration::from_secs(60),
            addresses: Vec::new(),
            models: vec![entry],
        };
        assert!(state.hear(now, peer, holdings));
        let ready = |state: &State, object| state.holders(now, object).ready.len();
        let manifest = model.manifest();

        // Over a relay a manifest comes once somebody has signed that it is small.
        assert!(state.connected(connected(peer, Path::Relayed { by: None })).is_empty());
        assert_eq!(state.holders(now, shard).relayed.len(), 1);
        assert_eq!((ready(&state, shard), ready(&state, manifest)), (0, 0));
        let sign = |size| SignedModel::sign(&[9; 32], model, "m", size).unwrap();
        state.learn(now, sign(RELAYED_MANIFEST_BYTES_MAX + 1), false);
        assert_eq!(ready(&state, manifest), 0);
        state.learn(now, sign(RELAYED_MANIFEST_BYTES_MAX), false);
        assert_eq!((ready(&state, shard), ready(&state, manifest)), (0, 1));

        // The direct way is another one: streams and measures of the relayed one go.
        let begun = state.scheduler.links.begin(now, peer, 1 << 20);
        state.scheduler.links.end(now + Duration::from_secs(9), begun, 1 << 20);
        assert!(state.scheduler.links.rate(peer).is_some());
        assert_eq!(state.connected(connected(peer, Path::Direct)), [peer]);
        assert!(state.scheduler.links.rate(peer).is_none());
        assert_eq!((ready(&state, shard), ready(&state, manifest)), (1, 1));
        assert!(state.connected(connected(peer, Path::Direct)).is_empty(), "nothing new");
        assert_eq!(state.connected(Peers::default()), [peer]);
        assert_eq!(state.holders(now, shard).away.len(), 1);
    }
}
