//! Products for rows of several sequences: rows_linear and rows_gate_up, which load and unpack a
//! weight once for all rows. A row's sum has the parts and the order that it has alone (`split`), so
//! its bits do not depend on what shares the step.
//!
//! There are kernels for groups of up to 4 and 8 rows. Both are in the list, and the step's number of rows
//! decides which one runs. A step of more than 8 rows has two groups, which unpack each weight once
//! each: kernels for 16 rows need so many registers that they took longer than twice those for 8.

use std::ops::RangeInclusive;

use super::super::live::Form;
use super::super::params::{self, Pieces};
use super::super::token::{Fuse, Rewritten};
use super::gate_up::GateUp;
use super::product::{LinearArgs, Part, filled, formats, split};
use crate::backend::Result;
use crate::cpu::pack::{packed_words, pieces};
use crate::gpu::buffers::stride;
use crate::gpu::decode::logits_stride;
use crate::gpu::dispatch::{Grid, Rows};
use crate::gpu::lower::{Place, Recipe, activation_code, recipe, word};
use crate::gpu::weights::RowRangeShape;

/// Rows of weights that a team sums at once.
const TOGETHER: usize = 4;

/// The most rows of a group, and the numbers of rows for which the kernel runs.
const KERNELS: [(u32, RangeInclusive<u32>); 2] = [(4, 1..=4), (8, 5..=16)];

impl Fuse<'_> {
    /// As `segments`, for several rows. `wide` is the number of all results of a row.
    pub(super) fn segments_together(
        &self,
        of: &[Part<'_>],
        product: &LinearArgs,
        wide: usize,
    ) -> Result<Vec<Recipe>> {
        let rows: usize = of.iter().map(|part| part.shape.packed.rows).sum();
        let split = split(rows, params::items(&of[0].shape.packed));
        let named = |of: &[Part<'_>]| formats(of.iter().map(|part| part.shape.packed.dtype));
        if named(of) != "any" {
            return self.with_split(of, product, wide, split);
        }
        // No kernel for rows reads any format.
        let each = of.chunks(1).map(|of| self.with_split(of, product, wide, split));
        Ok(each.collect::<Result<Vec<_>>>()?.concat())
    }

    fn with_split(
        &self,
        of: &[Part<'_>],
        product: &LinearArgs,
        wide: usize,
        split: usize,
    ) -> Result<Vec<Recipe>> {
        let graph = self.lower.graph;
        let (segments, end) = filled(of, 8 / split * TOGETHER)?;
        let result_stride = match product.result {
            Place::Activation(buf) => stride(graph.width(buf)),
            Place::Logits => logits_stride(graph.vocab),
            _ => wide,
        };
        let params = params::RowsLinear {
            segments,
            split: word(split)?,
            has_bias: u32::from(product.bias.is_some()),
            adds: u32::from(product.adds),
            x_stride: word(packed_words(graph.width(product.x)) / 4)?,
            result_stride: word(result_stride)?,
        };
        let bias = product.bias.unwrap_or(Place::Empty);
        let storage = [Place::Packed(product.x), of[0].place, bias, product.result];
        let kernel = format!("rows_linear_{}", formats(of.iter().map(|p| p.shape.packed.dtype)));
        let each = word(end)?;
        Ok(self.for_each_number(&kernel, each, |kernel, grid| {
            self.in_teams(kernel, &params, &storage, grid)
        }))
    }

    /// The variants of a kernel by its number of rows, with `each` workgroups for a group.
    fn for_each_number(
        &self,
        kernel: &str,
        each: u32,
        make: impl Fn(&str, Grid) -> Recipe,
    ) -> Vec<Recipe> {
        let variant = |(most, when): (u32, RangeInclusive<u32>)| {
            let grid = Grid::Groups { each, most };
            Recipe { when, ..make(&format!("{kernel}_{most}"), grid) }
        };
        KERNELS.map(variant).into()
    }
}

/// A gated product, whose matrices are in one buffer and have one shape.
pub(super) fn gate_up(
    fuse: &Fuse<'_>,
    found: &GateUp,
    (g, u): (&RowRangeShape, &RowRangeShape),
) -> Result<Rewritten> {
    let GateUp { x, gate, out, activation, .. } = *found;
    let rows = g.packed.rows;
    let params = params::RowsGateUp {
        gate: Pieces::of(&g.packed, g.at),
        up: Pieces::of(&u.packed, u.at),
        rows: word(rows)?,
        pieces: word(pieces(rows))?,
        activation: activation_code(activation),
        x_stride: word(packed_words(fuse.lower.graph.width(x)) / 4)?,
        ..params::RowsGateUp::default()
    };
    let storage = [Place::Packed(x), g.place(gate, 0), Place::Packed(out)];
    let kernel = format!("rows_gate_up_{}", g.packed.dtype.file_name());
    let each = word(pieces(rows) * 2)?;
    let recipes = fuse.for_each_number(&kernel, each, |kernel, grid| {
        fuse.in_teams(kernel, &params, &storage, grid)
    });
    let (reads, writes) = ([(x, Form::Packed)], [(out, Form::Packed)]);
    Ok(Rewritten::new(3, recipes, &reads, &writes))
}

/// Caps the logits, if there is a cap.
pub(super) fn softcap(vocab: usize, cap: Option<f32>) -> Result<Option<Recipe>> {
    let Some(cap) = cap else { return Ok(None) };
    let width = logits_stride(vocab);
    let params = params::Softcap { width: word(width)?, cap };
    Ok(Some(recipe("softcap", &params, &[Place::Logits], Rows::Logits, (width, 64))))
}
