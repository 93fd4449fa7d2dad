//! The gated sum.

use super::alone::Alone;
use super::{Random, assert_close, backend, device, run};
use crate::backend::{Capacity, KvFormat};
use crate::cpu::add_gated::add_gated;
use crate::gpu::{Reduction, params};
use crate::graph::{Graph, Op};

#[test]
fn a_gated_sum_matches_its_twin() {
    let mut random = Random::new("add_gated");
    let Some(device) = device(Reduction::Lane) else { return };
    for width in [1, 77, 256, 323] {
        let mut graph = Graph { vocab: 1, ..Graph::default() };
        let (x, y) = (graph.buffer("x", width), graph.buffer("y", width));
        let gate = graph.buffer("gate", 1);
        graph.ops.push(Op::AddGated { x, y, gate });
        let capacity = Capacity { batch: 7, context: 7, kv: KvFormat::F32 };
        let mut gpu = backend(&device, &graph, capacity, &[]);
        for tokens in [1, 7] {
            let [xs, ys] = [(); 2].map(|()| random.floats(tokens * width));
            let mut gates = random.floats(tokens);
            gates.iter_mut().for_each(|gate| *gate *= 8.0);
            gates[0] = [-200.0, 200.0][tokens / 7];
            let mut want = xs.clone();
            add_gated(&mut want, &ys, &gates);
            let inputs = [(x, &xs[..]), (y, &ys[..]), (gate, &gates[..])];
            let got = run(&mut gpu, &graph, tokens, 0, &inputs, x);
            assert_close(&got, &want, 2e-6, &format!("{tokens} rows of {width}"));
        }
    }
}

#[test]
fn a_mistake_in_the_gated_sum_is_noticed() {
    let mut random = Random::new("wrong add_gated");
    let Some(device) = device(Reduction::Lane) else { return };
    let (width, gate) = (92, 0.7);
    let [x, y] = [(); 2].map(|()| random.floats(width));
    let mut want = x.clone();
    add_gated(&mut want, &y, &[gate]);
    let words = |of: &[f32]| of.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let off = |alone: &Alone<'_>| {
        let params = params::AddGated { stride: width as u32 / 4, gate_stride: 4 };
        let buffers = [words(&y), words(&[gate, 9.0, 9.0, 9.0]), words(&x)];
        let got = alone.run("add_gated", 3, &params, &buffers, (1, 1));
        let off = |(got, want): (&u32, &f32)| (f32::from_bits(*got) - want).abs();
        got[2].iter().zip(&want).map(off).fold(0.0, f32::max)
    };
    assert!(off(&Alone::new(&device)) < 1e-6);
    for change in [
        ("exp(-gate)", "exp(gate)"),
        ("x[item] + y[item]", "y[item]"),
        ("now.tokens * params.stride", "now.tokens * params.stride - 1u"),
        ("let gate = gates[", "let gate = 1.01 * gates["),
    ] {
        let off = off(&Alone::with(&device, change));
        assert!(off > 1e-4, "not noticed: {change:?} ({off})");
    }
}
