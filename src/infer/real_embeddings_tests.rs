//! A real embedding model (MiniLM), against a float32 forward pass in numpy.
//!
//! `tests/real_weights.sh` fetches it, computes the reference and then runs this test with its folder
//! in `DOPPLER_REAL_WEIGHTS`.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::backend::Device;
use super::check_states::cosine;
use super::cpu::CpuDevice;
use super::embedding::{Asked, Embedded, load_options, prepare, run, tokens_max};
use super::engine::Engine;
use super::gpu::{Reduction, test_device};
use super::load::{self, Quantization, SHARD_BYTES_DEFAULT};
use super::model::Model;
use super::testing::converted;
use super::tokenizer::Tokenizer;

#[derive(Deserialize)]
struct Row {
    text: String,
    ids: Vec<u32>,
    vector: Vec<f32>,
}

fn embedded(
    model: &Model,
    tokenizer: &Tokenizer,
    rows: &[Row],
    device: &dyn Device,
) -> Vec<Embedded> {
    let texts: Vec<String> = rows.iter().map(|row| row.text.clone()).collect();
    let asked = Asked { texts: &texts, prompt_name: None };
    let prepared = prepare(model, tokenizer, &asked).unwrap();
    let options = load_options(model, prepared.longest());
    let mut engine = Engine::load(model, device, &options).unwrap();
    run(&mut engine, model, &prepared).unwrap()
}

fn agrees(dir: &Path, device: &dyn Device) {
    let source = dir.join("minilm");
    let bytes = load::open(&source).unwrap().tokenizer().unwrap().unwrap();
    let tokenizer = Tokenizer::from_bytes(&bytes, Vec::new()).unwrap();
    let rows = std::fs::read(dir.join("minilm.expected.json")).unwrap();
    let rows: Vec<Row> = serde_json::from_slice(&rows).unwrap();
    let model = converted(&source, Quantization::Keep, SHARD_BYTES_DEFAULT);
    for Row { text, ids, .. } in &rows {
        let (got, _) = tokenizer.encode_within(text, tokens_max(&model)).unwrap();
        assert_eq!(got, *ids, "{text:?}");
    }
    let got = embedded(&model, &tokenizer, &rows, device);
    for (Embedded { vector, tokens, .. }, row) in got.iter().zip(&rows) {
        let cosine = cosine(vector, &row.vector);
        let begin: String = row.text.chars().take(30).collect();
        println!("{begin:?}, {tokens} tokens: cosine {cosine:.8}");
        assert!(cosine >= 0.9999, "{:?}: {cosine}", row.text);
    }
    let between = cosine(&got[0].vector, &got[1].vector);
    assert!((between - 0.95434).abs() < 2e-5, "{between}");
}

#[test]
#[ignore = "needs real weights: tests/real_weights.sh"]
fn real_models_embed_as_a_float32_forward_pass_does() {
    let Some(dir) = std::env::var_os("DOPPLER_REAL_WEIGHTS").map(PathBuf::from) else {
        println!("skipped: DOPPLER_REAL_WEIGHTS is not set (tests/real_weights.sh sets it)");
        return;
    };
    agrees(&dir, &CpuDevice);
    if let Some(device) = test_device(Reduction::Lane) {
        agrees(&dir, &device);
    }
}
