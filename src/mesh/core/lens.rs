//! The copies of many objects at one time: what each peer says of a model is looked up once, not once
//! for each object.
//!
//! Invariant: says of an object what asking for it alone would say.

use std::collections::BTreeMap;
use std::time::Instant;

use doppler_ids::{ModelId, PeerId, ShardId};
use doppler_store::groups::Chunks;

use super::membership::Held;
use super::{Core, Kept, Replicas};

/// What one peer says of a model.
struct Word<'a> {
    peer: PeerId,
    held: &'a Held,
    /// It counts as a holder; it lives, but leaves.
    stays: bool,
    leaves: bool,
}

/// A peer's copy of an object.
struct Copy {
    peer: PeerId,
    chunks: Chunks,
    stays: bool,
    leaves: bool,
    is_pinned: bool,
}

/// What a core knows at one time of the copies of objects.
pub struct Lens<'a> {
    core: &'a Core,
    now: Instant,
    since: Option<Instant>,
    words: BTreeMap<ModelId, Vec<Word<'a>>>,
}

impl Core {
    /// With `since`, only peers that have said since then what they hold count as holders.
    pub const fn lens(&self, now: Instant, since: Option<Instant>) -> Lens<'_> {
        Lens { core: self, now, since, words: BTreeMap::new() }
    }
}

impl<'a> Lens<'a> {
    fn word(&self, peer: PeerId, held: &'a Held) -> Word<'a> {
        let Self { core, now, since, .. } = *self;
        let spoke =
            since.is_none_or(|since| core.membership.told(peer).is_some_and(|at| at > since));
        let lives = core.lives(now, peer);
        let is_leaving = core.membership.is_leaving(peer);
        let is_other = peer != core.config.own;
        let stays = is_other && lives && !is_leaving && spoke;
        Word { peer, held, stays, leaves: lives && is_leaving }
    }

    /// What live and other peers say of a model, in the order of their ids.
    fn words(&mut self, model: ModelId) -> &[Word<'a>] {
        if !self.words.contains_key(&model) {
            let entries = self.core.membership.entries_of(self.now, model);
            let words = entries.map(|(peer, held)| self.word(peer, held)).collect();
            self.words.insert(model, words);
        }
        self.words.get(&model).map_or(&[], Vec::as_slice)
    }

    /// The copies of an object, whole or not, in the order of the peers; and how many peers keep
    /// reading it.
    fn copies(&mut self, shard: ShardId) -> (Vec<Copy>, usize) {
        let copy = |word: &Word<'_>, chunks| Copy {
            peer: word.peer,
            chunks,
            stays: word.stays,
            leaves: word.leaves,
            is_pinned: word.held.pins(),
        };
        let manifest = self.words(ModelId::from(*shard.as_bytes())).iter();
        let manifest = manifest.filter(|word| word.held.has_manifest());
        let mut copies: Vec<Copy> = manifest.map(|word| copy(word, Chunks::ALL)).collect();
        let mut heat = 0;
        for (model, bit) in self.core.membership.places(shard) {
            let words = self.words(*model);
            heat = heat.max(words.iter().filter(|word| word.held.is_hot(*bit)).count());
            let held = words.iter().map(|word| (word, word.held.chunks(*bit)));
            let held = held.filter(|(_, chunks)| !chunks.is_none()).map(|(word, chunks)| {
                let whole = word.held.has_whole(*bit);
                Copy { is_pinned: word.held.pins() && whole, ..copy(word, chunks) }
            });
            copies.extend(held);
        }
        copies.sort_by_key(|copy| copy.peer);
        copies.dedup_by(|same, first| {
            let is_same = same.peer == first.peer;
            if is_same {
                first.chunks = first.chunks.or(same.chunks);
                first.is_pinned |= same.is_pinned;
            }
            is_same
        });
        (copies, heat)
    }

    /// An object, with its size in bytes, as healing sees it. A peer that has been disconnected for
    /// a while, is about to leave, or is shunned does not count as a holder.
    pub fn kept(&mut self, (shard, size): (ShardId, u64), replicas: Replicas) -> Kept {
        let (mut copies, heat) = self.copies(shard);
        copies.retain(|copy| copy.chunks == Chunks::ALL);
        let stay = || copies.iter().filter(|copy| copy.stays);
        Kept {
            shard,
            size,
            replicas,
            holders: stay().map(|copy| copy.peer).collect(),
            leaving: copies.iter().filter(|copy| copy.leaves).count(),
            helpers: None,
            heat: heat + usize::from(self.core.heat.is_hot(self.now, shard)),
            is_pinned_elsewhere: stay().any(|copy| copy.is_pinned),
            is_here: self.core.whole.contains(&shard),
            is_replica: false,
        }
    }
}
