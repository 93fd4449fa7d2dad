//! Copies that a swarm counts on: objects that are here as replicas, and what must not be evicted
//! because too few others hold it.
//!
//! Owns the `.replica` files, one for each replica, written after its bytes are durable. A replica
//! is no pin: what the guard does not name may be evicted, replicas included. Invariant: a store
//! that is opened guarded evicts nothing before [`DiskTier::guard`] has been told what to spare.

use std::collections::HashSet;
use std::path::Path;

use super::{DiskOptions, DiskTier, DropWhy, Inner, write_lock};
use crate::ShardId;
use crate::error::StoreError;
use crate::files::{self, FileKind};
use crate::segmented::Segmented;

/// What must not be evicted, although nobody pins it.
#[derive(Debug, Default)]
pub(super) enum Guard {
    #[default]
    Nothing,
    /// It is not known yet what others hold.
    Everything,
    These(HashSet<ShardId>),
}

impl Guard {
    pub fn spares(&self, shard: ShardId) -> bool {
        match self {
            Self::Nothing => false,
            Self::Everything => true,
            Self::These(shards) => shards.contains(&shard),
        }
    }
}

impl DiskTier {
    /// As [`Self::open`], but nothing is evicted until [`Self::guard`] is called, not even if the
    /// budget is smaller than what is stored.
    pub fn open_guarded(dir: &Path, options: DiskOptions) -> Result<Self, StoreError> {
        let policy = Box::new(Segmented::new(options.budget));
        Self::with_guard(dir, options, policy, Guard::Everything)
    }

    /// Spares these objects, and no others, from eviction. If more is stored than the budget
    /// allows, evicts others until the rest fits or none is left.
    pub async fn guard(&self, shards: HashSet<ShardId>) -> Result<(), StoreError> {
        let is_over = {
            let mut table = self.inner.table();
            table.guard = Guard::These(shards);
            table.used > self.inner.budget
        };
        if is_over {
            self.blocking(|inner| inner.collect(None, false, true)).await??;
        }
        Ok(())
    }

    /// Whether an object is spared only because too few others hold it.
    pub fn is_guarded(&self, shard: ShardId) -> bool {
        let table = self.inner.table();
        table.guard.spares(shard) && !table.pins.contains(shard)
    }

    /// Notes that an object is here because the swarm had too few copies. Durable when this
    /// returns. [`StoreError::NotHeld`] if it is not here whole.
    pub async fn set_replica(&self, shard: ShardId) -> Result<(), StoreError> {
        self.blocking(move |inner| inner.set_replica(shard)).await?
    }

    /// Whether an object is here whole, as a replica, and nobody pins it.
    pub fn is_replica(&self, shard: ShardId) -> bool {
        let table = self.inner.table();
        table.replicas.contains(&shard)
            && table.whole.contains(&shard)
            && !table.pins.contains(shard)
    }

    /// Drops an object, unless it is pinned, in use or guarded by now.
    pub async fn drop_copy(&self, shard: ShardId) -> Result<(), StoreError> {
        self.blocking(move |inner| match inner.object(shard) {
            Some(object) => inner.drop_object(shard, &object, DropWhy::Room),
            None => Ok(()),
        })
        .await?
    }

    /// Bytes that could be stored if everything went that may be evicted.
    pub fn room(&self) -> u64 {
        let table = self.inner.table();
        let stays = table.used.saturating_sub(table.evictable_bytes());
        self.inner.budget.saturating_sub(stays)
    }
}

impl Inner {
    fn set_replica(&self, shard: ShardId) -> Result<(), StoreError> {
        let object = self.object(shard).ok_or(StoreError::NotHeld(shard))?;
        let held = write_lock(&object.held);
        if held.dead || !held.whole {
            return Err(StoreError::NotHeld(shard));
        }
        if self.table().replicas.contains(&shard) {
            return Ok(());
        }
        let path = self.layout.path(shard, FileKind::Replica);
        self.or_from_reserve(|| self.layout.write_atomic(&path, b""))?;
        let dir = self.layout.dir(shard);
        files::sync_dir(&dir).map_err(StoreError::file(&dir))?;
        self.table().replicas.insert(shard);
        drop(held);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::verified::outboard_bytes;

    const SIZE: u64 = 100_000;

    fn bytes(byte: u8) -> Bytes {
        Bytes::from(vec![byte; SIZE as usize])
    }

    fn budget(objects: u64) -> DiskOptions {
        DiskOptions { budget: objects * (SIZE + outboard_bytes(SIZE)) }
    }

    #[tokio::test]
    async fn replicas_are_known_after_a_restart_and_go_with_their_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskTier::open(dir.path(), budget(10)).unwrap();
        let missing = disk.set_replica(ShardId::of(b"x")).await;
        assert!(matches!(missing, Err(StoreError::NotHeld(_))));
        let (one, other) =
            (disk.put(bytes(1), false).await.unwrap(), disk.put(bytes(2), false).await.unwrap());
        disk.set_replica(one).await.unwrap();
        disk.set_replica(other).await.unwrap();
        disk.remove(other).await.unwrap();
        drop(disk);
        let disk = DiskTier::open(dir.path(), budget(10)).unwrap();
        assert!(disk.is_replica(one) && !disk.is_replica(other));
        assert_eq!(disk.put(bytes(2), false).await.unwrap(), other);
        assert!(!disk.is_replica(other), "it came back for another reason");
        disk.pin(one).await.unwrap();
        assert!(!disk.is_replica(one), "it is pinned now");
        disk.drop_copy(one).await.unwrap();
        assert!(disk.is_whole(one), "a pinned object stays");
        disk.unpin(one).await.unwrap();
        disk.drop_copy(one).await.unwrap();
        assert!(!disk.is_whole(one));
        drop(disk);
        let left: Vec<_> = std::fs::read_dir(dir.path().join("objects"))
            .unwrap()
            .flat_map(|entry| std::fs::read_dir(entry.unwrap().path()).unwrap())
            .filter(|entry| {
                entry.as_ref().unwrap().path().extension().is_some_and(|e| e == "replica")
            })
            .collect();
        assert_eq!(left.len(), 0, "no file is left of a replica that has gone");
    }

    #[tokio::test]
    async fn what_is_guarded_is_evicted_neither_for_room_nor_by_a_collection() {
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskTier::open(dir.path(), budget(2)).unwrap();
        let (one, other) =
            (disk.put(bytes(1), false).await.unwrap(), disk.put(bytes(2), false).await.unwrap());
        disk.guard(HashSet::from([one])).await.unwrap();
        assert!(disk.is_guarded(one) && !disk.is_guarded(other));
        assert_eq!(disk.room(), budget(1).budget);
        let third = disk.put(bytes(3), false).await.unwrap();
        assert!(disk.is_whole(one) && !disk.is_whole(other), "the colder one stays");
        let gone = disk.collect(Some(0), false).await.unwrap();
        assert_eq!(gone.evicted.iter().map(|(shard, _)| *shard).collect::<Vec<_>>(), [third]);
        disk.guard(HashSet::from([one, third])).await.unwrap();
        disk.put(bytes(3), false).await.unwrap();
        let full = disk.put(bytes(4), false).await;
        assert!(matches!(full, Err(StoreError::Budget { .. })), "{full:?}");
        let plan = disk.collect_all(Some(0), true).await.unwrap();
        assert_eq!(plan.evicted.len(), 2);
        assert!(disk.is_whole(one) && disk.is_whole(third), "only planned");
        disk.collect_all(Some(0), false).await.unwrap();
        assert!(!disk.is_whole(one) && !disk.is_whole(third));
    }

    #[tokio::test]
    async fn a_store_that_is_opened_guarded_waits_for_what_to_spare() {
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskTier::open(dir.path(), budget(3)).unwrap();
        let mut all = Vec::new();
        for byte in 1..=3 {
            all.push(disk.put(bytes(byte), false).await.unwrap());
        }
        drop(disk);
        let disk = DiskTier::open_guarded(dir.path(), budget(1)).unwrap();
        assert!(all.iter().all(|shard| disk.is_whole(*shard)), "nothing is evicted yet");
        assert!(disk.put(bytes(4), false).await.is_err());
        disk.guard(HashSet::from([all[0]])).await.unwrap();
        let whole: Vec<bool> = all.iter().map(|shard| disk.is_whole(*shard)).collect();
        assert_eq!(whole, [true, false, false]);
    }
}
