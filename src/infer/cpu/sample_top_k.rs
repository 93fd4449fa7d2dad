//! Sampling: the coarse bin in which the last of the `top_k` likeliest lies.

use super::sample_ranks::{Bins, Within, reach, refine};
use crate::infer::odds::Recipe;

/// `None` if there are no more than `top_k` tokens with a weight; else the bin's
/// ranks are counted into `bins.fine_k`. `ranks` is `[vocab]`.
pub fn sample_top_k(ranks: &[u32], recipe: &Recipe, bins: &mut Bins) -> Option<Within> {
    let counts = bins.counts.iter().map(|count| u64::from(*count));
    let within = reach(counts, u64::from(recipe.top_k))?;
    refine(ranks, within.bin, &mut bins.fine_k);
    Some(within)
}
