//! Shapes of well-known models, for `synth`: the contents of their `config.json`.
//!
//! Only the numbers that decide shapes and speed, from the checkpoints' published configs.

use std::str::FromStr;

use serde_json::{Value, json};

use super::{LoadError, Quantization};

/// A model whose shape is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    Llama32_1B,
    Llama31_8B,
    Phi35Mini,
    Gemma2_9B,
    Qwen3_30BA3B,
    Qwen3_235BA22B,
    Qwen35_35BA3B,
    Mixtral8x7B,
    PhiMiniMoe,
    DeepSeekV3,
    KimiK2,
    GptOss20B,
}

impl Arch {
    pub const ALL: [Self; 12] = [
        Self::Llama32_1B,
        Self::Llama31_8B,
        Self::Phi35Mini,
        Self::Gemma2_9B,
        Self::Qwen3_30BA3B,
        Self::Qwen3_235BA22B,
        Self::Qwen35_35BA3B,
        Self::Mixtral8x7B,
        Self::PhiMiniMoe,
        Self::DeepSeekV3,
        Self::KimiK2,
        Self::GptOss20B,
    ];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Llama32_1B => "llama-3.2-1b",
            Self::Llama31_8B => "llama-3.1-8b",
            Self::Phi35Mini => "phi-3.5-mini",
            Self::Gemma2_9B => "gemma-2-9b",
            Self::Qwen3_30BA3B => "qwen3-30b-a3b",
            Self::Qwen3_235BA22B => "qwen3-235b-a22b",
            Self::Qwen35_35BA3B => "qwen3.5-35b-a3b",
            Self::Mixtral8x7B => "mixtral-8x7b",
            Self::PhiMiniMoe => "phi-mini-moe",
            Self::DeepSeekV3 => "deepseek-v3",
            Self::KimiK2 => "kimi-k2",
            Self::GptOss20B => "gpt-oss-20b",
        }
    }

    /// How its weights are stored: gpt-oss's experts as published, of other models the usual
    /// mixture.
    pub const fn quantization(self) -> Quantization {
        match self {
            Self::GptOss20B => Quantization::Mxfp4Moe,
            _ => Quantization::Q4KM,
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
            Self::Phi35Mini => phi_3_5_mini(),
            Self::Gemma2_9B => gemma_2_9b(),
            Self::Qwen3_235BA22B => qwen3_235b_a22b(),
            Self::Qwen35_35BA3B => qwen3_5_35b_a3b(),
            Self::PhiMiniMoe => phi_mini_moe(),
            Self::DeepSeekV3 => deepseek_v3(),
            Self::KimiK2 => kimi_k2(),
            Self::GptOss20B => gpt_oss_20b(),
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

fn phi_3_5_mini() -> Value {
    // All rotations alike: the published factors change no cost.
    let factors = [1.0; 48];
    json!({
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu",
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "longrope", "short_factor": factors.to_vec(), "long_factor": factors.to_vec(),
        },
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 262144,
        "attention_bias": false, "tie_word_embeddings": false,
    })
}

fn gemma_2_9b() -> Value {
    json!({
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584,
        "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000,
        "max_position_embeddings": 8192, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "attention_bias": false, "tie_word_embeddings": true,
    })
}

fn qwen3_235b_a22b() -> Value {
    let mut config = Arch::Qwen3_30BA3B.config();
    for (key, value) in [
        ("hidden_size", 4096),
        ("intermediate_size", 12288),
        ("moe_intermediate_size", 1536),
        ("num_hidden_layers", 94),
        ("num_attention_heads", 64),
    ] {
        config[key] = json!(value);
    }
    config
}

fn qwen3_5_35b_a3b() -> Value {
    json!({
        "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text",
        "hidden_act": "silu", "hidden_size": 2048, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "num_hidden_layers": 40,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "num_experts": 256, "num_experts_per_tok": 8, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4, "vocab_size": 248320, "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25,
        },
        "rms_norm_eps": 1e-6, "attention_bias": false, "tie_word_embeddings": false,
    })
}

fn phi_mini_moe() -> Value {
    json!({
        "architectures": ["PhimoeForCausalLM"], "model_type": "phimoe", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 960, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 16,
        "num_experts_per_tok": 2, "vocab_size": 32064, "max_position_embeddings": 4096,
        "sliding_window": 2047, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "attention_bias": true, "lm_head_bias": false, "tie_word_embeddings": false,
    })
}

fn deepseek_v3() -> Value {
    json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 3,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": true,
        "routed_scaling_factor": 2.5, "vocab_size": 129280, "max_position_embeddings": 163840,
        "rope_theta": 10000.0, "rope_scaling": yarn(40.0, 32, 1), "rms_norm_eps": 1e-6,
        "attention_bias": false, "tie_word_embeddings": false,
    })
}

fn kimi_k2() -> Value {
    let mut config = deepseek_v3();
    for (key, value) in [
        ("first_k_dense_replace", json!(1)),
        ("num_attention_heads", json!(64)),
        ("num_key_value_heads", json!(64)),
        ("n_routed_experts", json!(384)),
        ("n_group", json!(1)),
        ("topk_group", json!(1)),
        ("routed_scaling_factor", json!(2.827)),
        ("vocab_size", json!(163840)),
        ("max_position_embeddings", json!(131072)),
        ("rope_theta", json!(50000.0)),
        ("rope_scaling", yarn(32.0, 1, 1)),
    ] {
        config[key] = value;
    }
    config
}

fn yarn(factor: f64, beta_fast: u32, beta_slow: u32) -> Value {
    json!({
        "type": "yarn", "factor": factor, "beta_fast": beta_fast, "beta_slow": beta_slow,
        "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    })
}

fn gpt_oss_20b() -> Value {
    // The types of its layers follow from their number.
    json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_act": "silu",
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096, "truncate": false,
        },
        "sliding_window": 128, "swiglu_limit": 7.0, "attention_bias": true,
        "tie_word_embeddings": false,
    })
}
