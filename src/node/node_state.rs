//! What the page shows of the node itself: its memory, traffic, healing, engine and pulls. Says
//! nothing that the gateway must not tell: no keys, no paths, no addresses of the machine.

use serde::{Deserialize, Serialize};

use super::api::{Ps, ReachStatus, TierUse};
use super::healing::HealStatus;
use super::pulls::PullState;
use super::service::Service;

/// `GET /node/state`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeState {
    /// The public key with which this node signs models.
    pub publisher: String,
    /// It serves without a swarm.
    pub alone: bool,
    /// What runs its models: `cpu`, or the name of a device.
    pub backend: String,
    pub uptime_s: f64,
    /// Bytes of device memory that experts may take.
    pub vram_budget: u64,
    pub ram: TierUse,
    pub disk: TierUse,
    pub pinned_bytes: u64,
    pub reach: ReachStatus,
    pub healing: HealStatus,
    pub engine: Ps,
    /// Bytes of objects that peers sent, proved, and that were sent to peers.
    pub received_bytes: u64,
    pub sent_bytes: u64,
    /// The oldest first.
    pub pulls: Vec<PullState>,
}

impl Service {
    pub fn node_state(&self) -> NodeState {
        let (disk, ladder) = (self.disk.stats(), self.ladder.stats());
        let stats = self.mesh.stats();
        let config = self.config();
        NodeState {
            publisher: self.publisher().to_string(),
            alone: config.alone,
            backend: self.engine.shown().backend,
            uptime_s: self.started.elapsed().as_secs_f64(),
            vram_budget: config.vram_budget,
            ram: TierUse { used: ladder.ram_used_bytes, budget: config.ram_budget },
            disk: TierUse { used: disk.used_bytes, budget: config.disk_budget },
            pinned_bytes: disk.pinned_bytes,
            reach: ReachStatus::of(self.mesh.reach()),
            healing: self.healer.status(),
            engine: self.ps(),
            received_bytes: stats.counts.verified_bytes,
            sent_bytes: stats.peers.values().map(|peer| peer.bytes_out).sum(),
            pulls: self.pulls.list(),
        }
    }
}
