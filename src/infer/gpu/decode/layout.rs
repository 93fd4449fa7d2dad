//! The layout of the words that the decode kernels share with the host: the step's state, and the
//! table in which experts are looked up. Pure numbers, the same for a local device and a tab.
//!
//! State: the layer that halted (counted from 1) or 0; the chosen token; the position of the token
//! that halted (counted from 1); a spare word; each layer's chosen experts; which token takes
//! offered slots, and how many it took of each class.
//!
//! Table: each layer's slots; each layer's places in host memory; for each class, the number of
//! offered slots, then the slots.

use crate::graph::{Graph, MoeId};

/// Words of the state before the chosen experts.
pub(in crate::gpu) const STATE_HEAD: usize = 4;

/// The most slots of one class that are offered to the device.
pub(super) const OFFERED_MAX: usize = 256;

/// The layout described above. All offsets are in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::gpu) struct Layout {
    /// Where each MoE layer's choices begin in the state.
    pub ids_at: Vec<usize>,
    /// Where the state says which token took offered slots, and then how many of each class.
    pub taker_at: usize,
    pub state_words: usize,
    /// Where each MoE layer's row begins, both within the table's slots and within its places.
    pub rows: Vec<usize>,
    /// The number of entries of all layers, which is where the places begin.
    pub entries: usize,
    pub table_words: usize,
}

impl Layout {
    pub fn of(graph: &Graph) -> Self {
        let mut ids_at = Vec::new();
        let mut state_words = STATE_HEAD;
        let mut rows = Vec::new();
        let mut entries = 0;
        for moe in &graph.moe {
            ids_at.push(state_words);
            state_words += moe.top_k;
            rows.push(entries);
            entries += moe.experts.len();
        }
        let taker_at = state_words;
        // There are no more classes than layers.
        state_words += 1 + graph.moe.len();
        let table_words = 2 * entries + graph.moe.len() * (1 + OFFERED_MAX);
        Self { ids_at, taker_at, state_words, rows, entries, table_words }
    }

    /// Where a layer's slots begin.
    pub fn row(&self, moe: MoeId) -> usize {
        self.rows[usize::from(moe.0)]
    }

    /// Where a layer's places in host memory begin.
    pub fn spill_row(&self, moe: MoeId) -> usize {
        self.entries + self.row(moe)
    }

    /// Where the slots offered of a class begin.
    pub const fn offer_at(&self, class: u16) -> usize {
        2 * self.entries + class as usize * (1 + OFFERED_MAX)
    }
}
