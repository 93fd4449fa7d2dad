//! Making room: evicting for a write within the budget, for a disk that is
//! full below it, and when someone asks (`gc`). Never what is pinned.

use serde::{Deserialize, Serialize};

use super::{DropWhy, Inner, RETRIES_MAX};
use crate::ShardId;
use crate::error::StoreError;

/// What a collection let go of (or would).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    /// Objects with the bytes that each counted.
    pub evicted: Vec<(ShardId, u64)>,
    pub freed_bytes: u64,
    /// What is left, and how much of it is pinned.
    pub used_bytes: u64,
    pub pinned_bytes: u64,
    pub budget_bytes: u64,
    /// Space is set aside for cleaning up when the disk is full.
    pub reserve_held: bool,
}

impl Inner {
    /// Promises `room` bytes of the budget (they count as used from here),
    /// evicting by policy; never `keep`, never what is pinned.
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
                    // Opening with a smaller budget: nothing is asked for, too much is pinned.
                    let needed = if room == 0 { table.pinned_bytes() } else { room };
                    let available = if room == 0 { budget } else { available };
                    return Err(StoreError::Budget { needed, available, budget });
                };
                victims
            };
            self.evict(&victims)?;
        }
        let available = self.budget.saturating_sub(self.table().used);
        Err(StoreError::Budget { needed: room, available, budget: self.budget })
    }

    /// Runs `work`, and once more if the disk was full and something could be
    /// let go of for `bytes`: the budget may allow more than the disk does.
    pub(super) fn with_space<T>(
        &self,
        bytes: u64,
        keep: ShardId,
        work: impl Fn() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        match work() {
            Err(StoreError::Full { what }) => {
                let victims = self.table().take_victims_up_to(bytes, Some(keep));
                tracing::warn!(%what, evicting = victims.len(), "the disk is full");
                if victims.is_empty() {
                    return Err(StoreError::Full { what });
                }
                self.evict(&victims)?;
                work()
            }
            done => done,
        }
    }

    pub(super) fn collect(&self, budget: Option<u64>, dry: bool) -> Result<Collected, StoreError> {
        let budget = budget.unwrap_or(self.budget);
        if !dry {
            // Erasing writes too on some file systems, and so does the index.
            self.reserve.release();
        }
        let mut evicted: Vec<(ShardId, u64)> = Vec::new();
        for _ in 0..RETRIES_MAX {
            let victims = {
                let mut table = self.table();
                let over = table.used.saturating_sub(budget);
                let victims = table.take_victims_up_to(over, None);
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
            self.evict(&victims)?;
        }
        if !dry {
            self.index.flush();
            self.set_reserve_aside();
        }
        let freed_bytes = evicted.iter().map(|(_, bytes)| bytes).sum();
        let reserve_held = self.reserve.is_held();
        let table = self.table();
        Ok(Collected {
            freed_bytes,
            used_bytes: table.used.saturating_sub(if dry { freed_bytes } else { 0 }),
            pinned_bytes: table.pinned_bytes(),
            budget_bytes: budget,
            reserve_held,
            evicted,
        })
    }

    /// Drops what was taken as a victim, unless it was pinned meanwhile.
    fn evict(&self, victims: &[ShardId]) -> Result<(), StoreError> {
        let evicted = victims.iter().try_for_each(|shard| match self.object(*shard) {
            Some(object) => self.drop_object(*shard, &object, DropWhy::Room),
            None => Ok(()),
        });
        self.table().evicting.retain(|shard| !victims.contains(shard));
        evicted
    }
}
