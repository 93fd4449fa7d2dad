//! Packs one token's row for the products that follow.

use super::pack::pack;

/// Packs `x` (`[cols]`) into `packed`, a packed vector of `cols`.
pub fn decode_pack(x: &[f32], packed: &mut [u32]) {
    pack(x, packed);
}
