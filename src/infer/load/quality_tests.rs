//! The quality of a conversion, measured by running it: its perplexity is close to that of the
//! unquantized weights.

use std::sync::Arc;

use super::Quantization;
use super::tests::to_memory;
use crate::cpu::CpuDevice;
use crate::engine::LoadOptions;
use crate::model::Model;
use crate::perplexity::{PerplexityOptions, perplexity};
use crate::reader::WeightReader;
use crate::session::Session;
use crate::testing::runtime;
use crate::tokenizer::Tokenizer;
use doppler_store::DType;
use doppler_testing::shared;

fn session(source: &std::path::Path, quantization: Quantization, context: usize) -> Session {
    let (manifest, memory) = to_memory(source, quantization).unwrap();
    let reader = WeightReader::new(Arc::new(memory), runtime().handle().clone());
    let model = Model::open(manifest, reader).unwrap();
    let options = LoadOptions { context: Some(context), ..LoadOptions::default() };
    Session::new(&model, &CpuDevice, &options).unwrap()
}

/// Four bits, and the eight that are nearly exact, on `tokens` of the held-out text.
fn cost_of_quantization(model: &str, tokens: usize) {
    let (Some(text), Some(source)) =
        (shared("text/heldout.txt"), shared(&format!("models/{model}")))
    else {
        return;
    };
    let text = std::fs::read_to_string(text).unwrap();
    let tokenizer = std::fs::read(source.join("tokenizer.json")).unwrap();
    let text = Tokenizer::from_bytes(&tokenizer, vec![]).unwrap().encode(&text).unwrap();
    let measure = |quantization| {
        let mut session = session(&source, quantization, 512);
        let options = PerplexityOptions { window: 512, bos: None };
        perplexity(&mut session, &text[..tokens], &options, |_| {}).unwrap().perplexity
    };
    let plain = measure(Quantization::Bf16);
    for (quantization, bound) in [
        (Quantization::Blocks(DType::Q8_0), 1.003),
        (Quantization::Q4KM, 1.03),
        (Quantization::Blocks(DType::Mxfp4), 1.06),
        (Quantization::Mxfp4Moe, 1.06),
    ] {
        let quantized = measure(quantization);
        let ratio = quantized / plain;
        println!("{model}: bf16 {plain:.3}, {quantization} {quantized:.3}, x {ratio:.4}");
        assert!(ratio < bound, "{model} {quantization}: {ratio}");
    }
}

#[test]
fn four_bits_cost_a_trained_model_a_few_percent_of_perplexity() {
    cost_of_quantization("tiny-qwen3moe", 2048);
}

#[test]
#[ignore = "a sweep"]
fn four_bits_cost_both_trained_models_a_few_percent_of_perplexity() {
    for model in ["tiny-mixtral", "tiny-qwen3moe"] {
        cost_of_quantization(model, 6000);
    }
}
