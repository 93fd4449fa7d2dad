//! Starting and stopping a mesh, and what others ask of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use doppler_ids::{Address, PeerId, Transport};
use doppler_swarm::{Bootstrap, Options, Path, Reach, SwarmHandle};
use futures::FutureExt;
use futures::future::BoxFuture;
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::actor::Actor;
use super::core::{
    Away, Config, Core, Counts, Event, Load, Source, Standing, TOPIC_PREFIX, Traffic, Twin,
};
use super::fetch::fetch;
use super::limiter::Limiter;
use super::options::{
    KNOWN_MAX, LIMIT_MIN, MeshError, MeshOptions, PROTOCOL_VERSION, SHARD_PROTOCOL,
    SWARM_NAME_BYTES_MAX,
};
use super::shard_client::Client;
use super::shard_server::Server;
use super::shared::{Shared, describe};
use doppler_store::groups::Chunks;
use doppler_store::signature::{PublicKey, SignedModel};
use doppler_store::verified::VerifiedRange;
use doppler_store::{ModelId, ReadError, ReadRequest, ShardId, ShardServe, ShardSource};

/// How long starting waits for an address of every transport that it listens on.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);

/// Starts meshes.
pub struct Mesh;

/// A running mesh. Cheap to clone; when the last clone is dropped it stops.
#[derive(Clone)]
pub struct MeshHandle {
    inner: Arc<Inner>,
}

struct Inner {
    swarm: SwarmHandle,
    shared: Arc<Shared>,
    listening: watch::Receiver<Vec<Address>>,
    reach: watch::Receiver<Reach>,
    bootstrap: watch::Receiver<Vec<Bootstrap>>,
    topic: String,
    cancel: CancellationToken,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    _stop: DropGuard,
}

/// A connected peer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PeerInfo {
    #[serde(serialize_with = "as_text")]
    pub id: PeerId,
    /// The addresses of its connections, then those on which it says it listens.
    pub addresses: Vec<String>,
    /// Where it can be dialled again, best first: where this node reached it, then where it says it
    /// listens on the machine from which it connected, then its relayed addresses. Empty until it
    /// has identified itself.
    #[serde(skip)]
    pub reached: Vec<Address>,
    /// Its `NAME/VERSION`; empty until it has identified itself.
    pub agent: String,
    /// Whether it is connected through a relay, so that it sends no shards.
    #[serde(skip)]
    pub path: Path,
    /// Whether it takes part in the swarm of this node's name.
    pub in_swarm: bool,
    pub connected_s: f64,
    /// Verified bytes received from it.
    pub bytes_in: u64,
    /// Bytes of objects sent to it.
    pub bytes_out: u64,
    /// 0 (worst) to 1.
    pub score: f64,
    /// Measured bytes per second, if any transfer was long enough.
    pub rate: Option<f64>,
    /// Objects that it says it holds.
    pub shards_held: u64,
}

/// A model that somebody announced, and how many peers say that they hold some of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KnownModel {
    #[serde(flatten)]
    pub signed: SignedModel,
    pub holders: usize,
}

/// What has happened since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    #[serde(flatten)]
    pub counts: Counts,
    /// By peer id as text. Includes peers that have gone.
    pub peers: BTreeMap<String, Traffic>,
    /// Peers banned now.
    pub banned: usize,
    /// Gossip messages, publications and streams dropped because a queue was full.
    pub dropped: u64,
    pub load: Load,
}

impl Mesh {
    // Long: wires the parts once, each after those that it needs.
    /// Starts a node of a swarm: returns once it listens (if it was told to).
    /// `serve` is what it offers to its peers.
    pub async fn start(
        options: MeshOptions,
        serve: Arc<dyn ShardServe>,
    ) -> Result<MeshHandle, MeshError> {
        let topic = topic(&options.swarm_name)?;
        for limit in [options.upload_limit, options.download_limit].into_iter().flatten() {
            if limit < LIMIT_MIN {
                return Err(MeshError::LimitTooLow(limit));
            }
        }
        let run = rand::random_range(1..=u64::MAX);
        let wanted: BTreeSet<Transport> = options.listen.iter().map(Address::transport).collect();
        let (swarm, events) = SwarmHandle::spawn(Options {
            listen: options.listen,
            bootstrap: options.bootstrap,
            mdns: options.mdns,
            relay: options.relay,
            ask_reach: options.ask_reach,
            upnp: options.upnp,
            run,
            agent: concat!("doppler-node/", env!("CARGO_PKG_VERSION")).to_owned(),
            protocol_version: PROTOCOL_VERSION.to_owned(),
            topics: vec![topic.clone()],
            topic_prefix: Some(TOPIC_PREFIX.to_owned()),
            external: options.external,
            webrtc_certificate: options.webrtc_certificate,
            swarm_key: options.swarm_key,
            tls_roots: options.tls_roots,
            carrier: options.carrier,
            ..Options::new(options.seed)
        })
        .await?;
        let (mut listening, reach) = (events.listening.clone(), events.reach.clone());
        let bootstrap = events.bootstrap.clone();
        if !wanted.is_empty() {
            let ready = listening.wait_for(|addresses| {
                let heard: BTreeSet<Transport> = addresses.iter().map(Address::transport).collect();
                heard.is_superset(&wanted)
            });
            let ready = tokio::time::timeout(LISTEN_TIMEOUT, ready).await;
            if !matches!(ready, Ok(Ok(_))) {
                return Err(MeshError::NotListening(LISTEN_TIMEOUT));
            }
        }
        let download = Arc::new(Limiter::new(options.download_limit));
        let core = Core::new(
            Config {
                own: swarm.peer(),
                run,
                epoch: options.epoch,
                topic: topic.clone(),
                timing: options.timing,
                find_timeout: options.find_timeout,
            },
            Instant::now(),
        );
        let client = Client::new(swarm.clone(), options.timing.idle, download.clone());
        let shared = Arc::new(Shared::new(core, swarm.clone(), client, topic.clone(), download));
        for (peer, addresses) in by_peer(options.known) {
            shared.note(Event::Known { peer, source: Source::Remembered, addresses });
        }
        let cancel = CancellationToken::new();
        let server = Arc::new(Server::new(
            serve.clone(),
            shared.clone(),
            options.upload_slots,
            options.upload_limit,
            options.timing.idle,
        ));
        let incoming = swarm.accept(SHARD_PROTOCOL)?;
        let actor = Actor {
            shared: shared.clone(),
            serve,
            look_every: options.timing.upkeep(1),
            cancel: cancel.clone(),
        };
        let tasks = vec![
            tokio::spawn(server.run(incoming, cancel.clone())),
            tokio::spawn(actor.run(events)),
        ];
        let inner = Inner {
            swarm,
            shared,
            listening,
            reach,
            bootstrap,
            topic,
            _stop: cancel.clone().drop_guard(),
            cancel,
            tasks: Mutex::new(tasks),
        };
        Ok(MeshHandle { inner: Arc::new(inner) })
    }
}

impl MeshHandle {
    pub(super) fn shared(&self) -> &Shared {
        &self.inner.shared
    }

    /// This node's id.
    pub fn peer_id(&self) -> PeerId {
        self.inner.swarm.peer()
    }

    /// Where this node listens, each address ending in `/p2p/` and its id: what
    /// others take as a bootstrap address.
    pub fn listen_addrs(&self) -> Vec<Address> {
        self.inner.listening.borrow().clone()
    }

    /// How others reach this node, as far as is known.
    pub fn reach(&self) -> Reach {
        self.inner.reach.borrow().clone()
    }

    /// The state of each bootstrap address.
    pub fn bootstrap(&self) -> Vec<Bootstrap> {
        self.inner.bootstrap.borrow().clone()
    }

    /// The known peers that are not connected and the state of looking for them, the most useful
    /// first.
    pub fn away(&self) -> Vec<Away> {
        self.inner.shared.look(|core, _| core.away(Instant::now()))
    }

    /// The peer that reads wait for most.
    pub fn slowest(&self) -> Option<PeerId> {
        self.inner.shared.look(|core, _| core.slowest(Instant::now()))
    }

    /// In words: what two nodes of one identity are, and what to do about them.
    pub fn describe_twin(&self, twin: &Twin) -> String {
        describe(twin, twin.peer == self.peer_id())
    }

    /// Identities that two nodes were recently seen to use, including this node's own.
    pub fn twins(&self) -> Vec<Twin> {
        self.inner.shared.look(|core, _| core.twins(Instant::now()))
    }

    /// The addresses that a page can dial: WebSocket and WebRTC-direct.
    pub fn browser_addrs(&self) -> Vec<Address> {
        let mut addresses = self.listen_addrs();
        addresses.retain(|address| address.transport().suits_browsers());
        addresses
    }

    /// Announces a model to the swarm, now and for as long as this node runs.
    pub fn publish(&self, signed: SignedModel) -> Result<(), MeshError> {
        Ok(self.inner.shared.tell(Event::Publish(signed))?)
    }

    /// Keeps a model with this announcement: the model is not forgotten, however many others are
    /// heard of, and is announced while any of its objects is here. Call it once for each of the
    /// model's signers.
    pub fn keep(&self, signed: SignedModel) -> Result<(), MeshError> {
        Ok(self.inner.shared.tell(Event::Keep(signed))?)
    }

    /// Stops keeping a model. With `own`, it also stops announcing it as this node's own. The model
    /// is forgotten once nobody holds it.
    pub fn release(&self, model: ModelId, own: bool) {
        self.inner.shared.note(Event::Release { model, own });
    }

    /// Sets the publishers whose models give way last among those that are neither this node's own
    /// nor kept.
    pub fn trust(&self, publishers: BTreeSet<PublicKey>) {
        self.inner.shared.note(Event::Trust(publishers));
    }

    /// Gives the mesh a model's ordered object list, which bitmaps of holdings
    /// refer to: the manifest's shards in order, then the other files it names
    /// by hash. Every node must derive the same list from the same manifest.
    /// Until a model is registered this node neither says what it holds of it
    /// nor finds its objects, the manifest excepted.
    pub fn register_model(&self, model: ModelId, objects: Vec<ShardId>) -> Result<(), MeshError> {
        Ok(self.inner.shared.tell(Event::Register { model, objects })?)
    }

    /// The models known to the swarm, with the number of peers that hold some of each.
    pub fn models(&self) -> Vec<KnownModel> {
        let models = self.inner.shared.look(|core, _| core.models(Instant::now()));
        models.into_iter().map(|(signed, holders)| KnownModel { signed, holders }).collect()
    }

    /// The known announcements, one for each model and publisher.
    pub fn announced(&self) -> Vec<SignedModel> {
        self.inner.shared.look(|core, _| core.announced())
    }

    /// Watches the list of known models.
    pub fn watch_models(&self) -> watch::Receiver<Arc<Vec<SignedModel>>> {
        self.inner.shared.models()
    }

    /// Changes whenever peers, holdings or loads may have changed.
    pub fn watch_changes(&self) -> watch::Receiver<u64> {
        self.inner.shared.changed()
    }

    /// Peers with a running lease that say they hold an object in full, whether connected or not.
    pub fn holders(&self, shard: ShardId) -> Vec<PeerId> {
        let whole = self.holdings(shard).into_iter().filter(|(_, chunks)| *chunks == Chunks::ALL);
        whole.map(|(peer, _)| peer).collect()
    }

    /// Peers that say they hold an object or a part of it, and which chunks.
    pub fn holdings(&self, shard: ShardId) -> Vec<(PeerId, Chunks)> {
        let holders = self.inner.shared.look(|core, _| core.holders(Instant::now(), shard));
        holders.ready.into_iter().chain(holders.away).collect()
    }

    /// Bytes of an object that reads in flight have proved but not delivered yet.
    pub fn coming(&self, shard: ShardId) -> u64 {
        self.inner.shared.coming(shard)
    }

    /// The connected peers, by id.
    pub fn peers(&self) -> Vec<PeerInfo> {
        let now = Instant::now();
        let info = |core: &Core, id: &PeerId, peer: &doppler_swarm::Peer| {
            let Standing { traffic, score, rate, held } = core.standing(now, *id);
            let addresses = std::iter::once(&peer.remote).chain(&peer.listens);
            PeerInfo {
                id: *id,
                addresses: addresses.map(Address::to_string).collect(),
                reached: reached(peer),
                agent: peer.agent.clone().unwrap_or_default(),
                path: peer.path,
                in_swarm: peer.topics.contains(&self.inner.topic),
                connected_s: now.saturating_duration_since(peer.connected_at).as_secs_f64(),
                bytes_in: traffic.bytes_in,
                bytes_out: traffic.bytes_out,
                score,
                rate,
                shards_held: held,
            }
        };
        self.inner
            .shared
            .look(|core, peers| peers.iter().map(|(id, peer)| info(core, id, peer)).collect())
    }

    pub fn stats(&self) -> Stats {
        let drops = self.inner.swarm.counters();
        let shared = &self.inner.shared;
        let (peers, banned) = shared.look(|core, _| {
            let traffic = core.traffic().iter();
            let peers = traffic.map(|(peer, traffic)| (peer.to_string(), *traffic)).collect();
            (peers, core.banned(Instant::now()))
        });
        Stats {
            counts: shared.counts(),
            peers,
            banned,
            dropped: drops.messages_dropped + drops.publications_dropped + drops.streams_dropped,
            load: shared.load(),
        }
    }

    /// Takes leave of the swarm, stops serving, closes every connection and waits until that is
    /// done. Reads under way fail; a second call does nothing.
    pub async fn shutdown(&self) {
        self.inner.shared.note(Event::Stop);
        self.inner.cancel.cancel();
        let tasks: Vec<_> = {
            let mut tasks = self.inner.tasks.lock().unwrap_or_else(PoisonError::into_inner);
            tasks.drain(..).collect()
        };
        for task in tasks {
            // An error means that the task panicked. It has ended in any case.
            let _ = task.await;
        }
        self.inner.swarm.shutdown().await;
    }
}

impl ShardSource for MeshHandle {
    fn fetch(&self, request: ReadRequest) -> BoxFuture<'_, Result<VerifiedRange, ReadError>> {
        fetch(self.inner.shared.clone(), request).boxed()
    }
}

/// Addresses by the peer that they name. The first peer comes last, because it counts as the last
/// seen.
fn by_peer(addresses: Vec<Address>) -> Vec<(PeerId, Vec<Address>)> {
    let mut peers: Vec<(PeerId, Vec<Address>)> = Vec::new();
    for address in addresses {
        let Some(peer) = address.peer() else { continue };
        let at = peers.iter().position(|(known, _)| *known == peer).unwrap_or(peers.len());
        if at == peers.len() && at < KNOWN_MAX {
            peers.push((peer, Vec::new()));
        }
        if let Some((_, addresses)) = peers.get_mut(at) {
            addresses.push(address.without_peer());
        }
    }
    peers.reverse();
    peers
}

/// The addresses at which a connected peer can be dialled again, best first.
pub(super) fn reached(peer: &doppler_swarm::Peer) -> Vec<Address> {
    if peer.agent.is_none() {
        return Vec::new();
    }
    let host = peer.remote.ip();
    let mut near: Vec<&Address> = peer
        .listens
        .iter()
        .filter(|address| host.is_some() && address.ip() == host)
        .filter(|address| address.transport() < Transport::WebRtc)
        .collect();
    near.sort_by_key(|address| address.transport());
    let mut all: Vec<Address> = peer.dialled.iter().cloned().collect();
    // And its relayed addresses, because a hole-punched address cannot be reused.
    let relayed = peer.listens.iter().filter(|address| address.transport() == Transport::Relay);
    for address in near.into_iter().chain(relayed).map(Address::without_peer) {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

/// The gossip topic of a swarm. It does not reveal the name to peers outside the swarm.
pub fn topic(swarm_name: &str) -> Result<String, MeshError> {
    if swarm_name.is_empty() || swarm_name.len() > SWARM_NAME_BYTES_MAX {
        return Err(MeshError::BadSwarmName(swarm_name.to_owned()));
    }
    let hash = blake3::derive_key("doppler-node 2026 swarm topic v1", swarm_name.as_bytes());
    Ok(format!("/doppler/swarm/{}/1", blake3::Hash::from_bytes(hash).to_hex()))
}

fn as_text<S: serde::Serializer>(value: &PeerId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swarms_of_different_names_have_different_topics() {
        assert_ne!(topic("a").unwrap(), topic("b").unwrap());
        assert_eq!(topic("a").unwrap(), topic("a").unwrap());
        assert!(!topic("secret").unwrap().contains("secret"));
        assert!(topic("").is_err() && topic(&"x".repeat(SWARM_NAME_BYTES_MAX + 1)).is_err());
    }
}
