//! `check` through the binary: every family against Transformers' reference, on both backends.

use crate::common;
use std::path::Path;

use serde_json::Value;

fn check(dir: &Path, backend: &str) -> Value {
    let expected = dir.join("expected.safetensors");
    let dir = dir.to_str().unwrap();
    common::run([
        "check",
        dir,
        "--expected",
        expected.to_str().unwrap(),
        "--backend",
        backend,
        "--json",
    ])
    .ok()
    .json()
}

fn agrees(dir: &Path) {
    for backend in ["cpu", "gpu"] {
        let report = check(dir, backend);
        println!("{} on {backend}: {report}", dir.display());
        assert!(report["rel"].as_f64().unwrap() <= 1e-3);
        assert_eq!(report["top1_agree"], 1.0);
        assert_eq!(report["greedy_match"], true);
    }
}

#[test]
fn the_repositorys_checkpoints_agree_with_their_references() {
    let checkpoints = doppler_testing::own_checkpoints();
    assert!(checkpoints.len() >= 8, "only {checkpoints:?}");
    checkpoints.iter().for_each(|dir| agrees(dir));
}

#[test]
fn a_model_that_is_wrong_fails_the_check() {
    // The tied model's reference asked of the untied one: same shapes, other logits.
    let dir = common::golden("llama3");
    let expected = common::golden("llama3-tied").join("expected.safetensors");
    common::run([
        "check",
        dir.to_str().unwrap(),
        "--expected",
        expected.to_str().unwrap(),
        "--backend",
        "cpu",
    ])
    .fails(&["outside tolerance", "greedy_match false"]);
}

#[test]
fn quantized_perplexity_stays_within_three_percent() {
    let Some(text) = doppler_testing::shared("text/heldout.txt") else { return };
    for name in ["tiny-mixtral", "tiny-qwen3moe"] {
        let Some(model) = doppler_testing::shared(&format!("models/{name}")) else { return };
        let measure = |quantize: &str| {
            let args = ["perplexity", model.to_str().unwrap(), "--text", text.to_str().unwrap()];
            let more = ["--quantize", quantize, "--backend", "cpu", "--json"];
            common::run(args.into_iter().chain(more)).ok().json()["perplexity"].as_f64().unwrap()
        };
        let (exact, quantized) = (measure("bf16"), measure("q4_k_m"));
        println!("{name}: bf16 {exact:.3}, Q4_K_M {quantized:.3}: {:.4}", quantized / exact);
        assert!(quantized <= exact * 1.03);
    }
}
