//! The decode kernels' `Params` by their short names, and how a matrix is named in them.

pub(in crate::gpu) use crate::cpu::pack::pieces;
pub(in crate::gpu) use crate::gpu::params::{
    DecodeAside as Aside, DecodeAttention as Attention, DecodeCombine as Combine,
    DecodeExpertDown as ExpertDown, DecodeExpertGateUp as ExpertGateUp, DecodeFetch as Fetch,
    DecodeGateUp as GateUp, DecodeLinear as Linear, DecodeNorm as Norm, DecodePack as Pack,
    DecodeRoute as Route, Pieces, Segment,
};
use crate::gpu::repack::Packed;
use doppler_store::DType;

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
