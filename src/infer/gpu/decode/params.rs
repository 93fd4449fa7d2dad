//! The decode kernels' `Params` under short names, and how they describe a matrix.

pub(in crate::gpu) use crate::cpu::pack::pieces;
pub(in crate::gpu) use crate::gpu::params::{
    DecodeAside as Aside, DecodeAttention as Attention, DecodeCombine as Combine,
    DecodeExpertDown as ExpertDown, DecodeExpertGateUp as ExpertGateUp, DecodeFetch as Fetch,
    DecodeGateUp as GateUp, DecodeLayerNorm as LayerNorm, DecodeLinear as Linear,
    DecodeNorm as Norm, DecodeNormAdd as NormAdd, DecodeNormAddNorm as NormAddNorm,
    DecodePack as Pack, DecodeRoute as Route, DecodeSeek as Seek, Pieces, RowsGateUp, RowsLinear,
    Segment, Softcap,
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
            format: packed.dtype as u32,
        }
    }
}

/// Items of one row that the invocations of a team divide among themselves (`items` in
/// shared/pieces.wgsl): pieces, or vec4s of plain weights and of FP8's.
pub(in crate::gpu) fn items(packed: &Packed) -> usize {
    match packed.dtype {
        DType::Fp8 => 2 * pieces(packed.cols),
        dtype if dtype.is_quantised() => pieces(packed.cols),
        dtype => packed.cols.div_ceil(16 / dtype.block_bytes()),
    }
}
