//! Real models from their GGUF files, against a float32 forward pass in numpy.
//!
//! The files are large, so `tests/real_weights.sh` fetches them, computes the references and then
//! runs this test with their folder in `DOPPLER_REAL_WEIGHTS`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::backend::{KvFormat, LogitRows};
use super::check::{Expected, REL_MAX, check};
use super::cpu::CpuDevice;
use super::engine::LoadOptions;
use super::load::{self, Quantization, SHARD_BYTES_DEFAULT};
use super::sampler::greedy;
use super::session::Session;
use super::testing::converted;
use super::tokenizer::Tokenizer;

#[derive(Deserialize)]
struct Page {
    text: String,
    ids: Vec<u32>,
}

/// Greedy text after a prompt, whose special tokens are in the text.
fn answer(session: &mut Session, tokenizer: &Tokenizer, prompt: &str, tokens: usize) -> String {
    session.reset();
    let prompt = tokenizer.encode(prompt).unwrap();
    let mut logits = session.prefill(&prompt).unwrap();
    let mut ids = Vec::new();
    for _ in 0..tokens {
        ids.push(greedy(&logits));
        logits = session.step(&ids[ids.len() - 1..], LogitRows::Last).unwrap();
    }
    tokenizer.decode(&ids).unwrap()
}

fn agrees(dir: &Path, name: &str, prompt: &str, text: &str) {
    let file = dir.join(format!("{name}.gguf"));
    let source = load::open(&file).unwrap();
    let bytes = source.tokenizer().unwrap().unwrap();
    let tokenizer = Tokenizer::from_bytes(&bytes, source.eos_token_ids().unwrap()).unwrap();
    let pages = doppler_testing::root().join("tests/data/gguf/pages.json");
    let pages: BTreeMap<String, Vec<Page>> =
        serde_json::from_slice(&std::fs::read(pages).unwrap()).unwrap();
    for Page { text, ids } in &pages[name] {
        assert_eq!(tokenizer.encode_bare(text).unwrap(), *ids, "{name}: {text:?}");
        let special = text.contains('<') && text.contains("|>")
            || text.contains("_of_turn>")
            || text.contains("<bos>");
        assert!(special || tokenizer.decode(ids).unwrap() == *text, "{name}: {text:?}");
    }

    let expected = std::fs::read(dir.join(format!("{name}.expected.safetensors"))).unwrap();
    let expected = Expected::parse(&expected).unwrap();
    let model = converted(&file, Quantization::Keep, SHARD_BYTES_DEFAULT);
    let options = LoadOptions { context: Some(96), kv: KvFormat::F32, ..LoadOptions::default() };
    let mut session = Session::new(&model, &CpuDevice, &options).unwrap();
    let report = check(&mut session, &expected).unwrap();
    println!("{name}: {report:?}");
    assert!(report.passes(REL_MAX), "{name}: {report:?}");
    let said = answer(&mut session, &tokenizer, prompt, 20);
    println!("{name}: {said:?}");
    assert!(said.starts_with(text), "{name}: {said:?}");
}

#[test]
#[ignore = "needs real weights: tests/real_weights.sh"]
fn real_models_agree_with_a_float32_forward_pass() {
    let Some(dir) = std::env::var_os("DOPPLER_REAL_WEIGHTS").map(PathBuf::from) else {
        println!("skipped: DOPPLER_REAL_WEIGHTS is not set (tests/real_weights.sh sets it)");
        return;
    };
    let question = "The capital of France is Paris, and the capital of Italy is";
    let text = " Rome.\n\nThe capital of the United States is Washington, D.C.";
    agrees(&dir, "gemma3", question, text);
    let question = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful \
                    assistant.<|im_end|>\n<|im_start|>user\nWrite a Python one-liner that reverses \
                    a string s.<|im_end|>\n<|im_start|>assistant\n";
    agrees(&dir, "qwen25", question, "Here's a one-liner that reverses a string `s` in Python:");
}
