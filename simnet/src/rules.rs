//! The rules that every run is held to.

use doppler_ids::{ByteRange, PeerId, ShardId};
use doppler_mesh::Twin;
use doppler_mesh::core::{Kept, Replicas};
use doppler_mesh::wire::{Envelope, Holdings, ModelHoldings};
use doppler_store::groups::CHUNK_BYTES;
use doppler_store::verified::GROUP_BYTES;

use crate::heal::Healed;
use crate::node::{Node, Purpose, Reading};
use crate::options::{SECOND, Scenario};
use crate::work::REACH;
use crate::world::World;

/// How long a lease lasts: `Timing::lease`.
const LEASE: u64 = 35 * SECOND;
/// How long the dead may be counted on in a swarm that nothing else disturbs.
const DEAD_WITHIN: u64 = 10 * SECOND;
/// Nodes looked at each second.
const MANY: usize = 100;
/// How long an object may have too few copies, and a node one too many, after the faults.
const HEALED_WITHIN: u64 = 120 * SECOND;
const TRIMMED_WITHIN: u64 = 120 * SECOND;

impl World {
    /// No wrong byte is accepted, and a read brings its range, each byte once.
    pub(crate) fn check_read(&mut self, node: usize, reading: &Reading) {
        let shard = reading.shard.short();
        if reading.parts.values().any(|part| part.is_wrong) {
            self.violate("wrong byte", format!("node {node} accepted wrong bytes of {shard}"));
        }
        let mut ranges: Vec<ByteRange> = reading.parts.values().map(|part| part.range).collect();
        ranges.sort_by_key(ByteRange::start);
        let mut end = reading.range.start() / GROUP_BYTES * GROUP_BYTES;
        for range in ranges {
            if range.start() != end {
                let what =
                    format!("node {node}: {shard} {}: {range} follows byte {end}", reading.range);
                return self.violate("coverage", what);
            }
            end = range.end();
        }
        if end < reading.range.end() {
            let what = format!("node {node}: {shard} {} ends at byte {end}", reading.range);
            self.violate("coverage", what);
        }
    }

    /// No last copy is dropped.
    pub(crate) fn check_last_copy(&mut self, node: usize, shard: ShardId) {
        let elsewhere = self
            .nodes
            .iter()
            .enumerate()
            .any(|(other, this)| other != node && this.disk.is_sound(shard));
        if self.nodes[node].disk.is_sound(shard) && !elsewhere {
            let what = format!("node {node} dropped {}, which nobody else has", shard.short());
            self.violate("last copy", what);
        }
    }

    /// No honest node says of itself what is not so.
    pub(crate) fn check_word(&mut self, node: usize, data: &[u8]) {
        let this = &self.nodes[node];
        if !this.is_honest() {
            return;
        }
        let false_word = match Envelope::decode(data) {
            Err(error) => Some(error.to_string()),
            // Doubts are of others, and may be mistaken.
            Ok(Envelope::Doubt(_)) => None,
            Ok(Envelope::Heartbeat { stamp, .. } | Envelope::Goodbye(stamp)) => {
                (stamp.epoch != this.epoch).then(|| "it speaks as of another run".to_owned())
            }
            Ok(Envelope::Unknown) => Some("it says nothing".to_owned()),
            Ok(Envelope::Announcement(signed)) => signed.verify().err().map(|e| e.to_string()),
            Ok(Envelope::Holdings(holdings)) => self.false_holding(this, &holdings),
        };
        if let Some(what) = false_word {
            self.violate("false word", format!("node {node}: {what}"));
        }
    }

    fn false_holding(&self, this: &Node, holdings: &Holdings) -> Option<String> {
        if holdings.peer != this.id.as_bytes() {
            return Some("it speaks for another".to_owned());
        }
        if holdings.stamp.epoch != this.epoch {
            return Some("it speaks as of another run".to_owned());
        }
        holdings.models.iter().find_map(|entry| self.false_entry(this, entry))
    }

    fn false_entry(&self, this: &Node, entry: &ModelHoldings) -> Option<String> {
        let model = self.models.iter().find(|model| model.id == entry.model);
        let Some(model) = model else { return Some(format!("{} is no model", entry.model)) };
        if entry.manifest && !this.disk.is_whole(model.id.manifest()) {
            return Some("it has no manifest".to_owned());
        }
        for bit in 0..entry.objects.len() * 8 {
            if entry.objects[bit / 8] >> (bit % 8) & 1 == 0 {
                continue;
            }
            if !model.objects.get(bit).is_some_and(|shard| this.disk.is_whole(*shard)) {
                return Some(format!("it does not hold object {bit}"));
            }
        }
        for part in &entry.parts {
            let shard = *model.objects.get(part.object as usize)?;
            let size = self.objects.get(&shard)?.size;
            let chunks = (0..size.div_ceil(CHUNK_BYTES)).filter(|c| part.chunks.0 >> c & 1 == 1);
            for chunk in chunks {
                let start = chunk * CHUNK_BYTES;
                let range = ByteRange::new(start, (start + CHUNK_BYTES).min(size))?;
                if !this.disk.holds(shard, range) {
                    return Some(format!("it does not hold {range} of object {}", part.object));
                }
            }
        }
        None
    }

    /// Only who lied is banned.
    pub(crate) fn check_ban(&mut self, node: usize, other: usize, detail: &str) {
        if !self.nodes[other].was_dishonest {
            self.violate("ban", format!("node {node} banned {other}, which is honest: {detail}"));
        }
    }

    /// Only who lied is taken for two nodes: nobody else's identity is used twice.
    pub(crate) fn check_twin(&mut self, node: usize, twin: &Twin) {
        let other = self.by_peer.get(&twin.peer).copied();
        if other.is_none_or(|other| !self.nodes[other].was_dishonest) {
            self.violate("twin", format!("node {node} took {} for two nodes", twin.peer));
        }
    }

    /// Only what a liar says is found unsound.
    pub(crate) fn check_judgement(&mut self, node: usize) {
        let author = self
            .hearing
            .as_ref()
            .and_then(|(message, _)| self.by_peer.get(&message.author).copied());
        if let Some(author) = author
            && !self.nodes[author].was_dishonest
        {
            self.violate("judged", format!("node {node} found {author}'s word unsound"));
        }
    }

    /// Whoever is killed counts for nobody any more after ten seconds.
    fn check_dead(&mut self) {
        let Healed { died, noticed, .. } = self.healed;
        // In a crowd, most know nothing of the dead, and leases are long.
        let is_small = self.options.scenario != Scenario::Models;
        if is_small && died > 0 && noticed == 0 && self.now >= died + DEAD_WITHIN {
            self.violate("dead", "after ten seconds somebody counts on the dead".to_owned());
        }
    }

    /// No lease is believed after its end: whoever went longer ago holds nothing.
    fn check_leases(&mut self) {
        // In a crowd leases are longer.
        if self.options.scenario == Scenario::Models {
            return;
        }
        // A last word may have been some seconds on its way; a flooder's lease may be longer.
        let longest = LEASE + 10 * SECOND;
        let down = |node: &Node| {
            !node.was_dishonest && node.down_since.is_some_and(|t| self.now > t + longest)
        };
        let gone: Vec<PeerId> =
            self.nodes.iter().filter(|node| down(node)).map(|node| node.id).collect();
        let now = self.instant(self.now);
        let believed = self.nodes.iter().enumerate().find_map(|(node, this)| {
            let core = this.core.as_ref()?;
            let peer = gone.iter().find(|peer| core.standing(now, **peer).held > 0)?;
            Some((node, *peer))
        });
        if let Some((node, peer)) = believed {
            let peer = self.by_peer.get(&peer).copied().unwrap_or_default();
            self.violate("lease", format!("node {node} believes {peer}, which is long gone"));
        }
    }

    /// Once the faults have stopped every object has enough copies again, and not too many, after
    /// a while.
    fn check_copies(&mut self) {
        let is_large = matches!(self.options.scenario, Scenario::Crowd | Scenario::Models);
        if self.now < self.options.safety() || is_large {
            return;
        }
        for shard in self.objects.keys().copied().collect::<Vec<_>>() {
            let lacks = self.lacks(shard);
            let since = *self.lacking.entry(shard).or_insert(self.now);
            if !lacks {
                self.lacking.remove(&shard);
            } else if self.now > since + HEALED_WITHIN {
                let what = format!("{} has too few copies for two minutes", shard.short());
                self.violate("lack", what);
            }
            for node in 0..self.nodes.len() {
                let is_surplus = self.is_surplus(node, shard);
                let since = *self.surplus.entry((node, shard)).or_insert(self.now);
                if !is_surplus {
                    self.surplus.remove(&(node, shard));
                } else if self.now > since + TRIMMED_WITHIN {
                    let what = format!("node {node} keeps a copy too many of {}", shard.short());
                    self.violate("surplus", what);
                }
            }
        }
    }

    /// Fewer nodes hold it than should, though another could.
    fn lacks(&self, shard: ShardId) -> bool {
        let stays = |node: &&Node| node.is_up() && node.leaves_since.is_none();
        let holders = self.nodes.iter().filter(stays).filter(|node| node.disk.is_whole(shard));
        let held = self.nodes.iter().any(|node| node.is_up() && node.disk.is_sound(shard));
        let size = self.size(shard);
        let could = |node: &Node| {
            let room = node.healing.as_ref().map_or(0, |healing| healing.room());
            let fits = node.disk.used() + size <= node.disk.budget();
            !node.disk.is_whole(shard) && room >= size && fits
        };
        held && holders.count() < self.replicas.min && self.nodes.iter().filter(stays).any(could)
    }

    /// A node holds a copy that the swarm does not need, and all others think so, too.
    fn is_surplus(&self, node: usize, shard: ShardId) -> bool {
        let this = &self.nodes[node];
        let Some(core) = this.core.as_ref().filter(|_| this.disk.is_replica(shard)) else {
            return false;
        };
        let copies = self.nodes.iter().filter(|n| n.is_up() && n.disk.is_whole(shard)).count();
        let kept = core.kept(self.instant(self.now), (shard, 0), self.replicas, None);
        let needed = Kept {
            replicas: Replicas { min: self.replicas.max, max: self.replicas.max },
            is_replica: true,
            ..kept
        };
        copies > self.replicas.max && needed.may_go(this.id)
    }

    /// Bounds and deadlines, once a second.
    pub(crate) fn check(&mut self) {
        self.note_noticed();
        self.check_dead();
        self.check_leases();
        self.check_copies();
        self.check_models();
        // Of very many nodes, some each time.
        let step = self.nodes.len().div_ceil(MANY);
        let first = (self.now / SECOND) as usize % step;
        for node in (first..self.nodes.len()).step_by(step) {
            let this = &self.nodes[node];
            let (used, budget) = (this.disk.used(), this.disk.budget());
            if used > budget {
                let what = format!("node {node} stores {used} bytes of {budget} allowed");
                self.violate("budget", what);
            }
            let this = &self.nodes[node];
            let Some(core) = &this.core else { continue };
            let full = core.census().into_iter().find(|fill| fill.len > fill.max);
            let late = this.reads.values().find(|reading| {
                reading.purpose == Purpose::Probe && self.now > reading.began + REACH
            });
            let late = late.map(|reading| reading.shard.short());
            if let Some(fill) = full {
                let what = format!("node {node}: {} {} of {}", fill.what, fill.len, fill.max);
                self.violate("bound", what);
            }
            if let Some(shard) = late {
                let what = format!("node {node} has waited for {shard} for more than 60 s");
                self.violate("reach", what);
            }
        }
    }

    /// At the end every read that had to end has.
    pub(crate) fn check_end(&mut self) {
        self.check();
        self.count_cost();
        let open = |node: &Node| node.reads.values().any(|r| r.purpose == Purpose::Probe);
        if let Some(node) = self.nodes.iter().position(open) {
            self.violate("reach", format!("node {node} still reads at the end"));
        }
    }
}
