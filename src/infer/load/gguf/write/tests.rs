//! Files written from reference checkpoints say the same as the checkpoints.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::super::super::{Quantization, open};
use super::to_gguf;
use crate::backend::{KvFormat, LogitRows};
use crate::cpu::CpuDevice;
use crate::engine::LoadOptions;
use crate::session::Session;
use crate::testing::converted;
use crate::tokenizer::Tokenizer;
use doppler_testing::references;

fn write(source: &Path, to: &Path, quantization: Quantization) -> Result<super::Written, String> {
    let checkpoint = open(source).map_err(|error| error.to_string())?;
    let mut file = std::fs::File::create(to).unwrap();
    to_gguf(checkpoint.as_ref(), quantization, &mut file, &mut |_| {})
        .map_err(|error| error.to_string())
}

fn reference(name: &str) -> Option<PathBuf> {
    references().into_iter().find(|dir| dir.ends_with(name))
}

/// Every family that can be written, with its reference.
const WRITTEN: &[(&str, &str)] = &[
    ("llama3", "llama"),
    ("llama3-tied", "llama"),
    ("mixtral", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("qwen3-moe", "qwen3moe"),
    ("gemma2", "gemma2"),
    ("gemma3", "gemma3"),
];

/// A reference whose scores are scaled as files of its architecture say, which is by a head's width.
fn usual(source: &Path, copy: &Path) {
    std::fs::create_dir_all(copy).unwrap();
    for entry in std::fs::read_dir(source).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, copy.join(from.file_name().unwrap())).unwrap();
    }
    let file = copy.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    if config.get("query_pre_attn_scalar").is_some() {
        config["query_pre_attn_scalar"] = config["head_dim"].clone();
    }
    std::fs::write(file, config.to_string()).unwrap();
}

/// All logits of a text.
fn logits(source: &Path) -> Vec<f32> {
    let model = converted(source, Quantization::Keep, 1 << 20);
    let (context, kv) = (Some(64), KvFormat::F32);
    let options = LoadOptions { context, kv, ..LoadOptions::default() };
    let mut session = Session::new(&model, &CpuDevice, &options).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 5) % 90).collect();
    session.step(&tokens, LogitRows::All).unwrap()
}

#[test]
fn written_files_compute_what_their_checkpoints_do() {
    let dir = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for (name, architecture) in WRITTEN {
        let Some(source) = reference(name) else { continue };
        let (copy, file) = (dir.path().join(name), dir.path().join(format!("{name}.gguf")));
        usual(&source, &copy);
        let written = write(&copy, &file, Quantization::Keep).unwrap();
        assert_eq!(written.architecture, *architecture);
        assert_eq!(written.bytes, file.metadata().unwrap().len(), "{name}");
        let (found, expected) = (logits(&file), logits(&copy));
        let differs = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
        let error = found.iter().zip(&expected).map(differs).sum::<f64>().sqrt();
        let norm = expected.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>().sqrt();
        println!("{name}: {:.1e}", error / norm);
        assert!(error <= 1e-4 * norm, "{name}: {}", error / norm);
        seen += 1;
    }
    assert!(seen > 0, "mixtral is in this repository");
}

/// The trained models, with vocabularies: text is cut into the same tokens.
#[test]
fn vocabularies_come_along() {
    for name in ["tiny-mixtral", "tiny-qwen3moe"] {
        let Some(source) = doppler_testing::shared(&format!("models/{name}")) else { return };
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.gguf");
        let written = write(&source, &file, Quantization::Q4KM).unwrap();
        assert!(written.has_tokenizer, "{name}");
        let tokenizer = |path: &Path| {
            let checkpoint = open(path).unwrap();
            Tokenizer::from_bytes(&checkpoint.tokenizer().unwrap().unwrap(), Vec::new()).unwrap()
        };
        let (one, other) = (tokenizer(&source), tokenizer(&file));
        let text = "Once upon a time, in 1234, a whale (naïve 漢字) said: \"don't\"\n\n  stop.";
        assert_eq!(one.encode(text).unwrap(), other.encode(text).unwrap(), "{name}");
        assert_eq!(
            open(&file).unwrap().eos_token_ids().unwrap(),
            open(&source).unwrap().eos_token_ids().unwrap(),
            "{name}"
        );
    }
}

#[test]
fn what_a_file_cannot_say_is_refused_before_it_is_written() {
    for (name, part) in [
        ("olmoe", "cannot be written as GGUF yet"),
        ("gemma2", "would describe another model (what it computes)"),
        ("mixtral-sw", "would describe another model"),
        ("qwen3-moe-plain", "would describe another model"),
    ] {
        let Some(source) = reference(name) else { continue };
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.gguf");
        let error = write(&source, &file, Quantization::Keep).unwrap_err();
        assert!(error.contains(part) && !error.contains('\n'), "{name}: {error}");
        assert_eq!(file.metadata().unwrap().len(), 0, "{name}");
    }
}
