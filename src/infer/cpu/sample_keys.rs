//! Sampling, the first pass: each logit's key, with recent tokens penalised.

use pulp::Arch;

use crate::odds::{Recipe, key};

/// `logits` and `keys` are `[vocab]`; a token that comes twice in `recent` is penalised once.
pub fn sample_keys(
    logits: &[f32],
    recent: impl Iterator<Item = u32>,
    recipe: &Recipe,
    keys: &mut [u32],
) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (to, logit) in keys.iter_mut().zip(logits) {
                *to = key(*logit);
            }
        },
    );
    for token in recent {
        if let Some(logit) = logits.get(token as usize) {
            keys[token as usize] = key(recipe.penalised(*logit));
        }
    }
}
