//! Where a block stores the numbers that its levels are multiplied with, and in which form.

use half::f16;

/// A block's scales.
#[derive(Debug, Clone, Copy)]
pub enum Scales {
    /// f16 numbers that begin at these bytes, the scale first.
    Halves(&'static [usize]),
    /// This byte is `e`, and the scale is `2^(e - 127)` (E8M0). 255 is NaN.
    Exponent(usize),
    /// An f32 at this byte. The levels include NaN.
    Float(usize),
}

impl Scales {
    /// Writes `numbers` into a block, and replaces levels that are NaN. A power of two is one of the two neighbours of its number:
    /// if `draw` is random, their mean square is the number's.
    pub fn write(&self, block: &mut [u8], numbers: &[f32], draw: u8) {
        match self {
            Self::Halves(places) => {
                for (at, number) in places.iter().zip(numbers) {
                    block[*at..at + 2].copy_from_slice(&f16::from_f32(*number).to_le_bytes());
                }
            }
            Self::Float(at) => {
                block[*at..at + 4].copy_from_slice(&numbers[0].to_le_bytes());
                let nan = |byte: &&mut u8| **byte & 0x7f == 0x7f;
                block[at + 4..].iter_mut().filter(nan).for_each(|byte| *byte ^= 1);
            }
            Self::Exponent(at) => {
                let bits = numbers[0].to_bits();
                let (below, fraction) =
                    ((bits >> 23) as u8, (bits & 0x7f_ffff) as f32 / 8_388_608.0);
                // 1 * (1 - p) + 4 * p = (1 + fraction)^2
                let share = ((1.0 + fraction).powi(2) - 1.0) / 3.0;
                block[*at] = below + u8::from(f32::from(draw) < 256.0 * share);
            }
        }
    }
}
