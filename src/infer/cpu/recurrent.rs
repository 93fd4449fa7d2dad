//! The recurrent states of all layers: for each sequence's place, the last entries of each layer
//! (`crate::recurrent`).

use super::parts::Part;
use crate::graph::{Graph, StateId};
use crate::recurrent::RING;

/// The states, and the place of the sequence that steps next.
#[derive(Default)]
pub struct Recurrent {
    /// By layer, `[places, RING, width]`.
    layers: Vec<(usize, Vec<f32>)>,
    pub slot: usize,
}

impl Recurrent {
    pub fn new(graph: &Graph) -> Self {
        let layer = |state: &crate::graph::State| (state.width, vec![0.0; state.width * RING]);
        Self { layers: graph.states.iter().map(layer).collect(), slot: 0 }
    }

    /// Bytes of one sequence's states.
    pub fn slot_bytes(&self) -> u64 {
        self.layers.iter().map(|(width, _)| (width * RING * size_of::<f32>()) as u64).sum()
    }

    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|(_, all)| (all.len() * size_of::<f32>()) as u64).sum()
    }

    pub fn grow(&mut self, count: usize) {
        for (width, all) in &mut self.layers {
            all.resize((count * *width * RING).max(all.len()), 0.0);
        }
    }

    pub fn copy(&mut self, from: usize, to: usize) {
        for (width, all) in &mut self.layers {
            let len = *width * RING;
            all.copy_within(from * len..(from + 1) * len, to * len);
        }
    }

    /// A layer's state before a part's tokens, and where the one after them goes.
    pub fn step(&mut self, id: StateId, part: &Part) -> (Vec<f32>, &mut [f32]) {
        let (width, all) = &mut self.layers[usize::from(id.0)];
        let at = |len: usize| (part.slot * RING + len % RING) * *width;
        let before = match part.position {
            0 => vec![0.0; *width],
            _ => all[at(part.position)..][..*width].to_vec(),
        };
        let after = at(part.end());
        (before, &mut all[after..after + *width])
    }
}
