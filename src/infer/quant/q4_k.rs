//! Q4_K: 256 weights in 144 bytes: the 16-byte header of `affine`, then 128
//! bytes of nibbles. Of each 64 weights the low nibbles hold the first 32.

use super::affine::{Affine, GROUP, fit};

pub fn read(block: &[u8; 144], out: &mut [f32; 256]) {
    let (header, nibbles) = block.split_first_chunk().expect("a block is longer than its header");
    let groups = Affine::from_header(header).groups();
    for (pair, quants) in nibbles.chunks_exact(GROUP).enumerate() {
        let ((a0, b0), (a1, b1)) = (groups[2 * pair], groups[2 * pair + 1]);
        let (low, high) = out[64 * pair..64 * pair + 64].split_at_mut(GROUP);
        for ((&q, low), high) in quants.iter().zip(low).zip(high) {
            *low = a0 * f32::from(q & 15) - b0;
            *high = a1 * f32::from(q >> 4) - b1;
        }
    }
}

pub fn write(weights: &[f32; 256]) -> [u8; 144] {
    let (block, levels) = fit(weights, 15.0);
    let mut out = [0; 144];
    out[..16].copy_from_slice(&block.header());
    for (quants, levels) in out[16..].chunks_exact_mut(GROUP).zip(levels.chunks_exact(64)) {
        for (i, q) in quants.iter_mut().enumerate() {
            *q = levels[i] | levels[i + GROUP] << 4;
        }
    }
    out
}
