//! Compares the variants for many tokens with their twins, with tiles that rows and tokens do not
//! fill.

use std::sync::Arc;

use half::f16;

use super::experts::{EXPERTS, TinyMoe, VOCAB};
use super::{BOTH, Random, assert_close, backend, device, run};
use crate::backend::{Backend, Capacity, KvFormat, LogitRows, Ops, Step};
use crate::cpu::{
    CpuBackend,
    attention::Attention,
    attention_tile::attention_tile,
    expert_group::expert_group,
    halve::halve,
    kv_write::{Cache, kv_write},
    linear::linear,
    linear_coop::linear_coop,
    linear_tile::linear_tile,
    matrix::Matrix,
};
use crate::gpu::executor::GpuBackend;
use crate::gpu::{GpuDevice, Reduction};
use crate::graph::{Graph, Kv, KvId, MatrixSpec, Op};
use crate::kv;
use doppler_store::DType;

const CAPACITY: Capacity = Capacity { batch: 70, context: 200, kv: KvFormat::F32 };

/// Odd numbers of rows, below and above a tile's 64, and columns that are not a whole number of
/// blocks.
fn shapes(dtype: DType) -> [(usize, usize); 3] {
    match dtype.block_len() {
        256 => [(67, 512), (3, 256), (130, 300)],
        32 => [(67, 96), (3, 32), (130, 80)],
        _ => [(67, 33), (3, 7), (130, 256)],
    }
}

#[test]
fn linear_over_many_tokens_matches_its_twin_in_every_format() {
    let mut random = Random::new("linear batch");
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        for dtype in DType::ALL {
            if dtype.is_quantised() && device.cooperative() {
                println!("{dtype}: in the test of cooperative matrices");
                continue;
            }
            for ((rows, cols), biased) in shapes(dtype).into_iter().zip([false, true, true]) {
                let (spec, bytes) = random.matrix(dtype, rows, cols);
                let bias = random.floats(rows);
                let mut graph = Graph { vocab: 1, ..Graph::default() };
                let (x, out) = (graph.buffer("x", cols), graph.buffer("out", rows));
                let weight = graph.weight("w", rows, cols);
                let bias_id = graph.weight("b", 1, rows);
                graph.ops.push(Op::Linear { x, weight, bias: biased.then_some(bias_id), out });
                let bias_spec = MatrixSpec { dtype: DType::F32, rows: 1, cols: rows, offset: 0 };
                let bias_bytes: &[u8] = bytemuck::cast_slice(&bias);
                let weights = [(weight, spec, &bytes[..]), (bias_id, bias_spec, bias_bytes)];
                let mut gpu = backend(&device, &graph, CAPACITY, &weights);
                for tokens in [2, 3, 15, 16, 33, 64, 70] {
                    let input = random.floats(tokens * cols);
                    let mut want = vec![0.0; tokens * rows];
                    let matrix = Matrix::new(&spec, &bytes);
                    linear_tile(&input, matrix, biased.then_some(&bias[..]), &mut want);
                    let got = run(&mut gpu, &graph, tokens, 0, &[(x, &input)], out);
                    let what = format!("{dtype} {rows}x{cols} T={tokens} {reduction:?}");
                    assert_close(&got, &want, 3e-6, &what);
                }
            }
        }
    }
}

/// Logits are computed in ranges of rows, each from its own first row.
#[test]
fn logits_of_many_rows_match_their_twin_in_pieces() {
    let mut random = Random::new("logits batch");
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        let (rows, cols, tokens) = (77, 64, 61);
        let (spec, bytes) = random.matrix(DType::Q8_0, rows, cols);
        let mut graph = Graph { vocab: rows, ..Graph::default() };
        let x = graph.buffer("x", cols);
        let weight = graph.weight("w", rows, cols);
        graph.ops.push(Op::Logits { x, weight, bias: None, softcap: None });
        let mut gpu = backend(&device, &graph, CAPACITY, &[(weight, spec, &bytes)]);
        gpu.limit(u64::MAX, 23);
        let input = random.floats(tokens * cols);
        let mut want = vec![0.0; tokens * rows];
        linear_tile(&input, Matrix::new(&spec, &bytes), None, &mut want);
        let zeros = vec![0; tokens];
        gpu.begin(&Step { tokens: &zeros, position: 0, logits: LogitRows::All }).unwrap();
        gpu.set(x, &input);
        gpu.run(0..1).unwrap();
        assert_close(&gpu.logits().unwrap(), &want, 3e-6, &format!("{reduction:?}"));
    }
}

/// Enough pairs for a tile of every expert, in every format, in waves and chunks.
#[test]
fn experts_over_many_tokens_match_the_cpu_and_waves_change_no_bit() {
    let mut random = Random::new("experts batch");
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        for (i, inner) in DType::ALL.into_iter().enumerate() {
            let outer = DType::ALL[(i + 2) % DType::ALL.len()];
            let (hidden, ff) = if inner.block_len().max(outer.block_len()) == 256 {
                (256, 256)
            } else {
                (96, 160)
            };
            // Three consecutive roundings to 11 bits; without them, only f32 sums in another order.
            let halved = device.cooperative() && (inner.is_quantised() || outer.is_quantised());
            let tolerance = if halved { 3.0 / 2048.0 } else { 1e-5 };
            let tiny = TinyMoe::new(&mut random, hidden, ff, inner, outer);
            let graph = Arc::new(tiny.graph.clone());
            let mut cpu = CpuBackend::new(Arc::clone(&graph), CAPACITY);
            tiny.load(&mut cpu, EXPERTS);
            let mut gpu = GpuBackend::new(device.clone(), graph, CAPACITY).unwrap();
            let stride = gpu.slot_bytes(&tiny.layout);
            gpu.limit(stride * 3 + 16, 70);
            tiny.load(&mut gpu, EXPERTS);
            let tokens: Vec<u32> = (0..67).map(|_| random.below(VOCAB) as u32).collect();
            let want = tiny.step(&mut cpu, &tokens, EXPERTS);
            let got = tiny.step(&mut gpu, &tokens, EXPERTS);
            assert_close(&got, &want, tolerance, &format!("{inner}/{outer} {reduction:?}"));
            for slots in [2, 5] {
                let again = tiny.step(&mut gpu, &tokens, slots);
                assert_eq!(got, again, "{inner}/{outer} in waves of {slots}");
            }
        }
    }
}

#[test]
fn pairs_are_grouped_by_expert_as_their_twin_does() {
    let mut random = Random::new("expert_group");
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        let tiny = TinyMoe::new(&mut random, 32, 32, DType::F32, DType::F32);
        let mut gpu =
            GpuBackend::new(device.clone(), Arc::new(tiny.graph.clone()), CAPACITY).unwrap();
        tiny.load(&mut gpu, EXPERTS);
        for tokens in [61, 70] {
            let tokens: Vec<u32> = (0..tokens).map(|_| random.below(VOCAB) as u32).collect();
            tiny.begin(&mut gpu, &tokens);
            let ids = gpu.routing(super::experts::EXPERTS_OP).unwrap();
            let (order, tiles) = expert_group(&ids, 64);
            let (got_order, got_tiles) = gpu.grouped(ids.len());
            let used: Vec<_> =
                got_tiles.chunks(4).map(|t| (t[0], t[1], t[2])).filter(|t| t.2 > 0).collect();
            assert_eq!(used, tiles);
            assert!(got_tiles[tiles.len() * 4..].iter().all(|word| *word == 0));
            // The same pairs for each expert, in any order.
            let by_expert = |order: &[u32]| {
                let mut order = order.to_vec();
                order.sort_by_key(|pair| (ids[*pair as usize], *pair));
                order
            };
            let experts: Vec<u32> = got_order.iter().map(|pair| ids[*pair as usize]).collect();
            assert!(experts.is_sorted());
            assert_eq!(by_expert(&got_order), order);
        }
    }
}

#[test]
fn attention_over_many_tokens_matches_its_twin() {
    let mut random = Random::new("attention batch");
    let cases = [
        (4, 2, 16, None, None),
        (3, 3, 32, Some(7), Some(2.5)),
        (6, 2, 64, Some(70), None),
        (8, 1, 128, None, Some(30.0)),
        (7, 1, 36, Some(33), Some(0.5)),
        (2, 2, 100, None, None),
        (2, 1, 256, None, Some(5.0)),
    ];
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        for ((heads, kv_heads, head_dim, window, softcap), format) in
            cases.into_iter().flat_map(|case| [(case, KvFormat::F32), (case, KvFormat::F16)])
        {
            let scale = 1.3 / (head_dim as f32).sqrt();
            let mut graph = Graph { vocab: 1, ..Graph::default() };
            graph.kv.push(Kv { kv_heads, head_dim });
            let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
            let (q, out) = (graph.buffer("q", wide), graph.buffer("out", wide));
            let (k, v) = (graph.buffer("k", narrow), graph.buffer("v", narrow));
            let kv = KvId(0);
            graph.ops.push(Op::KvWrite { kv, k, v });
            graph.ops.push(Op::Attention {
                kv,
                q,
                out,
                heads,
                scale,
                window,
                softcap,
                causal: true,
            });
            let capacity = Capacity { kv: format, ..CAPACITY };
            let mut gpu = backend(&device, &graph, capacity, &[]);
            let blocks: Vec<u32> = (0..kv::blocks(capacity.context) as u32).rev().collect();
            gpu.set_blocks(&blocks);
            let mut cache = Cache::new(kv_heads, head_dim, blocks.len(), format);
            // Cooperative matrices may truncate sums instead of rounding them: 2^-22 for each of
            // some 60.
            let halves = device.pipelines().cooperative.is_some() && format == KvFormat::F16;
            let tolerance = if halves { 1.5e-5 } else { 5e-6 };
            let mut position = 0;
            for tokens in [33, 16, 1, 70, 31, 4] {
                let [qs, mut ks, mut vs] = [wide, narrow, narrow].map(|n| {
                    let mut values = random.floats(tokens * n);
                    values.iter_mut().for_each(|x| *x *= 3.0);
                    values
                });
                if format == KvFormat::F16 {
                    // Exact in half precision, because WGSL does not specify how it rounds.
                    ks.iter_mut().chain(&mut vs).for_each(|x| *x = f16::from_f32(*x).to_f32());
                }
                kv_write(&ks, &vs, position, &blocks, &mut cache);
                let mut want = vec![0.0; qs.len()];
                let (chunk, causal) = (None, true);
                let params = Attention { heads, scale, window, chunk, softcap, causal, position };
                attention_tile(&qs, &cache, &blocks, &params, &mut want);
                let inputs = [(q, &qs[..]), (k, &ks[..]), (v, &vs[..])];
                let got = run(&mut gpu, &graph, tokens, position, &inputs, out);
                let what = format!(
                    "{heads}/{kv_heads}x{head_dim} {window:?} {softcap:?} {format:?} T={tokens} at {position}"
                );
                assert_close(&got, &want, tolerance, &what);
                position += tokens;
            }
        }
    }
}

/// The test adapter, if it has cooperative matrices. Otherwise prints that it skips.
fn cooperative() -> Option<GpuDevice> {
    let device = device(Reduction::Group)?;
    if !device.cooperative() {
        println!("skipped: {} has no cooperative matrices of f16", device.describe());
        return None;
    }
    Some(device)
}

/// Compares with the twin, which rounds in the same way, and with exact products. An f16 has 11
/// bits, so a product of two has a relative error below 2^-10, and f32 sums add far less.
#[test]
fn cooperative_products_match_their_twin_and_stay_within_their_rounding() {
    let mut random = Random::new("linear_coop");
    let Some(device) = cooperative() else { return };
    println!("on {}", device.describe());
    for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantised()) {
        let block = dtype.block_len();
        for (rows, cols, batch) in [(67, 512, 70), (130, 768, 200), (3, 256, 64), (300, block, 33)]
        {
            let (spec, bytes) = random.matrix(dtype, rows, cols);
            let bias = random.floats(rows);
            let mut graph = Graph { vocab: 1, ..Graph::default() };
            let (x, out) = (graph.buffer("x", cols), graph.buffer("out", rows));
            let other = graph.buffer("other", rows);
            let weight = graph.weight("w", rows, cols);
            let bias_id = graph.weight("b", 1, rows);
            graph.ops.push(Op::Linear { x, weight, bias: Some(bias_id), out });
            // A second product uses the same halves.
            graph.ops.push(Op::Linear { x, weight, bias: None, out: other });
            let bias_spec = MatrixSpec { dtype: DType::F32, rows: 1, cols: rows, offset: 0 };
            let bias_bytes: &[u8] = bytemuck::cast_slice(&bias);
            let weights = [(weight, spec, &bytes[..]), (bias_id, bias_spec, bias_bytes)];
            let capacity = Capacity { batch, ..CAPACITY };
            let mut gpu = backend(&device, &graph, capacity, &weights);
            for tokens in [16, 19, 63, 64, 65, 70, 129, 200] {
                if tokens > batch {
                    continue;
                }
                let mut input = random.floats(tokens * cols);
                // Rows of every scale, beyond the range of f16.
                for (i, row) in input.chunks_exact_mut(cols).enumerate() {
                    let scale = (i as f32 % 61.0 - 30.0).exp2();
                    row.iter_mut().for_each(|x| *x *= scale);
                }
                let matrix = || Matrix::new(&spec, &bytes);
                let (mut twin, mut exact) = (vec![0.0; tokens * rows], vec![0.0; tokens * rows]);
                linear_coop(&input, matrix(), None, &mut twin);
                linear(&input, matrix(), None, &mut exact);
                let biased = run(&mut gpu, &graph, tokens, 0, &[(x, &input)], out);
                let got = gpu.get(other, tokens);
                let mut weights = vec![0.0; rows * cols];
                for (row, weights) in weights.chunks_exact_mut(cols).enumerate() {
                    matrix().unpack_row(row, weights);
                }
                for (i, got) in got.iter().enumerate() {
                    let (token, row) = (i / rows, i % rows);
                    let pairs = input[token * cols..][..cols].iter().zip(&weights[row * cols..]);
                    let magnitude: f32 = pairs.map(|(x, w)| (x * w).abs()).sum();
                    let what = format!("{dtype} {rows}x{cols} T={tokens} [{token}, {row}]");
                    let off = (got - exact[i]).abs();
                    assert!(off <= magnitude / 1000.0, "{what}: {got}, not {}", exact[i]);
                    // A weight that f32 rounds differently may become another f16.
                    let off = (got - twin[i]).abs();
                    assert!(off <= magnitude * 3e-5, "{what}: {got}, the twin has {}", twin[i]);
                    let off = (biased[i] - (got + bias[row])).abs();
                    assert!(off <= (got.abs() + 1.0) * 1e-6, "{what}: the bias");
                }
            }
        }
    }
}

#[test]
fn halved_rows_match_their_twin() {
    let mut random = Random::new("halve");
    let Some(device) = cooperative() else { return };
    let (rows, cols, tokens) = (64, 300, 40);
    let (spec, bytes) = random.matrix(DType::Q8_0, rows, cols);
    let mut graph = Graph { vocab: 1, ..Graph::default() };
    let (x, out) = (graph.buffer("x", cols), graph.buffer("out", rows));
    let weight = graph.weight("w", rows, cols);
    graph.ops.push(Op::Linear { x, weight, bias: None, out });
    let mut gpu = backend(&device, &graph, CAPACITY, &[(weight, spec, &bytes)]);
    let mut input = random.floats(tokens * cols);
    for (i, row) in input.chunks_exact_mut(cols).enumerate() {
        row.iter_mut().for_each(|x| *x *= (i as f32 * 5.0 - 90.0).exp2());
    }
    input[cols..2 * cols].fill(0.0);
    run(&mut gpu, &graph, tokens, 0, &[(x, &input)], out);
    let stride = cols.next_multiple_of(32);
    let (words, scales) = gpu.halved(tokens, tokens * stride / 2);
    let halves: Vec<f32> = words
        .iter()
        .flat_map(|word| [*word as u16, (*word >> 16) as u16])
        .map(|bits| f16::from_bits(bits).to_f32())
        .collect();
    for (token, row) in input.chunks_exact(cols).enumerate() {
        let (want, scale) = halve(row);
        assert_eq!(scales[token], scale);
        for (got, want) in halves[token * stride..].iter().zip(&want) {
            // WGSL does not specify how it rounds.
            let off = (got - want.to_f32()).abs();
            assert!(off <= want.to_f32().abs() / 1024.0 + 6.2e-5, "[{token}]: {got}, not {want}");
        }
        assert!(halves[token * stride + cols..][..stride - cols].iter().all(|x| *x == 0.0));
    }
}
