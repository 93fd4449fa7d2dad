//! One token's row packed for the products that follow.

use super::pack::pack;

/// Packs `x` (`[cols]`) into `packed`, the words of a vector of `cols`.
pub fn decode_pack(x: &[f32], packed: &mut [u32]) {
    pack(x, packed);
}
