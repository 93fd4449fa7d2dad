//! Compares block layouts with blocks computed by hand from the format's description, and the
//! quantizers with plain min/max rounding on fresh random data.

use std::ops::Range;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::affine::Affine;
use super::{Layout, QuantizeError, dequantize, layout, quantize};
use doppler_store::DType;
use half::f16;

/// The formats that store blocks.
fn blocked() -> impl Iterator<Item = DType> {
    DType::ALL.into_iter().filter(|dtype| dtype.is_quantised())
}

/// A generator whose seed is printed if a test fails.
fn rng() -> StdRng {
    let seed = rand::random();
    println!("seed {seed}");
    StdRng::seed_from_u64(seed)
}

/// Box-Muller: a normal deviate.
fn normal(rng: &mut StdRng) -> f32 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}

fn gaussian(rng: &mut StdRng, n: usize, sigma: f32) -> Vec<f32> {
    (0..n).map(|_| sigma * normal(rng)).collect()
}

fn round_trip(dtype: DType, row: &[f32]) -> Vec<f32> {
    let mut bytes = Vec::new();
    quantize(dtype, row, &mut bytes).unwrap();
    assert_eq!(bytes.len(), dtype.row_bytes(row.len()));
    let mut out = vec![f32::NAN; row.len()];
    dequantize(dtype, &bytes, row.len(), &mut out);
    assert!(out.iter().all(|x| x.is_finite()));
    out
}

fn rmse(a: &[f32], b: &[f32]) -> f64 {
    let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    (sum / a.len() as f64).sqrt()
}

#[test]
fn q4_k_has_ggmls_layout() {
    let mut block = [0_u8; 144];
    block[..2].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
    block[2..4].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
    // Group 0: scale 33, min 7. Group 5: scale 0b10_1001 = 41, min 0b11_0110 = 54.
    block[4] = 33;
    block[8] = 7;
    block[5] = 0b10 << 6;
    block[9] = 0b11 << 6;
    block[13] = 0b0110_1001;
    // Weight 3 of group 0: low nibble of byte 16 + 3. Weight 9 of group 5: high nibble
    // of the third 32 bytes.
    block[16 + 3] = 0x0d;
    block[16 + 64 + 9] = 0xa0;
    let mut out = [0.0; 256];
    dequantize(DType::Q4K, &block, 256, &mut out);
    assert_eq!(out[3], 2.0 * 33.0 * 13.0 - 0.5 * 7.0);
    assert_eq!(out[4], -3.5);
    assert_eq!(out[5 * 32 + 9], 2.0 * 41.0 * 10.0 - 0.5 * 54.0);
    assert_eq!(out[5 * 32 + 10], -27.0);
    assert_eq!(out[4 * 32 + 9], 0.0, "group 4 has scale 0 and min 0");
}

#[test]
fn q5_k_has_ggmls_layout() {
    let mut block = [0_u8; 176];
    block[..2].copy_from_slice(&f16::from_f32(1.0).to_le_bytes());
    block[2..4].copy_from_slice(&f16::from_f32(1.0).to_le_bytes());
    block[4 + 3] = 5; // scale of group 3
    block[8 + 3] = 2; // its min
    block[12 + 2] = 0x0c; // group 6: scale 12
    block[16 + 1] = 1 << 3; // fifth bit of weight 1 of group 3
    block[16 + 30] = 1 << 6;
    block[48 + 32 + 1] = 0x90; // its nibble: the high half of the second 32 bytes
    block[48 + 96 + 30] = 0x07;
    let mut out = [0.0; 256];
    dequantize(DType::Q5K, &block, 256, &mut out);
    assert_eq!(out[3 * 32 + 1], 5.0 * 25.0 - 2.0);
    assert_eq!(out[6 * 32 + 30], 12.0 * 23.0);
    assert_eq!(out[3 * 32], -2.0);
}

#[test]
fn q6_k_has_ggmls_layout() {
    let mut block = [0_u8; 210];
    block[208..].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
    for scale in &mut block[192..208] {
        *scale = 1;
    }
    block[192 + 13] = 0xfd; // -3: weights 208..224
    // Weight 210 = second half, quarter 2 (64..96), l = 18: high nibble of low byte 64 + 18,
    // bits 4..6 of high byte 128 + 32 + 18.
    block[64 + 18] = 0xb0;
    block[128 + 32 + 18] = 0b01 << 4;
    // Weight 33 = first half, quarter 1, l = 1: low nibble of byte 32 + 1, bits 2..4 of 128 + 1.
    block[33] = 0x0f;
    block[129] = 0b11 << 2;
    let mut out = [0.0; 256];
    dequantize(DType::Q6K, &block, 256, &mut out);
    assert_eq!(out[210], 0.5 * -3.0 * (27.0 - 32.0));
    assert_eq!(out[33], 0.5 * (63.0 - 32.0));
    assert_eq!(out[0], 0.5 * -32.0);
}

#[test]
fn q8_0_and_q5_0_have_ggmls_layout() {
    let mut block = [0_u8; 34];
    block[..2].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
    (block[2], block[33]) = (0x80, 100);
    let mut out = [0.0; 32];
    dequantize(DType::Q8_0, &block, 32, &mut out);
    assert_eq!((out[0], out[1], out[31]), (-32.0, 0.0, 25.0));

    let mut block = [0_u8; 22];
    block[..2].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
    block[2..6].copy_from_slice(&(1_u32 << 2 | 1 << 20).to_le_bytes());
    block[6 + 2] = 0x05; // weight 2: 16 + 5; weight 18: 0
    block[6 + 4] = 0x30; // weight 20: 16 + 3
    dequantize(DType::Q5_0, &block, 32, &mut out);
    assert_eq!((out[2], out[18], out[20]), (10.0, -32.0, 6.0));
}

#[test]
fn six_bit_scales_survive_packing() {
    let mut rng = rng();
    for _ in 0..100 {
        let mut six = || std::array::from_fn(|_| rng.random_range(0..64));
        let block = Affine { d: f16::ONE, dmin: f16::ONE, scales: six(), mins: six() };
        assert_eq!(Affine::from_header(&block.header()), block);
    }
}

#[test]
fn what_a_block_can_hold_exactly_comes_back_exactly() {
    let mut rng = rng();
    for dtype in blocked() {
        let cols = dtype.block_len();
        // Levels times a power of two; every group uses its full range. Formats with a minimum can
        // store any range; this one begins below zero.
        let Layout { levels: Range { start, end }, values, .. } = layout(dtype);
        let (low, high) = if start < 0 { (start, end) } else { (-3, end - 3) };
        let mut all: Vec<f32> = (low..high).map(|level| level as f32).collect();
        if !values.is_empty() {
            all = values.iter().copied().filter(|value| !value.is_nan()).collect();
            all.sort_by(f32::total_cmp);
        }
        let mut row: Vec<f32> =
            (0..cols).map(|_| all[rng.random_range(0..all.len())] / 64.0).collect();
        for group in row.chunks_mut(16) {
            (group[0], group[1]) = (all[0] / 64.0, all[all.len() - 1] / 64.0);
        }
        let error = rmse(&row, &round_trip(dtype, &row));
        let tolerance = if matches!(dtype, DType::Q8_0) { 0.002 } else { 1e-4 };
        assert!(error <= tolerance, "{dtype}: {error}");
    }
}

/// Plain rounding between the smallest and the largest weight of each group, with the group's scale
/// and min in full f32. A search must beat it although it stores them in six or eight bits.
/// Floating point levels have the power of two that the standard gives them: the largest weight's.
fn naive(dtype: DType, row: &[f32]) -> Vec<f32> {
    let Layout { group, levels, values, .. } = layout(dtype);
    if !values.is_empty() {
        let rounded = row.chunks(group).flat_map(|x| {
            let peak = x.iter().fold(0.0_f32, |peak, x| peak.max(x.abs()));
            let step = (peak.log2().floor() - 2.0).exp2();
            x.iter().map(move |x| {
                let near =
                    |a: &&f32, b: &&f32| (*a * step - x).abs().total_cmp(&(*b * step - x).abs());
                values.iter().min_by(near).unwrap() * step
            })
        });
        return rounded.collect();
    }
    let (top, symmetric) = ((levels.end - 1) as f32, levels.start < 0);
    let mut out = Vec::new();
    for x in row.chunks(group) {
        let low = x.iter().copied().fold(0.0, f32::min);
        let high = x.iter().copied().fold(0.0, f32::max);
        let peak = high.max(-low);
        let (step, offset) = if symmetric { (peak / top, 0.0) } else { ((high - low) / top, low) };
        out.extend(x.iter().map(|x| ((x - offset) / step).round() * step + offset));
    }
    out
}

#[test]
fn the_search_beats_plain_rounding_on_gaussian_weights() {
    let mut rng = rng();
    let row = gaussian(&mut rng, 256 * 400, 0.02);
    // Root mean square errors in standard deviations.
    for dtype in blocked() {
        let bound = layout(dtype).error;
        let ours = rmse(&row, &round_trip(dtype, &row)) / 0.02;
        let plain = rmse(&row, &naive(dtype, &row)) / 0.02;
        println!("{dtype}: ours {ours:.5}, plain rounding {plain:.5} sigma");
        // At eight bits a search gains nothing.
        let searched = layout(dtype).levels.len() < 255;
        assert!(ours < plain || !searched, "{dtype}: {ours} against {plain}");
        assert!(ours < bound, "{dtype}: {ours}");
    }
}

#[test]
fn odd_widths_are_padded_and_the_same_as_alone() {
    let mut rng = rng();
    for dtype in DType::ALL {
        for _ in 0..20 {
            let cols = rng.random_range(1..1000);
            let row = gaussian(&mut rng, cols, 0.1);
            let out = round_trip(dtype, &row);
            let error = rmse(&row, &out);
            // A few floating point levels are far apart for the few weights of a narrow row.
            let size = rmse(&row, &vec![0.0; cols]);
            let bound = if layout(dtype).values.is_empty() { 0.012 } else { 0.25 * size };
            assert!(error < bound, "{dtype} x {cols}: {error}");
            let mut bytes = Vec::new();
            quantize(dtype, &row, &mut bytes).unwrap();
            let mut wide = row.clone();
            wide.resize(cols.next_multiple_of(dtype.block_len()), 0.0);
            let mut padded = Vec::new();
            quantize(dtype, &wide, &mut padded).unwrap();
            assert_eq!(bytes, padded, "{dtype} x {cols}: the padding is zeros");
        }
    }
}

#[test]
fn zeros_constants_and_outliers_come_back() {
    let mut rng = rng();
    for dtype in blocked() {
        assert!(round_trip(dtype, &[0.0; 300]).iter().all(|&x| x == 0.0), "{dtype}");
        let Layout { max, values, error, .. } = layout(dtype);
        // Among powers of two times 1 and 1.5, the nearest is up to a fifth away.
        let off = if values.is_empty() { 0.01 } else { 0.2 };
        for value in [1.0, -1.0, 0.03, -0.03, 700.0, 1e-4, max, -max] {
            for x in round_trip(dtype, &[value; 256]) {
                assert!((x - value).abs() <= off * value.abs(), "{dtype}: {value} became {x}");
            }
        }
        let mut row = gaussian(&mut rng, 512, 0.02);
        let at = rng.random_range(0..256);
        row[at] = -1000.0;
        let out = round_trip(dtype, &row);
        assert!((out[at] + 1000.0).abs() < 40.0, "{dtype}: {} at {at}", out[at]);
        let rest = rmse(&row[256..], &out[256..]) / 0.02;
        assert!(
            rest < f64::max(0.1, 1.5 * error),
            "{dtype}: an outlier stays in its block: {rest}"
        );
        // So small that no f16 scale exists: the result must be close to zero.
        assert!(round_trip(dtype, &[1e-12, -1e-12, 3e-13]).iter().all(|x| x.abs() < 1e-6));
    }
}

#[test]
fn what_cannot_be_stored_is_refused_and_nothing_is_appended() {
    let mut out = vec![7];
    for dtype in DType::ALL {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = quantize(dtype, &[1.0, bad], &mut out).unwrap_err();
            assert!(matches!(error, QuantizeError::NotFinite { column: 1, .. }), "{error}");
        }
    }
    for dtype in blocked() {
        let error = quantize(dtype, &[0.0, 1.1 * layout(dtype).max], &mut out).unwrap_err();
        assert!(error.to_string().contains("too large"), "{error}");
    }
    assert!(quantize(DType::F16, &[65_520.0], &mut out).is_err(), "it rounds to infinity");
    assert!(quantize(DType::Bf16, &[f32::MAX], &mut out).is_err());
    assert_eq!(out, [7]);
    assert_eq!(round_trip(DType::F16, &[65_504.0, 65_519.0]), [65_504.0; 2]);
    assert_eq!(round_trip(DType::Bf16, &[1.0, -2.5, 3.0e38])[..2], [1.0, -2.5]);
}

#[test]
fn any_bytes_are_weights_without_a_panic() {
    let mut rng = rng();
    for dtype in DType::ALL {
        let bytes: Vec<u8> = (0..dtype.row_bytes(512)).map(|_| rng.random()).collect();
        dequantize(dtype, &bytes, 512, &mut [0.0; 512]);
    }
}

/// Checks what `Layout` says about where a block has its scales and its levels.
#[test]
fn a_blocks_scales_and_levels_lie_where_its_layout_says() {
    let mut rng = rng();
    for dtype in blocked() {
        let Layout { scales, quants, group, levels, narrow, .. } = layout(dtype);
        let len = dtype.block_len();
        let read = |block: &[u8]| {
            let mut out = vec![0.0; len];
            dequantize(dtype, block, len, &mut out);
            out
        };
        let mut block: Vec<u8> = (0..dtype.block_bytes()).map(|_| rng.random()).collect();
        let set = |block: &mut [u8], scale: f32| {
            scales.write(block, &super::random(dtype, scale), 0);
        };
        // Doubling all scales doubles all weights; both are rounded alike.
        set(&mut block, 0.25);
        let once = read(&block);
        set(&mut block, 0.5);
        assert!(read(&block).iter().zip(&once).all(|(two, one)| *two == 2.0 * one), "{dtype}");
        // With all level bits cleared, every weight of a group has the value of level zero.
        block[quants.clone()].fill(0);
        let zeros = read(&block);
        assert!(zeros.chunks(group).all(|of| of.iter().all(|x| *x == of[0])), "{dtype}");
        // And each level has its own bits.
        let bits = quants.len() * 8 / len;
        assert!(levels.len() > 1 << (bits - 1) && levels.len() <= 1 << bits, "{dtype}");
        assert!(narrow.is_none_or(|narrow| narrow.block_len() < len), "{dtype}");
    }
}
