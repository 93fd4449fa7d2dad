//! Eight f32 at a time: AVX2 with FMA if the machine has it, otherwise plain arrays that the
//! compiler vectorises.
//!
//! A kernel written over [`Lanes`] sums in the same order on every machine. A fused multiply-add
//! rounds once, an unfused one twice.
//!
//! Vector code must not be in closures passed to library functions (`array::map`): a closure that
//! is not inlined is compiled without the wide instructions, and each intrinsic becomes a call.

/// Vectors of eight f32.
pub trait Lanes: Copy {
    type V: Copy;
    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &[f32; 8]) -> Self::V;
    fn store(self, v: Self::V) -> [f32; 8];
    /// Signed bytes as numbers.
    fn signed(self, q: &[i8; 8]) -> Self::V;
    /// Low and high nibbles as numbers.
    fn nibbles(self, q: &[u8; 8]) -> [Self::V; 2];
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;

    /// The sum of all eight, always in the same order.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.store(v);
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
}

/// A computation over lanes.
pub trait Kernel {
    type Output;
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// Runs a kernel compiled for the widest supported instructions that the machine has.
#[inline(always)]
pub fn run<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return simd.vectorize(OnAvx2(kernel, simd));
    }
    kernel.run(Arrays)
}

/// Runs a kernel on the instructions named, if the machine has them.
#[cfg(test)]
pub fn run_on<K: Kernel>(instructions: &str, kernel: K) -> Option<K::Output> {
    match instructions {
        "arrays" => Some(kernel.run(Arrays)),
        #[cfg(target_arch = "x86_64")]
        "avx2" => pulp::x86::V3::try_new().map(|simd| simd.vectorize(OnAvx2(kernel, simd))),
        _ => None,
    }
}

#[cfg(target_arch = "x86_64")]
struct OnAvx2<K>(K, pulp::x86::V3);

#[cfg(target_arch = "x86_64")]
impl<K: Kernel> pulp::NullaryFnOnce for OnAvx2<K> {
    type Output = K::Output;
    #[inline(always)]
    fn call(self) -> K::Output {
        self.0.run(self.1)
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for pulp::x86::V3 {
    type V = pulp::f32x8;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        self.splat_f32x8(x)
    }
    #[inline(always)]
    fn load(self, x: &[f32; 8]) -> Self::V {
        pulp::cast(*x)
    }
    #[inline(always)]
    fn store(self, v: Self::V) -> [f32; 8] {
        pulp::cast(v)
    }
    #[inline(always)]
    fn signed(self, q: &[i8; 8]) -> Self::V {
        let bytes = pulp::cast([*q, [0; 8]]);
        let words = self.avx2._mm256_cvtepi8_epi32(bytes);
        pulp::cast(self.avx._mm256_cvtepi32_ps(words))
    }
    #[inline(always)]
    fn nibbles(self, q: &[u8; 8]) -> [Self::V; 2] {
        let bytes = pulp::cast([*q, [0; 8]]);
        let words = self.avx2._mm256_cvtepu8_epi32(bytes);
        let low = self.avx2._mm256_and_si256(words, self.avx._mm256_set1_epi32(15));
        let high = self.avx2._mm256_srli_epi32::<4>(words);
        let (low, high) = (self.avx._mm256_cvtepi32_ps(low), self.avx._mm256_cvtepi32_ps(high));
        [pulp::cast(low), pulp::cast(high)]
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        self.add_f32x8(a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        self.mul_f32x8(a, b)
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        self.mul_add_f32x8(a, b, c)
    }
}

/// Plain arrays, for any machine.
#[derive(Clone, Copy)]
pub struct Arrays;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; 8] {
    std::array::from_fn(f)
}

/// `a * b + c`, rounded once if there is an instruction for it. Otherwise `mul_add` would be a slow
/// call.
#[inline(always)]
pub fn fused(a: f32, b: f32, c: f32) -> f32 {
    // aarch64 always has one.
    if cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
}

impl Lanes for Arrays {
    type V = [f32; 8];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; 8]
    }
    #[inline(always)]
    fn load(self, x: &[f32; 8]) -> Self::V {
        *x
    }
    #[inline(always)]
    fn store(self, v: Self::V) -> [f32; 8] {
        v
    }
    #[inline(always)]
    fn signed(self, q: &[i8; 8]) -> Self::V {
        each(|i| f32::from(q[i]))
    }
    #[inline(always)]
    fn nibbles(self, q: &[u8; 8]) -> [Self::V; 2] {
        [each(|i| f32::from(q[i] & 15)), each(|i| f32::from(q[i] >> 4))]
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|i| fused(a[i], b[i], c[i]))
    }
}
