//! Checkpoints that wrap a text model: its config is `text_config`, its tensors have a prefix, and
//! beside them are those of towers for images and sound.
//!
//! A directory is opened as its text model. Tensors of the towers are not read; text does not pass
//! through them. Only the wrappers that are listed here are opened.

use serde_json::Value;

/// Wrappers, and the text model in each.
const WRAPPERS: &[(&str, &str)] = &[
    ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
    ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
];

/// Keys of the wrapper that hold for its text model, where that has none of its own.
const SHARED: &[&str] =
    &["eos_token_id", "quantization", "quantization_config", "tie_word_embeddings"];

/// How names of the text model's tensors begin, and what they are called by itself.
const PREFIXES: &[(&str, &str)] = &[
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
];

/// What belongs to the towers.
const TOWERS: &[&str] = &[
    "model.multi_modal_projector.",
    "model.vision_tower.",
    "model.visual.",
    "multi_modal_projector.",
    "vision_tower.",
];

/// The config of the text model in a wrapper's config. `None` if it is no known wrapper's.
pub fn text(config: &Value) -> Option<Value> {
    let wrapper = config.get("architectures")?.get(0)?.as_str()?;
    let (_, inner) = WRAPPERS.iter().find(|(name, _)| *name == wrapper)?;
    let mut text = config.get("text_config")?.as_object()?.clone();
    for key in SHARED {
        if let Some(value) = config.get(*key).filter(|value| !value.is_null()) {
            text.entry(*key).or_insert_with(|| value.clone());
        }
    }
    text.insert("architectures".into(), Value::from(vec![*inner]));
    Some(Value::Object(text))
}

/// What a wrapper's tensor is called in the text model. `None` if it belongs to a tower.
pub fn rename(name: &str) -> Option<String> {
    if TOWERS.iter().any(|tower| name.starts_with(tower)) {
        return None;
    }
    let found = PREFIXES
        .iter()
        .find_map(|(prefix, own)| Some(format!("{own}{}", name.strip_prefix(prefix)?)));
    Some(found.unwrap_or_else(|| name.to_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_wrapper_is_opened_as_its_text_model() {
        let config = json!({
            "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106],
            "tie_word_embeddings": true, "mm_tokens_per_image": 256,
            "text_config": { "hidden_size": 64, "tie_word_embeddings": false },
        });
        let expected = json!({
            "architectures": ["Gemma3ForCausalLM"], "eos_token_id": [1, 106], "hidden_size": 64,
            "tie_word_embeddings": false,
        });
        assert_eq!(text(&config), Some(expected));
        assert_eq!(
            text(&json!({ "architectures": ["LlamaForCausalLM"], "text_config": {} })),
            None
        );
        assert_eq!(text(&json!({ "architectures": ["Gemma3ForConditionalGeneration"] })), None);
    }

    #[test]
    fn tensors_have_the_names_of_the_text_model() {
        for (name, own) in [
            ("language_model.model.norm.weight", Some("model.norm.weight")),
            ("language_model.lm_head.weight", Some("lm_head.weight")),
            ("model.language_model.norm.weight", Some("model.norm.weight")),
            ("lm_head.weight", Some("lm_head.weight")),
            ("vision_tower.encoder.layers.0.mlp.fc1.bias", None),
            ("model.visual.blocks.0.norm1.weight", None),
            ("multi_modal_projector.mm_soft_emb_norm.weight", None),
            ("audio_tower.conv.weight", Some("audio_tower.conv.weight")),
        ] {
            assert_eq!(rename(name).as_deref(), own);
        }
    }
}
