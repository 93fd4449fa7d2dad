//! The variants of a product for many tokens, beside those for one: a weight is unpacked once for a
//! whole tile of tokens. Both are in the plan, and a step's number of rows decides which one runs.
//! A sum never depends on what else is in its tile.
//!
//! Quantised weights use cooperative matrices if the adapter has them. Plain weights do not,
//! because half-precision activations would add more error than their own rounding.

use super::buffers::{PAIR_TILE, stride};
use super::cooperative::Cooperative;
use super::dispatch::{Grid, Rows};
use super::lower::{Lower, Place, Recipe, recipe, recipe_grid, word};
use super::params;
use super::pipelines::Reduction;
use super::tiles::{self, ROWS, Way};
use crate::backend::{KvFormat, Result};
use crate::graph::{Buf, Moe, MoeId};
use doppler_store::DType;

/// shared/tile.wgsl
const TILE: u32 = 64;
/// expert_group.wgsl
const EXPERTS_MAX: usize = 1024;
/// The least number of rows at which cooperative matrices pay although part of them is empty.
const COOPERATIVE_MIN: u32 = 16;

/// The least number of rows at which an f32 tile pays although part of it is empty. On a software
/// adapter, about 20 single rows cost as much as a whole tile.
const fn tiled_min(reduction: Reduction) -> u32 {
    match reduction {
        Reduction::Lane => 24,
        Reduction::Group => 16,
    }
}

/// Queries of one workgroup, and the widest head that fits (attention_tile.wgsl).
const QUERIES: u32 = 32;
const TILED_HEAD_DIM_MAX: u32 = 128;

/// A linear product over one row range of a matrix.
pub(super) struct LinearBatch {
    pub dtype: DType,
    pub params: params::Linear,
    pub x: Buf,
    pub weights: Place,
    pub bias: Place,
    pub result: Place,
    pub rows: Rows,
}

/// One chunk's experts of one layer.
pub(super) struct ExpertProducts<'a> {
    pub spec: &'a Moe,
    pub x: Buf,
    pub inner: DType,
    pub outer: DType,
    pub gate_up: params::ExpertGateUp,
    pub down: params::ExpertDown,
    /// Of gates and ups.
    pub biases: Option<Place>,
    pub weights: Place,
    pub table: Place,
}

impl Lower<'_> {
    /// Whether products with weights of this format run on cooperative matrices.
    fn multiplies(&self, dtype: DType) -> bool {
        self.cooperative.is_some_and(Cooperative::multiplies) && dtype.is_quantised()
    }

    /// The variant for many rows, and the least number of rows at which it runs.
    pub fn linear_batch(&mut self, product: &LinearBatch) -> Result<(Vec<Recipe>, u32)> {
        let LinearBatch { dtype, params, x, weights, bias, result, rows } = *product;
        let format = dtype.file_name();
        // Row ranges of logits can begin at any row, but the halved rows are those of the step.
        if !self.multiplies(dtype) || rows != Rows::Tokens {
            let from = tiled_min(self.reduction);
            let kernel = format!("linear_tile_{format}");
            let grid = Grid::tiles(TILE, params.rows.div_ceil(TILE));
            let storage = [Place::Activation(x), weights, bias, result];
            let mut tiled = recipe_grid(&kernel, &params, &storage, rows, grid);
            tiled.when = from..=u32::MAX;
            return Ok((vec![tiled], from));
        }
        let mut dispatches = Vec::new();
        if self.halved != Some(x) {
            self.halved = Some(x);
            let source = Place::Activation(x);
            let mut halve = self.halve(source, self.width(x), 1)?;
            halve.when = COOPERATIVE_MIN..=u32::MAX;
            dispatches.push(halve);
        }
        for way in
            tiles::linear(params.rows, params.weight.units, COOPERATIVE_MIN, word(self.batch)?)
        {
            dispatches.extend(linear_coop(product, &way));
        }
        Ok((dispatches, COOPERATIVE_MIN))
    }

    /// Converts `per_token` rows of each token into `halves`.
    fn halve(&mut self, source: Place, width: usize, per_token: u32) -> Result<Recipe> {
        let params = params::Halve { stride: word(stride(width) / 4)?, per_token };
        let storage = [source, Place::Halves, Place::Scales];
        Ok(recipe("halve", &params, &storage, Rows::Tokens, (per_token as usize, 1)))
    }

    /// Attention for many tokens, and the least number of tokens at which it runs. `None` if a head
    /// is too wide.
    pub fn attention_batch(
        &mut self,
        params: &params::Attention,
        storage: &[Place],
    ) -> Result<Option<(Recipe, u32)>> {
        let kv = self.kv;
        let per_row = params.heads / params.kv_heads;
        let cooperative = self.cooperative;
        let halves =
            |kind: &Cooperative| kv == KvFormat::F16 && params.head_dim <= kind.head_dim_max();
        if let Some(kind) = cooperative.filter(halves) {
            let kernel = format!("attention_coop_{}", kind.attention());
            let grid = Grid::Tiles { per_row, tile: kind.queries(), spare: 0, y: params.kv_heads };
            let mut tiled = recipe_grid(&kernel, params, storage, Rows::Tokens, grid);
            tiled.when = COOPERATIVE_MIN..=u32::MAX;
            return Ok(Some((tiled, COOPERATIVE_MIN)));
        }
        Ok(self.attention_tiles(params, storage, ""))
    }

    /// The same in tiles of f32. `variant` follows the kernel's name.
    pub fn attention_tiles(
        &self,
        params: &params::Attention,
        storage: &[Place],
        variant: &str,
    ) -> Option<(Recipe, u32)> {
        if params.head_dim > TILED_HEAD_DIM_MAX {
            return None;
        }
        // On a software adapter a whole tile costs as much as four single tokens.
        let from = match self.reduction {
            Reduction::Lane => 4,
            Reduction::Group => tiled_min(Reduction::Group),
        };
        let per_row = params.heads / params.kv_heads;
        let kernel = format!("attention{variant}_tile_{}", self.kv.name());
        let grid = Grid::Tiles { per_row, tile: QUERIES, spare: 0, y: params.kv_heads };
        let mut tiled = recipe_grid(&kernel, params, storage, Rows::Tokens, grid);
        tiled.when = from..=u32::MAX;
        Some((tiled, from))
    }

    /// The least number of tokens at which a layer's pairs are grouped by expert: enough pairs for
    /// each expert.
    fn grouped_min(&self, spec: &Moe, cooperative: bool) -> Option<u32> {
        let experts = spec.experts.len();
        let (least, pairs_an_expert) = match self.reduction {
            _ if cooperative => (COOPERATIVE_MIN, 2),
            Reduction::Lane => (tiled_min(Reduction::Lane), 20),
            Reduction::Group => (tiled_min(Reduction::Group), 8),
        };
        let tokens = (pairs_an_expert * experts).div_ceil(spec.top_k);
        (experts <= EXPERTS_MAX).then(|| least.max(u32::try_from(tokens).unwrap_or(u32::MAX)))
    }

    /// The ways of a layer's experts for many tokens. Pairs are in tiles of the same size for all
    /// of a layer's products, and products in f32 have one size.
    fn expert_ways(&self, spec: &Moe) -> Option<Vec<Way>> {
        let from = self.grouped_min(spec, self.cooperative.is_some())?;
        let all = self.chunks.iter().all(|chunk| {
            [chunk.gate, chunk.up, chunk.down].iter().all(|(of, _)| self.multiplies(of.dtype))
        });
        if all && spec.biases.is_none() {
            return Some(tiles::experts(spec.experts.len(), spec.top_k, from));
        }
        Some(vec![Way { tile: PAIR_TILE as u32, parts: 1, when: from..=u32::MAX }])
    }

    /// Sorts the pairs of a layer by expert.
    pub fn group(&mut self, moe: MoeId, spec: &Moe) -> Result<Vec<Recipe>> {
        let (experts, top_k) = (word(spec.experts.len())?, word(spec.top_k)?);
        let storage = [Place::Ids(moe), Place::PairOrder, Place::PairTiles];
        let recipes = self.expert_ways(spec).unwrap_or_default().into_iter().map(|way| {
            let params = params::ExpertGroup { experts, top_k, tile: way.tile };
            let mut group = recipe_grid("expert_group", &params, &storage, Rows::Tokens, Grid::One);
            group.when = way.when;
            group
        });
        Ok(recipes.collect())
    }

    /// The variants of a chunk's experts for many tokens, and the least number of tokens at which
    /// they run.
    pub fn experts_batch(
        &mut self,
        experts: &ExpertProducts<'_>,
    ) -> Result<Option<(Vec<Recipe>, u32)>> {
        let ExpertProducts { spec, x, inner, outer, biases, weights, table, .. } = *experts;
        let ExpertProducts { gate_up, down, .. } = experts;
        let Some(ways) = self.expert_ways(spec) else { return Ok(None) };
        let from = ways.iter().map(|way| *way.when.start()).min().unwrap_or(u32::MAX);
        let per_token = word(spec.top_k)?;
        let spare = word(spec.experts.len())?;
        let grid = |tile, y| Grid::Tiles { per_row: per_token, tile, spare, y };
        let (order, tiles) = (Place::PairOrder, Place::PairTiles);
        let (halves, scales) = (Place::Halves, Place::Scales);
        let (source, pairs, outputs) = (Place::Activation(x), Place::PairInner, Place::PairOutputs);
        let mut dispatches = Vec::new();
        let always = |mut recipe: Recipe| {
            recipe.when = from..=u32::MAX;
            recipe
        };
        let format = inner.file_name();
        // The kernel on cooperative matrices adds no biases.
        if self.multiplies(inner) && biases.is_none() {
            dispatches.push(always(self.halve(source, spec.hidden, 1)?));
            let storage = [halves, scales, weights, order, tiles, table, pairs];
            for way in &ways {
                let grid = grid(way.tile, gate_up.rows.div_ceil(ROWS / 2));
                for suffix in way.kernels() {
                    let kernel = format!("expert_gate_up_coop_{format}_{suffix}");
                    let mut one = recipe_grid(&kernel, gate_up, &storage, Rows::Tokens, grid);
                    one.when = way.when.clone();
                    dispatches.push(one);
                }
            }
        } else {
            let biased = if biases.is_some() { "biased_" } else { "" };
            let kernel = format!("expert_gate_up_{biased}tile_{format}");
            let mut storage = vec![source, weights, order, tiles, table, pairs];
            storage.extend(biases);
            let grid = grid(PAIR_TILE as u32, gate_up.rows.div_ceil(TILE / 2));
            dispatches.push(always(recipe_grid(&kernel, gate_up, &storage, Rows::Tokens, grid)));
        }
        let format = outer.file_name();
        if self.multiplies(outer) {
            dispatches.push(always(self.halve(pairs, spec.ff, per_token)?));
            let storage = [halves, scales, weights, order, tiles, table, outputs];
            for way in &ways {
                let grid = grid(way.tile, down.rows.div_ceil(ROWS));
                for suffix in way.kernels() {
                    let kernel = format!("expert_down_coop_{format}_{suffix}");
                    let mut one = recipe_grid(&kernel, down, &storage, Rows::Tokens, grid);
                    one.when = way.when.clone();
                    dispatches.push(one);
                }
            }
        } else {
            let kernel = format!("expert_down_tile_{format}");
            let storage = [pairs, weights, order, tiles, table, outputs];
            let grid = grid(PAIR_TILE as u32, down.rows.div_ceil(TILE));
            dispatches.push(always(recipe_grid(&kernel, down, &storage, Rows::Tokens, grid)));
        }
        Ok(Some((dispatches, from)))
    }
}

/// A product in one of its ways. Its columns may be divided into parts, whose sums are added up.
fn linear_coop(product: &LinearBatch, way: &Way) -> Vec<Recipe> {
    let LinearBatch { dtype, params, weights, bias, result, rows, .. } = *product;
    let kernel = format!("linear_coop_{}_{}", dtype.file_name(), way.suffix());
    let (halves, scales) = (Place::Halves, Place::Scales);
    let down = params.rows.div_ceil(ROWS);
    let grid = Grid::tiles(way.tile, down * way.parts);
    let mut recipes = Vec::new();
    if way.parts == 1 {
        let storage = [halves, scales, weights, bias, result];
        recipes.push(recipe_grid(&kernel, &params, &storage, rows, grid));
    } else {
        let stride = params.rows;
        let part = params::Linear { row_start: 0, result_stride: stride, has_bias: 0, ..params };
        let storage = [halves, scales, weights, Place::Empty, Place::Parts];
        recipes.push(recipe_grid(&kernel, &part, &storage, rows, grid));
        let sum = params::SumParts {
            row_start: params.row_start,
            rows: params.rows,
            parts: way.parts,
            stride,
            result_stride: params.result_stride,
            has_bias: params.has_bias,
        };
        let storage = [Place::Parts, bias, result];
        recipes.push(recipe("sum_parts", &sum, &storage, rows, (params.rows as usize, 64)));
    }
    recipes.iter_mut().for_each(|recipe| recipe.when = way.when.clone());
    recipes
}
