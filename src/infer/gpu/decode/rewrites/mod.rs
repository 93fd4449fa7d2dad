//! The rewrites of a single token: each takes a run of ops from one place on, if its shapes are
//! those that its kernels hold, and gives the recipes that do the same. A file each, with its matcher.
//!
//! A rewrite that leaves out what an op in the middle writes must see that nobody reads it later
//! ([`Graph::dead_after`]). Whatever no rewrite takes is lowered as it is (gpu/lower.rs).

mod attention;
mod experts;
mod gate_up;
mod norm;
mod product;

use super::live::Form;
use super::token::{Fuse, Rewritten};
use crate::backend::Result;
use crate::gpu::dispatch::Grid;
use crate::gpu::pipelines::Reduction;
use crate::graph::{Buf, Graph, Op, WeightId};

pub(super) use experts::Routing;

/// The run of ops that begins at an op, rewritten; `None` if it is another.
pub(super) type Rewrite = fn(&Fuse<'_>, usize) -> Result<Option<Rewritten>>;

/// The rewrites in the order in which they are tried: longer runs first. On software adapters only those
/// without which a token is not one submission: the others' kernels live on workgroup memory and
/// barriers, which are dear there.
pub(super) const fn rewrites(reduction: Reduction) -> &'static [Rewrite] {
    match reduction {
        Reduction::Lane => &[experts::route, experts::experts],
        Reduction::Group => &[
            attention::attention,
            gate_up::gate_up,
            product::added,
            product::product,
            product::logits,
            norm::norm,
            experts::route,
            experts::experts,
        ],
    }
}

/// Matrices that a rewrite reads in one dispatch where they lie in one buffer.
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

/// What is left of a graph's ops from one on.
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

    /// A product of `x`, and where it goes.
    fn linear(&mut self, x: Buf) -> Option<(Biased, Buf)> {
        let &Op::Linear { x: from, weight, bias, out } = self.next()? else { return None };
        (from == x).then_some(((weight, bias), out))
    }

    /// Whether nobody reads what `buf` holds now.
    fn dead(&self, buf: Buf) -> bool {
        self.graph.dead_after(buf, self.at)
    }
}

/// The form in which the op that first reads `buf` from `at` on wants it.
fn wanted(graph: &Graph, buf: Buf, at: usize) -> Form {
    match graph.ops[at..].iter().find(|op| op.reads().any(|read| read == buf)) {
        Some(Op::Linear { .. } | Op::Experts { .. } | Op::Logits { .. }) => Form::Packed,
        _ => Form::Plain,
    }
}

pub(in crate::gpu) const fn workgroups_of(count: usize) -> Grid {
    Grid::Items { items: count as u64, per_workgroup: 1 }
}
