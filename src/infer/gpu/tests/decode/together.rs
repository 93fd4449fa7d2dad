//! Kernels for rows of several sequences: each row has the bits that the kernel for one token gives
//! it, which has been compared with its twin.

use half::f16;

use super::products::planes;
use super::{
    EPS, any_matrix, compare, compare_packed, floats, gated_slack, halves, packed_vector, shapes,
};
use super::{slacks, words};
use crate::cpu::decode_attention::Splits;
use crate::cpu::decode_linear::Segment;
use crate::cpu::matrix::Matrix;
use crate::cpu::pack::{Packed, packed_words, pieces, products};
use crate::cpu::rows_gate_up::rows_gate_up;
use crate::cpu::rows_linear::rows_linear;
use crate::gpu::Reduction;
use crate::gpu::buffers::stride;
use crate::gpu::decode::params;
use crate::gpu::params::Steps;
use crate::gpu::repack;
use crate::gpu::tests::alone::Alone;
use crate::gpu::tests::{Random, device};
use crate::graph::Activation;
use crate::kv::BLOCK;
use doppler_store::DType;

/// The most rows of a group, for each kernel for products.
const MOST: [usize; 2] = [4, 8];

fn steps(positions: &[usize], lists: &[usize]) -> Steps {
    let mut steps = Steps { tokens: positions.len() as u32, ..Steps::default() };
    for (i, (position, list)) in positions.iter().zip(lists).enumerate() {
        steps.rows[i / 2][i % 2 * 2] = *position as u32;
        steps.rows[i / 2][i % 2 * 2 + 1] = *list as u32;
    }
    steps
}

/// Segments of matrices one after the other, of which a workgroup sums `each` rows.
fn segments(
    of: &[(DType, usize)],
    cols: usize,
    begins: &[usize],
    each: usize,
) -> ([params::Segment; 3], u32) {
    let mut segments = [params::Segment { end: u32::MAX, ..params::Segment::default() }; 3];
    let (mut end, mut at) = (0, 3);
    for (i, (dtype, rows)) in of.iter().enumerate() {
        let spec = crate::graph::MatrixSpec { dtype: *dtype, rows: *rows, cols, offset: 0 };
        let m = params::Pieces::of(&repack::Packed::of(&spec), begins[i]);
        end += rows.div_ceil(each) as u32;
        let (rows, result_at) = (*rows as u32, at);
        at += rows;
        let params::Pieces { base, blocks, row_blocks, pieces, format } = m;
        segments[i] =
            params::Segment { base, blocks, row_blocks, pieces, format, rows, result_at, end };
    }
    (segments, end)
}

// Long: one shape, with all of its bindings.
fn linear(
    alone: &Alone<'_>,
    team: &str,
    random: &mut Random,
    kernel: &str,
    of: &[(DType, usize)],
    cols: usize,
) {
    let matrices: Vec<_> =
        of.iter().map(|(dtype, rows)| any_matrix(random, *dtype, *rows, cols)).collect();
    let (weights, begins) = planes(random, &matrices);
    let split = [1, 2, 4, 8][random.below(4)];
    let most = MOST[random.below(2)];
    let count = 1 + random.below(2 * most);
    let wide = of.iter().map(|(_, rows)| rows).sum::<usize>() + 5;
    let (has_bias, adds) = (random.below(2) as u32, random.below(2) as u32);
    let xs: Vec<Vec<u32>> = (0..count).map(|_| packed_vector(random, cols, 2.0)).collect();
    let bias = words(&random.floats(wide));
    let befores: Vec<Vec<u32>> = (0..count + 1).map(|_| words(&random.floats(wide))).collect();
    let (segs, end) = segments(of, cols, &begins, 32 / split);
    let p = params::RowsLinear {
        segments: segs,
        split: split as u32,
        has_bias,
        adds,
        x_stride: (packed_words(cols) / 4) as u32,
        result_stride: wide as u32,
    };
    let name = format!("rows_linear_{kernel}_{most}_{team}");
    let grid = |end: u32| (end * count.div_ceil(most) as u32, 1);
    let buffers = [xs.concat(), weights.clone(), bias.clone(), befores.concat()];
    let got =
        alone.run_steps(&name, &steps(&vec![0; count], &vec![0; count]), &p, &buffers, grid(end));
    let mut at = 3;
    let twins: Vec<Segment<'_>> = matrices
        .iter()
        .map(|(spec, stored)| {
            let result_at = at;
            at += spec.rows;
            Segment { weight: Matrix::new(spec, stored), result_at }
        })
        .collect();
    let mut wants: Vec<Vec<f32>> = befores[..count].iter().map(|row| floats(row)).collect();
    let mut pairs: Vec<(&[u32], &mut [f32])> =
        xs.iter().zip(&mut wants).map(|(x, want)| (&x[..], &mut want[..])).collect();
    let biases = floats(&bias);
    rows_linear(&mut pairs, &twins, (has_bias == 1).then_some(&biases[..]), adds == 1);
    let (segs, end) = segments(of, cols, &begins, 8 / split);
    let p = params::Linear { segments: segs, split: split as u32, has_bias, adds };
    let one = format!("decode_linear_{kernel}_{team}");
    for (row, x) in xs.iter().enumerate() {
        let buffers = [x.clone(), weights.clone(), bias.clone(), befores[row].clone()];
        let want = alone.run(&one, 0, &p, &buffers, (end, 1));
        let got = &got[3][row * wide..][..wide];
        assert_eq!(
            floats(got),
            floats(&want[3]),
            "{name} {of:?} x {cols} by {split}: row {row} of {count}"
        );
        assert_eq!(got, want[3], "{name}");
    }
    assert_eq!(got[3][count * wide..], befores[count], "{name}: behind the last row");
    for (row, want) in wants.iter().enumerate() {
        let before = floats(&befores[row]);
        let mut slack = vec![0.0; wide];
        let mut at = 3;
        for (spec, stored) in &matrices {
            for (i, product) in (at..).zip(slacks(&xs[row], spec, stored, 32 * split, 2)) {
                let added = biases[i].abs() + before[i].abs();
                slack[i] = product + 2.0 * EPS * f64::from(added);
            }
            at += spec.rows;
        }
        let got = floats(&got[3][row * wide..][..wide]);
        compare(&got, want, &slack, &format!("{name}: row {row}")).unwrap();
    }
}

#[test]
fn products_of_rows_have_the_bits_of_each_alone() {
    let mut random = Random::new("rows_linear");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        for dtype in DType::ALL {
            for (i, (rows, cols)) in shapes(dtype).into_iter().enumerate() {
                let three = [(dtype, rows), (dtype, 9), (dtype, 1 + random.below(20))];
                linear(&alone, team, &mut random, dtype.file_name(), &three[..[3, 1, 2][i]], cols);
            }
        }
        for pair in DType::TOGETHER {
            let kernel = pair.map(DType::file_name).join("_");
            let of = [pair[0], pair[1], pair[random.below(2)]];
            let of = of.map(|dtype| (dtype, 1 + random.below(40)));
            linear(&alone, team, &mut random, &kernel, &of, 1024);
        }
    }
}

#[test]
fn gates_and_ups_of_rows_have_the_bits_of_each_alone() {
    let mut random = Random::new("rows_gate_up");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        for dtype in DType::ALL {
            for (rows, cols) in shapes(dtype) {
                let matrices = [0, 1].map(|_| random.matrix(dtype, rows, cols));
                let (weights, begins) = planes(&mut random, &matrices);
                let most = MOST[random.below(2)];
                let count = 1 + random.below(2 * most);
                let xs: Vec<Vec<u32>> =
                    (0..count).map(|_| packed_vector(&mut random, cols, 10.0)).collect();
                let piece =
                    |i: usize| params::Pieces::of(&repack::Packed::of(&matrices[i].0), begins[i]);
                let (wide, groups) = (packed_words(rows), pieces(rows) as u32 * 2);
                let p = params::RowsGateUp {
                    gate: piece(0),
                    up: piece(1),
                    rows: rows as u32,
                    pieces: pieces(rows) as u32,
                    x_stride: (packed_words(cols) / 4) as u32,
                    ..params::RowsGateUp::default()
                };
                let name = format!("rows_gate_up_{}_{most}_{team}", dtype.file_name());
                let buffers = [xs.concat(), weights.clone(), vec![0x7fc0_0000; wide * (count + 1)]];
                let at = steps(&vec![0; count], &vec![0; count]);
                let grid = (groups * count.div_ceil(most) as u32, 1);
                let got = alone.run_steps(&name, &at, &p, &buffers, grid);
                let p = params::GateUp {
                    gate: piece(0),
                    up: piece(1),
                    rows: rows as u32,
                    pieces: pieces(rows) as u32,
                    ..params::GateUp::default()
                };
                let one = format!("decode_gate_up_{}_{team}", dtype.file_name());
                for (row, x) in xs.iter().enumerate() {
                    let buffers = [x.clone(), weights.clone(), vec![0x7fc0_0000; wide]];
                    let want = alone.run(&one, 0, &p, &buffers, (groups, 1));
                    assert_eq!(
                        got[2][row * wide..][..wide],
                        want[2],
                        "{name}: row {row} of {count}"
                    );
                }
                let mut wants = vec![vec![0; wide]; count];
                let mut pairs: Vec<(&[u32], &mut [u32])> =
                    xs.iter().zip(&mut wants).map(|(x, want)| (&x[..], &mut want[..])).collect();
                let both = [0, 1].map(|i| Matrix::new(&matrices[i].0, &matrices[i].1));
                rows_gate_up(&mut pairs, both, Activation::Silu);
                for (row, want) in wants.iter().enumerate() {
                    let x = &xs[row];
                    let of = both.map(|weight| products(Packed::new(x), weight));
                    let off = [0, 1].map(|i| slacks(x, &matrices[i].0, &matrices[i].1, 32, 0));
                    let slack = |i: usize| {
                        let (gate, up) = ((of[0][i], off[0][i]), (of[1][i], off[1][i]));
                        gated_slack(gate, up, Activation::Silu)
                    };
                    let slack: Vec<f64> = (0..rows).map(slack).collect();
                    let got = &got[2][row * wide..][..wide];
                    compare_packed(got, want, &slack, &format!("{name}: row {row}")).unwrap();
                }
                let behind = &got[2][count * wide..];
                assert!(
                    behind.iter().all(|word| *word == 0x7fc0_0000),
                    "{name}: behind the last row"
                );
            }
        }
    }
}

/// Norms and conversions, whose grids have the rows in y.
#[test]
fn norms_of_rows_have_the_bits_of_each_alone() {
    let mut random = Random::new("norms of rows");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        for cols in [7, 64, 1000, 1025, 2050] {
            let (count, wide, packed) = (1 + random.below(16), stride(cols), packed_words(cols));
            let mut rows = |count: usize| -> Vec<Vec<u32>> {
                let row = |random: &mut Random| {
                    let mut row = words(&random.floats(cols));
                    row.resize(wide, 0);
                    row
                };
                (0..count).map(|_| row(&mut random)).collect()
            };
            let (xs, ys, weight, bias) = (rows(count), rows(count), rows(1), rows(1));
            let (cols, pieces, eps) = (cols as u32, pieces(cols) as u32, 0.1);
            let grid = |rows: usize| (pieces.div_ceil(32), rows as u32);
            let blank = |rows: usize| vec![0; packed * rows];
            let check = |name: &str, got: &[u32], want: &[Vec<u32>]| {
                assert_eq!(got, want.concat(), "{name} of {cols}, {count} rows");
            };
            let norm = params::Norm { cols, pieces, eps };
            let name = format!("decode_norm_{team}");
            let run = |x: &[u32], rows| {
                let buffers = [x.to_vec(), weight[0].clone(), blank(rows)];
                alone.run(&name, 0, &norm, &buffers, grid(rows)).swap_remove(2)
            };
            let normed: Vec<_> = xs.iter().map(|x| run(x, 1)).collect();
            check(&name, &run(&xs.concat(), count), &normed);
            let layer = params::LayerNorm { cols, pieces, eps, has_bias: 1 };
            let name = format!("decode_layer_norm_{team}");
            let run = |x: &[u32], rows| {
                let buffers = [x.to_vec(), weight[0].clone(), bias[0].clone(), blank(rows)];
                alone.run(&name, 0, &layer, &buffers, grid(rows)).swap_remove(3)
            };
            check(
                &name,
                &run(&xs.concat(), count),
                &xs.iter().map(|x| run(x, 1)).collect::<Vec<_>>(),
            );
            let add = params::NormAdd { cols, eps };
            let name = format!("decode_norm_add_{team}");
            let run = |y: &[u32], x: &[u32], rows: usize| {
                let buffers = [y.to_vec(), weight[0].clone(), x.to_vec()];
                let grid = (cols.div_ceil(1024), rows as u32);
                alone.run(&name, 0, &add, &buffers, grid).swap_remove(2)
            };
            let want: Vec<_> = ys.iter().zip(&xs).map(|(y, x)| run(y, x, 1)).collect();
            check(&name, &run(&ys.concat(), &xs.concat(), count), &want);
            let pack = params::Pack { cols, pieces };
            let run = |x: &[u32], rows| {
                alone
                    .run("decode_pack", 0, &pack, &[x.to_vec(), blank(rows)], grid(rows))
                    .swap_remove(1)
            };
            check(
                "decode_pack",
                &run(&xs.concat(), count),
                &xs.iter().map(|x| run(x, 1)).collect::<Vec<_>>(),
            );
            let unpacked = vec![0; wide * count];
            let got = alone.run(
                "decode_unpack",
                0,
                &pack,
                &[run(&xs.concat(), count), unpacked],
                grid(count),
            );
            check("decode_unpack", &got[1], &xs);
        }
    }
}

// Long: one shape, with all of its bindings.
/// Attention over caches that the rows' sequences share, and its combination.
#[test]
fn attention_of_rows_has_the_bits_of_each_alone() {
    let mut random = Random::new("attention of rows");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        for (heads, kv_heads, dim, window) in [(4, 2, 64, 0), (7, 1, 136, 90), (8, 8, 16, 0)] {
            let count = 2 + random.below(15);
            let positions: Vec<usize> = (0..count).map(|_| random.below(500)).collect();
            // A list has two words more. Blocks are dealt out in turn, in no sequence's order.
            let (list, splits_max, pairs) = (500 / BLOCK + 4, 3, dim / 2 - 1);
            let lists: Vec<usize> = (0..count).map(|row| row * list).collect();
            let blocks: Vec<u32> =
                (0..count * list).map(|i| (i * 7 % (count * list)) as u32).collect();
            let blocks = if (count * list).is_multiple_of(7) {
                (0..(count * list) as u32).rev().collect()
            } else {
                blocks
            };
            let cache = (count * list) * BLOCK * kv_heads * dim;
            let [keys, values] = [0; 2].map(|_| {
                bytemuck::pod_collect_to_vec::<f16, u32>(&halves(&mut random, cache, 2.0))
            });
            let rope = words(&random.floats(502 * pairs * 2));
            let qkv_words = (heads + 2 * kv_heads) * dim;
            let qkvs: Vec<Vec<u32>> =
                (0..count).map(|_| words(&random.floats(qkv_words))).collect();
            let norms = [0; 2].map(|_| words(&random.floats(dim)));
            let p = params::Attention {
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                head_dim: dim as u32,
                pairs: pairs as u32,
                window,
                splits_max,
                normed: 1,
                eps: 0.1,
                scale: 0.2,
                softcap: 0.0,
            };
            let partial = heads * (dim + 4) * splits_max as usize;
            let seen = (window > 0).then_some(window as usize);
            let splits = |position| Splits::of(position, seen, splits_max as usize).count;
            let each = kv_heads * (heads / kv_heads).div_ceil(4);
            let most = positions.iter().map(|p| splits(*p)).max().unwrap();
            let table = [&[0][..], &blocks].concat();
            let [q_norm, k_norm] = norms;
            let buffers = |qkv: Vec<u32>,
                           keys: &[u32],
                           values: &[u32],
                           table: Vec<u32>,
                           rows: usize| {
                let (q, k, rope) = (q_norm.clone(), k_norm.clone(), rope.clone());
                [qkv, q, k, rope, keys.to_vec(), values.to_vec(), vec![0; partial * rows], table]
            };
            let name = format!("decode_attention_together_{team}");
            let at = steps(&positions, &lists);
            let given = buffers(qkvs.concat(), &keys, &values, table, count);
            let got = alone.run_steps(&name, &at, &p, &given, ((each * most) as u32, count as u32));
            let combine = params::Combine {
                heads: heads as u32,
                head_dim: dim as u32,
                window,
                splits_max,
                pieces: pieces(heads * dim) as u32,
            };
            let packed = packed_words(heads * dim);
            let groups = (heads * dim).div_ceil(64) as u32;
            let given = [got[6].clone(), vec![0; packed * count]];
            let together = alone.run_steps(
                "decode_combine_together",
                &at,
                &combine,
                &given,
                (groups, count as u32),
            );
            let (mut keys, mut values) = (keys, values);
            for row in 0..count {
                let what = format!("{name} {heads} {kv_heads} {dim}: row {row} of {count}");
                let table = [&[0][..], &blocks[lists[row]..][..list]].concat();
                let given = buffers(qkvs[row].clone(), &keys, &values, table, 1);
                let grid = ((each * splits(positions[row])) as u32, 1);
                let one = format!("decode_attention_{team}");
                let want = alone.run(&one, positions[row], &p, &given, grid);
                assert_eq!(got[6][row * partial..][..partial], want[6], "{what}");
                let given = [want[6].clone(), vec![0; packed]];
                let combined =
                    alone.run("decode_combine", positions[row], &combine, &given, (groups, 1));
                assert_eq!(together[1][row * packed..][..packed], combined[1], "{what}, combined");
                (keys, values) = (want[4].clone(), want[5].clone());
            }
            assert!(got[4] == keys && got[5] == values, "{name}: the caches");
        }
    }
}
