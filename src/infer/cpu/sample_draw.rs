//! Sampling, the last pass: finds the token at which the kept weights, summed in order of token id,
//! pass a random number.

use super::sample_cut::{Cut, Part};
use crate::odds::{CHUNK, below, weight};

/// `random` has 64 random bits. Token 0 if no token has a weight. `ranks` is
/// `[vocab]`, `parts` one for each chunk of it.
pub fn sample_draw(ranks: &[u32], cut: Cut, parts: &[Part], random: u64) -> u32 {
    let at_cut = u64::from(weight(cut.rank));
    // The weight that a chunk keeps, given how many tokens at the cut are still to be kept.
    let mass = |part: &Part, keep: u32| part.mass + u64::from(part.ties.min(keep)) * at_cut;
    let mut keep = cut.keep;
    let mut total = 0;
    for part in parts {
        total += mass(part, keep);
        keep -= part.ties.min(keep);
    }
    let mut left = below(random, total);
    keep = cut.keep;
    for (part, (chunk, ids)) in parts.iter().zip(ranks.chunks(CHUNK).zip((0..).step_by(CHUNK))) {
        let here = mass(part, keep);
        if left >= here {
            left -= here;
            keep -= part.ties.min(keep);
            continue;
        }
        for (id, rank) in (ids..).zip(chunk) {
            let kept = *rank < cut.rank || (*rank == cut.rank && keep > 0);
            keep -= u32::from(*rank == cut.rank && keep > 0);
            let here = if kept { u64::from(weight(*rank)) } else { 0 };
            if left < here {
                return id;
            }
            left -= here;
        }
    }
    0
}
