//! Greedy sampling: the highest key; among equals, the lowest token.

use pulp::Arch;

use crate::odds::FLOOR;

/// The token with the highest of `keys`, `[vocab]`, and that key.
pub fn sample_greedy(keys: &[u32]) -> (u32, u32) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let max = keys.iter().copied().fold(FLOOR, u32::max);
            // First by groups of 64, each tested as a whole.
            let has = |few: &[u32]| few.iter().fold(false, |any, key| any | (*key == max));
            let start = keys.chunks(64).position(has).unwrap_or(0) * 64;
            let at = keys[start..].iter().position(|key| *key == max).unwrap_or(0);
            ((start + at) as u32, max)
        },
    )
}
