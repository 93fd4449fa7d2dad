//! Times the kernels that read weights, one shape at a time, on any backend.
//!
//! A graph of a single op, repeated over several copies of its weights so that no cache holds them,
//! runs as a step of one token. The time is what the device reports, so a GPU must have been opened
//! for timing.

use std::ops::Range;
use std::sync::Arc;

use super::backend::{
    Backend, BackendError, Capacity, Device, KvFormat, LogitRows, Result, Slot, SlotClass, Step,
};
use super::graph::{
    Activation, ExpertLayout, ExpertTensors, Graph, MatrixSpec, Moe, MoeId, Op, Scoring, WeightId,
};
use super::load::random_blocks;
use super::model::Model;

/// The least weight bytes of a measurement: more than the caches of large devices.
const COLD_BYTES: usize = 128 << 20;
/// The most copies of a small matrix.
const COPIES_MAX: usize = 64;

/// The work of one kernel in a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A matrix times one token's activations.
    Linear(MatrixSpec),
    /// The chosen experts of one token: gate and up, down, and their sum.
    Experts { layout: ExpertLayout, top_k: usize, activation: Activation },
}

impl Shape {
    /// `linear_q4_k`, or `experts_q4_k_q6_k` from the types of gate and down.
    pub fn name(&self) -> String {
        let name = match self {
            Self::Linear(matrix) => format!("linear_{}", matrix.dtype),
            Self::Experts { layout, .. } => {
                format!("experts_{}_{}", layout.gate.dtype, layout.down.dtype)
            }
        };
        name.to_ascii_lowercase()
    }

    /// Rows and columns, for people.
    pub fn size(&self) -> String {
        match self {
            Self::Linear(matrix) => format!("{} x {}", matrix.rows, matrix.cols),
            Self::Experts { layout, top_k, .. } => {
                format!("{top_k} of {} x {}", layout.gate.rows, layout.gate.cols)
            }
        }
    }

    /// Stored bytes of the weights it reads.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Linear(matrix) => matrix.bytes(),
            Self::Experts { layout, top_k, .. } => {
                top_k * (layout.gate.bytes() + layout.up.bytes() + layout.down.bytes())
            }
        }
    }
}

/// A model's distinct shapes, and how often a token uses each.
pub fn shapes(model: &Model) -> Vec<(Shape, usize)> {
    let mut shapes: Vec<(Shape, usize)> = Vec::new();
    for op in &model.graph.ops {
        let shape = match *op {
            Op::Linear { weight, .. } | Op::Logits { weight, .. } => {
                Shape::Linear(model.trunk[weight.0 as usize].spec)
            }
            Op::Experts { moe, .. } => {
                let spec = model.graph.moe_spec(moe);
                let layout = model.moe[usize::from(moe.0)].layout;
                // A clamped gate needs biases, which are not timed; the weights are the same.
                let activation = match spec.activation {
                    Activation::Clamped => Activation::Silu,
                    other => other,
                };
                Shape::Experts { layout, top_k: spec.top_k, activation }
            }
            _ => continue,
        };
        match shapes.iter_mut().find(|(known, _)| *known == shape) {
            Some((_, count)) => *count += 1,
            None => shapes.push((shape, 1)),
        }
    }
    shapes
}

/// A shape on a device, ready to be timed repeatedly.
pub struct Timer {
    backend: Box<dyn Backend>,
    graph: Arc<Graph>,
    copies: usize,
    top_k: usize,
}

impl Timer {
    /// Puts the weights on the device.
    ///
    /// # Errors
    /// If the device has no timestamps or no room.
    pub fn new(device: &dyn Device, shape: &Shape) -> Result<Self> {
        let copies = COLD_BYTES.div_ceil(shape.bytes().max(1)).clamp(1, COPIES_MAX);
        let (graph, top_k) = match shape {
            Shape::Linear(matrix) => (linears(matrix, copies), 0),
            Shape::Experts { layout, top_k, activation } => {
                (experts(layout, *top_k, *activation, copies), *top_k)
            }
        };
        let graph = Arc::new(graph);
        let mut backend = device
            .backend(graph.clone(), Capacity { batch: 1, context: 1, kv: KvFormat::default() })?;
        match shape {
            Shape::Linear(matrix) => {
                let bytes = random(matrix);
                for weight in 0..copies {
                    backend.load_weight(WeightId(weight as u32), matrix, &bytes)?;
                }
            }
            Shape::Experts { layout, .. } => {
                let count = copies * top_k;
                backend.alloc_slots(&[SlotClass { layout: *layout, count }], &vec![0; copies])?;
                let mut bytes = vec![0; layout.bytes];
                for matrix in [layout.gate, layout.up, layout.down] {
                    bytes[matrix.offset..][..matrix.bytes()].copy_from_slice(&random(&matrix));
                }
                for slot in 0..count {
                    backend.fill_slot(Slot { class: 0, index: slot as u32 }, &bytes)?;
                }
            }
        }
        if backend.counters().device_seconds.is_none() {
            let what = "timing kernels: the adapter has no timestamps".into();
            return Err(BackendError::Unsupported(what));
        }
        Ok(Self { backend, graph, copies, top_k })
    }

    /// The device, for people.
    pub fn describe(&self) -> String {
        self.backend.describe()
    }

    /// Mean seconds of one pass over one copy.
    pub fn time(&mut self) -> Result<f64> {
        let backend = self.backend.as_mut();
        let before = backend.counters();
        backend.begin(&Step { tokens: &[0], position: 0, logits: LogitRows::None })?;
        let mut plain: Range<usize> = 0..0;
        for (op, kind) in self.graph.ops.iter().enumerate() {
            let Op::Experts { moe, .. } = kind else {
                plain.end = op + 1;
                continue;
            };
            backend.run(plain)?;
            plain = op + 1..op + 1;
            backend.routing(op)?;
            let first = usize::from(moe.0) * self.top_k;
            let slots = (first..first + self.top_k)
                .map(|index| Some(Slot { class: 0, index: index as u32 }));
            backend.run_experts(op, &slots.collect::<Vec<_>>())?;
            backend.finish_experts(op)?;
        }
        backend.run(plain)?;
        let seconds = backend.counters().since(&before).device_seconds;
        Ok(seconds.unwrap_or_default() / self.copies as f64)
    }
}

fn random(matrix: &MatrixSpec) -> Vec<u8> {
    let mut bytes = vec![0; matrix.bytes()];
    random_blocks(matrix.dtype, 1, &mut bytes);
    bytes
}

/// The same linear op over `copies` different weights.
fn linears(matrix: &MatrixSpec, copies: usize) -> Graph {
    let mut graph = Graph { vocab: 1, context_max: 1, ..Graph::default() };
    let x = graph.buffer("x", matrix.cols);
    let out = graph.buffer("out", matrix.rows);
    for copy in 0..copies {
        let weight = graph.weight(format!("copy {copy}"), matrix.rows, matrix.cols);
        graph.ops.push(Op::Linear { x, weight, bias: None, out });
    }
    graph
}

/// `copies` layers that have exactly as many experts as a token uses. The routers' logits are all
/// zero, so every expert is chosen.
fn experts(layout: &ExpertLayout, top_k: usize, activation: Activation, copies: usize) -> Graph {
    let (hidden, ff) = (layout.gate.cols, layout.gate.rows);
    let mut graph = Graph { vocab: 1, context_max: 1, ..Graph::default() };
    let x = graph.buffer("x", hidden);
    let logits = graph.buffer("router", top_k);
    let out = graph.buffer("out", hidden);
    for layer in 0..copies {
        let none = || ExpertTensors { gate: "".into(), up: "".into(), down: "".into() };
        let experts = (0..top_k).map(|_| none()).collect();
        let biases = None;
        graph.moe.push(Moe { layer, top_k, hidden, ff, activation, biases, experts });
        let moe = MoeId(layer as u16);
        let scoring = Scoring::Softmax { renormalise: true };
        graph.ops.push(Op::Route { moe, logits, scoring, bias: None });
        graph.ops.push(Op::Experts { moe, x, out });
    }
    graph
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::CpuDevice;
    use doppler_store::DType;

    fn matrix(dtype: DType, rows: usize, cols: usize, offset: usize) -> MatrixSpec {
        MatrixSpec { dtype, rows, cols, offset }
    }

    #[test]
    fn linears_and_experts_are_timed_and_named_by_their_types() {
        let gate = matrix(DType::Q4K, 32, 512, 0);
        let up = matrix(DType::Q4K, 32, 512, gate.bytes());
        let down = matrix(DType::Q5_0, 512, 32, 2 * gate.bytes());
        let bytes = down.offset + down.bytes();
        let layout = ExpertLayout { gate, up, down, bytes };
        let activation = Activation::Silu;
        for (shape, name, read) in [
            (Shape::Linear(matrix(DType::Q6K, 40, 256, 0)), "linear_q6_k", 40 * 210),
            (Shape::Experts { layout, top_k: 3, activation }, "experts_q4_k_q5_0", 3 * bytes),
        ] {
            assert_eq!((shape.name().as_str(), shape.bytes()), (name, read));
            let mut timer = Timer::new(&CpuDevice, &shape).unwrap();
            assert_eq!(timer.copies, COPIES_MAX);
            let before = timer.backend.counters();
            assert!(timer.time().unwrap() > 0.0);
            let done = timer.backend.counters().since(&before);
            // A linear op is one dispatch; a layer's experts are four: route, gate and up, down,
            // sum.
            let ops = if timer.top_k == 0 { 1 } else { 4 };
            assert_eq!(done.dispatches, (ops * COPIES_MAX) as u64);
        }
    }
}
