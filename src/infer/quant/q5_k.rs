//! Q5_K: 256 weights in 176 bytes: the 16-byte header of `affine`, 32 bytes of
//! fifth bits (bit `g` of byte `i` belongs to weight `i` of group `g`), then
//! 128 bytes of nibbles laid out as in Q4_K.

use super::affine::{Affine, GROUP, fit};

pub fn read(block: &[u8; 176], out: &mut [f32; 256]) {
    let (header, rest) = block.split_first_chunk().expect("a block is longer than its header");
    let (fifth, nibbles) = rest.split_at(GROUP);
    let groups = Affine::from_header(header).groups();
    for (g, (out, (a, b))) in out.chunks_exact_mut(GROUP).zip(groups).enumerate() {
        let quants = &nibbles[GROUP * (g / 2)..][..GROUP];
        for i in 0..GROUP {
            let low = quants[i] >> (4 * (g % 2)) & 15;
            let high = fifth[i] >> g & 1;
            out[i] = a * f32::from(low | high << 4) - b;
        }
    }
}

pub fn write(weights: &[f32; 256]) -> [u8; 176] {
    let (block, levels) = fit(weights, 31.0);
    let mut out = [0; 176];
    out[..16].copy_from_slice(&block.header());
    for (g, levels) in levels.chunks_exact(GROUP).enumerate() {
        for (i, level) in levels.iter().enumerate() {
            out[16 + i] |= (level >> 4) << g;
            out[48 + GROUP * (g / 2) + i] |= (level & 15) << (4 * (g % 2));
        }
    }
    out
}
