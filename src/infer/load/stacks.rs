//! Experts as mlx-lm stacks them: `MODULE.switch_mlp.{gate,up,down}_proj.weight [experts, rows,
//! cols]`, whatever the experts' own matrices are called.

use std::borrow::Cow;

use super::checkpoint::Checkpoint;
use crate::graph::{Weight, WeightRole};
use crate::source::Source;

/// Where a weight is in a checkpoint with Hugging Face's names, possibly with such stacks.
pub fn source<'a>(checkpoint: &dyn Checkpoint, weight: &'a Weight) -> Cow<'a, Source> {
    match stacked(checkpoint, weight) {
        Some(source) => Cow::Owned(source),
        None => Cow::Borrowed(&weight.source),
    }
}

/// The rows of one expert, if there is a stack for `MODULE.experts.NUMBER.NAME.weight`.
fn stacked(checkpoint: &dyn Checkpoint, weight: &Weight) -> Option<Source> {
    let name = match weight.role {
        WeightRole::Gate => "gate_proj",
        WeightRole::Up => "up_proj",
        WeightRole::Down => "down_proj",
        _ => return None,
    };
    let (module, rest) = weight.tensor.split_once(".experts.")?;
    let number: usize = rest.split_once('.')?.0.parse().ok()?;
    let stack = format!("{module}.switch_mlp.{name}.weight");
    checkpoint.find(&stack)?;
    let start = number.checked_mul(weight.rows)?;
    Some(Source::stored(stack).rows(start..start + weight.rows))
}
