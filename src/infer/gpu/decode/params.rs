//! The decode kernels' `Params`, word for word.

use bytemuck::{Pod, Zeroable};

use crate::cpu::pack::packed_words;
pub(in crate::gpu) use crate::cpu::pack::pieces;
use crate::gpu::repack::Packed;
use doppler_store::DType;

/// shared/pieces.wgsl, padded as a uniform's members are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(in crate::gpu) struct Pieces {
    pub base: u32,
    pub blocks: u32,
    pub row_blocks: u32,
    pub pieces: u32,
    pub format: u32,
    pad: [u32; 3],
}

/// Bytes of a packed vector (shared/pack.wgsl).
pub(in crate::gpu) const fn packed_bytes(cols: usize) -> usize {
    packed_words(cols) * 4
}

impl Pieces {
    /// For planes that begin at byte `offset` of the binding.
    pub fn of(packed: &Packed, offset: usize) -> Self {
        let matrix = packed.matrix(offset);
        Self {
            base: matrix.base / 4,
            blocks: matrix.blocks,
            row_blocks: matrix.row_blocks,
            pieces: pieces(packed.cols) as u32,
            format: format(packed.dtype),
            pad: [0; 3],
        }
    }
}

/// What the invocations of a team take turns at in one row (`items` in shared/pieces.wgsl).
pub(in crate::gpu) fn items(packed: &Packed) -> usize {
    match packed.dtype {
        DType::F32 => packed.cols.div_ceil(4),
        DType::F16 | DType::Bf16 => packed.cols.div_ceil(8),
        _ => pieces(packed.cols),
    }
}

/// A format's code in shared/pieces.wgsl.
pub(in crate::gpu) const fn format(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Bf16 => 2,
        DType::Q4K => 3,
        DType::Q5K => 4,
        DType::Q6K => 5,
        DType::Q8_0 => 6,
        DType::Q5_0 => 7,
    }
}

#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(in crate::gpu) struct Norm {
    pub cols: u32,
    pub pieces: u32,
    pub eps: f32,
}

/// decode_linear.wgsl: one matrix of the dispatch.
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(in crate::gpu) struct Segment {
    pub base: u32,
    pub blocks: u32,
    pub row_blocks: u32,
    pub pieces: u32,
    pub format: u32,
    pub rows: u32,
    pub result_at: u32,
    pub end: u32,
}

#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(in crate::gpu) struct Linear {
    pub segments: [Segment; 3],
    pub split: u32,
    pub has_bias: u32,
    pub adds: u32,
    pub pad: u32,
}

#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(in crate::gpu) struct Attention {
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub pairs: u32,
    pub window: u32,
    pub splits_max: u32,
    pub normed: u32,
    pub eps: f32,
    pub scale: f32,
}

#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(in crate::gpu) struct Combine {
    pub heads: u32,
    pub head_dim: u32,
    pub window: u32,
    pub splits_max: u32,
    pub pieces: u32,
}

#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(in crate::gpu) struct GateUp {
    pub gate: Pieces,
    pub up: Pieces,
    pub rows: u32,
    pub pieces: u32,
    pub activation: u32,
    pub pad: u32,
}

#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(in crate::gpu) struct ExpertGateUp {
    pub gate: Pieces,
    pub up: Pieces,
    pub rows: u32,
    pub pieces: u32,
    pub activation: u32,
    pub slot_stride: u32,
}

#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(in crate::gpu) struct ExpertDown {
    pub down: Pieces,
    pub rows: u32,
    pub top_k: u32,
    pub slot_stride: u32,
    pub split: u32,
}

#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(in crate::gpu) struct Route {
    pub experts: u32,
    pub top_k: u32,
    pub renormalise: u32,
    pub table_at: u32,
    pub ids_at: u32,
    pub halt: u32,
    pub quads: u32,
    pub shelf_at: u32,
    pub free_at: u32,
    pub taker_at: u32,
    pub taken_at: u32,
}

#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(in crate::gpu) struct Fetch {
    pub quads: u32,
    pub shares: u32,
}
