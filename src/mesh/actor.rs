//! The mesh's loop: turns reports of the swarm and the store into events for the core, and wakes
//! the core when it asked for that. It never waits for a peer and decides nothing.

use std::sync::Arc;
use std::time::Duration;

use doppler_swarm::SwarmEvents;
use tokio::time::{MissedTickBehavior, sleep_until};
use tokio_util::sync::CancellationToken;

use super::core::Event;
use super::core::limits::OWN_PARTS_MAX;
use super::shared::Shared;
use doppler_store::ShardServe;

pub(super) struct Actor {
    pub(super) shared: Arc<Shared>,
    pub(super) serve: Arc<dyn ShardServe>,
    /// How often it looks at partially held objects, which grow with every transfer.
    pub(super) look_every: Duration,
    pub(super) cancel: CancellationToken,
}

impl Actor {
    /// Runs until it is cancelled or the swarm has ended. Then every read ends.
    pub(super) async fn run(self, events: SwarmEvents) {
        let cancel = self.cancel.clone();
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.follow(events) => {}
        }
        self.shared.close();
    }

    async fn follow(&self, events: SwarmEvents) {
        let SwarmEvents { mut messages, mut peers, mut refusals, mut notices, .. } = events;
        let SwarmEvents { mut listening, mut reach, .. } = events;
        let mut held = self.serve.changes();
        let mut look = tokio::time::interval(self.look_every);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let shared = &self.shared;
        shared.note(Event::Addresses(listening.borrow_and_update().clone()));
        shared.note(Event::Whole(self.serve.complete().into_iter().collect()));
        loop {
            tokio::select! {
                message = messages.recv() => match message {
                    Some(message) => shared.hear(message),
                    None => return,
                },
                changed = peers.changed() => match changed {
                    Ok(()) => {
                        let now = peers.borrow_and_update().clone();
                        shared.set_peers(now);
                    }
                    Err(_) => return,
                },
                // The swarm has refused the peer; the core records it.
                Some(refusal) = refusals.recv() => shared.note(Event::KeptOut {
                    peer: refusal.peer,
                    is_guilty: refusal.why.is_proof_of_guilt(),
                }),
                Some(notice) = notices.recv() => shared.heed(notice),
                Ok(()) = listening.changed() => {
                    let now = listening.borrow_and_update().clone();
                    shared.note(Event::Addresses(now));
                }
                Ok(()) = reach.changed() => {
                    reach.mark_unchanged();
                    shared.ring();
                }
                Ok(()) = held.changed() => {
                    held.mark_unchanged();
                    shared.note(Event::Whole(self.serve.complete().into_iter().collect()));
                }
                _ = look.tick() => {
                    let parts = self.serve.partial(OWN_PARTS_MAX).into_iter().collect();
                    shared.note(Event::Parts(parts));
                }
                () = shared.earlier() => {}
                () = sleep_until(shared.arm().into()) => shared.wake(),
            }
        }
    }
}
