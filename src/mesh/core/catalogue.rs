//! Which models this node knows, publishes and keeps: what it takes in, what it registers, what it
//! forgets, and which objects are here for a model's sake.
//!
//! Invariant: a model leaves with its object list, and only once nobody holds or announces it.

use std::time::{Duration, Instant};

use doppler_ids::{ModelId, PeerId, ShardId};
use doppler_store::signature::{SignatureError, SignedModel};
use tracing::debug;

use super::announcements::{Learned, Origin};
use super::gossip::Due;
use super::limits::CROWD;
use super::{Action, Core, Sight, Word};
use crate::wire::Envelope;

impl Core {
    pub(super) fn on_announcement(
        &mut self,
        now: Instant,
        author: PeerId,
        (signed, word): (&SignedModel, &Word),
        out: &mut Vec<Action>,
    ) -> bool {
        match self.learn(now, signed, Origin::Peer(author), &|| word.verify(signed)) {
            Learned::New => {
                let signed = signed.clone();
                out.extend([Action::Learned { signed, is_own: false }, Action::Changed]);
                true
            }
            Learned::Known | Learned::Full => true,
            Learned::Bad(error) => {
                debug!(%error, "announcement dropped");
                false
            }
        }
    }

    pub(super) fn on_publish(
        &mut self,
        now: Instant,
        signed: SignedModel,
        source: Origin,
        out: &mut Vec<Action>,
    ) {
        match self.learn(now, &signed, source, &|| signed.verify()) {
            Learned::Bad(error) => out.push(Action::Refuse(error.into())),
            Learned::New => {
                // A model's news does not wait for what else has changed.
                if source == Origin::Own && !self.contacts.is_empty() && self.schedule.may_say(now)
                {
                    out.push(Action::Publish(Envelope::Announcement(signed.clone()).encode()));
                    self.schedule.said(now, 1);
                    self.announcements.said(now, &signed);
                }
                out.push(Action::Learned { signed, is_own: true });
                let due = if self.size() > CROWD { Due::Holdings } else { Due::Everything };
                self.schedule.change(now, due);
            }
            // There is always room for this node's own messages.
            Learned::Known | Learned::Full => self.schedule.change(now, Due::Everything),
        }
    }

    pub(super) fn on_release(
        &mut self,
        now: Instant,
        model: ModelId,
        own: bool,
        out: &mut Vec<Action>,
    ) {
        self.announcements.release(model, own);
        self.forget(now, Duration::ZERO, Some(model), out);
        self.schedule.change(now, Due::Holdings);
    }

    pub(super) fn on_register(
        &mut self,
        now: Instant,
        (model, objects): (ModelId, Vec<ShardId>),
        sight: &dyn Sight,
        out: &mut Vec<Action>,
    ) {
        let Self { membership, announcements, .. } = self;
        match membership.register(model, objects, |model| announcements.is_protected(model)) {
            Ok(()) => {
                self.schedule.change(now, Due::Everything);
                self.stir_topics(now);
                self.settle(now, true, sight, out);
                out.push(Action::Changed);
            }
            Err(error) => out.push(Action::Refuse(error.into())),
        }
    }

    /// Whether this node holds an object of a model, whole or in part, for the sake of this model.
    pub(super) fn holds_of(&self, model: ModelId, list: &[ShardId]) -> bool {
        let at = |bit: usize| list.get(bit);
        let whole = |bit: usize| at(bit).is_some_and(|id| self.whole.contains(id));
        let has = |bit: usize| whole(bit) || at(bit).is_some_and(|id| self.parts.contains_key(id));
        match self.announcements.is_protected(model) {
            true => (0..list.len()).any(has),
            false => self.membership.is_life_sign(model, list, has, whole),
        }
    }

    /// Whether an object is here for the sake of another model that this node published or keeps. A
    /// withdrawn model does not count as held because it shares its tokenizer with another.
    pub(super) fn is_anothers(&self, model: ModelId, shard: ShardId) -> bool {
        self.membership.is_shared(model, shard, |other| self.announcements.is_protected(other))
    }

    /// Adds an announcement; a model's holders protect it from being pushed out.
    fn learn(
        &mut self,
        now: Instant,
        signed: &SignedModel,
        source: Origin,
        verify: &dyn Fn() -> Result<(), SignatureError>,
    ) -> Learned {
        let Self { announcements, membership, .. } = self;
        let holding = |model: ModelId, peer: Option<PeerId>| match peer {
            Some(peer) => membership.holds_of(now, model, peer),
            None => membership.holders_of_model(now, model).next().is_some(),
        };
        let learned = announcements.learn_if(now, signed, source, &holding, verify);
        match learned {
            Learned::Bad(_) => self.counts.bad_signatures += 1,
            Learned::Full => self.counts.ignored_messages += 1,
            Learned::New | Learned::Known => {}
        }
        learned
    }

    /// Forgets models that nobody holds and nobody has announced for `after`.
    pub(super) fn forget(
        &mut self,
        now: Instant,
        after: Duration,
        of: Option<ModelId>,
        out: &mut Vec<Action>,
    ) {
        let Self { announcements, membership, .. } = self;
        let gone = announcements.forget(now, after, of, &|model, _| {
            membership.holders_of_model(now, model).next().is_some()
        });
        for model in gone {
            self.membership.unregister(model);
            out.extend([Action::Forgot(model), Action::Changed]);
        }
    }
}
