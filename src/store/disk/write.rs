//! Stores objects and verified ranges, each within room reserved beforehand.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use bytes::Bytes;

use super::{Imported, Inner, Kept, RETRIES_MAX, Use, write_lock};
use crate::error::StoreError;
use crate::files::{self, FileKind};
use crate::object::{self, Held};
use crate::verified::{OBJECT_BYTES_MAX, Outboard, VerifiedRange, outboard_bytes};
use crate::{ShardId, regular};

impl Inner {
    pub(super) fn keep(&self, range: &VerifiedRange) -> Result<Kept, StoreError> {
        let (shard, size) = (range.shard(), range.size());
        let promised = range.range().len() + outboard_bytes(size);
        self.make_room(promised, Some(shard))?;
        let kept = self.with_space(promised, shard, || self.keep_promised(range));
        let mut table = self.table();
        table.used = table.used.saturating_sub(promised);
        drop(table);
        self.write_uses_in_batches();
        if matches!(kept, Ok(Kept::Whole)) {
            self.announce();
        }
        kept
    }

    fn keep_promised(&self, range: &VerifiedRange) -> Result<Kept, StoreError> {
        let (shard, size) = (range.shard(), range.size());
        for _ in 0..RETRIES_MAX {
            let object = self.object_or_new(shard, size);
            let mut held = write_lock(&object.held);
            if held.dead {
                continue;
            }
            if held.whole || (held.groups.size() == size && held.groups.holds(range.range())) {
                return Ok(Kept::Already);
            }
            if held.groups.size() != size {
                if held.groups.proves_size() && held.groups.held_bytes() > 0
                    || !range.proves_size() && held.groups.held_bytes() > 0
                {
                    return Ok(Kept::SizeConflict);
                }
                // The bytes held claimed a size that is now disproved.
                object::erase_contents(&self.layout, shard)
                    .map_err(StoreError::file(&self.layout.dir(shard)))?;
                *held = Held::empty(size);
            }
            let written = object::write(&self.layout, &mut held, range);
            if written.is_err() && held.groups.held_bytes() == 0 {
                self.abandon_new(shard, &mut held);
            }
            written?;
            let mut table = self.table();
            table.charge(shard, held.charge());
            let whole = held.whole;
            if whole {
                table.whole.insert(shard);
            }
            drop(table);
            drop(held);
            self.note_use(shard, Use::First);
            return Ok(if whole { Kept::Whole } else { Kept::Part });
        }
        Ok(Kept::Already)
    }

    /// Forgets an object none of which could be written. A pinned one stays in
    /// the table, so that it can be fetched.
    fn abandon_new(&self, shard: ShardId, held: &mut Held) {
        if self.table().pins.contains(shard) {
            return;
        }
        held.dead = true;
        let _ = object::erase(&self.layout, shard);
        self.table().forget(shard);
    }

    pub(super) fn put(&self, bytes: &Bytes, pin: bool) -> Result<ShardId, StoreError> {
        let size = bytes.len() as u64;
        if size > OBJECT_BYTES_MAX {
            return Err(StoreError::TooLarge { what: "an object".to_owned(), size });
        }
        let outboard = Outboard::of(bytes)
            .map_err(|e| StoreError::io("hashing an object", io::Error::other(e)))?;
        let temp = self.layout.temp();
        self.store_whole(&outboard, pin, &temp, || {
            // It is written a second time if the disk was full.
            files::remove(&temp).and_then(|()| File::create_new(&temp)?.write_all(bytes)).map_err(
                |error| {
                    let _ = fs::remove_file(&temp);
                    StoreError::io(temp.display().to_string(), error)
                },
            )
        })?;
        Ok(outboard.shard())
    }

    pub(super) fn import(
        &self,
        path: &Path,
        expected: ShardId,
        pin: bool,
    ) -> Result<Imported, StoreError> {
        let source = fs::canonicalize(path).map_err(StoreError::file(path))?;
        let length = |file: &Path| {
            let opened = regular::open(file).map_err(StoreError::file(path))?;
            let size = opened.metadata().map_err(StoreError::file(path))?.len();
            if size > OBJECT_BYTES_MAX {
                return Err(StoreError::TooLarge { what: path.display().to_string(), size });
            }
            Ok(size)
        };
        let claimed = length(&source)?;
        let temp = self.layout.temp();
        let checked = (|| {
            // Link or copy first, then hash the result: what is hashed is what is stored.
            let how = self.with_space(claimed, expected, || {
                files::import(&source, &temp).map_err(|error| {
                    let _ = fs::remove_file(&temp);
                    StoreError::io(path.display().to_string(), error)
                })
            })?;
            let size = length(&temp)?;
            let file = regular::open(&temp).map_err(StoreError::file(path))?;
            let outboard = Outboard::of_reader(file, size).map_err(StoreError::file(path))?;
            if outboard.shard() != expected {
                let actual = outboard.shard();
                return Err(StoreError::Mismatch { path: path.to_owned(), expected, actual });
            }
            let placed = self.store_whole(&outboard, pin, &temp, || Ok(()))?;
            Ok(Imported { size, how: placed.then_some(how) })
        })();
        if checked.is_err() {
            let _ = fs::remove_file(&temp);
        }
        checked
    }

    /// Stores an object whose bytes `fill` writes to `temp`. False if a sound
    /// copy was held already.
    fn store_whole(
        &self,
        outboard: &Outboard,
        pin: bool,
        temp: &Path,
        fill: impl Fn() -> Result<(), StoreError>,
    ) -> Result<bool, StoreError> {
        let (shard, size) = (outboard.shard(), outboard.size());
        if self.table().whole.contains(&shard) && self.is_sound(shard) {
            let _ = fs::remove_file(temp);
            return if pin { self.pin(shard).map(|()| false) } else { Ok(false) };
        }
        let promised = size + outboard_bytes(size);
        self.make_room(promised, Some(shard))?;
        let filled = self.with_space(promised, shard, &fill);
        let placed = filled.and_then(|()| {
            self.with_space(outboard_bytes(size), shard, || {
                self.place_promised(outboard, pin, temp)
            })
        });
        let mut table = self.table();
        table.used = table.used.saturating_sub(promised);
        drop(table);
        if placed.is_err() {
            let _ = fs::remove_file(temp);
        }
        placed?;
        self.write_uses_in_batches();
        self.announce();
        Ok(true)
    }

    fn place_promised(
        &self,
        outboard: &Outboard,
        pin: bool,
        temp: &Path,
    ) -> Result<(), StoreError> {
        let shard = outboard.shard();
        for _ in 0..RETRIES_MAX {
            let object = self.object_or_new(shard, outboard.size());
            let mut held = write_lock(&object.held);
            if held.dead {
                continue;
            }
            if pin {
                self.pin_alone(shard, outboard.size())?;
            }
            if let Err(e) = object::place(&self.layout, outboard, temp, &mut held) {
                if !self.table().pins.is_alone(shard) {
                    let _ = files::remove(&self.layout.path(shard, FileKind::Pin));
                }
                if held.groups.held_bytes() == 0 {
                    self.abandon_new(shard, &mut held);
                }
                return Err(e);
            }
            self.forget_outboard(shard);
            let mut table = self.table();
            table.charge(shard, held.charge());
            table.whole.insert(shard);
            if pin {
                table.pins.add_alone(shard, outboard.size());
            }
            drop(table);
            drop(held);
            self.note_use(shard, Use::First);
            return Ok(());
        }
        Err(StoreError::NotHeld(shard))
    }

    /// Whether an object recorded as whole is still valid; damage is quarantined.
    fn is_sound(&self, shard: ShardId) -> bool {
        self.check(shard).is_ok_and(|checked| checked.is_some_and(|c| c.damaged.is_empty()))
    }
}
