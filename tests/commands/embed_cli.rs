//! `embed` through the binary: pooling, prompts and dense heads from the files of
//! sentence-transformers, and what is refused.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::common;

/// A BERT of random weights with a tokenizer of words `w0` to `w319`, and these modules' configs.
pub fn model(dir: &Path, pooling: &str) {
    let golden = common::golden("bert");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(file), dir.join(file)).unwrap();
    }
    let write = |name: &str, value: Value| {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, value.to_string()).unwrap();
    };
    let vocab: serde_json::Map<String, Value> =
        (0..320).map(|id| (format!("w{id}"), json!(id))).collect();
    let special = |id: u32| json!({ "SpecialToken": { "id": format!("w{id}"), "type_id": 0 } });
    let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    write(
        "tokenizer.json",
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": { "type": "Whitespace" },
            "post_processor": { "type": "TemplateProcessing", "pair": [text, text],
                "single": [special(1), text, special(2)],
                "special_tokens": {
                    "w1": { "id": "w1", "ids": [1], "tokens": ["w1"] },
                    "w2": { "id": "w2", "ids": [2], "tokens": ["w2"] } } },
            "decoder": null, "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w0" },
        }),
    );
    write(
        "modules.json",
        json!([
            { "idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer" },
            { "idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling" },
            { "idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize" },
        ]),
    );
    write("1_Pooling/config.json", json!({ format!("pooling_mode_{pooling}"): true }));
    write("sentence_bert_config.json", json!({ "max_seq_length": 12, "do_lower_case": true }));
    let prompts = json!({ "query": "w7 w8 " });
    write("config_sentence_transformers.json", json!({ "prompts": prompts }));
}

fn embed<'a>(dir: &'a Path, more: &[&'a str]) -> common::Said {
    let args = ["embed", dir.to_str().unwrap(), "--json", "--backend", "cpu"];
    common::run(args.into_iter().chain(more.iter().copied()))
}

#[test]
fn texts_become_vectors_as_the_files_beside_the_checkpoint_say() {
    let dir = tempfile::tempdir().unwrap();
    let (mean, first) = (dir.path().join("mean"), dir.path().join("first"));
    for (dir, pooling) in [(&mean, "mean_tokens"), (&first, "cls_token")] {
        fs::create_dir(dir).unwrap();
        model(dir, pooling);
    }
    let texts = ["--text", "W9 w10 w11", "--text", "w12"];
    let said = embed(&mean, &texts).ok().json();
    assert_eq!(said["tokens"], json!([5, 3]));
    let vector = |said: &Value, at: usize| -> Vec<f64> {
        serde_json::from_value(said["embeddings"][at].clone()).unwrap()
    };
    let (one, two) = (vector(&said, 0), vector(&said, 1));
    assert_eq!(one.len(), 64);
    assert!((one.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5);
    assert_ne!(one, two);
    assert_eq!(two, vector(&embed(&mean, &["--text", "w12"]).ok().json(), 0));
    let prompted = embed(&mean, &["--text", "w12", "--prompt-name", "query"]).ok().json();
    let written = embed(&mean, &["--text", "w7 w8 w12"]).ok().json();
    assert_eq!(vector(&prompted, 0), vector(&written, 0));
    assert_ne!(one, vector(&embed(&first, &texts).ok().json(), 0));
    let long = embed(&mean, &["--text", &vec!["w3"; 15].join(" ")]);
    assert!(long.err.contains("last 5 tokens did not fit the 12"), "{}", long.err);
    assert_eq!(long.ok().json()["cut"], json!([5]));
    // A converted model has the same files.
    let converted = dir.path().join("converted");
    let [from, to] = [&mean, &converted].map(|path| path.to_str().unwrap());
    common::run(["convert", from, "--out", to, "--quantize", "bf16"]).ok();
    assert_eq!(vector(&embed(&converted, &texts).ok().json(), 0), one);
}

#[test]
fn what_cannot_be_embedded_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), "mean_tokens");
    embed(dir.path(), &["--text", "w1", "--prompt-name", "passage"]).fails(&["known: query"]);
    let args = ["run", dir.path().to_str().unwrap(), "-p", "w1", "--backend", "cpu"];
    common::run(args).fails(&["embedding model", "doppler-node embed"]);
    fs::write(dir.path().join("1_Pooling/config.json"), r#"{"pooling_mode_max_tokens":true}"#)
        .unwrap();
    embed(dir.path(), &["--text", "w1"]).fails(&["pooling_mode", "max_tokens"]);
}
