//! Makes room: evicts for a write that would exceed the budget, when the disk is
//! full below the budget, and on request (`gc`). Pinned objects are never evicted, guarded ones
//! only on request.

use serde::{Deserialize, Serialize};

use super::{DropWhy, Inner, RETRIES_MAX};
use crate::error::{Lack, StoreError};
use crate::verified::outboard_bytes;
use crate::{ShardId, files};

/// What a collection evicted, or would evict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    /// Each object, with the bytes that it counted against the budget.
    pub evicted: Vec<(ShardId, u64)>,
    pub freed_bytes: u64,
    /// Bytes still used afterwards.
    pub used_bytes: u64,
    /// How many of `used_bytes` are pinned.
    pub pinned_bytes: u64,
    /// Objects that are pinned by themselves and by no model, with what they count.
    #[serde(default)]
    pub pinned_alone: Vec<(ShardId, u64)>,
    /// How many of `used_bytes` are kept only because too few others hold them.
    #[serde(default)]
    pub guarded_bytes: u64,
    pub budget_bytes: u64,
    /// Whether space is reserved for cleaning up a full disk.
    pub reserve_held: bool,
}

impl Inner {
    /// Reserves `room` bytes of the budget; they count as used from here on.
    /// Evicts by policy if needed, but never `keep` or a pinned object.
    pub(super) fn make_room(&self, room: u64, keep: Option<ShardId>) -> Result<(), StoreError> {
        for _ in 0..RETRIES_MAX {
            let victims = {
                let mut table = self.table();
                let over = table.used.saturating_add(room).saturating_sub(self.budget);
                if over == 0 {
                    table.used += room;
                    return Ok(());
                }
                let Some(victims) = table.take_victims(over, keep) else {
                    let available = self.budget.saturating_sub(table.pinned_bytes());
                    let budget = self.budget;
                    // The store is opened with a smaller budget: nothing is
                    // requested, but more is pinned than the budget allows.
                    let needed = if room == 0 { table.pinned_bytes() } else { room };
                    let available = if room == 0 { budget } else { available };
                    return Err(StoreError::Budget { needed, available, budget });
                };
                victims
            };
            self.evict(&victims, DropWhy::Room)?;
        }
        let available = self.budget.saturating_sub(self.table().used);
        Err(StoreError::Budget { needed: room, available, budget: self.budget })
    }

    /// Runs `work`. If the disk is full, evicts objects worth up to `bytes` and
    /// runs it again: the budget may allow more than the disk has.
    pub(super) fn with_space<T>(
        &self,
        bytes: u64,
        keep: ShardId,
        work: impl Fn() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        match work() {
            Err(StoreError::Full { what, .. }) => {
                let victims = self.table().take_victims_up_to(bytes, Some(keep));
                tracing::warn!(%what, evicting = victims.len(), "the disk is full");
                if victims.is_empty() {
                    return Err(self.full(what, bytes));
                }
                self.evict(&victims, DropWhy::Room)?;
                work().map_err(|error| match error {
                    StoreError::Full { what, .. } => self.full(what, bytes),
                    other => other,
                })
            }
            done => done,
        }
    }

    /// The disk has no room for `needed` bytes.
    fn full(&self, what: String, needed: u64) -> StoreError {
        let available = files::free_bytes(&self.root);
        StoreError::Full { what, lack: available.map(|available| Lack { needed, available }) }
    }

    /// Whether what is missing of these objects fits on the disk, if all goes that may be evicted.
    pub(super) fn check_space(&self, objects: &[(ShardId, u64)]) -> Result<(), StoreError> {
        let missing = |(shard, size): &(ShardId, u64)| {
            let counted = self.table().policy.cost(shard).unwrap_or(0);
            (size + outboard_bytes(*size)).saturating_sub(counted)
        };
        let needed = objects.iter().map(missing).fold(0, u64::saturating_add);
        let Some(free) = files::free_bytes(&self.root) else { return Ok(()) };
        let available = free.saturating_add(self.table().evictable_bytes());
        if needed <= available {
            return Ok(());
        }
        let (what, lack) = (self.root.display().to_string(), Some(Lack { needed, available }));
        Err(StoreError::Full { what, lack })
    }

    /// `is_guarded`: what is guarded stays.
    pub(super) fn collect(
        &self,
        budget: Option<u64>,
        dry: bool,
        is_guarded: bool,
    ) -> Result<Collected, StoreError> {
        let budget = budget.unwrap_or(self.budget);
        if !dry {
            // Deleting needs free space on some file systems, and so does the index.
            self.reserve.release();
        }
        let mut evicted: Vec<(ShardId, u64)> = Vec::new();
        for _ in 0..RETRIES_MAX {
            let victims = {
                let mut table = self.table();
                let over = table.used.saturating_sub(budget);
                let victims = match is_guarded {
                    true => table.take_victims_up_to(over, None),
                    false => table.take_guarded_victims_up_to(over),
                };
                let cost = |shard: &ShardId| table.policy.cost(shard).unwrap_or(0);
                evicted.extend(victims.iter().map(|shard| (*shard, cost(shard))));
                if dry {
                    table.evicting.retain(|shard| !victims.contains(shard));
                }
                victims
            };
            if dry || victims.is_empty() {
                break;
            }
            self.evict(&victims, if is_guarded { DropWhy::Room } else { DropWhy::RoomUnguarded })?;
        }
        if !dry {
            self.index.flush();
            self.set_reserve_aside();
        }
        let freed_bytes = evicted.iter().map(|(_, bytes)| bytes).sum();
        let reserve_held = self.reserve.is_held();
        let table = self.table();
        let counted = |shard: ShardId| (shard, table.policy.cost(&shard).unwrap_or(0));
        let mut pinned_alone: Vec<_> = table.pins.only_alone().map(counted).collect();
        pinned_alone.sort_unstable();
        Ok(Collected {
            freed_bytes,
            used_bytes: table.used.saturating_sub(if dry { freed_bytes } else { 0 }),
            pinned_bytes: table.pinned_bytes(),
            pinned_alone,
            guarded_bytes: table.guarded_bytes(),
            budget_bytes: budget,
            reserve_held,
            evicted,
        })
    }

    /// Drops the victims, except those that were pinned in the meantime.
    fn evict(&self, victims: &[ShardId], why: DropWhy) -> Result<(), StoreError> {
        let evicted = victims.iter().try_for_each(|shard| match self.object(*shard) {
            Some(object) => self.drop_object(*shard, &object, why),
            None => Ok(()),
        });
        self.table().evicting.retain(|shard| !victims.contains(shard));
        evicted
    }
}
