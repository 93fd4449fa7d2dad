//! Recipes of ops that decoders with RMS norms and gates do not have: layer norms, activations
//! without a gate, embeddings of positions and segments, and states as a result.

use super::buffers::stride;
use super::dispatch::Rows;
use super::lower::{Lower, Place, Recipe, activation_code, expect, recipe, word};
use super::params;
use crate::backend::Result;
use crate::graph::{Activation, Buf, Lookup, Op, WeightId};

/// Which row of a table the kernel takes: the token's. Others are added.
pub(super) const BY_TOKEN: u32 = 0;

impl Lower<'_> {
    pub(super) fn layer_norm(
        &self,
        op: &Op,
        x: Buf,
        (weight, bias): (WeightId, Option<WeightId>),
        out: Buf,
        eps: f32,
    ) -> Result<Recipe> {
        let (reduce, per_workgroup) = self.reduction();
        let cols = self.width(x);
        let fits = |id: WeightId| self.graph.weight_spec(id).cols == cols;
        expect(cols > 0 && self.width(out) == cols && fits(weight), op)?;
        expect(bias.is_none_or(fits), op)?;
        let params = params::LayerNorm {
            cols: word(cols)?,
            stride: word(stride(cols))?,
            eps,
            has_bias: u32::from(bias.is_some()),
        };
        let weight = self.vector(weight)?;
        let bias = bias.map_or(Ok(Place::Empty), |id| self.vector(id))?;
        let (source, result) = (Place::Activation(x), Place::Activation(out));
        Ok(if x == out {
            let kernel = format!("layer_norm_inplace_{reduce}");
            recipe(&kernel, &params, &[result, weight, bias], Rows::Tokens, (1, per_workgroup))
        } else {
            let kernel = format!("layer_norm_split_{reduce}");
            let storage = [source, weight, bias, result];
            recipe(&kernel, &params, &storage, Rows::Tokens, (1, per_workgroup))
        })
    }

    pub(super) fn activate(&self, x: Buf, activation: Activation) -> Result<Recipe> {
        let width = self.width(x);
        let params = params::Activate {
            width: word(width)?,
            stride: word(stride(width))?,
            activation: activation_code(activation),
        };
        Ok(recipe("activate", &params, &[Place::Activation(x)], Rows::Tokens, (width, 64)))
    }

    pub(super) fn embed_more(
        &mut self,
        by: Lookup,
        table: WeightId,
        x: Buf,
    ) -> Result<Vec<Recipe>> {
        let by = match by {
            Lookup::Position => 1,
            Lookup::Segment => 2,
        };
        self.embed(table, x, (by, 1.0))
    }

    pub(super) fn states(&self, x: Buf) -> Result<Recipe> {
        let width = self.width(x);
        let params = params::States { width: word(width)?, stride: word(stride(width))? };
        let storage = [Place::Activation(x), Place::Logits];
        Ok(recipe("states", &params, &storage, Rows::Logits, (width, 64)))
    }
}
