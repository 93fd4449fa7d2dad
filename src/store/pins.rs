//! Who pins what: models pin the objects that they were told to, and an object can be pinned by
//! itself.
//!
//! Owns the sums in memory and the format of a model's record. An object is pinned as long as
//! anyone pins it. Work in progress holds objects back from eviction without pinning them: that
//! ends with the process. Does no file I/O.
//!
//! A record is text: a first line of [`FIRST_LINE`], the model's name in JSON, one line for each
//! object (its id and its size in bytes), and the first 16 bytes of the BLAKE3 hash of the
//! model's id followed by everything before.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use super::{ModelId, ShardId};

const FIRST_LINE: &str = "doppler pins 1";
const CHECK: &str = "check ";
const NAME: &str = "name ";

/// The most bytes of a record that are read: a line for each object of the largest manifest.
pub(super) const RECORD_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// What a model pins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModelPin {
    /// The model's name in its manifest.
    pub name: String,
    /// The objects, with their sizes in bytes.
    pub objects: BTreeMap<ShardId, u64>,
}

impl ModelPin {
    /// The contents of the record.
    pub(super) fn to_record(&self, model: ModelId) -> String {
        let name = serde_json::Value::from(self.name.as_str());
        let mut text = format!("{FIRST_LINE}\n{NAME}{name}\n");
        for (shard, size) in &self.objects {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{shard} {size}");
        }
        let check = checksum(model, &text);
        text + CHECK + &check + "\n"
    }

    /// Reads a record. False if it is damaged: then what can be read of it is returned.
    pub(super) fn from_record(model: ModelId, bytes: &[u8]) -> (Self, bool) {
        let text = String::from_utf8_lossy(bytes);
        let mut pin = Self::default();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix(NAME) {
                pin.name = serde_json::from_str(name).unwrap_or_default();
            } else if let Some((id, size)) = line.split_once(' ')
                && let (Ok(shard), Ok(size)) = (id.parse(), size.parse())
            {
                pin.objects.insert(shard, size);
            }
        }
        let sound = pin.to_record(model).as_bytes() == bytes;
        (pin, sound)
    }
}

fn checksum(model: ModelId, text: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(model.as_bytes()).update(text.as_bytes());
    let hex = hasher.finalize().to_hex();
    hex.chars().take(32).collect()
}

/// All pins of a store, in memory.
#[derive(Debug, Default)]
pub(super) struct Pins {
    /// Objects pinned by themselves.
    alone: HashMap<ShardId, u64>,
    models: BTreeMap<ModelId, ModelPin>,
    /// How many models pin an object.
    by_models: HashMap<ShardId, usize>,
    /// How often an object is held back from eviction.
    held_back: HashMap<ShardId, usize>,
}

impl Pins {
    /// Whether anyone pins an object.
    pub fn contains(&self, shard: ShardId) -> bool {
        self.alone.contains_key(&shard) || self.by_models.contains_key(&shard)
    }

    /// Whether an object must not be evicted: it is pinned or held back.
    pub fn spare(&self, shard: ShardId) -> bool {
        self.contains(shard) || self.held_back.contains_key(&shard)
    }

    /// Every pinned object, once.
    pub fn iter(&self) -> impl Iterator<Item = ShardId> {
        let alone = self.alone.keys().filter(|shard| !self.by_models.contains_key(shard));
        self.by_models.keys().chain(alone).copied()
    }

    /// Objects that are pinned by themselves and by no model.
    pub fn only_alone(&self) -> impl Iterator<Item = ShardId> {
        self.alone.keys().filter(|shard| !self.by_models.contains_key(shard)).copied()
    }

    /// The size in bytes of a pinned object, if whoever pinned it knew.
    pub fn size_of(&self, shard: ShardId) -> Option<u64> {
        let by_model = || self.models.values().find_map(|pin| pin.objects.get(&shard));
        let alone = self.alone.get(&shard).filter(|size| **size > 0);
        alone.or_else(by_model).copied()
    }

    pub fn is_alone(&self, shard: ShardId) -> bool {
        self.alone.contains_key(&shard)
    }

    /// The models that pin an object.
    pub fn models_of(&self, shard: ShardId) -> Vec<ModelId> {
        if !self.by_models.contains_key(&shard) {
            return Vec::new();
        }
        let pinning = self.models.iter().filter(|(_, pin)| pin.objects.contains_key(&shard));
        pinning.map(|(model, _)| *model).collect()
    }

    pub fn model(&self, model: ModelId) -> Option<&ModelPin> {
        self.models.get(&model)
    }

    pub const fn models(&self) -> &BTreeMap<ModelId, ModelPin> {
        &self.models
    }

    /// `size` is 0 if it is not known.
    pub fn add_alone(&mut self, shard: ShardId, size: u64) {
        self.alone.insert(shard, size);
    }

    pub fn remove_alone(&mut self, shard: ShardId) {
        self.alone.remove(&shard);
    }

    /// Replaces what a model pins. Without objects it pins nothing.
    pub fn set_model(&mut self, model: ModelId, pin: ModelPin) {
        let before = self.models.remove(&model).unwrap_or_default();
        for shard in before.objects.keys() {
            lower(&mut self.by_models, *shard);
        }
        for shard in pin.objects.keys() {
            *self.by_models.entry(*shard).or_default() += 1;
        }
        if !pin.objects.is_empty() {
            self.models.insert(model, pin);
        }
    }

    pub fn hold_back(&mut self, shard: ShardId) {
        *self.held_back.entry(shard).or_default() += 1;
    }

    /// Undoes one [`Self::hold_back`].
    pub fn let_go(&mut self, shard: ShardId) {
        lower(&mut self.held_back, shard);
    }
}

fn lower(counts: &mut HashMap<ShardId, usize>, shard: ShardId) {
    if let Some(count) = counts.get_mut(&shard) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&shard);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(byte: u8) -> ShardId {
        ShardId::from([byte; 32])
    }

    fn model(byte: u8) -> ModelId {
        ModelId::from([byte; 32])
    }

    fn pin(objects: &[u8]) -> ModelPin {
        let sized = objects.iter().map(|byte| (shard(*byte), 100 + u64::from(*byte)));
        ModelPin { name: "a \"name\"\nof two lines".to_owned(), objects: sized.collect() }
    }

    #[test]
    fn an_object_is_pinned_as_long_as_anyone_pins_it() {
        let mut pins = Pins::default();
        pins.set_model(model(1), pin(&[1, 2, 3]));
        pins.set_model(model(2), pin(&[3, 4]));
        pins.add_alone(shard(4), 0);
        assert_eq!(pins.models_of(shard(3)), [model(1), model(2)]);
        pins.set_model(model(1), ModelPin::default());
        let mut left: Vec<_> = pins.iter().collect();
        left.sort_unstable();
        assert_eq!(left, [shard(3), shard(4)]);
        assert!(pins.only_alone().next().is_none());
        assert_eq!(pins.size_of(shard(4)), Some(104), "the model knows it");
        pins.set_model(model(2), pin(&[3]));
        assert!(pins.contains(shard(4)) && pins.only_alone().eq([shard(4)]));
        assert_eq!(pins.size_of(shard(4)), None);
        pins.remove_alone(shard(4));
        assert!(!pins.contains(shard(4)) && pins.models().len() == 1);
    }

    #[test]
    fn what_is_held_back_is_spared_until_all_let_go() {
        let mut pins = Pins::default();
        pins.hold_back(shard(1));
        pins.hold_back(shard(1));
        pins.let_go(shard(1));
        assert!(pins.spare(shard(1)) && !pins.contains(shard(1)));
        pins.let_go(shard(1));
        pins.let_go(shard(1));
        assert!(!pins.spare(shard(1)));
    }

    #[test]
    fn a_record_is_read_back_and_damage_is_noticed() {
        let whole = pin(&[1, 2, 200]);
        let record = whole.to_record(model(7));
        assert_eq!(ModelPin::from_record(model(7), record.as_bytes()), (whole.clone(), true));
        assert!(!ModelPin::from_record(model(8), record.as_bytes()).1, "another model's");
        for at in 0..record.len() {
            let mut bytes = record.clone().into_bytes();
            bytes[at] ^= 1 << (at % 8);
            let (read, sound) = ModelPin::from_record(model(7), &bytes);
            assert!(!sound, "byte {at}");
            assert!(!read.objects.is_empty(), "byte {at}: other lines are read");
            assert!(!ModelPin::from_record(model(7), &record.as_bytes()[..at]).1, "cut at {at}");
        }
        assert_eq!(ModelPin::from_record(model(7), b"").0, ModelPin::default());
    }
}
