//! f32 inner products, compiled for the widest instruction set the machine has.
//!
//! Everything here runs inside `Arch::dispatch`. The order of sums depends on the machine's vector
//! width, never on the number of threads.

use pulp::{Arch, Simd, WithSimd};

/// The instruction set in use, for people.
pub fn name() -> &'static str {
    let arch = format!("{:?}", Arch::new());
    match arch.get(..2) {
        Some("V4") => "avx512",
        Some("V3") => "avx2",
        Some("Ne") => "neon",
        _ => "scalar",
    }
}

/// `sum(a[i] * b[i])` over the shorter length.
pub fn dot(arch: Arch, a: &[f32], b: &[f32]) -> f32 {
    struct Dot<'a>(&'a [f32], &'a [f32]);
    impl WithSimd for Dot<'_> {
        type Output = f32;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f32 {
            let mut acc = Accumulator::new(simd);
            acc.add(simd, self.0, self.1);
            acc.sum(simd)
        }
    }
    arch.dispatch(Dot(a, b))
}

/// `y += scale * x` over the shorter length.
pub fn add_scaled(arch: Arch, y: &mut [f32], x: &[f32], scale: f32) {
    arch.dispatch(|| {
        for (y, x) in y.iter_mut().zip(x) {
            *y += scale * *x;
        }
    });
}

/// A running inner product in four independent vectors, so that the adds overlap.
#[derive(Clone, Copy)]
pub struct Accumulator<S: Simd> {
    vectors: [S::f32s; 4],
    tail: f32,
}

impl<S: Simd> Accumulator<S> {
    #[inline(always)]
    pub fn new(simd: S) -> Self {
        Self { vectors: [simd.splat_f32s(0.0); 4], tail: 0.0 }
    }

    /// Adds `sum(a[i] * b[i])`.
    #[inline(always)]
    pub fn add(&mut self, simd: S, a: &[f32], b: &[f32]) {
        let len = a.len().min(b.len());
        let (a, a_tail) = S::as_simd_f32s(&a[..len]);
        let (b, b_tail) = S::as_simd_f32s(&b[..len]);
        let mut a_fours = a.chunks_exact(4);
        let mut b_fours = b.chunks_exact(4);
        let [mut v0, mut v1, mut v2, mut v3] = self.vectors;
        for (a, b) in (&mut a_fours).zip(&mut b_fours) {
            v0 = simd.mul_add_e_f32s(a[0], b[0], v0);
            v1 = simd.mul_add_e_f32s(a[1], b[1], v1);
            v2 = simd.mul_add_e_f32s(a[2], b[2], v2);
            v3 = simd.mul_add_e_f32s(a[3], b[3], v3);
        }
        for (a, b) in a_fours.remainder().iter().zip(b_fours.remainder()) {
            v0 = simd.mul_add_e_f32s(*a, *b, v0);
        }
        self.vectors = [v0, v1, v2, v3];
        for (a, b) in a_tail.iter().zip(b_tail) {
            self.tail += a * b;
        }
    }

    #[inline(always)]
    pub fn sum(self, simd: S) -> f32 {
        let [v0, v1, v2, v3] = self.vectors;
        let low = simd.add_f32s(v0, v1);
        let high = simd.add_f32s(v2, v3);
        simd.reduce_sum_f32s(simd.add_f32s(low, high)) + self.tail
    }
}
