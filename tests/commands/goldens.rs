//! `check` through the binary: every family against Transformers' reference, on both backends.

use crate::common;

/// Checks every fourth reference, from number `first` on, on both backends. Models that this
/// build does not know or support must be refused with that reason.
fn references_from(first: usize) {
    let own = common::root().join("tests/data/goldens");
    for dir in doppler_testing::references().into_iter().skip(first).step_by(4) {
        for backend in ["cpu", "gpu"] {
            let expected = dir.join("expected.safetensors");
            let paths = [dir.to_str().unwrap(), "--expected", expected.to_str().unwrap()];
            let said = common::run(["check"].into_iter().chain(paths).chain([
                "--backend",
                backend,
                "--json",
            ]));
            let left_out = ["unknown architecture", "is not supported ("];
            if left_out.iter().any(|why| said.err.contains(why)) && !dir.starts_with(&own) {
                println!("left out: {}: {}", dir.display(), said.err.trim());
                break;
            }
            let report = said.ok().json();
            println!("{} on {backend}: {report}", dir.display());
            assert!(report["rel"].as_f64().unwrap() <= 1e-3);
            // An embedding model's reference has no text to compare.
            if let Some(cosine) = report["cosine"].as_f64() {
                assert!(cosine >= 0.99999);
                continue;
            }
            assert_eq!(report["top1_agree"], 1.0);
            assert_eq!(report["greedy_match"], true);
        }
    }
}

#[test]
fn first_quarter_of_the_references_agrees() {
    references_from(0);
}

#[test]
fn second_quarter_of_the_references_agrees() {
    references_from(1);
}

#[test]
fn third_quarter_of_the_references_agrees() {
    references_from(2);
}

#[test]
fn last_quarter_of_the_references_agrees() {
    references_from(3);
}

#[test]
fn a_model_that_is_wrong_fails_the_check() {
    // The tied model's reference for the untied model: same shapes, different logits.
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

/// The library's tests hold the same bound on less text.
#[test]
#[ignore = "a sweep"]
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
