//! A layer norm of a row that products read: decode_layer_norm, which packs the result.

use super::super::live::Form;
use super::super::params;
use super::super::token::{Fuse, Rewritten};
use super::wanted;
use crate::backend::Result;
use crate::cpu::pack::pieces;
use crate::gpu::lower::{Place, word};
use crate::graph::Op;

pub(super) fn layer_norm(fuse: &mut Fuse<'_>, at: usize) -> Result<Option<Rewritten>> {
    let graph = fuse.lower.graph;
    let Op::LayerNorm { x, weight, bias, out, eps } = graph.ops[at] else { return Ok(None) };
    let cols = graph.width(x);
    let whole = graph.weight_spec(weight).cols == cols
        && bias.is_none_or(|bias| graph.weight_spec(bias).cols == cols)
        && graph.width(out) == cols;
    if x == out || !whole || wanted(graph, out, at + 1) == Form::Plain {
        return Ok(None);
    }
    let has_bias = u32::from(bias.is_some());
    let params =
        params::LayerNorm { cols: word(cols)?, pieces: word(pieces(cols))?, eps, has_bias };
    let bias = bias.map_or(Ok(Place::Empty), |id| fuse.lower.vector(id))?;
    let weight = fuse.lower.vector(weight)?;
    let storage = [Place::Activation(x), weight, bias, Place::Packed(out)];
    let grid = fuse.grid(pieces(cols).div_ceil(32))?;
    let recipe = fuse.in_teams("decode_layer_norm", &params, &storage, grid);
    let (reads, writes) = ([(x, Form::Plain)], [(out, Form::Packed)]);
    Ok(Some(Rewritten::new(1, vec![recipe], &reads, &writes)))
}
