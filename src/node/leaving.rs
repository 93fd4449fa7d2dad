//! Leaving a swarm for good. With a drain, a node first announces that it leaves, so that others
//! copy what it holds, and goes once they have.
//!
//! When it may go is decided by `Healing::may_leave`. A drain ends without a departure, and the node
//! stays, if its listener goes away or if nobody can take what only this node holds. The data
//! directory stays as it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::api::ApiError;
use super::healing::Healer;
use super::service::Service;
use super::size::{ByteSize, count};
use doppler_mesh::{Healing, Kept, Meter, Progress};

/// How often a drain looks whether it may end.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long nobody must have been able to take the last copies before a drain gives up: a round of
/// announcements, so that everybody has said how much room there is, and some time for a peer that
/// has just begun to offer it. Without any peer there is nobody to wait for.
const NO_TAKERS_FOR: Duration = Duration::from_secs(15);
const NOBODY_FOR: Duration = Duration::from_secs(3);
/// Events that a slow listener may lag behind.
const EVENTS_MAX: usize = 64;

/// `POST /control/v1/leave`; answered by [`LeaveEvent`]s, one JSON object a line. The answer ends when the
/// process does.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LeaveRequest {
    /// Whether others are to have copies of everything first.
    #[serde(default)]
    pub drain: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum LeaveEvent {
    /// Others are copying.
    Draining(Drain),
    /// The node goes now.
    Leaving {
        /// Objects that no other node is known to hold, and their bytes. They are in the data
        /// directory.
        last_copies: usize,
        last_bytes: u64,
    },
    /// The node stays.
    Failed(ApiError),
}

/// How far a drain is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Drain {
    /// Objects here that too few others hold, and the bytes that they have to copy.
    pub objects: usize,
    /// Of these, the ones that nobody else holds.
    pub last: usize,
    #[serde(flatten)]
    pub progress: Progress,
}

/// Why a drain was given up.
#[derive(Debug, thiserror::Error)]
#[error(
    "{} ({}) {} held by no other node, and {}: the node stays. Start a node with more room \
     (--replica-budget), or go all the same with doppler-node leave, without --drain: the copies stay \
     in the data directory",
    count(*objects, "object"),
    ByteSize(*bytes),
    if *objects == 1 { "is" } else { "are" },
    match volunteers {
        0 => "no other node offers to copy anything".to_owned(),
        more => format!("none of the {} that copy has room", count(*more, "node")),
    }
)]
struct NoTakers {
    objects: usize,
    bytes: u64,
    volunteers: usize,
}

/// This node says that it leaves for as long as this exists, or until it has gone.
struct Announced<'a>(&'a Healer, bool);

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        if !self.1 {
            self.0.set_leaving(None);
        }
    }
}

impl Service {
    /// Leaves, after a drain if it is asked for. The events end with the process, or when a drain
    /// has failed.
    ///
    /// # Errors
    /// If the node is leaving already.
    pub fn leave(
        self: &Arc<Self>,
        request: &LeaveRequest,
    ) -> anyhow::Result<mpsc::Receiver<LeaveEvent>> {
        anyhow::ensure!(
            self.healer.leaves_since().is_none() && !self.leave.is_cancelled(),
            "the node is leaving already"
        );
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let (service, drain) = (Arc::clone(self), request.drain);
        tokio::spawn(async move {
            if drain {
                let drained = tokio::select! {
                    drained = service.drain(&sender) => drained,
                    // Whoever asked has changed their mind.
                    () = sender.closed() => return,
                };
                if let Err(error) = drained {
                    let failed = LeaveEvent::Failed(ApiError::of(&error));
                    let _ = sender.send(failed).await;
                    return;
                }
            }
            let objects = service.kept_objects();
            let here = service.counted(&objects, None).into_iter().filter(|kept| kept.is_here);
            let last: Vec<Kept> = here.filter(|kept| kept.holders.is_empty()).collect();
            let last_bytes = last.iter().map(|kept| kept.size).sum();
            let leaving = LeaveEvent::Leaving { last_copies: last.len(), last_bytes };
            let _ = sender.send(leaving).await;
            service.leave.cancel();
            // The answer ends with the process, so that whoever waits for its end knows it.
            service.stopping.cancelled().await;
            std::future::pending::<()>().await;
            drop(sender);
        });
        Ok(events)
    }

    fn patience(&self) -> Duration {
        if self.mesh.peers().is_empty() { NOBODY_FOR } else { NO_TAKERS_FOR }
    }

    /// Announces that this node leaves, and waits until it may.
    async fn drain(&self, events: &mpsc::Sender<LeaveEvent>) -> anyhow::Result<()> {
        let since = Instant::now();
        self.healer.set_leaving(Some(since));
        let mut announced = Announced(&self.healer, false);
        let mut tick = tokio::time::interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut meter: Option<(Meter, u64)> = None;
        let mut could_take = since;
        loop {
            tick.tick().await;
            let now = Instant::now();
            let objects = self.kept_objects();
            let spoken = self.counted(&objects, Some(since));
            if Healing::may_leave(now, since, &spoken) {
                announced.1 = true;
                return Ok(());
            }
            // What counts for the departure is who has spoken since; what is shown, who holds it.
            let counted = self.counted(&objects, None);
            let thin: Vec<&Kept> = counted.iter().filter(|kept| is_thin(kept)).collect();
            let last: Vec<&Kept> = thin.iter().copied().filter(|k| k.holders.is_empty()).collect();
            let volunteers = self.mesh.volunteers();
            let most = volunteers.iter().map(|(_, room)| *room).max();
            let fits = |kept: &&Kept| most.is_some_and(|room| room >= kept.size);
            if last.is_empty() || last.iter().any(fits) {
                could_take = now;
            } else if now >= could_take + self.patience() {
                let bytes = last.iter().map(|kept| kept.size).sum();
                let (objects, volunteers) = (last.len(), volunteers.len());
                return Err(NoTakers { objects, bytes, volunteers }.into());
            }
            let left: u64 = thin.iter().map(|kept| missing_bytes(kept)).sum();
            if meter.as_ref().is_none_or(|(_, total)| left > *total) {
                meter = Some((Meter::new(now, left), left));
            }
            let Some((meter, total)) = &mut meter else { continue };
            let progress = meter.note(now, *total - left);
            let drain = Drain { objects: thin.len(), last: last.len(), progress };
            // A listener that lags behind misses progress, but never the end.
            let _ = events.try_send(LeaveEvent::Draining(drain));
        }
    }
}

/// Whether an object is here and too few others hold it.
fn is_thin(kept: &Kept) -> bool {
    kept.is_here && kept.holders.len() < kept.replicas.min
}

/// The bytes that others have to copy until enough of them hold an object.
fn missing_bytes(kept: &Kept) -> u64 {
    kept.size.saturating_mul(kept.replicas.min.saturating_sub(kept.holders.len()) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_without_takers_says_how_to_go_all_the_same() {
        let said = NoTakers { objects: 1, bytes: 1024, volunteers: 0 }.to_string();
        for word in
            ["1 object (1.00 KiB) is", "offers to copy", "without --drain", "--replica-budget"]
        {
            assert!(said.contains(word), "{word:?} is not in {said:?}");
        }
        let said = NoTakers { objects: 2, bytes: 1, volunteers: 3 }.to_string();
        assert!(said.contains("none of the 3 nodes that copy has room"), "{said}");
    }

    #[test]
    fn a_node_whose_drain_is_given_up_no_longer_says_that_it_leaves() {
        let healer = Healer::new(0, None);
        healer.set_leaving(Some(Instant::now()));
        drop(Announced(&healer, true));
        assert!(healer.leaves_since().is_some());
        drop(Announced(&healer, false));
        assert!(healer.leaves_since().is_none());
    }
}
