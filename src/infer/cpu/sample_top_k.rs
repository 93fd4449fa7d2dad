//! Sampling: the coarse bin in which the last of the `top_k` likeliest lies.

use super::sample_ranks::{Bins, Within, reach, refine, weigh};
use crate::infer::odds::{COARSE, Recipe};

/// `None` if there are fewer than `top_k` tokens with a weight; else the bin's
/// ranks are counted into `bins.fine_k`. The weights that top-p will look at are
/// added up: those to the bin's end. `ranks` is `[vocab]`.
pub fn sample_top_k(ranks: &[u32], recipe: &Recipe, bins: &mut Bins) -> Option<Within> {
    let counts = bins.counts.iter().map(|count| u64::from(*count));
    let within = reach(counts, u64::from(recipe.top_k));
    if recipe.top_p > 0 {
        weigh(ranks, within.map_or(COARSE, |within| within.bin + 1), &mut bins.mass);
    }
    if let Some(within) = within {
        refine(ranks, within.bin, &mut bins.fine_k);
    }
    within
}
