//! Sampling, the second pass: how far each token lies below the likeliest, and
//! how many tokens, or how much weight, each coarse bin of ranks holds.

use pulp::Arch;

use crate::infer::odds::{COARSE, FINE, FINE_BITS, Recipe, Ruler, weight};

/// Histograms of ranks.
#[derive(Debug, Clone)]
pub struct Bins {
    /// `[COARSE]`: tokens, for top-k.
    pub counts: Vec<u32>,
    /// `[COARSE]`: the weights' sums, for top-p.
    pub mass: Vec<u64>,
    /// `[FINE]`: by rank within the bin where top-k ends.
    pub fine_k: Vec<u32>,
    /// `[FINE]`: by rank within the bin where top-p ends.
    pub fine_p: Vec<u32>,
}

impl Default for Bins {
    fn default() -> Self {
        let fine = vec![0; FINE];
        Self { counts: vec![0; COARSE], mass: vec![0; COARSE], fine_k: fine.clone(), fine_p: fine }
    }
}

impl Bins {
    pub fn clear(&mut self) {
        self.counts.fill(0);
        self.mass.fill(0);
        self.fine_k.fill(0);
        self.fine_p.fill(0);
    }
}

/// Where a threshold lies: in this coarse bin, of which `need` (tokens or weight) stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Within {
    pub bin: usize,
    pub need: u64,
}

/// Replaces `keys`, `[vocab]`, by ranks below `max`; `bins` are cleared ones.
/// Weights are added up here if top-k will not cut most of them off first.
pub fn sample_ranks(keys: &mut [u32], max: u32, recipe: &Recipe, bins: &mut Bins) {
    Ruler::new(recipe, max).measure(Arch::new(), keys);
    if recipe.top_k > 0 {
        for rank in keys {
            if let Some(count) = bins.counts.get_mut((*rank >> FINE_BITS) as usize) {
                *count += 1;
            }
        }
    } else if recipe.top_p > 0 {
        weigh(keys, COARSE, &mut bins.mass);
    }
}

/// Adds up the weights of the coarse bins before `end`.
pub(super) fn weigh(ranks: &[u32], end: usize, mass: &mut [u64]) {
    for rank in ranks {
        let bin = (*rank >> FINE_BITS) as usize;
        if bin < end {
            mass[bin] += u64::from(weight(*rank));
        }
    }
}

/// Counts the ranks of one coarse bin, one by one.
pub(super) fn refine(ranks: &[u32], bin: usize, fine: &mut [u32]) {
    for rank in ranks {
        if (*rank >> FINE_BITS) as usize == bin {
            fine[*rank as usize % FINE] += 1;
        }
    }
}

/// The first of `parts` with which their sum reaches `target`, and what is needed
/// of it; `None` if the sum never does.
pub(super) fn reach(parts: impl Iterator<Item = u64>, target: u64) -> Option<Within> {
    let mut need = target;
    for (bin, part) in parts.enumerate() {
        if need <= part {
            return Some(Within { bin, need });
        }
        need -= part;
    }
    None
}
