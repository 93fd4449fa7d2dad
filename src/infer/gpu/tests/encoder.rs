//! Layer norms and activations without a gate, beside their twins.

use super::alone::Alone;
use super::{BOTH, Random, assert_close, backend, device, run};
use crate::backend::{Capacity, KvFormat};
use crate::cpu::activate::activate;
use crate::cpu::layer_norm::layer_norm;
use crate::gpu::{Reduction, params};
use crate::graph::{Activation, Graph, MatrixSpec, Op};
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
