//! Progress of loading: how many of the weights that a model needs before its first token have
//! arrived.
//!
//! It counts what peers have sent since the request. Simultaneous reads by others count, too, so
//! the end may come a little early, but never late.

use std::time::Instant;

use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::api::GenerateEvent;
use super::work::PROGRESS_EVERY;
use doppler_mesh::{MeshHandle, Meter};
use doppler_store::disk::DiskTier;
use doppler_store::groups::Groups;
use doppler_store::manifest::Manifest;

/// How many events a slow listener may lag behind before the engine waits for it.
const EVENTS_MAX: usize = 16;

/// Bytes of the trunk's tensors that are not on this disk.
pub async fn resident_missing(disk: &DiskTier, manifest: &Manifest) -> u64 {
    let mut held: Vec<Option<Option<Groups>>> = Vec::new();
    for shard in &manifest.shards {
        let Ok(id) = shard.id() else { return 0 };
        // `None`: all of it.
        let groups = if disk.is_whole(id) { None } else { Some(disk.groups(id).await) };
        held.push(groups);
    }
    let resident = manifest.tensors.iter().filter(|(_, tensor)| tensor.expert().is_none());
    let spans = resident.flat_map(|(_, tensor)| &tensor.spans);
    let missing = spans.filter(|span| match held.get(span.shard as usize) {
        None | Some(None) => false,
        Some(Some(groups)) => {
            let covers = |groups: &Groups| span.range().is_none_or(|range| groups.holds(range));
            !groups.as_ref().is_some_and(covers)
        }
    });
    missing.map(|span| span.size).sum()
}

/// Passes events on. Until the first one comes, reports how many of `total` bytes peers have sent.
pub fn follow(
    mesh: MeshHandle,
    total: u64,
    mut events: mpsc::Receiver<GenerateEvent>,
) -> mpsc::Receiver<GenerateEvent> {
    let (sender, out) = mpsc::channel(EVENTS_MAX);
    tokio::spawn(async move {
        let verified = || mesh.stats().counts.verified_bytes;
        let (before, mut meter) = (verified(), Meter::new(Instant::now(), total));
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_loading = true;
        loop {
            let event = tokio::select! {
                event = events.recv() => match event {
                    Some(event) => event,
                    None => return,
                },
                _ = tick.tick(), if is_loading => {
                    let slowest = || mesh.slowest().map(|peer| peer.to_string());
                    let progress = meter.note(Instant::now(), verified() - before).naming(slowest);
                    // A listener that lags behind misses it.
                    let _ = sender.try_send(GenerateEvent::Loading(progress));
                    continue;
                }
                // Dropping the events tells the engine.
                () = sender.closed() => return,
            };
            is_loading = false;
            if sender.send(event).await.is_err() {
                return;
            }
        }
    });
    out
}
