//! Compares each decode kernel alone with its CPU twin: random data of odd shapes, in the variants
//! that the adapter supports.
//!
//! A kernel may differ from its twin, which sums in f64, only by the rounding of f32 operations,
//! which each comparison counts. WGSL does not specify how an operation rounds, so each may be off
//! by `EPS` of its result. Functions have the errors given in the specification ("Accuracy of
//! built-in functions").

mod attention;
mod experts;
mod forms;
mod norm_add;
mod products;
mod together;
mod wrong;

use half::f16;

use super::Random;
use super::alone::Alone;
use crate::cpu::matrix::Matrix;
use crate::cpu::pack::{Packed, SIXTEEN, WHOLE_MAX, pack, packed_words, pieces};
use crate::gpu::Reduction;
use crate::gpu::decode::params;
use crate::gpu::repack;
use crate::graph::{Activation, MatrixSpec};
use crate::quant::layout;
use doppler_store::DType;

/// The relative error of an f32 operation.
const EPS: f64 = f32::EPSILON as f64;

/// The smallest f16 that keeps all its bits. An adapter may flush a smaller one to zero.
const HALF_LEAST: f64 = 1.0 / 16384.0;

/// Additions that reduce a team's 32 sums to one, and those of a workgroup's eight teams.
const TEAM: usize = 5;
const TEAMS: usize = 8;

/// Whether a kernel computes the same as its twin, and if not, where it differs.
type Check = Result<(), String>;

fn words(of: &[f32]) -> Vec<u32> {
    of.iter().map(|x| x.to_bits()).collect()
}

fn floats(of: &[u32]) -> Vec<f32> {
    of.iter().map(|x| f32::from_bits(*x)).collect()
}

/// Every element must be within its tolerance of the twin's, which is itself rounded once.
fn compare(got: &[f32], want: &[f32], slack: &[f64], what: &str) -> Check {
    assert_eq!((got.len(), want.len()), (want.len(), slack.len()), "{what}");
    for (i, ((got, want), slack)) in got.iter().zip(want).zip(slack).enumerate() {
        let off = (f64::from(*got) - f64::from(*want)).abs();
        let most = slack + EPS * f64::from(want.abs());
        // A NaN difference does not count as small.
        if !matches!(
            off.partial_cmp(&most),
            Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)
        ) {
            return Err(format!("{what}: [{i}] is {got}, not {want}: off by {off:e} of {most:e}"));
        }
    }
    Ok(())
}

/// A packed vector: its elements as in `compare`, zeros after them, and all of it rounded as `pack`
/// rounds these elements.
fn compare_packed(got: &[u32], want: &[u32], slack: &[f64], what: &str) -> Check {
    let (packed, twin) = (Packed::new(got), Packed::new(want));
    let all = 0..want.len() / 52 * 32;
    let elements: Vec<f32> = all.clone().map(|i| packed.plain(i)).collect();
    let wanted: Vec<f32> = all.map(|i| twin.plain(i)).collect();
    let mut slack = slack.to_vec();
    slack.resize(wanted.len(), 0.0);
    compare(&elements, &wanted, &slack, what)?;
    let exactly =
        |t: usize, of: &str, got: f64, want: f64, most: f64| match (got - want).abs() <= most {
            true => Ok(()),
            false => Err(format!("{what}: {of} of sixteen {t} is {got}, not {want}")),
        };
    for (t, elements) in elements.chunks_exact(SIXTEEN).enumerate() {
        let most = elements.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let tiny = most < 1e-32;
        let step = if tiny { 0.0 } else { f64::from(most) / f64::from(WHOLE_MAX) };
        let scale = f64::from(packed.scale(t));
        // A division is off by 2.5 units, and so is its product.
        exactly(t, "the scale", scale, step, 3.0 * EPS * step)?;
        let mut sum = 0;
        for (i, element) in (t * SIXTEEN..).zip(elements) {
            let exact = if tiny { 0.0 } else { f64::from(*element) / step };
            let half = 0.5 + 4.0 * EPS * exact.abs();
            exactly(t, "a whole number", f64::from(packed.whole(i)), exact, half)?;
            sum += packed.whole(i);
        }
        let want = scale * f64::from(sum);
        exactly(t, "the sum", f64::from(packed.sum(t)), want, EPS * want.abs())?;
    }
    Ok(())
}

/// A random vector of `cols` elements, packed for products: either all except sixteen zeros, or
/// only a few of one sixteen. With the latter f32 has so little to round that the rounding of
/// packing stands out.
fn packed_vector(random: &mut Random, cols: usize, scale: f32) -> Vec<u32> {
    let mut x: Vec<f32> = random.floats(cols).iter().map(|x| x * scale).collect();
    let sixteen = random.below(cols.div_ceil(SIXTEEN)) * SIXTEEN;
    if random.below(2) == 0 {
        x.iter_mut().skip(sixteen).take(SIXTEEN).for_each(|x| *x = 0.0);
    } else {
        let few = [0; 3].map(|_| sixteen + random.below(SIXTEEN.min(cols - sixteen)));
        x.iter_mut().enumerate().filter(|(i, _)| !few.contains(i)).for_each(|(_, x)| *x = 0.0);
    }
    let mut packed = vec![0; packed_words(cols)];
    pack(&x, &mut packed);
    packed
}

/// Stored rows: arbitrary blocks of a quantised format.
fn any_matrix(
    random: &mut Random,
    dtype: DType,
    rows: usize,
    cols: usize,
) -> (MatrixSpec, Vec<u8>) {
    match dtype.is_quantised() {
        true => random.blocks(dtype, rows, cols),
        false => random.matrix(dtype, rows, cols),
    }
}

/// Odd numbers of rows and columns of a format, in whole blocks and not.
fn shapes(dtype: DType) -> [(usize, usize); 3] {
    match dtype.block_len() {
        256 => [(67, 768), (3, 256), (29, 2348)],
        32 => [(67, 96), (3, 32), (29, 1104)],
        _ => [(67, 33), (3, 7), (29, 1000)],
    }
}

/// The possible error of each row's product with `x`, whose items are divided among `lanes`
/// invocations, if `more` roundings follow. `stored` holds the matrix at the spec's offset.
fn slacks(x: &[u32], spec: &MatrixSpec, stored: &[u8], lanes: usize, more: usize) -> Vec<f64> {
    let x = Packed::new(x).meeting(spec.dtype);
    // A weight is a level times a scale plus the value of level zero. A kernel sums the two
    // separately.
    let mut zeros = stored.to_vec();
    let quants = layout(spec.dtype).quants;
    let blocks =
        zeros[spec.offset..spec.offset + spec.bytes()].chunks_exact_mut(spec.dtype.block_bytes());
    blocks.for_each(|block| block[quants.clone()].fill(0));
    let (whole, zeros) = (Matrix::new(spec, stored), Matrix::new(spec, &zeros));
    let items = params::items(&repack::Packed::of(spec));
    // Within an item: the weight's scale, the sums' scale, four products, eight additions; and the
    // twin's three operations per weight.
    let roundings = (16 + items.div_ceil(lanes) + TEAM + TEAMS + more) as f64;
    let (mut row, mut floor) = (vec![0.0; spec.cols], vec![0.0; spec.cols]);
    let slack = |at| {
        whole.unpack_row(at, &mut row);
        zeros.unpack_row(at, &mut floor);
        let weights = row.iter().zip(&floor).map(|(w, zero)| (f64::from(*w), f64::from(*zero)));
        let terms = weights.zip(&x).map(|((w, zero), x)| {
            let lost = if spec.dtype == DType::F16 && w.abs() < HALF_LEAST { w.abs() } else { 0.0 };
            (((w - zero).abs() + zero.abs()) * roundings * EPS + lost) * x.abs()
        });
        terms.sum()
    };
    (0..spec.rows).map(slack).collect()
}

/// The possible error of `act(gate) * up`, given the errors of both factors.
fn gated_slack((gate, gate_off): (f64, f64), (up, up_off): (f64, f64), of: Activation) -> f64 {
    // Neither activation has a slope above 1.13 or a magnitude above its argument's.
    let own = match of {
        // exp is off by 3 + 2 |x| units, and the division by 2.5.
        Activation::Silu => 9.0 + 2.0 * gate.abs(),
        Activation::Clamped => 10.0 + 2.0 * 1.702 * gate.abs(),
        Activation::Sigmoid => unreachable!("it gates attention, not a feed-forward"),
        // tanh is sinh over cosh, which have the errors of exp; half of 1 + tanh is multiplied.
        Activation::GeluTanh => {
            let inner = 0.8 * (gate.abs() + 0.0448 * gate.abs().powi(3));
            16.0 + 4.0 * inner.min(15.0)
        }
        Activation::Gelu | Activation::SquaredRelu | Activation::Tanh => {
            unreachable!("no family gates with {of:?}")
        }
    };
    let act_off = 1.13 * gate_off + own * EPS * gate.abs();
    // Values that f32 may flush to zero.
    let flushed = 1e-36;
    (gate.abs() + act_off) * up_off + (act_off + 2.0 * EPS * gate.abs()) * up.abs() + flushed
}

/// A grid of at least this many workgroups, in rows of which the last may be too long.
const fn folded(workgroups: usize) -> (u32, u32) {
    (workgroups.div_ceil(3) as u32, 3)
}

/// Normalises and packs `x` of `cols` elements. The bindings' last quads contain data past the last
/// element.
fn norm(alone: &Alone<'_>, team: &str, random: &mut Random, cols: usize, eps: f32) -> Check {
    let quads = cols.next_multiple_of(4);
    let (mut x, weight) = (random.floats(quads), random.floats(quads));
    x[..cols].iter_mut().skip(32).take(16).for_each(|x| *x = 0.0);
    let mut want = vec![0; packed_words(cols)];
    crate::cpu::decode_norm::decode_norm(&x[..cols], &weight[..cols], eps, &mut want);
    let p = params::Norm { cols: cols as u32, pieces: pieces(cols) as u32, eps };
    let buffers = [words(&x), words(&weight), vec![0x7fc0_0000; want.len()]];
    let grid = (pieces(cols).div_ceil(32) as u32, 1);
    let got = alone.run(&format!("decode_norm_{team}"), 0, &p, &buffers, grid);
    // Sums of squares: of a quad, of an invocation's quads, of the workgroup. The root halves their
    // error; then come the division, the epsilon, the root itself, and two products.
    let sums = (cols.div_ceil(1024) + 4 + TEAM + TEAMS) as f64;
    let roundings = 0.5 * (sums + 2.5 + 1.0) + 2.0 + 2.0;
    let twin = Packed::new(&want);
    let slack: Vec<f64> =
        (0..cols).map(|i| roundings * EPS * f64::from(twin.plain(i).abs())).collect();
    compare_packed(&got[2], &want, &slack, &format!("{cols} columns, {team}"))
}

/// As [`norm`], for a layer norm of states far from 0, with a bias or without.
fn layer_norm(
    alone: &Alone<'_>,
    team: &str,
    random: &mut Random,
    (cols, biased): (usize, bool),
    eps: f32,
) -> Check {
    let quads = cols.next_multiple_of(4);
    let (mut x, weight, bias) = (random.floats(quads), random.floats(quads), random.floats(quads));
    x.iter_mut().for_each(|x| *x += 3.0);
    let mut want = vec![0; packed_words(cols)];
    let twin = crate::cpu::decode_layer_norm::decode_layer_norm;
    twin(&x[..cols], &weight[..cols], biased.then_some(&bias[..cols]), eps, &mut want);
    let (cols_word, has_bias) = (cols as u32, u32::from(biased));
    let p = params::LayerNorm { cols: cols_word, pieces: pieces(cols) as u32, eps, has_bias };
    let buffers = [words(&x), words(&weight), words(&bias), vec![0x7fc0_0000; want.len()]];
    let grid = (pieces(cols).div_ceil(32) as u32, 1);
    let got = alone.run(&format!("decode_layer_norm_{team}"), 0, &p, &buffers, grid);
    // Each of the sums' roundings moves the mean by a part of its magnitude; the differences from
    // it are divided by their deviation, which is at least the root of the epsilon.
    let sums = (cols.div_ceil(1024) + 4 + TEAM + TEAMS) as f64;
    let mean = x[..cols].iter().map(|x| f64::from(*x)).sum::<f64>() / cols as f64;
    let around: f64 = x[..cols].iter().map(|x| (f64::from(*x) - mean).powi(2)).sum();
    let factor = 1.0 / (around / cols as f64 + f64::from(eps)).sqrt();
    let moved = (sums + 2.0) * EPS * 4.0 * factor;
    let slack: Vec<f64> = (0..cols)
        .map(|i| {
            let normed = (f64::from(x[i]) - mean) * factor;
            let off = moved + (0.5 * sums + 8.0) * EPS * (normed.abs() + moved);
            let added = if biased { f64::from(bias[i].abs()) } else { 0.0 };
            let weight = f64::from(weight[i].abs());
            off * weight + 2.0 * EPS * (normed.abs() * weight + added)
        })
        .collect();
    compare_packed(&got[3], &want, &slack, &format!("{cols} columns, {team}"))
}

#[test]
fn a_layer_norm_matches_its_twin_over_several_workgroups() {
    let mut random = Random::new("decode_layer_norm");
    let Some(device) = super::device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        for (i, cols) in [1, 7, 63, 64, 100, 1000, 1024, 1025, 2050, 4099].into_iter().enumerate() {
            for eps in [1e-5, 0.3] {
                layer_norm(&alone, team, &mut random, (cols, i % 2 == 0), eps).unwrap();
            }
        }
    }
}

#[test]
fn a_norm_matches_its_twin_over_several_workgroups() {
    let mut random = Random::new("decode_norm");
    let Some(device) = super::device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        for cols in [1, 7, 63, 64, 100, 1000, 1024, 1025, 2050, 4099] {
            for eps in [1e-5, 0.3] {
                norm(&alone, team, &mut random, cols, eps).unwrap();
            }
        }
    }
}

/// Random f16s of every sign below `most` that keep all their bits.
fn halves(random: &mut Random, count: usize, most: f32) -> Vec<f16> {
    let half = |x: f32| if f64::from(x.abs()) < HALF_LEAST { f16::ZERO } else { f16::from_f32(x) };
    (0..count).map(|_| half(random.float() * most)).collect()
}
