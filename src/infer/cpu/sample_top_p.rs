//! Sampling: finds the coarse bin in which the likeliest tokens reach `top_p` of the weight that
//! top-k kept.

use super::sample_ranks::{Bins, Within, below, reach};
use crate::odds::{FINE, FINE_BITS, Recipe, enough, weight};

/// `k` is top-k's bin, if top-k cuts anything. Counts the bin's ranks into `bins.fine_p`. `None` if
/// no token has a weight. `ranks` is `[vocab]`.
pub fn sample_top_p(
    ranks: &[u32],
    recipe: &Recipe,
    k: Option<Within>,
    bins: &mut Bins,
) -> Option<Within> {
    let total = match k {
        None => bins.mass.iter().sum(),
        Some(k) => {
            let mut need = k.need;
            let mut total: u64 = bins.mass[..k.bin].iter().sum();
            for (rank, count) in ((k.bin as u32) << FINE_BITS..).zip(&bins.fine_k) {
                let kept = need.min(u64::from(*count));
                need -= kept;
                total += kept * u64::from(weight(rank));
            }
            total
        }
    };
    let within = reach(bins.mass.iter().copied(), enough(total, recipe.top_p).max(1))?;
    let start = (within.bin as u32) << FINE_BITS;
    below(ranks, start + FINE as u32, |rank| {
        if rank >= start {
            bins.fine_p[(rank - start) as usize] += 1;
        }
    });
    Some(within)
}
