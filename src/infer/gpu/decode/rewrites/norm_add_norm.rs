//! A norm that is added to a row, and the norm of the sum that products read: decode_norm_add_norm,
//! for families that normalise what a block gives.
//!
//! Every workgroup reads the whole row, so the sum goes to another buffer ([`Form::Moved`]), and the
//! next such run brings it back. So runs are rewritten in pairs, and nobody else may need the row in
//! between.

use super::super::live::Form;
use super::super::params;
use super::super::token::{Fuse, Rewritten};
use super::{Ops, wanted};
use crate::backend::Result;
use crate::cpu::pack::pieces;
use crate::gpu::lower::{Place, word};
use crate::graph::{Buf, Graph, Op, WeightId};

/// The ops of one run.
struct Run {
    ops: usize,
    x: Buf,
    y: Buf,
    weight: WeightId,
    eps: f32,
    after: WeightId,
    eps_after: f32,
    out: Buf,
}

fn matched(graph: &Graph, at: usize) -> Option<Run> {
    let mut ops = Ops::new(graph, at);
    let &Op::RmsNorm { x: y, weight, out: normed, eps } = ops.next()? else { return None };
    let &Op::Add { x, y: added } = ops.next()? else { return None };
    // If the first norm is in place, its input is left as it was.
    let unread = ops.dead(normed);
    let &Op::RmsNorm { x: from, weight: after, out, eps: eps_after } = ops.next()? else {
        return None;
    };
    let cols = graph.width(x);
    let whole = [weight, after].into_iter().all(|id| graph.weight_spec(id).cols == cols);
    let fits = added == normed
        && from == x
        && ![y, normed, out].contains(&x)
        && out != y
        && (unread || normed == out)
        && whole
        && graph.width(y) == cols
        && graph.width(out) == cols
        && wanted(graph, out, ops.at) == Form::Packed;
    fits.then_some(Run { ops: ops.at - at, x, y, weight, eps, after, eps_after, out })
}

/// Whether another run brings the row of the run at `at` back before anybody needs it, and no layer
/// can halt in between.
fn paired(graph: &Graph, at: usize, run: &Run) -> bool {
    let first = at + run.ops;
    let uses = |op: &Op| op.reads().chain(op.writes()).any(|buf| buf == run.x);
    let Some(next) = graph.ops[first..].iter().position(uses).map(|next| first + next) else {
        return false;
    };
    let whole = !graph.ops[first..next].iter().any(|op| matches!(op, Op::Route { .. }));
    whole && next > first && matched(graph, next - 1).is_some_and(|next| next.x == run.x)
}

/// Whether the sum of `x` and another row goes to [`Place::Moved`] somewhere.
pub(in crate::gpu::decode) fn moves(graph: &Graph, x: Buf) -> bool {
    (0..graph.ops.len()).any(|at| matched(graph, at).is_some_and(|run| run.x == x))
}

pub(super) fn norm_add_norm(fuse: &mut Fuse<'_>, at: usize) -> Result<Option<Rewritten>> {
    let graph = fuse.lower.graph;
    let Some(run) = matched(graph, at) else { return Ok(None) };
    let Run { ops, x, y, weight, eps, after, eps_after, out } = run;
    let (from, to) = if fuse.moved == Some(x) {
        (Form::Moved, Form::Plain)
    } else if fuse.moved.is_none() && paired(graph, at, &run) {
        (Form::Plain, Form::Moved)
    } else {
        return Ok(None);
    };
    fuse.moved = (to == Form::Moved).then_some(x);
    let row = |form| if form == Form::Moved { Place::Moved(x) } else { Place::Activation(x) };
    let cols = graph.width(x);
    let params =
        params::NormAddNorm { cols: word(cols)?, pieces: word(pieces(cols))?, eps, eps_after };
    let (weight, after) = (fuse.lower.vector(weight)?, fuse.lower.vector(after)?);
    let storage = [Place::Activation(y), weight, row(from), after, row(to), Place::Packed(out)];
    let grid = fuse.grid(pieces(cols).div_ceil(32))?;
    let recipe = fuse.in_teams("decode_norm_add_norm", &params, &storage, grid);
    let (reads, writes) = ([(y, Form::Plain), (x, from)], [(x, to), (out, Form::Packed)]);
    Ok(Some(Rewritten::new(ops, vec![recipe], &reads, &writes)))
}
