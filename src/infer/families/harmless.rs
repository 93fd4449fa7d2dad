//! Config keys that do not change what is computed here, and why.
//!
//! A key that a family does not read and that is not listed here is refused by name. Ignoring it
//! would be a guess that it does not matter.

use serde_json::Value;

/// Keys that are harmless whatever their value, by reason.
const ALWAYS: &[(&str, &[&str])] = &[
    (
        "names the model and was used to choose the family",
        &["architectures", "model_type", "_name_or_path", "name_or_path", "auto_map"],
    ),
    (
        "used in training only",
        &[
            "attention_dropout",
            "attention_probs_dropout_prob",
            "embd_pdrop",
            "embedding_dropout",
            "gradient_checkpointing",
            "hidden_dropout",
            "hidden_dropout_prob",
            "initializer_range",
            "resid_pdrop",
            "residual_dropout",
            "router_aux_loss_coef",
            "router_jitter_noise",
        ],
    ),
    (
        "counts the modules that predict further tokens, which are left out (load/further.rs)",
        &[
            "mtp_num_hidden_layers",
            "mtp_transformer_layers",
            "mtp_use_dedicated_embeddings",
            "num_mtp_modules",
            "num_nextn_predict_layers",
            "use_mtp",
        ],
    ),
    (
        "a token id, used by the tokenizer or to end generation",
        &[
            "bos_token_id",
            "cls_token_id",
            "decoder_start_token_id",
            "eos_token_id",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "mask_token_id",
            "pad_token_id",
            "sep_token_id",
            "tokenizer_class",
            "unk_token_id",
        ],
    ),
    (
        "says how the file was written; each tensor states its own type",
        &[
            "_commit_hash",
            "dtype",
            "torch_dtype",
            "torchscript",
            "transformers_version",
            "transformers.js_config",
            "unsloth_fixed",
            "unsloth_version",
            "use_bfloat16",
        ],
    ),
    (
        "chooses among implementations with the same result",
        &[
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_experts_implementation",
            "_flash_attn_2_enabled",
            "attention_softmax_in_fp32",
            "attn_implementation",
            "cache_implementation",
            "chunk_size_feed_forward",
            "pretraining_tp",
            "scale_attention_softmax_in_fp32",
            "use_cache",
            "use_flash_attn",
        ],
    ),
    (
        "asks the model object to return more than logits",
        &[
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "return_dict",
            "use_return_dict",
        ],
    ),
    (
        "a default for generation, which the caller decides here",
        &[
            "bad_words_ids",
            "begin_suppress_tokens",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            "length_penalty",
            "max_length",
            "min_length",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "output_scores",
            "prefix",
            "remove_invalid_values",
            "repetition_penalty",
            "return_dict_in_generate",
            "suppress_tokens",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
        ],
    ),
    (
        "for classification heads, which a language model does not have",
        &[
            "classifier_dropout",
            "finetuning_task",
            "id2label",
            "label2id",
            "num_labels",
            "problem_type",
            "task_specific_params",
        ],
    ),
    (
        "an older form of max_position_embeddings, which Transformers does not read",
        &["max_sequence_length", "model_max_length"],
    ),
];

/// Keys that are harmless while they are off (`false`, `[]` or `{}`). If on, they change the model.
const WHILE_OFF: &[&str] = &[
    "add_cross_attention",
    "attention_bias",
    "cross_attention_hidden_size",
    "is_decoder",
    "is_encoder_decoder",
    "mlp_bias",
    "mlp_only_layers",
    "pruned_heads",
    "rope_interleaved",
    "tie_encoder_decoder",
    "use_mrope",
    "use_qk_norm",
    "use_sliding_window",
];

/// Whether an unread key with this value can be ignored.
pub fn is(key: &str, value: &Value) -> bool {
    let off = match value {
        Value::Bool(on) => !on,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    ALWAYS.iter().any(|group| group.1.contains(&key)) || off && WHILE_OFF.contains(&key)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_key_is_listed_once_and_each_group_says_why() {
        let mut keys: Vec<&str> = WHILE_OFF.to_vec();
        for (why, group) in ALWAYS {
            assert!(why.len() > 10, "{group:?}");
            keys.extend(*group);
        }
        let count = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }

    #[test]
    fn switches_are_harmless_only_while_off() {
        assert!(is("use_mrope", &json!(false)) && !is("use_mrope", &json!(true)));
        assert!(is("pruned_heads", &json!({})) && !is("pruned_heads", &json!({ "0": [1] })));
        assert!(is("torch_dtype", &json!("bfloat16")));
        assert!(!is("attn_logit_softcapping", &json!(50.0)));
        assert!(
            !is("final_logit_softcapping", &json!(false)),
            "not listed, so refused even when off"
        );
    }
}
