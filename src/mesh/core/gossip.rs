//! What this node tells the swarm and when, and how many messages of others it accepts. Pure: the
//! time is an argument.
//!
//! Invariants: changes are announced once they have settled; everything is announced again every
//! `announce_every`; between two messages of this node there is at most the pause that it
//! promised in the first; no author gets more messages accepted than the window allows.

use std::time::{Duration, Instant};

use doppler_ids::{Address, PeerId};

use super::limits::{
    CROWD, CROWD_CHANGES, GOSSIP_PAUSE, GOSSIP_PER_WINDOW_MAX, GOSSIP_WINDOW,
    HOLDINGS_BYTES_TARGET, LISTENER_REST, LISTENERS_FEW, PEERS_REMEMBERED_MAX, Timing,
};
use super::peers::{DigestMap, digest};
use crate::wire::{
    ADDRESS_BYTES_MAX, ADDRESSES_MAX, Envelope, HOLDINGS_MODELS_MAX, Holdings, ModelHoldings, Stamp,
};

/// A model's entry costs this much beyond its bitmap: id, flag and framing.
const ENTRY_BYTES: usize = 48;

/// And each partially held object costs this much.
const PART_BYTES: usize = 16;

/// And each object that is named as often read.
const HOT_BYTES: usize = 3;

/// What is due to be announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    /// Only that this node is there.
    Heartbeat,
    /// Holdings, and models that nobody announced recently: in rounds of anti-entropy, and when
    /// holdings have changed.
    Holdings,
    /// The same, and it does not wait: others do not know of an interest of this node.
    Introduction,
    /// Everything at once: a peer listens that did not.
    Meeting,
    /// Everything at once: a model was published or registered.
    Everything,
}

/// When to announce.
pub(super) struct Schedule {
    timing: Timing,
    round: Instant,
    changed: Option<(Instant, Due)>,
    /// Nothing is announced before this, whatever changes. The last announcement sets the pace.
    quiet_until: Instant,
    /// When something was last announced.
    said_at: Option<Instant>,
    /// Since this node was last alone, somebody has listened to holdings; and to some at a crowd's pace.
    was_heard: bool,
    is_told: bool,
    /// The pause after which this node says at least that it is there, and when that is.
    beat: Duration,
    beat_at: Instant,
    /// The time between two rounds, and the least time between two changes.
    every: Duration,
    rest: Duration,
    rest_until: Instant,
}

impl Schedule {
    pub(super) fn new(timing: Timing, now: Instant) -> Self {
        let beat = timing.beat(1);
        let round = now + timing.announce_every;
        Self {
            timing,
            round,
            changed: None,
            quiet_until: now,
            said_at: None,
            was_heard: false,
            is_told: false,
            beat,
            beat_at: now + beat,
            every: timing.announce_every,
            rest: Duration::ZERO,
            rest_until: now,
        }
    }

    /// Sets the pace of a swarm of so many members. What was promised at a faster one is kept, and what
    /// was planned at a slower one comes sooner.
    pub(super) fn set_pace(&mut self, now: Instant, members: usize) {
        self.beat = self.timing.beat(members);
        self.every = self.timing.round(members);
        self.beat_at = self.beat_at.min(now + self.beat);
        self.round = self.round.min(now + self.every);
        self.rest = if members > CROWD { self.every / CROWD_CHANGES } else { Duration::ZERO };
        // Gossip takes what a crowd was told to all of it, those that were met since then, too. What was told
        // before the pace was known is told once more, when the next word was promised.
        if members > CROWD && self.was_heard {
            self.changed = self.changed.filter(|(_, due)| *due != Due::Meeting);
            if !self.is_told {
                self.round = self.round.min(self.beat_at);
            }
        }
    }

    /// Whether a message may be sent that cannot wait for changes to settle.
    pub(super) fn may_say(&self, now: Instant) -> bool {
        self.quiet_until <= now
    }

    pub(super) const fn beat(&self) -> Duration {
        self.beat
    }

    /// This node is doubted, so it says that it is there by then.
    pub(super) fn beat_by(&mut self, at: Instant) {
        self.beat_at = self.beat_at.min(at);
    }

    /// Call when something changed. It is due after `settle`, counted from the first such change.
    pub(super) fn change(&mut self, now: Instant, what: Due) {
        let settled = now + self.timing.settle;
        let (at, due) = self.changed.map_or((settled, what), |(at, due)| (at.min(settled), due));
        let rest = if what == Due::Holdings { self.rest_until } else { now };
        self.changed = Some((at.max(self.quiet_until).max(rest), due.max(what)));
    }

    /// Call when somebody listens who did not, beside so many others. Everything is due, but to many not at
    /// once; and of what was due before anybody listened, nothing sooner: the first that speaks to a newcomer
    /// tells it the pace.
    pub(super) fn meet(&mut self, now: Instant, listeners: usize) {
        if listeners == 0 {
            (self.was_heard, self.is_told, self.changed) = (false, false, None);
        }
        let said_at = self.said_at.filter(|_| listeners >= LISTENERS_FEW);
        let rested = said_at.map_or(now, |said_at| now.max(said_at + LISTENER_REST));
        self.change(rested, Due::Meeting);
    }

    /// Call when this many messages were sent. A proportional pause keeps this node's rate well
    /// below what others accept.
    pub(super) fn said(&mut self, now: Instant, messages: usize) {
        let pause = GOSSIP_PAUSE.saturating_mul(u32::try_from(messages).unwrap_or(u32::MAX));
        self.quiet_until = now + pause;
        self.said_at = Some(now);
    }

    /// Call when holdings were announced to so many listeners: in a crowd, the next change waits.
    pub(super) fn said_holdings(&mut self, now: Instant, listeners: usize) {
        self.rest_until = now + self.rest;
        self.was_heard |= listeners > 0;
        self.is_told |= listeners > 0 && !self.rest.is_zero();
    }

    /// When `due` should be asked next.
    pub(super) fn next(&self) -> Instant {
        let next = self.round.min(self.beat_at);
        self.changed.map_or(next, |(at, _)| at.min(next))
    }

    /// Takes what is due now.
    pub(super) fn due(&mut self, now: Instant) -> Option<Due> {
        let changed = self.changed.filter(|(at, _)| *at <= now).map(|(_, due)| due);
        let round = (self.round <= now).then_some(Due::Holdings);
        let beat = (self.beat_at <= now).then_some(Due::Heartbeat);
        let due = changed.max(round).or(beat)?;
        self.beat_at = now + self.beat;
        if due > Due::Heartbeat {
            let waiting = self.changed.take().map(|(_, due)| due);
            self.round = now + self.every;
            return Some(waiting.map_or(due, |waiting| waiting.max(due)));
        }
        Some(due)
    }
}

/// Counts messages per author over a window.
pub(super) struct Inbox {
    window_ends: Instant,
    counts: DigestMap<u32>,
}

impl Inbox {
    pub(super) fn new(now: Instant) -> Self {
        Self { window_ends: now + GOSSIP_WINDOW, counts: DigestMap::default() }
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
        let author = digest(author);
        if self.counts.len() >= PEERS_REMEMBERED_MAX && !self.counts.contains_key(&author) {
            return false;
        }
        let count = self.counts.entry(author).or_insert(0);
        *count = count.saturating_add(1);
        *count <= GOSSIP_PER_WINDOW_MAX
    }
}

/// Numbers this node's messages of one epoch.
#[derive(Debug)]
pub(super) struct Numbers(Stamp);

impl Numbers {
    pub(super) const fn new(epoch: u64) -> Self {
        Self(Stamp { epoch, sequence: 0 })
    }

    pub(super) fn next(&mut self) -> Stamp {
        self.0.sequence += 1;
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
    /// It speaks again within this time.
    pub(super) next: Duration,
    pub(super) offer: Offer,
    pub(super) addresses: &'a [Address],
}

/// Packs holdings into as few messages as possible. A node that holds nothing says so, too: its
/// message tells others that it exists, and its addresses.
pub(super) fn holdings_messages(
    author: Author<'_>,
    models: Vec<ModelHoldings>,
    numbers: &mut Numbers,
) -> Vec<Vec<u8>> {
    let addresses = worth_saying(author.addresses);
    let mut batches: Vec<Vec<ModelHoldings>> = Vec::new();
    let mut bytes = usize::MAX;
    for model in models {
        let named = PART_BYTES * model.parts.len() + HOT_BYTES * model.hot.len();
        let cost = ENTRY_BYTES + model.objects.len() + named;
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
            stamp: numbers.next(),
            lease: author.lease,
            next: author.next,
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
    use super::super::limits::CROWD_SHARE;
    use super::*;
    use crate::wire::{BITMAP_BYTES_MAX, ENVELOPE_BYTES_MAX, HOT_MAX, PartHoldings};
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
        schedule.set_pace(said, 100);
        assert_eq!(schedule.due(schedule.next()), Some(Due::Heartbeat));
        assert_eq!(schedule.next(), said + timing.announce_every);
        assert_eq!(schedule.due(schedule.next()), Some(Due::Holdings));
    }

    #[test]
    fn one_that_meets_many_says_everything_once_a_second_and_to_a_few_at_once() {
        let start = Instant::now();
        let timing = Timing::default();
        let said_within_two_seconds = |first: usize| {
            let mut schedule = Schedule::new(timing, start);
            // It meets somebody every tenth of a second.
            let meetings = (0..20).map(|tenth| start + Duration::from_millis(100 * tenth as u64));
            let mut said = 0;
            for (number, now) in meetings.enumerate() {
                if schedule.next() <= now && schedule.due(now) == Some(Due::Meeting) {
                    schedule.said(now, 1);
                    said += 1;
                }
                schedule.meet(now, first + number);
            }
            said
        };
        assert_eq!(said_within_two_seconds(LISTENERS_FEW), 2);
        let mut schedule = Schedule::new(timing, start);
        schedule.said(start, 1);
        schedule.meet(start, LISTENERS_FEW);
        assert_eq!(schedule.next(), start + LISTENER_REST + timing.settle);
        schedule.meet(start + timing.settle, LISTENERS_FEW - 1);
        assert_eq!(schedule.next(), start + 2 * timing.settle, "what may come sooner does");
    }

    #[test]
    fn a_newcomer_tells_a_crowd_once_what_it_holds() {
        let start = Instant::now();
        let timing = Timing::default();
        let at = |ms| start + Duration::from_millis(ms);
        // It starts, meets four one after another, and hears from them how many there are; or it is too late
        // for its first words when it hears that, and says so again.
        let said = |paced_at: u64, members: usize| -> Vec<u64> {
            let mut schedule = Schedule::new(timing, start);
            schedule.change(start, Due::Everything);
            let mut said = Vec::new();
            for ms in 0..5000u64 {
                if [100, 150, 400, 900].contains(&ms) {
                    let listeners = [100, 150, 400, 900].iter().filter(|at| **at < ms).count();
                    schedule.meet(at(ms), listeners);
                }
                if schedule.next() > at(ms) {
                    continue;
                }
                schedule.set_pace(at(ms), if ms < paced_at { 5 } else { members });
                if schedule.due(at(ms)).is_some_and(|due| due > Due::Heartbeat) {
                    schedule.said(at(ms), 1);
                    schedule.said_holdings(at(ms), usize::from(ms >= 100));
                    said.push(ms);
                }
            }
            said
        };
        assert_eq!(said(0, 1000), [300], "not before somebody listens");
        // The first whole millisecond after.
        let promised = 300 + timing.beat(5).as_millis() as u64 + 1;
        assert_eq!(said(500, 1000), [300, promised]);
        assert_eq!(said(0, 10), [300, 600, 1100], "in a small swarm each is told");
    }

    #[test]
    fn in_a_crowd_all_together_say_as_much_as_a_few() {
        let start = Instant::now();
        let timing = Timing::default();
        let said_by_all = |members: usize| {
            let mut schedule = Schedule::new(timing, start);
            schedule.set_pace(start, members);
            let (mut now, mut said) = (start, 0);
            while now < start + Duration::from_secs(36_000) {
                // Its holdings change all the time.
                schedule.change(now, Due::Holdings);
                now = schedule.next();
                if let Some(due) = schedule.due(now) {
                    said += 1;
                    schedule.said(now, 1);
                    if due > Due::Heartbeat {
                        schedule.said_holdings(now, 9);
                    }
                }
            }
            (said * members) as f64 / 36_000.0
        };
        let most = f64::from(CROWD_CHANGES + 2) / CROWD_SHARE.as_secs_f64();
        for members in [300, 1000, 10_000] {
            let a_second = said_by_all(members);
            assert!(a_second < most, "{members} members say {a_second} messages a second");
        }
        let idle = timing.round(10_000).as_secs_f64();
        assert!(10_000.0 / idle <= 6.0 && timing.lease_in(10_000).as_secs_f64() > 3.0 * idle);
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
    fn a_later_run_is_newer_whatever_an_earlier_one_said() {
        let (mut earlier, mut later) = (Numbers::new(7), Numbers::new(8));
        let last = (0..1000).map(|_| earlier.next()).max();
        assert_eq!(last, Some(Stamp { epoch: 7, sequence: 1000 }));
        assert!(Some(later.next()) > last && later.next() > Stamp { epoch: 8, sequence: 1 });
    }

    #[test]
    fn between_two_messages_there_is_at_most_the_promised_pause() {
        let start = Instant::now();
        let timing = Timing::default();
        let mut schedule = Schedule::new(timing, start);
        let beat = timing.beat(10);
        schedule.set_pace(start, 10);
        let (mut last, mut said) = (start, Vec::new());
        while last < start + 3 * timing.announce_every {
            let now = schedule.next();
            assert!(now <= last + beat, "{:?}", now - last);
            said.extend(schedule.due(now));
            last = now;
        }
        let rounds = said.iter().filter(|due| **due == Due::Holdings).count();
        let beats = said.iter().filter(|due| **due == Due::Heartbeat).count();
        assert!(rounds == 3 && (6..=9).contains(&beats), "{said:?}");
        // A doubted node says so at once, even while it pauses.
        schedule.said(last, 64);
        schedule.change(last, Due::Holdings);
        schedule.beat_by(last);
        assert_eq!((schedule.due(last), schedule.due(last)), (Some(Due::Heartbeat), None));
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
                hot: vec![65_535; if index % 3 == 0 { HOT_MAX } else { 0 }],
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
        let mut numbers = Numbers::new(3);
        let author = || {
            let (offer, next) = (Offer::default(), Duration::from_secs(4));
            Author { peer, run: 5, lease: LEASE, next, offer, addresses: &addresses }
        };
        let messages = holdings_messages(author(), models.clone(), &mut numbers);
        let mut seen = Vec::new();
        for (index, message) in messages.iter().enumerate() {
            assert!(message.len() <= ENVELOPE_BYTES_MAX);
            let Ok(Envelope::Holdings(holdings)) = Envelope::decode(message) else { panic!() };
            assert_eq!(holdings.stamp, Stamp { epoch: 3, sequence: index as u64 + 1 });
            assert_eq!((holdings.run, holdings.next), (5, Duration::from_secs(4)));
            let best_first =
                ["/ip4/10.0.0.1/udp/1/quic-v1", "/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/2/ws"];
            assert_eq!(holdings.addresses, best_first);
            seen.extend(holdings.models);
        }
        assert_eq!(seen, models);
        let nothing = holdings_messages(author(), Vec::new(), &mut numbers);
        let [nothing] = &nothing[..] else { panic!("{} messages", nothing.len()) };
        let Ok(Envelope::Holdings(nothing)) = Envelope::decode(nothing) else { panic!() };
        assert_eq!((nothing.addresses.len(), nothing.models.len()), (3, 0), "it is there");
    }
}
