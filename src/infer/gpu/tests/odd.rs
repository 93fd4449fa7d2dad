//! Ops where no rewrite expects them: a token stays one submission, halted layers restart with the
//! right inputs, and the logits are the CPU's.

use std::sync::Arc;

use serde_json::json;

use super::models::rel;
use super::{Random, device};
use crate::backend::{Device, KvFormat, LogitRows};
use crate::check::REL_MAX;
use crate::cpu::CpuDevice;
use crate::engine::LoadOptions;
use crate::gpu::Reduction;
use crate::graph::{Activation, Buf, Graph, Op, WeightId};
use crate::model::Model;
use crate::sampler::SamplerOptions;
use crate::session::Session;
use crate::slots::SlotBudget;
use crate::testing;
use doppler_store::DType;

const PROMPT: usize = 5;
const VOCAB: usize = 131;
const HIDDEN: usize = 64;

/// A dense layer, then two of 12 experts, top 3, in two classes of slots; attention as wide as the
/// residual stream, so that its matrices fit elsewhere, too.
fn model(random: &mut Random) -> Model {
    let config = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": 96,
        "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB,
        "max_position_embeddings": 96, "num_experts": 12, "num_experts_per_tok": 3,
        "rms_norm_eps": 1e-6, "mlp_only_layers": [0],
    });
    testing::random(&config, random.below(1 << 30) as u64, |wanted| match wanted.name {
        name if name.contains("layers.2.mlp.experts") => DType::Q8_0,
        name if name.contains("experts") => DType::Q5_0,
        _ => DType::F32,
    })
}

/// A graph being changed.
struct Odd {
    graph: Graph,
}

impl Odd {
    fn buf(&self, name: &str) -> Buf {
        let at = self.graph.buffers.iter().position(|buffer| buffer.name == name);
        Buf(at.unwrap_or_else(|| panic!("a buffer {name}")) as u16)
    }

    fn weight(&self, tensor: &str) -> WeightId {
        let at = self.graph.weights.iter().position(|weight| weight.tensor == tensor);
        WeightId(at.unwrap_or_else(|| panic!("a tensor {tensor}")) as u32)
    }

    /// Where the `n`th op of a kind is.
    fn find(&self, n: usize, is: impl Fn(&Op) -> bool) -> usize {
        let mut found = self.graph.ops.iter().enumerate().filter(|(_, op)| is(op));
        found.nth(n).expect("such an op").0
    }

    fn insert(&mut self, at: usize, ops: impl IntoIterator<Item = Op>) {
        self.graph.ops.splice(at..at, ops);
    }

    /// Normalises each head of a row in place.
    fn evened(&self, buf: Buf) -> Op {
        let weight = self.weight("model.layers.2.self_attn.q_norm.weight");
        Op::RmsNorm { x: buf, weight, out: buf, eps: 1e-6 }
    }

    /// `x += evened(product(silu(norm(x)) * x))`, made of plain ops and a single product.
    fn block(&mut self, at: usize, name: &'static str) {
        let spare = self.graph.buffer(name, HIDDEN);
        let (x, delta) = (self.buf("x"), self.buf("delta"));
        let norm = self.weight("model.norm.weight");
        let square = self.weight("model.layers.1.self_attn.o_proj.weight");
        let ops = [
            Op::RmsNorm { x, weight: norm, out: spare, eps: 1e-6 },
            Op::Gated { gate: spare, up: x, out: spare, activation: Activation::Silu },
            self.evened(spare),
            Op::Linear { x: spare, weight: square, bias: None, out: delta },
            self.evened(delta),
            Op::Add { x, y: delta },
        ];
        self.insert(at, ops);
    }
}

/// A change of a graph.
type Change = (&'static str, fn(&mut Odd));

const fn routes(op: &Op) -> bool {
    matches!(op, Op::Route { .. })
}

const fn runs_experts(op: &Op) -> bool {
    matches!(op, Op::Experts { .. })
}

const fn attends(op: &Op) -> bool {
    matches!(op, Op::Attention { .. })
}

const CHANGES: [Change; 11] = [
    ("as it is", |_| {}),
    ("a block between two blocks", |odd| {
        let at = odd.find(0, runs_experts) + 2;
        odd.block(at, "between");
    }),
    ("a block between attention and the MoE part, and before the first layer", |odd| {
        let at = odd.find(0, routes) - 2;
        odd.block(at, "before the norm");
        odd.block(1, "first");
    }),
    // Needed at the end and changed in between, so it must survive every halt.
    ("a second stream beside the first", |odd| {
        let (x, norm) = (odd.buf("x"), odd.weight("model.norm.weight"));
        let kept = odd.graph.buffer("kept", HIDDEN);
        let end = odd.graph.ops.len() - 2;
        odd.insert(end, [Op::Add { x, y: kept }]);
        let at = odd.find(0, runs_experts) + 2;
        odd.insert(at, [Op::Add { x: kept, y: x }]);
        odd.insert(1, [Op::RmsNorm { x, weight: norm, out: kept, eps: 1e-6 }]);
    }),
    ("a row that a product wants, over a halt", |odd| {
        let (x, delta) = (odd.buf("x"), odd.buf("delta"));
        let kept = odd.graph.buffer("kept", HIDDEN);
        let norm = odd.weight("model.norm.weight");
        let square = odd.weight("model.layers.1.self_attn.o_proj.weight");
        let end = odd.graph.ops.len() - 2;
        odd.insert(
            end,
            [
                Op::Linear { x: kept, weight: square, bias: None, out: delta },
                Op::Add { x, y: delta },
            ],
        );
        // A product reads it first, so it exists only in packed form.
        odd.insert(1, [Op::RmsNorm { x, weight: norm, out: kept, eps: 1e-6 }]);
    }),
    ("between norm and router", |odd| {
        let at = odd.find(0, routes) - 1;
        let normed = odd.buf("normed");
        let even = odd.evened(normed);
        odd.insert(at, [even]);
    }),
    ("between router and routing, the stream with it", |odd| {
        let at = odd.find(1, routes);
        let (router, x, normed) = (odd.buf("router"), odd.buf("x"), odd.buf("normed"));
        let spare = odd.graph.buffer("spare", 12);
        let gated =
            Op::Gated { gate: router, up: router, out: spare, activation: Activation::Silu };
        odd.insert(at, [gated, Op::Add { x: router, y: spare }, Op::Add { x, y: normed }]);
    }),
    ("between routing and experts", |odd| {
        for n in 0..2 {
            let at = odd.find(n, runs_experts);
            let normed = odd.buf("normed");
            let even = odd.evened(normed);
            odd.insert(at, [even]);
        }
    }),
    ("between experts and their sum, the sum read twice", |odd| {
        let at = odd.find(0, runs_experts) + 1;
        let (x, delta) = (odd.buf("x"), odd.buf("delta"));
        odd.insert(at, [Op::Add { x, y: delta }]);
        let norm = odd.weight("model.norm.weight");
        let at = odd.find(1, runs_experts) + 1;
        odd.insert(at, [Op::RmsNorm { x: delta, weight: norm, out: delta, eps: 1e-6 }]);
    }),
    ("in the middle of attention", |odd| {
        let v = odd.buf("v");
        let at = odd.find(1, attends) - 1;
        let even = odd.evened(v);
        odd.insert(at, [even]);
        let (q, attended, x) = (odd.buf("q"), odd.buf("attended"), odd.buf("x"));
        // Queries that are read again after attention.
        let at = odd.find(2, attends) + 1;
        odd.insert(at, [Op::Add { x: attended, y: q }]);
        let at = odd.find(0, attends) + 1;
        odd.insert(at, [Op::Add { x, y: q }]);
    }),
    ("a feed-forward without its gate's own op", |odd| {
        let at = odd.find(0, |op| matches!(op, Op::Gated { .. }));
        let (gate, up) = (odd.buf("gate"), odd.buf("up"));
        odd.insert(at, [Op::Add { x: up, y: gate }]);
    }),
];

fn session(model: &Model, device: &dyn Device, kv: KvFormat, slots: SlotBudget) -> Session {
    let host_bytes = if slots == SlotBudget::Experts(12) { 1 << 30 } else { 0 };
    let (context, batch) = (Some(64), PROMPT);
    let options = LoadOptions { context, batch, slots, kv, host_bytes, ..LoadOptions::default() };
    Session::new(model, device, &options).unwrap()
}

/// Logits of the tokens after the prompt, one by one.
fn logits(session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    session.reset();
    session.prefill(&tokens[..PROMPT]).unwrap();
    let rest = tokens[PROMPT..].iter();
    rest.flat_map(|token| session.step(&[*token], LogitRows::Last).unwrap()).collect()
}

/// The tokens chosen on the device after the prompt, several in flight at a time.
fn chosen(session: &mut Session, prompt: &[u32], count: usize) -> Vec<u32> {
    let options = SamplerOptions { temperature: 0.9, seed: 7, ..SamplerOptions::default() };
    session.reset_with(options).unwrap();
    session.prefill(prompt).unwrap();
    let mut token = prompt[0];
    let choose = |left| {
        token = session.next(token, left).unwrap();
        token
    };
    (1..=count).rev().map(choose).collect()
}

#[test]
fn an_op_where_none_is_expected_costs_dispatches_and_no_submission() {
    hold(&CHANGES[..4], &[KvFormat::F16]);
}

#[test]
#[ignore = "a sweep"]
fn ops_where_none_are_expected_cost_dispatches_and_no_submission_in_every_cache() {
    hold(&CHANGES, &[KvFormat::F16, KvFormat::F32]);
}

fn hold(changes: &[Change], caches: &[KvFormat]) {
    let mut random = Random::new("odd ops");
    let Some(device) = device(Reduction::Group) else { return };
    let plain = model(&mut random);
    let tokens: Vec<u32> = (0..PROMPT + 4).map(|_| random.below(VOCAB) as u32).collect();
    for (what, change) in changes {
        let mut odd = Odd { graph: Graph::clone(&plain.graph) };
        change(&mut odd);
        let model = Model { graph: Arc::new(odd.graph), ..plain.clone() };
        for kv in caches.iter().copied() {
            let make = |device: &dyn Device, slots| session(&model, device, kv, slots);
            let want = logits(&mut make(&CpuDevice, SlotBudget::All), &tokens);
            let mut whole = make(&device, SlotBudget::All);
            let got = logits(&mut whole, &tokens);
            let off = rel(&got, &want);
            println!("{what}, {kv:?}: {off:.2e}");
            assert!(off <= REL_MAX, "{what}, {kv:?}: {off}");

            // With every expert in a slot, a token is one submission, and its report is one
            // readback.
            whole.settle_all().unwrap();
            let before = whole.counters();
            let want = chosen(&mut whole, &tokens[..PROMPT], 1);
            let prompt = whole.counters().since(&before);
            let before = whole.counters();
            let more = chosen(&mut whole, &tokens[..PROMPT], 8);
            let eight = whole.counters().since(&before);
            assert_eq!(more[..1], want, "{what}, {kv:?}");
            let extra = |of: fn(&crate::backend::Counters) -> u64| of(&eight) - of(&prompt);
            assert_eq!(
                (extra(|c| c.submissions), extra(|c| c.readbacks)),
                (7, 7),
                "{what}, {kv:?}"
            );

            // With few slots, tokens halt again and again; the device brings some experts in by
            // itself.
            for slots in [SlotBudget::Experts(6), SlotBudget::Experts(12)] {
                let mut paged = make(&device, slots);
                assert!(logits(&mut paged, &tokens) == got, "{what}, {kv:?}: paging, {slots:?}");
                assert!(logits(&mut paged, &tokens) == got, "{what}, {kv:?}: again, {slots:?}");
                let ahead = chosen(&mut paged, &tokens[..PROMPT], 8);
                assert_eq!(ahead, more, "{what}, {kv:?}: ahead, {slots:?}");
                // Twelve slots may hold all that so few tokens want.
                let misses = slots == SlotBudget::Experts(6);
                assert!(!misses || paged.stats().pager.evictions > 0, "{what}: nothing was missed");
            }
        }
    }
}
