//! The rewrites for a single token. Each matches a run of ops, if its kernels support their shapes,
//! and gives recipes that do the same. Each has a file, with its matcher.
//!
//! A rewrite that leaves out what an op in the middle writes must check that nobody reads it later
//! ([`Graph::dead_after`]). Ops that no rewrite matches are lowered as they are (gpu/lower.rs).

mod attention;
mod experts;
mod gate_up;
mod layer_norm;
mod norm;
mod norm_add;
mod norm_add_norm;
mod product;
mod rows;
mod together;

use super::live::Form;
use super::token::{Fuse, Rewritten};
use crate::backend::Result;
use crate::gpu::dispatch::Grid;
use crate::gpu::pipelines::Reduction;
use crate::graph::{Buf, Graph, Op, WeightId};

pub(super) use attention::splits_max;
pub(super) use experts::Routing;
pub(super) use norm_add_norm::moves;

/// Rewrites the run of ops that begins at an op. `None` if it does not match.
pub(super) type Rewrite = fn(&mut Fuse<'_>, usize) -> Result<Option<Rewritten>>;

/// The rewrites in the order in which they are tried: longer runs first. On software adapters only
/// those without which a token is not one submission: the others' kernels depend on workgroup
/// memory and barriers, which are slow there.
pub(super) const fn rewrites(reduction: Reduction) -> &'static [Rewrite] {
    match reduction {
        Reduction::Lane => &[experts::route, experts::experts],
        Reduction::Group => &[
            attention::attention,
            gate_up::gate_up,
            product::added,
            product::product,
            product::logits,
            norm_add_norm::norm_add_norm,
            norm_add::norm_add,
            norm::norm,
            layer_norm::layer_norm,
            experts::route,
            experts::experts,
        ],
    }
}

/// Matrices that a rewrite reads in one dispatch if they are in one buffer.
pub(in crate::gpu) fn together(
    graph: &Graph,
    reduction: Reduction,
    f16_cache: bool,
) -> Vec<Vec<WeightId>> {
    let mut groups = Vec::new();
    if reduction == Reduction::Lane {
        return groups;
    }
    for at in 0..graph.ops.len() {
        let attention = f16_cache.then(|| attention::matched(graph, at)).flatten();
        groups.extend(attention.map(|found| found.qkv.map(|(id, _)| id).to_vec()));
        groups.extend(gate_up::matched(graph, at).map(|found| vec![found.gate, found.up]));
    }
    groups
}

/// A matrix and its bias.
type Biased = (WeightId, Option<WeightId>);

/// The ops of a graph from one on.
struct Ops<'a> {
    graph: &'a Graph,
    at: usize,
}

impl<'a> Ops<'a> {
    const fn new(graph: &'a Graph, at: usize) -> Self {
        Self { graph, at }
    }

    fn peek(&self) -> Option<&'a Op> {
        self.graph.ops.get(self.at)
    }

    fn next(&mut self) -> Option<&'a Op> {
        let op = self.peek()?;
        self.at += 1;
        Some(op)
    }

    /// Matches a product of `x`: returns it and its output.
    fn linear(&mut self, x: Buf) -> Option<(Biased, Buf)> {
        let &Op::Linear { x: from, weight, bias, out } = self.next()? else { return None };
        (from == x).then_some(((weight, bias), out))
    }

    /// Whether nobody reads the current value of `buf`.
    fn dead(&self, buf: Buf) -> bool {
        self.graph.dead_after(buf, self.at)
    }
}

/// The form in which the first op from `at` on that reads `buf` needs it.
fn wanted(graph: &Graph, buf: Buf, at: usize) -> Form {
    match graph.ops[at..].iter().find(|op| op.reads().any(|read| read == buf)) {
        Some(Op::Linear { .. } | Op::Experts { .. } | Op::Logits { .. }) => Form::Packed,
        _ => Form::Plain,
    }
}

pub(in crate::gpu) const fn workgroups_of(count: usize) -> Grid {
    Grid::Items { items: count as u64, per_workgroup: 1 }
}
