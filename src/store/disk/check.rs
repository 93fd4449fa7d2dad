//! Checks what is held of an object against its root. Damaged groups are
//! quarantined: they no longer count as held. A wrong outboard is rebuilt from
//! sound bytes.

use serde::{Deserialize, Serialize};

use super::{Inner, Object, read_lock, write_lock};
use crate::error::StoreError;
use crate::object::{self, Health, Survey};
use crate::{ByteRange, ShardId};

/// What a check of one object found and did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkup {
    pub shard: ShardId,
    /// The object's size in bytes.
    pub size: u64,
    /// Bytes recorded as held, all of which were checked.
    pub checked_bytes: u64,
    /// Ranges that failed verification. They are no longer held.
    pub damaged: Vec<ByteRange>,
    /// The stored outboard was wrong and was rebuilt.
    pub outboard_rewritten: bool,
}

impl Checkup {
    /// Bytes in the damaged ranges.
    pub fn damaged_bytes(&self) -> u64 {
        self.damaged.iter().map(ByteRange::len).sum()
    }
}

impl Inner {
    pub(super) fn check(&self, shard: ShardId) -> Result<Option<Checkup>, StoreError> {
        let Some(object) = self.object(shard) else { return Ok(None) };
        {
            // A shared lock: reads continue while the object is checked.
            let held = read_lock(&object.held);
            if held.dead || held.groups.held_bytes() == 0 && !held.whole {
                return Ok(None);
            }
            if let Survey::Sound = object::survey(&self.layout, shard, &held)? {
                let (size, checked_bytes) = (held.groups.size(), held.groups.held_bytes());
                let damaged = Vec::new();
                let outboard_rewritten = false;
                return Ok(Some(Checkup {
                    shard,
                    size,
                    checked_bytes,
                    damaged,
                    outboard_rewritten,
                }));
            }
        }
        self.quarantine(shard, &object, None)
    }

    /// Checks an object and quarantines its damaged groups. `None` if the object
    /// is gone, or if it does not hold the range `reader` (then another thread
    /// has already quarantined it).
    pub(super) fn quarantine(
        &self,
        shard: ShardId,
        object: &Object,
        reader: Option<ByteRange>,
    ) -> Result<Option<Checkup>, StoreError> {
        let mut held = write_lock(&object.held);
        if held.dead || reader.is_some_and(|range| !held.groups.holds(range)) {
            return Ok(None);
        }
        self.forget_outboard(shard);
        let (size, checked_bytes) = (held.groups.size(), held.groups.held_bytes());
        let mut checkup =
            Checkup { shard, size, checked_bytes, damaged: Vec::new(), outboard_rewritten: false };
        let sound = match self.or_from_reserve(|| object::examine(&self.layout, shard, &held))? {
            Health::Sound { outboard_rewritten } => {
                return Ok(Some(Checkup { outboard_rewritten, ..checkup }));
            }
            Health::Damaged(sound) => sound,
        };
        checkup.damaged = held.groups.without(&sound);
        let ranges: Vec<String> = checkup.damaged.iter().map(ByteRange::to_string).collect();
        let ranges = ranges.join(", ");
        tracing::warn!(%shard, size, %ranges, "damaged on disk; these ranges are no longer held");
        let mut demoted = None;
        self.or_from_reserve(|| {
            demoted = Some(object::demote(&self.layout, shard, &held, &sound)?);
            Ok(())
        })?;
        if let Some(demoted) = demoted {
            *held = demoted;
        }
        let mut table = self.table();
        table.quarantines += 1;
        table.damaged_bytes += checkup.damaged_bytes();
        table.charge(shard, held.charge());
        let was_whole = table.whole.remove(&shard);
        drop(table);
        if was_whole {
            self.announce();
        }
        Ok(Some(checkup))
    }

    /// Runs `work`. If the disk is full, releases the reserve and runs it again:
    /// damage must be recorded even then.
    pub(super) fn or_from_reserve<T>(
        &self,
        mut work: impl FnMut() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        match work() {
            Err(StoreError::Full { .. }) if self.reserve.release() => work(),
            done => done,
        }
    }
}
