//! The models that the swarm's nodes know of, each under its publisher's
//! signature. Pure: the time is an argument.
//!
//! Invariant: everything kept here was verified.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::limits::ANNOUNCEMENTS_MAX;
use doppler_store::signature::{PublicKey, SignatureError, SignedModel};
use doppler_store::{ModelId, ShardId};

/// What hearing an announcement led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Learned {
    New,
    Known,
    /// Its signature does not verify; dropped.
    Bad(SignatureError),
    /// No room, and every known model has a holder; dropped.
    Full,
}

struct Known {
    signed: SignedModel,
    /// Published by this node: never dropped, always announced.
    own: bool,
    heard: Instant,
    /// When anybody, this node included, last said it.
    said: Instant,
}

/// Verified announcements, by model and publisher.
#[derive(Default)]
pub(super) struct Announcements {
    known: BTreeMap<(ModelId, PublicKey), Known>,
}

impl Announcements {
    /// Takes in an announcement from this node (`own`) or a peer. `has_holder` says
    /// which models have one; when full, the one without that was heard longest ago gives way.
    pub(super) fn learn(
        &mut self,
        now: Instant,
        signed: SignedModel,
        own: bool,
        has_holder: impl Fn(ModelId) -> bool,
    ) -> Learned {
        let key = (signed.model, signed.publisher);
        if let Some(known) = self.known.get_mut(&key)
            && known.signed == signed
        {
            known.own |= own;
            (known.heard, known.said) = (now, now);
            return Learned::Known;
        }
        if let Err(error) = signed.verify() {
            return Learned::Bad(error);
        }
        if !self.known.contains_key(&key) && self.known.len() >= ANNOUNCEMENTS_MAX {
            let idle = self
                .known
                .iter()
                .filter(|((model, _), known)| !known.own && !has_holder(*model))
                .min_by_key(|(_, known)| known.heard)
                .map(|(key, _)| *key);
            match idle {
                Some(idle) => self.known.remove(&idle),
                None => return Learned::Full,
            };
        }
        self.known.insert(key, Known { signed, own, heard: now, said: now });
        Learned::New
    }

    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// Everything known, by model id.
    pub(super) fn all(&self) -> Vec<SignedModel> {
        self.known.values().map(|known| known.signed.clone()).collect()
    }

    /// The size of a model's manifest, if the object is one; the least that anybody says.
    pub(super) fn manifest_size(&self, object: ShardId) -> Option<u64> {
        let model = ModelId::from(*object.as_bytes());
        let first = (model, PublicKey([0; 32]));
        let of_model = self.known.range(first..).take_while(|((other, _), _)| *other == model);
        of_model.map(|(_, known)| known.signed.manifest_size).min()
    }

    /// What this node should say: its own models and those whose manifest it `holds`,
    /// unless somebody said it within `quiet`. Marks what it returns as said.
    pub(super) fn take_due(
        &mut self,
        now: Instant,
        quiet: Duration,
        holds: impl Fn(ModelId) -> bool,
    ) -> Vec<SignedModel> {
        let mut say = Vec::new();
        for ((model, _), known) in &mut self.known {
            let due = quiet.is_zero() || now.saturating_duration_since(known.said) >= quiet;
            if due && (known.own || holds(*model)) {
                known.said = now;
                say.push(known.signed.clone());
            }
        }
        say
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(index: usize) -> SignedModel {
        SignedModel::sign(&[1; 32], ModelId::of(&index.to_le_bytes()), "m", 9).unwrap()
    }

    #[test]
    fn only_verified_announcements_are_kept_and_once() {
        let now = Instant::now();
        let mut all = Announcements::default();
        let good = signed(0);
        let bad = SignedModel { name: "other".into(), ..good.clone() };
        assert!(matches!(all.learn(now, bad.clone(), false, |_| true), Learned::Bad(_)));
        assert_eq!(all.learn(now, good.clone(), false, |_| true), Learned::New);
        assert_eq!(all.learn(now, good.clone(), false, |_| true), Learned::Known);
        // A known key does not let a changed announcement slip in.
        assert!(matches!(all.learn(now, bad, false, |_| true), Learned::Bad(_)));
        assert_eq!(all.all(), [good]);
    }

    #[test]
    fn a_manifest_is_known_by_its_hash_and_its_least_size() {
        let mut all = Announcements::default();
        let (model, now) = (ModelId::of(b"model"), Instant::now());
        assert_eq!(all.manifest_size(model.manifest()), None);
        for (publisher, size) in [([1; 32], 700), ([2; 32], 500), ([3; 32], 600)] {
            let signed = SignedModel::sign(&publisher, model, "m", size).unwrap();
            assert_eq!(all.learn(now, signed, false, |_| true), Learned::New);
        }
        all.learn(now, signed(0), false, |_| true);
        assert_eq!(all.manifest_size(model.manifest()), Some(500));
        assert_eq!(all.manifest_size(ShardId::of(b"shard")), None);
    }

    #[test]
    fn a_flood_of_models_nobody_holds_pushes_out_no_others() {
        let now = Instant::now();
        let mut all = Announcements::default();
        let held = signed(0);
        all.learn(now, held.clone(), false, |_| true);
        for index in 1..ANNOUNCEMENTS_MAX + 20 {
            let later = now + Duration::from_millis(index as u64);
            let learned = all.learn(later, signed(index), false, |model| model == held.model);
            assert_eq!(learned, Learned::New);
        }
        assert_eq!(all.all().len(), ANNOUNCEMENTS_MAX);
        assert!(all.all().contains(&held));
        assert_eq!(all.learn(now, signed(1), false, |_| true), Learned::Full);
    }

    #[test]
    fn holders_repeat_what_nobody_said_lately() {
        let now = Instant::now();
        let quiet = Duration::from_secs(10);
        let mut all = Announcements::default();
        all.learn(now, signed(0), true, |_| false);
        all.learn(now, signed(1), false, |_| false);
        let held = signed(1).model;
        assert_eq!(all.take_due(now + quiet / 2, quiet, |_| true), []);
        assert_eq!(all.take_due(now + quiet, quiet, |_| false), [signed(0)]);
        assert_eq!(all.take_due(now + quiet, quiet, |model| model == held), [signed(1)]);
        assert_eq!(all.take_due(now + quiet, quiet, |_| true), []);
        assert_eq!(all.take_due(now + quiet, Duration::ZERO, |_| true).len(), 2);
    }
}
