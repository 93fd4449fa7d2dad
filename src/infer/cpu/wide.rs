//! Sixteen f32 at a time, for weights of which a lane takes four bytes: one AVX-512 vector, two
//! AVX2 vectors, or plain arrays.
//!
//! Byte `k` of a lane's word is masked in place, so its value is multiplied by 256^k; the other
//! factor has been multiplied by 256^-k. Both are exact, and no byte has to be moved before it is
//! converted. Every machine adds the same numbers in the same order.

use super::lanes::{Arrays, fused};
use super::unpack::half_at;

/// A computation over sixteen lanes.
pub trait Kernel {
    type Output;
    fn run<W: Wide>(self, lanes: W) -> Self::Output;
}

/// Runs a kernel compiled for the widest supported instructions that the machine has.
#[inline(always)]
pub fn run<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = pulp::x86::V4::try_new() {
            return simd.vectorize(On(kernel, simd));
        }
        if let Some(simd) = pulp::x86::V3::try_new() {
            return simd.vectorize(On(kernel, simd));
        }
    }
    kernel.run(Arrays)
}

/// Runs a kernel on the instructions named, if the machine has them.
#[cfg(test)]
pub fn run_on<K: Kernel>(instructions: &str, kernel: K) -> Option<K::Output> {
    match instructions {
        "arrays" => Some(kernel.run(Arrays)),
        #[cfg(target_arch = "x86_64")]
        "avx2" => pulp::x86::V3::try_new().map(|simd| simd.vectorize(On(kernel, simd))),
        #[cfg(target_arch = "x86_64")]
        "avx512" => pulp::x86::V4::try_new().map(|simd| simd.vectorize(On(kernel, simd))),
        _ => None,
    }
}

#[cfg(target_arch = "x86_64")]
struct On<K, W>(K, W);

#[cfg(target_arch = "x86_64")]
impl<K: Kernel, W: Wide> pulp::NullaryFnOnce for On<K, W> {
    type Output = K::Output;
    #[inline(always)]
    fn call(self) -> K::Output {
        self.0.run(self.1)
    }
}

/// How far ahead of its block a kernel prefetches weights, in bytes: a page. Hardware prefetchers
/// stop at the end of a page.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 4096;

/// Vectors of sixteen f32 and of sixteen words.
pub trait Wide: Copy {
    type W: Copy;
    type Words: Copy;
    /// Prefetches the bytes [`AHEAD`] of these, or does nothing.
    fn prefetch(self, bytes: &[u8]);
    fn splat16(self, x: f32) -> Self::W;
    fn load16(self, x: &[f32; 16]) -> Self::W;
    fn mul16(self, a: Self::W, b: Self::W) -> Self::W;
    fn add16(self, a: Self::W, b: Self::W) -> Self::W;
    /// Lanes `i` and `i + 8` added.
    fn fold(self, v: Self::W) -> [f32; 8];
    /// `a * b + c`.
    fn fma16(self, a: Self::W, b: Self::W, c: Self::W) -> Self::W;
    /// Sixteen signed bytes, each times `scale`.
    fn scaled(self, q: &[i8; 16], scale: f32) -> Self::W;
    /// From the first bytes of a Q4_K or Q5_K block: `d` times its eight scales, then `dmin` times
    /// its eight mins.
    fn scales_mins(self, header: &[u8; 16]) -> Self::W;
    /// Lane `i` takes lane `from[i / 4]`. All of `from` are in the same half.
    fn fours(self, v: Self::W, from: [u8; 4]) -> Self::W;

    fn words(self, bytes: &[u8; 64]) -> Self::Words;
    /// The same 32 bytes in both halves.
    fn twice(self, bytes: &[u8; 32]) -> Self::Words;
    fn or(self, a: Self::Words, b: Self::Words) -> Self::Words;
    fn and(self, a: Self::Words, mask: u32) -> Self::Words;
    /// Words shifted to the left by the number of bits for their half.
    fn left(self, a: Self::Words, bits: [u32; 2]) -> Self::Words;
    fn right(self, a: Self::Words, bits: [u32; 2]) -> Self::Words;
    /// Words, as signed numbers.
    fn numbers(self, a: Self::Words) -> Self::W;

    /// Lane sums of 64 numbers times `x`. The number is `bits` of each byte, which exclude the
    /// highest bit.
    #[inline(always)]
    fn dots(self, q: Self::Words, bits: u32, x: &[[f32; 16]; 4]) -> Self::W {
        let [first, second, third, fourth] = x;
        let sum = self.mul16(self.numbers(self.and(q, bits)), self.load16(first));
        let sum = self.fma16(self.numbers(self.and(q, bits << 8)), self.load16(second), sum);
        let sum = self.fma16(self.numbers(self.and(q, bits << 16)), self.load16(third), sum);
        self.fma16(self.numbers(self.and(q, bits << 24)), self.load16(fourth), sum)
    }

    /// The sum of all sixteen, always in the same order.
    #[inline(always)]
    fn sum16(self, v: Self::W) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.fold(v);
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
}

/// Eight six-bit scales, then eight mins, from the twelve bytes after `d` and `dmin`.
#[inline(always)]
fn six_bits(header: &[u8; 16]) -> [u8; 16] {
    let [_, a, b, c]: [u32; 4] = bytemuck::cast(*header);
    let (a, b, c) = (u32::from_le(a), u32::from_le(b), u32::from_le(c));
    let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x3030_3030);
    let words = [a & six, c & four | a >> 2 & two, b & six, c >> 4 & four | b >> 2 & two];
    bytemuck::cast(words.map(u32::to_le))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use pulp::x86::{V3, V4};
    use pulp::{cast, f32x4, f32x8, f32x16, i32x8, i32x16, u32x4, u32x8, u32x16};

    use super::{AHEAD, Wide, half_at};

    #[inline(always)]
    fn ask_ahead(simd: V3, bytes: &[u8]) {
        for line in bytes.chunks(64) {
            // Prefetching an invalid address does nothing.
            let ahead = line.as_ptr().wrapping_add(AHEAD).cast();
            simd.sse._mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(ahead);
        }
    }

    /// A block's `d` and `dmin` in the first two lanes.
    #[inline(always)]
    fn halves(header: &[u8; 16]) -> f32x4 {
        f32x4(half_at(header, 0), half_at(header, 2), 0.0, 0.0)
    }

    /// `six_bits`, in one vector.
    #[inline(always)]
    fn six_bits(simd: V3, header: &[u8; 16]) -> u32x4 {
        let header = cast(*header);
        // Words a, a, b, b and c, c, c, c.
        let own = simd.sse2._mm_shuffle_epi32::<0b10_10_01_01>(header);
        let shared = simd.sse2._mm_shuffle_epi32::<0b11_11_11_11>(header);
        let own = simd.avx2._mm_srlv_epi32(own, cast(u32x4(0, 2, 0, 2)));
        let shared = simd.avx2._mm_srlv_epi32(shared, cast(u32x4(0, 0, 0, 4)));
        let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x3030_3030);
        let own = simd.and_u32x4(cast(own), u32x4(six, two, six, two));
        let shared = simd.and_u32x4(cast(shared), u32x4(0, four, 0, four));
        simd.or_u32x4(own, shared)
    }

    impl Wide for V3 {
        type W = [f32x8; 2];
        type Words = [u32x8; 2];

        #[inline(always)]
        fn prefetch(self, bytes: &[u8]) {
            ask_ahead(self, bytes);
        }
        #[inline(always)]
        fn splat16(self, x: f32) -> Self::W {
            [self.splat_f32x8(x); 2]
        }
        #[inline(always)]
        fn load16(self, x: &[f32; 16]) -> Self::W {
            cast(*x)
        }
        #[inline(always)]
        fn mul16(self, a: Self::W, b: Self::W) -> Self::W {
            [self.mul_f32x8(a[0], b[0]), self.mul_f32x8(a[1], b[1])]
        }
        #[inline(always)]
        fn add16(self, a: Self::W, b: Self::W) -> Self::W {
            [self.add_f32x8(a[0], b[0]), self.add_f32x8(a[1], b[1])]
        }
        #[inline(always)]
        fn fold(self, v: Self::W) -> [f32; 8] {
            cast(self.add_f32x8(v[0], v[1]))
        }
        #[inline(always)]
        fn fma16(self, a: Self::W, b: Self::W, c: Self::W) -> Self::W {
            [self.mul_add_f32x8(a[0], b[0], c[0]), self.mul_add_f32x8(a[1], b[1], c[1])]
        }
        #[inline(always)]
        fn scaled(self, q: &[i8; 16], scale: f32) -> Self::W {
            let halves: [[i8; 8]; 2] = cast(*q);
            let low = self.avx2._mm256_cvtepi8_epi32(cast([halves[0], [0; 8]]));
            let high = self.avx2._mm256_cvtepi8_epi32(cast([halves[1], [0; 8]]));
            let scale = self.splat_f32x8(scale);
            self.mul16(self.numbers([cast(low), cast(high)]), [scale, scale])
        }
        #[inline(always)]
        fn scales_mins(self, header: &[u8; 16]) -> Self::W {
            let (halves, bytes) = (cast(halves(header)), cast(six_bits(self, header)));
            let mins = self.sse2._mm_unpackhi_epi64(bytes, bytes);
            let bytes = [
                cast(self.avx2._mm256_cvtepu8_epi32(bytes)),
                cast(self.avx2._mm256_cvtepu8_epi32(mins)),
            ];
            let dmin = self.sse3._mm_movehdup_ps(halves);
            let d = cast(self.avx2._mm256_broadcastss_ps(halves));
            let dmin = cast(self.avx2._mm256_broadcastss_ps(dmin));
            self.mul16(self.numbers(bytes), [d, dmin])
        }
        #[inline(always)]
        fn fours(self, v: Self::W, from: [u8; 4]) -> Self::W {
            let [a, b, c, d] = [
                i32::from(from[0] & 7),
                i32::from(from[1] & 7),
                i32::from(from[2] & 7),
                i32::from(from[3] & 7),
            ];
            let half = cast(v[usize::from(from[0] >> 3)]);
            let (low, high) = (i32x8(a, a, a, a, b, b, b, b), i32x8(c, c, c, c, d, d, d, d));
            [
                cast(self.avx2._mm256_permutevar8x32_ps(half, cast(low))),
                cast(self.avx2._mm256_permutevar8x32_ps(half, cast(high))),
            ]
        }
        #[inline(always)]
        fn words(self, bytes: &[u8; 64]) -> Self::Words {
            cast(*bytes)
        }
        #[inline(always)]
        fn twice(self, bytes: &[u8; 32]) -> Self::Words {
            let bytes = cast(*bytes);
            [bytes, bytes]
        }
        #[inline(always)]
        fn or(self, a: Self::Words, b: Self::Words) -> Self::Words {
            [self.or_u32x8(a[0], b[0]), self.or_u32x8(a[1], b[1])]
        }
        #[inline(always)]
        fn and(self, a: Self::Words, mask: u32) -> Self::Words {
            let mask = self.splat_u32x8(mask);
            [self.and_u32x8(a[0], mask), self.and_u32x8(a[1], mask)]
        }
        #[inline(always)]
        fn left(self, a: Self::Words, bits: [u32; 2]) -> Self::Words {
            let [low, high] = [self.splat_u32x8(bits[0]), self.splat_u32x8(bits[1])];
            [
                cast(self.avx2._mm256_sllv_epi32(cast(a[0]), cast(low))),
                cast(self.avx2._mm256_sllv_epi32(cast(a[1]), cast(high))),
            ]
        }
        #[inline(always)]
        fn right(self, a: Self::Words, bits: [u32; 2]) -> Self::Words {
            let [low, high] = [self.splat_u32x8(bits[0]), self.splat_u32x8(bits[1])];
            [
                cast(self.avx2._mm256_srlv_epi32(cast(a[0]), cast(low))),
                cast(self.avx2._mm256_srlv_epi32(cast(a[1]), cast(high))),
            ]
        }
        #[inline(always)]
        fn numbers(self, a: Self::Words) -> Self::W {
            [
                cast(self.avx._mm256_cvtepi32_ps(cast(a[0]))),
                cast(self.avx._mm256_cvtepi32_ps(cast(a[1]))),
            ]
        }
    }

    /// One number in the lower lanes, another in the upper.
    #[inline(always)]
    fn two(low: u32, high: u32) -> u32x16 {
        let (l, h) = (low, high);
        u32x16(l, l, l, l, l, l, l, l, h, h, h, h, h, h, h, h)
    }

    impl Wide for V4 {
        type W = f32x16;
        type Words = u32x16;

        #[inline(always)]
        fn prefetch(self, bytes: &[u8]) {
            ask_ahead(*self, bytes);
        }
        #[inline(always)]
        fn splat16(self, x: f32) -> Self::W {
            self.splat_f32x16(x)
        }
        #[inline(always)]
        fn load16(self, x: &[f32; 16]) -> Self::W {
            cast(*x)
        }
        #[inline(always)]
        fn mul16(self, a: Self::W, b: Self::W) -> Self::W {
            self.mul_f32x16(a, b)
        }
        #[inline(always)]
        fn add16(self, a: Self::W, b: Self::W) -> Self::W {
            self.add_f32x16(a, b)
        }
        #[inline(always)]
        fn fold(self, v: Self::W) -> [f32; 8] {
            let [low, high]: [f32x8; 2] = cast(v);
            cast(self.add_f32x8(low, high))
        }
        #[inline(always)]
        fn fma16(self, a: Self::W, b: Self::W, c: Self::W) -> Self::W {
            self.mul_add_f32x16(a, b, c)
        }
        #[inline(always)]
        fn scaled(self, q: &[i8; 16], scale: f32) -> Self::W {
            let words = self.avx512f._mm512_cvtepi8_epi32(cast(*q));
            self.mul16(self.numbers(cast(words)), self.splat_f32x16(scale))
        }
        #[inline(always)]
        fn scales_mins(self, header: &[u8; 16]) -> Self::W {
            let halves = self.avx512f._mm512_castps128_ps512(cast(halves(header)));
            let halves = self.avx512f._mm512_permutexvar_ps(cast(two(0, 1)), halves);
            let bytes = self.avx512f._mm512_cvtepu8_epi32(cast(six_bits(*self, header)));
            self.mul16(self.numbers(cast(bytes)), cast(halves))
        }
        #[inline(always)]
        fn fours(self, v: Self::W, from: [u8; 4]) -> Self::W {
            let [a, b, c, d] =
                [i32::from(from[0]), i32::from(from[1]), i32::from(from[2]), i32::from(from[3])];
            let from = i32x16(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
            cast(self.avx512f._mm512_permutexvar_ps(cast(from), cast(v)))
        }
        #[inline(always)]
        fn words(self, bytes: &[u8; 64]) -> Self::Words {
            cast(*bytes)
        }
        #[inline(always)]
        fn twice(self, bytes: &[u8; 32]) -> Self::Words {
            cast(self.avx512f._mm512_broadcast_i64x4(cast(*bytes)))
        }
        #[inline(always)]
        fn or(self, a: Self::Words, b: Self::Words) -> Self::Words {
            self.or_u32x16(a, b)
        }
        #[inline(always)]
        fn and(self, a: Self::Words, mask: u32) -> Self::Words {
            self.and_u32x16(a, self.splat_u32x16(mask))
        }
        #[inline(always)]
        fn left(self, a: Self::Words, bits: [u32; 2]) -> Self::Words {
            cast(self.avx512f._mm512_sllv_epi32(cast(a), cast(two(bits[0], bits[1]))))
        }
        #[inline(always)]
        fn right(self, a: Self::Words, bits: [u32; 2]) -> Self::Words {
            cast(self.avx512f._mm512_srlv_epi32(cast(a), cast(two(bits[0], bits[1]))))
        }
        #[inline(always)]
        fn numbers(self, a: Self::Words) -> Self::W {
            cast(self.avx512f._mm512_cvtepi32_ps(cast(a)))
        }
    }
}

#[inline(always)]
fn each<T>(f: impl Fn(usize) -> T) -> [T; 16] {
    std::array::from_fn(f)
}

impl Wide for Arrays {
    type W = [f32; 16];
    type Words = [u32; 16];

    #[inline(always)]
    fn prefetch(self, _: &[u8]) {}
    #[inline(always)]
    fn splat16(self, x: f32) -> Self::W {
        [x; 16]
    }
    #[inline(always)]
    fn load16(self, x: &[f32; 16]) -> Self::W {
        *x
    }
    #[inline(always)]
    fn mul16(self, a: Self::W, b: Self::W) -> Self::W {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn add16(self, a: Self::W, b: Self::W) -> Self::W {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn fold(self, v: Self::W) -> [f32; 8] {
        std::array::from_fn(|i| v[i] + v[i + 8])
    }
    #[inline(always)]
    fn fma16(self, a: Self::W, b: Self::W, c: Self::W) -> Self::W {
        each(|i| fused(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn scaled(self, q: &[i8; 16], scale: f32) -> Self::W {
        each(|i| f32::from(q[i]) * scale)
    }
    #[inline(always)]
    fn scales_mins(self, header: &[u8; 16]) -> Self::W {
        let (d, dmin, bytes) = (half_at(header, 0), half_at(header, 2), six_bits(header));
        each(|i| if i < 8 { d } else { dmin } * f32::from(bytes[i]))
    }
    #[inline(always)]
    fn fours(self, v: Self::W, from: [u8; 4]) -> Self::W {
        each(|i| v[usize::from(from[i / 4])])
    }
    #[inline(always)]
    fn words(self, bytes: &[u8; 64]) -> Self::Words {
        let words: [u32; 16] = bytemuck::cast(*bytes);
        each(|i| u32::from_le(words[i]))
    }
    #[inline(always)]
    fn twice(self, bytes: &[u8; 32]) -> Self::Words {
        let words: [u32; 8] = bytemuck::cast(*bytes);
        each(|i| u32::from_le(words[i % 8]))
    }
    #[inline(always)]
    fn or(self, a: Self::Words, b: Self::Words) -> Self::Words {
        each(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn and(self, a: Self::Words, mask: u32) -> Self::Words {
        each(|i| a[i] & mask)
    }
    #[inline(always)]
    fn left(self, a: Self::Words, bits: [u32; 2]) -> Self::Words {
        each(|i| a[i] << bits[i / 8])
    }
    #[inline(always)]
    fn right(self, a: Self::Words, bits: [u32; 2]) -> Self::Words {
        each(|i| a[i] >> bits[i / 8])
    }
    #[inline(always)]
    fn numbers(self, a: Self::Words) -> Self::W {
        each(|i| a[i].cast_signed() as f32)
    }
}
