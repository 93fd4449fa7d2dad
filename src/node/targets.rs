//! Which models this node helps to keep, and how many copies of each of their objects there should
//! be.
//!
//! It helps with its own models, with those that it keeps, and with those that it may use without
//! asking: a trusted publisher signed them, the policy allows everybody, or the swarm is private.
//! Never with others: bytes of strangers are not copied unasked, nor what was removed here. What a better known publisher
//! wants counts; what a stranger wants counts only where nobody better signed.

use std::collections::BTreeMap;

use super::catalog::{Known, sizes};
use super::resolve::Standing;
use super::service::Service;
use super::trust::{self, TrustPolicy};
use doppler_store::{ModelId, Replicas, ShardId};

/// The most objects that this node counts the copies of, over all models. Its own models and those
/// that it keeps come first.
const OBJECTS_MAX: usize = 128 * 1024;

/// Who signed a model, as far as this node knows them, and how many copies each of them wants.
type Wishes = Vec<(Standing, Replicas)>;

/// What the best known of a model's signers want.
fn wanted(wishes: &[(Standing, Replicas)]) -> Replicas {
    let best = wishes.iter().map(|(standing, _)| *standing).min();
    let theirs = wishes.iter().filter(|(standing, _)| Some(*standing) == best);
    theirs.map(|(_, replicas)| *replicas).reduce(Replicas::or).unwrap_or_default()
}

/// Whether this node helps to keep a model with these signers. `is_kept`: it was used or pinned
/// here. `is_open_to_all`: no approval of publishers is needed.
fn helps(wishes: &[(Standing, Replicas)], is_kept: bool, is_open_to_all: bool) -> bool {
    match wishes.iter().map(|(standing, _)| *standing).min() {
        Some(Standing::Own | Standing::Trusted) => true,
        Some(Standing::Stranger) => is_kept || is_open_to_all,
        Some(Standing::Refused) | None => false,
    }
}

/// An object that this node helps to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Object {
    /// Bytes.
    pub size: u64,
    pub replicas: Replicas,
    /// A model that names it.
    pub model: ModelId,
}

impl Service {
    fn wishes(&self, known: &Known, trust: &trust::Known) -> Wishes {
        let wish = |signed: &doppler_store::signature::SignedModel| {
            (self.standing(signed.publisher, trust), signed.replicas)
        };
        known.signed.iter().map(wish).collect()
    }

    /// How many copies a model should have.
    pub(super) fn wanted_copies(&self, known: &Known, trust: &trust::Known) -> Replicas {
        wanted(&self.wishes(known, trust))
    }

    /// Whether strangers' models may be used without the owner's approval.
    pub(super) fn is_open_to_all(&self) -> bool {
        self.config().swarm_key.is_some() || self.config().trust_policy == TrustPolicy::Any
    }

    /// Every object of the models that this node helps to keep: the manifests, the shards and the
    /// other files. An object of several models has the most copies that any of them wants.
    pub(super) fn kept_objects(&self) -> BTreeMap<ShardId, Object> {
        // A damaged list of trust is told where it decides; here it trusts nobody.
        let trust = self.trust.read().unwrap_or_default();
        let mut objects: BTreeMap<ShardId, Object> = BTreeMap::new();
        let known = self.catalog.list().into_iter();
        let mut models: Vec<_> = known
            .map(|(model, known)| (self.wishes(&known, &trust), self.kept.has(model), model, known))
            .filter(|(wishes, is_kept, model, _)| {
                helps(wishes, *is_kept, self.is_open_to_all()) && !self.declined.has(*model)
            })
            .collect();
        models.sort_by_key(|(wishes, is_kept, model, _)| {
            let best = wishes.iter().map(|(standing, _)| *standing).min();
            (best != Some(Standing::Own), !is_kept, best, *model)
        });
        for (wishes, _, model, known) in models {
            let Some(manifest) = &known.manifest else { continue };
            if objects.len().saturating_add(manifest.shards.len()) > OBJECTS_MAX {
                continue;
            }
            let Ok(of_model) = sizes(manifest) else { continue };
            let said = || known.signed.first().map(|signed| signed.manifest_size);
            let manifest_size = self.ladder.expected_size(model.manifest()).or_else(said);
            let manifest = manifest_size.map(|size| (model.manifest(), size));
            let replicas = wanted(&wishes);
            for (shard, size) in of_model.into_iter().chain(manifest) {
                let object = objects.entry(shard).or_insert(Object { size, replicas, model });
                object.replicas = object.replicas.or(replicas);
            }
        }
        objects
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn copies(min: usize, max: usize) -> Replicas {
        Replicas { min, max }
    }

    #[test]
    fn the_best_known_signer_decides_and_strangers_only_among_themselves() {
        use Standing::{Own, Refused, Stranger, Trusted};
        assert_eq!(wanted(&[]), Replicas::DEFAULT);
        let greedy = (Stranger, copies(64, 64));
        assert_eq!(wanted(&[greedy, (Trusted, copies(3, 5))]), copies(3, 5));
        assert_eq!(wanted(&[(Trusted, copies(3, 5)), (Own, copies(1, 2))]), copies(1, 2));
        assert_eq!(wanted(&[(Trusted, copies(3, 5)), (Trusted, copies(4, 4))]), copies(4, 5));
        assert_eq!(wanted(&[greedy, (Refused, copies(1, 1))]), copies(64, 64));
    }

    #[test]
    fn bytes_of_strangers_are_not_kept_unasked() {
        use Standing::{Own, Refused, Stranger, Trusted};
        let by = |standing| [(standing, Replicas::DEFAULT)];
        assert!(helps(&by(Own), false, false) && helps(&by(Trusted), false, false));
        assert!(!helps(&by(Stranger), false, false));
        assert!(helps(&by(Stranger), true, false), "it was used or pinned here");
        assert!(helps(&by(Stranger), false, true), "in a private swarm");
        assert!(!helps(&by(Refused), true, true) && !helps(&[], true, true));
    }
}
