//! Routing traces: which experts each step of a real run asked for, and how an eviction policy
//! would have done.
//!
//! The pager records what it served ([`Trace`]). `file` writes and reads it. `replay` runs it
//! through the same [`Residency`](super::residency::Residency) as the engine's, with any number of
//! slots and any policy, or with `belady`, which knows the future and so bounds the others. A trace
//! holds expert ids only: no tokens, no text.

mod belady;
mod file;
mod replay;
#[cfg(test)]
mod tests;

use super::graph::MoeId;
use super::model::Model;

pub use file::{TraceError, read, write};
pub use replay::{Rate, ReplayPolicy, Replayed, replay};

/// The properties of a mixture-of-experts layer on which paging depends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceLayer {
    /// The model's layer number.
    pub layer: usize,
    pub experts: usize,
    /// Experts that each token is sent to.
    pub top_k: usize,
    /// Layers of one class share slots.
    pub class: u16,
}

/// One step: the distinct experts that each layer asked for, in ascending order. Empty for layers
/// that a failed step did not reach.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceStep {
    pub tokens: usize,
    /// Whether slots were emptied before it, for the device to fill by itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub spared: bool,
    pub experts: Vec<Vec<u32>>,
}

/// What one session asked for, step by step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The model's name, for people.
    pub model: String,
    pub layers: Vec<TraceLayer>,
    pub steps: Vec<TraceStep>,
}

impl Trace {
    /// An empty trace of a model's layers.
    pub fn new(model: &Model) -> Self {
        let layouts: Vec<_> = model.moe.iter().map(|layer| layer.layout).collect();
        let mut classes: Vec<usize> = Vec::new();
        let layers = model.graph.moe.iter().zip(&layouts).map(|(moe, layout)| {
            // Numbered as the engine does: by the first layer of each layout.
            let first = layouts.iter().position(|l| l == layout).unwrap_or(0);
            let class = classes.iter().position(|f| *f == first).unwrap_or_else(|| {
                classes.push(first);
                classes.len() - 1
            });
            TraceLayer {
                layer: moe.layer,
                experts: moe.experts.len(),
                top_k: moe.top_k,
                class: u16::try_from(class).expect("no more classes than layers"),
            }
        });
        let layers = layers.collect();
        Self { model: model.manifest.model_id.clone(), layers, steps: Vec::new() }
    }

    /// Call when a step of this many tokens begins. `spared` says whether slots were emptied before
    /// it.
    pub fn begin(&mut self, tokens: usize, spared: bool) {
        let experts = vec![Vec::new(); self.layers.len()];
        self.steps.push(TraceStep { tokens, spared, experts });
    }

    /// Call when a wave of the current step has served these experts of a layer.
    pub fn served(&mut self, moe: MoeId, experts: impl Iterator<Item = u32>) {
        let Some(step) = self.steps.last_mut() else { return };
        let Some(layer) = step.experts.get_mut(usize::from(moe.0)) else { return };
        layer.extend(experts);
        layer.sort_unstable();
        layer.dedup();
    }

    /// Experts over all layers.
    pub fn experts(&self) -> usize {
        self.layers.iter().map(|layer| layer.experts).sum()
    }

    /// Experts asked for, over all steps and layers.
    pub fn demands(&self) -> u64 {
        let steps = self.steps.iter().flat_map(|step| &step.experts);
        steps.map(|experts| experts.len() as u64).sum()
    }

    /// For each class, the slots that one token fills and the number of experts in all its layers.
    pub fn classes(&self) -> Vec<(usize, usize)> {
        let count = self.layers.iter().map(|layer| usize::from(layer.class) + 1).max();
        let mut classes = vec![(0, 0); count.unwrap_or(0)];
        for layer in &self.layers {
            let class = &mut classes[usize::from(layer.class)];
            class.0 += layer.top_k;
            class.1 += layer.experts;
        }
        classes
    }
}
