//! Pins on disk: an object's own in its `.pin` file, a model's in a record of its own.
//!
//! A model's record is replaced as a whole, so a crash leaves all of it or what it was before.
//! An object stays pinned as long as any record or its own pin names it. One lock orders changes
//! of records; it is taken before an object's lock.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{MutexGuard, PoisonError};

use super::{DropWhy, Inner, Object, read_lock, write_lock};
use crate::error::StoreError;
use crate::files::{self, FileKind};
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::pins::{ModelPin, RECORD_BYTES_MAX};
use crate::{ByteRange, ModelId, ShardId, regular};

/// Present in `pins/` once the pins of a store that had none of models have been given to them.
const OF_MODELS: &str = "of-models";

/// The most bytes of a `.pin` file that are read.
const PIN_BYTES_MAX: u64 = 32;

/// What a data directory's `pins/` says.
#[derive(Default)]
pub(super) struct Records {
    pub pins: Vec<(ModelId, ModelPin)>,
    /// Of these, the ones whose record is damaged.
    pub damaged: Vec<ModelId>,
}

impl Inner {
    /// Held while records change.
    fn pinning(&self) -> MutexGuard<'_, ()> {
        self.pinning.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pins an object by itself.
    pub(super) fn pin(&self, shard: ShardId) -> Result<(), StoreError> {
        let object = self.object(shard).ok_or(StoreError::NotHeld(shard))?;
        let held = write_lock(&object.held);
        if held.dead {
            return Err(StoreError::NotHeld(shard));
        }
        self.pin_alone(shard, held.groups.size())?;
        let dir = self.layout.dir(shard);
        files::sync_dir(&dir).map_err(StoreError::file(&dir))?;
        self.table().pins.add_alone(shard, held.groups.size());
        Ok(())
    }

    /// Writes an object's `.pin` file. The caller holds its lock and syncs the directory.
    pub(super) fn pin_alone(&self, shard: ShardId, size: u64) -> Result<(), StoreError> {
        let path = self.layout.path(shard, FileKind::Pin);
        let text = format!("{size}\n");
        self.or_from_reserve(|| self.layout.write_atomic(&path, text.as_bytes()))
    }

    /// Lets go of an object: nobody pins it any more.
    pub(super) fn unpin(&self, shard: ShardId) -> Result<(), StoreError> {
        let _one = self.pinning();
        let object = self.object(shard).ok_or(StoreError::NotHeld(shard))?;
        self.take_out(shard, &object)?;
        self.drop_object(shard, &object, DropWhy::Nothing)
    }

    /// Removes an object and all pins of it.
    pub(super) fn remove(&self, shard: ShardId) -> Result<(), StoreError> {
        let _one = self.pinning();
        let object = self.object(shard).ok_or(StoreError::NotHeld(shard))?;
        self.take_out(shard, &object)?;
        self.drop_object(shard, &object, DropWhy::Asked)
    }

    fn take_out(&self, shard: ShardId, object: &Object) -> Result<(), StoreError> {
        let _held = write_lock(&object.held);
        let models = self.table().pins.models_of(shard);
        for model in models {
            let mut pin = self.table().pins.model(model).cloned().unwrap_or_default();
            pin.objects.remove(&shard);
            self.write_record(model, pin)?;
        }
        let path = self.layout.path(shard, FileKind::Pin);
        files::remove(&path).map_err(StoreError::file(&path))?;
        self.table().pins.remove_alone(shard);
        Ok(())
    }

    /// Adds objects to what a model pins. Leaves out those of which nothing is known here;
    /// returns the others.
    pub(super) fn pin_model(
        &self,
        model: ModelId,
        name: String,
        objects: &[(ShardId, u64)],
    ) -> Result<Vec<ShardId>, StoreError> {
        let _one = self.pinning();
        let before = self.table().pins.model(model).cloned().unwrap_or_default();
        let mut pin = ModelPin { name, objects: before.objects.clone() };
        let mut pinned = Vec::new();
        for (shard, size) in objects {
            let Some(object) = self.object(*shard) else { continue };
            let held = read_lock(&object.held);
            if held.dead {
                continue;
            }
            // An eviction takes the same lock, so it sees this or came before it.
            self.table().pins.hold_back(*shard);
            pinned.push(*shard);
            pin.objects.insert(*shard, *size);
        }
        let written = if pin == before { Ok(()) } else { self.write_record(model, pin) };
        let mut table = self.table();
        pinned.iter().for_each(|shard| table.pins.let_go(*shard));
        drop(table);
        written.map(|()| pinned)
    }

    /// Forgets what a model pins. Returns the objects, with their sizes in bytes.
    pub(super) fn unpin_model(&self, model: ModelId) -> Result<BTreeMap<ShardId, u64>, StoreError> {
        let _one = self.pinning();
        let before = self.table().pins.model(model).cloned().unwrap_or_default();
        if before.objects.is_empty() {
            return Ok(before.objects);
        }
        self.write_record(model, ModelPin::default())?;
        for shard in before.objects.keys() {
            let Some(object) = self.object(*shard) else { continue };
            let held = write_lock(&object.held);
            if self.table().pins.contains(*shard) {
                continue;
            }
            // Left from a store whose pins could not be given to models: its disk was full.
            let path = self.layout.path(*shard, FileKind::Pin);
            files::remove(&path).map_err(StoreError::file(&path))?;
            drop(held);
            self.drop_object(*shard, &object, DropWhy::Nothing)?;
        }
        Ok(before.objects)
    }

    /// Makes what a model pins durable, then valid. Without objects the record is removed.
    fn write_record(&self, model: ModelId, pin: ModelPin) -> Result<(), StoreError> {
        let (path, dir) = (self.layout.pin_record(model), self.layout.pins_dir());
        if pin.objects.is_empty() {
            files::remove(&path).map_err(StoreError::file(&path))?;
        } else {
            let record = pin.to_record(model);
            self.or_from_reserve(|| self.layout.write_atomic(&path, record.as_bytes()))?;
        }
        files::sync_dir(&dir).map_err(StoreError::file(&dir))?;
        self.table().pins.set_model(model, pin);
        Ok(())
    }

    /// Reads the records.
    ///
    /// # Errors
    /// If one cannot be read: without it, what it pins could be evicted.
    pub(super) fn read_records(&self) -> Result<Records, StoreError> {
        let mut records = Records::default();
        let dir = self.layout.pins_dir();
        for entry in fs::read_dir(&dir).map_err(StoreError::file(&dir))? {
            let entry = entry.map_err(StoreError::file(&dir))?;
            let name = entry.file_name();
            let Some(model) = name.to_str().and_then(|name| name.parse::<ModelId>().ok()) else {
                continue;
            };
            let path = entry.path();
            let of = entry.file_type().map_err(StoreError::file(&path))?;
            let (pin, is_sound) = if of.is_file() {
                let bytes = regular::read_at_most(&path, RECORD_BYTES_MAX);
                let bytes = bytes.map_err(StoreError::file(&path))?;
                ModelPin::from_record(model, &bytes.unwrap_or_default())
            } else {
                self.layout.set_aside(&path, of);
                (ModelPin::default(), false)
            };
            if !is_sound {
                records.damaged.push(model);
            }
            records.pins.push((model, pin));
        }
        Ok(records)
    }

    /// The size in bytes that an object's own pin states.
    pub(super) fn size_in_pin(&self, shard: ShardId) -> Option<u64> {
        let path = self.layout.path(shard, FileKind::Pin);
        let text = regular::read_at_most(&path, PIN_BYTES_MAX).ok()??;
        let size = std::str::from_utf8(&text).ok()?.trim().parse().ok()?;
        (size <= crate::verified::OBJECT_BYTES_MAX).then_some(size)
    }

    /// Replaces damaged records. What such a model pins is what can still be read of its record,
    /// and what of its manifest's objects is here: rather too much than too little.
    pub(super) fn mend_records(&self, damaged: &[ModelId]) {
        for model in damaged {
            let read = self.table().pins.model(*model).cloned().unwrap_or_default();
            let mut pin = read.clone();
            if let Some((name, objects)) = self.manifest_of(*model) {
                let here = objects.into_iter().filter(|(shard, _)| self.knows(*shard));
                pin = ModelPin { name, objects: here.collect() };
            }
            let objects = pin.objects.len();
            tracing::warn!(%model, objects, "the record of what it pins was damaged; mended");
            if let Err(error) = self.write_record(*model, pin) {
                tracing::warn!(%model, %error, "its record is still damaged");
            }
            // An id that was read wrongly names nothing.
            for shard in read.objects.keys() {
                if let Some(object) = self.object(*shard) {
                    let _ = self.drop_object(*shard, &object, DropWhy::Nothing);
                }
            }
        }
    }

    /// Gives the pins of a store that knew only objects to the models that have them: a model
    /// was pinned if its manifest was. What no such model has stays pinned by itself.
    pub(super) fn give_pins_to_models(&self) {
        let done = self.layout.pins_dir().join(OF_MODELS);
        if regular::is_file(&done) {
            return;
        }
        let alone: Vec<ShardId> = self.table().pins.only_alone().collect();
        let mut given: Vec<ShardId> = Vec::new();
        let mut written = Ok(());
        for shard in &alone {
            let model = ModelId::from(*shard.as_bytes());
            let Some((name, objects)) = self.manifest_of(model) else { continue };
            let mut pin = self.table().pins.model(model).cloned().unwrap_or_default();
            let is_alone = |shard: &ShardId| self.table().pins.is_alone(*shard);
            pin.objects.extend(objects.into_iter().filter(|(shard, _)| is_alone(shard)));
            pin.name = name;
            given.extend(pin.objects.keys());
            written = written.and(self.write_record(model, pin.clone()));
            self.table().pins.set_model(model, pin);
        }
        for shard in &given {
            self.table().pins.remove_alone(*shard);
        }
        // Manifests last: while theirs is left, a crash loses nothing.
        given.sort_by_key(|shard| (alone.contains(shard) && self.is_model(*shard), *shard));
        let finished = written.and_then(|()| {
            for shard in &given {
                let path = self.layout.path(*shard, FileKind::Pin);
                files::remove(&path).map_err(StoreError::file(&path))?;
            }
            self.layout.write_atomic(&done, b"")
        });
        if let Err(error) = finished {
            tracing::warn!(%error, "pins are not written down by model yet; the next start tries again");
        }
    }

    fn is_model(&self, shard: ShardId) -> bool {
        self.table().pins.model(ModelId::from(*shard.as_bytes())).is_some()
    }

    /// A model's name and all its objects with their sizes, if its manifest is here whole.
    fn manifest_of(&self, model: ModelId) -> Option<(String, BTreeMap<ShardId, u64>)> {
        let shard = model.manifest();
        let object = self.object(shard)?;
        let (is_whole, size) = {
            let held = read_lock(&object.held);
            (held.whole, held.groups.size())
        };
        if !is_whole || size > MANIFEST_BYTES_MAX as u64 {
            return None;
        }
        // A manifest is a JSON object; most objects are told from it by their first byte.
        let path = self.layout.path(shard, FileKind::Whole);
        let mut first = [0];
        let begins = regular::open(&path).and_then(|file| files::read_at(&file, &mut first, 0));
        if begins.is_err() || first != *b"{" {
            return None;
        }
        let read = self.read(shard, ByteRange::new(0, size)?).ok()??;
        let manifest = Manifest::parse(read.bytes()).ok()?;
        let mut objects: BTreeMap<_, _> = manifest.objects().ok()?.into_iter().collect();
        objects.insert(shard, size);
        Some((manifest.model_id.clone(), objects))
    }

    /// Whether the files of an object that was held are gone. A pinned object stays in the table
    /// with nothing held, so that it is reported and can be fetched. True if it was pinned.
    pub(super) fn vanished(&self, shard: ShardId, object: &Object) -> Result<bool, StoreError> {
        let mut held = write_lock(&object.held);
        let path =
            self.layout.path(shard, if held.whole { FileKind::Whole } else { FileKind::Part });
        if held.dead || regular::is_file(&path) {
            return Ok(false);
        }
        if let Ok(found) = fs::symlink_metadata(&path) {
            self.layout.set_aside(&path, found.file_type());
        }
        if !self.table().pins.contains(shard) {
            drop(held);
            self.drop_object(shard, object, DropWhy::Gone)?;
            return Ok(false);
        }
        self.forget_outboard(shard);
        // What cannot be removed claims nothing: without its bytes a have-file is ignored.
        let _ = crate::object::erase_contents(&self.layout, shard);
        let lost_bytes = held.groups.held_bytes();
        *held = crate::object::Held::empty(held.groups.size());
        let mut table = self.table();
        table.quarantines += 1;
        table.damaged_bytes += lost_bytes;
        table.charge(shard, 0);
        let was_whole = table.whole.remove(&shard);
        drop(table);
        if was_whole {
            self.announce();
        }
        Ok(true)
    }
}

/// What must not be evicted while work on it goes on; see [`super::DiskTier::hold`].
pub struct Hold {
    pub(super) inner: std::sync::Arc<Inner>,
    pub(super) shards: Vec<ShardId>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut table = self.inner.table();
        self.shards.iter().for_each(|shard| table.pins.let_go(*shard));
    }
}
