//! The forms of a product for many tokens, beside those for one: a weight is unpacked
//! once for several tokens. Both are in the plan; a step's number of rows says which runs.

use super::dispatch::{Dispatch, Grid, Rows};
use super::params;
use super::pipelines::{Reduction, format_name};
use super::plan::Builder;
use crate::infer::backend::Result;
use crate::store::DType;

/// From how many rows on a tile is worth its empty part. On a software adapter one row at a
/// time costs what a whole tile does from about 20 rows on.
const fn tiled_min(reduction: Reduction) -> u32 {
    match reduction {
        Reduction::Lane => 24,
        Reduction::Group => 16,
    }
}

/// shared/tile.wgsl
const TILE: u32 = 64;
/// A linear product over one piece of a matrix.
pub(super) struct Product<'a> {
    pub dtype: DType,
    pub params: params::Linear,
    /// x, weights, bias, result
    pub storage: [&'a wgpu::Buffer; 4],
    pub rows: Rows,
}

impl Builder<'_> {
    /// The form for many rows; its `when` says from how many on.
    pub fn linear_batch(&mut self, product: &Product<'_>) -> Result<Dispatch> {
        let Product { dtype, params, storage, rows } = product;
        let kernel = format!("linear_tile_{}", format_name(*dtype));
        let grid = Grid::tiles(TILE, params.rows.div_ceil(TILE));
        let mut dispatch = self.dispatch_grid(&kernel, params, storage, *rows, grid)?;
        dispatch.when = tiled_min(self.parts.device.pipelines().reduction)..=u32::MAX;
        Ok(dispatch)
    }
}
