//! Layer norms, and feed-forwards without a gate.

use super::{Builder, Module};
use crate::graph::{Activation, Buf, Op, WeightRole};

/// `down(act(up(x)))`.
#[derive(Debug, Clone, Copy)]
pub struct Ungated {
    /// The modules within the layer.
    pub up: &'static str,
    pub down: &'static str,
    /// The inner width.
    pub width: usize,
    pub activation: Activation,
    /// Whether both projections have biases.
    pub bias: bool,
}

impl Builder {
    /// All norms of states are layer norms, with the vectors `NAME.weight` and `NAME.bias`.
    pub const fn layer_norms(mut self) -> Self {
        self.has_layer_norms = true;
        self
    }

    /// If asked, the logits have a bias, `lm_head.bias`.
    pub const fn head_bias(mut self, has_head_bias: bool) -> Self {
        self.has_head_bias = has_head_bias;
        self
    }

    /// `out = layer_norm(x)`; both may be the same buffer.
    pub fn layer_norm(&mut self, x: Buf, name: &str, eps: f32, out: Buf) {
        let width = self.graph.width(x);
        let weight = self.norm_weight(name, width);
        let name = self.name(&format!("{name}.bias"));
        let source = self.rooted_source(&name);
        let bias = self.weight(name, WeightRole::Bias, 1, width, source);
        self.graph.ops.push(Op::LayerNorm { x, weight, bias: Some(bias), out, eps });
    }

    /// A dense feed-forward without a gate.
    pub fn ungated(&mut self, x: Buf, of: &Ungated) -> Buf {
        let &Ungated { width, activation, bias, .. } = of;
        let up = self.buffer("up", width);
        let module = Module { name: of.up, role: WeightRole::Up, bias, part: None };
        self.linear(x, up, &module);
        self.graph.ops.push(Op::Activate { x: up, activation });
        let delta = self.buffer("delta", self.graph.width(x));
        let module = Module { name: of.down, role: WeightRole::Down, bias, part: None };
        self.linear(up, delta, &module);
        delta
    }
}
