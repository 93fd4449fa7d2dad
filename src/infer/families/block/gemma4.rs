//! What only Gemma 4 has: normalised values, shared caches, inputs for each layer, experts beside a
//! feed-forward with norms of their own, a factor for each layer.

use super::{Builder, Experts, FeedForward, Module};
use crate::graph::{Activation, Buf, Heads, Kv, KvId, Op, RopeId, WeightRole};
use crate::source::Source;

/// Attention in one layer.
#[derive(Debug, Clone, Copy)]
pub struct Gemma4Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rope: RopeId,
    pub window: Option<usize>,
    pub eps: f32,
    /// Values are the projected keys.
    pub same: bool,
    /// The layer whose keys and values it reads; `None` if it has its own.
    pub shares: Option<usize>,
}

impl Builder {
    pub fn gemma4_attention(&mut self, x: Buf, of: &Gemma4Attention) -> Buf {
        let &Gemma4Attention { heads, head_dim, rope, window, eps, .. } = of;
        let q =
            self.own_projection(x, "q", "self_attn.q_proj", WeightRole::Query, heads * head_dim);
        let kv = match of.shares {
            // Layers with a cache of their own come first, so their numbers are the caches'.
            Some(layer) => KvId(u16::try_from(layer).expect("layers are bounded")),
            None => self.gemma4_cache(x, of),
        };
        let weight = self.norm_weight("self_attn.q_norm", head_dim);
        self.graph.ops.push(Op::RmsNorm { x: q, weight, out: q, eps });
        self.graph.ops.push(Op::Rope { x: q, heads, head_dim, rope });
        let out = self.buffer("attended", heads * head_dim);
        let (scale, softcap, causal) = (1.0, None, true);
        self.graph.ops.push(Op::Attention { kv, q, out, heads, scale, window, softcap, causal });
        let delta = self.buffer("delta", self.graph.width(x));
        let role = WeightRole::AttentionOutput;
        let back = Module { name: "self_attn.o_proj", role, bias: false, part: None };
        self.linear(out, delta, &back);
        delta
    }

    /// Writes keys and values to a cache of this layer.
    fn gemma4_cache(&mut self, x: Buf, of: &Gemma4Attention) -> KvId {
        let &Gemma4Attention { kv_heads, head_dim, rope, eps, .. } = of;
        let width = kv_heads * head_dim;
        let k = self.own_projection(x, "k", "self_attn.k_proj", WeightRole::Key, width);
        let v = match of.same {
            false => self.own_projection(x, "v", "self_attn.v_proj", WeightRole::Value, width),
            true => {
                let out = self.buffer("v", width);
                let all = Heads { start: 0, stride: 0 };
                self.graph.ops.push(Op::Heads { x: k, from: all, out, to: all, heads: 1, width });
                out
            }
        };
        let weight = self.norm_weight("self_attn.k_norm", head_dim);
        self.graph.ops.push(Op::RmsNorm { x: k, weight, out: k, eps });
        self.graph.ops.push(Op::Rope { x: k, heads: kv_heads, head_dim, rope });
        let weight = self.ones(head_dim);
        self.graph.ops.push(Op::RmsNorm { x: v, weight, out: v, eps });
        let kv = KvId(u16::try_from(self.graph.kv.len()).expect("layers are bounded"));
        self.graph.kv.push(Kv { kv_heads, head_dim });
        self.graph.ops.push(Op::KvWrite { kv, k, v });
        kv
    }

    fn own_projection(
        &mut self,
        x: Buf,
        buffer: &'static str,
        name: &str,
        role: WeightRole,
        width: usize,
    ) -> Buf {
        let out = self.buffer(buffer, width);
        self.linear(x, out, &Module { name, role, bias: false, part: None });
        out
    }

    /// The inputs of all layers, `width` elements each, made from the tokens and their embeddings.
    pub fn layer_inputs(&mut self, x: Buf, layers: usize, width: usize, eps: f32) -> Buf {
        let (all, hidden, vocab) = (layers * width, self.graph.width(x), self.graph.vocab);
        let half = std::f32::consts::FRAC_1_SQRT_2;
        let (out, mixed) = (self.buffer("inputs", all), self.buffer("inputs_mixed", all));
        let name = "model.embed_tokens_per_layer.weight".to_owned();
        let table = self.weight(name, WeightRole::Projection, vocab, all, Source::Itself);
        let scale = (width as f32).sqrt() * half;
        self.graph.ops.push(Op::Embed { table, out, scale });
        self.projected(x, mixed, "per_layer_model_projection", Source::Itself);
        // The projection is scaled by 1 / sqrt(hidden), which the norm undoes but for its epsilon.
        let eps = eps * hidden as f32;
        let name = "model.per_layer_projection_norm.weight".to_owned();
        let source = Source::Itself.times(half);
        let weight = self.weight(name, WeightRole::Norm, 1, width, source);
        self.graph.ops.push(Op::RmsNorm { x: mixed, weight, out: mixed, eps });
        self.graph.ops.push(Op::Add { x: out, y: mixed });
        out
    }

    /// A projection back of the layer's input, gated by the state.
    pub fn layer_input(
        &mut self,
        x: Buf,
        inputs: Buf,
        (layer, width): (usize, usize),
        activation: Activation,
    ) -> Buf {
        let (gate, input) = (self.buffer("input_gate", width), self.buffer("input", width));
        self.projected(x, gate, "per_layer_input_gate", Source::Itself);
        let from = Heads { start: layer * width, stride: 0 };
        let to = Heads { start: 0, stride: 0 };
        self.graph.ops.push(Op::Heads { x: inputs, from, out: input, to, heads: 1, width });
        self.graph.ops.push(Op::Gated { gate, up: input, out: gate, activation });
        let delta = self.buffer("delta", self.graph.width(x));
        self.projected(gate, delta, "per_layer_projection", Source::Itself);
        delta
    }

    /// A feed-forward and experts, each with its own norms, which both read `x`.
    pub fn feed_forward_and_experts(
        &mut self,
        x: Buf,
        feed_forward: &FeedForward,
        experts: &Experts,
        eps: f32,
    ) -> Buf {
        let hidden = self.graph.width(x);
        let input = self.norm(x, "pre_feedforward_layernorm", eps);
        let dense = self.feed_forward(input, feed_forward);
        let sum = self.buffer("both", hidden);
        let weight = self.norm_weight("post_feedforward_layernorm_1", hidden);
        self.graph.ops.push(Op::RmsNorm { x: dense, weight, out: sum, eps });
        let input = self.buffer("experts_in", hidden);
        let weight = self.norm_weight("pre_feedforward_layernorm_2", hidden);
        self.graph.ops.push(Op::RmsNorm { x, weight, out: input, eps });
        let seen = self.buffer("router_in", hidden);
        let name = self.name("router.scale");
        let source = Source::Itself.times((hidden as f32).powf(-0.5));
        let weight = self.weight(name, WeightRole::Norm, 1, hidden, source);
        self.graph.ops.push(Op::RmsNorm { x, weight, out: seen, eps });
        let delta = self.experts(seen, experts);
        if let Some(Op::Experts { x, .. }) = self.graph.ops.last_mut() {
            *x = input;
        }
        let weight = self.norm_weight("post_feedforward_layernorm_2", hidden);
        self.graph.ops.push(Op::RmsNorm { x: delta, weight, out: delta, eps });
        self.graph.ops.push(Op::Add { x: sum, y: delta });
        sum
    }

    /// `x *= weight`, a single element.
    pub fn scale_by(&mut self, x: Buf, name: &str) {
        let name = self.name(name);
        let weight = self.weight(name, WeightRole::Bias, 1, 1, Source::Itself);
        self.graph.ops.push(Op::Scale { x, weight });
    }
}
