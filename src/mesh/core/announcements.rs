//! The models that the swarm's nodes know, each with its publisher's signature. Pure: the time is
//! an argument.
//!
//! There is always room for what this node published or keeps, and it stays. Of all other
//! announcements, those of models that nobody holds give way first, then those without a trusted
//! signer, and among these the ones of the peer that sent most. Invariants: everything kept here
//! was verified; there are at most `ANNOUNCEMENTS_MAX` other announcements, and `SIGNERS_MAX` of
//! one model.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use doppler_ids::PeerId;

use super::limits::{ANNOUNCEMENTS_MAX, SIGNERS_MAX};
use doppler_store::signature::{PublicKey, SignatureError, SignedModel};
use doppler_store::{ModelId, ShardId};

/// The result of hearing an announcement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Learned {
    New,
    Known,
    /// Its signature does not verify; dropped.
    Bad(SignatureError),
    /// No room, and every known model has a better claim to its place; dropped.
    Full,
}

/// Where an announcement comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// Published by this node.
    Own,
    /// It is of a model that this node keeps.
    Kept,
    /// It came from this peer.
    Peer(PeerId),
}

/// What gives an announcement its priority; the lowest gives way first. Whether anybody holds the
/// model, and whether a trusted publisher signed it.
type Claim = (bool, bool);

struct Known {
    signed: SignedModel,
    own: bool,
    kept: bool,
    /// The peer that sent it first; none if it came from this node.
    from: Option<PeerId>,
    heard: Instant,
    /// When any node, including this one, last announced it.
    said: Option<Instant>,
    /// It must be sent, whichever peer sent it last.
    owed: bool,
}

impl Known {
    const fn is_protected(&self) -> bool {
        self.own || self.kept
    }
}

/// Who holds a model: anybody, or a given peer.
pub(super) type Holding<'a> = &'a dyn Fn(ModelId, Option<PeerId>) -> bool;

type Key = (ModelId, PublicKey);

/// Verified announcements, by model and publisher.
#[derive(Default)]
pub(super) struct Announcements {
    known: BTreeMap<Key, Known>,
    trusted: BTreeSet<PublicKey>,
}

impl Announcements {
    /// Sets the publishers whose models have a higher priority from here on.
    pub(super) fn trust(&mut self, trusted: BTreeSet<PublicKey>) {
        self.trusted = trusted;
    }

    /// Adds an announcement if `verify` finds it signed by its publisher, which is asked only if it is not
    /// known. `holding` says which peers hold a model.
    pub(super) fn learn_if(
        &mut self,
        now: Instant,
        signed: &SignedModel,
        source: Origin,
        holding: Holding,
        verify: &dyn Fn() -> Result<(), SignatureError>,
    ) -> Learned {
        let key = (signed.model, signed.publisher);
        let (own, kept) = (source == Origin::Own, source == Origin::Kept);
        let from = match source {
            Origin::Peer(peer) => Some(peer),
            Origin::Own | Origin::Kept => None,
        };
        if let Some(known) = self.known.get_mut(&key)
            && known.signed == *signed
        {
            (known.own, known.kept) = (known.own || own, known.kept || kept);
            known.heard = now;
            if from.is_some() {
                known.said = Some(now);
            }
            return Learned::Known;
        }
        if let Err(error) = verify() {
            return Learned::Bad(error);
        }
        // A publisher's new name or number of copies replaces the old one. What it signed earlier
        // may still come from a node that was away, and changes nothing.
        if let Some(known) = self.known.get_mut(&key)
            && !signed.is_later(&known.signed)
        {
            (known.own, known.kept) = (known.own || own, known.kept || kept);
            return Learned::Known;
        }
        let old = self.known.get(&key);
        let (own, kept) =
            (own || old.is_some_and(|old| old.own), kept || old.is_some_and(|old| old.kept));
        if old.is_none()
            && let Some(peer) = from
            && !self.make_room(key, peer, holding)
        {
            return Learned::Full;
        }
        let said = from.is_some().then_some(now);
        let signed = signed.clone();
        self.known.insert(key, Known { signed, own, kept, from, heard: now, said, owed: false });
        Learned::New
    }

    /// Whether there is room for one more announcement from a peer, after others have given way.
    fn make_room(&mut self, (model, publisher): Key, from: PeerId, holding: Holding) -> bool {
        let first = (model, PublicKey([0; 32]));
        let signers: Vec<Key> = self
            .known
            .range(first..)
            .take_while(|((other, _), _)| *other == model)
            .filter(|(_, known)| !known.is_protected())
            .map(|(key, _)| *key)
            .collect();
        if signers.len() >= SIGNERS_MAX {
            // Of one model's signers, those stay who are trusted or hold it themselves.
            let claim = |key: PublicKey| {
                let peer = PeerId::from_public_key(key.0);
                (self.trusted.contains(&key), holding(model, Some(peer)))
            };
            let least = signers.into_iter().min_by_key(|(_, signer)| claim(*signer));
            let Some(least) = least.filter(|(_, signer)| claim(*signer) < claim(publisher)) else {
                return false;
            };
            self.known.remove(&least);
            return true;
        }
        let others = self.known.iter().filter(|(_, known)| !known.is_protected());
        let claims: Vec<(Key, Claim, &Known)> =
            others.map(|(key, known)| (*key, self.claim(*key, holding), known)).collect();
        if claims.len() < ANNOUNCEMENTS_MAX {
            return true;
        }
        let mine = self.claim((model, publisher), holding);
        let Some(least) = claims.iter().map(|(_, claim, _)| *claim).min() else { return true };
        let mut by_peer: BTreeMap<Option<PeerId>, usize> = BTreeMap::new();
        for (.., known) in claims.iter().filter(|(_, claim, _)| *claim == least) {
            *by_peer.entry(known.from).or_default() += 1;
        }
        let Some((most, number)) = by_peer.iter().max_by_key(|(_, number)| **number) else {
            return true;
        };
        let from_here = by_peer.get(&Some(from)).copied().unwrap_or_default();
        // A held model gives way to another held model only if another peer uses more than its
        // share.
        let is_held = least.0;
        if least > mine || least == mine && is_held && *number <= from_here {
            return false;
        }
        let oldest = claims
            .iter()
            .filter(|(_, claim, known)| *claim == least && known.from == *most)
            .min_by_key(|(.., known)| known.heard)
            .map(|(key, ..)| *key);
        oldest.is_some_and(|oldest| self.known.remove(&oldest).is_some())
    }

    fn claim(&self, (model, publisher): Key, holding: Holding) -> Claim {
        (holding(model, None), self.trusted.contains(&publisher))
    }

    /// Stops keeping a model. If `own` is given, it also stops announcing it as its own.
    pub(super) fn release(&mut self, model: ModelId, own: bool) {
        for (_, known) in self.known.iter_mut().filter(|((other, _), _)| *other == model) {
            known.kept = false;
            known.own &= !own;
        }
    }

    /// Forgets announcements, of one model or of all, whose model nobody holds and that nobody has
    /// sent for `after`. Returns the models of which none is left.
    pub(super) fn forget(
        &mut self,
        now: Instant,
        after: Duration,
        of: Option<ModelId>,
        holding: Holding,
    ) -> Vec<ModelId> {
        let mut gone = BTreeSet::new();
        self.known.retain(|(model, _), known| {
            let stays = of.is_some_and(|of| of != *model)
                || known.is_protected()
                || now.saturating_duration_since(known.heard) < after
                || holding(*model, None);
            if !stays {
                gone.insert(*model);
            }
            stays
        });
        gone.retain(|model| !self.knows(*model));
        gone.into_iter().collect()
    }

    fn of_model(&self, model: ModelId) -> impl Iterator<Item = &Known> {
        let first = (model, PublicKey([0; 32]));
        let of_model = self.known.range(first..).take_while(move |((other, _), _)| *other == model);
        of_model.map(|(_, known)| known)
    }

    fn knows(&self, model: ModelId) -> bool {
        self.of_model(model).next().is_some()
    }

    /// Whether this node published the model or keeps it.
    pub(super) fn is_protected(&self, model: ModelId) -> bool {
        self.of_model(model).any(Known::is_protected)
    }

    /// The number of announcements that may have to give way.
    pub(super) fn unprotected(&self) -> usize {
        self.known.values().filter(|known| !known.is_protected()).count()
    }

    /// Everything known, by model id.
    pub(super) fn all(&self) -> Vec<SignedModel> {
        self.known.values().map(|known| known.signed.clone()).collect()
    }

    /// The size of a model's manifest, if the object is one: the smallest announced.
    pub(super) fn manifest_size(&self, object: ShardId) -> Option<u64> {
        let model = ModelId::from(*object.as_bytes());
        self.of_model(model).map(|known| known.signed.manifest_size).min()
    }

    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// Call when this node has just sent an announcement.
    pub(super) fn said(&mut self, now: Instant, signed: &SignedModel) {
        if let Some(known) = self.known.get_mut(&(signed.model, signed.publisher)) {
            (known.said, known.owed) = (Some(now), false);
        }
    }

    /// From here on, this node must send everything that it has to announce, whichever peer sent it
    /// last.
    pub(super) fn owe_all(&mut self) {
        for known in self.known.values_mut() {
            known.owed = true;
        }
    }

    /// What this node should send: its own models and those of which it `holds` something, if they
    /// must be sent or nobody has sent them within `quiet`. At most `max`, beginning with those
    /// sent longest ago; they count as sent. The flag says whether there are more.
    pub(super) fn take_due(
        &mut self,
        now: Instant,
        quiet: Duration,
        max: usize,
        holds: impl Fn(ModelId) -> bool,
    ) -> (Vec<SignedModel>, bool) {
        let is_due = |known: &Known| {
            let rested = |said| now.saturating_duration_since(said) >= quiet;
            known.owed || known.said.is_none_or(rested)
        };
        let mut due: Vec<&mut Known> = self
            .known
            .iter_mut()
            .filter(|((model, _), known)| is_due(known) && (known.own || holds(*model)))
            .map(|(_, known)| known)
            .collect();
        due.sort_by_key(|known| known.said);
        let more = due.len() > max;
        let say = due.into_iter().take(max).map(|known| {
            (known.said, known.owed) = (Some(now), false);
            known.signed.clone()
        });
        (say.collect(), more)
    }
}

#[cfg(test)]
#[path = "announcements_tests.rs"]
mod tests;
