//! Reference outputs of Transformers, on the CPU backend.

use std::path::Path;
use std::sync::Arc;

use super::backend::{KvFormat, LogitRows};
use super::check::{Expected, check};
use super::cpu::CpuDevice;
use super::load::{MemorySink, Quantization, SHARD_BYTES_DEFAULT, convert};
use super::model::Model;
use super::perplexity::{PerplexityOptions, perplexity};
use super::reader::WeightReader;
use super::session::{Session, SessionOptions};
use super::slots::SlotBudget;
use super::testing::{checkpoint, runtime};
use super::tokenizer::Tokenizer;
use doppler_store::DType;
use doppler_testing::shared;

/// A checkpoint converted in memory, as `run` does with a Hugging Face directory.
fn converted(dir: &Path, quantization: Quantization, shard_bytes: u64) -> Model {
    let mut sink = MemorySink::default();
    let manifest = convert(dir, quantization, shard_bytes, &mut sink, &mut |_| {}).unwrap();
    let reader = WeightReader::new(Arc::new(sink), runtime().handle().clone());
    Model::open(manifest, reader).unwrap()
}

fn agrees(name: &str, model: &Model, batch: usize, slots: SlotBudget) {
    let Some(file) = shared(&format!("goldens/{name}/expected.safetensors")) else { return };
    let expected = Expected::parse(&std::fs::read(file).unwrap()).unwrap();
    for kv in [KvFormat::F32, KvFormat::F16] {
        let options =
            SessionOptions { context: Some(96), batch, slots, kv, ..SessionOptions::default() };
        let mut session = Session::new(model, &CpuDevice, &options).unwrap();
        let report = check(&mut session, &expected).unwrap();
        println!("{name}, batch {batch}, {slots:?}, {kv:?}: {report:?}");
        assert!(report.passes(crate::check::REL_MAX), "{name}, {batch}, {kv:?}: {report:?}");
    }
}

/// The checkpoint's weights as they are, converted, and converted into shards so
/// small that tensors and experts cross them; in batches of several sizes.
fn run(name: &str) {
    let Some(dir) = shared(&format!("goldens/{name}")) else { return };
    let plain = checkpoint(&dir, |_| DType::Bf16);
    for batch in [64, 7, 1] {
        agrees(name, &plain, batch, SlotBudget::All);
    }
    for shard_bytes in [SHARD_BYTES_DEFAULT, 8192] {
        let model = converted(&dir, Quantization::Bf16, shard_bytes);
        agrees(name, &model, 64, SlotBudget::All);
        agrees(name, &model, 5, SlotBudget::Experts(model.spec.experts_per_token()));
    }
}

macro_rules! goldens {
    ($($test:ident: $name:literal),+ $(,)?) => {$(
        #[test]
        fn $test() {
            run($name);
        }
    )+};
}

goldens! {
    llama3: "llama3",
    llama3_tied: "llama3-tied",
    mistral_with_a_window: "mistral",
    qwen3: "qwen3",
    mixtral: "mixtral",
    mixtral_256: "mixtral-256",
    qwen3_moe: "qwen3-moe",
}

/// The trained models as shipped: a quarter of the experts in slots, the same bits.
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
            let options = SessionOptions {
                context: Some(128),
                batch: 32,
                slots,
                ..SessionOptions::default()
            };
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

/// Q4_K_M costs at most 3 % of perplexity on text the models were not trained on.
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
            let options = SessionOptions { context: Some(512), ..SessionOptions::default() };
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
