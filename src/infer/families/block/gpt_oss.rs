//! What only gpt-oss has: attention with sinks, and experts with biases, whose gates and ups take
//! turns in a stack.

use super::{Builder, Experts, Module};
use crate::graph::{
    Buf, ExpertBiases, ExpertTensors, Moe, MoeId, Op, Tensor, WeightId, WeightRole,
};
use crate::source::{Source, Take};

impl Builder {
    /// The attention that was just added has a sink for each head, `self_attn.sinks`.
    pub fn add_sinks(&mut self) {
        let attends = |op: &Op| matches!(op, Op::Attention { .. });
        let at = self.graph.ops.iter().rposition(attends).expect("attention was just added");
        let Op::Attention { kv, q, out, heads, scale, window, softcap: None, causal: true } =
            self.graph.ops[at]
        else {
            unreachable!("attention of this family is causal and has no cap");
        };
        let name = self.name("self_attn.sinks");
        let sinks = self.weight(name, WeightRole::Bias, 1, heads, Source::Itself);
        self.graph.ops[at] = Op::AttendSinks { kv, q, out, heads, scale, window, sinks };
    }

    /// Router and experts, all with biases. Experts are stacked: as `[experts, hidden, 2 ff]` and
    /// `[experts, ff, hidden]`, or in MXFP4 (`_blocks`) as `[experts, 2 ff, hidden]` and `[experts,
    /// hidden, ff]`. Even ones of `2 ff` are gates, odd ones ups.
    pub fn biased_experts(&mut self, x: Buf, of: &Experts) -> Buf {
        let &Experts { module, experts: count, top_k, ff, activation, scoring, .. } = of;
        let hidden = self.graph.width(x);
        let logits = self.buffer("router", count);
        let router = format!("{module}.{}", of.router);
        let role = WeightRole::Router;
        self.linear(x, logits, &Module { name: &router, role, bias: true, part: None });
        let [gates_ups, downs] = of.stacks.map(|name| self.name(name));
        let half = |e: usize, half: usize| {
            let turns = |start| Take { start, count: ff, step: 2 };
            let stack = Source::stored(&gates_ups).rows(e * hidden..(e + 1) * hidden);
            let packed = Source::stored(format!("{gates_ups}_blocks"));
            Source::FirstOf(vec![
                packed.rows(turns(2 * e * ff + half)),
                stack.cols(turns(half)).transpose(),
            ])
        };
        let down = |e: usize| {
            let packed = Source::stored(format!("{downs}_blocks"));
            let stack = Source::stored(&downs).rows(e * ff..(e + 1) * ff);
            let packed = packed.rows(e * hidden..(e + 1) * hidden);
            Source::FirstOf(vec![packed, stack.transpose()])
        };
        let tensor = |e: usize, part: &str, source| {
            let name = self.name(&format!("{module}.experts.{e}.{part}.weight"));
            Tensor { name, source }
        };
        let list = (0..count).map(|e| ExpertTensors {
            gate: tensor(e, of.gate, half(e, 0)),
            up: tensor(e, of.up, half(e, 1)),
            down: tensor(e, of.down, down(e)),
        });
        let experts = list.collect();
        let gate_up = self.expert_biases(&format!("{gates_ups}_bias"), 2 * ff * count);
        let down = self.expert_biases(&format!("{downs}_bias"), hidden * count);
        let biases = Some(ExpertBiases { gate_up, down });
        let moe = MoeId(u16::try_from(self.graph.moe.len()).expect("layers are bounded"));
        let layer = self.layer.expect("experts are in a layer");
        self.graph.moe.push(Moe { layer, top_k, hidden, ff, activation, biases, experts });
        let out = self.buffer("delta", hidden);
        self.graph.ops.push(Op::Route { moe, logits, scoring, bias: None });
        self.graph.ops.push(Op::Experts { moe, x, out });
        out
    }

    /// A stack of biases as one vector.
    fn expert_biases(&mut self, name: &str, len: usize) -> WeightId {
        self.weight(name.to_owned(), WeightRole::Bias, 1, len, Source::Itself.flat())
    }
}
