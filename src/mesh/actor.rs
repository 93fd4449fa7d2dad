//! The mesh's loop: hears gossip, says what is held, keeps leases and dials.
//! It never waits for a peer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use doppler_swarm::{Address, Message, Peers, Refusal, SwarmEvents, SwarmHandle};
use tokio::sync::{Notify, watch};
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::announcements::Learned;
use super::fetch::Fetcher;
use super::gossip::{Due, Inbox, Schedule, Sequence, holdings_messages};
use super::options::{OWN_PARTS_MAX, Timing};
use super::reputation::Conduct;
use super::state::Shared;
use crate::wire::{Envelope, Holdings};
use doppler_store::groups::Chunks;
use doppler_store::signature::SignedModel;
use doppler_store::{ShardId, ShardServe};

/// What is held in part.
type Parts = BTreeMap<ShardId, Chunks>;

pub(super) struct Actor {
    pub(super) swarm: SwarmHandle,
    pub(super) shared: Arc<Shared>,
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) serve: Arc<dyn ShardServe>,
    pub(super) topic: String,
    pub(super) timing: Timing,
    /// Told when a model was published or registered here.
    pub(super) poke: Arc<Notify>,
    pub(super) cancel: CancellationToken,
}

impl Actor {
    pub(super) async fn run(self, events: SwarmEvents) {
        let SwarmEvents { mut messages, mut peers, mut refusals, mut listening, mut reach } =
            events;
        let mut held_changed = self.serve.changes();
        let now = Instant::now();
        let mut schedule = Schedule::new(self.timing, now);
        let mut inbox = Inbox::new(now);
        let mut sequence = Sequence::default();
        let mut held: BTreeSet<ShardId> = self.serve.complete().into_iter().collect();
        let mut parts = Parts::new();
        let mut listeners = BTreeSet::new();
        schedule.change(now, Due::Everything);
        // Leases and dials are looked at a few times per lease; reads look for themselves.
        let mut upkeep =
            tokio::time::interval(self.timing.lease.min(self.timing.announce_every) / 8);
        upkeep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.cancel.cancelled() => return,
                message = messages.recv() => match message {
                    Some(message) => self.on_message(&mut inbox, message),
                    None => return,
                },
                changed = peers.changed() => match changed {
                    Ok(()) => {
                        let peers = peers.borrow_and_update().clone();
                        if self.on_peers(peers, &mut listeners) {
                            schedule.change(Instant::now(), Due::Everything);
                        }
                    }
                    Err(_) => return,
                },
                Some(refusal) = refusals.recv() => self.on_refusal(&refusal),
                Ok(()) = listening.changed() => {
                    listening.mark_unchanged();
                    schedule.change(Instant::now(), Due::Holdings);
                }
                Ok(()) = reach.changed() => {
                    reach.mark_unchanged();
                    self.shared.ring();
                }
                Ok(()) = held_changed.changed() => {
                    held_changed.mark_unchanged();
                    held = self.serve.complete().into_iter().collect();
                    schedule.change(Instant::now(), Due::Holdings);
                }
                () = self.poke.notified() => schedule.change(Instant::now(), Due::Everything),
                () = sleep_until(schedule.next().into()) => {
                    let now = Instant::now();
                    if let Some(due) = schedule.due(now) {
                        let messages = self.say(due, (&held, &parts), &listening, &mut sequence);
                        schedule.said(now, messages);
                    }
                }
                _ = upkeep.tick() => {
                    // Parts grow with every transfer: they are told of at this pace.
                    let now_parts: Parts = self.serve.partial(OWN_PARTS_MAX).into_iter().collect();
                    if now_parts != parts {
                        parts = now_parts;
                        schedule.change(Instant::now(), Due::Holdings);
                    }
                    self.upkeep(Instant::now());
                }
            }
        }
    }

    fn on_message(&self, inbox: &mut Inbox, message: Message) {
        let now = Instant::now();
        if message.topic != self.topic || !inbox.admit(now, message.author) {
            self.shared.lock().counts.ignored_messages += 1;
            self.shared.ring();
            return;
        }
        let sound = match Envelope::decode(&message.data) {
            Err(error) => {
                debug!(author = %message.author, %error, "malformed gossip");
                self.shared.lock().counts.bad_messages += 1;
                false
            }
            Ok(Envelope::Unknown) => true,
            Ok(Envelope::Announcement(signed)) => self.on_announcement(now, signed),
            Ok(Envelope::Holdings(holdings)) => self.on_holdings(now, &message, holdings),
        };
        if !sound {
            self.shared.ring();
        }
        // A full command queue only keeps the message from going further.
        let _ = self.swarm.judge(&message, sound);
    }

    /// The swarm has refused the peer; here it is kept on its record.
    fn on_refusal(&self, refusal: &Refusal) {
        let mut state = self.shared.lock();
        state.counts.refused_peers += 1;
        if refusal.why.is_proof_of_guilt() {
            state.note(Instant::now(), refusal.peer, Conduct::Violation);
        }
        drop(state);
        self.shared.ring();
    }

    fn on_announcement(&self, now: Instant, signed: SignedModel) -> bool {
        let model = signed.model;
        let name = signed.name.clone();
        let learned = self.shared.lock().learn(now, signed, false);
        match learned {
            Learned::New => {
                info!(model = %model.short(), name, "learned of a model");
                self.shared.publish_models();
                self.shared.ring();
                true
            }
            Learned::Known => true,
            Learned::Bad(error) => {
                warn!(%error, "announcement dropped");
                false
            }
            Learned::Full => true,
        }
    }

    fn on_holdings(&self, now: Instant, message: &Message, holdings: Holdings) -> bool {
        if holdings.peer != message.author.to_bytes() {
            debug!(author = %message.author, "speaks for another peer");
            self.shared.lock().counts.bad_messages += 1;
            return false;
        }
        let changed = {
            let mut state = self.shared.lock();
            if state.reputation.is_banned(now, message.author) {
                return true;
            }
            state.hear(now, message.author, holdings)
        };
        if changed {
            self.shared.stir();
            self.dial(now);
        }
        true
    }

    /// The connected peers changed; true if somebody new listens to us.
    fn on_peers(&self, peers: Peers, listeners: &mut BTreeSet<doppler_swarm::PeerId>) -> bool {
        let now_listening: BTreeSet<_> = peers
            .iter()
            .filter(|(_, peer)| peer.topics.contains(&self.topic))
            .map(|(id, _)| *id)
            .collect();
        let news = now_listening.iter().any(|peer| !listeners.contains(peer));
        *listeners = now_listening;
        let gone = self.shared.lock().connected(peers);
        for peer in gone {
            self.fetcher.client.forget(peer);
        }
        self.shared.stir();
        news
    }

    /// Says what is due; how many messages that took.
    fn say(
        &self,
        due: Due,
        (held, parts): (&BTreeSet<ShardId>, &Parts),
        listening: &watch::Receiver<Vec<Address>>,
        sequence: &mut Sequence,
    ) -> usize {
        let now = Instant::now();
        let addresses = listening.borrow().clone();
        let quiet = match due {
            Due::Everything => Duration::ZERO,
            Due::Holdings => self.timing.announce_every / 2,
        };
        let (models, holdings) = {
            let mut state = self.shared.lock();
            let say =
                state.announcements.take_due(now, quiet, |model| held.contains(&model.manifest()));
            (say, state.own_holdings(held, parts))
        };
        let announcements =
            models.into_iter().map(|signed| Envelope::Announcement(signed).encode());
        let holdings =
            holdings_messages(self.swarm.peer(), self.timing.lease, &addresses, holdings, || {
                sequence.next(unix_ms())
            });
        let mut said = 0;
        for message in announcements.chain(holdings) {
            if let Err(error) = self.swarm.publish(&self.topic, message) {
                // Said again with the next round.
                debug!(%error, "not published");
                break;
            }
            said += 1;
        }
        said
    }

    fn upkeep(&self, now: Instant) {
        if self.shared.lock().expire(now) {
            self.shared.stir();
        }
        self.dial(now);
    }

    /// Connects to holders ahead of need, up to a number of connections.
    fn dial(&self, now: Instant) {
        let dial = {
            let mut state = self.shared.lock();
            let wanted = state.worth_dialling(self.swarm.peer());
            state.take_dials(now, wanted)
        };
        for (peer, addresses) in dial {
            // A full command queue: dialled again later.
            let _ = self.swarm.dial(peer, addresses);
        }
    }
}

/// The wall clock; only numbers messages, see `Sequence`.
fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(0)
}
