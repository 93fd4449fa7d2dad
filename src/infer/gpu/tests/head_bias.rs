//! Logits with a bias, which Phi-3.5-MoE has.

use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;

use super::models::{PROMPT, logits, rel};
use super::{BOTH, device};
use crate::backend::{Device, KvFormat};
use crate::check::REL_MAX;
use crate::cpu::CpuDevice;
use crate::engine::LoadOptions;
use crate::model::Model;
use crate::session::Session;
use crate::testing::{self, Wanted};
use doppler_store::DType;

const VOCAB: usize = 131;

/// Always the same weights, because with others two experts may nearly tie. The bias is 0 if it is
/// not wanted.
fn model(biased: bool) -> Model {
    let config = json!({
        "architectures": ["PhimoeForCausalLM"], "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": VOCAB,
        "max_position_embeddings": 96, "attention_bias": true, "lm_head_bias": true,
    });
    let mut rng = StdRng::seed_from_u64(3);
    let values = |wanted: &Wanted<'_>| {
        let scale = if wanted.rows == 1 { 1.0 } else { 2.0 / (wanted.cols as f32).sqrt() };
        let draw = (0..wanted.rows * wanted.cols).map(|_| rng.random_range(-scale..scale));
        let drawn: Vec<f32> = draw.collect();
        match wanted.name == "lm_head.bias" {
            true => (0..VOCAB).map(|row| if biased { bias(row) } else { 0.0 }).collect(),
            false => drawn,
        }
    };
    testing::model(&config, values, |_| DType::F32).0
}

fn bias(row: usize) -> f32 {
    (row % 7) as f32 - 2.5
}

#[test]
fn a_bias_of_the_logits_is_added_in_prompts_and_single_tokens() {
    let tokens: Vec<u32> = (0..PROMPT as u32 + 5).map(|i| (37 * i + 11) % VOCAB as u32).collect();
    let run = |biased: bool, device: &dyn Device| {
        let (context, batch, kv) = (Some(80), PROMPT, KvFormat::F32);
        let options = LoadOptions { context, batch, kv, ..LoadOptions::default() };
        logits(&mut Session::new(&model(biased), device, &options).unwrap(), &tokens)
    };
    let (want, plain) = (run(true, &CpuDevice), run(false, &CpuDevice));
    for (i, (with, without)) in want.iter().zip(&plain).enumerate() {
        let off = (with - without - bias(i % VOCAB)).abs();
        assert!(off < 1e-4, "logit {i}: {with} and {without}");
    }
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        let rel = rel(&run(true, &device), &want);
        println!("{reduction:?}: rel {rel:.2e}");
        assert!(rel <= REL_MAX, "{reduction:?}: {rel}");
    }
}
