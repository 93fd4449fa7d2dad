//! What this node tells the swarm and when, and how many messages of others it accepts. Pure: the
//! time is an argument.
//!
//! Invariant: changes are announced once they have settled, everything is announced again every
//! `announce_every`, and no author gets more messages accepted than the window allows.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use doppler_ids::{Address, PeerId};

use super::limits::{
    GOSSIP_PAUSE, GOSSIP_PER_WINDOW_MAX, GOSSIP_WINDOW, HOLDINGS_BYTES_TARGET,
    PEERS_REMEMBERED_MAX, Timing,
};
use crate::wire::{
    ADDRESS_BYTES_MAX, ADDRESSES_MAX, Envelope, HOLDINGS_MODELS_MAX, Holdings, ModelHoldings,
};

/// A model's entry costs this much beyond its bitmap: id, flag and framing.
const ENTRY_BYTES: usize = 48;

/// And each partially held object costs this much.
const PART_BYTES: usize = 16;

/// What is due to be announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    /// Holdings, and models that nobody announced recently: in rounds of anti-entropy, and when
    /// holdings have changed.
    Holdings,
    /// Everything at once: a new peer listens, or a model was published.
    Everything,
}

/// When to announce.
pub(super) struct Schedule {
    timing: Timing,
    round: Instant,
    changed: Option<(Instant, Due)>,
    /// Nothing is announced before this, whatever changes. The last announcement sets the pace.
    quiet_until: Instant,
}

impl Schedule {
    pub(super) fn new(timing: Timing, now: Instant) -> Self {
        Self { timing, round: now + timing.announce_every, changed: None, quiet_until: now }
    }

    /// Call when something changed. It is due after `settle`, counted from the first such change.
    pub(super) fn change(&mut self, now: Instant, what: Due) {
        let (at, due) = self.changed.unwrap_or((now + self.timing.settle, what));
        self.changed = Some((at.max(self.quiet_until), due.max(what)));
    }

    /// Call when this many messages were sent. A proportional pause keeps this node's rate well
    /// below what others accept.
    pub(super) fn said(&mut self, now: Instant, messages: usize) {
        let pause = GOSSIP_PAUSE.saturating_mul(u32::try_from(messages).unwrap_or(u32::MAX));
        self.quiet_until = now + pause;
    }

    /// When `due` should be asked next.
    pub(super) fn next(&self) -> Instant {
        self.changed.map_or(self.round, |(at, _)| at.min(self.round))
    }

    /// Takes what is due now.
    pub(super) fn due(&mut self, now: Instant) -> Option<Due> {
        let changed = self.changed.filter(|(at, _)| *at <= now).map(|(_, due)| due);
        if changed.is_none() && self.round > now {
            return None;
        }
        let due = self.changed.take().map_or(Due::Holdings, |(_, due)| due);
        self.round = now + self.timing.announce_every;
        Some(due)
    }
}

/// Counts messages per author over a window.
pub(super) struct Inbox {
    window_ends: Instant,
    counts: BTreeMap<PeerId, u32>,
}

impl Inbox {
    pub(super) fn new(now: Instant) -> Self {
        Self { window_ends: now + GOSSIP_WINDOW, counts: BTreeMap::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.counts.len()
    }

    /// Whether one more message of this author is accepted.
    pub(super) fn admit(&mut self, now: Instant, author: PeerId) -> bool {
        if now >= self.window_ends {
            self.window_ends = now + GOSSIP_WINDOW;
            self.counts.clear();
        }
        if self.counts.len() >= PEERS_REMEMBERED_MAX && !self.counts.contains_key(&author) {
            return false;
        }
        let count = self.counts.entry(author).or_insert(0);
        *count = count.saturating_add(1);
        *count <= GOSSIP_PER_WINDOW_MAX
    }
}

/// Numbers messages so that later ones have larger numbers, even across restarts, unless the clock
/// went back by more than a lease. `unix_ms` is the wall clock.
#[derive(Default)]
pub(super) struct Sequence(u64);

impl Sequence {
    pub(super) fn next(&mut self, unix_ms: u64) -> u64 {
        self.0 = unix_ms.max(self.0 + 1);
        self.0
    }
}

/// What a node announces about itself besides its holdings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offer {
    /// Bytes that it would copy of objects that others lose.
    pub room: u64,
    /// It is about to leave.
    pub is_leaving: bool,
}

/// What every message of holdings says besides the holdings.
pub(super) struct Author<'a> {
    pub(super) peer: PeerId,
    pub(super) run: u64,
    pub(super) lease: Duration,
    pub(super) offer: Offer,
    pub(super) addresses: &'a [Address],
}

/// Packs holdings into as few messages as possible. A node that holds nothing says so, too: its
/// message tells others that it exists, and its addresses.
pub(super) fn holdings_messages(
    author: Author<'_>,
    models: Vec<ModelHoldings>,
    mut next_sequence: impl FnMut() -> u64,
) -> Vec<Vec<u8>> {
    let addresses = worth_saying(author.addresses);
    let mut batches: Vec<Vec<ModelHoldings>> = Vec::new();
    let mut bytes = usize::MAX;
    for model in models {
        let cost = ENTRY_BYTES + model.objects.len() + PART_BYTES * model.parts.len();
        match batches.last_mut() {
            Some(batch)
                if bytes + cost <= HOLDINGS_BYTES_TARGET && batch.len() < HOLDINGS_MODELS_MAX =>
            {
                bytes += cost;
                batch.push(model);
            }
            _ => {
                bytes = cost;
                batches.push(vec![model]);
            }
        }
    }
    if batches.is_empty() {
        batches.push(Vec::new());
    }
    let envelope = |models| {
        Envelope::Holdings(Holdings {
            peer: author.peer.to_bytes(),
            sequence: next_sequence(),
            lease: author.lease,
            room: author.offer.room,
            is_leaving: author.offer.is_leaving,
            addresses: addresses.clone(),
            models,
            run: author.run,
        })
        .encode()
    };
    batches.into_iter().map(envelope).collect()
}

/// Addresses that are useful to others, preferred ones first. Loopback only if there is nothing
/// else.
fn worth_saying(addresses: &[Address]) -> Vec<String> {
    let mut addresses: Vec<&Address> = addresses.iter().collect();
    addresses.sort_by_key(|address| address.transport());
    let all: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    // A link-local address means nothing without the name of the link.
    let narrow = |text: &str| {
        let narrow = ["/ip4/127.", "/ip4/169.254.", "/ip6/::1/", "/ip6/fe80:"];
        narrow.iter().any(|start| text.starts_with(start))
    };
    let wide: Vec<String> = all.iter().filter(|text| !narrow(text)).cloned().collect();
    let mut chosen = if wide.is_empty() { all } else { wide };
    chosen.retain(|text| text.len() <= ADDRESS_BYTES_MAX);
    chosen.truncate(ADDRESSES_MAX);
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{BITMAP_BYTES_MAX, ENVELOPE_BYTES_MAX, PartHoldings};
    use doppler_store::ModelId;
    use doppler_store::groups::Chunks;

    const LEASE: Duration = Duration::from_secs(30);

    #[test]
    fn changes_settle_and_rounds_come_round() {
        let start = Instant::now();
        let timing = Timing::default();
        let mut schedule = Schedule::new(timing, start);
        assert_eq!(schedule.due(start), None);
        schedule.change(start, Due::Holdings);
        schedule.change(start + timing.settle / 2, Due::Everything);
        schedule.change(start + timing.settle / 2, Due::Holdings);
        assert_eq!(schedule.next(), start + timing.settle, "the first change counts");
        assert_eq!(schedule.due(schedule.next()), Some(Due::Everything));
        let said = start + timing.settle;
        assert_eq!(schedule.due(said), None);
        assert_eq!(schedule.next(), said + timing.announce_every);
        assert_eq!(schedule.due(schedule.next()), Some(Due::Holdings));
    }

    #[test]
    fn a_busy_node_keeps_a_pace_that_others_heed() {
        let start = Instant::now();
        let timing = Timing::default();
        let mut schedule = Schedule::new(timing, start);
        let mut messages = 0;
        // Something changes every millisecond, and each time there is much to say.
        for ms in 0..GOSSIP_WINDOW.as_millis() as u64 {
            let now = start + Duration::from_millis(ms);
            schedule.change(now, Due::Everything);
            if schedule.due(now).is_some() {
                messages += 7;
                schedule.said(now, 7);
            }
        }
        assert!(messages > 50 && messages < GOSSIP_PER_WINDOW_MAX as usize, "{messages}");
    }

    #[test]
    fn a_flooder_is_not_heeded_and_others_are() {
        let now = Instant::now();
        let (flooder, other) = (PeerId::from_seed([1; 32]), PeerId::from_seed([2; 32]));
        let mut inbox = Inbox::new(now);
        let heeded = (0..1000).filter(|_| inbox.admit(now, flooder)).count();
        assert_eq!(heeded, GOSSIP_PER_WINDOW_MAX as usize);
        assert!(inbox.admit(now, other));
        assert!(inbox.admit(now + GOSSIP_WINDOW, flooder));
    }

    #[test]
    fn sequences_grow_even_if_the_clock_does_not() {
        let mut sequence = Sequence::default();
        assert_eq!([5, 5, 3, 9].map(|ms| sequence.next(ms)), [5, 6, 7, 9]);
    }

    #[test]
    fn large_holdings_are_split_into_messages_that_fit() {
        let peer = PeerId::from_seed([1; 32]);
        let models: Vec<ModelHoldings> = (0..150u32)
            .map(|index| ModelHoldings {
                model: ModelId::of(&index.to_le_bytes()),
                manifest: true,
                objects: vec![0xff; if index < 40 { BITMAP_BYTES_MAX } else { 3 }],
                parts: (0..index % 4 * 2)
                    .map(|object| PartHoldings {
                        object: 60_000 + object,
                        chunks: Chunks(u64::MAX),
                    })
                    .collect(),
                helps: index % 2 == 0,
                pins: index % 3 == 0,
            })
            .collect();
        let addresses = [
            "/ip4/127.0.0.1/tcp/1",
            "/ip4/10.0.0.1/tcp/2/ws",
            "/ip4/10.0.0.1/tcp/1",
            "/ip4/10.0.0.1/udp/1/quic-v1",
        ]
        .map(|a| a.parse().unwrap());
        let mut sequence = 0;
        let author = || {
            let offer = Offer::default();
            Author { peer, run: 5, lease: LEASE, offer, addresses: &addresses }
        };
        let messages = holdings_messages(author(), models.clone(), || {
            sequence += 1;
            sequence
        });
        let mut seen = Vec::new();
        for (index, message) in messages.iter().enumerate() {
            assert!(message.len() <= ENVELOPE_BYTES_MAX);
            let Ok(Envelope::Holdings(holdings)) = Envelope::decode(message) else { panic!() };
            assert_eq!(holdings.sequence, index as u64 + 1);
            assert_eq!(holdings.run, 5);
            let best_first =
                ["/ip4/10.0.0.1/udp/1/quic-v1", "/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/2/ws"];
            assert_eq!(holdings.addresses, best_first);
            seen.extend(holdings.models);
        }
        assert_eq!(seen, models);
        let nothing = holdings_messages(author(), Vec::new(), || 1);
        let [nothing] = &nothing[..] else { panic!("{} messages", nothing.len()) };
        let Ok(Envelope::Holdings(nothing)) = Envelope::decode(nothing) else { panic!() };
        assert_eq!((nothing.addresses.len(), nothing.models.len()), (3, 0), "it is there");
    }
}
