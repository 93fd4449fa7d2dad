//! Mixtral: every layer's feed-forward is a mixture of experts; softmax over
//! all of them, the top ones renormalised to sum to 1.

use super::block::{ExpertNames, decoder};
use super::config::{COUNT_MAX, Config, Defaults, FamilyError};
use super::{Family, MoeSpec, Spec};

pub const FAMILY: Family = Family {
    name: "mixtral",
    architectures: &["MixtralForCausalLM"],
    model_types: &["mixtral"],
    spec,
    graph: |spec| decoder(spec, &NAMES),
};

const NAMES: ExpertNames =
    ExpertNames { module: "block_sparse_moe", gate: "w1", up: "w3", down: "w2" };

fn spec(config: &Config<'_>) -> Result<Spec, FamilyError> {
    let defaults =
        Defaults { family: "mixtral", rms_eps: 1e-5, rope_theta: 1_000_000.0, head_dim: None };
    let mut spec = config.base(&defaults)?;
    spec.attention_bias = false; // MixtralAttention has none, whatever the key says
    let experts = config.optional("num_local_experts", COUNT_MAX)?;
    let experts = match experts {
        Some(experts) => experts,
        None => config.optional("num_experts", COUNT_MAX)?.unwrap_or(8),
    };
    spec.moe = Some(MoeSpec {
        experts,
        top_k: config.optional("num_experts_per_tok", experts)?.unwrap_or(2).min(experts),
        ff: spec.ff,
        renormalise: true,
        sparse: vec![true; spec.layers],
    });
    let window = config.optional("sliding_window", usize::MAX)?;
    let windows = config.layer_windows("mixtral", spec.layers, window)?;
    spec.windows = windows.unwrap_or_else(|| vec![window; spec.layers]);
    Ok(spec)
}
