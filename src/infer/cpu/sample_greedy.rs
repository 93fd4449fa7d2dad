//! Sampling without chance: the highest key, of equals the lowest token.

use pulp::Arch;

use crate::infer::odds::FLOOR;

/// The token with the highest of `keys`, `[vocab]`, and that key.
pub fn sample_greedy(keys: &[u32]) -> (u32, u32) {
    let max = Arch::new().dispatch(
        #[inline(always)]
        || keys.iter().copied().fold(FLOOR, u32::max),
    );
    let token = keys.iter().position(|key| *key == max).unwrap_or(0);
    (token as u32, max)
}
