//! The graph of a model with adapters: after each product whose matrix is changed, the change is
//! computed from the same input and added. Pure.
//!
//! Several adapters are one: their A's lie one below the other, their B's side by side, times scale
//! and weight. So their number costs no ops. Products of one input share one product with A, too; in
//! each of their B's the others' columns are zero. All ops are ones that every backend knows, and a
//! token stays one submission. Buffers and weights of the base keep their numbers; what is new comes
//! after them. Refuses adapters whose ranks together exceed [`RANKS_MAX`].

use std::collections::{BTreeMap, HashMap};

use super::fit::{Low, fit};
use super::{AdapterError, Attached, Result, check_set};
use crate::graph::{Buf, Graph, MatrixSpec, Op, Weight, WeightId, WeightRole};
use crate::source::Source;
use doppler_store::DType;

/// The most ranks of all adapters together, of one matrix.
const RANKS_MAX: usize = 4096;

/// A graph with adapters.
pub struct Grafted {
    pub graph: Graph,
    /// The new weights in order, and their bytes. The first has the number of the base's weights.
    pub weights: Vec<(MatrixSpec, Vec<u8>)>,
}

/// Adds a set of adapters to a model's graph.
///
/// # Errors
/// If one of them does not fit, or they are too many.
pub fn graft(base: &Graph, set: &[Attached]) -> Result<Grafted> {
    check_set(set)?;
    let mut changes: BTreeMap<WeightId, Vec<(Low, f32)>> = BTreeMap::new();
    for Attached { adapter, weight } in set {
        for (id, low) in fit(adapter, base)? {
            let parts = changes.entry(id).or_default();
            parts.push((low, *weight));
            let ranks: usize = parts.iter().map(|(low, _)| low.a.rows).sum();
            if ranks > RANKS_MAX {
                let problem = format!("ranks of {ranks} together (at most {RANKS_MAX})");
                return Err(AdapterError::Unfit { adapter: adapter.name.clone(), problem });
            }
        }
    }
    let mut made = Maker {
        graph: Graph { ops: Vec::with_capacity(base.ops.len()), ..base.clone() },
        weights: Vec::new(),
        buffers: HashMap::new(),
        changes,
    };
    let mut ops = &base.ops[..];
    while !ops.is_empty() {
        let (now, later) = ops.split_at(Op::products_of_one_input(ops).max(1));
        made.products(now);
        ops = later;
    }
    Ok(Grafted { graph: made.graph, weights: made.weights })
}

struct Maker {
    graph: Graph,
    weights: Vec<(MatrixSpec, Vec<u8>)>,
    /// New buffers by their name and width. Each is used by one product after another.
    buffers: HashMap<(&'static str, usize), Buf>,
    /// The adapters of each changed matrix, with their weights.
    changes: BTreeMap<WeightId, Vec<(Low, f32)>>,
}

impl Maker {
    /// Appends ops, and after them the changes of their results. All of them are products of one
    /// input, or it is a single other op.
    fn products(&mut self, ops: &[Op]) {
        self.graph.ops.extend_from_slice(ops);
        let changed = ops.iter().filter_map(|op| match *op {
            Op::Linear { x, weight, out, .. } => {
                self.changes.contains_key(&weight).then_some((x, weight, out))
            }
            _ => None,
        });
        let changed: Vec<(Buf, WeightId, Buf)> = changed.collect();
        let Some(&(x, first, _)) = changed.first() else { return };
        let parts = || changed.iter().flat_map(|(_, id, _)| &self.changes[id]);
        let a: Vec<f32> = parts().flat_map(|(low, _)| low.a.values.iter().copied()).collect();
        let ranks: usize = parts().map(|(low, _)| low.a.rows).sum();
        let cols = self.graph.weight_spec(first).cols;
        let a = self.weight(first, "lora_a", (ranks, cols), &a);
        let inner = self.buffer("adapter", ranks);
        self.graph.ops.push(Op::Linear { x, weight: a, bias: None, out: inner });
        let mut before = 0;
        for (_, id, out) in changed {
            let (b, own) = self.second(id, before, ranks);
            before += own;
            let y = self.buffer("adapted", self.graph.width(out));
            self.graph.ops.push(Op::Linear { x: inner, weight: b, bias: None, out: y });
            self.graph.ops.push(Op::Add { x: out, y });
        }
    }

    /// The B of a matrix, whose ranks begin behind `before` of `ranks`. Returns how many they are, too.
    fn second(&mut self, id: WeightId, before: usize, ranks: usize) -> (WeightId, usize) {
        let rows = self.graph.weight_spec(id).rows;
        let parts = &self.changes[&id];
        let own: usize = parts.iter().map(|(low, _)| low.a.rows).sum();
        let mut b = vec![0.0; rows * ranks];
        for (row, out) in b.chunks_exact_mut(ranks).enumerate() {
            let values = parts.iter().flat_map(|(low, weight)| {
                let factor = low.scale * weight;
                low.b.row(row).iter().map(move |value| value * factor)
            });
            out[before..].iter_mut().zip(values).for_each(|(out, value)| *out = value);
        }
        (self.weight(id, "lora_b", (rows, ranks), &b), own)
    }

    fn weight(
        &mut self,
        of: WeightId,
        part: &str,
        (rows, cols): (usize, usize),
        values: &[f32],
    ) -> WeightId {
        let Weight { tensor, layer, .. } = self.graph.weight_spec(of);
        let (tensor, layer) = (format!("{tensor}.{part}"), *layer);
        let (role, source) = (WeightRole::Other, Source::Itself);
        let id = WeightId(self.graph.weights.len() as u32);
        self.graph.weights.push(Weight { tensor, rows, cols, role, layer, source });
        let spec = MatrixSpec { dtype: DType::F32, rows, cols, offset: 0 };
        self.weights.push((spec, bytemuck::cast_slice(values).to_vec()));
        id
    }

    fn buffer(&mut self, name: &'static str, width: usize) -> Buf {
        let graph = &mut self.graph;
        *self.buffers.entry((name, width)).or_insert_with(|| graph.buffer(name, width))
    }
}
