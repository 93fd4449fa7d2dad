//! Reference outputs of Transformers, on the CPU backend.

use std::collections::BTreeSet;
use std::path::Path;

use super::backend::{Device, KvFormat, LogitRows};
use super::check::{Expected, check};
use super::check_states::{ExpectedStates, check_states};
use super::cpu::CpuDevice;
use super::embedding::load_options;
use super::engine::{Engine, LoadOptions};
use super::error::SessionError;
use super::families;
use super::load::{Quantization, SHARD_BYTES_DEFAULT};
use super::measured;
use super::model::Model;
use super::perplexity::{PerplexityOptions, perplexity};
use super::session::Session;
use super::slots::SlotBudget;
use super::testing::{
    converted, embedding_references, gguf_references, keeps_in_half_precision, references,
};
use super::tokenizer::Tokenizer;
use doppler_testing::shared;

/// Returns the largest error with a cache in f32.
fn agrees(dir: &Path, model: &Model, batch: usize, slots: SlotBudget) -> f64 {
    let mut largest: f64 = 0.0;
    for file in ["expected.safetensors", "expected-long.safetensors"] {
        let Ok(expected) = std::fs::read(dir.join(file)) else { continue };
        let expected = Expected::parse(&expected).unwrap();
        largest = largest.max(agrees_with(dir, &expected, model, batch, slots));
    }
    largest
}

fn agrees_with(
    dir: &Path,
    expected: &Expected,
    model: &Model,
    batch: usize,
    slots: SlotBudget,
) -> f64 {
    let name = dir.display();
    let half = usize::from(keeps_in_half_precision(dir));
    let mut largest: f64 = 0.0;
    for kv in [KvFormat::F32, KvFormat::F16].into_iter().take(1 + half) {
        let options = LoadOptions { context: Some(96), batch, slots, kv, ..LoadOptions::default() };
        let mut session = Session::new(model, &CpuDevice, &options).unwrap();
        let report = check(&mut session, expected).unwrap();
        println!("{name}, batch {batch}, {slots:?}, {kv:?}: {report:?}");
        assert!(report.passes(crate::check::REL_MAX), "{name}, {batch}, {kv:?}: {report:?}");
        if kv == KvFormat::F32 {
            largest = largest.max(report.rel);
        }
    }
    largest
}

/// The checkpoint's weights unchanged, in batches of several sizes, and in shards so small that
/// tensors and experts cross their boundaries.
fn run(dir: &Path, source: &Path) {
    let plain = converted(source, Quantization::Keep, SHARD_BYTES_DEFAULT);
    let errors = [64, 7, 1].map(|batch| agrees(dir, &plain, batch, SlotBudget::All));
    measured::note(dir, source, "CPU", errors.into_iter().fold(0.0, f64::max));
    let small = converted(source, Quantization::Keep, 8192);
    agrees(dir, &small, 64, SlotBudget::All);
    agrees(dir, &small, 5, SlotBudget::Experts(small.graph.experts_per_token()));
}

#[test]
fn dense_references_agree() {
    references(false).iter().for_each(|dir| run(dir, dir));
}

#[test]
fn references_with_experts_agree() {
    references(true).iter().for_each(|dir| run(dir, dir));
}

/// States and embeddings, also of a text that ends in padding.
#[test]
fn embedding_references_agree() {
    let found = embedding_references();
    assert!(found.len() >= 3, "{found:?}");
    found.iter().for_each(|dir| embeds(dir, &CpuDevice));
}

/// The device's name in the record: the CPU, or a GPU without its driver and versions.
pub(super) fn device_name(described: &str) -> String {
    match described.starts_with("cpu ") {
        true => "CPU".to_owned(),
        false => described.split(" (").next().unwrap_or_default().to_owned(),
    }
}

/// Compares every reference of an embedding model on a device.
pub(super) fn embeds(dir: &Path, device: &dyn Device) {
    let model = converted(dir, Quantization::Keep, SHARD_BYTES_DEFAULT);
    let (mut largest, mut on): (f64, _) = (0.0, String::new());
    for file in ["expected.safetensors", "expected-padded.safetensors"] {
        let Ok(bytes) = std::fs::read(dir.join(file)) else { continue };
        let expected = ExpectedStates::parse(&bytes).unwrap().expect("states");
        let options = load_options(&model, expected.tokens.len());
        let mut engine = Engine::load(&model, device, &options).unwrap();
        let report = check_states(&mut engine, &model, &expected).unwrap();
        println!("{}/{file} on {}: {report:?}", dir.display(), engine.describe());
        assert!(report.passes(crate::check::REL_MAX), "{}: {report:?}", dir.display());
        assert!(report.cosine >= 0.999_99, "{report:?}");
        largest = largest.max(report.rel);
        on = device_name(&engine.describe());
    }
    measured::note(dir, dir, &on, largest);
}

/// Every type and every architecture that a GGUF file may have.
#[test]
fn gguf_references_agree() {
    gguf_references().iter().for_each(|dir| run(dir, &dir.join("model.gguf")));
}

/// Checkpoints are found by directory, so a family without a reference would otherwise go
/// unnoticed.
#[test]
fn every_family_has_a_reference() {
    if shared("goldens").is_none() {
        return;
    }
    let dirs = [references(false), references(true), embedding_references()].concat();
    let configs = dirs.iter().map(|dir| std::fs::read(dir.join("config.json")).unwrap());
    let have: BTreeSet<String> = configs
        .map(|config| serde_json::from_slice::<serde_json::Value>(&config).unwrap())
        .map(|config| config["architectures"][0].as_str().unwrap().to_owned())
        .collect();
    for architecture in families::known() {
        assert!(have.contains(architecture), "{architecture} has no reference: {have:?}");
    }
}

/// The trained models as shipped: with a quarter of the experts in slots, results are
/// bit-identical.
#[test]
fn trained_models_page_without_changing_a_bit() {
    for (name, experts) in [("tiny-mixtral", 32), ("tiny-qwen3moe", 64)] {
        let Some(dir) = shared(&format!("models/{name}")) else { return };
        let model = converted(&dir, Quantization::Q4KM, SHARD_BYTES_DEFAULT);
        assert_eq!(model.experts(), experts);
        let tokenizer = Tokenizer::from_bytes(
            &std::fs::read(dir.join("tokenizer.json")).unwrap(),
            model.manifest.eos_token_ids.clone(),
        );
        let prompt = tokenizer.unwrap().encode("Once upon a time there was a whale").unwrap();
        let mut outputs = Vec::new();
        for slots in [SlotBudget::All, SlotBudget::Experts(experts / 4)] {
            let options =
                LoadOptions { context: Some(128), batch: 32, slots, ..LoadOptions::default() };
            let mut session = Session::new(&model, &CpuDevice, &options).unwrap();
            let mut logits = vec![session.prefill(&prompt).unwrap()];
            for _ in 0..24 {
                let token = super::sampler::greedy(&logits[logits.len() - 1]);
                logits.push(session.step(&[token], LogitRows::Last).unwrap());
            }
            let stats = session.stats();
            println!("{name}: {stats:?}");
            assert_eq!(stats.pager.demands, stats.pager.hits.total());
            outputs.push(logits);
        }
        assert_eq!(outputs[0], outputs[1]);
    }
}

/// Every window, not only the first, begins with the beginning of the sequence.
#[test]
fn each_window_of_a_perplexity_begins_with_the_bos() {
    let dir = doppler_testing::root().join("tests/data/goldens/mixtral");
    let model = converted(&dir, Quantization::Bf16, SHARD_BYTES_DEFAULT);
    let options = LoadOptions { context: Some(16), ..LoadOptions::default() };
    let mut session = Session::new(&model, &CpuDevice, &options).unwrap();
    let (bos, text): (u32, Vec<u32>) = (1, (0..11).map(|i| (i * 37 + 5) % 90).collect());
    let options = PerplexityOptions { window: 5, bos: Some(bos) };
    let score = perplexity(&mut session, &text, &options, |_| {}).unwrap();
    assert_eq!((score.windows, score.tokens), (3, 11), "windows of 4, 4 and 3 tokens, all scored");
    // The same by hand: each window is a sequence of its own.
    let alone = PerplexityOptions { window: 16, bos: None };
    let sum: f64 = text
        .chunks(4)
        .map(|chunk| {
            let sequence: Vec<u32> = [bos].iter().chain(chunk).copied().collect();
            let score = perplexity(&mut session, &sequence, &alone, |_| {}).unwrap();
            score.mean_nll * score.tokens as f64
        })
        .sum();
    assert!((score.mean_nll - sum / 11.0).abs() < 1e-12, "{score:?} against {}", sum / 11.0);
    for (text, bos) in [(&text[..0], Some(bos)), (&text[..1], None), (&text[..0], None)] {
        let options = PerplexityOptions { window: 5, bos };
        let nothing = perplexity(&mut session, text, &options, |_| {});
        assert!(matches!(nothing, Err(SessionError::NothingToScore)));
    }
}

/// Q4_K_M raises perplexity by at most 3 % on text that the models were not trained on.
#[test]
fn trained_models_keep_their_perplexity() {
    for name in ["tiny-mixtral", "tiny-qwen3moe"] {
        let (Some(dir), Some(text)) =
            (shared(&format!("models/{name}")), shared("text/heldout.txt"))
        else {
            return;
        };
        let tokenizer = std::fs::read(dir.join("tokenizer.json")).unwrap();
        let tokenizer = Tokenizer::from_bytes(&tokenizer, Vec::new()).unwrap();
        let tokens = tokenizer.encode(&std::fs::read_to_string(text).unwrap()).unwrap();
        let [bf16, q4] = [Quantization::Bf16, Quantization::Q4KM].map(|quantization| {
            let model = converted(&dir, quantization, SHARD_BYTES_DEFAULT);
            let options = LoadOptions { context: Some(512), ..LoadOptions::default() };
            let mut session = Session::new(&model, &CpuDevice, &options).unwrap();
            let options = PerplexityOptions { window: 512, bos: None };
            let score = perplexity(&mut session, &tokens[..6144], &options, |_| {}).unwrap();
            assert_eq!((score.windows, score.tokens), (12, 12 * 511));
            println!("{name} {quantization:?}: {score:?}");
            score.perplexity
        });
        assert!(bf16 > 10.0 && bf16 < 200.0, "{name}: {bf16}");
        assert!(q4 <= bf16 * 1.03, "{name}: {q4} against {bf16}");
    }
}
