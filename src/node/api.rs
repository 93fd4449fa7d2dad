//! The types of the control API, which go over loopback HTTP as JSON.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use super::api_text::{GenerateEvent, GenerateRequest, TokenOdds};
use super::copies::Copies;
use super::healing::HealStatus;
use super::resolve::Standing;
use super::trust::Untrusted;
use doppler_mesh::{Away, Bootstrap, BootstrapState, Load, Path, Reach, Reachability, Source};
use doppler_store::signature::PublicKey;
use doppler_store::{ByteRange, Replicas, ShardId};

/// How a running node is found: written to `control.json` in its data directory, mode 0600.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ControlFile {
    /// Loopback `address:port` of the API.
    pub address: String,
    /// Sent as `Authorization: Bearer TOKEN`, so that neither another user nor a web page can use
    /// the API.
    pub token: String,
    pub pid: u32,
}

/// `GET /control/v1/status`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub peer_id: String,
    /// The public key with which this node signs models. Others trust it with `trust add`.
    #[serde(default)]
    pub publisher: String,
    pub swarm: String,
    pub version: String,
    /// The address of the node's page on this machine.
    #[serde(default)]
    pub page: Option<String>,
    pub addresses: Vec<String>,
    /// The addresses that a page can dial: WebSocket and WebRTC-direct, each with `/p2p/ID`.
    #[serde(default)]
    pub browser_addresses: Vec<String>,
    /// How others reach this node.
    #[serde(default)]
    pub reach: ReachStatus,
    /// The state of each bootstrap address.
    #[serde(default)]
    pub bootstrap: Vec<BootstrapStatus>,
    /// The known peers that are not connected and are looked for, the most useful first, at most
    /// 64.
    #[serde(default)]
    pub away: Vec<AwayPeer>,
    /// Identities that two nodes use, including this node's own: a description and what to do about
    /// it.
    #[serde(default)]
    pub twins: Vec<String>,
    /// Whether the swarm has a key, and how many connections failed without it.
    #[serde(default)]
    pub private: bool,
    /// The token that the gateway of a node in a private swarm requires, as
    /// `Authorization: Bearer TOKEN`.
    #[serde(default)]
    pub gateway_token: Option<String>,
    #[serde(default)]
    pub refused_peers: u64,
    /// The data directory, for people. Bytes that are not UTF-8 are replaced.
    pub data: String,
    pub backend: String,
    pub uptime_s: f64,
    pub peers: usize,
    pub models: usize,
    /// The loaded models; the one that answers, or did last, is the first.
    #[serde(default)]
    pub loaded: Vec<String>,
    /// How often a model was loaded since the node started.
    #[serde(default)]
    pub loads: u64,
    pub vram_budget: u64,
    pub ram: TierUse,
    pub disk: TierUse,
    pub store: StoreStatus,
    /// What this node keeps for the swarm, and what the swarm lacks.
    #[serde(default)]
    pub healing: HealStatus,
    pub traffic: Traffic,
    pub uploaded_bytes: u64,
    /// What peers have in progress, and the tasks of the whole node.
    #[serde(default)]
    pub load: Load,
    #[serde(default)]
    pub tasks: usize,
}

/// `GET /control/v1/page`: the page's address with its key.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PageLink {
    pub url: String,
}

/// `GET /node`: what a page of this machine needs to join the swarm.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeInfo {
    pub peer_id: String,
    pub swarm: String,
    pub version: String,
    /// The swarm's gossip topic.
    pub topic: String,
    /// The protocol version with which peers must identify themselves.
    pub protocol_version: String,
    /// Whether the swarm has a key, which a page must prove like any peer.
    pub private: bool,
    /// Where the node can be dialled.
    pub addresses: Vec<String>,
    pub peers: Vec<Peer>,
}

/// How others reach a node, as far as is known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReachStatus {
    pub state: ReachState,
    /// Addresses that a router forwards at this node's request (UPnP).
    pub mapped: Vec<String>,
    /// Peers at which this node has a reservation as its relays.
    pub relays: Vec<String>,
    /// Whether this node offers a relay to its peers.
    pub offers_relay: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReachState {
    /// No peer outside its own network has tried.
    #[default]
    Unknown,
    /// Peers dialled it, and it answered.
    Public,
    /// The same, through a port that a router forwards.
    Mapped,
    /// Peers dialled it without an answer.
    Private,
}

impl ReachStatus {
    pub(super) fn of(reach: Reach) -> Self {
        let state = match reach.reachability {
            Reachability::Unknown => ReachState::Unknown,
            Reachability::Public if reach.mapped.is_empty() => ReachState::Public,
            Reachability::Public => ReachState::Mapped,
            Reachability::Private => ReachState::Private,
        };
        Self {
            state,
            mapped: reach.mapped.iter().map(ToString::to_string).collect(),
            relays: reach.relays.iter().map(ToString::to_string).collect(),
            offers_relay: reach.offers_relay,
        }
    }
}

impl std::fmt::Display for ReachStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.state {
            ReachState::Unknown if self.mapped.is_empty() => {
                write!(f, "not known yet (no peer from outside this network has tried)")?;
            }
            ReachState::Unknown => {
                write!(f, "the router forwards {}; nobody tried yet", self.mapped.join(", "))?;
            }
            ReachState::Public => write!(f, "public: peers dial it")?,
            ReachState::Mapped => {
                write!(f, "public: the router forwards {}", self.mapped.join(", "))?;
            }
            ReachState::Private => write!(f, "behind a NAT or firewall: peers cannot dial it")?,
        }
        if !self.relays.is_empty() {
            write!(f, "; through relay {}", self.relays.join(", "))?;
        }
        if self.offers_relay {
            write!(f, "; offers a relay")?;
        }
        Ok(())
    }
}

/// A bootstrap address, and its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootstrapStatus {
    pub address: String,
    pub state: BootstrapStanding,
    /// Why it does not lead into the swarm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootstrapStanding {
    /// It is being dialled.
    Trying,
    /// Its peer is connected.
    Connected,
    /// Its peer is connected, but is not in a swarm of this name.
    OtherSwarm,
    /// The last dial failed. It is dialled again.
    Failed,
}

impl BootstrapStatus {
    pub(super) fn of(bootstrap: &Bootstrap) -> Self {
        let (state, reason) = match &bootstrap.state {
            BootstrapState::Trying => (BootstrapStanding::Trying, None),
            BootstrapState::Connected => (BootstrapStanding::Connected, None),
            BootstrapState::OtherSwarm => {
                let reason = "it answers, but is not in a swarm of this name";
                (BootstrapStanding::OtherSwarm, Some(reason.to_owned()))
            }
            BootstrapState::Failed { reason } => (BootstrapStanding::Failed, Some(reason.clone())),
        };
        Self { address: bootstrap.address.to_string(), state, reason }
    }

    /// What is wrong with it, in words. `None` if no problem is known.
    pub fn problem(&self) -> Option<String> {
        let reason = self.reason.as_ref()?;
        Some(match self.state {
            BootstrapStanding::Failed => format!("{}: {reason} (tried again)", self.address),
            _ => format!("{}: {reason}", self.address),
        })
    }
}

/// A known peer that is not connected, and the state of looking for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AwayPeer {
    pub id: String,
    pub known_by: KnownBy,
    /// The addresses that are dialled, best first.
    pub addresses: Vec<String>,
    /// Dials since it was last connected.
    pub dials: u32,
    /// Why the last of them failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Seconds until it is dialled again.
    pub next_s: f64,
}

/// How a peer became known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KnownBy {
    /// It announced itself, and other peers passed that on.
    Exchange,
    /// The local network (mDNS).
    Network,
    /// The last run (`peers.json`).
    File,
    /// It was connected.
    Meeting,
}

impl AwayPeer {
    pub(super) fn of(away: &Away) -> Self {
        Self {
            id: away.peer.to_string(),
            known_by: match away.source {
                Source::Heard => KnownBy::Exchange,
                Source::Found => KnownBy::Network,
                Source::Remembered => KnownBy::File,
                Source::Met => KnownBy::Meeting,
            },
            addresses: away.addresses.iter().map(ToString::to_string).collect(),
            dials: away.dials,
            reason: away.failure.clone(),
            next_s: away.next.as_secs_f64(),
        }
    }

    /// Describes the peer, its address, and why it is not connected.
    pub fn describe(&self) -> String {
        let place = self.addresses.first().map_or("an unknown address", String::as_str);
        let reason = match &self.reason {
            Some(reason) => reason.clone(),
            None => format!("no answer from {place} yet"),
        };
        let next = self.next_s.ceil();
        format!("{}: {reason} (dialled {}, again in {next} s)", self.id, times(self.dials))
    }
}

fn times(count: u32) -> String {
    if count == 1 { "once".to_owned() } else { format!("{count} times") }
}

/// How a peer is connected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "way", rename_all = "snake_case")]
pub enum Via {
    #[default]
    Direct,
    /// No shards come from it.
    Relay {
        /// The relay's peer id, if it is known.
        relay: Option<String>,
    },
}

impl Via {
    pub(super) fn of(path: Path) -> Self {
        match path {
            Path::Direct => Self::Direct,
            Path::Relayed { by } => Self::Relay { relay: by.map(|peer| peer.to_string()) },
        }
    }
}

/// The store's health since the node started.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct StoreStatus {
    pub whole_objects: u64,
    pub part_objects: u64,
    pub pinned_bytes: u64,
    pub evictions: u64,
    /// Objects in which damage was found, and their damaged bytes.
    pub quarantines: u64,
    pub damaged_bytes: u64,
    /// Reads that met damage and continued with a peer's bytes.
    pub repaired_reads: u64,
    /// Bytes fetched after such reads to replace other damage.
    pub repaired_bytes: u64,
    /// Whether space is reserved for cleaning up a full disk.
    pub reserve_held: bool,
}

/// How much a tier holds, and its budget.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct TierUse {
    pub used: u64,
    pub budget: u64,
}

/// Expert demands, by the tier that served them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hits {
    pub vram: u64,
    pub ram: u64,
    pub disk: u64,
    pub peer: u64,
}

impl Hits {
    pub const fn add(&mut self, more: Self) {
        self.vram += more.vram;
        self.ram += more.ram;
        self.disk += more.disk;
        self.peer += more.peer;
    }

    /// The difference from `earlier`, a previous reading.
    pub const fn since(&self, earlier: &Self) -> Self {
        Self {
            vram: self.vram.saturating_sub(earlier.vram),
            ram: self.ram.saturating_sub(earlier.ram),
            disk: self.disk.saturating_sub(earlier.disk),
            peer: self.peer.saturating_sub(earlier.peer),
        }
    }
}

/// What some work took from each tier and peer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    pub hits: Hits,
    /// Verified bytes received, by peer id.
    pub peer_bytes: BTreeMap<String, u64>,
    pub verified_bytes: u64,
    pub rejected_bytes: u64,
}

impl Traffic {
    /// The difference from `earlier`, a previous reading of the same counters.
    pub fn since(&self, earlier: &Self) -> Self {
        let peer_bytes = self
            .peer_bytes
            .iter()
            .map(|(peer, bytes)| {
                let before = earlier.peer_bytes.get(peer).copied().unwrap_or(0);
                (peer.clone(), bytes.saturating_sub(before))
            })
            .filter(|(_, bytes)| *bytes > 0)
            .collect();
        Self {
            hits: self.hits.since(&earlier.hits),
            peer_bytes,
            verified_bytes: self.verified_bytes.saturating_sub(earlier.verified_bytes),
            rejected_bytes: self.rejected_bytes.saturating_sub(earlier.rejected_bytes),
        }
    }
}

/// Who signed a model, and under which name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signer {
    pub name: String,
    /// The public key, hexadecimal.
    pub publisher: String,
    pub trust: Standing,
}

/// An entry of `GET /control/v1/models`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelInfo {
    pub id: String,
    /// The name that the first of its signers gives it.
    pub name: String,
    /// Public keys of its signers, in hexadecimal; trusted ones first.
    pub publishers: Vec<String>,
    /// How far this node trusts the first of them.
    #[serde(default)]
    pub trust: Standing,
    pub bytes: u64,
    /// How many copies of each object there should be.
    #[serde(default)]
    pub replicas: Replicas,
    pub shards: usize,
    /// Shards held here in full.
    pub shards_here: usize,
    /// Shards that this node or at least one connected peer holds in full.
    pub shards_reachable: usize,
    /// Whether it is pinned here.
    #[serde(default)]
    pub pinned: bool,
    /// The copies of its shards and other files. Absent while its manifest is not here.
    #[serde(default)]
    pub copies: Option<Copies>,
    /// Of an adapter: the id of the model that it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// False until the manifest itself has arrived. A stranger's large manifest is fetched when the
    /// model is used.
    pub manifest: bool,
    /// All its signers, in the order of `publishers`.
    #[serde(default)]
    pub signers: Vec<Signer>,
}

/// An entry of `GET /control/v1/peers`: a connected peer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Peer {
    pub id: String,
    pub addresses: Vec<String>,
    /// Its `NAME/VERSION`. Empty until it has identified itself.
    pub agent: String,
    #[serde(default)]
    pub via: Via,
    /// Whether it takes part in the swarm of this node's name.
    #[serde(default = "yes")]
    pub in_swarm: bool,
    pub connected_s: f64,
    /// Verified bytes received from it.
    pub bytes_in: u64,
    /// Bytes of objects sent to it.
    pub bytes_out: u64,
    /// 0 (worst) to 1.
    pub score: f64,
    /// Objects that it says it holds.
    pub shards_held: u64,
}

/// `GET /control/v1/ps`: what the engine does.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Ps {
    pub loaded: Vec<LoadedInfo>,
    /// Generations that run now.
    #[serde(default)]
    pub running: usize,
    /// Generations that wait until one of them ends.
    pub waiting: usize,
}

/// A loaded model.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoadedInfo {
    pub name: String,
    pub id: String,
    pub backend: String,
    /// Bytes of the device's memory that it holds.
    #[serde(default)]
    pub bytes: u64,
    /// Seconds since its last request ended; absent while one runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_s: Option<f64>,
    /// Seconds until it is unloaded if nobody asks for it; absent while one runs, and if it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unload_s: Option<f64>,
}

/// `POST /control/v1/publish`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PublishRequest {
    #[serde(with = "path_bytes")]
    pub dir: PathBuf,
    /// Numbers of the shards to store. All if absent.
    pub shards: Option<Vec<usize>>,
    /// How many copies of each object the swarm should keep.
    #[serde(default)]
    pub replicas: Replicas,
    /// Whether to answer with [`WorkEvent`](super::work::WorkEvent)s, one JSON object per line.
    #[serde(default)]
    pub progress: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PublishReply {
    pub model: String,
    pub name: String,
    /// The public key with which it was signed.
    #[serde(default)]
    pub publisher: String,
    pub shards_stored: usize,
    pub bytes_stored: u64,
    /// How many of those had to be copied. The rest shares its blocks with the directory.
    pub bytes_copied: u64,
}

/// `POST /control/v1/models/resolve`: which model a text means, and whether it may be used; answered by
/// a [`ModelInfo`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ResolveRequest {
    pub model: String,
    /// As in [`GenerateRequest`].
    #[serde(default)]
    pub trust: Vec<PublicKey>,
    #[serde(default)]
    pub can_ask: bool,
}

/// A path as JSON: text, or its bytes if they are not UTF-8.
mod path_bytes {
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Either {
        Text(String),
        Bytes(Vec<u8>),
    }

    pub fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        let either = match path.to_str() {
            Some(text) => Either::Text(text.to_owned()),
            None => Either::Bytes(path.as_os_str().as_encoded_bytes().to_vec()),
        };
        either.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        Ok(match Either::deserialize(from)? {
            Either::Text(text) => text.into(),
            #[cfg(unix)]
            Either::Bytes(bytes) => PathBuf::from(
                <std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(bytes),
            ),
            #[cfg(not(unix))]
            Either::Bytes(bytes) => String::from_utf8_lossy(&bytes).into_owned().into(),
        })
    }
}

/// `POST /control/v1/store/pin`, `unpin` and `rm`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TargetRequest {
    /// A model's name, id or unambiguous start of it, or an object's.
    pub target: String,
    /// For pin: fetch what is missing first.
    #[serde(default)]
    pub fetch: bool,
    /// For remove: also remove what is pinned.
    #[serde(default)]
    pub force: bool,
    /// For remove: also remove what no other peer is known to hold.
    #[serde(default)]
    pub last_copy: bool,
    /// Pin: answered by [`WorkEvent`](super::work::WorkEvent)s, one JSON object a line.
    #[serde(default)]
    pub progress: bool,
    /// Pin with `fetch`: as in [`GenerateRequest`].
    #[serde(default)]
    pub trust: Vec<PublicKey>,
    #[serde(default)]
    pub can_ask: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TargetReply {
    /// The model's name and id, or the object's id.
    pub target: String,
    /// Objects that were pinned, unpinned or removed, and the bytes of them that are held.
    pub objects: usize,
    pub bytes: u64,
    /// Objects of the model that are not complete here.
    pub missing: usize,
    /// Objects left alone because another model here has them, too. For an `unpin`: those that
    /// another model or a pin of their own still holds.
    pub shared: usize,
    /// The removed objects that no other peer was known to hold.
    #[serde(default)]
    pub last_copies: usize,
}

/// `POST /control/v1/store/gc`; answered by [`doppler_store::Collected`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct GcRequest {
    /// Bytes that may stay stored. The node's own budget if absent.
    pub budget: Option<u64>,
    #[serde(default)]
    pub dry_run: bool,
    /// Also evict what no other peer is known to hold, or too few.
    #[serde(default)]
    pub last_copy: bool,
}

/// `POST /control/v1/store/fsck`; answered by [`FsckEvent`]s, one JSON object a line.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct FsckRequest {
    #[serde(default)]
    pub repair: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum FsckEvent {
    Start {
        objects: u64,
        bytes: u64,
    },
    /// Sound.
    Checked {
        shard: ShardId,
        bytes: u64,
    },
    Damage(Damage),
    End(FsckSummary),
    Error {
        message: String,
    },
}

/// A damaged object.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Damage {
    pub shard: ShardId,
    pub size: u64,
    /// Bytes that were checked, and the damaged ranges, which are no longer held.
    pub checked_bytes: u64,
    pub ranges: Vec<ByteRange>,
    /// Whether only the hash tree beside it was wrong, and has been rebuilt.
    pub outboard_only: bool,
    /// Whether all of it is here again, and verified.
    pub repaired: bool,
    /// Why it could not be repaired.
    pub detail: Option<String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct FsckSummary {
    pub objects: u64,
    pub checked_bytes: u64,
    pub damaged_objects: u64,
    pub damaged_bytes: u64,
    pub outboards_rewritten: u64,
    pub repaired_objects: u64,
    /// Pinned objects that are still incomplete.
    pub incomplete_pinned: u64,
    pub seconds: f64,
}

const fn yes() -> bool {
    true
}

/// The body of every answer that is not 200.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ApiError {
    pub error: String,
    /// The failure's stable name (docs/errors.md).
    #[serde(default)]
    pub label: String,
    /// The request can succeed once one of these publishers is trusted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub untrusted: Option<Untrusted>,
}

impl ApiError {
    /// The answer for a failure.
    pub fn of(error: &anyhow::Error) -> Self {
        let label = super::failures::of(error).label.to_owned();
        let untrusted = error.downcast_ref::<Untrusted>().cloned();
        Self { error: super::one_line(error), label, untrusted }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_path_arrives_whatever_its_bytes() {
        use std::os::unix::ffi::OsStrExt;
        for bytes in [&b"/models/tiny"[..], b"/models/\xff\xfe"] {
            let dir = PathBuf::from(std::ffi::OsStr::from_bytes(bytes));
            let json = serde_json::to_string(&PublishRequest {
                dir: dir.clone(),
                shards: None,
                replicas: Replicas::DEFAULT,
                progress: false,
            });
            let back: PublishRequest = serde_json::from_str(&json.unwrap()).unwrap();
            assert_eq!(back.dir, dir);
        }
    }

    #[test]
    fn traffic_since_counts_only_what_is_new() {
        let earlier = Traffic {
            peer_bytes: [("a".into(), 5), ("b".into(), 7)].into(),
            verified_bytes: 12,
            ..Traffic::default()
        };
        let now = Traffic {
            peer_bytes: [("a".into(), 5), ("b".into(), 10), ("c".into(), 1)].into(),
            verified_bytes: 16,
            ..Traffic::default()
        };
        let since = now.since(&earlier);
        assert_eq!(since.peer_bytes, [("b".into(), 3), ("c".into(), 1)].into());
        assert_eq!(since.verified_bytes, 4);
    }
}
