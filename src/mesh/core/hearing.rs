//! What this node takes from the words of others: who may say what on which topic, whether it is sound, and what
//! follows from it.
//!
//! Invariants: a message is judged once; nobody speaks for another; what is ignored changes nothing but a count.

use std::time::Instant;

use doppler_ids::{Address, ModelId, PeerId};
use tracing::debug;

use super::membership::Heard;
use super::{Action, Core, MessageId, Sight, Twin, Word};
use crate::wire::{Envelope, Holdings};

impl Core {
    pub(super) fn on_gossip(
        &mut self,
        now: Instant,
        (message, topic, author): (MessageId, &str, PeerId),
        word: &Word,
        sight: &dyn Sight,
        out: &mut Vec<Action>,
    ) {
        let near = self.topics.model(topic);
        if near.is_none() && *topic != *self.config.topic || !self.inbox.admit(now, author) {
            self.counts.ignored_messages += 1;
            out.push(Action::Changed);
            return;
        }
        let is_sound = match word.envelope() {
            Err(error) => {
                debug!(%author, %error, "malformed gossip");
                self.counts.bad_messages += 1;
                false
            }
            Ok(Envelope::Unknown) => true,
            // Whatever else is said on a model's topic concerns nobody there.
            Ok(envelope) if near.is_some() && !matches!(envelope, Envelope::Holdings(_)) => true,
            Ok(Envelope::Announcement(signed)) => {
                self.on_announcement(now, author, (signed, word), out)
            }
            Ok(Envelope::Holdings(holdings)) => {
                self.on_holdings(now, (author, near), (holdings, word.addresses()), sight, out)
            }
            Ok(Envelope::Doubt(peer)) => self.on_doubt(now, author, peer, out),
            Ok(Envelope::Heartbeat { stamp, next }) => {
                let (stamp, next) = (*stamp, *next);
                self.crowd.hear(now, author, next, stamp.sequence);
                if self.membership.beat(now, author, stamp, next) {
                    self.absence.spoke(author);
                }
                true
            }
            Ok(Envelope::Goodbye(stamp)) => {
                self.on_goodbye(now, author, *stamp, sight, out);
                true
            }
        };
        if !is_sound {
            out.push(Action::Changed);
        }
        out.push(Action::Judge { message, is_sound });
    }

    fn on_holdings(
        &mut self,
        now: Instant,
        (author, near): (PeerId, Option<ModelId>),
        (holdings, addresses): (&Holdings, &[Address]),
        sight: &dyn Sight,
        out: &mut Vec<Action>,
    ) -> bool {
        if holdings.peer != author.as_bytes() {
            debug!(%author, "speaks for another peer");
            self.counts.bad_messages += 1;
            return false;
        }
        if self.reputation.is_banned(now, author) {
            return true;
        }
        if self.membership.is_repeated(now, author, holdings.stamp) {
            self.counts.ignored_messages += 1;
            return true;
        }
        match near {
            Some(model) => self.topics.hear(now, model, author, holdings.next),
            None => self.crowd.hear(now, author, holdings.next, holdings.stamp.sequence),
        }
        let (until, said) = (now + holdings.lease, (holdings.run, holdings.stamp));
        let place = || {
            let place = addresses.first().map(|address| address.without_peer().to_string());
            place.unwrap_or_default()
        };
        let is_shared = near.is_some() || self.topics.concerns(holdings);
        let heard = self.membership.hear_on(now, author, holdings, near.is_some());
        // Of those that are not remembered, runs are not told apart.
        if heard != Heard::Full
            && let Some(twin) = self.twins.hear(now, author, said, &place)
        {
            self.on_twin(now, twin, out);
        }
        if matches!(heard, Heard::Changed | Heard::Renewed) {
            self.absence.spoke(author);
        }
        match heard {
            Heard::Stale => return true,
            Heard::Full => self.counts.ignored_messages += 1,
            Heard::Changed => {
                self.settle(now, true, sight, out);
                out.push(Action::Changed);
            }
            Heard::Renewed => {}
        }
        // Whoever is alive and not needed now is not dialled at once.
        if self.known.hear(now, author, addresses, (until, is_shared)) && self.room() > 0 {
            self.dial_soon(now);
        }
        if is_shared && near.is_none() {
            self.usher(now, author, holdings, out);
        }
        true
    }

    /// Two nodes use one identity: the owner is told, and so are the two nodes, by those that
    /// notice it.
    pub(super) fn on_twin(&mut self, now: Instant, twin: Twin, out: &mut Vec<Action>) {
        let (peer, is_seen) = (twin.peer, twin.told_by.is_none());
        out.extend(self.twins.note(now, twin).map(Action::Warn));
        if is_seen && self.contacts.contains_key(&peer) && self.twins.may_tell(now, peer) {
            out.push(Action::TellTwins(peer));
        }
    }
}
