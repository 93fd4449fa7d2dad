//! Opens a data directory: works out what its files hold, and salvages objects
//! that were damaged while no node was running. The files decide; the index only
//! adds the order of use.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;

use super::copies::Guard;
use super::{Checkup, Inner, Object};
use crate::error::StoreError;
use crate::files::{self, FileKind};
use crate::groups::Groups;
use crate::index::Record;
use crate::object::{self, Health, Held};
use crate::verified::{OBJECT_BYTES_MAX, outboard_bytes};
use crate::{ShardId, regular};

/// The files found for one object; lengths in bytes.
#[derive(Debug, Default)]
struct FoundFiles {
    whole: Option<u64>,
    part: Option<u64>,
    have: bool,
    outboard: Option<u64>,
    pin: bool,
    replica: bool,
}

impl Inner {
    /// Fills the table from the files; `records` of the index add the order of use.
    pub(super) fn load(&self, records: HashMap<ShardId, Record>) -> Result<(), StoreError> {
        let mut found = self.find_files()?;
        let pins = self.read_records()?;
        {
            let mut table = self.table();
            for (shard, present) in found.iter().filter(|(_, present)| present.pin) {
                // Whole objects are the rule, and their sizes are known without it.
                let size = if present.whole.is_none() { self.size_in_pin(*shard) } else { None };
                table.pins.add_alone(*shard, size.unwrap_or(0));
            }
            for (model, pin) in pins.pins {
                table.pins.set_model(model, pin);
            }
            // What is pinned is in the table, whether anything of it is left or not.
            for shard in table.pins.iter() {
                found.entry(shard).or_default();
            }
        }
        let mut order: Vec<_> = found
            .into_iter()
            .map(|(shard, present)| (records.get(&shard).map_or(0, |r| r.last_use), shard, present))
            .collect();
        order.sort_unstable_by_key(|(last_use, shard, _)| (*last_use, *shard));
        let mut fresh = Vec::new();
        let mut missing = 0;
        for (last_use, shard, present) in order {
            let recorded = records.get(&shard);
            let pinned = self.table().pins.contains(shard);
            let held = match self.adopt(shard, &present, pinned, recorded) {
                Ok(Some(held)) => held,
                Ok(None) => {
                    self.clear(shard, &present);
                    if !pinned {
                        continue;
                    }
                    missing += 1;
                    self.missing(shard, recorded)
                }
                Err(error) => {
                    // Its files stay as they are: what hinders may pass.
                    tracing::warn!(%shard, %error, "left out; another object is not affected");
                    if !pinned {
                        continue;
                    }
                    missing += 1;
                    self.missing(shard, recorded)
                }
            };
            let record = Record {
                size: held.groups.size(),
                held: held.groups.held_bytes(),
                last_use,
                pinned,
                hot: recorded.is_some_and(|record| record.hot),
            };
            if recorded != Some(&record) {
                fresh.push((shard, record));
            }
            self.enter(shard, held, record.hot);
            if present.replica {
                self.table().replicas.insert(shard);
            }
        }
        if missing > 0 {
            tracing::warn!(
                missing,
                "pinned objects are not here; doppler-node fsck --repair fetches them"
            );
        }
        for shard in records.keys().filter(|shard| !self.knows(**shard)) {
            self.index.remove(*shard);
        }
        self.index.put_all(fresh);
        self.mend_records(&pins.damaged);
        self.give_pins_to_models();
        self.fit_budget()
    }

    /// The budget may be smaller than last time: evicts by policy until the rest fits. A guarded
    /// store does that once it is known what others hold.
    fn fit_budget(&self) -> Result<(), StoreError> {
        if matches!(self.table().guard, Guard::Everything) {
            return Ok(());
        }
        self.make_room(0, None)
    }

    fn find_files(&self) -> Result<HashMap<ShardId, FoundFiles>, StoreError> {
        let mut found: HashMap<ShardId, FoundFiles> = HashMap::new();
        self.layout.scan(|shard, kind, path| {
            let present = found.entry(shard).or_default();
            let len = || fs::metadata(path).map_or(0, |meta| meta.len());
            match kind {
                FileKind::Whole => present.whole = Some(len()),
                FileKind::Part => present.part = Some(len()),
                FileKind::Have => present.have = true,
                FileKind::Outboard => present.outboard = Some(len()),
                FileKind::Pin => present.pin = true,
                FileKind::Replica => present.replica = true,
            }
        })?;
        Ok(found)
    }

    fn enter(&self, shard: ShardId, held: Held, is_hot: bool) {
        let mut table = self.table();
        table.charge(shard, held.charge());
        if held.whole {
            table.whole.insert(shard);
        }
        if is_hot {
            table.policy.touch(&shard);
            table.hot.insert(shard);
        }
        table.objects.insert(shard, Arc::new(Object::new(held)));
    }

    /// Removes files that hold nothing of their object.
    fn clear(&self, shard: ShardId, present: &FoundFiles) {
        if let Some(size) = present.whole {
            tracing::warn!(%shard, "no part of its file is valid; removed");
            self.found_at_open(shard, &Groups::all(size.min(OBJECT_BYTES_MAX)), None);
        }
        let marker = self.layout.path(shard, FileKind::Replica);
        let erased =
            object::erase_contents(&self.layout, shard).and_then(|()| files::remove(&marker));
        if let Err(error) = erased {
            tracing::warn!(%shard, %error, "what is left of it cannot be removed");
        }
    }

    /// A pinned object of which nothing is held. Its size may be unknown; then it is 0.
    fn missing(&self, shard: ShardId, record: Option<&Record>) -> Held {
        let pinned = self.table().pins.size_of(shard);
        let size = pinned.or_else(|| record.map(|record| record.size)).unwrap_or(0);
        Held::empty(size.min(OBJECT_BYTES_MAX))
    }

    /// What an object's files hold; `None` if they hold nothing.
    fn adopt(
        &self,
        shard: ShardId,
        present: &FoundFiles,
        pinned: bool,
        record: Option<&Record>,
    ) -> Result<Option<Held>, StoreError> {
        if let Some(len) = present.whole {
            for kind in [FileKind::Part, FileKind::Have] {
                let _ = files::remove(&self.layout.path(shard, kind));
            }
            let fits = |size: u64| present.outboard.unwrap_or(0) == outboard_bytes(size);
            let as_recorded = record.is_none_or(|record| record.size == len);
            let may_be_empty = len > 0 || shard == ShardId::of(b"");
            if len <= OBJECT_BYTES_MAX && fits(len) && as_recorded && may_be_empty {
                return Ok(Some(Held::whole(len)));
            }
            let recorded = record.map(|record| record.size).filter(|size| *size != len);
            return self.salvage(shard, recorded.into_iter().chain([len]), pinned);
        }
        let (Some(len), true) = (present.part, present.have) else { return Ok(None) };
        let path = self.layout.path(shard, FileKind::Have);
        let have = regular::read(&path).map_err(StoreError::file(&path))?;
        let groups = match Groups::from_file(shard, &have) {
            Some(groups) => groups,
            None if len > OBJECT_BYTES_MAX => return Ok(None),
            None => {
                tracing::warn!(%shard, "its have-file is damaged; verifying every group");
                let claimed = Held { groups: Groups::all(len), ..Held::empty(len) };
                match object::examine(&self.layout, shard, &claimed)? {
                    Health::Sound { .. } => claimed.groups,
                    Health::Damaged(sound) => sound,
                }
            }
        };
        let wanted = groups.held_bytes() > 0 || pinned;
        Ok(wanted.then_some(Held { groups, ..Held::empty(0) }))
    }

    /// Handles a whole object's file that was truncated, has grown, or lost its
    /// outboard. Tries each of `sizes` and keeps the groups that are valid under
    /// the best one. A pinned object stays in the table even if no group is
    /// valid, so that it can be fetched again.
    fn salvage(
        &self,
        shard: ShardId,
        sizes: impl Iterator<Item = u64>,
        pinned: bool,
    ) -> Result<Option<Held>, StoreError> {
        let mut best: Option<Groups> = None;
        for size in sizes.filter(|size| *size <= OBJECT_BYTES_MAX) {
            match object::examine(&self.layout, shard, &Held::whole(size))? {
                Health::Sound { .. } => return Ok(Some(Held::whole(size))),
                Health::Damaged(sound)
                    if best.as_ref().is_none_or(|b| sound.held_bytes() > b.held_bytes()) =>
                {
                    best = Some(sound);
                }
                Health::Damaged(_) => {}
            }
        }
        let Some(best) = best.filter(|best| pinned || best.held_bytes() > 0) else {
            return Ok(None);
        };
        tracing::warn!(%shard, bytes = best.held_bytes(), "damaged; its valid groups are kept");
        let claimed = Held::whole(best.size());
        self.found_at_open(shard, &claimed.groups, Some(&best));
        object::demote(&self.layout, shard, &claimed, &best).map(Some)
    }

    /// Records damage found while opening, for `fsck` to report.
    fn found_at_open(&self, shard: ShardId, claimed: &Groups, sound: Option<&Groups>) {
        let none = Groups::none(claimed.size());
        let checkup = Checkup {
            shard,
            size: claimed.size(),
            checked_bytes: claimed.held_bytes(),
            damaged: claimed.without(sound.unwrap_or(&none)),
            outboard_rewritten: false,
        };
        let mut table = self.table();
        table.quarantines += 1;
        table.damaged_bytes += checkup.damaged_bytes();
        table.damage_at_open.push(checkup);
    }
}
