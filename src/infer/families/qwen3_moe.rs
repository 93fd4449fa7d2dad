//! Qwen3-MoE: Qwen3's attention; experts in every `decoder_sparse_step`-th layer
//! that `mlp_only_layers` does not name, a dense feed-forward in the others.

use super::block::{PROJ_NAMES, decoder};
use super::config::{COUNT_MAX, Config, DIMENSION_MAX, Defaults, FamilyError};
use super::{Family, MoeSpec, Spec, qwen3};

pub const FAMILY: Family = Family {
    name: "qwen3_moe",
    architectures: &["Qwen3MoeForCausalLM"],
    model_types: &["qwen3_moe"],
    spec,
    graph: |spec| decoder(spec, &PROJ_NAMES),
};

fn spec(config: &Config<'_>) -> Result<Spec, FamilyError> {
    let defaults =
        Defaults { family: "qwen3_moe", rms_eps: 1e-6, rope_theta: 10_000.0, head_dim: None };
    let mut spec = config.base(&defaults)?;
    spec.qk_norm = true;
    let experts = match config.optional("num_experts", COUNT_MAX)? {
        Some(experts) => experts,
        None => config.required("num_local_experts", COUNT_MAX)?,
    };
    let step = config.optional("decoder_sparse_step", COUNT_MAX)?.unwrap_or(1);
    let dense = config.indices("mlp_only_layers")?;
    let sparse: Vec<bool> = (0..spec.layers)
        .map(|layer| !dense.contains(&layer) && (layer + 1).is_multiple_of(step))
        .collect();
    // Without a sparse layer the model is a plain dense one.
    spec.moe = sparse
        .contains(&true)
        .then_some(())
        .map(|()| -> Result<_, FamilyError> {
            Ok(MoeSpec {
                experts,
                top_k: config.required("num_experts_per_tok", experts)?,
                ff: config.required("moe_intermediate_size", DIMENSION_MAX)?,
                // Every published checkpoint sets it; without the key it is taken as set.
                renormalise: config.flag("norm_topk_prob", true)?,
                sparse: sparse.clone(),
            })
        })
        .transpose()?;
    if let Some(window) = qwen3::window(config)? {
        let windows = config.layer_windows("qwen3_moe", spec.layers, Some(window))?;
        spec.windows = windows.unwrap_or_else(|| vec![Some(window); spec.layers]);
    }
    Ok(spec)
}
