//! A dense feed-forward's gate, up and activation: decode_gate_up, which packs the result. For two
//! matrices of the same shape and format in one buffer, without biases.

use super::super::live::Form;
use super::super::params::{self, Pieces};
use super::super::token::{Fuse, Rewritten};
use super::{Ops, workgroups_of};
use crate::backend::Result;
use crate::cpu::pack::pieces;
use crate::gpu::lower::{Place, activation_code, word};
use crate::graph::{Activation, Buf, Graph, Op, WeightId};

/// The ops of one gated product.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct GateUp {
    pub x: Buf,
    pub gate: WeightId,
    pub up: WeightId,
    pub out: Buf,
    pub activation: Activation,
}

/// Matches a gated product that begins at an op, whichever of its matrices comes first.
pub(super) fn matched(graph: &Graph, at: usize) -> Option<GateUp> {
    let mut ops = Ops::new(graph, at);
    let &Op::Linear { x, .. } = ops.peek()? else { return None };
    let first = ops.linear(x)?;
    let second = ops.linear(x)?;
    let &Op::Gated { gate: g, up: u, out, activation } = ops.next()? else { return None };
    let ((gate, gate_bias), (up, up_bias)) = match (first, second) {
        ((gate, a), (up, b)) if (a, b) == (g, u) => (gate, up),
        ((up, a), (gate, b)) if (a, b) == (u, g) => (gate, up),
        _ => return None,
    };
    let shape = |id| {
        let spec = graph.weight_spec(id);
        (spec.rows, spec.cols)
    };
    let fits = gate_bias.is_none()
        && up_bias.is_none()
        && g != u
        && ![g, u].contains(&x)
        && shape(gate) == shape(up)
        && shape(gate) == (graph.width(out), graph.width(x))
        && [g, u].into_iter().all(|buf| graph.width(buf) == graph.width(out));
    let unread = [g, u].into_iter().all(|buf| buf == out || ops.dead(buf));
    (fits && unread).then_some(GateUp { x, gate, up, out, activation })
}

pub(super) fn gate_up(fuse: &mut Fuse<'_>, at: usize) -> Result<Option<Rewritten>> {
    let lower = &fuse.lower;
    let Some(found) = matched(lower.graph, at) else { return Ok(None) };
    let GateUp { x, gate, up, out, activation } = found;
    let ([g], [u]) = (lower.matrix(gate)?, lower.matrix(up)?) else { return Ok(None) };
    let weights = g.place(gate, 0);
    if weights != u.place(up, 0) || g.packed != u.packed {
        return Ok(None);
    }
    if fuse.many {
        return super::together::gate_up(fuse, &found, (g, u)).map(Some);
    }
    let rows = g.packed.rows;
    let params = params::GateUp {
        gate: Pieces::of(&g.packed, g.at),
        up: Pieces::of(&u.packed, u.at),
        rows: word(rows)?,
        pieces: word(pieces(rows))?,
        activation: activation_code(activation),
        ..params::GateUp::default()
    };
    let storage = [Place::Packed(x), weights, Place::Packed(out)];
    let kernel = format!("decode_gate_up_{}", g.packed.dtype.file_name());
    let recipe = fuse.in_teams(&kernel, &params, &storage, workgroups_of(pieces(rows) * 2));
    let (reads, writes) = ([(x, Form::Packed)], [(out, Form::Packed)]);
    Ok(Some(Rewritten::new(3, vec![recipe], &reads, &writes)))
}
