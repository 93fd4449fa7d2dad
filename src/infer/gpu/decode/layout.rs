//! Where things lie in the words that the decode kernels share with the host: the step's state and
//! the table that experts are looked up in. Pure numbers, the same for a device here and a tab.
//!
//! State: the layer that halted (from 1) or 0, the chosen token, whose step halted (its position,
//! from 1), one spare word; each layer's chosen experts; whose token takes offered slots, and by
//! class how many it took.
//!
//! Table: each layer's slots; each layer's places in memory of the host; by class, how many slots
//! are offered, then which.

use crate::graph::{Graph, MoeId};

/// Words of the state before the chosen experts.
pub(in crate::gpu) const STATE_HEAD: usize = 4;

/// Slots of one class offered to the device at most.
pub(super) const OFFERED_MAX: usize = 256;

/// See the head of the file. All in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::gpu) struct Layout {
    /// By MoE layer: where its choices begin in the state.
    pub ids_at: Vec<usize>,
    /// Where the state says who took of the slots offered, and then, by class, how many.
    pub taker_at: usize,
    pub state_words: usize,
    /// By MoE layer: where its row begins in the table's slots, and in its places.
    pub rows: Vec<usize>,
    /// Entries of all layers: where the places begin.
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

    /// Where a layer's places in memory of the host begin.
    pub fn spill_row(&self, moe: MoeId) -> usize {
        self.entries + self.row(moe)
    }

    /// Where a class's offer begins.
    pub const fn offer_at(&self, class: u16) -> usize {
        2 * self.entries + class as usize * (1 + OFFERED_MAX)
    }
}
