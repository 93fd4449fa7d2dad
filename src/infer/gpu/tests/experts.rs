//! Compares experts in slots, waves and chunks with the CPU backend.

use std::sync::Arc;

use super::{BOTH, Random, assert_close, device};
use crate::backend::{Backend, Capacity, KvFormat, LogitRows, Ops, Slot, SlotClass, Step};
use crate::cpu::CpuBackend;
use crate::gpu::executor::GpuBackend;
use crate::graph::{
    Activation, ExpertLayout, ExpertTensors, Graph, MatrixSpec, Moe, MoeId, Op, Scoring, WeightId,
};
use doppler_store::DType;

pub(super) const EXPERTS: usize = 7;
const TOP_K: usize = 3;
pub(super) const VOCAB: usize = 11;

/// Embed, route, experts, logits: the smallest MoE graph with a result from both backends.
pub(super) struct TinyMoe {
    pub graph: Graph,
    pub weights: Vec<(WeightId, MatrixSpec, Vec<u8>)>,
    pub layout: ExpertLayout,
    pub experts: Vec<Vec<u8>>,
}

/// The op that runs the experts.
pub(super) const EXPERTS_OP: usize = 3;

impl TinyMoe {
    pub fn new(random: &mut Random, hidden: usize, ff: usize, inner: DType, outer: DType) -> Self {
        let mut graph = Graph { vocab: VOCAB, ..Graph::default() };
        let (x, delta) = (graph.buffer("x", hidden), graph.buffer("delta", hidden));
        let scores = graph.buffer("scores", EXPERTS);
        let table = graph.weight("table", VOCAB, hidden);
        let router = graph.weight("router", EXPERTS, hidden);
        let head = graph.weight("head", VOCAB, hidden);
        let expert = || ExpertTensors { gate: "gate".into(), up: "up".into(), down: "down".into() };
        graph.moe.push(Moe {
            layer: 0,
            top_k: TOP_K,
            hidden,
            ff,
            activation: Activation::Silu,
            biases: None,
            experts: (0..EXPERTS).map(|_| expert()).collect(),
        });
        let moe = MoeId(0);
        graph.ops = vec![
            Op::Embed { table, out: x, scale: 9.0 },
            Op::Linear { x, weight: router, bias: None, out: scores },
            Op::Route {
                moe,
                logits: scores,
                scoring: Scoring::Softmax { renormalise: true },
                bias: None,
            },
            Op::Experts { moe, x, out: delta },
            Op::Logits { x: delta, weight: head, bias: None, softcap: None },
        ];
        let weights = [(table, VOCAB), (router, EXPERTS), (head, VOCAB)]
            .map(|(id, rows)| {
                let (spec, bytes) = random.matrix(DType::F32, rows, hidden);
                (id, spec, bytes)
            })
            .to_vec();
        let mut layout = None;
        let experts = (0..EXPERTS)
            .map(|_| {
                // A gap before each matrix, as an aligned shard has.
                let mut bytes = vec![7; 12];
                let mut place = |dtype, rows, cols| {
                    let (mut spec, part) = random.matrix(dtype, rows, cols);
                    spec.offset = bytes.len();
                    bytes.extend(part);
                    bytes.extend([9; 5]);
                    spec
                };
                let gate = place(inner, ff, hidden);
                let up = place(inner, ff, hidden);
                let down = place(outer, hidden, ff);
                layout = Some(ExpertLayout { gate, up, down, bytes: bytes.len() });
                bytes
            })
            .collect();
        Self { graph, weights, layout: layout.unwrap(), experts }
    }

    pub fn load(&self, backend: &mut dyn Backend, slots: usize) {
        for (id, spec, bytes) in &self.weights {
            backend.load_weight(*id, spec, bytes).unwrap();
        }
        backend.alloc_slots(&[SlotClass { layout: self.layout, count: slots }], &[0]).unwrap();
    }

    pub fn begin(&self, backend: &mut dyn Backend, tokens: &[u32]) {
        let step = Step { tokens, position: 0, logits: LogitRows::All };
        backend.begin(&step).unwrap();
        backend.run(0..EXPERTS_OP).unwrap();
    }

    /// One step with waves of at most `slots` experts, each of which is filled again.
    pub fn step(&self, backend: &mut dyn Backend, tokens: &[u32], slots: usize) -> Vec<f32> {
        self.begin(backend, tokens);
        let mut wanted = backend.routing(EXPERTS_OP).unwrap();
        wanted.sort_unstable();
        wanted.dedup();
        for wave in wanted.chunks(slots) {
            let mut table = vec![None; EXPERTS];
            for (index, expert) in wave.iter().enumerate() {
                // Starts at the last slot, so that chunks other than the first are used.
                let slot = Slot { class: 0, index: (slots - 1 - index) as u32 };
                backend.fill_slot(slot, &self.experts[*expert as usize]).unwrap();
                table[*expert as usize] = Some(slot);
            }
            backend.run_experts(EXPERTS_OP, &table).unwrap();
        }
        backend.finish_experts(EXPERTS_OP).unwrap();
        backend.run(EXPERTS_OP + 1..self.graph.ops.len()).unwrap();
        backend.logits().unwrap()
    }
}

#[test]
fn experts_match_the_cpu_in_every_format_and_waves_change_no_bit() {
    let mut random = Random::new("experts");
    let capacity = Capacity { batch: 5, context: 64, kv: KvFormat::F32 };
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        for (i, inner) in DType::ALL.into_iter().enumerate() {
            let outer = DType::ALL[(i + 2) % DType::ALL.len()];
            let (hidden, ff) = if inner.block_len().max(outer.block_len()) == 256 {
                (256, 256)
            } else {
                (96, 160)
            };
            let tiny = TinyMoe::new(&mut random, hidden, ff, inner, outer);
            let graph = Arc::new(tiny.graph.clone());
            let mut cpu = CpuBackend::new(Arc::clone(&graph), capacity);
            tiny.load(&mut cpu, EXPERTS);
            let mut gpu = GpuBackend::new(device.clone(), graph, capacity).unwrap();
            // Room for two slots per buffer, and for one row of logits at a time.
            let stride = gpu.slot_bytes(&tiny.layout);
            gpu.limit(stride * 2 + 16, 1);
            tiny.load(&mut gpu, EXPERTS);
            for tokens in [1, 5] {
                let tokens: Vec<u32> = (0..tokens).map(|_| random.below(VOCAB) as u32).collect();
                let want = tiny.step(&mut cpu, &tokens, EXPERTS);
                let got = tiny.step(&mut gpu, &tokens, EXPERTS);
                assert_close(&got, &want, 1e-5, &format!("{inner}/{outer} {reduction:?}"));
                for slots in if tokens.len() == 1 { [1, 2] } else { [3, 5] } {
                    let again = tiny.step(&mut gpu, &tokens, slots);
                    assert_eq!(got, again, "{inner}/{outer} in waves of {slots}");
                }
            }
        }
    }
}

#[test]
fn a_sum_before_all_experts_ran_is_refused() {
    let mut random = Random::new("unfinished");
    let Some(device) = device(BOTH[0]) else { return };
    let tiny = TinyMoe::new(&mut random, 64, 96, DType::F16, DType::F16);
    let capacity = Capacity { batch: 2, context: 8, kv: KvFormat::F32 };
    let mut gpu = GpuBackend::new(device, Arc::new(tiny.graph.clone()), capacity).unwrap();
    tiny.load(&mut gpu, 2);
    tiny.begin(&mut gpu, &[1]);
    let chosen = gpu.routing(EXPERTS_OP).unwrap();
    let slot = Slot { class: 0, index: 0 };
    gpu.fill_slot(slot, &tiny.experts[chosen[0] as usize]).unwrap();
    let mut table = vec![None; EXPERTS];
    table[chosen[0] as usize] = Some(slot);
    gpu.run_experts(EXPERTS_OP, &table).unwrap();
    let refused = gpu.finish_experts(EXPERTS_OP).unwrap_err().to_string();
    assert!(refused.contains(&format!("expert {}", chosen[1])), "{refused}");
    // Slots that do not exist and experts of another size are refused, too.
    let far = Slot { class: 0, index: 2 };
    assert!(gpu.fill_slot(far, &tiny.experts[0]).is_err());
    assert!(gpu.fill_slot(slot, &tiny.experts[0][1..]).is_err());
    table[chosen[0] as usize] = Some(far);
    assert!(gpu.run_experts(EXPERTS_OP, &table).is_err());
    // And the next step works.
    assert_eq!(tiny.step(&mut gpu, &[1, 2], 2).len(), 2 * VOCAB);
}
