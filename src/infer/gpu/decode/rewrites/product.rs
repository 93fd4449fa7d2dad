//! Products: decode_linear, over several matrices if they are in one buffer, added to the residual
//! if an `Add` follows, and divided if a matrix is split.

use super::super::live::Form;
use super::super::params::{self, Pieces};
use super::super::token::{Fuse, Rewritten};
use super::{Ops, workgroups_of};
use crate::backend::Result;
use crate::gpu::dispatch::{Grid, Rows};
use crate::gpu::lower::{Place, Recipe, recipe_grid, refused, word};
use crate::gpu::params::Params;
use crate::gpu::weights::RowRangeShape;
use crate::graph::{Buf, Op, WeightId};
use doppler_store::DType;

/// Teams wanted in one dispatch to occupy a big GPU.
const TEAMS_WANTED: usize = 5000;

/// Matrices of one dispatch.
const SEGMENTS_MAX: usize = 3;

/// `x += product`, where nobody reads the product itself.
pub(super) fn added(fuse: &mut Fuse<'_>, at: usize) -> Result<Option<Rewritten>> {
    let graph = fuse.lower.graph;
    let mut ops = Ops::new(graph, at);
    let (Some(&Op::Linear { x, weight, bias, out }), Some(&Op::Add { x: to, y })) =
        (ops.next(), ops.next())
    else {
        return Ok(None);
    };
    let rows = graph.weight_spec(weight).rows;
    let fits = y == out && to != out && (graph.width(to), graph.width(out)) == (rows, rows);
    if !fits || !ops.dead(out) {
        return Ok(None);
    }
    let bias = bias.map(|id| fuse.lower.vector(id)).transpose()?;
    let result = Place::Activation(to);
    let recipes = fuse.linear(&[weight], &LinearArgs { x, bias, result, adds: true })?;
    let (reads, writes) = ([(x, Form::Packed), (to, Form::Plain)], [(to, Form::Plain)]);
    Ok(Some(Rewritten::new(2, recipes, &reads, &writes)))
}

/// A product alone.
pub(super) fn product(fuse: &mut Fuse<'_>, at: usize) -> Result<Option<Rewritten>> {
    let graph = fuse.lower.graph;
    let Op::Linear { x, weight, bias, out } = graph.ops[at] else { return Ok(None) };
    if graph.weight_spec(weight).rows != graph.width(out) {
        return Ok(None);
    }
    let bias = bias.map(|id| fuse.lower.vector(id)).transpose()?;
    let result = Place::Activation(out);
    let recipes = fuse.linear(&[weight], &LinearArgs { x, bias, result, adds: false })?;
    let (reads, writes) = ([(x, Form::Packed)], [(out, Form::Plain)]);
    Ok(Some(Rewritten::new(1, recipes, &reads, &writes)))
}

pub(super) fn logits(fuse: &mut Fuse<'_>, at: usize) -> Result<Option<Rewritten>> {
    let graph = fuse.lower.graph;
    let Op::Logits { x, weight, bias, softcap } = graph.ops[at] else { return Ok(None) };
    if graph.weight_spec(weight).rows != graph.vocab {
        return Ok(None);
    }
    let bias = bias.map(|id| fuse.lower.vector(id)).transpose()?;
    let product = LinearArgs { x, bias, result: Place::Logits, adds: false };
    let mut recipes = fuse.linear(&[weight], &product)?;
    recipes.extend(match fuse.many {
        true => super::together::softcap(graph.vocab, softcap)?,
        false => fuse.lower.softcap(softcap)?,
    });
    Ok(Some(Rewritten::new(1, recipes, &[(x, Form::Packed)], &[])))
}

/// The input of `linear`, and where its result goes.
pub(super) struct LinearArgs {
    pub x: Buf,
    /// As long as all matrices together have rows.
    pub bias: Option<Place>,
    pub result: Place,
    pub adds: bool,
}

/// A range of a matrix's rows.
pub(super) struct Part<'a> {
    pub place: Place,
    pub shape: &'a RowRangeShape,
    result_at: usize,
}

impl Fuse<'_> {
    /// A recipe for a kernel that sums in teams.
    pub(super) fn in_teams(
        &self,
        kernel: &str,
        params: &impl Params,
        storage: &[Place],
        grid: Grid,
    ) -> Recipe {
        let kernel = format!("{kernel}_{}", self.team);
        recipe_grid(&kernel, params, storage, Rows::Tokens, grid)
    }

    /// Matrices times packed `x`, with their results one after the other. One dispatch covers up to
    /// three ranges of rows that are in one buffer.
    pub(super) fn linear(&self, ids: &[WeightId], product: &LinearArgs) -> Result<Vec<Recipe>> {
        let graph = self.lower.graph;
        let mut parts = Vec::new();
        let mut before = 0;
        for id in ids {
            for (index, shape) in self.lower.matrix(*id)?.iter().enumerate() {
                if shape.packed.cols != graph.width(product.x) {
                    let name = &graph.weight_spec(*id).tensor;
                    let width = graph.width(product.x);
                    return Err(refused(format!("{name} over {width} columns")));
                }
                let result_at = before + shape.row_start;
                parts.push(Part { place: shape.place(*id, index), shape, result_at });
            }
            before += graph.weight_spec(*id).rows;
        }
        let together = parts.chunk_by(|a, b| a.place == b.place);
        let dispatches = together.flat_map(|parts| parts.chunks(SEGMENTS_MAX));
        if self.many {
            let each = dispatches.map(|parts| self.segments_together(parts, product, before));
            return Ok(each.collect::<Result<Vec<_>>>()?.concat());
        }
        dispatches.map(|parts| self.segments(parts, product)).collect()
    }

    /// A dispatch over at most three ranges of rows in one buffer.
    fn segments(&self, of: &[Part<'_>], product: &LinearArgs) -> Result<Recipe> {
        let rows: usize = of.iter().map(|part| part.shape.packed.rows).sum();
        let split = split(rows, params::items(&of[0].shape.packed));
        let (segments, end) = filled(of, 8 / split)?;
        let params = params::Linear {
            segments,
            split: word(split)?,
            has_bias: u32::from(product.bias.is_some()),
            adds: u32::from(product.adds),
        };
        let bias = product.bias.unwrap_or(Place::Empty);
        let storage = [Place::Packed(product.x), of[0].place, bias, product.result];
        let formats = formats(of.iter().map(|part| part.shape.packed.dtype));
        let kernel = format!("decode_linear_{formats}");
        Ok(self.in_teams(&kernel, &params, &storage, workgroups_of(end)))
    }
}

/// Parts as a kernel reads them, if a workgroup sums `each` rows; and the number of workgroups.
pub(super) fn filled(of: &[Part<'_>], each: usize) -> Result<([params::Segment; 3], usize)> {
    let mut segments = [params::Segment::default(); SEGMENTS_MAX];
    let mut end = 0;
    for (segment, i) in segments.iter_mut().zip(0..) {
        // Unused segments end after all others.
        let Some(Part { shape, result_at, .. }) = of.get(i) else {
            segment.end = u32::MAX;
            continue;
        };
        let m = Pieces::of(&shape.packed, shape.at);
        end += shape.packed.rows.div_ceil(each);
        *segment = params::Segment {
            base: m.base,
            blocks: m.blocks,
            row_blocks: m.row_blocks,
            pieces: m.pieces,
            format: m.format,
            rows: word(shape.packed.rows)?,
            result_at: word(*result_at)?,
            end: word(end)?,
        };
    }
    Ok((segments, end))
}

/// The variant of decode_linear: for one format, for a pair that a mixture combines, or for any.
pub(super) fn formats(of: impl Iterator<Item = DType> + Clone) -> String {
    let only = |among: &[DType]| of.clone().all(|dtype| among.contains(&dtype));
    let one = DType::ALL.into_iter().find(|dtype| only(&[*dtype]));
    let pair = || DType::TOGETHER.iter().find(|pair| only(&pair[..]));
    match one {
        Some(dtype) => dtype.file_name().to_owned(),
        None => pair().map_or("any".to_owned(), |pair| pair.map(DType::file_name).join("_")),
    }
}

/// How many teams share a row of `items`: enough to occupy a big GPU while each team has a full
/// round of work.
pub(super) fn split(rows: usize, items: usize) -> usize {
    let mut split = 1;
    while split < 8 && rows * split < TEAMS_WANTED && items >= split * 2 * 32 {
        split *= 2;
    }
    split
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_takes_the_narrowest_kernel() {
        let named = |of: &[DType]| formats(of.iter().copied());
        assert_eq!(named(&[DType::Q6K]), "q6_k");
        assert_eq!(named(&[DType::Q8_0; 3]), "q8_0");
        assert_eq!(named(&[DType::Q4K, DType::Q4K, DType::Q6K]), "q4_k_q6_k");
        assert_eq!(named(&[DType::Q4K, DType::Q8_0, DType::Q8_0]), "q4_k_q8_0");
        assert_eq!(named(&[DType::Q4K, DType::Q5K, DType::Q6K]), "any");
        assert_eq!(named(&[DType::F32, DType::Bf16]), "any");
    }

    #[test]
    fn a_row_is_shared_only_while_there_is_work_for_each_team() {
        assert_eq!(split(28_672, 128), 1);
        assert_eq!(split(4096, 128), 2);
        assert_eq!(split(2048, 128), 4);
        assert_eq!(split(128, 64), 2);
        assert_eq!(split(128, 448), 8);
        assert_eq!(split(1, 2), 1);
    }
}
