//! What the engine asks of a device: hold weights, hold experts in slots, run ops. `cpu` and `gpu`
//! implement it, and the engine drives both in the same way.
//!
//! Order of calls: `load_weight` for every weight of the graph, `alloc_slots` once, then steps:
//! `queue`, then `advance` until it reports that the step is done. In between, a step may wait for
//! experts. The host then fills their slots and runs them in waves (`run_wave`). If the device
//! looks experts up by itself, the host says where they are (`place`) and resumes the step. Where
//! the device chooses tokens, several single-token steps may be in flight; those queued behind one
//! that halts do nothing and are dropped.

use std::ops::Range;

use serde::Serialize;

use super::graph::WeightId;
use super::graph::{ExpertLayout, Graph, MatrixSpec, MoeId};
use super::kv::BlockCopy;
use super::sampler::Sampler;

/// How a KV cache stores its elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvFormat {
    /// As they were computed.
    F32,
    /// Rounded to half precision when written, and clamped to its finite range. This halves the
    /// memory and the bytes that attention reads.
    #[default]
    F16,
}

impl KvFormat {
    /// The suffix of kernels that touch the cache.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        }
    }
}

/// Sizes fixed when a backend is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// The most tokens one step may carry (prefill batch).
    pub batch: usize,
    /// Positions that the KV caches hold at first, in whole blocks.
    pub context: usize,
    pub kv: KvFormat,
}

/// Slots of one layout: they all hold experts of this shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotClass {
    pub layout: ExpertLayout,
    pub count: usize,
}

/// Room for one expert on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    /// Index into the classes given to `alloc_slots`.
    pub class: u16,
    pub index: u32,
}

/// Which rows of the batch get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// No row: a prefill batch that is not the last.
    None,
    Last,
    All,
}

/// One step's input: consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// 1..=`Capacity::batch` token ids, each below the vocabulary's size.
    pub tokens: &'a [u32],
    /// The first token's position; the cache holds `0..position`.
    pub position: usize,
    pub logits: LogitRows,
}

/// One sequence's part in a step of several: a token at its end.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    pub token: u32,
    /// The token's position; the sequence's blocks hold `0..position`.
    pub position: usize,
    /// As in [`Backend::set_blocks`].
    pub blocks: &'a [u32],
    /// As in [`Backend::set_state`].
    pub state: u32,
}

/// Why a device could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// This machine has no usable device.
    #[error("no usable device: {0}")]
    NoDevice(String),
    /// An allocation failed; a smaller budget may work.
    #[error("out of device memory: {what} needs {bytes} bytes")]
    OutOfMemory { what: String, bytes: u64 },
    /// The device is gone, and the session with it.
    #[error("the device was lost: {0}")]
    Lost(String),
    /// The graph needs something that this backend has no kernel for.
    #[error("not supported on this backend: {0}")]
    Unsupported(String),
}

impl BackendError {
    /// A stable name for JSON and metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::NoDevice(_) => "no_device",
            Self::OutOfMemory { .. } => "out_of_memory",
            Self::Lost(_) => "device_lost",
            Self::Unsupported(_) => "unsupported",
        }
    }
}

/// What a backend has done since it was made. The numbers only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Counters {
    /// Kernels started; on the CPU, ops run.
    pub dispatches: u64,
    /// How often work was handed to the device.
    pub submissions: u64,
    /// How often the host waited for a result from the device.
    pub readbacks: u64,
    /// Bytes sent to the device: weights, experts, parameters.
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

/// The best bandwidth of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bandwidth {
    /// Bytes a second, read plus written, for copies on the device; on the CPU, for reads.
    pub copy_bytes_s: f64,
    /// Bytes a second from the host's memory into the device's.
    pub upload_bytes_s: f64,
}

pub type Result<T> = std::result::Result<T, BackendError>;

/// A device that executes a [`Graph`].
pub trait Backend: Ops + Send {
    /// For people: "cpu (2 threads, avx2)" or the adapter's name and driver.
    fn describe(&self) -> String;

    /// Device bytes that a trunk weight will take once repacked.
    fn weight_bytes(&self, spec: &MatrixSpec) -> u64;

    /// Device bytes that one slot of this layout will take.
    fn slot_bytes(&self, layout: &ExpertLayout) -> u64;

    /// Device bytes of activations and KV cache, already allocated.
    fn fixed_bytes(&self) -> u64;

    /// Gives trunk weight `id` its stored bytes (`spec.offset` is 0; shape checked by the caller).
    fn load_weight(&mut self, id: WeightId, spec: &MatrixSpec, bytes: &[u8]) -> Result<()>;

    /// Takes a graph that begins with the same buffers and weights in place of the present one: more
    /// of both may follow, and ops may lie between. Weights that both have stay loaded; those that
    /// only the present one has are freed. Call when no step is in flight.
    fn adapt(&mut self, graph: std::sync::Arc<Graph>) -> Result<()>;

    /// `class_of`: the class of each MoE layer's experts.
    fn alloc_slots(&mut self, classes: &[SlotClass], class_of: &[u16]) -> Result<()>;

    /// Device bytes that one class may take so that a dispatch can reach all its slots at once.
    fn class_bytes_max(&self) -> u64 {
        u64::MAX
    }

    /// Grows the caches to at least this many blocks of [`BLOCK`](super::kv::BLOCK) positions, all
    /// of which one sequence may use. Keeps their contents. Call when no step is in flight.
    fn grow(&mut self, blocks: usize) -> Result<()>;

    /// Device bytes of one block over all layers.
    fn block_bytes(&self) -> u64;

    /// What keys and values depend on besides the model and the tokens: the kernels that compute them
    /// and the caches' format.
    fn class(&self) -> String;

    /// Bytes of one block over all layers, as it is read and written: layer by layer its keys, then
    /// its values.
    fn stored_bytes(&self) -> u64;

    /// The bytes of a block of every layer's cache, after everything queued so far.
    fn read_block(&mut self, block: u32) -> Result<Vec<u8>>;

    /// Sets a block of every layer's cache, before everything queued later. There are
    /// [`Backend::stored_bytes`] bytes.
    fn write_block(&mut self, block: u32, bytes: &[u8]) -> Result<()>;

    /// Copies a block of every layer's cache, after everything queued so far.
    fn copy_block(&mut self, copy: BlockCopy) -> Result<()>;

    /// Sets the blocks of the sequence that steps next, in order of its positions. Initially they
    /// are 0, 1, 2 and so on.
    fn set_blocks(&mut self, blocks: &[u32]);

    /// Chooses between the ropes of short and of long sequences, for what is queued from now on. Call
    /// when no step is in flight. Initially they are those of short ones.
    fn set_stretched(&mut self, long: bool) -> Result<()>;

    /// Device bytes of one sequence's recurrent states over all layers. 0 if there are none.
    fn state_bytes(&self) -> u64;

    /// Makes room for the recurrent states of this many sequences; at first there is room for one.
    /// Keeps their contents. Call when no step is in flight.
    fn grow_states(&mut self, count: usize) -> Result<()>;

    /// Copies the states of one sequence to another's place, after everything queued so far.
    fn copy_state(&mut self, copy: BlockCopy) -> Result<()>;

    /// Sets where the states of the sequence that steps next are. At first that is 0.
    fn set_state(&mut self, slot: u32);

    /// How many elements of keys and values did not fit the cache's format and were clamped, in
    /// what was run before the last report.
    fn clamped(&self) -> u64;

    /// Says in which slot an expert is, if any, for everything submitted from now on. For backends
    /// that look experts up by themselves.
    fn place(&mut self, moe: MoeId, expert: u32, slot: Option<Slot>) {
        let _ = (moe, expert, slot);
    }

    /// Allows this many bytes of host memory to hold experts that lose their slots, for devices
    /// that can bring them back by themselves. Call once slots are allocated.
    fn set_aside(&mut self, bytes: u64) {
        let _ = bytes;
    }

    /// Puts an expert that the device has set aside into a slot. `false` if it was not set aside.
    fn bring(&mut self, moe: MoeId, expert: u32, slot: Slot) -> Result<bool> {
        let _ = (moe, expert, slot);
        Ok(false)
    }

    /// Puts an expert's stored bytes (`layout.bytes` of them) into a slot.
    fn fill_slot(&mut self, slot: Slot, bytes: &[u8]) -> Result<()>;

    /// How many more steps may be queued now: one if none is in flight; more only for single
    /// tokens.
    fn room(&self) -> usize;

    /// From here on the device chooses tokens as this sampler would. The sampler must `follow` each
    /// token reported. `false` if the device cannot choose in this way.
    fn choose(&mut self, sampler: &Sampler) -> Result<bool> {
        let _ = sampler;
        Ok(false)
    }

    /// Whether the device can bring back experts that it has set aside while a token runs.
    fn brings(&self) -> bool {
        false
    }

    /// Says which slots are empty. Until the next report the device may fill them by itself. Call
    /// when no token is in flight, before one is queued or resumed.
    fn offer(&mut self, free: &[Slot]) {
        let _ = free;
    }

    /// The most rows of a step of several sequences. 1: it runs them one after another.
    fn rows_max(&self) -> usize {
        1
    }

    /// How many steps of several sequences may be queued now: more than one only where each takes its
    /// tokens from the step before.
    fn rows_room(&self) -> usize {
        1
    }

    /// From here on the device chooses the rows' tokens as these samplers would, one for each row.
    /// Each must `follow` the token reported for its row. `false` if the device cannot choose so.
    fn choose_rows(&mut self, samplers: &[&Sampler]) -> Result<bool> {
        let _ = samplers;
        Ok(false)
    }

    /// Queues a step of several sequences. A row's result does not depend on the others: it is that
    /// of a step of its own. All rows get logits, or a choice. Call when no step is in flight, or when
    /// one is, of the same sequences, and whose choices are this one's tokens (`taken` says so).
    fn queue_rows(&mut self, rows: &[Row<'_>], taken: Taken, want: Want) -> Result<()> {
        let _ = (taken, want);
        Err(BackendError::Unsupported(format!("a step of {} sequences", rows.len())))
    }

    /// Queues a step at `position`. The caches hold every position before it.
    fn queue(&mut self, fed: Fed<'_>, position: usize, want: Want) -> Result<()>;

    /// Runs the oldest step in flight until it needs the host or is done. With `guess`, also
    /// reports what the router one layer ahead would choose, if that costs next to nothing.
    fn advance(&mut self, guess: bool) -> Result<Progress>;

    /// Runs the (token, choice) pairs of the layer at which the step waits whose expert has a slot
    /// in `slots` (indexed by expert id). The other pairs wait for a later wave.
    fn run_wave(&mut self, slots: &[Option<Slot>]) -> Result<()>;

    /// Queues the rest of the step that halted, from the given layer on.
    fn resume(&mut self, moe: MoeId) -> Result<()>;

    /// Abandons the step that halted or that waits for experts.
    fn give_up(&mut self);

    /// The logits of the last finished step, `[rows, vocab]`, if they were wanted.
    fn logits(&mut self) -> Result<Vec<f32>>;

    /// Runs one token whose experts all have slots, and times its kernels: their names in order,
    /// and seconds.
    fn profile(&mut self, token: u32, position: usize) -> Result<Vec<(&'static str, f64)>> {
        let _ = (token, position);
        Err(BackendError::Unsupported("timing the kernels of a token on this backend".into()))
    }

    /// What has been done so far. May wait for the device if it was opened for timing.
    fn counters(&self) -> Counters;
}

/// A step that runs op by op: `begin`; `run` over the ops between `Experts` ops; for each `Experts`
/// op, `routing`, any number of waves (`fill_slot`, then `run_experts`) and one `finish_experts`.
/// `walk` drives it.
pub trait Ops {
    fn begin(&mut self, step: &Step<'_>) -> Result<()>;

    /// Runs `graph.ops[ops]`, none of which is an `Experts` op.
    fn run(&mut self, ops: Range<usize>) -> Result<()>;

    /// The experts that the `Route` before the `Experts` op at `op` chose: `tokens * top_k` ids,
    /// token by token, in order of choice.
    fn routing(&mut self, op: usize) -> Result<Vec<u32>>;

    /// Whether `routing` costs so little that a layer's router may be asked for a guess, too.
    fn guesses(&self) -> bool {
        false
    }

    /// Runs the (token, choice) pairs whose expert has a slot in `slots` (indexed by expert id).
    /// The other pairs wait for a later wave.
    fn run_experts(&mut self, op: usize, slots: &[Option<Slot>]) -> Result<()>;

    /// Sums the pairs into the op's `out`, in the order of choice.
    fn finish_experts(&mut self, op: usize) -> Result<()>;
}

/// The input of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fed<'a> {
    /// 1..=`Capacity::batch` token ids.
    Tokens(&'a [u32]),
    /// The token that the device chose last.
    Chosen,
}

/// Where a step of several sequences takes its tokens from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    Rows,
    /// What the device chose in the step before.
    Chosen,
}

/// The result that a step should produce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    Logits(LogitRows),
    /// The next token, chosen on the device.
    Choice,
}

/// How far a step came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// What the router of a layer ahead would choose from the present state.
    Guess { moe: MoeId, likely: Vec<u32> },
    /// The step waits for these experts. Each must run in some wave before the step goes on.
    Experts { moe: MoeId, chosen: Vec<u32> },
    /// The step is done, or halted because an expert has no slot.
    Report(Report),
}

/// What became of a step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The MoE layer at which an expert had no slot. Nothing after it was computed.
    pub halted: Option<MoeId>,
    /// The token that the device chose, if it was asked to.
    pub token: u32,
    /// Those that it chose for the rows of a step of several sequences, if it was asked to.
    pub tokens: Vec<u32>,
    /// By MoE layer, the experts that this token chose, up to the layer that halted. Filled if the
    /// device looked them up by itself.
    pub experts: Vec<Vec<u32>>,
    /// By MoE layer, those of them that the device has brought into offered slots since the last
    /// report of this token.
    pub brought: Vec<Vec<(u32, Slot)>>,
}

/// Makes a backend for a graph.
pub trait Device {
    /// Whether this device can run a model with this graph and these layouts of experts (by MoE
    /// layer). Asked before anything is read or allocated. The error is for people.
    fn supports(&self, graph: &Graph, experts: &[ExpertLayout]) -> Result<()> {
        let _ = (graph, experts);
        Ok(())
    }

    fn backend(&self, graph: std::sync::Arc<Graph>, capacity: Capacity)
    -> Result<Box<dyn Backend>>;

    /// Measures the device's memory bandwidth. Takes about a second and some hundred megabytes of
    /// it.
    fn bandwidth(&self) -> Result<Bandwidth>;
}
