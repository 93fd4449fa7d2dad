//! Compares products on cooperative matrices with their twins, one kernel at a time, and plants
//! mistakes in them. Only on an adapter with cooperative matrices of 16 x 16.

use half::f16;

use super::alone::{Alone, Change};
use super::{Random, device};
use crate::cpu::expert_down_coop::expert_down_coop;
use crate::cpu::expert_gate_up_coop::expert_gate_up_coop;
use crate::cpu::expert_group::expert_group;
use crate::cpu::halve::halve;
use crate::cpu::linear_coop::linear_coop;
use crate::cpu::matrix::Matrix;
use crate::cpu::sum_parts::sum_parts;
use crate::gpu::params::{self, Steps};
use crate::gpu::repack::Packed;
use crate::gpu::{GpuDevice, Reduction};
use crate::graph::{Activation, ExpertLayout, MatrixSpec};
use doppler_store::DType;

/// The test adapter, if it has cooperative matrices for products. Otherwise prints that it skips.
fn adapter() -> Option<GpuDevice> {
    let device = device(Reduction::Group)?;
    if !device.cooperative() {
        println!("skipped: {} has no cooperative matrices of 16 x 16", device.describe());
        return None;
    }
    Some(device)
}

type Check = Result<(), String>;

fn words(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|x| f32::from_bits(*x)).collect()
}

/// Rows as the kernels read them: halves in rows of whole units, and scales.
fn halved(x: &[f32], cols: usize) -> (Vec<u32>, Vec<u32>) {
    let (mut halves, mut scales) = (Vec::new(), Vec::new());
    for row in x.chunks_exact(cols) {
        let (mut row, scale) = halve(row);
        row.resize(cols.next_multiple_of(32), f16::ZERO);
        halves.extend(
            row.chunks_exact(2)
                .map(|two| u32::from(two[0].to_bits()) | (u32::from(two[1].to_bits()) << 16)),
        );
        scales.push(scale.to_bits());
    }
    (halves, scales)
}

/// Rows of every scale, beyond the range of f16.
fn activations(random: &mut Random, tokens: usize, cols: usize) -> Vec<f32> {
    let mut x = random.floats(tokens * cols);
    for (i, row) in x.chunks_exact_mut(cols).enumerate() {
        let scale = (i as f32 % 61.0 - 30.0).exp2();
        row.iter_mut().for_each(|x| *x *= scale);
    }
    x
}

/// The sum of the magnitudes of each product of a row of `x` and a row of the matrix: a weight that
/// f32 rounds differently may become another f16.
fn magnitudes(x: &[f32], matrix: Matrix<'_>) -> Vec<f32> {
    let mut weights = vec![0.0; matrix.rows * matrix.cols];
    for (row, weights) in weights.chunks_exact_mut(matrix.cols).enumerate() {
        matrix.unpack_row(row, weights);
    }
    let of = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum();
    let rows = |x| weights.chunks_exact(matrix.cols).map(move |w| of(x, w));
    x.chunks_exact(matrix.cols).flat_map(rows).collect()
}

/// Compares rows of `want` with those of `got`, which are `stride` long and begin at `from`.
fn compare(
    got: &[f32],
    (stride, from): (usize, usize),
    (want, slack): (&[f32], &[f32]),
    rows: usize,
    what: &str,
) -> Check {
    for (i, (want, slack)) in want.iter().zip(slack).enumerate() {
        let got = got[i / rows * stride + from + i % rows];
        // A NaN is never close.
        let close = (got - want).abs() <= *slack;
        if !close {
            return Err(format!("{what}: [{}, {}] is {got}, not {want}", i / rows, i % rows));
        }
    }
    Ok(())
}

/// A matrix whose last blocks hold weights beyond its columns.
fn matrix(random: &mut Random, dtype: DType, rows: usize, cols: usize) -> (MatrixSpec, Vec<u8>) {
    let (spec, bytes) = random.matrix(dtype, rows, cols.next_multiple_of(dtype.block_len()));
    (MatrixSpec { cols, ..spec }, bytes)
}

struct Linear {
    dtype: DType,
    rows: usize,
    cols: usize,
    tokens: usize,
    /// The kernel's suffix, and parts of the columns.
    blocks: u32,
    parts: usize,
    biased: bool,
}

/// Space before the first row of a result.
const BEFORE: usize = 5;
/// What no kernel writes.
const POISON: u32 = 0x7fc0_1234;

fn linear(alone: &Alone<'_>, random: &mut Random, case: &Linear) -> Check {
    let Linear { dtype, rows, cols, tokens, blocks, parts, biased } = *case;
    let (spec, stored) = matrix(random, dtype, rows, cols);
    let packed = Packed::of(&spec);
    let mut planes = random.bytes(48 + packed.bytes());
    packed.pack(&stored, &mut planes[48..]);
    let x = activations(random, tokens, cols);
    let (halves, scales) = halved(&x, cols);
    let bias = random.floats(BEFORE + rows);
    let stride = BEFORE + rows + 3;
    let mut p = params::Linear {
        weight: packed.matrix(48),
        row_start: BEFORE as u32,
        rows: rows as u32,
        x_stride: (cols.next_multiple_of(32) / 4) as u32,
        result_stride: stride as u32,
        has_bias: u32::from(biased),
        logits: 0,
    };
    let steps = Steps { tokens: tokens as u32, ..Steps::default() };
    let name = format!("linear_coop_{}_{blocks}", dtype.file_name());
    let down = rows.div_ceil(128);
    let grid = (tokens.div_ceil(32 * blocks as usize) as u32, (down * parts) as u32);
    let planes: Vec<u32> = bytemuck::pod_collect_to_vec(&planes);
    let mut got = vec![POISON; stride * tokens];
    if parts == 1 {
        let buffers = [halves, scales, planes, words(&bias), got];
        got = alone.run_steps(&name, &steps, &p, &buffers, grid).swap_remove(4);
    } else {
        let sum = params::SumParts {
            row_start: p.row_start,
            rows: p.rows,
            parts: parts as u32,
            stride: p.rows,
            result_stride: p.result_stride,
            has_bias: p.has_bias,
        };
        (p.row_start, p.result_stride, p.has_bias) = (0, p.rows, 0);
        let buffers = [halves, scales, planes, vec![0; 4], vec![POISON; parts * tokens * rows]];
        let sums = alone.run_steps(&name, &steps, &p, &buffers, grid).swap_remove(4);
        let each: Vec<Vec<f32>> = sums.chunks_exact(tokens * rows).map(floats).collect();
        let each: Vec<&[f32]> = each.iter().map(Vec::as_slice).collect();
        let whole = sum_parts(&each, biased.then_some(&bias[BEFORE..]));
        let buffers = [sums, words(&bias), got];
        let groups = (rows * tokens).div_ceil(64) as u32;
        // Folded into y.
        let grid = (groups.min(9), groups.div_ceil(9));
        let adding = Alone::new(alone.device());
        got = adding.run_steps("sum_parts", &steps, &sum, &buffers, grid).swap_remove(2);
        let slack: Vec<f32> = whole.iter().map(|sum| (sum.abs() + 1.0) * 1e-6).collect();
        compare(&floats(&got), (stride, BEFORE), (&whole, &slack), rows, "sum_parts")?;
    }
    let untouched = (0..tokens).all(|t| {
        let row = &got[t * stride..][..stride];
        row[..BEFORE].iter().chain(&row[BEFORE + rows..]).all(|word| *word == POISON)
    });
    if !untouched {
        return Err("it wrote beside its rows".into());
    }
    let matrix = Matrix::new(&spec, &stored);
    let bias = biased.then_some(&bias[BEFORE..]);
    let mut want = vec![0.0; tokens * rows];
    linear_coop(&x, matrix, bias, &mut want);
    let mut slack = magnitudes(&x, matrix);
    for (slack, want) in slack.iter_mut().zip(&want) {
        *slack = *slack * 3e-5 + if biased { (want.abs() + 1.0) * 1e-6 } else { 0.0 };
    }
    let what = format!("{name} {rows} x {cols}, {tokens} tokens, {parts} parts");
    compare(&floats(&got), (stride, BEFORE), (&want, &slack), rows, &what)
}

/// Experts of a layer: their products for tokens of which each chose some.
struct Experts {
    inner: DType,
    outer: DType,
    hidden: usize,
    ff: usize,
    tokens: usize,
    blocks: u32,
}

const EXPERTS: usize = 3;
const TOP_K: usize = 2;

/// Gate and up, or down, by the same pairs.
// Long: makes a layer, runs it and compares it pair by pair.
fn experts(alone: &Alone<'_>, random: &mut Random, case: &Experts, second: bool) -> Check {
    let Experts { inner, outer, hidden, ff, tokens, blocks } = *case;
    // One slot for each expert, in another order, and one that is not used.
    let slots = [2u32, 0, 3];
    let (mut stored, mut planes) = (Vec::new(), Vec::new());
    let spec = |dtype, rows, cols, offset| MatrixSpec { dtype, rows, cols, offset };
    let gate = spec(inner, ff, hidden, 0);
    let up = spec(inner, ff, hidden, gate.bytes());
    let down = spec(outer, hidden, ff, 2 * gate.bytes());
    let bytes = 2 * gate.bytes() + down.bytes();
    let layout = ExpertLayout { gate, up, down, bytes };
    let of = [gate, up, down].map(|spec| Packed::of(&spec));
    let at = [0, of[0].bytes(), of[0].bytes() + of[1].bytes()];
    let slot_bytes = at[2] + of[2].bytes();
    planes.resize(4 * slot_bytes, 0xa5);
    for slot in slots {
        let mut expert = Vec::new();
        for (of, at) in of.iter().zip(at) {
            let (_, bytes) = matrix(random, of.dtype, of.rows, of.cols);
            of.pack(&bytes, &mut planes[slot as usize * slot_bytes + at..][..of.bytes()]);
            expert.extend(bytes);
        }
        stored.push(expert);
    }
    let planes: Vec<u32> = bytemuck::pod_collect_to_vec(&planes);
    // The last expert is not in this wave.
    let table = vec![9, 9, slots[0], slots[1], u32::MAX];
    let ids: Vec<u32> = (0..tokens * TOP_K).map(|_| random.below(EXPERTS) as u32).collect();
    let (order, tiles) = expert_group(&ids, 32 * blocks as usize);
    let mut tile_words: Vec<u32> = tiles.iter().flat_map(|t| [t.0, t.1, t.2, 0]).collect();
    tile_words.extend([0; 8]);
    let across = tile_words.len() as u32 / 4;
    let (rows, cols) = if second { (hidden, ff) } else { (ff, hidden) };
    let x = activations(random, if second { ids.len() } else { tokens }, cols);
    let (halves, scales) = halved(&x, cols);
    let stride = rows + 3;
    let result = vec![POISON; stride * ids.len()];
    let mut buffers = vec![halves, scales, planes, order, tile_words, table, result];
    let (slot_stride, slots_at) = ((slot_bytes / 4) as u32, 2);
    let x_stride = (cols.next_multiple_of(32) / 4) as u32;
    let (top_k, result_stride) = (TOP_K as u32, stride as u32);
    let steps = Steps { tokens: tokens as u32, ..Steps::default() };
    // Of wide tiles, those that are not full are the narrow kernel's.
    let kernels = if blocks == 4 { vec![4, 2] } else { vec![2] };
    let name = if second {
        let down = of[2].matrix(at[2]);
        let rows = rows as u32;
        let p = params::ExpertDown {
            down,
            rows,
            top_k,
            slot_stride,
            slots_at,
            x_stride,
            result_stride,
        };
        let name = format!("expert_down_coop_{}", outer.file_name());
        let grid = (across, rows.div_ceil(128));
        for blocks in kernels {
            buffers = alone.run_steps(&format!("{name}_{blocks}"), &steps, &p, &buffers, grid);
        }
        name
    } else {
        let p = params::ExpertGateUp {
            gate: of[0].matrix(at[0]),
            up: of[1].matrix(at[1]),
            rows: rows as u32,
            top_k,
            slot_stride,
            slots_at,
            x_stride,
            result_stride,
            activation: 0,
        };
        let name = format!("expert_gate_up_coop_{}", inner.file_name());
        let grid = (across, (rows as u32).div_ceil(64));
        for blocks in kernels {
            buffers = alone.run_steps(&format!("{name}_{blocks}"), &steps, &p, &buffers, grid);
        }
        name
    };
    let got = buffers.swap_remove(6);
    let what = format!("{name} {rows} x {cols}, {tokens} tokens");
    for (pair, expert) in ids.iter().enumerate() {
        let got = &got[pair * stride..][..stride];
        let expert = *expert as usize;
        if expert == EXPERTS - 1 || got[rows..].iter().any(|word| *word != POISON) {
            let untouched = got.iter().all(|word| *word == POISON);
            (expert == EXPERTS - 1 && untouched)
                .then_some(())
                .ok_or_else(|| format!("{what}: pair {pair} of another wave or beside it"))?;
            continue;
        }
        let row = if second { pair } else { pair / TOP_K };
        let (x, bytes) = (&x[row * cols..][..cols], &stored[expert]);
        let (want, slack) = if second {
            let want = expert_down_coop(x, &layout, bytes);
            let slack = magnitudes(x, Matrix::new(&layout.down, bytes));
            (want, slack.iter().map(|m| m * 3e-5).collect::<Vec<_>>())
        } else {
            let want = expert_gate_up_coop(x, &layout, bytes, Activation::Silu);
            let gates = magnitudes(x, Matrix::new(&layout.gate, bytes));
            let ups = magnitudes(x, Matrix::new(&layout.up, bytes));
            // SiLU is at most its input and steepest 1.1; both factors are off by 3e-5 of their
            // magnitudes.
            let slack = gates.iter().zip(&ups).map(|(g, u)| g * u * 1e-4 + f32::MIN_POSITIVE);
            (want, slack.collect())
        };
        compare(&floats(got), (stride, 0), (&want, &slack), rows, &format!("{what}, pair {pair}"))?;
    }
    Ok(())
}

fn quantised() -> impl Iterator<Item = DType> {
    DType::ALL.into_iter().filter(|dtype| dtype.is_quantised())
}

#[test]
fn products_match_their_twin_whatever_the_edges() {
    let mut random = Random::new("linear_coop alone");
    let Some(device) = adapter() else { return };
    let alone = Alone::new(&device);
    for dtype in quantised() {
        let block = dtype.block_len();
        let mut one = |rows, cols, tokens, blocks, parts, biased| {
            let case = Linear { dtype, rows, cols, tokens, blocks, parts, biased };
            linear(&alone, &mut random, &case).unwrap();
        };
        // Odd steps, columns within a block and a unit, a tile's edges and beyond.
        one(67, 512, 70, 2, 1, true);
        one(130, 300, 129, 4, 1, false);
        one(3, block, 16, 2, 1, false);
        one(300, 1100, 19, 4, 3, true);
        one(128, 1024, 128, 4, 2, true);
        one(130, 8192, 70, 4, 1, false);
    }
}

#[test]
fn products_of_experts_match_their_twins() {
    let mut random = Random::new("experts coop alone");
    let Some(device) = adapter() else { return };
    let alone = Alone::new(&device);
    for (i, inner) in quantised().enumerate() {
        let outer = quantised().nth((i + 3) % quantised().count()).unwrap();
        for (blocks, tokens) in [(2, 70), (4, 150)] {
            let case = Experts { inner, outer, hidden: 300, ff: 130, tokens, blocks };
            experts(&alone, &mut random, &case, false).unwrap();
            experts(&alone, &mut random, &case, true).unwrap();
        }
    }
}

/// The kernel whose comparison must notice.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Of {
    Linear(DType),
    GateUp,
    Down,
}

const MISTAKES: [(Of, Change); 37] = [
    (
        Of::Linear(DType::Q4K),
        ("return sixteen(r.quants & NIBBLES, s.x", "return sixteen(r.quants & NIBBLES, s.y"),
    ),
    (Of::Linear(DType::Q4K), ("s.y, -s.w)", "s.y, -s.z)")),
    (Of::Linear(DType::Q4K), ("(i & 7u) >> 1u)", "(i & 7u) >> 2u)")),
    (Of::Linear(DType::Q4K), ("b * 8u + (i & 7u)]", "b * 8u + (i & 3u)]")),
    (Of::Linear(DType::Q4K), ("x_stride + local % 4u", "x_stride + local % 2u")),
    (Of::Linear(DType::Q4K), ("part * 2u;", "part * 1u;")),
    (Of::Linear(DType::Q4K), ("return row + (row & 32u)", "return row")),
    (Of::Linear(DType::Q4K), ("(q & 2u) << 1u", "(q & 2u)")),
    (Of::Linear(DType::Q4K), ("(q & 6u) >> 1u", "(q & 2u) >> 1u")),
    (
        Of::Linear(DType::Q4K),
        (
            "coop_w[w_to + HALF * STRIDE + 1u] = high.second",
            "coop_w[w_to + HALF * STRIDE + 1u] = high.first",
        ),
    ),
    (
        Of::Linear(DType::Q4K),
        (
            "coop_x[x_to + 1u * 2u * BLOCK] = eight(x1)",
            "coop_x[x_to + 1u * 2u * BLOCK] = eight(x0)",
        ),
    ),
    (Of::Linear(DType::Q4K), ("group * 2u + 1u + 1u, units - 1u", "group * 2u + 1u, units - 1u")),
    (Of::Linear(DType::Q4K), ("group * 2u + 1u >= units", "group * 2u > units")),
    (Of::Linear(DType::Q4K), ("min(group + 1u, end - 1u)", "min(group, end - 1u)")),
    (Of::Linear(DType::Q4K), ("(0u + 2u) * BLOCK + 1u * 2u", "(0u + 2u) * BLOCK + 0u * 2u")),
    (Of::Linear(DType::Q4K), ("x_from + 1u * BLOCK", "x_from + 0u * BLOCK")),
    (
        Of::Linear(DType::Q4K),
        ("low01 = coopMultiplyAdd(a0, b1, low01)", "low01 = coopMultiplyAdd(a0, b0, low01)"),
    ),
    (Of::Linear(DType::Q4K), ("finish(low11, high11,", "finish(low11, high10,")),
    (Of::Linear(DType::Q4K), ("row + 1u * 16u", "row + 0u * 16u")),
    (Of::Linear(DType::Q4K), ("(v.x, v.x >> 16u, v.y, v.y >> 16u)", "(v.x, v.x, v.y, v.y >> 16u)")),
    (Of::Linear(DType::Q4K), ("sum * scales[token]", "sum * scales[0]")),
    (Of::Linear(DType::Q4K), ("value += bias[to]", "value += bias[row]")),
    (Of::Linear(DType::Q4K), ("row < params.rows &&", "row + 1u < params.rows &&")),
    (Of::Linear(DType::Q4K), ("part * each", "part * (each + 1u)")),
    (Of::Linear(DType::Q4K), ("part = group.y / down", "part = 0u")),
    (Of::Linear(DType::Q5K), ("fifths(r.fifth)[1]", "fifths(r.fifth)[0]")),
    (Of::Linear(DType::Q6K), ("r.scales >> 16u", "r.scales >> 8u")),
    (Of::Linear(DType::Q6K), ("select(both.xy, both.zw", "select(both.xy, both.xy")),
    (Of::Linear(DType::Q8_0), ("half_bits(r.d >> 16u)", "half_bits(r.d & 0xffffu)")),
    (Of::Linear(DType::Q5_0), ("-16.0 * d", "-15.0 * d")),
    (Of::Linear(DType::Q4_1), ("at | 1u", "at")),
    (Of::Linear(DType::Mxfp4), ("(r.e >> 8u)", "(r.e)")),
    (Of::Linear(DType::Fp8), ("weights[m.base + at + 2u]", "weights[m.base + at]")),
    (Of::GateUp, ("in_slot(params.up", "in_slot(params.gate")),
    (Of::GateUp, ("first_row + row - (row / 64u) * HALF", "first_row + row")),
    (Of::Down, ("* scales[pair]", "* scales[0]")),
    (Of::Down, ("min(i, tile.z - 1u)", "min(i + 1u, tile.z - 1u)")),
];

fn check(of: Of, alone: &Alone<'_>, random: &mut Random) -> Check {
    let (inner, outer) = (DType::Q4K, DType::Q6K);
    let case = Experts { inner, outer, hidden: 256, ff: 70, tokens: 65, blocks: 2 };
    match of {
        Of::Linear(dtype) => {
            // An odd number of steps, of which the last is within a block.
            let cols = if dtype == DType::Q4K { 1056 } else { 1024 };
            let (rows, tokens, biased) = (130, 70, false);
            let case = Linear { dtype, rows, cols, tokens, blocks: 2, parts: 3, biased };
            linear(alone, random, &case)?;
            linear(alone, random, &Linear { parts: 1, biased: true, ..case })
        }
        Of::GateUp => experts(alone, random, &case, false),
        Of::Down => experts(alone, random, &case, true),
    }
}

#[test]
fn every_mistake_in_a_product_on_cooperative_matrices_is_noticed() {
    let mut random = Random::new("wrong products on cooperative matrices");
    let Some(device) = adapter() else { return };
    let right = Alone::new(&device);
    let (mut passed, mut seen) = (Vec::new(), None);
    for (of, change) in MISTAKES {
        if seen.replace(of) != Some(of) {
            check(of, &right, &mut random).unwrap();
        }
        let wrong = Alone::with(&device, change);
        match check(of, &wrong, &mut random) {
            Ok(()) => passed.push(format!("{of:?} with {change:?}")),
            Err(noticed) => println!("{of:?} with {change:?}: {noticed}"),
        }
    }
    assert!(passed.is_empty(), "not noticed: {passed:#?}");
}
