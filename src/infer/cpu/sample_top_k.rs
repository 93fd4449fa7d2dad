//! Sampling: the coarse bin in which the last of the `top_k` likeliest lies.

use super::sample_ranks::{Bins, Within, below, bin, reach};
use crate::odds::{COARSE, FINE, FINE_BITS, RANK_END, Recipe, weight};

/// `None` if there are fewer than `top_k` tokens with a weight; else the bin's
/// ranks are counted into `bins.fine_k`. The weights that top-p will look at are
/// added up: those to the bin's end. `ranks` is `[vocab]`.
pub fn sample_top_k(ranks: &[u32], recipe: &Recipe, bins: &mut Bins) -> Option<Within> {
    let counts = bins.counts.iter().map(|count| u64::from(*count));
    let within = reach(counts, u64::from(recipe.top_k));
    let last = within.map_or(COARSE, |within| within.bin);
    let end = ((last + 1) << FINE_BITS) as u32;
    below(ranks, end.min(RANK_END), |rank| {
        if recipe.top_p > 0 {
            bins.mass[bin(rank)] += u64::from(weight(rank));
        }
        if bin(rank) == last {
            bins.fine_k[rank as usize % FINE] += 1;
        }
    });
    within
}
