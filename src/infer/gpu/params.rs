//! The kernels' `Params`, word for word, and the arena they lie in.
//!
//! All parameters of a plan are written once, when it is made, into one uniform
//! buffer; a dispatch names its slot by a dynamic offset. What changes from step
//! to step is [`Step`] alone.

use bytemuck::{Pod, Zeroable};

/// Bytes of one slot of the arena; at least any kernel's `Params`.
pub(super) const ARENA_SLOT: u64 = 256;

/// shared/step.wgsl
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Step {
    pub tokens: u32,
    pub position: u32,
    pub logit_start: u32,
    pub logit_rows: u32,
}

/// shared/matrix.wgsl
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Matrix {
    pub base: u32,
    pub blocks: u32,
    pub row_blocks: u32,
    pub units: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Embed {
    pub table: Matrix,
    pub row_start: u32,
    pub rows: u32,
    pub cols: u32,
    pub stride: u32,
    pub scale: f32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct RmsNorm {
    pub cols: u32,
    pub groups: u32,
    pub source_stride: u32,
    pub result_stride: u32,
    pub eps: f32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Linear {
    pub weight: Matrix,
    pub row_start: u32,
    pub rows: u32,
    pub x_stride: u32,
    pub result_stride: u32,
    pub has_bias: u32,
    pub logits: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Rope {
    pub heads: u32,
    pub head_dim: u32,
    pub pairs: u32,
    pub stride: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct KvWrite {
    pub width: u32,
    pub k_stride: u32,
    pub v_stride: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Attention {
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub q_stride: u32,
    pub result_stride: u32,
    pub window: u32,
    pub scale: f32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Gated {
    pub stride: u32,
    pub activation: u32,
    pub swapped: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Add {
    pub stride: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Route {
    pub experts: u32,
    pub top_k: u32,
    pub stride: u32,
    pub renormalise: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct ExpertGateUp {
    pub gate: Matrix,
    pub up: Matrix,
    pub rows: u32,
    pub top_k: u32,
    pub slot_stride: u32,
    pub slots_at: u32,
    pub x_stride: u32,
    pub result_stride: u32,
    pub activation: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct ExpertDown {
    pub down: Matrix,
    pub rows: u32,
    pub top_k: u32,
    pub slot_stride: u32,
    pub slots_at: u32,
    pub x_stride: u32,
    pub result_stride: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct ExpertSum {
    pub cols: u32,
    pub top_k: u32,
    pub pair_stride: u32,
    pub result_stride: u32,
}

/// shared/odds.wgsl
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Sample {
    pub vocab: u32,
    pub greedy: u32,
    pub relief: u32,
    pub penalty: u32,
    pub window: u32,
    pub unit: i32,
    pub scale: u32,
    pub top_k: u32,
    pub top_p: u32,
    pub seed_low: u32,
    pub seed_high: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct ExpertGroup {
    pub experts: u32,
    pub top_k: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Halve {
    pub stride: u32,
    pub per_token: u32,
}

/// Parameters gathered while a plan is made.
#[derive(Default)]
pub(super) struct Arena {
    bytes: Vec<u8>,
}

impl Arena {
    /// Takes a kernel's parameters; returns their dynamic offset.
    pub fn push(&mut self, params: &[u8]) -> u32 {
        let offset = self.bytes.len();
        self.bytes.extend_from_slice(params);
        self.bytes.resize(offset + ARENA_SLOT as usize, 0);
        u32::try_from(offset).expect("a plan has fewer than 2^24 dispatches")
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
