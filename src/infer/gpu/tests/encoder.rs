//! Layer norms, activations without a gate, embeddings of positions and segments, attention that is
//! not causal, and states as a result, beside their twins.

use super::alone::Alone;
use super::{BOTH, Random, assert_close, backend, device, run};
use crate::backend::{Backend, Capacity, KvFormat, LogitRows, Ops, Step};
use crate::cpu::activate::activate;
use crate::cpu::attention::{Attention, attention};
use crate::cpu::embed::{embed, embed_more};
use crate::cpu::kv_write::{Cache, kv_write};
use crate::cpu::layer_norm::layer_norm;
use crate::cpu::matrix::Matrix;
use crate::cpu::states::states;
use crate::gpu::{Reduction, params};
use crate::graph::{Activation, Graph, Kv, KvId, Lookup, MatrixSpec, Op, fed};
use doppler_store::DType;

const CAPACITY: Capacity = Capacity { batch: 5, context: 64, kv: KvFormat::F32 };

#[test]
fn layer_norms_match_their_twin_in_place_and_not_biased_or_not() {
    let mut random = Random::new("layer_norm");
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        for (i, cols) in [1, 37, 64, 100, 259].into_iter().enumerate() {
            let (in_place, biased) = (i % 2 == 1, i % 3 != 0);
            let mut graph = Graph { vocab: 1, ..Graph::default() };
            let x = graph.buffer("x", cols);
            let out = if in_place { x } else { graph.buffer("out", cols) };
            let weight = graph.weight("w", 1, cols);
            let bias = graph.weight("b", 1, cols);
            let of = biased.then_some(bias);
            graph.ops.push(Op::LayerNorm { x, weight, bias: of, out, eps: 1e-5 });
            let spec = MatrixSpec { dtype: DType::F32, rows: 1, cols, offset: 0 };
            let [scales, shifts] = [(); 2].map(|()| random.floats(cols));
            let weights = [
                (weight, spec, bytemuck::cast_slice(&scales)),
                (bias, spec, bytemuck::cast_slice(&shifts)),
            ];
            let mut gpu = backend(&device, &graph, CAPACITY, &weights);
            for tokens in [1, 5] {
                // Far from 0, so that a variance around 0 would be wrong.
                let mut input = random.floats(tokens * cols);
                input.iter_mut().for_each(|x| *x = 2.0 * *x + 5.0);
                let mut want = input.clone();
                layer_norm(&mut want, &scales, biased.then_some(&shifts), 1e-5);
                let got = run(&mut gpu, &graph, tokens, 0, &[(x, &input)], out);
                // A mean of 5 is off by some units of f32, beside a deviation of 1.
                assert_close(&got, &want, 2e-5, &format!("{reduction:?} {cols}, {tokens}"));
            }
        }
    }
}

#[test]
fn activations_match_their_twin() {
    let mut random = Random::new("activate");
    let Some(device) = device(Reduction::Lane) else { return };
    let all = [
        Activation::Silu,
        Activation::GeluTanh,
        Activation::Gelu,
        Activation::SquaredRelu,
        Activation::Tanh,
    ];
    for activation in all {
        for width in [1, 77, 323] {
            let mut graph = Graph { vocab: 1, ..Graph::default() };
            let x = graph.buffer("x", width);
            graph.ops.push(Op::Activate { x, activation });
            let mut gpu = backend(&device, &graph, CAPACITY, &[]);
            for tokens in [1, 5] {
                let mut input = random.floats(tokens * width);
                input.iter_mut().enumerate().for_each(|(i, x)| *x *= [0.01, 1.0, 8.0][i % 3]);
                let mut want = input.clone();
                activate(&mut want, activation);
                let got = run(&mut gpu, &graph, tokens, 0, &[(x, &input)], x);
                for (got, want) in got.iter().zip(&want) {
                    let off = (got - want).abs();
                    let what = format!("{activation:?}, {tokens} x {width}: {got}, not {want}");
                    assert!(off <= 1e-6 * want.abs().max(1.0), "{what}");
                }
            }
        }
    }
}

#[test]
fn a_mistake_in_a_layer_norm_or_an_activation_is_noticed() {
    let mut random = Random::new("wrong layer_norm");
    let Some(device) = device(Reduction::Lane) else { return };
    let words = |of: &[f32]| of.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let most_off = |got: &[u32], want: &[f32]| {
        let off = |(got, want): (&u32, &f32)| (f32::from_bits(*got) - want).abs();
        got.iter().zip(want).map(off).fold(0.0, f32::max)
    };
    let cols = 93;
    let [mut x, scales, shifts] = [(); 3].map(|()| random.floats(cols));
    x.iter_mut().for_each(|x| *x = *x * 4.0 + 3.0);
    let mut normed = x.clone();
    layer_norm(&mut normed, &scales, Some(&shifts), 0.1);
    let norm = |alone: &Alone<'_>| {
        let params = params::LayerNorm { cols: 93, stride: 96, eps: 0.1, has_bias: 1 };
        let buffers = [words(&x), words(&scales), words(&shifts)];
        most_off(&alone.run("layer_norm_inplace_lane", 0, &params, &buffers, (1, 1))[0], &normed)
    };
    assert!(norm(&Alone::new(&device)) < 1e-5);
    for change in [
        ("load(at + i) - mean;", "load(at + i);"),
        ("(load(at + i) - mean)", "load(at + i)"),
        ("variance + params.eps", "variance"),
        ("v += bias[i]", "v += 0.0"),
        ("factor * weight[i]", "factor"),
    ] {
        assert!(norm(&Alone::with(&device, change)) > 1e-4, "not noticed: {change:?}");
    }
    let mut active = x.clone();
    active[0] = -0.7;
    x.clone_from(&active);
    activate(&mut active, Activation::Gelu);
    let gelu = |alone: &Alone<'_>| {
        let params = params::Activate { width: 93, stride: 96, activation: 2 };
        most_off(&alone.run("activate", 0, &params, &[words(&x)], (2, 1))[0], &active)
    };
    assert!(gelu(&Alone::new(&device)) < 1e-6);
    for change in [
        ("0.254829592", "0.2548"),
        ("sign(x) *", "1.0 *"),
        ("0.70710678 * value", "value"),
        ("item % params.width", "0u"),
    ] {
        assert!(gelu(&Alone::with(&device, change)) > 2e-6, "not noticed: {change:?}");
    }
}

#[test]
fn positions_and_segments_are_added_to_embeddings_and_states_are_the_result() {
    let mut random = Random::new("embeddings of an encoder");
    let Some(device) = device(Reduction::Lane) else { return };
    for (dtype, cols) in [(DType::Bf16, 33), (DType::F32, 64), (DType::Q8_0, 96)] {
        let (rows, positions, segments) = (29, 19, 3);
        let sizes = [rows, positions, segments];
        let tables = sizes.map(|rows| random.matrix(dtype, rows, cols));
        let mut graph = Graph { vocab: rows, ..Graph::default() };
        let x = graph.buffer("x", cols);
        let ids = [0, 1, 2].map(|i| graph.weight(format!("w{i}"), sizes[i], cols));
        graph.ops.push(Op::Embed { table: ids[0], out: x, scale: 1.0 });
        graph.ops.push(Op::EmbedMore { by: Lookup::Position, table: ids[1], x });
        graph.ops.push(Op::EmbedMore { by: Lookup::Segment, table: ids[2], x });
        graph.ops.push(Op::States { x });
        let weights = [0, 1, 2].map(|i| (ids[i], tables[i].0, &tables[i].1[..]));
        let mut gpu = backend(&device, &graph, CAPACITY, &weights);
        gpu.limit(u64::MAX, 2);
        let tokens: Vec<u32> = (0..5).map(|_| random.below(rows) as u32).collect();
        let parts: Vec<u32> = (0..5).map(|_| random.below(segments) as u32).collect();
        let mut want = vec![0.0; 5 * cols];
        let matrix = |i: usize| Matrix::new(&tables[i].0, &tables[i].1);
        embed(&tokens, matrix(0), 1.0, &mut want);
        embed_more(&[7, 8, 9, 10, 11], matrix(1), &mut want);
        embed_more(&parts, matrix(2), &mut want);
        let both: Vec<u32> = tokens.iter().zip(&parts).map(|(id, part)| fed(*id, *part)).collect();
        for (logits, first) in [(LogitRows::All, 0), (LogitRows::Last, 4)] {
            gpu.begin(&Step { tokens: &both, position: 7, logits }).unwrap();
            gpu.run(0..4).unwrap();
            let mut rows = Vec::new();
            states(&want, cols, first, &mut rows);
            let got = gpu.logits().unwrap();
            assert_close(&got, &rows, 1e-6, &format!("{dtype} {cols} {logits:?}"));
        }
        let unknown = fed(1, segments as u32);
        let step = Step { tokens: &[unknown], position: 0, logits: LogitRows::Last };
        assert!(gpu.begin(&step).is_err(), "a segment that the model does not have");
    }
}

#[test]
fn attention_to_later_tokens_matches_its_twin_with_and_without_windows() {
    let mut random = Random::new("attention that is not causal");
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        for (window, tokens) in [(None, 5), (None, 67), (Some(1), 9), (Some(4), 67), (Some(90), 67)]
        {
            let (heads, kv_heads, head_dim) = (6, 2, 20);
            let mut graph = Graph { vocab: 1, ..Graph::default() };
            let q = graph.buffer("q", heads * head_dim);
            let [k, v] = ["k", "v"].map(|name| graph.buffer(name, kv_heads * head_dim));
            let out = graph.buffer("out", heads * head_dim);
            graph.kv.push(Kv { kv_heads, head_dim });
            let (kv, scale, softcap, causal) = (KvId(0), 0.4, None, false);
            graph.ops.push(Op::KvWrite { kv, k, v });
            graph.ops.push(Op::Attention { kv, q, out, heads, scale, window, softcap, causal });
            let capacity = Capacity { batch: 70, context: 128, kv: KvFormat::F32 };
            let mut gpu = backend(&device, &graph, capacity, &[]);
            let queries = random.floats(tokens * heads * head_dim);
            let [keys, values] = [(); 2].map(|()| random.floats(tokens * kv_heads * head_dim));
            let mut cache = Cache::new(kv_heads, head_dim, 2, KvFormat::F32);
            kv_write(&keys, &values, 0, &[0, 1], &mut cache);
            let params =
                Attention { heads, scale, window, chunk: None, softcap, causal, position: 0 };
            let mut want = vec![0.0; queries.len()];
            attention(&queries, &cache, &[0, 1], &params, &mut want);
            let inputs = [(q, &queries[..]), (k, &keys[..]), (v, &values[..])];
            let got = run(&mut gpu, &graph, tokens, 0, &inputs, out);
            assert_close(&got, &want, 5e-6, &format!("{reduction:?} {window:?} {tokens}"));
        }
    }
}

/// The twin itself, against sums over all pairs in f64.
#[test]
fn a_token_sees_those_behind_and_before_it_within_the_window() {
    let mut random = Random::new("bidirectional twin");
    let (tokens, width) = (11, 8);
    let [q, k, v] = [(); 3].map(|()| random.floats(tokens * width));
    let mut cache = Cache::new(1, width, 1, KvFormat::F32);
    kv_write(&k, &v, 0, &[0], &mut cache);
    for window in [None, Some(3)] {
        let softcap = None;
        let params = Attention {
            heads: 1,
            scale: 0.7,
            window,
            chunk: None,
            softcap,
            causal: false,
            position: 0,
        };
        let mut got = vec![0.0; tokens * width];
        attention(&q, &cache, &[0], &params, &mut got);
        for token in 0..tokens {
            let seen = |other: &usize| window.is_none_or(|window| other.abs_diff(token) < window);
            let score = |other: usize| {
                let pairs = q[token * width..][..width].iter().zip(&k[other * width..][..width]);
                (0.7 * pairs.map(|(a, b)| f64::from(a * b)).sum::<f64>()).exp()
            };
            let sum: f64 = (0..tokens).filter(seen).map(score).sum();
            let want: f64 = (0..tokens)
                .filter(seen)
                .map(|other| score(other) / sum * f64::from(v[other * width + 2]))
                .sum();
            let off = (f64::from(got[token * width + 2]) - want).abs();
            assert!(off < 1e-5, "{window:?}, token {token}: off by {off}");
        }
    }
}
