//! Sampling, the second pass: how far each token is below the likeliest, and how many tokens or how
//! much weight each coarse bin of ranks holds.

use pulp::Arch;

use crate::odds::{CHUNK, COARSE, FINE, FINE_BITS, NEVER, RANK_END, Recipe, Ruler, weight};

/// Histograms of ranks.
#[derive(Debug, Clone)]
pub struct Bins {
    /// `[COARSE]`: numbers of tokens, for top-k. Complete up to the bin in which top-k ends.
    pub counts: Vec<u32>,
    /// `[COARSE]`: sums of weights, for top-p.
    pub mass: Vec<u64>,
    /// `[FINE]`: numbers of tokens by rank within the bin in which top-k ends.
    pub fine_k: Vec<u32>,
    /// `[FINE]`: numbers of tokens by rank within the bin in which top-p ends.
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

/// Where a threshold is: in this coarse bin, of which `need` (tokens or weight) is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Within {
    pub bin: usize,
    pub need: u64,
}

/// Replaces `keys`, `[vocab]`, by ranks below `max`. `bins` must be cleared. Weights are summed
/// here unless top-k will first cut most of them off.
pub fn sample_ranks(keys: &mut [u32], max: u32, recipe: &Recipe, bins: &mut Bins) {
    Ruler::new(recipe, max).measure(Arch::new(), keys);
    if recipe.top_k > 0 {
        count(keys, u64::from(recipe.top_k), &mut bins.counts);
    } else if recipe.top_p > 0 {
        below(keys, RANK_END, |rank| bins.mass[bin(rank)] += u64::from(weight(rank)));
    }
}

/// Counts tokens by coarse bin. Leaves out bins beyond the one in which the `top_k` likeliest of
/// the tokens seen so far end.
fn count(ranks: &[u32], top_k: u64, counts: &mut [u32]) {
    let mut end = COARSE;
    for chunk in ranks.chunks(CHUNK) {
        below(chunk, (end << FINE_BITS) as u32, |rank| counts[bin(rank)] += 1);
        let seen = counts[..end].iter().map(|count| u64::from(*count));
        end = reach(seen, top_k).map_or(end, |within| within.bin + 1);
    }
}

/// The coarse bin of a rank.
pub(super) const fn bin(rank: u32) -> usize {
    (rank >> FINE_BITS) as usize
}

/// Calls `each` with the ranks below `end`. Fast if there are few.
#[inline(always)]
pub(super) fn below(ranks: &[u32], end: u32, mut each: impl FnMut(u32)) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for few in ranks.chunks(64) {
                if few.iter().fold(NEVER, |least, rank| least.min(*rank)) < end {
                    few.iter().filter(|rank| **rank < end).for_each(|rank| each(*rank));
                }
            }
        },
    );
}

/// The first of `parts` with which the running sum reaches `target`, and how much of it is needed.
/// `None` if the sum never reaches it.
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
