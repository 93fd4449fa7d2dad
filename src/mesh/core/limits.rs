//! Every interval and bound that decisions keep.

use std::time::Duration;

/// Intervals that tests shorten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Anti-entropy: everything is said again this often, because gossip promises nothing.
    pub announce_every: Duration,
    /// How long others believe what we hold: three announcements may be lost.
    pub lease: Duration,
    /// Changes within this time are said together.
    pub settle: Duration,
    /// A transfer without a byte for this long has stalled. Far above a loaded
    /// peer's disk read, far below what a person waits for a token.
    pub idle: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            announce_every: Duration::from_secs(10),
            lease: Duration::from_secs(35),
            settle: Duration::from_millis(200),
            idle: Duration::from_secs(5),
        }
    }
}

impl Timing {
    /// How often leases and dials are looked at: a few times per lease.
    pub(crate) fn upkeep(&self) -> Duration {
        self.lease.min(self.announce_every) / 8
    }
}

/// What a limit lets pass at once after idling.
pub(crate) const LIMIT_BURST: Duration = Duration::from_millis(100);
/// Announcements kept. A forgotten one comes again with anti-entropy.
pub(crate) const ANNOUNCEMENTS_MAX: usize = 256;
/// Models whose object lists are registered.
pub(crate) const MODELS_MAX: usize = 256;
/// Peers whose holdings are remembered, and bitmap bytes of each: 32 MiB at worst.
pub(crate) const MEMBERS_MAX: usize = 512;
pub(crate) const MEMBER_BYTES_MAX: usize = 64 * 1024;
/// Peers whose conduct and traffic are remembered.
pub(crate) const PEERS_REMEMBERED_MAX: usize = 4096;
/// How long a message that is no newer than a forgotten peer's last is taken for a repetition,
/// unless the peer is connected: then its clock went back.
pub(crate) const FORGOTTEN_FOR: Duration = Duration::from_secs(600);

/// Objects that one peer is believed to hold in part, over all models: 40 KiB a peer at worst.
pub(crate) const MEMBER_PARTS_MAX: usize = 1024;
/// Objects held in part that this node tells of.
pub(crate) const OWN_PARTS_MAX: usize = 512;

/// Gossip messages heeded per author and window. An honest node pauses `GOSSIP_PAUSE` for
/// each message it said, which is at most 200 in a window, and usually a handful.
pub(crate) const GOSSIP_WINDOW: Duration = Duration::from_secs(10);
pub(crate) const GOSSIP_PER_WINDOW_MAX: u32 = 512;
pub(crate) const GOSSIP_PAUSE: Duration = Duration::from_millis(50);
/// Holdings bytes packed into one message, below the envelope's limit with its other fields.
pub(crate) const HOLDINGS_BYTES_TARGET: usize = 48 * 1024;

/// Peers that are known, connected or not, and addresses kept of each from one source.
pub(crate) const KNOWN_PEERS_MAX: usize = 1024;
pub(crate) const KNOWN_ADDRESSES_MAX: usize = 16;
/// Connections that are opened without a need, so that a read finds its holder connected.
pub(crate) const DIAL_TARGET: usize = 32;
/// Pause after the first dial of a peer that does not answer, doubling.
pub(crate) const DIAL_RETRY_FIRST: Duration = Duration::from_millis(500);
/// So many of the peers that are away, the most useful, are dialled at least this often, and the
/// others at least that often: who comes back is met soon, and a thousand dead addresses cost
/// two dials a second.
pub(crate) const NEAR_MAX: usize = 32;
pub(crate) const DIAL_NEAR_MAX: Duration = Duration::from_secs(15);
pub(crate) const DIAL_FAR_MAX: Duration = Duration::from_secs(600);
/// Dials begun at once: half of what the swarm lets be under way. And the least time between
/// two such rounds, in which what many peers say at once is gathered.
pub(crate) const DIALS_AT_ONCE: usize = 32;
pub(crate) const DIAL_SETTLE: Duration = Duration::from_millis(100);
/// A peer that was lost is dialled again within this.
pub(crate) const DIAL_AGAIN: Duration = Duration::from_millis(250);
/// A connection that lasted for less did not help: the pauses go on growing.
pub(crate) const STEADY: Duration = Duration::from_secs(10);
/// A peer that was connected for so long and took part in nothing belongs to another swarm.
pub(crate) const STRANGER_AFTER: Duration = Duration::from_secs(3);

/// Identities that two nodes use: how long one is taken to be so after it was seen, how soon the
/// owner is told again, how soon the two are, and how many are remembered.
pub(crate) const TWIN_FOR: Duration = Duration::from_secs(120);
pub(crate) const TWIN_AGAIN: Duration = Duration::from_secs(3600);
pub(crate) const TWIN_TELL: Duration = Duration::from_secs(10);
pub(crate) const TWINS_MAX: usize = 64;

/// Reads under way; each is at most one object.
pub(crate) const READS_MAX: usize = 1024;
/// Requests of one read under way. With `SERVE_BYTES_MAX` each they bound its memory.
pub(crate) const REQUESTS_PER_READ_MAX: usize = 8;
/// Requests under way to one peer, a quarter of them for what a token waits for.
/// More only queue at the other side.
pub(crate) const REQUESTS_PER_PEER_MAX: u32 = 16;
/// Requests under way to a peer of which no rate is known yet.
pub(crate) const REQUESTS_UNMEASURED_MAX: u32 = 4;
/// A request is as long as its peer delivers in this time, within these bounds:
/// below them the round trip dominates, and a share less is not worth a second peer.
pub(crate) const REQUEST_TIME: Duration = Duration::from_millis(250);
pub(crate) const REQUEST_BYTES_MIN: u64 = 256 * 1024;
pub(crate) const PIECE_BYTES_MIN: u64 = 1024 * 1024;
/// A peer is asked for no more at once than it delivers in this time.
pub(crate) const PIPELINE_TIME: Duration = Duration::from_millis(500);
/// A peer that owes answers and sends nothing for this long is asked for nothing more,
/// and what it owes is asked of another. Well above a disk read, well below `Timing::idle`.
pub(crate) const SILENT_AFTER: Duration = Duration::from_millis(400);
/// A peer that owes answers for so long may be named as the one that is waited for.
pub(crate) const SLOW_AFTER: Duration = Duration::from_secs(2);
/// A request is late after the 95th percentile of past lateness, but never before this;
/// one to a peer that has not been measured, after that.
pub(crate) const HEDGE_AFTER_MIN: Duration = Duration::from_millis(100);
pub(crate) const HEDGE_UNKNOWN: Duration = Duration::from_secs(1);
/// Answers that the percentile is taken over.
pub(crate) const LATENESS_SAMPLES: usize = 64;
/// Requests that are asked of two peers at once, over all reads.
pub(crate) const HEDGES_MAX: usize = 32;
/// Bytes asked for twice while the first peer was still sending: so many, and this share
/// of what was delivered.
pub(crate) const HEDGE_BYTES_FREE: u64 = 32 * 1024 * 1024;
pub(crate) const HEDGE_SHARE: f64 = 0.1;
/// Shards remembered as begun, which are finished before others are begun.
pub(crate) const STARTED_MAX: usize = 256;
/// Failed requests of one read since the last that brought something.
pub(crate) const ATTEMPTS_MAX: u32 = 32;
/// A read whose holders only say that they are overloaded ends so long after the last proved byte.
pub(crate) const BUSY_MAX: Duration = Duration::from_secs(300);
/// Wait before a peer that failed a read is asked for it again, doubling.
pub(crate) const RETRY_FIRST: Duration = Duration::from_millis(200);
pub(crate) const RETRY_MAX: Duration = Duration::from_secs(5);
/// How often a transfer that goes on is noted.
pub(crate) const HEARD_EVERY: Duration = Duration::from_millis(50);
/// The largest manifest that is asked for, or sent, over a relay; nothing else of the shard
/// protocol is. Half of what a circuit carries, so that gossip has the rest.
pub(crate) const RELAYED_MANIFEST_BYTES_MAX: u64 = 64 * 1024;
/// How long a first wrong byte bans a peer; each further offence doubles it.
pub(crate) const BAN_FIRST: Duration = Duration::from_secs(600);
pub(crate) const BAN_MAX: Duration = Duration::from_secs(24 * 3600);

/// A peer whose connection was lost counts for nothing in healing after this, if it has not spoken
/// for one and a half rounds of anti-entropy.
pub(crate) const MISSING_AFTER: Duration = Duration::from_secs(5);
/// A lost peer is doubted aloud after this, so many at a time. A doubted peer that does not speak
/// for so long is missing; one that is doubted itself speaks no more often than this.
pub(crate) const DOUBT_AFTER: Duration = Duration::from_secs(1);
pub(crate) const DOUBTS_MAX: usize = 16;
pub(crate) const DOUBT_FOR: Duration = Duration::from_secs(3);
pub(crate) const REFUTE_EVERY: Duration = Duration::from_secs(1);
/// An object must lack copies for this long, and at this many looks, before one is made, and for
/// up to so much longer, which differs by node.
pub(crate) const HEAL_CONFIRM: Duration = Duration::from_secs(3);
pub(crate) const HEAL_LOOKS_MIN: u32 = 3;
pub(crate) const HEAL_JITTER: Duration = Duration::from_secs(1);
/// How long nodes that should copy an object are waited for before one more is taken on.
pub(crate) const HEAL_PATIENCE: Duration = Duration::from_secs(45);
/// A copy too many stays for this long: whoever was away may go again.
pub(crate) const HEAL_SURPLUS_AFTER: Duration = Duration::from_secs(60);
/// Objects that a node copies at a time; one while a token waits.
pub(crate) const HEAL_AT_ONCE: usize = 4;
/// Wait before a copy that failed is tried again.
pub(crate) const HEAL_RETRY: Duration = Duration::from_secs(5);
/// A node that leaves stays at least so long, to hear who else leaves; and at most so much longer
/// for the sake of copies that are not the last.
pub(crate) const DRAIN_CONFIRM: Duration = Duration::from_secs(5);
pub(crate) const DRAIN_PATIENCE: Duration = Duration::from_secs(60);

/// A peer that denied so often more than it delivered what it had said it holds is not
/// asked for anything for this long.
pub(crate) const DENIALS_MAX: u32 = 8;
pub(crate) const DENIED_FOR: Duration = Duration::from_secs(60);
