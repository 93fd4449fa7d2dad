//! Which objects this node keeps reading from peers, so that the swarm makes more copies of them.
//! Pure: the time is an argument.
//!
//! Counts reads for tokens and ahead of them, halved every [`HEAT_HALVES`]. Invariant: at most
//! [`HEAT_MAX`] objects are counted; an object that is not read any more cools down.

use std::collections::BTreeMap;
use std::time::Instant;

use doppler_ids::ShardId;

use super::limits::{HEAT_HALVES, HEAT_MAX, HOT_READS};

/// Reads of an object, as of a time.
#[derive(Debug, Clone, Copy)]
struct Count {
    reads: u32,
    at: Instant,
}

impl Count {
    /// The count now. Whole halvings only, so that every machine counts the same.
    fn now(self, now: Instant) -> Self {
        let elapsed = now.saturating_duration_since(self.at).as_millis();
        let halvings = u32::try_from(elapsed / HEAT_HALVES.as_millis()).unwrap_or(u32::MAX);
        let reads = self.reads.checked_shr(halvings).unwrap_or(0);
        Self { reads, at: self.at + HEAT_HALVES.saturating_mul(halvings) }
    }
}

/// Reads by object.
#[derive(Debug, Default)]
pub(super) struct Heat {
    counts: BTreeMap<ShardId, Count>,
}

impl Heat {
    /// Call when a read begins for which a token waits, or soon will.
    pub(super) fn read(&mut self, now: Instant, shard: ShardId) {
        if self.counts.len() >= HEAT_MAX && !self.counts.contains_key(&shard) {
            self.counts.retain(|_, count| count.now(now).reads > 0);
            let coldest = self.counts.iter().min_by_key(|(_, count)| count.now(now).reads);
            if let Some(coldest) = coldest.map(|(shard, _)| *shard)
                && self.counts.len() >= HEAT_MAX
            {
                self.counts.remove(&coldest);
            }
        }
        let count = self.counts.entry(shard).or_insert(Count { reads: 0, at: now });
        *count = count.now(now);
        count.reads = count.reads.saturating_add(1);
    }

    pub(super) fn is_hot(&self, now: Instant, shard: ShardId) -> bool {
        self.counts.get(&shard).is_some_and(|count| count.now(now).reads >= HOT_READS)
    }

    /// The objects that are hot, the hottest first.
    pub(super) fn hottest(&self, now: Instant) -> Vec<ShardId> {
        let hot = self.counts.iter().map(|(shard, count)| (count.now(now).reads, *shard));
        let mut hot: Vec<(u32, ShardId)> = hot.filter(|(reads, _)| *reads >= HOT_READS).collect();
        hot.sort_unstable_by(|one, other| other.cmp(one));
        hot.into_iter().map(|(_, shard)| shard).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.counts.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(index: usize) -> ShardId {
        ShardId::of(&index.to_le_bytes())
    }

    #[test]
    fn what_is_read_again_and_again_is_hot_until_it_is_not_read_any_more() {
        let start = Instant::now();
        let mut heat = Heat::default();
        for _ in 1..HOT_READS {
            heat.read(start, shard(1));
        }
        assert!(!heat.is_hot(start, shard(1)) && heat.hottest(start).is_empty());
        heat.read(start, shard(1));
        (0..4 * HOT_READS).for_each(|_| heat.read(start, shard(2)));
        assert_eq!(heat.hottest(start), [shard(2), shard(1)]);
        assert_eq!(heat.hottest(start + HEAT_HALVES), [shard(2)]);
        assert!(heat.is_hot(start + 2 * HEAT_HALVES, shard(2)));
        assert!(!heat.is_hot(start + 3 * HEAT_HALVES, shard(2)));
        // A few reads now and then do not add up.
        let mut now = start;
        for _ in 0..100 {
            now += HEAT_HALVES;
            (0..HOT_READS / 2).for_each(|_| heat.read(now, shard(3)));
            assert!(!heat.is_hot(now, shard(3)));
        }
    }

    #[test]
    fn the_table_is_bounded_and_keeps_what_is_hot() {
        let now = Instant::now();
        let mut heat = Heat::default();
        (0..HOT_READS).for_each(|_| heat.read(now, shard(0)));
        (1..10 * HEAT_MAX).for_each(|index| heat.read(now, shard(index)));
        assert!(heat.len() <= HEAT_MAX && heat.is_hot(now, shard(0)));
        heat.read(now + 9 * HEAT_HALVES, shard(1_000_000));
        assert_eq!(heat.len(), 1, "what is cold gives way");
    }
}
