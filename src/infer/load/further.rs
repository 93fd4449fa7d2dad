//! Tensors with which a model predicts further tokens than the next one (multi-token prediction).
//!
//! They are trained beside the model and read its states; the next token does not depend on them. So
//! they are left out, as Transformers leaves them out (`_keys_to_ignore_on_load_unexpected` of its
//! classes).

use serde_json::Value;

/// Whether a tensor only serves to predict further tokens: a module is called `mtp` or begins so
/// (Qwen3-Next, ERNIE 4.5), or its layer follows the model's own ones (DeepSeek-V3, GLM-4.5).
pub fn is_further(config: &Value, name: &str) -> bool {
    if name.split('.').any(|module| module == "mtp" || module.starts_with("mtp_")) {
        return true;
    }
    let count = |key: &str| config.get(key).and_then(Value::as_u64);
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
    let layer = layer.and_then(|number| number.parse::<u64>().ok());
    let own = count("num_hidden_layers");
    let Some(((layer, own), further)) = layer.zip(own).zip(count("num_nextn_predict_layers"))
    else {
        return false;
    };
    layer >= own && layer - own < further
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn layers_after_the_models_own_predict_further_tokens() {
        let config = json!({ "num_hidden_layers": 4, "num_nextn_predict_layers": 1 });
        for (name, want) in [
            ("model.layers.3.mlp.gate.weight", false),
            ("model.layers.4.eh_proj.weight", true),
            ("model.layers.4.mlp.experts.0.up_proj.weight", true),
            ("model.layers.5.eh_proj.weight", false),
            ("model.layers.x.eh_proj.weight", false),
            ("mtp.layers.0.self_attn.q_proj.weight", true),
            ("model.mtp_emb_norm.0.weight", true),
            ("model.layers.0.mtpx.weight", false),
        ] {
            assert_eq!(is_further(&config, name), want, "{name}");
        }
        let none = json!({ "num_hidden_layers": 4, "num_nextn_predict_layers": 0 });
        let absent = json!({ "num_hidden_layers": 4 });
        for config in [none, absent] {
            assert!(!is_further(&config, "model.layers.4.eh_proj.weight"), "{config}");
        }
    }
}
