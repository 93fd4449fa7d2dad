//! Which run of a node each connection leads to, as its other end identified itself. Pure: the time
//! is an argument.
//!
//! A node draws a number when it starts and identifies with it. Two connections of one peer that
//! stay open and lead to two runs lead to two nodes: after a restart the old one ends within the
//! ping's time-outs.
//!
//! The two cannot see each other. Who sees them tells them, by opening a stream that says nothing:
//! libp2p chooses among a peer's connections at random, so a few reach both.
//!
//! Invariant: an entry belongs to an open connection, so the connection limits bound the table.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures::StreamExt;
use libp2p::StreamProtocol;
use libp2p::swarm::ConnectionId;
use tokio::sync::mpsc;

use crate::handle::Notice;
use crate::options::{OPEN_TIMEOUT, TWIN_TELLS};
use crate::{Address, PeerId, convert};

/// How long connections to two runs must both have been open: longer than a dead one takes to be
/// noticed ([`PING_INTERVAL`](crate::options::PING_INTERVAL) and its time-out).
const BOTH_OPEN: Duration = Duration::from_secs(30);

/// Separates a node's `NAME/VERSION` from its run in what it identifies with.
const MARK: &str = " run/";

/// A stream of this protocol says that two nodes use the identity of the one that accepts it.
pub(crate) const TWIN_PROTOCOL: StreamProtocol = StreamProtocol::new("/doppler/twin/1");

/// Tells the nodes behind a peer's connections that there are two of them.
pub(crate) async fn tell_twins(mut control: libp2p_stream::Control, peer: libp2p::PeerId) {
    for _ in 0..TWIN_TELLS {
        // Who does not know the protocol is not told.
        let _ = tokio::time::timeout(OPEN_TIMEOUT, control.open_stream(peer, TWIN_PROTOCOL)).await;
    }
}

/// Passes on what peers say of this node.
pub(crate) async fn hear_of_twins(
    mut incoming: libp2p_stream::IncomingStreams,
    notices: mpsc::Sender<Notice>,
) {
    while let Some((peer, _)) = incoming.next().await {
        // It is said again.
        let _ = notices.try_send(Notice::ToldOfTwin { by: convert::peer(peer) });
    }
}

/// What a node identifies with.
pub(crate) fn agent_with_run(agent: &str, run: u64) -> String {
    format!("{agent}{MARK}{run:016x}")
}

/// A peer's `NAME/VERSION`, and its run if it says one.
pub(crate) fn split_run(agent: &str) -> (&str, Option<u64>) {
    match agent.split_once(MARK) {
        Some((agent, run)) => (agent, u64::from_str_radix(run, 16).ok()),
        None => (agent, None),
    }
}

struct Link {
    run: u64,
    since: Instant,
    remote: Address,
}

/// The runs behind open connections.
#[derive(Default)]
pub(crate) struct Runs {
    peers: BTreeMap<PeerId, BTreeMap<ConnectionId, Link>>,
}

impl Runs {
    /// The other end of a connection identified itself as this run.
    pub(crate) fn identified(
        &mut self,
        now: Instant,
        peer: PeerId,
        id: ConnectionId,
        run: u64,
        remote: Address,
    ) {
        let links = self.peers.entry(peer).or_default();
        links.entry(id).or_insert(Link { run, since: now, remote });
    }

    pub(crate) fn closed(&mut self, peer: PeerId, id: ConnectionId) {
        if let Some(links) = self.peers.get_mut(&peer) {
            links.remove(&id);
            if links.is_empty() {
                self.peers.remove(&peer);
            }
        }
    }

    /// Peers that are two nodes, and where each of the two is.
    pub(crate) fn doubled(&self, now: Instant) -> Vec<(PeerId, [Address; 2])> {
        let mut doubled = Vec::new();
        for (peer, links) in self.peers.iter().filter(|(_, links)| links.len() > 1) {
            let mut old = links.values().filter(|link| link.since + BOTH_OPEN <= now);
            let Some(one) = old.next() else { continue };
            if let Some(other) = old.find(|link| link.run != one.run) {
                doubled.push((*peer, [one.remote.clone(), other.remote.clone()]));
            }
        }
        doubled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_travel_with_the_agent() {
        let agent = agent_with_run("doppler-node/0.1.0", 0xabc);
        assert_eq!(split_run(&agent), ("doppler-node/0.1.0", Some(0xabc)));
        assert_eq!(split_run("page/1"), ("page/1", None));
        assert_eq!(split_run("page/1 run/fast"), ("page/1", None));
    }

    #[test]
    fn two_runs_at_once_are_two_nodes_and_one_after_the_other_is_a_restart() {
        let start = Instant::now();
        let peer = PeerId::from_seed([1; 32]);
        let ids = [0, 1, 2].map(ConnectionId::new_unchecked);
        let place = |port: u8| format!("/ip4/10.0.0.1/tcp/{port}").parse::<Address>().unwrap();
        let mut runs = Runs::default();
        runs.identified(start, peer, ids[0], 1, place(1));
        runs.identified(start, peer, ids[1], 1, place(2));
        assert_eq!(runs.doubled(start + BOTH_OPEN), [], "twice the same");
        // It starts again; the old connections are noticed to be dead later.
        runs.identified(start, peer, ids[2], 2, place(3));
        assert_eq!(runs.doubled(start + BOTH_OPEN / 2), []);
        runs.closed(peer, ids[0]);
        runs.closed(peer, ids[1]);
        assert_eq!(runs.doubled(start + BOTH_OPEN * 9), []);
        runs.identified(start, peer, ids[0], 1, place(1));
        assert_eq!(runs.doubled(start + BOTH_OPEN), [(peer, [place(1), place(3)])]);
        runs.closed(peer, ids[0]);
        runs.closed(peer, ids[2]);
        assert!(runs.peers.is_empty());
    }
}
