//! Sampling: finds the last rank to keep and how many of its tokens, and what remains of each chunk
//! of the vocabulary.

use super::sample_ranks::{Bins, Within, below, reach};
use crate::odds::{CHUNK, FINE_BITS, RANK_END, weight};

/// Keeps the tokens that rank above `rank`, and the first `keep` tokens at that rank, by token id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    pub rank: u32,
    pub keep: u32,
}

/// What a chunk contains: the number of tokens at the cut, and the weight of those above it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Part {
    pub ties: u32,
    pub mass: u64,
}

/// `k` and `p` are what top-k and top-p found; top-p's cut is never beyond top-k's. `ranks` is
/// `[vocab]`; `parts` gets one entry for each chunk.
pub fn sample_cut(
    ranks: &[u32],
    k: Option<Within>,
    p: Option<Within>,
    bins: &Bins,
    parts: &mut Vec<Part>,
) -> Cut {
    let cut = match (p, k) {
        (Some(p), _) => {
            let start = (p.bin as u32) << FINE_BITS;
            let masses = (start..)
                .zip(&bins.fine_p)
                .map(|(rank, count)| u64::from(weight(rank)) * u64::from(*count));
            reach(masses, p.need).map(|at| {
                let rank = start + at.bin as u32;
                // The part in which the sum is reached is not empty, so its weight is not 0.
                Cut { rank, keep: at.need.div_ceil(u64::from(weight(rank))) as u32 }
            })
        }
        (None, Some(k)) => {
            let counts = bins.fine_k.iter().map(|count| u64::from(*count));
            reach(counts, k.need).map(|at| {
                let rank = ((k.bin as u32) << FINE_BITS) + at.bin as u32;
                Cut { rank, keep: at.need as u32 }
            })
        }
        (None, None) => None,
    };
    let cut = cut.unwrap_or(Cut { rank: RANK_END, keep: 0 });
    parts.clear();
    parts.extend(ranks.chunks(CHUNK).map(|chunk| {
        let mut part = Part::default();
        below(chunk, cut.rank + 1, |rank| match rank == cut.rank {
            true => part.ties += 1,
            false => part.mass += u64::from(weight(rank)),
        });
        part
    }));
    cut
}
