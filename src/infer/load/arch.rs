//! Shapes of well-known models, for `synth`: the contents of their `config.json`.
//!
//! Only the numbers that decide shapes and speed, from the checkpoints' published configs.

use std::str::FromStr;

use serde_json::{Value, json};

use super::LoadError;

/// A model whose shape is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    Llama32_1B,
    Llama31_8B,
    Qwen3_30BA3B,
    Mixtral8x7B,
}

impl Arch {
    pub const ALL: [Self; 4] =
        [Self::Llama32_1B, Self::Llama31_8B, Self::Qwen3_30BA3B, Self::Mixtral8x7B];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Llama32_1B => "llama-3.2-1b",
            Self::Llama31_8B => "llama-3.1-8b",
            Self::Qwen3_30BA3B => "qwen3-30b-a3b",
            Self::Mixtral8x7B => "mixtral-8x7b",
        }
    }

    /// Its `config.json`.
    pub fn config(self) -> Value {
        match self {
            Self::Llama32_1B => llama(json!({
                "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
                "tie_word_embeddings": true, "rope_scaling": llama3_scaling(32.0),
            })),
            Self::Llama31_8B => llama(json!({
                "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                "tie_word_embeddings": false, "rope_scaling": llama3_scaling(8.0),
            })),
            Self::Qwen3_30BA3B => json!({
                "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
                "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
                "moe_intermediate_size": 768, "num_hidden_layers": 48,
                "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
                "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true,
                "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151936,
                "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
                "rope_theta": 1000000.0, "tie_word_embeddings": false, "attention_bias": false,
            }),
            Self::Mixtral8x7B => json!({
                "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
                "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
                "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
                "rope_theta": 1000000.0, "tie_word_embeddings": false,
            }),
        }
    }
}

impl FromStr for Arch {
    type Err = LoadError;
    fn from_str(text: &str) -> Result<Self, LoadError> {
        let known = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|arch| arch.name() == text);
        found.ok_or_else(|| LoadError::UnknownArch { name: text.to_owned(), known: known() })
    }
}

/// Adds what the Llama 3 models have in common.
fn llama(mut config: Value) -> Value {
    let shared = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "attention_bias": false, "mlp_bias": false,
    });
    if let (Value::Object(config), Value::Object(shared)) = (&mut config, shared) {
        config.extend(shared);
    }
    config
}

fn llama3_scaling(factor: f64) -> Value {
    json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    })
}
