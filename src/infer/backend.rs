//! What the engine asks of a device: hold weights, hold experts in slots, run
//! ops. Implemented by `cpu` and `gpu`; a session drives either the same way.
//!
//! Order of calls: `load_weight` for every weight of the graph, `alloc_slots`
//! once, then steps: `begin`, `run` over the ops between `Experts` ops, for each
//! `Experts` op `routing`, any number of `fill_slot` + `run_experts` waves and one
//! `finish_experts`, and at the end `logits`.

use std::ops::Range;

use serde::Serialize;

use super::graph::WeightId;
use super::graph::{ExpertLayout, Graph, MatrixSpec};

/// Sizes fixed when a backend is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// The most tokens one step may carry (prefill batch).
    pub batch: usize,
    /// The most positions the KV cache holds.
    pub context: usize,
}

/// Slots of one layout: they all hold experts of this shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotClass {
    pub layout: ExpertLayout,
    pub count: usize,
}

/// One expert-sized place on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    /// Index into the classes given to `alloc_slots`.
    pub class: u16,
    pub index: u32,
}

/// Which rows of the batch need logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a prefill batch that is not the last.
    None,
    Last,
    All,
}

/// One step's input: consecutive tokens of the one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// 1..=`Capacity::batch` token ids, each below the vocabulary's size.
    pub tokens: &'a [u32],
    /// The first token's position; the cache holds `0..position`.
    pub position: usize,
    pub logits: LogitRows,
}

/// Why a device could not do it.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// Nothing usable on this machine.
    #[error("no usable device: {0}")]
    NoDevice(String),
    /// An allocation failed; a smaller budget may work.
    #[error("out of device memory: {what} needs {bytes} bytes")]
    OutOfMemory { what: String, bytes: u64 },
    /// The device is gone; the session is over.
    #[error("the device was lost: {0}")]
    Lost(String),
    /// The graph asks for something this backend has no kernel for.
    #[error("not supported on this backend: {0}")]
    Unsupported(String),
}

/// What a backend did since it was made. They only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Counters {
    /// Kernels started; on the CPU, ops run.
    pub dispatches: u64,
    /// Times that work was handed to the device.
    pub submissions: u64,
    /// Times that the host waited for a result of the device.
    pub readbacks: u64,
    /// Bytes given to the device: weights, experts, parameters.
    pub uploaded_bytes: u64,
    /// How long the device computed, where it can tell.
    pub device_seconds: Option<f64>,
}

impl Counters {
    /// What was done after `before`.
    pub fn since(&self, before: &Self) -> Self {
        let seconds = self.device_seconds.zip(before.device_seconds);
        Self {
            dispatches: self.dispatches - before.dispatches,
            submissions: self.submissions - before.submissions,
            readbacks: self.readbacks - before.readbacks,
            uploaded_bytes: self.uploaded_bytes - before.uploaded_bytes,
            device_seconds: seconds.map(|(now, before)| now - before),
        }
    }
}

/// What a device's memory does at best.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bandwidth {
    /// Bytes a second, read plus written, of copies on the device; on the CPU, of reads.
    pub copy_bytes_s: f64,
    /// Bytes a second from the host's memory into the device's.
    pub upload_bytes_s: f64,
}

pub type Result<T> = std::result::Result<T, BackendError>;

/// A device that executes a [`Graph`].
pub trait Backend: Send {
    /// For people: "cpu (2 threads, avx2)" or the adapter's name and driver.
    fn describe(&self) -> String;

    /// Device bytes a trunk weight will take, repacking included.
    fn weight_bytes(&self, spec: &MatrixSpec) -> u64;

    /// Device bytes one slot of this layout will take.
    fn slot_bytes(&self, layout: &ExpertLayout) -> u64;

    /// Device bytes of activations and KV cache, already allocated.
    fn fixed_bytes(&self) -> u64;

    /// Gives trunk weight `id` its stored bytes (`spec.offset` is 0; shape checked by the caller).
    fn load_weight(&mut self, id: WeightId, spec: &MatrixSpec, bytes: &[u8]) -> Result<()>;

    fn alloc_slots(&mut self, classes: &[SlotClass]) -> Result<()>;

    /// Puts an expert's stored bytes (`layout.bytes` of them) into a slot.
    fn fill_slot(&mut self, slot: Slot, bytes: &[u8]) -> Result<()>;

    fn begin(&mut self, step: &Step<'_>) -> Result<()>;

    /// Runs `graph.ops[ops]`, none of which is an `Experts` op.
    fn run(&mut self, ops: Range<usize>) -> Result<()>;

    /// The experts chosen by the `Route` before the `Experts` op at `op`:
    /// `tokens * top_k` ids, token by token, in order of choice.
    fn routing(&mut self, op: usize) -> Result<Vec<u32>>;

    /// Runs the (token, choice) pairs whose expert has a slot in `slots`
    /// (indexed by expert id); the others keep for another wave.
    fn run_experts(&mut self, op: usize, slots: &[Option<Slot>]) -> Result<()>;

    /// Sums the pairs into the op's `out`, in the order of choice.
    fn finish_experts(&mut self, op: usize) -> Result<()>;

    /// Logits of the rows that the step asked for, `[rows, vocab]`.
    fn logits(&mut self) -> Result<Vec<f32>>;

    /// What was done so far. May wait for the device, if it was opened to be timed.
    fn counters(&self) -> Counters;
}

/// Makes a backend for a graph.
pub trait Device {
    fn backend(&self, graph: std::sync::Arc<Graph>, capacity: Capacity)
    -> Result<Box<dyn Backend>>;

    /// Measures the device's memory: takes a second or so, and some hundred megabytes of it.
    fn bandwidth(&self) -> Result<Bandwidth>;
}
