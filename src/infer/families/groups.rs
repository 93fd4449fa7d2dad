//! Sigmoid routing in which a token chooses among the experts of its best groups: `n_group`,
//! `topk_group`. (DeepSeek-V3, Kimi K2, GLM-4.5.)

use super::config::{Config, FamilyError, bad};
use crate::graph::Scoring;

/// The most groups of experts that the kernels support.
const GROUPS_MAX: usize = 32;

/// The scoring of `count` experts of which a token uses `top_k`. Absent keys have the values of
/// `defaults`.
pub fn scoring(
    config: &Config<'_>,
    (count, top_k): (usize, usize),
    defaults: (usize, usize),
    (renormalise, scale): (bool, f32),
) -> Result<Scoring, FamilyError> {
    let null = |key| if config.has(key) { 1 } else { defaults.0 };
    let groups = config.optional("n_group", GROUPS_MAX)?.unwrap_or_else(|| null("n_group"));
    let kept = config.optional("topk_group", groups)?.unwrap_or(defaults.1.min(groups));
    if groups == 1 {
        return Ok(Scoring::Sigmoid { renormalise, scale });
    }
    // The two best of each group are compared.
    if !count.is_multiple_of(groups) || count / groups < 2 {
        let want = format!("a number of groups of at least two of the {count} experts");
        return Err(bad("n_group", &groups.into(), want));
    }
    let reach = kept * (count / groups);
    if top_k > reach {
        let want = format!("at most the {reach} experts of the chosen groups");
        return Err(bad("num_experts_per_tok", &top_k.into(), want));
    }
    Ok(Scoring::Grouped { renormalise, scale, groups: groups as u32, kept: kept as u32 })
}
