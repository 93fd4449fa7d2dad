//! Ops that change recurrent states, compared with their twins over steps of several sizes.

use super::{BOTH, Random, assert_close, backend, device, run};
use crate::backend::{Backend, Capacity, KvFormat};
use crate::cpu::conv::conv;
use crate::cpu::delta::delta;
use crate::cpu::heads::heads;
use crate::gpu::Reduction;
use crate::graph::{ConvForm, DeltaShape, Graph, Heads, MatrixSpec, Op, State, StateId, WeightId};
use crate::kv::BlockCopy;
use crate::recurrent::RING;
use doppler_store::DType;

/// A vector as a weight.
pub(super) fn vector(values: &[f32]) -> (MatrixSpec, Vec<u8>) {
    let spec = MatrixSpec { dtype: DType::F32, rows: 1, cols: values.len(), offset: 0 };
    (spec, bytemuck::cast_slice(values).to_vec())
}

/// Steps of one sequence, and of another that is forked from it. A batch of `RING` tokens ends in the
/// entry that it began from, and a token that runs twice reads the same state.
#[test]
fn convolutions_match_their_twin_step_after_step() {
    let mut random = Random::new("conv");
    let Some(device) = device(Reduction::Lane) else { return };
    for (form, channels, taps) in [
        (ConvForm::Gated, 64, 3),
        (ConvForm::Gated, 77, 2),
        (ConvForm::Silu, 130, 4),
        (ConvForm::Silu, 1, 8),
    ] {
        let parts = if form == ConvForm::Gated { 3 } else { 1 };
        let mut graph = Graph { vocab: 1, ..Graph::default() };
        graph.states.push(State { width: (taps - 1) * channels });
        let x = graph.buffer("x", parts * channels);
        let out = graph.buffer("out", channels);
        let filter = graph.weight("filter", 1, channels * taps);
        graph.ops.push(Op::Conv { state: StateId(0), x, filter, out, form });
        let weights = random.floats(channels * taps);
        let (spec, bytes) = vector(&weights);
        let capacity = Capacity { batch: 3 * RING, context: 99, kv: KvFormat::F32 };
        let mut gpu = backend(&device, &graph, capacity, &[(WeightId(0), spec, &bytes)]);
        let mut states = [vec![0.0; (taps - 1) * channels], Vec::new()];
        let mut positions = [0, 0];
        for (sequence, tokens) in
            [(0, 1), (0, RING), (0, 2), (0, 1), (1, 1), (0, 3 * RING), (1, 2), (0, 1), (1, 7)]
        {
            if sequence == 1 && states[1].is_empty() {
                gpu.grow_states(2).unwrap();
                gpu.copy_state(BlockCopy { from: 0, to: 1 }).unwrap();
                states[1] = states[0].clone();
                positions[1] = positions[0];
            }
            gpu.set_state(sequence as u32);
            let xs = random.floats(tokens * parts * channels);
            let (mut want, mut after) = (vec![0.0; tokens * channels], states[0].clone());
            let before = states[sequence].clone();
            conv(&xs, &weights, form, before, &mut after, parts * channels, &mut want);
            states[sequence] = after;
            let at = positions[sequence];
            let what = format!("{form:?}, {channels} channels, {taps} taps: {tokens} at {at}");
            let times = if tokens % RING == 0 { 1 } else { 2 };
            for _ in 0..times {
                let got = run(&mut gpu, &graph, tokens, at, &[(x, &xs)], out);
                assert_close(&got, &want, 2e-6, &what);
            }
            positions[sequence] += tokens;
        }
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, value| most.max(value.abs()))
}

/// The greatest result that a query could have over the longest column of these states. Rounding is
/// a part of it, even where the query is nearly orthogonal to every column.
fn longest(states: &[f32], shape: &DeltaShape) -> f32 {
    let mut squares = vec![0.0; shape.heads * shape.value_dim];
    for (head, state) in states.chunks(shape.key_dim * shape.value_dim).enumerate() {
        let squares = &mut squares[head * shape.value_dim..];
        for row in state.chunks(shape.value_dim) {
            row.iter().zip(&mut *squares).for_each(|(s, square)| *square += s * s);
        }
    }
    (largest(&squares) / shape.key_dim as f32).sqrt()
}

#[test]
fn delta_nets_match_their_twin_step_after_step() {
    let mut random = Random::new("delta");
    let shapes = [(2, 4, 16, 16), (1, 3, 5, 7), (3, 3, 33, 4), (1, 1, 256, 65)];
    for (reduction, (key_heads, heads, key_dim, value_dim)) in
        BOTH.into_iter().flat_map(|by| shapes.map(|shape| (by, shape)))
    {
        let Some(device) = device(reduction) else { return };
        let shape = DeltaShape { key_heads, heads, key_dim, value_dim };
        let mut graph = Graph { vocab: 1, ..Graph::default() };
        graph.states.push(State { width: shape.state_width() });
        let x = graph.buffer("x", shape.x_width());
        let (gates, out) =
            (graph.buffer("gates", 2 * heads), graph.buffer("out", heads * value_dim));
        let [decays, shifts] = ["decays", "shifts"].map(|name| graph.weight(name, 1, heads));
        let state = StateId(0);
        graph.ops.push(Op::Delta { state, x, gates, decays, shifts, out, shape });
        let [decay, shift] = [(); 2].map(|()| random.floats(heads));
        let [(spec, a), (_, b)] = [&decay, &shift].map(|values| vector(values));
        let capacity = Capacity { batch: 2 * RING, context: 99, kv: KvFormat::F32 };
        let weights = [(WeightId(0), spec, &a[..]), (WeightId(1), spec, &b[..])];
        let mut gpu = backend(&device, &graph, capacity, &weights);
        let mut after = vec![0.0; shape.state_width()];
        let mut position = 0;
        for tokens in [1, RING, 2, 1, 2 * RING, 3] {
            let xs = random.floats(tokens * shape.x_width());
            let mut gate = random.floats(tokens * 2 * heads);
            gate.iter_mut().for_each(|gate| *gate *= 4.0);
            gate[0] = [-200.0, 200.0][tokens % 2];
            gate[heads] = [-200.0, 200.0, 30.0][tokens % 3];
            let mut want = vec![0.0; tokens * heads * value_dim];
            delta(&xs, &gate, (&decay, &shift), &shape, &mut after, &mut want);
            let inputs = [(x, &xs[..]), (gates, &gate[..])];
            // A token that runs twice reads the same state.
            for _ in 0..if tokens % RING == 0 { 1 } else { 2 } {
                let got = run(&mut gpu, &graph, tokens, position, &inputs, out);
                let what = format!("{reduction:?}, {shape:?}: {tokens} at {position}");
                let most = 2e-6 * longest(&after, &shape).max(largest(&want));
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let off = (got - want).abs();
                    assert!(off <= most, "{what}: [{i}] is {got}, not {want}: off by {off}");
                }
            }
            position += tokens;
        }
    }
}

#[test]
fn parts_of_heads_are_copied_and_the_rest_stays() {
    let mut random = Random::new("heads");
    let Some(device) = device(Reduction::Lane) else { return };
    let part = |start, stride| Heads { start, stride };
    for (x_width, from, out_width, to, count, width) in [
        (8, part(0, 0), 60, part(3, 15), 4, 8),
        (60, part(5, 15), 40, part(0, 10), 4, 10),
        (7, part(2, 0), 5, part(1, 0), 1, 3),
    ] {
        let mut graph = Graph { vocab: 1, ..Graph::default() };
        let (x, out) = (graph.buffer("x", x_width), graph.buffer("out", out_width));
        graph.ops.push(Op::Heads { x, from, out, to, heads: count, width });
        let capacity = Capacity { batch: 5, context: 5, kv: KvFormat::F32 };
        let mut gpu = backend(&device, &graph, capacity, &[]);
        for tokens in [1, 5] {
            let (xs, before) = (random.floats(tokens * x_width), random.floats(tokens * out_width));
            let mut want = before.clone();
            heads((&xs, from), (&mut want, to), (x_width, out_width), count, width);
            assert_ne!(want, before);
            let got = run(&mut gpu, &graph, tokens, 0, &[(x, &xs), (out, &before)], out);
            assert_eq!(got, want, "{tokens} rows of {out_width}");
        }
    }
}
