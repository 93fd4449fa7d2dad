//! The prost types of `proto/` and their conversions, nothing else.
//!
//! Refuses anything out of bounds. The result of `decode` has valid lengths and counts; whether it
//! is true is for others to check. No input causes a panic or allocates more than a small multiple
//! of its own length.

use std::time::Duration;

use prost::Message;

use doppler_store::groups::Chunks;
use doppler_store::signature::{NAME_BYTES_MAX, PublicKey, Signature, SignedModel};
use doppler_store::verified::{DECODE_BYTES_MAX, NODE_BYTES, OBJECT_BYTES_MAX, SERVE_BYTES_MAX};
use doppler_store::{BadReplicas, ByteRange, ModelId, Priority, Replicas, ShardId};

mod gossip {
    include!(concat!(env!("OUT_DIR"), "/doppler.gossip.v1.rs"));
}
mod shard {
    include!(concat!(env!("OUT_DIR"), "/doppler.shard.v1.rs"));
}

/// The largest gossip message (gossipsub's limit minus its own framing and signature).
pub const ENVELOPE_BYTES_MAX: usize = 60 * 1024;
/// Models in one holdings message.
pub const HOLDINGS_MODELS_MAX: usize = 64;
/// Bytes of one model's bitmap: 65,536 objects of at most 64 MiB, 4 TiB.
pub const BITMAP_BYTES_MAX: usize = 8 * 1024;
/// Objects held in part in one holdings message.
pub const PARTS_MAX: usize = 512;
/// Objects of one model that a message names as often read.
pub const HOT_MAX: usize = 16;
/// Addresses in one holdings message: four transports on a few interfaces.
pub const ADDRESSES_MAX: usize = 16;
/// Bytes of one address as text.
pub const ADDRESS_BYTES_MAX: usize = 256;
/// Bytes of a peer id.
pub const PEER_BYTES_MAX: usize = 66;
/// The longest lease that a peer may ask for, and the longest pause that it may promise to end. A
/// member of a large swarm speaks rarely.
pub const LEASE_MAX: Duration = Duration::from_secs(7200);
/// Bytes of one message of the shard protocol, without its length.
pub const FRAME_BYTES_MAX: usize = 256;
/// The most hash-tree nodes that a request's range can need: one between every two of its groups
/// (at most 258), and two paths of at most 12 to the root of 4,096 groups.
const NODES_MAX: u64 = 258 + 2 * 12;
/// Bytes of one reply's body.
pub const BODY_BYTES_MAX: u64 = DECODE_BYTES_MAX + NODES_MAX * NODE_BYTES as u64;

/// Why bytes are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("not a protobuf message: {0}")]
    Malformed(String),
    #[error("{field}: {got} bytes instead of {expected}")]
    Length { field: &'static str, got: usize, expected: usize },
    #[error("{field}: {got} is more than {max}")]
    TooMany { field: &'static str, got: usize, max: usize },
    #[error("{field}: {problem}")]
    Invalid { field: &'static str, problem: String },
}

/// One gossip message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Envelope {
    /// Fields within bounds; the signature is not checked yet.
    Announcement(SignedModel),
    Holdings(Holdings),
    /// The author has lost the peer with this id, in bytes, or misses its word. If the peer is
    /// alive, it should say so.
    Doubt(Vec<u8>),
    /// The author is there, and speaks again within `next`.
    Heartbeat {
        stamp: Stamp,
        next: Duration,
    },
    /// The author stops, and says nothing more in this epoch.
    Goodbye(Stamp),
    /// A kind that this version does not know.
    Unknown,
}

/// Orders the messages of one author over all its runs. A restarted node begins a larger epoch, so
/// that its first message is newer than everything that it said before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp {
    pub epoch: u64,
    pub sequence: u64,
}

/// What the author of a message holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holdings {
    /// The author's peer id, as bytes.
    pub peer: Vec<u8>,
    pub stamp: Stamp,
    /// At most [`LEASE_MAX`].
    pub lease: Duration,
    /// The author speaks again within this time, at most [`LEASE_MAX`]; zero if it does not say.
    pub next: Duration,
    /// Bytes that the author would copy of objects that others lose.
    pub room: u64,
    /// Whether the author is about to leave the swarm, so that its objects need other holders.
    pub is_leaving: bool,
    /// Where the author listens, as text.
    pub addresses: Vec<String>,
    pub models: Vec<ModelHoldings>,
    /// A random number drawn when the author started; 0 if it gives none.
    pub run: u64,
}

/// What is held of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelHoldings {
    pub model: ModelId,
    /// The manifest itself is held.
    pub manifest: bool,
    /// Bit i (byte i / 8, bit i % 8 from the lowest): object i is held.
    pub objects: Vec<u8>,
    /// Partially held objects, by their index in the list.
    pub parts: Vec<PartHoldings>,
    /// Whether the author copies objects of this model that too few hold.
    pub helps: bool,
    /// Objects that the author keeps reading from peers, by index; at most [`HOT_MAX`].
    pub hot: Vec<u32>,
    /// Whether everything that the author says it holds of this model is pinned there.
    pub pins: bool,
}

impl ModelHoldings {
    /// Says that nothing of a model is held: its author is interested in it.
    pub const fn nothing(model: ModelId) -> Self {
        Self {
            model,
            manifest: false,
            objects: Vec::new(),
            parts: Vec::new(),
            helps: false,
            hot: Vec::new(),
            pins: false,
        }
    }
}

/// A partially held object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartHoldings {
    /// Its index in the model's list, below `8 * BITMAP_BYTES_MAX`.
    pub object: u32,
    pub chunks: Chunks,
}

impl Envelope {
    pub fn encode(&self) -> Vec<u8> {
        let body = match self {
            Self::Announcement(signed) => {
                // Bounded far below u32::MAX when it was signed; the default is not said.
                let copies = |number: usize| match signed.replicas.is_default() {
                    true => 0,
                    false => u32::try_from(number).unwrap_or(u32::MAX),
                };
                Some(gossip::envelope::Body::Announcement(gossip::Announcement {
                    model: signed.model.as_bytes().to_vec(),
                    name: signed.name.clone(),
                    manifest_size: signed.manifest_size,
                    publisher: signed.publisher.0.to_vec(),
                    signature: signed.signature.0.to_vec(),
                    replicas_min: copies(signed.replicas.min),
                    replicas_max: copies(signed.replicas.max),
                    signed_ms: signed.signed_ms,
                }))
            }
            Self::Holdings(holdings) => Some(gossip::envelope::Body::Holdings(gossip::Holdings {
                peer: holdings.peer.clone(),
                epoch: holdings.stamp.epoch,
                sequence: holdings.stamp.sequence,
                lease_ms: millis(holdings.lease),
                next_ms: millis(holdings.next),
                addresses: holdings.addresses.clone(),
                room: holdings.room,
                is_leaving: holdings.is_leaving,
                run: holdings.run,
                models: holdings
                    .models
                    .iter()
                    .map(|entry| gossip::ModelHoldings {
                        model: entry.model.as_bytes().to_vec(),
                        manifest: entry.manifest,
                        objects: entry.objects.clone(),
                        parts: entry
                            .parts
                            .iter()
                            .map(|part| gossip::PartHoldings {
                                object: part.object,
                                chunks: part.chunks.0,
                            })
                            .collect(),
                        helps: entry.helps,
                        hot: entry.hot.clone(),
                        pins: entry.pins,
                    })
                    .collect(),
            })),
            Self::Doubt(peer) => {
                Some(gossip::envelope::Body::Doubt(gossip::Doubt { peer: peer.clone() }))
            }
            Self::Heartbeat { stamp: Stamp { epoch, sequence }, next } => {
                let (epoch, sequence, next_ms) = (*epoch, *sequence, millis(*next));
                let body = gossip::Heartbeat { epoch, sequence, next_ms };
                Some(gossip::envelope::Body::Heartbeat(body))
            }
            Self::Goodbye(Stamp { epoch, sequence }) => {
                let (epoch, sequence) = (*epoch, *sequence);
                Some(gossip::envelope::Body::Goodbye(gossip::Goodbye { epoch, sequence }))
            }
            Self::Unknown => None,
        };
        gossip::Envelope { body }.encode_to_vec()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        at_most("envelope", bytes.len(), ENVELOPE_BYTES_MAX)?;
        match gossip::Envelope::decode(bytes).map_err(malformed)?.body {
            None => Ok(Self::Unknown),
            Some(gossip::envelope::Body::Announcement(body)) => {
                at_most("name", body.name.len(), NAME_BYTES_MAX)?;
                Ok(Self::Announcement(SignedModel {
                    model: ModelId::from(fixed("model", &body.model)?),
                    name: body.name,
                    manifest_size: body.manifest_size,
                    replicas: replicas(body.replicas_min, body.replicas_max)?,
                    signed_ms: body.signed_ms,
                    publisher: PublicKey(fixed("publisher", &body.publisher)?),
                    signature: Signature(fixed("signature", &body.signature)?),
                }))
            }
            Some(gossip::envelope::Body::Holdings(body)) => holdings(body).map(Self::Holdings),
            Some(gossip::envelope::Body::Doubt(body)) => {
                at_most("peer", body.peer.len(), PEER_BYTES_MAX)?;
                Ok(Self::Doubt(body.peer))
            }
            Some(gossip::envelope::Body::Heartbeat(body)) => Ok(Self::Heartbeat {
                stamp: Stamp { epoch: body.epoch, sequence: body.sequence },
                next: time("next_ms", body.next_ms)?,
            }),
            Some(gossip::envelope::Body::Goodbye(body)) => {
                Ok(Self::Goodbye(Stamp { epoch: body.epoch, sequence: body.sequence }))
            }
        }
    }
}

/// The number of copies in an announcement; the default if it has none.
fn replicas(min: u32, max: u32) -> Result<Replicas, WireError> {
    if (min, max) == (0, 0) {
        return Ok(Replicas::DEFAULT);
    }
    let replicas = Replicas { min: min as usize, max: max as usize };
    let problem = || BadReplicas(replicas.to_string()).to_string();
    let invalid = || WireError::Invalid { field: "replicas", problem: problem() };
    replicas.is_valid().then_some(replicas).ok_or_else(invalid)
}

fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

/// A time that a message names, at most [`LEASE_MAX`].
fn time(field: &'static str, ms: u32) -> Result<Duration, WireError> {
    let time = Duration::from_millis(u64::from(ms));
    if time > LEASE_MAX {
        let problem = format!("{} s is more than {} s", time.as_secs(), LEASE_MAX.as_secs());
        return Err(WireError::Invalid { field, problem });
    }
    Ok(time)
}

fn holdings(mut body: gossip::Holdings) -> Result<Holdings, WireError> {
    at_most("peer", body.peer.len(), PEER_BYTES_MAX)?;
    at_most("addresses", body.addresses.len(), ADDRESSES_MAX)?;
    at_most("models", body.models.len(), HOLDINGS_MODELS_MAX)?;
    for address in &body.addresses {
        at_most("address", address.len(), ADDRESS_BYTES_MAX)?;
    }
    let (lease, next) = (time("lease_ms", body.lease_ms)?, time("next_ms", body.next_ms)?);
    let parts = body.models.iter().map(|entry| entry.parts.len()).sum();
    at_most("parts", parts, PARTS_MAX)?;
    let mut models = Vec::with_capacity(body.models.len());
    for entry in std::mem::take(&mut body.models) {
        at_most("objects", entry.objects.len(), BITMAP_BYTES_MAX)?;
        at_most("hot", entry.hot.len(), HOT_MAX)?;
        for object in &entry.hot {
            at_most("object", *object as usize, 8 * BITMAP_BYTES_MAX - 1)?;
        }
        let parts = entry.parts.into_iter().map(|part| {
            at_most("object", part.object as usize, 8 * BITMAP_BYTES_MAX - 1)?;
            Ok(PartHoldings { object: part.object, chunks: Chunks(part.chunks) })
        });
        models.push(ModelHoldings {
            model: ModelId::from(fixed("model", &entry.model)?),
            manifest: entry.manifest,
            objects: entry.objects,
            parts: parts.collect::<Result<_, WireError>>()?,
            helps: entry.helps,
            hot: entry.hot,
            pins: entry.pins,
        });
    }
    let stamp = Stamp { epoch: body.epoch, sequence: body.sequence };
    let gossip::Holdings { peer, addresses, room, is_leaving, run, .. } = body;
    Ok(Holdings { peer, stamp, lease, next, room, is_leaving, addresses, models, run })
}

/// Asks for one range of one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardRequest {
    pub shard: ShardId,
    /// At most [`SERVE_BYTES_MAX`] bytes, ending within [`OBJECT_BYTES_MAX`].
    pub range: ByteRange,
    pub priority: Priority,
}

impl ShardRequest {
    pub fn encode(&self) -> Vec<u8> {
        let priority = match self.priority {
            Priority::Token => shard::Priority::Token,
            Priority::Prefetch => shard::Priority::Prefetch,
            Priority::Bulk => shard::Priority::Bulk,
        };
        frame(&shard::ShardRequest {
            root: self.shard.as_bytes().to_vec(),
            start: self.range.start(),
            end: self.range.end(),
            priority: priority.into(),
        })
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let body = shard::ShardRequest::decode(bytes).map_err(malformed)?;
        let invalid = |problem: String| WireError::Invalid { field: "range", problem };
        let range = ByteRange::new(body.start, body.end)
            .ok_or_else(|| invalid(format!("{}..{} is empty", body.start, body.end)))?;
        if range.len() > SERVE_BYTES_MAX || range.end() > OBJECT_BYTES_MAX {
            return Err(invalid(format!("{range} is too long or too far")));
        }
        let priority = match body.priority() {
            shard::Priority::Token => Priority::Token,
            shard::Priority::Prefetch => Priority::Prefetch,
            shard::Priority::Bulk => Priority::Bulk,
        };
        Ok(Self { shard: ShardId::from(fixed("root", &body.root)?), range, priority })
    }
}

/// Precedes the bytes of an answer, or says why there are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShardReply {
    /// `body_bytes` of bao encoding follow, at most [`BODY_BYTES_MAX`].
    Ok {
        object_size: u64,
        body_bytes: u64,
    },
    NotFound,
    OutOfRange {
        object_size: u64,
    },
    Overloaded,
    Refused,
    Failed,
    /// Not over a relay.
    Relayed,
}

impl ShardReply {
    pub fn encode(&self) -> Vec<u8> {
        let (status, object_size, body_bytes) = match *self {
            Self::Ok { object_size, body_bytes } => (shard::Status::Ok, object_size, body_bytes),
            Self::NotFound => (shard::Status::NotFound, 0, 0),
            Self::OutOfRange { object_size } => (shard::Status::OutOfRange, object_size, 0),
            Self::Overloaded => (shard::Status::Overloaded, 0, 0),
            Self::Refused => (shard::Status::Refused, 0, 0),
            Self::Failed => (shard::Status::Failed, 0, 0),
            Self::Relayed => (shard::Status::Relayed, 0, 0),
        };
        frame(&shard::ShardReply { status: status.into(), object_size, body_bytes })
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let body = shard::ShardReply::decode(bytes).map_err(malformed)?;
        let object_size = body.object_size;
        if object_size > OBJECT_BYTES_MAX {
            let problem = format!("{object_size} is more than {OBJECT_BYTES_MAX}");
            return Err(WireError::Invalid { field: "object_size", problem });
        }
        let ok = body.status() == shard::Status::Ok;
        if body.body_bytes > BODY_BYTES_MAX || (body.body_bytes == 0) == ok {
            let problem = format!("{} with status {}", body.body_bytes, body.status);
            return Err(WireError::Invalid { field: "body_bytes", problem });
        }
        match body.status() {
            shard::Status::Ok => Ok(Self::Ok { object_size, body_bytes: body.body_bytes }),
            shard::Status::NotFound => Ok(Self::NotFound),
            shard::Status::OutOfRange => Ok(Self::OutOfRange { object_size }),
            shard::Status::Overloaded => Ok(Self::Overloaded),
            shard::Status::Refused => Ok(Self::Refused),
            shard::Status::Failed => Ok(Self::Failed),
            shard::Status::Relayed => Ok(Self::Relayed),
            shard::Status::Unknown => Err(WireError::Invalid {
                field: "status",
                problem: format!("{} is unknown", body.status),
            }),
        }
    }
}

/// A message of the shard protocol with its length in front.
fn frame(message: &impl Message) -> Vec<u8> {
    let body = message.encode_to_vec();
    // Our own messages are a few fixed fields: far below FRAME_BYTES_MAX.
    debug_assert!(body.len() <= FRAME_BYTES_MAX);
    let mut framed = Vec::with_capacity(2 + body.len());
    framed.extend_from_slice(&(body.len() as u16).to_be_bytes());
    framed.extend_from_slice(&body);
    framed
}

fn malformed(error: prost::DecodeError) -> WireError {
    WireError::Malformed(error.to_string())
}

fn at_most(field: &'static str, got: usize, max: usize) -> Result<(), WireError> {
    if got > max { Err(WireError::TooMany { field, got, max }) } else { Ok(()) }
}

fn fixed<const N: usize>(field: &'static str, bytes: &[u8]) -> Result<[u8; N], WireError> {
    bytes.try_into().map_err(|_| WireError::Length { field, got: bytes.len(), expected: N })
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, RngExt, SeedableRng};

    use super::*;

    fn sample_holdings() -> Holdings {
        Holdings {
            peer: vec![1; 38],
            stamp: Stamp { epoch: 4, sequence: 9 },
            lease: Duration::from_secs(30),
            next: Duration::from_secs(3),
            room: 1 << 40,
            is_leaving: true,
            addresses: vec!["/ip4/127.0.0.1/tcp/1".into()],
            models: vec![ModelHoldings {
                model: ModelId::of(b"m"),
                manifest: true,
                objects: vec![0b101],
                parts: vec![PartHoldings { object: 1, chunks: Chunks(0b11) }],
                helps: true,
                hot: vec![2, 700],
                pins: true,
            }],
            run: 3,
        }
    }

    fn samples() -> Vec<Vec<u8>> {
        let signed = SignedModel::sign(&[1; 32], ModelId::of(b"m"), "tiny", 77).unwrap();
        let request = ShardRequest {
            shard: ShardId::of(b"s"),
            range: ByteRange::new(5, 99).unwrap(),
            priority: Priority::Token,
        };
        let reply = ShardReply::Ok { object_size: 100, body_bytes: 164 };
        vec![
            Envelope::Announcement(signed).encode(),
            Envelope::Holdings(sample_holdings()).encode(),
            request.encode()[2..].to_vec(),
            reply.encode()[2..].to_vec(),
        ]
    }

    #[test]
    fn messages_round_trip() {
        let signed = SignedModel::sign(&[1; 32], ModelId::of(b"m"), "tiny", 77).unwrap();
        let holdings = Envelope::Holdings(sample_holdings());
        let model = signed.model;
        let many = Replicas { min: 4, max: 64 };
        let copies = SignedModel::sign_at(&[1; 32], model, "tiny", 77, many, u64::MAX).unwrap();
        let stamp = Stamp { epoch: 1, sequence: 2 };
        let beat = Envelope::Heartbeat { stamp, next: Duration::from_secs(9) };
        for envelope in [
            Envelope::Announcement(signed),
            Envelope::Announcement(copies),
            holdings,
            Envelope::Doubt(vec![7; 38]),
            beat,
            Envelope::Goodbye(stamp),
        ] {
            assert_eq!(Envelope::decode(&envelope.encode()), Ok(envelope));
        }
        assert_eq!(Envelope::decode(b""), Ok(Envelope::Unknown));
        for priority in [Priority::Token, Priority::Prefetch, Priority::Bulk] {
            let range = ByteRange::new(1, SERVE_BYTES_MAX + 1).unwrap();
            let request = ShardRequest { shard: ShardId::of(b"s"), range, priority };
            let framed = request.encode();
            assert_eq!(usize::from(u16::from_be_bytes([framed[0], framed[1]])), framed.len() - 2);
            assert_eq!(ShardRequest::decode(&framed[2..]), Ok(request));
        }
        for reply in [
            ShardReply::Ok { object_size: OBJECT_BYTES_MAX, body_bytes: BODY_BYTES_MAX },
            ShardReply::NotFound,
            ShardReply::OutOfRange { object_size: 3 },
            ShardReply::Overloaded,
            ShardReply::Refused,
            ShardReply::Failed,
            ShardReply::Relayed,
        ] {
            assert_eq!(ShardReply::decode(&reply.encode()[2..]), Ok(reply));
        }
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        let many = |change: fn(&mut Holdings)| {
            let mut holdings = sample_holdings();
            change(&mut holdings);
            Envelope::decode(&Envelope::Holdings(holdings).encode())
        };
        assert!(many(|h| h.models = vec![h.models[0].clone(); HOLDINGS_MODELS_MAX + 1]).is_err());
        assert!(many(|h| h.models[0].objects = vec![0; BITMAP_BYTES_MAX + 1]).is_err());
        assert!(many(|h| h.models[0].parts = vec![h.models[0].parts[0]; PARTS_MAX + 1]).is_err());
        assert!(many(|h| h.models[0].parts[0].object = 8 * BITMAP_BYTES_MAX as u32).is_err());
        assert!(many(|h| h.models[0].hot = vec![0; HOT_MAX + 1]).is_err());
        assert!(many(|h| h.models[0].hot = vec![8 * BITMAP_BYTES_MAX as u32]).is_err());
        assert!(many(|h| h.addresses = vec!["a".repeat(ADDRESS_BYTES_MAX + 1)]).is_err());
        assert!(many(|h| h.addresses = vec![String::new(); ADDRESSES_MAX + 1]).is_err());
        assert!(many(|h| h.lease = LEASE_MAX + Duration::from_millis(1)).is_err());
        assert!(many(|h| h.next = LEASE_MAX + Duration::from_millis(1)).is_err());
        let (stamp, next) = (Stamp::default(), LEASE_MAX + Duration::from_millis(1));
        assert!(Envelope::decode(&Envelope::Heartbeat { stamp, next }.encode()).is_err());
        assert!(many(|h| h.peer = vec![0; PEER_BYTES_MAX + 1]).is_err());
        let doubt = Envelope::Doubt(vec![0; PEER_BYTES_MAX + 1]);
        assert!(Envelope::decode(&doubt.encode()).is_err());
        let signed = SignedModel::sign(&[1; 32], ModelId::of(b"m"), "tiny", 77).unwrap();
        for (min, max) in [(0, 4), (3, 2), (1, 65), (usize::MAX, usize::MAX)] {
            let replicas = Replicas { min, max };
            let envelope = Envelope::Announcement(SignedModel { replicas, ..signed.clone() });
            assert!(Envelope::decode(&envelope.encode()).is_err(), "{replicas}");
        }
        assert!(Envelope::decode(&vec![0; ENVELOPE_BYTES_MAX + 1]).is_err());

        let too_long = ByteRange::new(0, SERVE_BYTES_MAX + 1).unwrap();
        let too_far = ByteRange::new(OBJECT_BYTES_MAX, OBJECT_BYTES_MAX + 1).unwrap();
        for range in [too_long, too_far] {
            let request =
                ShardRequest { shard: ShardId::of(b"s"), range, priority: Priority::Bulk };
            assert!(ShardRequest::decode(&request.encode()[2..]).is_err());
        }
        for reply in [
            ShardReply::Ok { object_size: 1, body_bytes: BODY_BYTES_MAX + 1 },
            ShardReply::Ok { object_size: 1, body_bytes: 0 },
            ShardReply::OutOfRange { object_size: OBJECT_BYTES_MAX + 1 },
        ] {
            assert!(ShardReply::decode(&reply.encode()[2..]).is_err());
        }
        assert!(ShardReply::decode(b"").is_err(), "no status");
    }

    #[test]
    fn damaged_messages_never_panic() {
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut rng = SmallRng::seed_from_u64(seed);
        let samples = samples();
        for _ in 0..20_000 {
            let mut bytes = samples[rng.random_range(0..samples.len())].clone();
            for _ in 0..rng.random_range(0..4) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = rng.next_u32() as u8;
            }
            bytes.truncate(rng.random_range(0..=bytes.len()));
            // Any result will do; it must not panic.
            let _ = Envelope::decode(&bytes);
            let _ = ShardRequest::decode(&bytes);
            let _ = ShardReply::decode(&bytes);
        }
    }
}
