//! A norm of a whole row that products read: decode_norm, which packs the result.

use super::super::live::Form;
use super::super::params;
use super::super::token::{Fuse, Rewritten};
use super::wanted;
use crate::backend::Result;
use crate::cpu::pack::pieces;
use crate::gpu::lower::{Place, word};
use crate::graph::Op;

pub(super) fn norm(fuse: &mut Fuse<'_>, at: usize) -> Result<Option<Rewritten>> {
    let graph = fuse.lower.graph;
    let Op::RmsNorm { x, weight, out, eps } = graph.ops[at] else { return Ok(None) };
    let cols = graph.width(x);
    let whole = graph.weight_spec(weight).cols == cols && graph.width(out) == cols;
    if x == out || !whole || wanted(graph, out, at + 1) == Form::Plain {
        return Ok(None);
    }
    let params = params::Norm { cols: word(cols)?, pieces: word(pieces(cols))?, eps };
    let storage = [Place::Activation(x), fuse.lower.vector(weight)?, Place::Packed(out)];
    let grid = fuse.grid(pieces(cols).div_ceil(32))?;
    let recipe = fuse.in_teams("decode_norm", &params, &storage, grid);
    let (reads, writes) = ([(x, Form::Plain)], [(out, Form::Packed)]);
    Ok(Some(Rewritten::new(1, vec![recipe], &reads, &writes)))
}
