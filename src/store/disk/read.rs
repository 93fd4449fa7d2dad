//! Verified reads. When verification fails, the object is checked (see `check`)
//! and read once more, because only its outboard may have been damaged.

use std::sync::PoisonError;

use super::{Inner, OUTBOARD_CACHE_BYTES, Use, read_lock};
use crate::object::{self, ReadFault};
use crate::policy::Policy;
use crate::verified::{Outboard, VerifiedRange};
use crate::{ByteRange, ReadError, ShardId};

impl Inner {
    pub(super) fn read(
        &self,
        shard: ShardId,
        range: ByteRange,
    ) -> Result<Option<VerifiedRange>, ReadError> {
        // Twice: if only the outboard was damaged, it is rebuilt and the second read succeeds.
        for _ in 0..2 {
            let Some(object) = self.object(shard) else { return Ok(None) };
            let fault = {
                let held = read_lock(&object.held);
                let size = held.groups.size();
                if held.dead || !held.groups.holds(range) {
                    // Nothing proves a size, not even 0, as long as nothing is held.
                    let knows_size = held.whole || held.groups.held_bytes() > 0;
                    let proves_size = knows_size && held.groups.proves_size();
                    if range.end() > size && proves_size && !held.dead {
                        return Err(ReadError::OutOfRange { shard, range, size });
                    }
                    return Ok(None);
                }
                let cached = held.whole.then(|| self.cached_outboard(shard)).flatten();
                match object::read(&self.layout, shard, &held, range, cached) {
                    Ok((verified, outboard)) => {
                        if held.whole {
                            self.cache_outboard(outboard);
                        }
                        drop(held);
                        let again = object.note_read(size, verified.range());
                        self.note_use(shard, if again { Use::Again } else { Use::First });
                        self.write_uses_in_batches();
                        return Ok(Some(verified));
                    }
                    Err(fault) => fault,
                }
            };
            match fault {
                ReadFault::Io(e) => return Err(e.into()),
                ReadFault::Vanished => {
                    if self.vanished(shard, &object)? {
                        let detail = format!("its file in {} is gone", self.root.display());
                        return Err(ReadError::Corrupt { shard, detail });
                    }
                    // It may have come back meanwhile.
                }
                ReadFault::Damaged(error) => {
                    let checkup = self.quarantine(shard, &object, Some(range))?;
                    let within = |damaged: &ByteRange| damaged.overlaps(&range);
                    if checkup.is_none_or(|checkup| checkup.damaged.iter().any(within)) {
                        let detail = format!("on disk in {}: {error}", self.root.display());
                        return Err(ReadError::Corrupt { shard, detail });
                    }
                }
            }
        }
        let detail = format!("on disk in {}, again after a repair", self.root.display());
        Err(ReadError::Corrupt { shard, detail })
    }

    fn cached_outboard(&self, shard: ShardId) -> Option<Outboard> {
        let mut cache = self.outboards.lock().unwrap_or_else(PoisonError::into_inner);
        cache.order.touch(&shard);
        cache.nodes.get(&shard).cloned()
    }

    fn cache_outboard(&self, outboard: Outboard) {
        let (shard, cost) = (outboard.shard(), outboard.nodes().len() as u64);
        let mut cache = self.outboards.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.nodes.contains_key(&shard) {
            return;
        }
        let over = (cache.order.total() + cost).saturating_sub(OUTBOARD_CACHE_BYTES);
        for victim in cache.order.victims(over, &|_| false).unwrap_or_default() {
            cache.order.remove(&victim);
            cache.nodes.remove(&victim);
        }
        // Outboards of small objects are empty, but each entry still costs memory.
        cache.order.insert(shard, cost.max(64));
        cache.nodes.insert(shard, outboard);
    }

    pub(super) fn forget_outboard(&self, shard: ShardId) {
        let mut cache = self.outboards.lock().unwrap_or_else(PoisonError::into_inner);
        cache.order.remove(&shard);
        cache.nodes.remove(&shard);
    }
}
