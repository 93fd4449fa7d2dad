//! What only Llama 4 has: attention within chunks, queries and keys of unit length, queries that grow
//! with their position, experts whose input is weighed.

use super::{Attention, Builder, Module};
use crate::graph::{Buf, Kv, KvId, Op, Weight, WeightId, WeightRole};
use crate::source::Source;

/// How a layer attends.
#[derive(Debug, Clone, Copy)]
pub enum Llama4Attention {
    /// Rotates and sees the positions of its own chunk. With an epsilon, each head of queries and
    /// keys is brought to unit mean square after the rotation.
    Chunked { chunk: usize, norm: Option<f32> },
    /// Does not rotate and sees everything. Queries are multiplied by `1 + scale * ln(1 +
    /// floor((position + 1) / each))`.
    Whole { temper: Option<(usize, f32)> },
}

impl Builder {
    pub fn llama4_attention(&mut self, x: Buf, of: &Attention, kind: Llama4Attention) -> Buf {
        let &Attention { heads, kv_heads, head_dim, scale, .. } = of;
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let mut project = |buffer, name, role, width, turned: bool| {
            let out = self.buffer(buffer, width);
            let name = self.name(&format!("self_attn.{name}.weight"));
            let source = match turned {
                true => Source::Itself.permute(head_dim / 2, 2),
                false => Source::Itself,
            };
            let cols = self.graph.width(x);
            let weight = self.weight(name, role, width, cols, source);
            self.graph.ops.push(Op::Linear { x, weight, bias: None, out });
            out
        };
        let rotates = matches!(kind, Llama4Attention::Chunked { .. });
        let q = project("q", "q_proj", WeightRole::Query, q_width, rotates);
        let k = project("k", "k_proj", WeightRole::Key, kv_width, rotates);
        let v = project("v", "v_proj", WeightRole::Value, kv_width, false);
        let kv = KvId(u16::try_from(self.graph.kv.len()).expect("layers are bounded"));
        self.graph.kv.push(Kv { kv_heads, head_dim });
        let out = self.buffer("attended", q_width);
        match kind {
            Llama4Attention::Chunked { chunk, norm } => {
                for (x, heads) in [(q, heads), (k, kv_heads)] {
                    let rope = of.rope.expect("a layer that rotates has a rope");
                    self.graph.ops.push(Op::Rope { x, heads, head_dim, rope });
                    if let Some(eps) = norm {
                        let weight = self.ones(head_dim);
                        self.graph.ops.push(Op::RmsNorm { x, weight, out: x, eps });
                    }
                }
                self.graph.ops.push(Op::KvWrite { kv, k, v });
                self.graph.ops.push(Op::AttendChunk { kv, q, out, heads, scale, chunk });
            }
            Llama4Attention::Whole { temper } => {
                if let Some((each, scale)) = temper {
                    self.graph.ops.push(Op::Temper { x: q, each, scale });
                }
                self.graph.ops.push(Op::KvWrite { kv, k, v });
                let (window, softcap, causal) = (None, None, true);
                self.graph.ops.push(Op::Attention {
                    kv,
                    q,
                    out,
                    heads,
                    scale,
                    window,
                    softcap,
                    causal,
                });
            }
        }
        let delta = self.buffer("delta", self.graph.width(x));
        let role = WeightRole::AttentionOutput;
        let back = Module { name: "self_attn.o_proj", role, bias: false, part: None };
        self.linear(out, delta, &back);
        delta
    }

    /// A norm's vector of ones, for all layers.
    pub(super) fn ones(&mut self, width: usize) -> WeightId {
        let (tensor, layer) = (format!("model.ones_{width}"), None);
        let (role, source) = (WeightRole::Norm, Source::Ones);
        self.graph.add_weight(Weight { tensor, rows: 1, cols: width, role, layer, source })
    }

    /// The experts that were just added are given their input times the sigmoid of their logit, and
    /// their matrices are stored in stacks, transposed.
    pub fn weigh_inputs(&mut self) {
        let experts = |op: &Op| matches!(op, Op::Experts { .. });
        let at = self.graph.ops.iter().rposition(experts).expect("experts were just added");
        let (Op::Route { logits, .. }, &Op::Experts { moe, x, out }) =
            (&self.graph.ops[at - 1], &self.graph.ops[at])
        else {
            unreachable!("experts follow their routing");
        };
        let logits = *logits;
        let weighed = self.buffer("weighed", self.graph.width(x));
        self.graph.ops[at] = Op::Experts { moe, x: weighed, out };
        self.graph.ops.insert(at, Op::WeighInput { x, logits, out: weighed });
        let names = ["gate_up_proj", "down_proj"];
        let [gates_ups, downs] =
            names.map(|name| self.name(&format!("feed_forward.experts.{name}")));
        let moe = &mut self.graph.moe[usize::from(moe.0)];
        let (ff, hidden) = (moe.ff, moe.hidden);
        for (e, expert) in moe.experts.iter_mut().enumerate() {
            let both = Source::stored(&gates_ups).rows(e * hidden..(e + 1) * hidden);
            expert.gate.source = both.clone().cols(0..ff).transpose();
            expert.up.source = both.cols(ff..2 * ff).transpose();
            let down = Source::stored(&downs).rows(e * ff..(e + 1) * ff);
            expert.down.source = down.transpose();
        }
    }
}
