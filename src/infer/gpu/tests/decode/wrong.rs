//! Tests the comparisons: a kernel that is wrong in one place must be noticed by its own
//! comparison.

use super::attention::{attention, combine, layer};
use super::experts::{Experts, down, gate_up as expert_gate_up};
use super::norm_add::{norm_add, norm_add_norm};
use super::products::{Linear, gate_up, linear};
use super::{Check, layer_norm, norm};
use crate::gpu::Reduction;
use crate::gpu::tests::alone::{Alone, Change};
use crate::gpu::tests::{Random, device};
use crate::graph::Activation;
use doppler_store::DType;

/// The kernel whose comparison must notice.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Of {
    Norm,
    NormAdd,
    NormAddNorm,
    LayerNorm,
    Linear(DType),
    GateUp,
    ExpertGateUp,
    ExpertDown,
    BiasedGateUp,
    BiasedDown,
    Attention,
    Capped,
    Combine,
    Sinks,
}

fn check(of: Of, alone: &Alone<'_>, random: &mut Random) -> Check {
    let team = "group";
    let experts = Experts { inner: DType::Q6K, outer: DType::Q4K, hidden: 300, ff: 70, top_k: 3 };
    match of {
        Of::Norm => norm(alone, team, random, 1025, 0.3),
        Of::NormAdd => norm_add(alone, team, random, 1025, 0.3),
        Of::NormAddNorm => norm_add_norm(alone, team, random, 4099, 0.3),
        Of::LayerNorm => layer_norm(alone, team, random, (1025, true), 0.3),
        Of::Linear(dtype) => {
            let of = [(dtype, 19), (dtype, 9), (dtype, 5)];
            let (kernel, cols) = (dtype.file_name(), 1100);
            let case = Linear { kernel, of: &of, cols, split: 2, biased: true, adds: true };
            linear(alone, team, random, &case)
        }
        Of::GateUp => gate_up(alone, team, random, (DType::Q5_0, 77, 96), Activation::GeluTanh),
        Of::ExpertGateUp => {
            expert_gate_up(alone, team, random, &experts, (Activation::Silu, false))
        }
        Of::ExpertDown => down(alone, team, random, &experts, (false, true), false),
        Of::BiasedGateUp => {
            expert_gate_up(alone, team, random, &experts, (Activation::Clamped, true))
        }
        Of::BiasedDown => down(alone, team, random, &experts, (false, true), true),
        Of::Attention => {
            let mut layer = layer((14, 2, 136, 60), true, Some(90), 2);
            layer.loud = false;
            attention(alone, team, random, &layer, 200)
        }
        Of::Capped => {
            let mut layer = layer((7, 1, 72, 36), false, None, 3);
            layer.shape.softcap = Some(5.0);
            attention(alone, team, random, &layer, 100)
        }
        Of::Combine | Of::Sinks => {
            let shape = layer((3, 1, 80, 4), false, None, 100).shape;
            combine(alone, random, &shape, 3100, of == Of::Sinks)
        }
    }
}

/// One mistake each: a sum that lacks a part, the wrong scale or bit, an index off by one, a
/// different rounding.
const MISTAKES: [(Of, Change); 85] = [
    (Of::Norm, ("var i = 0u; i < 8u", "var i = 0u; i < 7u")),
    (Of::Norm, ("+ params.eps", "+ 0.999 * params.eps")),
    (
        Of::Norm,
        ("select(vec4<f32>(0.0), x[begin + i], at < vec4<u32>(params.cols))", "x[begin + i]"),
    ),
    (Of::Norm, ("let second = (t >> 1u) & 1u", "let second = t & 1u")),
    (Of::Norm, ("round(mine * inverse)", "trunc(mine * inverse)")),
    (Of::Norm, ("(q + vec4<i32>(128))", "q")),
    (Of::Norm, ("f32(sum.x + sum.y", "f32(sum.x + sum.x")),
    (Of::Norm, ("most / 32512.0", "most / 32513.0")),
    (Of::NormAdd, ("var i = 0u; i < 8u", "var i = 0u; i < 7u")),
    (Of::NormAdd, ("+ params.eps", "+ 0.999 * params.eps")),
    (Of::NormAdd, ("before + normed", "normed")),
    (Of::NormAdd, ("select(vec4<f32>(0.0), y[begin + i], inside(i))", "y[begin + i]")),
    (Of::NormAddNorm, ("i < 8u; i++", "i < 7u; i++")),
    (Of::NormAddNorm, ("f32(params.cols) + eps", "f32(params.cols) + 0.999 * eps")),
    (Of::NormAddNorm, ("return v.x + v.y", "return v.y")),
    (Of::NormAddNorm, ("params.eps_after, 8u", "params.eps, 8u")),
    (Of::NormAddNorm, ("select(mine, v, i == own)", "mine")),
    (Of::NormAddNorm, ("select(zero, y[begin + i], inside)", "y[begin + i]")),
    (Of::NormAddNorm, ("dot(s2, s2) + dot(s3, s3)", "dot(s2, s2)")),
    (Of::LayerNorm, ("x[begin + i] - mean, inside(i)", "x[begin + i], inside(i)")),
    (Of::LayerNorm, ("out += bias[quad]", "out += 0.9 * bias[quad]")),
    (Of::LayerNorm, ("(x[begin + quad] - mean)", "(x[begin + quad] - 0.99 * mean)")),
    (Of::LayerNorm, ("+ params.eps", "+ 0.99 * params.eps")),
    (Of::LayerNorm, ("select(vec4<f32>(0.0), out, inside(quad))", "out")),
    (Of::Linear(DType::Q4K), ("t.s.x * d.x + t.s.y * d.y", "t.s.y * d.x + t.s.x * d.y")),
    (Of::Linear(DType::Q4K), ("s.z * a.sums.z", "s.w * a.sums.z")),
    (Of::Linear(DType::Q4K), ("(a >> 2u) & 0x3030u", "(a >> 2u) & 0x1030u")),
    (Of::Linear(DType::Q4K), ("f32(h * 256 + l)", "f32(h * 256)")),
    (Of::Linear(DType::Q4K), ("total += bias[to]", "total += bias[row]")),
    (Of::Linear(DType::Q4K), ("total += result[to]", "total += 0.0")),
    (Of::Linear(DType::Q4K), ("i < params.split", "i < 1u")),
    (Of::Linear(DType::Q5K), ("vec4<u32>(4u, 5u, 6u, 7u)", "vec4<u32>(4u, 5u, 6u, 6u)")),
    (Of::Linear(DType::Q6K), ("scales << 8u", "scales << 16u")),
    (Of::Linear(DType::Q6K), ("vec4<u32>(0u, 2u, 4u, 6u)", "vec4<u32>(0u, 2u, 4u, 4u)")),
    (Of::Linear(DType::Q8_0), ("t.s.y * p.y", "t.s.x * p.y")),
    (Of::Linear(DType::Q5_0), ("16.0 * a.sums.w", "16.0 * a.sums.z")),
    (Of::Linear(DType::Mxfp4), ("(more >> vec4<u32>(1u))", "more")),
    (Of::Linear(DType::Mxfp4), ("(low + FP4_SEVENS) & w", "w")),
    (Of::Linear(DType::Mxfp4), ("m.blocks, at >> 2u)", "m.blocks, at >> 3u)")),
    (Of::Linear(DType::Fp8), ("at >> 3u", "at >> 4u")),
    (Of::Linear(DType::Fp8), ("fp8_dot(w.w, a.low2)", "fp8_dot(w.w, a.low)")),
    (Of::Linear(DType::Fp8), ("magnitude << vec4<u32>(20u)", "magnitude << vec4<u32>(19u)")),
    (Of::Linear(DType::F16), ("dot(first, bitcast<vec4<f32>>(a.high))", "dot(first, first)")),
    (Of::Linear(DType::Bf16), ("vec4<f32>(a.xz, b.xz)", "vec4<f32>(a.xy, b.xz)")),
    (Of::Linear(DType::F32), ("m.row_blocks * 8u + i]", "m.row_blocks * 8u + (i ^ 1u)]")),
    (Of::GateUp, ("joined(gate_second, up_second", "joined(gate_second, up_first")),
    (Of::GateUp, ("0.7978845608", "0.78")),
    (Of::GateUp, ("row + 8u < rows", "row + 9u < rows")),
    (Of::ExpertGateUp, ("let up = in_slot(params.up", "let up = in_slot(params.gate")),
    (Of::ExpertGateUp, ("pair * params.pieces * 13u, params", "0u, params")),
    (Of::ExpertGateUp, ("1.0 + exp(-value)", "1.0 + exp(-0.99 * value)")),
    (Of::ExpertDown, ("bitcast<f32>(route.y) *", "0.3 *")),
    (Of::ExpertDown, ("choice = team / params.split", "choice = team")),
    (Of::ExpertDown, ("params.adds == 1u) + total.y", "params.adds == 1u) + total.x")),
    (Of::Attention, ("total * less +", "total +")),
    (Of::Attention, ("s.a2 * by.z, s.b2 * by.z", "s.a2 * by.y, s.b2 * by.z")),
    (Of::Attention, ("select(sin, -sin, low)", "sin")),
    (Of::Attention, ("min(window, end)", "min(window + 1u, end)")),
    (Of::Attention, ("key = x * k_weights(at)", "key = x * q_weights(at)")),
    (Of::Attention, ("keys[to] = key", "keys[to] = value")),
    (Of::Attention, ("square / f32(params.head_dim)", "square / 128.0")),
    (Of::Attention, ("row_offset(number + 1u)", "row_offset(number)")),
    (Of::Attention, ("cache_blocks.at[list + number] - number", "number - number")),
    (Of::Attention, ("span = blocks_of(min(start + turn, now.position))", "span = blocks_of(0u)")),
    (Of::Attention, ("exp(scores_of(part) - highest)", "exp(scores_of(0u) - highest)")),
    (Of::Attention, ("sum += mark.y * exp(", "sum += mark.y * (")),
    (Of::Attention, ("own, position == now", "own, position + 1u == now")),
    (Of::Attention, ("quad < dim / 4u && h", "quad + 1u < dim / 4u && h")),
    (Of::Capped, ("score = softcapped(sum, params.softcap)", "score = sum + 0.0")),
    (Of::Capped, ("tanh(clamp(t, -15.0, 15.0))", "clamp(t, -1.0, 1.0)")),
    (Of::Capped, ("(0.33333334 - s", "(3.0 - s")),
    (Of::Capped, ("let t = x / cap;", "let t = x / (1.1 * cap);")),
    (Of::BiasedGateUp, ("biases[expert * params.rows", "biases[params.rows")),
    (Of::BiasedGateUp, ("params.ids_at + choice]", "params.ids_at]")),
    (Of::BiasedGateUp, ("up + bias.y", "up + bias.x")),
    (Of::BiasedGateUp, ("(within + 1.0)", "within")),
    (Of::BiasedGateUp, ("-1.702 * low", "-1.7 * low")),
    (Of::BiasedGateUp, ("select(g, 7.0, g > 7.0)", "g")),
    (Of::BiasedDown, ("biases[at + b]", "biases[at + a]")),
    (Of::Sinks, ("sinks[head], 1.0", "sinks[head], 0.0")),
    (Of::Sinks, ("sinks[head]", "sinks[0]")),
    (Of::Combine, ("total * less + dot", "dot")),
    (Of::Combine, ("d.value * factor.w", "c.value * factor.w")),
    (Of::Combine, ("base += 64u", "base += 65u")),
    (Of::Combine, ("parts[first + 3u * step] * factor.w", "parts[first + 2u * step] * factor.w")),
];

/// How often each is tried. Whatever the data, a kernel without a mistake passes.
const ROUNDS: usize = 6;

#[test]
fn every_mistake_in_a_kernel_is_noticed_and_no_kernel_without_one() {
    let mut random = Random::new("wrong kernels");
    let Some(device) = device(Reduction::Group) else { return };
    let right = Alone::new(&device);
    let mut passed = Vec::new();
    let mut seen = None;
    for (of, change) in MISTAKES {
        let wrong = Alone::with(&device, change);
        let mut rounds = |alone| (0..ROUNDS).try_for_each(|_| check(of, alone, &mut random));
        if seen.replace(of) != Some(of) {
            rounds(&right).unwrap();
        }
        match rounds(&wrong) {
            Ok(()) => passed.push(format!("{of:?} with {change:?}")),
            Err(noticed) => println!("{of:?} with {change:?}: {noticed}"),
        }
    }
    assert!(passed.is_empty(), "not noticed: {passed:#?}");
}
