//! One token's packed row as f32 again.

use super::pack::Packed;

/// Writes the elements of a packed vector of `cols` as they were into `result` (`[cols]`).
pub fn decode_unpack(packed: &[u32], result: &mut [f32]) {
    let packed = Packed::new(packed);
    result.iter_mut().enumerate().for_each(|(i, x)| *x = packed.plain(i));
}
