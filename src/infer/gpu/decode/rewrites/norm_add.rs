//! A norm of a whole row that is added to another, where nobody else reads it: decode_norm_add, for
//! families that normalise what a block gives.

use super::super::live::Form;
use super::super::params;
use super::super::token::{Fuse, Rewritten};
use super::Ops;
use crate::backend::Result;
use crate::gpu::lower::{Place, word};
use crate::graph::Op;

pub(super) fn norm_add(fuse: &mut Fuse<'_>, at: usize) -> Result<Option<Rewritten>> {
    let graph = fuse.lower.graph;
    let mut ops = Ops::new(graph, at);
    let (Some(&Op::RmsNorm { x: y, weight, out, eps }), Some(&Op::Add { x, y: normed })) =
        (ops.next(), ops.next())
    else {
        return Ok(None);
    };
    let cols = graph.width(y);
    let whole = graph.weight_spec(weight).cols == cols && graph.width(x) == cols;
    // If the norm is in place, its input is left as it was.
    if normed != out || x == out || x == y || !whole || !ops.dead(out) {
        return Ok(None);
    }
    let params = params::NormAdd { cols: word(cols)?, eps };
    let storage = [Place::Activation(y), fuse.lower.vector(weight)?, Place::Activation(x)];
    let grid = fuse.grid(cols.div_ceil(1024))?;
    let recipe = fuse.in_teams("decode_norm_add", &params, &storage, grid);
    let (reads, writes) = ([(y, Form::Plain), (x, Form::Plain)], [(x, Form::Plain)]);
    Ok(Some(Rewritten::new(2, vec![recipe], &reads, &writes)))
}
