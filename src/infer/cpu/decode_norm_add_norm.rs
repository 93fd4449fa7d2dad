//! An RMS norm of one token's row, added to another row, and the RMS norm of the sum.

use super::decode_norm::decode_norm;
use super::decode_norm_add::decode_norm_add;

/// `sum = x + y / sqrt(mean(y^2) + eps) * weight` (`[cols]` each), and packs the sum, normalised with
/// `after`'s weights and epsilon, into `packed`, a packed vector of `cols`.
pub fn decode_norm_add_norm(
    [y, x]: [&[f32]; 2],
    (weight, eps): (&[f32], f32),
    after: (&[f32], f32),
    sum: &mut [f32],
    packed: &mut [u32],
) {
    sum.copy_from_slice(x);
    decode_norm_add(y, weight, eps, sum);
    decode_norm(sum, after.0, after.1, packed);
}
