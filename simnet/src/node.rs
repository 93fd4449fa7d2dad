//! One node: the real core, a fake disk and a fake line, and what it does of its own accord.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use doppler_ids::{Address, ByteRange, PeerId, ShardId};
use doppler_mesh::Pull;
use doppler_mesh::core::{Core, Healing, ReadId, RequestId, Sight};

use crate::disk::Disk;
use crate::faults::Lie;
use crate::queue::Key;
use crate::rng::Rng;
use crate::transfer::Upload;

/// A request that a node sent and that has not ended.
#[derive(Debug, Clone, Copy)]
pub struct Reply {
    pub from: usize,
    pub range: ByteRange,
    /// The byte of the object up to which it is proved; 0 before its first group.
    pub proved: u64,
    /// A wrong byte was taken for a right one.
    pub is_wrong: bool,
    /// What its peer says the object's size is, and what it is.
    pub said: u64,
    pub size: u64,
    /// When a byte of it last came, and when the core was last told.
    pub last: u64,
    pub heard: u64,
}

/// How far a node's requests have come.
#[derive(Default)]
pub struct Replies(pub BTreeMap<Key, Reply>);

impl Sight for Replies {
    fn proved(&self, read: ReadId, request: RequestId) -> u64 {
        self.0.get(&(read, request)).map_or(0, |reply| reply.proved)
    }

    fn is_throttled(&self, _: Instant) -> bool {
        false
    }
}

/// Why a node reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A token, or the next ones, need it.
    Work,
    /// The manifest of the model of this number.
    Manifest(usize),
    /// The pull needs it.
    Pull,
    /// The swarm needs a copy more.
    Heal,
    /// The disk lost it.
    Repair,
    /// It must be in reach now that nothing goes wrong any more.
    Probe,
}

/// What a request brought and the read keeps.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    pub range: ByteRange,
    pub is_wrong: bool,
}

/// A read under way.
#[derive(Debug)]
pub struct Reading {
    pub shard: ShardId,
    pub range: ByteRange,
    pub purpose: Purpose,
    /// A token waits for it.
    pub is_token: bool,
    pub began: u64,
    pub parts: BTreeMap<RequestId, Part>,
}

/// When a node's decider last looked at the swarm; and whether it is to look again because a copy has ended.
#[derive(Debug, Clone, Copy, Default)]
pub struct Looks {
    pub last: u64,
    pub is_due: bool,
}

pub struct Node {
    pub id: PeerId,
    pub rng: Rng,
    /// `None` while it is down.
    pub core: Option<Box<Core>>,
    /// Counts its lives.
    pub boot: u32,
    /// The number of its last run, as its disk has it.
    pub epoch: u64,
    /// The earliest time for which a wake-up is queued.
    pub armed: u64,
    pub is_nat: bool,
    pub replies: Replies,
    pub reads: BTreeMap<ReadId, Reading>,
    /// Reads that nobody waits for any more, though their end may be on its way.
    pub dropped: BTreeSet<ReadId>,
    /// Never used twice, over restarts too.
    pub next_read: ReadId,
    pub disk: Disk,
    /// Models whose lists are registered.
    pub registered: BTreeSet<usize>,
    /// It wants all of every model, and keeps it.
    pub wants_all: bool,
    pub pull: Option<Pull>,
    pub healing: Option<Healing>,
    pub looks: Looks,
    /// Bytes of copies that it makes for the swarm.
    pub replica_budget: u64,
    /// Since when it wants to leave for good; and that it has.
    pub leaves_since: Option<u64>,
    pub is_gone: bool,
    pub down_since: Option<u64>,
    /// Bytes a second.
    pub up: u64,
    pub down: u64,
    pub uploads: VecDeque<Upload>,
    pub sending: Option<Upload>,
    pub down_free: u64,
    pub contacts: BTreeSet<usize>,
    /// Whom it refuses, until when.
    pub refused: BTreeMap<usize, u64>,
    pub address: Vec<Address>,
    /// How far its wall clock is off, in milliseconds.
    pub skew_ms: i64,
    pub lies: BTreeMap<usize, Lie>,
    /// Faults that keep it down.
    pub down_by: BTreeSet<usize>,
    /// It lied at some time: its peers may ban it.
    pub was_dishonest: bool,
}

impl Node {
    pub fn is_up(&self) -> bool {
        self.core.is_some()
    }

    pub fn lies(&self, lie: Lie) -> bool {
        self.lies.values().any(|known| *known == lie)
    }

    pub fn is_honest(&self) -> bool {
        self.lies.is_empty()
    }
}
