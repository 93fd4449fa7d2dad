//! The rules that every run is held to.

use doppler_ids::{ByteRange, ShardId};
use doppler_mesh::wire::{Envelope, Holdings, ModelHoldings};
use doppler_store::groups::CHUNK_BYTES;
use doppler_store::verified::GROUP_BYTES;

use crate::node::{Node, Purpose, Reading};
use crate::work::REACH;
use crate::world::World;

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

    /// Bounds and deadlines, once a second.
    pub(crate) fn check(&mut self) {
        for node in 0..self.nodes.len() {
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
        let open = |node: &Node| node.reads.values().any(|r| r.purpose == Purpose::Probe);
        if let Some(node) = self.nodes.iter().position(open) {
            self.violate("reach", format!("node {node} still reads at the end"));
        }
    }
}
