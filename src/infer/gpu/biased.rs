//! Lowers what only gpt-oss has: attention with sinks. Biases of experts are where experts are lowered
//! (lower.rs, batch.rs); here are the vectors, checked.

use super::lower::{Lower, Place, Recipe, check_head_dim, expect, recipe, refused, word};
use super::params;
use crate::backend::Result;
use crate::graph::{Activation, Graph, Moe, Op, WeightId};

/// Refuses the activation that only experts with biases compute.
pub(super) fn check(graph: &Graph) -> Result<()> {
    let clamped = |activation| activation == Activation::Clamped;
    let op = |op: &Op| match *op {
        Op::Gated { activation, .. } | Op::Activate { activation, .. } => clamped(activation),
        _ => false,
    };
    let experts = |moe: &Moe| clamped(moe.activation) && moe.biases.is_none();
    match graph.ops.iter().any(op) || graph.moe.iter().any(experts) {
        true => Err(refused("a clamped activation without experts that have biases".into())),
        false => Ok(()),
    }
}

impl Lower<'_> {
    pub(super) fn attend_sinks(&mut self, op: &Op) -> Result<Vec<Recipe>> {
        let &Op::AttendSinks { kv, q, out, heads, scale, window, sinks } = op else {
            unreachable!("the caller matched it");
        };
        let shape = self.graph.kv_spec(kv);
        let head_dim = shape.head_dim;
        check_head_dim(head_dim)?;
        let width = heads * head_dim;
        expect(shape.kv_heads > 0 && heads % shape.kv_heads == 0 && window != Some(0), op)?;
        expect(self.width(q) == width && self.width(out) == width, op)?;
        let stride = word(super::buffers::stride(width))?;
        let params = params::Attention {
            heads: word(heads)?,
            kv_heads: word(shape.kv_heads)?,
            head_dim: word(head_dim)?,
            q_stride: stride,
            result_stride: stride,
            window: word(window.unwrap_or(0))?,
            scale,
            softcap: 0.0,
            ahead: 0,
            chunk: 0,
        };
        let sinks = self.biases(sinks, heads)?;
        let (q, out) = (Place::Activation(q), Place::Activation(out));
        let storage = [q, Place::Keys(kv), Place::Values(kv), out, Place::BlockTable, sinks];
        let kernel = format!("attention_sinks_{}", self.kv.name());
        let mut single =
            recipe(&kernel, &params, &storage, super::dispatch::Rows::Tokens, (heads, 1));
        let Some((many, from)) = self.attention_tiles(&params, &storage, "_sinks") else {
            return Ok(vec![single]);
        };
        single.when = 1..=from - 1;
        Ok(vec![single, many])
    }

    /// A vector of so many elements.
    pub(super) fn biases(&self, id: WeightId, len: usize) -> Result<Place> {
        match self.graph.weight_spec(id).cols == len {
            true => self.vector(id),
            false => {
                let name = &self.graph.weight_spec(id).tensor;
                Err(refused(format!("{name} without {len} elements")))
            }
        }
    }
}
