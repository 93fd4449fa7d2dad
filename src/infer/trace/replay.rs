//! Runs a trace through the engine's own residency, without a model.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::belady::Belady;
use super::{Trace, TraceError};
use crate::graph::MoeId;
use crate::residency::{ExpertKey, Residency};
use crate::slots::share_slots;
use doppler_store::policy::Policy;
use doppler_store::{PolicyKind, UnknownPolicy};

/// The eviction policy of a replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplayPolicy {
    /// Belady's optimum, which knows the future.
    Optimal,
    #[serde(untagged)]
    Online(PolicyKind),
}

impl ReplayPolicy {
    pub const ALL: [Self; 4] = [
        Self::Online(PolicyKind::Lru),
        Self::Online(PolicyKind::Lfu),
        Self::Online(PolicyKind::Slru),
        Self::Optimal,
    ];
}

impl fmt::Display for ReplayPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Online(kind) => kind.fmt(f),
            Self::Optimal => f.pad("optimal"),
        }
    }
}

impl FromStr for ReplayPolicy {
    type Err = UnknownPolicy;
    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        if text == "optimal" { Ok(Self::Optimal) } else { text.parse().map(Self::Online) }
    }
}

/// Experts asked for, and how many of them were resident.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Rate {
    pub demands: u64,
    pub hits: u64,
}

impl Rate {
    /// Percentage of hits, 0 to 100; 100 if nothing was asked for.
    pub fn percent(&self) -> f64 {
        if self.demands == 0 { 100.0 } else { self.hits as f64 * 100.0 / self.demands as f64 }
    }
}

/// What a replay counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Replayed {
    pub policy: ReplayPolicy,
    pub slots: usize,
    /// All steps. Equals the engine's own counters for the run.
    pub all: Rate,
    /// Steps of one token.
    pub decode: Rate,
    pub evictions: u64,
    /// Waves after a layer's first.
    pub extra_waves: u64,
}

/// Replays a trace. Starts with empty slots: as many as asked for, but no more than there are
/// experts.
///
/// # Errors
/// If there are fewer slots than one token needs.
pub fn replay(trace: &Trace, slots: usize, policy: ReplayPolicy) -> Result<Replayed, TraceError> {
    let classes = trace.classes();
    let counts = share_slots(&classes, slots).ok_or_else(|| TraceError::TooFewSlots {
        slots,
        smallest: classes.iter().map(|(demand, _)| demand).sum(),
    })?;
    let class_of: Vec<u16> = trace.layers.iter().map(|layer| layer.class).collect();
    let mut class = 0;
    let make = || -> Box<dyn Policy<ExpertKey>> {
        class += 1;
        match policy {
            ReplayPolicy::Online(kind) => kind.make(),
            ReplayPolicy::Optimal => Box::new(Belady::new(uses(trace, class - 1))),
        }
    };
    let slots = counts.iter().sum();
    let mut residency = Residency::new(&counts, class_of, make);
    let mut replayed = Replayed {
        policy,
        slots,
        all: Rate::default(),
        decode: Rate::default(),
        evictions: 0,
        extra_waves: 0,
    };
    for step in &trace.steps {
        let before = replayed.all;
        if step.spared {
            replayed.evictions += residency.spare().len() as u64;
        }
        for (moe, wanted) in (0..).map(MoeId).zip(&step.experts) {
            let mut waiting = wanted.clone();
            while !waiting.is_empty() {
                let wave = residency.wave(moe, &waiting);
                replayed.all.hits += wave.hits.len() as u64;
                replayed.all.demands += (wave.hits.len() + wave.fills.len()) as u64;
                replayed.evictions += wave.evicted.len() as u64;
                replayed.extra_waves += u64::from(!wave.waiting.is_empty());
                waiting = wave.waiting;
            }
        }
        if step.tokens == 1 {
            replayed.decode.demands += replayed.all.demands - before.demands;
            replayed.decode.hits += replayed.all.hits - before.hits;
        }
    }
    Ok(replayed)
}

/// All uses of a class's experts, in order.
fn uses(trace: &Trace, class: u16) -> impl Iterator<Item = ExpertKey> {
    trace.steps.iter().flat_map(move |step| {
        let layers = (0..).map(MoeId).zip(trace.layers.iter().zip(&step.experts));
        let layers = layers.filter(move |(_, (layer, _))| layer.class == class);
        layers.flat_map(|(moe, (_, experts))| {
            experts.iter().map(move |expert| ExpertKey { moe, expert: *expert })
        })
    })
}
