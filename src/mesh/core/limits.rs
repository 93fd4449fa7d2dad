//! Every interval and bound that decisions keep.

use std::time::Duration;

use crate::wire::LEASE_MAX;

/// Intervals that tests shorten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Anti-entropy: everything is announced again this often, because gossip gives no guarantees.
    pub announce_every: Duration,
    /// How long others believe what this node holds. Three announcements may be lost.
    pub lease: Duration,
    /// Changes within this time are announced together.
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
    /// How often leases, dials and promises are checked: a few times per lease, and in a crowd, where
    /// everything takes longer, a few times per heartbeat.
    pub(crate) fn upkeep(&self, members: usize) -> Duration {
        let few = self.lease.min(self.announce_every) / 8;
        let share = if members > CROWD { self.beat(members) / 16 } else { Duration::ZERO };
        few.max(share.min(UPKEEP_MAX))
    }

    /// How often a node of a swarm of so many members announces everything again. In a crowd, all
    /// together say five messages a second.
    pub(crate) fn round(&self, members: usize) -> Duration {
        let share = CROWD_SHARE.saturating_mul(u32::try_from(members).unwrap_or(u32::MAX));
        let share = if members > CROWD { share } else { Duration::ZERO };
        self.announce_every.max(share.min(LEASE_MAX * 2 / 7))
    }

    /// The longest pause between two messages of a node in a swarm of so many members: a third of a
    /// round, so that a death is noticed within one, but no more than ten heartbeats a second of
    /// all members together.
    pub(crate) fn beat(&self, members: usize) -> Duration {
        let share = BEAT_SHARE.saturating_mul(u32::try_from(members).unwrap_or(u32::MAX));
        let third = self.announce_every / 3 + self.settle / 20;
        third.max(share).min(self.round(members))
    }

    /// How often a node says what it holds on a model's topic, if its topics have so many members.
    pub(crate) fn topic_round(&self, members: usize) -> Duration {
        let share = TOPIC_SHARE.saturating_mul(u32::try_from(members).unwrap_or(u32::MAX));
        self.announce_every.max(share.min(LEASE_MAX * 2 / 7))
    }

    /// How long it is believed what was said there. Three words may be lost.
    pub(crate) fn topic_lease(&self, round: Duration) -> Duration {
        self.lease.max(round * 7 / 2).min(LEASE_MAX)
    }

    /// How long others believe what a node of such a swarm holds.
    pub(crate) fn lease_in(&self, members: usize) -> Duration {
        self.lease.max(self.round(members) * 7 / 2).min(LEASE_MAX)
    }
}

/// The burst that a limit allows after idling.
pub(crate) const LIMIT_BURST: Duration = Duration::from_millis(100);
/// Announcements kept besides those of this node's own and kept models, and how many of them may be
/// of one model. A forgotten announcement comes back with anti-entropy.
pub(crate) const ANNOUNCEMENTS_MAX: usize = 1024;
pub(crate) const SIGNERS_MAX: usize = 16;
/// Announcements sent in one turn. The next turn comes after the pause that they cost.
pub(crate) const ANNOUNCEMENTS_PER_TURN: usize = 64;
/// Models whose object lists are registered, besides this node's own and kept models.
pub(crate) const MODELS_MAX: usize = 1024;
/// Peers whose holdings are remembered, and bitmap bytes of each: 16 MiB at worst. Those that share
/// a model with this node stay, the others give way.
pub(crate) const MEMBERS_MAX: usize = 256;
/// How long a member that shares nothing stays when others of its kind want its place.
pub(crate) const VIEW_TURNS: Duration = Duration::from_secs(600);
/// How soon members are looked at again that all share a model.
pub(crate) const VIEW_LOOK: Duration = Duration::from_secs(10);
/// Of each model that this node is interested in, at least so many members stay, or an equal share of all.
pub(crate) const VIEW_FAIR_MIN: usize = 8;
pub(crate) const MEMBER_BYTES_MAX: usize = 64 * 1024;
/// Models of which one peer is believed to hold something, and over all peers: 8 MiB at worst.
pub(crate) const MEMBER_MODELS_MAX: usize = 1024;
pub(crate) const HOLDINGS_MAX: usize = 32 * 1024;
/// Peers whose conduct and traffic are remembered.
pub(crate) const PEERS_REMEMBERED_MAX: usize = 4096;
/// How long a message that is no newer than a forgotten peer's last one counts as a repetition.
pub(crate) const FORGOTTEN_FOR: Duration = Duration::from_secs(600);

/// The most partially held objects per peer, over all models: at most 40 KiB per peer.
pub(crate) const MEMBER_PARTS_MAX: usize = 1024;
/// The most partially held objects that this node announces.
pub(crate) const OWN_PARTS_MAX: usize = 512;

/// Gossip messages accepted per author and window. An honest node pauses `GOSSIP_PAUSE` for each
/// message it sends, so it sends at most 200 in a window, and usually a handful.
pub(crate) const GOSSIP_WINDOW: Duration = Duration::from_secs(10);
pub(crate) const GOSSIP_PER_WINDOW_MAX: u32 = 512;
pub(crate) const GOSSIP_PAUSE: Duration = Duration::from_millis(50);
/// Holdings bytes packed into one message, below the envelope's limit with its other fields.
pub(crate) const HOLDINGS_BYTES_TARGET: usize = 48 * 1024;

/// Known peers, connected or not, and addresses of each kept from one source.
pub(crate) const KNOWN_PEERS_MAX: usize = 1024;
/// Of these, the peers that were never met, found or remembered, only heard of.
pub(crate) const KNOWN_HEARD_MAX: usize = 256;
/// How often one of them gives way to another.
pub(crate) const HEARD_TURNS: Duration = Duration::from_secs(2);
pub(crate) const KNOWN_ADDRESSES_MAX: usize = 16;
/// Connections that are opened in advance, so that a read finds its holder connected.
pub(crate) const DIAL_TARGET: usize = 32;
/// Pause after the first dial of a peer that does not answer, doubling.
pub(crate) const DIAL_RETRY_FIRST: Duration = Duration::from_millis(500);
/// Of the peers that are away, the `NEAR_MAX` most useful are dialled at least once per
/// `DIAL_NEAR_MAX`, the others at least once per `DIAL_FAR_MAX`. So a peer that comes back is met
/// soon, and a thousand dead addresses cost two dials a second.
pub(crate) const NEAR_MAX: usize = 32;
pub(crate) const DIAL_NEAR_MAX: Duration = Duration::from_secs(15);
pub(crate) const DIAL_FAR_MAX: Duration = Duration::from_secs(600);
/// Dials begun at once: half of what the swarm allows in flight. And the minimum time between two
/// such rounds, in which the reports of many peers are collected.
pub(crate) const DIALS_AT_ONCE: usize = 32;
pub(crate) const DIAL_SETTLE: Duration = Duration::from_millis(100);
/// Whoever has this many listeners announces everything to a further one no sooner than this after its last
/// words: one that dials many hears from others meanwhile how many there are, and says it once to all.
pub(crate) const LISTENERS_FEW: usize = 4;
pub(crate) const LISTENER_REST: Duration = Duration::from_secs(1);
/// A peer that was lost is dialled again within this.
pub(crate) const DIAL_AGAIN: Duration = Duration::from_millis(250);
/// A connection that lasted for less does not count, and the pauses continue to grow.
pub(crate) const STEADY: Duration = Duration::from_secs(10);
/// A peer that was connected for this long and took part in nothing belongs to another swarm.
pub(crate) const STRANGER_AFTER: Duration = Duration::from_secs(3);

/// Identities that two nodes use: how long after it was seen an identity counts as such, how soon
/// the owner is told again, how soon the two nodes are, and how many are remembered.
pub(crate) const TWIN_FOR: Duration = Duration::from_secs(120);
pub(crate) const TWIN_AGAIN: Duration = Duration::from_secs(3600);
pub(crate) const TWIN_TELL: Duration = Duration::from_secs(10);
pub(crate) const TWINS_MAX: usize = 64;
/// When an earlier run of a peer still speaks: how long after the later one began its messages may
/// be late, how many are needed, and how far apart they must be.
pub(crate) const TWIN_LATE: Duration = Duration::from_secs(15);
pub(crate) const TWIN_WORDS: u32 = 3;
pub(crate) const TWIN_PAUSE: Duration = Duration::from_secs(5);

/// The most reads in flight. Each is at most one object.
pub(crate) const READS_MAX: usize = 1024;
/// The most requests in flight of one read. With `SERVE_BYTES_MAX` each, they bound its memory.
pub(crate) const REQUESTS_PER_READ_MAX: usize = 8;
/// The most requests in flight to one peer; a quarter of them is reserved for reads for which a
/// token waits. More would only queue at the other side.
pub(crate) const REQUESTS_PER_PEER_MAX: u32 = 16;
/// The most requests in flight to a peer whose rate is not known yet.
pub(crate) const REQUESTS_UNMEASURED_MAX: u32 = 4;
/// A request is as long as its peer delivers in this time, within these bounds: shorter ones are
/// dominated by the round trip, and a smaller part is not worth a second peer.
pub(crate) const REQUEST_TIME: Duration = Duration::from_millis(250);
pub(crate) const REQUEST_BYTES_MIN: u64 = 256 * 1024;
pub(crate) const PIECE_BYTES_MIN: u64 = 1024 * 1024;
/// A peer is asked for no more at once than it delivers in this time.
pub(crate) const PIPELINE_TIME: Duration = Duration::from_millis(500);
/// A peer that owes answers and sends nothing for this long is asked for nothing more, and another
/// peer is asked for what it owes. Well above a disk read, well below `Timing::idle`.
pub(crate) const SILENT_AFTER: Duration = Duration::from_millis(400);
/// A peer that has owed answers for this long may be named as the one that is waited for.
pub(crate) const SLOW_AFTER: Duration = Duration::from_secs(2);
/// A request is late after the 95th percentile of past lateness, but never before this. A request
/// to a peer that has not been measured is late after [`HEDGE_UNKNOWN`].
pub(crate) const HEDGE_AFTER_MIN: Duration = Duration::from_millis(100);
pub(crate) const HEDGE_UNKNOWN: Duration = Duration::from_secs(1);
/// The number of answers over which the percentile is computed.
pub(crate) const LATENESS_SAMPLES: usize = 64;
/// The most requests that are asked of two peers at once, over all reads.
pub(crate) const HEDGES_MAX: usize = 32;
/// The most bytes asked for twice while the first peer was still sending: this many, plus a
/// fraction of what was delivered.
pub(crate) const HEDGE_BYTES_FREE: u64 = 32 * 1024 * 1024;
pub(crate) const HEDGE_SHARE: f64 = 0.1;
/// The most shards remembered as begun, which are finished before others begin.
pub(crate) const STARTED_MAX: usize = 256;
/// The most failed requests of one read since the last one that brought something.
pub(crate) const ATTEMPTS_MAX: u32 = 32;
/// How long after the last proved byte a read ends if its holders only say that they are
/// overloaded.
pub(crate) const BUSY_MAX: Duration = Duration::from_secs(300);
/// Wait before a peer that failed a read is asked for it again, doubling.
pub(crate) const RETRY_FIRST: Duration = Duration::from_millis(200);
pub(crate) const RETRY_MAX: Duration = Duration::from_secs(5);
/// How often a continuing transfer is noted.
pub(crate) const HEARD_EVERY: Duration = Duration::from_millis(50);
/// The largest manifest that is requested or sent over a relay. Nothing else of the shard protocol
/// is. Half of what a circuit carries, so that the rest is left for gossip.
pub(crate) const RELAYED_MANIFEST_BYTES_MAX: u64 = 64 * 1024;
/// How long a first wrong byte bans a peer; each further offence doubles it.
pub(crate) const BAN_FIRST: Duration = Duration::from_secs(600);
pub(crate) const BAN_MAX: Duration = Duration::from_secs(24 * 3600);

/// The time that each member adds to the pause between heartbeats, and in a crowd to the round.
pub(crate) const BEAT_SHARE: Duration = Duration::from_millis(100);
pub(crate) const CROWD_SHARE: Duration = Duration::from_millis(200);
/// How much later than promised a message may be before its author is doubted.
pub(crate) const BEAT_GRACE: Duration = Duration::from_millis(1500);
/// A swarm of more members is a crowd: nobody knows all of it.
pub(crate) const CROWD: usize = MEMBERS_MAX - 1;
/// In a crowd, a node whose holdings change says so at most this many times a round.
pub(crate) const CROWD_CHANGES: u32 = 8;
/// Topics of models that a node of a crowd is in.
pub(crate) const TOPICS_MAX: usize = 32;
/// The time that each member of a node's topics, all of them together, adds to the pause between two of
/// the node's words on one of them; and how often at most it speaks there in such a pause.
pub(crate) const TOPIC_SHARE: Duration = Duration::from_millis(400);
pub(crate) const TOPIC_CHANGES: u32 = 8;
/// How long a node stays in a topic at least: a read makes a model interesting for a while.
pub(crate) const TOPIC_STAY: Duration = Duration::from_secs(60);
/// Connections to members of a topic that a node opens in advance.
pub(crate) const TOPIC_PEERS: usize = 4;
/// How many of a topic dial one that is interested in its model and was not heard there.
pub(crate) const USHERS: usize = 3;
/// The longest time between two looks of a crowd's member at leases, dials and promises.
pub(crate) const UPKEEP_MAX: Duration = Duration::from_secs(30);
/// The window over which a crowd's size is estimated, and the authors counted in it.
pub(crate) const CROWD_WINDOW: Duration = Duration::from_secs(30);
pub(crate) const CROWD_SAMPLES_MAX: usize = 1024;
/// The time that each known model adds to the pause before it is announced again.
pub(crate) const MODEL_SHARE: Duration = Duration::from_millis(200);
/// How long after its connection was lost a peer stops counting in healing, if its next word is
/// overdue.
pub(crate) const MISSING_AFTER: Duration = Duration::from_secs(5);
/// The peers that dial a doubted peer for the others: the indirect probe.
pub(crate) const WITNESSES: usize = 2;
/// When the doubt of a lost peer is published, and how many at a time; how long a doubted peer may
/// take to speak before it is missing; and how often at most a node answers doubts of itself.
pub(crate) const DOUBT_AFTER: Duration = Duration::from_secs(1);
pub(crate) const DOUBTS_MAX: usize = 16;
pub(crate) const DOUBT_FOR: Duration = Duration::from_secs(3);
pub(crate) const REFUTE_EVERY: Duration = Duration::from_secs(1);
/// How long, and at how many looks, an object must lack copies before one is made; and the
/// additional wait at most, which differs by node.
pub(crate) const HEAL_CONFIRM: Duration = Duration::from_secs(3);
pub(crate) const HEAL_LOOKS_MIN: u32 = 3;
pub(crate) const HEAL_JITTER: Duration = Duration::from_secs(1);
/// How long the nodes that should copy an object have for it before one more is added: this long,
/// and as long as its bytes take at a rate that any node reaches.
pub(crate) const HEAL_PATIENCE: Duration = Duration::from_secs(15);
pub(crate) const HEAL_PACE_MIN: u64 = 2_000_000;
/// How long a surplus copy stays: a node that came back may leave again.
pub(crate) const HEAL_SURPLUS_AFTER: Duration = Duration::from_secs(60);
/// Objects that a node copies at a time, or more of them while they are no larger together than
/// this. While a token waits, it copies one.
pub(crate) const HEAL_AT_ONCE: usize = 4;
pub(crate) const HEAL_SMALL_AT_ONCE: usize = 16;
pub(crate) const HEAL_BYTES_AT_ONCE: u64 = 64 * 1024 * 1024;
/// How long an object must be hot before another copy of it is made.
pub(crate) const HEAL_HOT_AFTER: Duration = Duration::from_secs(20);
/// Objects whose reads are counted; how many reads make one hot; and the time in which a count
/// halves.
pub(crate) const HEAT_MAX: usize = 256;
pub(crate) const HOT_READS: u32 = 8;
pub(crate) const HEAT_HALVES: Duration = Duration::from_secs(60);
/// Wait before a copy that failed is tried again.
pub(crate) const HEAL_RETRY: Duration = Duration::from_secs(5);
/// How long a leaving node stays at least, to hear which others leave; and how long it waits at
/// most for copies of objects of which it does not hold the last one.
pub(crate) const DRAIN_CONFIRM: Duration = Duration::from_secs(5);
pub(crate) const DRAIN_PATIENCE: Duration = Duration::from_secs(60);

/// If a peer has denied what it had said it holds this many times more than it has delivered, it is
/// not asked for anything for `DENIED_FOR`.
pub(crate) const DENIALS_MAX: u32 = 8;
pub(crate) const DENIED_FOR: Duration = Duration::from_secs(60);
