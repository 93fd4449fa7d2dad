//! Compares each trunk kernel, as a graph of one op, with its CPU twin: odd shapes, one token and
//! five.

use half::f16;

use super::{BOTH, Random, assert_close, backend, device, run};
use crate::backend::{Backend, Capacity, KvFormat, Ops};
use crate::cpu::{
    add::add,
    attention::{Attention, attention},
    embed::embed,
    gated::gated,
    kv_write::{Cache, kv_write},
    linear::linear,
    matrix::Matrix,
    rms_norm::rms_norm,
    rope::{Angles, rope},
    route::route,
};
use crate::gpu::Reduction;
use crate::graph::{
    Activation, ExpertTensors, Graph, Kv, KvId, MatrixSpec, Moe, MoeId, Op, Rope, RopeId, Scoring,
};
use doppler_store::DType;

const CAPACITY: Capacity = Capacity { batch: 5, context: 200, kv: KvFormat::F32 };

/// Odd numbers of rows, and columns that are not always a whole number of blocks.
fn shapes(dtype: DType) -> [(usize, usize); 3] {
    match dtype.block_len() {
        256 => [(67, 768), (3, 256), (130, 300)],
        32 => [(67, 96), (3, 32), (130, 80)],
        _ => [(67, 33), (3, 7), (130, 256)],
    }
}

#[test]
fn linear_matches_its_twin_in_every_format() {
    let mut random = Random::new("linear");
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        for dtype in DType::ALL {
            for ((rows, cols), biased) in shapes(dtype).into_iter().zip([false, true, true]) {
                let (spec, bytes) = random.matrix(dtype, rows, cols);
                let bias = random.floats(rows);
                let mut graph = Graph { vocab: 1, ..Graph::default() };
                let (x, out) = (graph.buffer("x", cols), graph.buffer("out", rows));
                let weight = graph.weight("w", rows, cols);
                let bias_id = graph.weight("b", 1, rows);
                graph.ops.push(Op::Linear { x, weight, bias: biased.then_some(bias_id), out });
                let bias_spec =
                    crate::graph::MatrixSpec { dtype: DType::F32, rows: 1, cols: rows, offset: 0 };
                let bias_bytes: &[u8] = bytemuck::cast_slice(&bias);
                let weights = [(weight, spec, &bytes[..]), (bias_id, bias_spec, bias_bytes)];
                let mut gpu = backend(&device, &graph, CAPACITY, &weights);
                for tokens in [1, 5] {
                    let input = random.floats(tokens * cols);
                    let mut want = vec![0.0; tokens * rows];
                    let matrix = Matrix::new(&spec, &bytes);
                    linear(&input, matrix, biased.then_some(&bias[..]), &mut want);
                    let got = run(&mut gpu, &graph, tokens, 0, &[(x, &input)], out);
                    let what = format!("{dtype} {rows}x{cols} T={tokens} {reduction:?}");
                    assert_close(&got, &want, 3e-6, &what);
                }
            }
        }
    }
}

#[test]
fn random_blocks_decode_exactly() {
    let mut random = Random::new("blocks");
    let Some(device) = device(Reduction::Lane) else { return };
    for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantised()) {
        let (rows, cols) = (9, dtype.block_len());
        let (spec, bytes) = random.blocks(dtype, rows, cols);
        let mut graph = Graph { vocab: rows, ..Graph::default() };
        let out = graph.buffer("out", cols);
        let table = graph.weight("w", rows, cols);
        graph.ops.push(Op::Embed { table, out, scale: 1.0 });
        let capacity = Capacity { batch: rows, context: rows, kv: KvFormat::F32 };
        let mut gpu = backend(&device, &graph, capacity, &[(table, spec, &bytes)]);
        let tokens: Vec<u32> = (0..rows as u32).collect();
        let step = crate::backend::Step {
            tokens: &tokens,
            position: 0,
            logits: crate::backend::LogitRows::None,
        };
        gpu.begin(&step).unwrap();
        gpu.run(0..1).unwrap();
        let got = gpu.get(out, rows);
        let mut want = vec![0.0; rows * cols];
        embed(&tokens, Matrix::new(&spec, &bytes), 1.0, &mut want);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let off = (got - want).abs();
            assert!(off <= want.abs() * 1e-6 + 1e-9, "{dtype} [{i}]: {got}, not {want}");
        }
        assert!(want[..cols].iter().any(|v| *v != 0.0), "{dtype}: subnormal scales are not zero");
    }
}

#[test]
fn embed_matches_its_twin_in_every_format() {
    use crate::backend::{LogitRows, Step};
    let mut random = Random::new("embed");
    let Some(device) = device(Reduction::Lane) else { return };
    for dtype in DType::ALL {
        for (rows, cols) in shapes(dtype) {
            let (spec, bytes) = random.matrix(dtype, rows, cols);
            let mut graph = Graph { vocab: rows, ..Graph::default() };
            let out = graph.buffer("out", cols);
            let table = graph.weight("w", rows, cols);
            graph.ops.push(Op::Embed { table, out, scale: 1.25 });
            let mut gpu = backend(&device, &graph, CAPACITY, &[(table, spec, &bytes)]);
            let tokens: Vec<u32> = (0..5).map(|_| random.below(rows) as u32).collect();
            let mut want = vec![0.0; 5 * cols];
            embed(&tokens, Matrix::new(&spec, &bytes), 1.25, &mut want);
            let step = Step { tokens: &tokens, position: 0, logits: LogitRows::None };
            gpu.begin(&step).unwrap();
            gpu.run(0..1).unwrap();
            assert_close(&gpu.get(out, 5), &want, 1e-6, &format!("{dtype} {rows}x{cols}"));
        }
    }
}

#[test]
fn rms_norm_matches_its_twin_whole_rows_and_heads_in_place_and_not() {
    let mut random = Random::new("rms_norm");
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        for (width, cols) in [(100, 100), (96, 32), (259, 37)] {
            for in_place in [false, true] {
                let mut graph = Graph { vocab: 1, ..Graph::default() };
                let x = graph.buffer("x", width);
                let out = if in_place { x } else { graph.buffer("out", width) };
                let weight = graph.weight("w", 1, cols);
                graph.ops.push(Op::RmsNorm { x, weight, out, eps: 1e-5 });
                let (spec, bytes) = random.matrix(DType::Bf16, 1, cols);
                let mut gpu = backend(&device, &graph, CAPACITY, &[(weight, spec, &bytes)]);
                let mut scales = vec![0.0; cols];
                Matrix::new(&spec, &bytes).unpack_row(0, &mut scales);
                for tokens in [1, 5] {
                    let input = random.floats(tokens * width);
                    let mut want = input.clone();
                    rms_norm(&mut want, &scales, 1e-5);
                    let got = run(&mut gpu, &graph, tokens, 0, &[(x, &input)], out);
                    assert_close(&got, &want, 2e-6, &format!("{width}/{cols} {in_place}"));
                }
            }
        }
    }
}

#[test]
fn rope_matches_its_twin_at_far_positions_and_for_part_of_a_head() {
    let mut random = Random::new("rope");
    let Some(device) = device(Reduction::Lane) else { return };
    for (heads, head_dim, half) in [(3, 16, 8), (1, 128, 64), (5, 32, 8)] {
        let inv_freq = (0..half).map(|i| 1e4f32.powf(-(i as f32) / half as f32)).collect();
        let turning = Rope { inv_freq, attention_factor: 1.1, long: None };
        let mut graph = Graph { vocab: 1, ropes: vec![turning.clone()], ..Graph::default() };
        let x = graph.buffer("x", heads * head_dim);
        graph.ops.push(Op::Rope { x, heads, head_dim, rope: RopeId(0) });
        let capacity = Capacity { batch: 5, context: 5000, kv: KvFormat::F32 };
        let mut gpu = backend(&device, &graph, capacity, &[]);
        for (tokens, position) in [(1, 0), (5, 3), (5, 4995)] {
            let input = random.floats(tokens * heads * head_dim);
            let mut want = input.clone();
            let angles = Angles::new(&turning, false, position..position + tokens);
            rope(&mut want, heads, head_dim, half, &angles);
            let got = run(&mut gpu, &graph, tokens, position, &[(x, &input)], x);
            assert_close(&got, &want, 1e-6, &format!("{heads}x{head_dim}/{half} at {position}"));
        }
    }
}

#[test]
fn attention_and_its_cache_match_their_twins() {
    let mut random = Random::new("attention");
    let Some(device) = device(Reduction::Lane) else { return };
    let cases = [
        (4, 2, 16, None, None),
        (3, 3, 32, Some(7), Some(2.5)),
        (6, 2, 64, Some(70), None),
        (2, 1, 128, None, Some(30.0)),
        (5, 1, 36, None, Some(0.5)),
        (2, 1, 256, None, None),
        (4, 2, 512, None, None),
        (2, 2, 316, Some(40), None),
    ];
    for ((heads, kv_heads, head_dim, window, softcap), format) in
        cases.into_iter().flat_map(|case| [(case, KvFormat::F32), (case, KvFormat::F16)])
    {
        let capacity = Capacity { kv: format, ..CAPACITY };
        let scale = 1.3 / (head_dim as f32).sqrt();
        let mut graph = Graph { vocab: 1, ..Graph::default() };
        graph.kv.push(Kv { kv_heads, head_dim });
        let (q, out) = (graph.buffer("q", heads * head_dim), graph.buffer("out", heads * head_dim));
        let (k, v) =
            (graph.buffer("k", kv_heads * head_dim), graph.buffer("v", kv_heads * head_dim));
        let kv = KvId(0);
        graph.ops.push(Op::KvWrite { kv, k, v });
        graph.ops.push(Op::Attention { kv, q, out, heads, scale, window, softcap, causal: true });
        let mut gpu = backend(&device, &graph, capacity, &[]);
        let blocks = [2, 0, 3, 1];
        gpu.set_blocks(&blocks);
        let mut cache = Cache::new(kv_heads, head_dim, blocks.len(), format);
        let mut position = 0;
        // Beyond several tiles of 64 positions.
        while position < 150 {
            let tokens = if position % 4 == 0 { 5 } else { 1 };
            let [qs, ks, vs] = [heads, kv_heads, kv_heads]
                .map(|n| random.floats(tokens * n * head_dim).iter().map(|v| v * 3.0).collect());
            let (qs, mut ks, mut vs): (Vec<f32>, Vec<f32>, Vec<f32>) = (qs, ks, vs);
            if format == KvFormat::F16 {
                // Exact in half precision, because WGSL does not specify how it rounds.
                ks.iter_mut().chain(&mut vs).for_each(|x| *x = f16::from_f32(*x).to_f32());
            }
            kv_write(&ks, &vs, position, &blocks, &mut cache);
            let mut want = vec![0.0; qs.len()];
            let (chunk, causal) = (None, true);
            let params = Attention { heads, scale, window, chunk, softcap, causal, position };
            attention(&qs, &cache, &blocks, &params, &mut want);
            let inputs = [(q, &qs[..]), (k, &ks[..]), (v, &vs[..])];
            let got = run(&mut gpu, &graph, tokens, position, &inputs, out);
            let what = format!(
                "{heads}/{kv_heads}x{head_dim} {window:?} {softcap:?} {format:?} T={tokens} at {position}"
            );
            assert_close(&got, &want, 5e-6, &what);
            position += tokens;
        }
    }
}

#[test]
fn a_half_precision_cache_holds_the_nearest_finite_values() {
    let mut random = Random::new("kv_write");
    let Some(device) = device(Reduction::Lane) else { return };
    let (kv_heads, head_dim, tokens, position) = (3, 12, 5, 7);
    let width = kv_heads * head_dim;
    let mut graph = Graph { vocab: 1, ..Graph::default() };
    graph.kv.push(Kv { kv_heads, head_dim });
    let (k, v) = (graph.buffer("k", width), graph.buffer("v", width));
    graph.ops.push(Op::KvWrite { kv: KvId(0), k, v });
    let capacity = Capacity { kv: KvFormat::F16, ..CAPACITY };
    let mut gpu = backend(&device, &graph, capacity, &[]);
    let mut ks: Vec<f32> = random.floats(tokens * width);
    // Every scale of an f16, and beyond its range on both sides.
    ks.iter_mut().enumerate().for_each(|(i, x)| *x *= (i as f32 % 33.0 - 16.0).exp2());
    (ks[3], ks[8]) = (1e9, -70000.0);
    let vs: Vec<f32> = ks.iter().rev().copied().collect();
    run(&mut gpu, &graph, tokens, position, &[(k, &ks), (v, &vs)], k);
    let mut cache = Cache::new(kv_heads, head_dim, 1, KvFormat::F16);
    let clamped = kv_write(&ks, &vs, position, &[0], &mut cache);
    let beyond = ks.iter().chain(&vs).filter(|x| x.abs() > 65504.0).count();
    assert!(beyond >= 4);
    assert_eq!((clamped, gpu.clamped_now()), (beyond as u64, beyond as u32));
    let (keys, values) = gpu.cached(KvId(0), (position + tokens) * width / 2);
    for (from, words, twin) in [(&ks, keys, &cache.k), (&vs, values, &cache.v)] {
        let halves: Vec<f32> = words
            .iter()
            .flat_map(|word| [*word as u16, (*word >> 16) as u16])
            .map(|bits| f16::from_bits(bits).to_f32())
            .collect();
        assert!(halves[..position * width].iter().all(|x| *x == 0.0), "earlier positions");
        for (i, (got, exact)) in halves[position * width..].iter().zip(from).enumerate() {
            let nearest = exact.clamp(-65504.0, 65504.0);
            // One unit in the last place of 11 bits, or a flushed subnormal.
            let off = (got - nearest).abs();
            assert!(off <= nearest.abs() / 1024.0 + 6.2e-5, "[{i}]: {got} for {exact}");
            let (token, head, d) = (i / width, i % width / head_dim, i % head_dim);
            let at = cache.at(&[0], head, position + token) + d;
            assert!(
                (twin[at] - nearest).abs() <= nearest.abs() / 2048.0 + 3e-8,
                "the twin's [{i}]"
            );
        }
    }
}

#[test]
fn gated_and_add_match_their_twins_in_every_place() {
    let mut random = Random::new("gated");
    let Some(device) = device(Reduction::Lane) else { return };
    for activation in [Activation::Silu, Activation::GeluTanh] {
        for place in 0..3 {
            let width = 77;
            let mut graph = Graph { vocab: 1, ..Graph::default() };
            let (gate, up) = (graph.buffer("gate", width), graph.buffer("up", width));
            let out = [gate, up, graph.buffer("out", width)][place];
            graph.ops.push(Op::Gated { gate, up, out, activation });
            graph.ops.push(Op::Add { x: out, y: if place == 1 { gate } else { up } });
            let mut gpu = backend(&device, &graph, CAPACITY, &[]);
            for tokens in [1, 5] {
                let mut gates = random.floats(tokens * width);
                gates.iter_mut().for_each(|v| *v *= 30.0);
                let ups = random.floats(tokens * width);
                let mut want = gates.clone();
                gated(&mut want, &ups, activation);
                add(&mut want, if place == 1 { &gates } else { &ups });
                let inputs = [(gate, &gates[..]), (up, &ups[..])];
                let got = run(&mut gpu, &graph, tokens, 0, &inputs, out);
                assert_close(&got, &want, 2e-6, &format!("{activation:?} place {place}"));
            }
        }
    }
}

// Long: the same checks for each kind of routing.
#[test]
fn route_matches_its_twin_and_breaks_ties_by_id() {
    let mut random = Random::new("route");
    let Some(device) = device(Reduction::Lane) else { return };
    let softmax = |renormalise| Scoring::Softmax { renormalise };
    let sigmoid = |renormalise, scale| Scoring::Sigmoid { renormalise, scale };
    let grouped = |groups, kept| Scoring::Grouped { renormalise: true, scale: 2.5, groups, kept };
    for (experts, top_k, scoring, biased) in [
        (8, 2, softmax(true), false),
        (61, 8, softmax(false), false),
        (5, 5, softmax(true), false),
        (1, 1, softmax(true), false),
        (61, 8, sigmoid(true, 2.5), true),
        (9, 3, sigmoid(false, 1.0), false),
        (64, 6, softmax(true), true),
        (13, 4, softmax(false), true),
        (13, 4, Scoring::Scaled, true),
        (12, 3, grouped(4, 2), true),
        (64, 8, grouped(8, 4), true),
        (64, 8, grouped(32, 4), true),
        (6, 6, grouped(3, 1), true),
        (8, 2, Scoring::Mixer { jitter: 0.2 }, false),
        (37, 2, Scoring::Mixer { jitter: 0.01 }, false),
    ] {
        let mut graph = Graph { vocab: 1, ..Graph::default() };
        let x = graph.buffer("x", 32);
        let logits = graph.buffer("logits", experts);
        graph.moe.push(Moe {
            layer: 0,
            top_k,
            hidden: 32,
            ff: 32,
            activation: Activation::Silu,
            biases: None,
            experts: (0..experts)
                .map(|_| ExpertTensors { gate: "g".into(), up: "u".into(), down: "d".into() })
                .collect(),
        });
        // Far enough apart that rounding does not change the order.
        let biases: Vec<f32> = (0..experts).map(|_| random.below(3) as f32).collect();
        let bias = biased.then(|| graph.weight("bias", 1, experts));
        graph.ops.push(Op::Route { moe: MoeId(0), logits, scoring, bias });
        graph.ops.push(Op::Experts { moe: MoeId(0), x, out: x });
        let spec = MatrixSpec { dtype: DType::F32, rows: 1, cols: experts, offset: 0 };
        let bytes: &[u8] = bytemuck::cast_slice(&biases);
        let weights: Vec<_> = bias.iter().map(|id| (*id, spec, bytes)).collect();
        let mut gpu = backend(&device, &graph, CAPACITY, &weights);
        for tokens in [1, 5] {
            let mut values = random.floats(tokens * experts);
            // Coarse values tie often. (There is no -0: the twin's total order puts it below 0.)
            // Sums of two of them would tie but for rounding.
            if !matches!(scoring, Scoring::Grouped { .. }) {
                values.iter_mut().for_each(|v| *v = (*v * 4.0).round() + 0.0);
            }
            let mut ids = vec![0; tokens * top_k];
            let mut weights = vec![0.0; tokens * top_k];
            let added = biased.then_some(&biases[..]);
            route(&values, added, experts, scoring, &mut ids, &mut weights, top_k);
            let zeros = vec![0; tokens];
            let step = crate::backend::Step {
                tokens: &zeros,
                position: 0,
                logits: crate::backend::LogitRows::None,
            };
            gpu.begin(&step).unwrap();
            gpu.set(logits, &values);
            gpu.run(0..1).unwrap();
            assert_eq!(gpu.routing(1).unwrap(), ids, "{experts} choose {top_k}");
            // Asking again gives the same answer.
            assert_eq!(gpu.routing(1).unwrap(), ids);
            assert_close(&gpu.routing_weights(0, tokens * top_k), &weights, 2e-6, "the weights");
            // A logit that is not finite spoils its own row, whether it is chosen or not, and no
            // other.
            let spoilt = (tokens - 1) * experts + random.below(experts);
            values[spoilt] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.below(3)];
            gpu.begin(&step).unwrap();
            gpu.set(logits, &values);
            gpu.run(0..1).unwrap();
            let weights = gpu.routing_weights(0, tokens * top_k);
            let (sound, odd) = weights.split_at((tokens - 1) * top_k);
            assert_close(sound, &weights[..sound.len()], 2e-6, "the other rows' weights");
            assert!(odd.iter().all(|weight| weight.is_nan()), "{odd:?}");
        }
    }
}
