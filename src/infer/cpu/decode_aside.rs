//! Saves a buffer when a token has halted.

/// Copies `source` to word `at` of `aside`, if the state says that layer `halt` (counted from 1)
/// halted the token at `position`. `state` holds the layer that halted or 0, an unused word, and
/// the halted token's position, counted from 1.
pub fn decode_aside(
    source: &[u32],
    state: &[u32],
    (halt, position): (u32, u32),
    aside: &mut [u32],
    at: usize,
) {
    if (state[0], state[2]) == (halt, position + 1) {
        aside[at..at + source.len()].copy_from_slice(source);
    }
}
