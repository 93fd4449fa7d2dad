//! The table of weight formats: one row each. Everything else that names a format follows from it.
//!
//! [`crate::DType`] is made of it, `src/infer/build.rs` expands the kernels of `kernels/` over it,
//! and each row of `blocks` has a Rust file in `src/infer/quant` and a WGSL file in
//! `kernels/formats`, both called as the row says. docs/internals/formats.md tells how to add one.

/// Hands the table to the macro `$then`.
///
/// A row is: variant of `DType`, file, name, name in RDRR, weights and bytes of a block.
#[macro_export]
macro_rules! formats {
    ($then:ident) => {
        $then! {
            plain {
                F32 f32 "F32" "F32" 1 4,
                F16 f16 "F16" "F16" 1 2,
                Bf16 bf16 "BF16" "BF16" 1 2,
            }
            blocks {
                /// f16 d, f16 dmin, 12 B of 6-bit scales and mins, 128 B of nibbles.
                Q4K q4_k "Q4_K" "Q4_K_M" 256 144,
                /// As Q4_K, with 32 B of fifth bits before the nibbles.
                Q5K q5_k "Q5_K" "Q5_K" 256 176,
                /// 128 B of low nibbles, 64 B of high bits, 16 i8 scales, f16 d.
                Q6K q6_k "Q6_K" "Q6_K" 256 210,
                /// f16 d, 32 i8.
                Q8_0 q8_0 "Q8_0" "Q8_0" 32 34,
                /// f16 d, 4 B of fifth bits, 16 B of nibbles.
                Q5_0 q5_0 "Q5_0" "Q5_0" 32 22,
                /// f16 d, f16 m, 16 B of nibbles.
                Q4_1 q4_1 "Q4_1" "Q4_1" 32 20,
                /// An exponent of two, 16 B of nibbles, each a floating point number (e2m1).
                Mxfp4 mxfp4 "MXFP4" "MXFP4" 32 17,
                /// f32 d, 128 B, each a floating point number (e4m3).
                Fp8 fp8 "FP8" "FP8" 128 132,
            }
        }
    };
}

/// Hands `$then` the pairs of formats that matrices read together mix so often that a kernel of
/// its own is worth it: queries, keys and values in the Q4_K_M mixture, and there in models of
/// eight experts.
#[macro_export]
macro_rules! formats_together {
    ($then:ident) => {
        $then! { Q4K Q6K, Q4K Q8_0, }
    };
}
