//! Sampling: finds the coarse bin that contains the last of the `top_k` likeliest tokens.

use super::sample_ranks::{Bins, Within, below, bin, reach};
use crate::odds::{COARSE, FINE, FINE_BITS, RANK_END, Recipe, weight};

/// `None` if fewer than `top_k` tokens have a weight. Otherwise counts the bin's ranks into
/// `bins.fine_k`. Sums the weights that top-p will need, up to the end of the bin. `ranks` is
/// `[vocab]`.
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
