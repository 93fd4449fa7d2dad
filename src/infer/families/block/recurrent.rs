//! Building blocks whose layers pass a state from token to token.

use super::Builder;
use crate::graph::{
    Activation, Buf, ConvForm, DeltaShape, Op, State, StateId, WeightId, WeightRole,
};
use crate::source::Source;

impl Builder {
    /// A short gated convolution: a projection to three parts, the convolution of each channel over
    /// the last `taps` tokens, and a projection back (LFM2). Its modules are `conv.in_proj`,
    /// `conv.conv` and `conv.out_proj`.
    pub fn short_conv(&mut self, x: Buf, taps: usize) -> Buf {
        let hidden = self.graph.width(x);
        let (input, out) = (self.buffer("conv_in", 3 * hidden), self.buffer("convolved", hidden));
        let delta = self.buffer("delta", hidden);
        self.projected(x, input, "conv.in_proj", Source::Itself);
        let filter = self.filter("conv.conv", hidden, taps);
        self.conv(input, filter, (hidden, taps), out, ConvForm::Gated);
        self.projected(out, delta, "conv.out_proj", Source::Itself);
        delta
    }

    /// The filters of a convolution, stored as `[channels, 1, taps]`, as one vector.
    fn filter(&mut self, module: &str, channels: usize, taps: usize) -> WeightId {
        let name = self.name(&format!("{module}.weight"));
        let source = Source::Itself.flat();
        self.weight(name, WeightRole::Other, 1, channels * taps, source)
    }

    fn conv(
        &mut self,
        x: Buf,
        filter: WeightId,
        (channels, taps): (usize, usize),
        out: Buf,
        form: ConvForm,
    ) {
        let state = self.state((taps - 1) * channels);
        self.graph.ops.push(Op::Conv { state, x, filter, out, form });
    }

    /// A state of the current layer.
    fn state(&mut self, width: usize) -> StateId {
        let id = u16::try_from(self.graph.states.len()).expect("layers are bounded");
        self.graph.states.push(State { width });
        StateId(id)
    }

    /// `out *= sigmoid(gate)`, where the gate of each head is stored behind its query. Restricts the
    /// projection of queries, which was just added, to the queries.
    pub(super) fn gate_heads(&mut self, x: Buf, out: Buf, heads: usize, head_dim: usize) {
        let stored = self.name("self_attn.q_proj.weight");
        let half = |of: &Source, second: usize| {
            let part = |head: usize| {
                let start = (2 * head + second) * head_dim;
                of.clone().rows(start..start + head_dim)
            };
            Source::Concatenate((0..heads).map(part).collect())
        };
        let queries = self.graph.weights.iter_mut().find(|weight| weight.tensor == stored);
        queries.expect("the projection was just added").source = half(&Source::Itself, 0);
        let gate = self.buffer("q_gate", heads * head_dim);
        let gates = half(&Source::stored(stored), 1);
        self.projected(x, gate, "self_attn.q_gate_proj", gates);
        let activation = Activation::Sigmoid;
        self.graph.ops.push(Op::Gated { gate, up: out, out, activation });
    }

    /// A gated delta net: projections, a short convolution of queries, keys and values, the net, a
    /// norm of each head, gated, and a projection back.
    pub fn delta_net(&mut self, x: Buf, of: &DeltaNet) -> Buf {
        let &DeltaNet { ref shape, taps, eps, .. } = of;
        let (heads, value_dim) = (shape.heads, shape.value_dim);
        let (width, channels) = (heads * value_dim, shape.x_width());
        let input = self.buffer("delta_in", channels);
        let mixed = self.buffer("delta_mixed", channels);
        let (gate, gates) =
            (self.buffer("delta_gate", width), self.buffer("delta_gates", 2 * heads));
        let [all, gate_rows, scalars] = self.delta_sources(of);
        self.projected(x, input, "linear_attn.in_proj_qkv", all);
        self.projected(x, gate, "linear_attn.in_proj_z", gate_rows);
        let name = self.name("linear_attn.in_proj_gates.weight");
        let cols = self.graph.width(x);
        // So few rows, which decide what is remembered, are not quantised.
        let weight = self.weight(name, WeightRole::Other, 2 * heads, cols, scalars);
        self.graph.ops.push(Op::Linear { x, weight, bias: None, out: gates });
        let filter = self.filter("linear_attn.conv1d", channels, taps);
        self.conv(input, filter, (channels, taps), mixed, ConvForm::Silu);
        let mut vector = |name: &str, role, width| {
            let name = self.name(&format!("linear_attn.{name}"));
            self.weight(name, role, 1, width, Source::Itself)
        };
        let decays = vector("A_log", WeightRole::Bias, heads);
        let shifts = vector("dt_bias", WeightRole::Bias, heads);
        let norm = vector("norm.weight", WeightRole::Norm, value_dim);
        let state = self.state(shape.state_width());
        let out = self.buffer("delta_out", width);
        let shape = *shape;
        self.graph.ops.push(Op::Delta { state, x: mixed, gates, decays, shifts, out, shape });
        self.graph.ops.push(Op::RmsNorm { x: out, weight: norm, out, eps });
        let activation = Activation::Silu;
        self.graph.ops.push(Op::Gated { gate, up: out, out, activation });
        let delta = self.buffer("delta", self.graph.width(x));
        self.projected(out, delta, "linear_attn.out_proj", Source::Itself);
        delta
    }

    /// The projections of queries, keys and values; of gates; of `b` and `a`.
    fn delta_sources(&self, of: &DeltaNet) -> [Source; 3] {
        let stored = |name: &str| Source::stored(self.name(&format!("linear_attn.{name}.weight")));
        if !of.packed {
            let scalars = ["in_proj_b", "in_proj_a"].map(stored).to_vec();
            return [Source::Itself, Source::Itself, Source::Concatenate(scalars)];
        }
        let DeltaShape { key_heads, heads, key_dim, value_dim } = of.shape;
        let shared = heads / key_heads;
        // Of each key head: its query, key, values, gates.
        let group = 2 * key_dim + 2 * shared * value_dim;
        let rows = |name: &str, group: usize, start: usize, count: usize| {
            let of = stored(name);
            let part = move |head: usize| {
                let at = head * group + start;
                of.clone().rows(at..at + count)
            };
            (0..key_heads).map(part)
        };
        let big = |start, count| rows("in_proj_qkvz", group, start, count);
        let small = |start| rows("in_proj_ba", 2 * shared, start, shared);
        let values = shared * value_dim;
        let qkv = big(0, key_dim).chain(big(key_dim, key_dim)).chain(big(2 * key_dim, values));
        [
            Source::Concatenate(qkv.collect()),
            Source::Concatenate(big(2 * key_dim + values, values).collect()),
            Source::Concatenate(small(0).chain(small(shared)).collect()),
        ]
    }
}

/// A gated delta net in one layer.
#[derive(Debug, Clone, Copy)]
pub struct DeltaNet {
    pub shape: DeltaShape,
    /// How many tokens its convolution spans.
    pub taps: usize,
    /// The epsilon of the norm of its output.
    pub eps: f32,
    /// Whether the projections are stored key head by key head in two matrices.
    pub packed: bool,
}
