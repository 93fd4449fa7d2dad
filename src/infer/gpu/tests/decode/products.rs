//! One token's products with trunk matrices: decode_linear, decode_gate_up.

use super::{Check, EPS, any_matrix, compare, compare_packed, floats, folded, gated_slack};
use super::{packed_vector, shapes, slacks, words};
use crate::cpu::decode_gate_up::decode_gate_up;
use crate::cpu::decode_linear::{Segment, decode_linear};
use crate::cpu::matrix::Matrix;
use crate::cpu::pack::{Packed, packed_words, pieces, products};
use crate::gpu::Reduction;
use crate::gpu::decode::params;
use crate::gpu::repack;
use crate::gpu::tests::alone::Alone;
use crate::gpu::tests::{Random, device};
use crate::graph::{Activation, MatrixSpec};
use doppler_store::DType;

/// Planes of matrices one after the other, after some other data; and where each begins.
pub(super) fn planes(random: &mut Random, of: &[(MatrixSpec, Vec<u8>)]) -> (Vec<u32>, Vec<usize>) {
    let mut planes = random.bytes(48);
    let mut begins = Vec::new();
    for (spec, stored) in of {
        begins.push(planes.len());
        let packed = repack::Packed::of(spec);
        let begin = planes.len();
        planes.resize(begin + packed.bytes(), 9);
        packed.pack(stored, &mut planes[begin..]);
    }
    (bytemuck::pod_collect_to_vec(&planes), begins)
}

/// A dispatch of decode_linear.
pub(super) struct Linear<'a> {
    /// The kernel's formats.
    pub kernel: &'a str,
    /// Format and rows of each matrix.
    pub of: &'a [(DType, usize)],
    pub cols: usize,
    /// Teams that share a row.
    pub split: usize,
    pub biased: bool,
    pub adds: bool,
}

pub(super) fn linear(
    alone: &Alone<'_>,
    team: &str,
    random: &mut Random,
    case: &Linear<'_>,
) -> Check {
    let Linear { kernel, of, cols, split, biased, adds } = *case;
    let matrices: Vec<_> =
        of.iter().map(|(dtype, rows)| any_matrix(random, *dtype, *rows, cols)).collect();
    let (weights, begins) = planes(random, &matrices);
    let x = packed_vector(random, cols, 2.0);
    let rows: usize = of.iter().map(|(_, rows)| rows).sum();
    let (bias, before) = (random.floats(rows + 5), random.floats(rows + 5));

    let mut p = params::Linear {
        split: split as u32,
        has_bias: u32::from(biased),
        adds: u32::from(adds),
        ..params::Linear::default()
    };
    p.segments.iter_mut().for_each(|segment| segment.end = u32::MAX);
    let (mut end, mut at) = (0, 3);
    let mut segments = Vec::new();
    let mut slack = vec![0.0; rows + 5];
    for (i, (spec, stored)) in matrices.iter().enumerate() {
        let m = params::Pieces::of(&repack::Packed::of(spec), begins[i]);
        end += spec.rows.div_ceil(8 / split);
        p.segments[i] = params::Segment {
            base: m.base,
            blocks: m.blocks,
            row_blocks: m.row_blocks,
            pieces: m.pieces,
            format: m.format,
            rows: spec.rows as u32,
            result_at: at as u32,
            end: end as u32,
        };
        segments.push(Segment { weight: Matrix::new(spec, stored), result_at: at });
        // A bias and the old contents are added.
        for (i, product) in (at..).zip(slacks(&x, spec, stored, 32 * split, 2)) {
            let biased = if biased { bias[i].abs() } else { 0.0 };
            let added = if adds { before[i].abs() } else { 0.0 };
            slack[i] = product + 2.0 * EPS * f64::from(biased + added);
        }
        at += spec.rows;
    }
    let mut want = before.clone();
    decode_linear(&x, &segments, biased.then_some(&bias[..]), adds, &mut want);
    let buffers = [x, weights, words(&bias), words(&before)];
    let name = format!("decode_linear_{kernel}_{team}");
    let got = alone.run(&name, 0, &p, &buffers, folded(end));
    let what = format!("{name} {of:?} x {cols} by {split}");
    compare(&floats(&got[3]), &want, &slack, &what)
}

#[test]
fn products_match_their_twin_in_every_format_however_a_row_is_shared() {
    let mut random = Random::new("decode_linear");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    // f16s unpacked by hand, and by the adapter if it can.
    for by_hand in [false, true] {
        if by_hand {
            device.pipelines().set_keeps_halves(false);
        }
        for team in alone.teams() {
            for dtype in DType::ALL {
                let kernel = dtype.file_name();
                for (i, (rows, cols)) in shapes(dtype).into_iter().enumerate() {
                    for split in [1, 2, 4, 8] {
                        let (biased, adds) = (random.below(2) == 0, random.below(2) == 0);
                        let three = [(dtype, rows), (dtype, 9), (dtype, 1 + random.below(20))];
                        let of = &three[..[3, 1, 2][i]];
                        let case = Linear { kernel, of, cols, split, biased, adds };
                        linear(&alone, team, &mut random, &case).unwrap();
                    }
                }
            }
        }
    }
}

#[test]
fn products_of_several_formats_match_their_twin() {
    let mut random = Random::new("decode_linear of several");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        let pair = |pair: &[DType; 2]| (pair.map(DType::file_name).join("_"), pair.to_vec());
        let pairs = DType::TOGETHER.iter().map(pair);
        for (kernel, formats) in pairs.chain([("any".into(), DType::ALL.to_vec())]) {
            for round in 0..formats.len().max(6) {
                let mut any = || {
                    // Each of the first formats occurs.
                    let dtype = formats[(round + random.below(2)) % formats.len()];
                    (dtype, 1 + random.below(40))
                };
                let of = [any(), any(), any()];
                let (cols, split) = ([96, 256, 1100][round % 3], [1, 2, 4, 8][round % 4]);
                let (biased, adds) = (round % 2 == 0, round % 3 == 0);
                let kernel = kernel.as_str();
                let case = Linear { kernel, of: &of, cols, split, biased, adds };
                linear(&alone, team, &mut random, &case).unwrap();
            }
        }
    }
}

pub(super) fn gate_up(
    alone: &Alone<'_>,
    team: &str,
    random: &mut Random,
    (dtype, rows, cols): (DType, usize, usize),
    activation: Activation,
) -> Check {
    let matrices = [0, 1].map(|_| random.matrix(dtype, rows, cols));
    let (weights, begins) = planes(random, &matrices);
    let x = packed_vector(random, cols, 10.0);
    let mut want = vec![0; packed_words(rows)];
    let [gate, up] = [0, 1].map(|i| Matrix::new(&matrices[i].0, &matrices[i].1));
    decode_gate_up(&x, [gate, up], activation, &mut want);
    let of = [gate, up].map(|weight| products(Packed::new(&x), weight));
    let off = [0, 1].map(|i| slacks(&x, &matrices[i].0, &matrices[i].1, 32, 0));
    let slack = |i: usize| gated_slack((of[0][i], off[0][i]), (of[1][i], off[1][i]), activation);
    let slack: Vec<f64> = (0..rows).map(slack).collect();
    let piece = |i: usize| params::Pieces::of(&repack::Packed::of(&matrices[i].0), begins[i]);
    let p = params::GateUp {
        gate: piece(0),
        up: piece(1),
        rows: rows as u32,
        pieces: pieces(rows) as u32,
        activation: u32::from(activation == Activation::GeluTanh),
        ..params::GateUp::default()
    };
    let buffers = [x, weights, vec![0x7fc0_0000; want.len()]];
    let name = format!("decode_gate_up_{}_{team}", dtype.file_name());
    let got = alone.run(&name, 0, &p, &buffers, folded(pieces(rows) * 2));
    compare_packed(&got[2], &want, &slack, &format!("{name} {rows}x{cols} {activation:?}"))
}

#[test]
fn gate_and_up_match_their_twin_in_every_format() {
    let mut random = Random::new("decode_gate_up");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        for dtype in DType::ALL {
            for (rows, cols) in shapes(dtype) {
                for activation in [Activation::Silu, Activation::GeluTanh] {
                    gate_up(&alone, team, &mut random, (dtype, rows, cols), activation).unwrap();
                }
            }
        }
    }
}
