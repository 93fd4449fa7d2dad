//! How full everything is that a peer can grow, beside its bound: for whoever checks that the
//! bounds hold.

use super::Core;
use super::limits::{
    ANNOUNCEMENTS_MAX, CROWD_SAMPLES_MAX, HEAT_MAX, HEDGES_MAX, HOLDINGS_MAX, KNOWN_HEARD_MAX,
    KNOWN_PEERS_MAX, MEMBER_BYTES_MAX, MEMBER_MODELS_MAX, MEMBER_PARTS_MAX, MEMBERS_MAX,
    MODELS_MAX, PEERS_REMEMBERED_MAX, READS_MAX, REQUESTS_PER_PEER_MAX, REQUESTS_PER_READ_MAX,
    STARTED_MAX, TOPICS_MAX, TWINS_MAX,
};

/// How full one collection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    pub what: &'static str,
    /// Never more than `max`.
    pub len: usize,
    pub max: usize,
}

impl Core {
    /// Every collection and its bound. Of those that exist once a peer or a read, the fullest.
    pub fn census(&self) -> Vec<Fill> {
        let fill = |what, len, max| Fill { what, len, max };
        let (members, member_bytes, member_parts) = self.membership.fill();
        let (reads, requests, twins, started) = self.scheduler.fill();
        let (links, per_peer) = self.scheduler.links.fill();
        let lists = self.membership.lists();
        // This node's own models and those that it keeps have room beside the others.
        let lists = lists.filter(|(model, _)| !self.announcements.is_protected(**model));
        let (entries, most_entries) = self.membership.entries();
        vec![
            fill("announcements", self.announcements.unprotected(), ANNOUNCEMENTS_MAX),
            fill("members", members, MEMBERS_MAX),
            fill("models of a member", most_entries, MEMBER_MODELS_MAX),
            fill("models of all members", entries, HOLDINGS_MAX),
            fill("bitmap bytes of a member", member_bytes, MEMBER_BYTES_MAX),
            fill("partial objects of a member", member_parts, MEMBER_PARTS_MAX),
            fill("registered models", lists.count(), MODELS_MAX),
            fill("peers gone or doubted", self.absence.len(), PEERS_REMEMBERED_MAX),
            fill("forgotten members", self.membership.forgotten(), PEERS_REMEMBERED_MAX),
            fill("known peers", self.known.len(), KNOWN_PEERS_MAX),
            fill("peers only heard of", self.known.heard(), KNOWN_HEARD_MAX),
            fill("identities of two nodes", self.twins.len(), TWINS_MAX),
            fill("conduct records", self.reputation.len(), PEERS_REMEMBERED_MAX),
            fill("authors counted", self.inbox.len(), PEERS_REMEMBERED_MAX),
            fill("promises counted", self.crowd.len(), CROWD_SAMPLES_MAX),
            fill("topics of models", self.topics.len(), TOPICS_MAX),
            fill("peers with traffic", self.traffic.len(), PEERS_REMEMBERED_MAX),
            fill("reads", reads.max(self.reads.len()), READS_MAX),
            // Each may have been asked of a second peer.
            fill("requests of a read", requests, 2 * REQUESTS_PER_READ_MAX),
            fill("requests asked twice", twins, 2 * HEDGES_MAX),
            fill("shards begun", started, STARTED_MAX),
            fill("objects whose reads are counted", self.heat.len(), HEAT_MAX),
            // Those that owe answers stay, and every read's requests are bounded.
            fill("links", links, PEERS_REMEMBERED_MAX),
            fill("requests to a peer", per_peer, REQUESTS_PER_PEER_MAX as usize),
        ]
    }
}
