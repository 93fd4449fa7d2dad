//! Unpacks one token's packed row to f32.

use super::pack::Packed;

/// Writes the original elements of a packed vector of `cols` into `result` (`[cols]`).
pub fn decode_unpack(packed: &[u32], result: &mut [f32]) {
    let packed = Packed::new(packed);
    result.iter_mut().enumerate().for_each(|(i, x)| *x = packed.plain(i));
}
