//! The op list of a step as the layers that the decode kernels run: pure matching.
//!
//! [`Fused::of`] recognises a graph made of pre-norm blocks (attention, then a dense
//! gated feed-forward or experts) and checks the shapes that the kernels hold. Any other
//! graph gives `None` and runs op by op.

use crate::graph::{Activation, Buf, Graph, KvId, MoeId, Op, RopeId, Scoring, WeightId};

/// kernels/decode_attention.wgsl
const HEAD_DIM_MAX: usize = 256;
/// kernels/decode_route.wgsl
const EXPERTS_MAX: usize = 1024;
const TOP_K_MAX: usize = 64;

/// A norm's weight and epsilon.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::gpu) struct Norm {
    pub weight: WeightId,
    pub eps: f32,
}

/// A matrix and its bias.
pub(in crate::gpu) type Biased = (WeightId, Option<WeightId>);

#[derive(Debug, Clone, PartialEq)]
pub(in crate::gpu) struct Layer {
    pub norm: Norm,
    /// Queries, keys, values.
    pub qkv: [Biased; 3],
    /// Weights over a head of queries and of keys.
    pub head_norms: Option<([WeightId; 2], f32)>,
    pub rope: RopeId,
    pub kv: KvId,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub window: Option<usize>,
    pub out: Biased,
    pub ff_norm: Norm,
    pub ff: FeedForward,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::gpu) enum FeedForward {
    Dense { gate: WeightId, up: WeightId, down: Biased, activation: Activation },
    Experts { router: Biased, moe: MoeId, renormalise: bool },
}

/// A whole step for one token.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::gpu) struct Fused {
    pub table: WeightId,
    pub scale: f32,
    /// The residual stream.
    pub x: Buf,
    pub layers: Vec<Layer>,
    pub norm: Norm,
    pub output: WeightId,
}

impl Fused {
    pub fn of(graph: &Graph) -> Option<Self> {
        let mut ops = Ops { graph, left: &graph.ops };
        let &Op::Embed { table, out: x, scale } = ops.next()? else { return None };
        let mut layers = Vec::new();
        loop {
            let (norm, normed) = ops.norm(x)?;
            if let Some(&Op::Logits { x: from, weight }) = ops.left.first() {
                let done = ops.left.len() == 1 && from == normed && !layers.is_empty();
                return done.then_some(Self { table, scale, x, layers, norm, output: weight });
            }
            layers.push(ops.layer(x, norm, normed)?);
        }
    }
}

/// How heads are normalised and turned.
struct Turned {
    norm: Option<(WeightId, f32)>,
    heads: usize,
    head_dim: usize,
    rope: RopeId,
}

/// What is left to match.
struct Ops<'a> {
    graph: &'a Graph,
    left: &'a [Op],
}

impl<'a> Ops<'a> {
    fn next(&mut self) -> Option<&'a Op> {
        let (first, left) = self.left.split_first()?;
        self.left = left;
        Some(first)
    }

    /// The norm of the whole of `x`, and the buffer it goes to.
    fn norm(&mut self, x: Buf) -> Option<(Norm, Buf)> {
        let &Op::RmsNorm { x: from, weight, out, eps } = self.next()? else { return None };
        let whole = self.graph.weight_spec(weight).cols == self.graph.width(x);
        (from == x && out != x && whole).then_some((Norm { weight, eps }, out))
    }

    fn linear(&mut self, x: Buf) -> Option<(Biased, Buf)> {
        let &Op::Linear { x: from, weight, bias, out } = self.next()? else { return None };
        (from == x).then_some(((weight, bias), out))
    }

    /// `x += delta`, right after `delta` was made.
    fn add(&mut self, x: Buf, delta: Buf) -> Option<()> {
        let &Op::Add { x: to, y } = self.next()? else { return None };
        (to == x && y == delta).then_some(())
    }

    /// A head norm (if there is one) and the turn of `heads` heads of `x`.
    fn turned(&mut self, x: Buf) -> Option<Turned> {
        let mut norm = None;
        if let Some(&Op::RmsNorm { x: from, weight, out, eps }) = self.left.first() {
            if from != x || out != x {
                return None;
            }
            norm = Some((weight, eps));
            self.next();
        }
        let &Op::Rope { x: of, heads, head_dim, rope } = self.next()? else { return None };
        (of == x).then_some(Turned { norm, heads, head_dim, rope })
    }

    fn layer(&mut self, x: Buf, norm: Norm, normed: Buf) -> Option<Layer> {
        let (wq, q) = self.linear(normed)?;
        let (wk, k) = self.linear(normed)?;
        let (wv, v) = self.linear(normed)?;
        let Turned { norm: q_norm, heads, head_dim, rope } = self.turned(q)?;
        let Turned { norm: k_norm, heads: kv_heads, head_dim: k_dim, rope: k_rope } =
            self.turned(k)?;
        let head_norms = match (q_norm, k_norm) {
            (None, None) => None,
            (Some((q, eps)), Some((k, k_eps))) if eps == k_eps => Some(([q, k], eps)),
            _ => return None,
        };
        let biases = [wq.1, wk.1, wv.1].iter().filter(|bias| bias.is_some()).count();
        let &Op::KvWrite { kv, k: k_from, v: v_from } = self.next()? else { return None };
        let &Op::Attention { kv: of, q: q_from, out, heads: all, scale, window } = self.next()?
        else {
            return None;
        };
        let cache = self.graph.kv_spec(kv);
        let same = (k_from, v_from, q_from, of, all) == (k, v, q, kv, heads)
            && (k_dim, k_rope) == (head_dim, rope)
            && (cache.kv_heads, cache.head_dim) == (kv_heads, head_dim);
        let shared_by = heads.checked_div(kv_heads)?;
        let fits = head_dim.is_multiple_of(8)
            && head_dim <= HEAD_DIM_MAX
            && heads == shared_by * kv_heads
            && shared_by > 0
            && (biases == 0 || biases == 3);
        if !same || !fits {
            return None;
        }
        let (wo, delta) = self.linear(out)?;
        self.add(x, delta)?;
        let (ff_norm, normed) = self.norm(x)?;
        let ff = self.feed_forward(x, normed)?;
        Some(Layer {
            norm,
            qkv: [wq, wk, wv],
            head_norms,
            rope,
            kv,
            heads,
            kv_heads,
            head_dim,
            scale,
            window,
            out: wo,
            ff_norm,
            ff,
        })
    }

    fn feed_forward(&mut self, x: Buf, normed: Buf) -> Option<FeedForward> {
        let (first, out) = self.linear(normed)?;
        if let Some(&Op::Route { moe, logits, scoring }) = self.left.first() {
            self.next();
            let &Op::Experts { moe: run, x: from, out: delta } = self.next()? else { return None };
            self.add(x, delta)?;
            let spec = self.graph.moe_spec(moe);
            let fits = spec.experts.len() <= EXPERTS_MAX && spec.top_k <= TOP_K_MAX;
            let same = logits == out && run == moe && from == normed;
            let Scoring::Softmax { renormalise } = scoring;
            return (fits && same).then_some(FeedForward::Experts {
                router: first,
                moe,
                renormalise,
            });
        }
        let (up, up_out) = self.linear(normed)?;
        let &Op::Gated { gate: g, up: u, out: inner, activation } = self.next()? else {
            return None;
        };
        let (down, delta) = self.linear(inner)?;
        self.add(x, delta)?;
        let plain = first.1.is_none() && up.1.is_none() && (g, u) == (out, up_out);
        let (gate, up) = (first.0, up.0);
        plain.then_some(FeedForward::Dense { gate, up, down, activation })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::families;

    fn graph(config: serde_json::Value) -> Graph {
        families::graph(&families::from_config(&config).unwrap())
    }

    fn llama(bias: bool) -> Graph {
        graph(json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
            "head_dim": 8, "vocab_size": 50, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
            "attention_bias": bias, "hidden_act": "silu", "rope_theta": 10000.0,
        }))
    }

    #[test]
    fn a_dense_model_is_its_layers() {
        let fused = Fused::of(&llama(true)).unwrap();
        assert_eq!(fused.layers.len(), 3);
        assert!(fused.layers[0].qkv.iter().all(|(_, bias)| bias.is_some()));
        assert!(matches!(fused.layers[2].ff, FeedForward::Dense { .. }));
        assert!(Fused::of(&llama(false)).is_some());
    }

    #[test]
    fn experts_and_head_norms_are_recognised() {
        let fused = Fused::of(&graph(json!({
            "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "vocab_size": 50, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "max_position_embeddings": 64, "hidden_act": "silu", "norm_topk_prob": true,
            "mlp_only_layers": [0],
        })))
        .unwrap();
        assert!(matches!(fused.layers[0].ff, FeedForward::Dense { .. }));
        assert!(matches!(fused.layers[1].ff, FeedForward::Experts { renormalise: true, .. }));
        assert!(fused.layers.iter().all(|layer| layer.head_norms.is_some()));
    }

    #[test]
    fn a_graph_in_another_order_or_of_other_shapes_is_left_alone() {
        let whole = llama(false);
        for i in 0..whole.ops.len() {
            let mut cut = whole.clone();
            cut.ops.remove(i);
            assert_eq!(Fused::of(&cut), None, "without op {i}");
        }
        let mut odd = whole;
        odd.kv.iter_mut().for_each(|kv| kv.head_dim = 12);
        assert_eq!(Fused::of(&odd), None);
    }
}
