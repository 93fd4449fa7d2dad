//! Adapters as a user has them: a directory of PEFT's, published on one node, fetched and attached by
//! another, and detached again.

use std::path::Path;

use crate::common::{Node, model, run};
use serde_json::{Value, json};

/// A PEFT directory that changes every layer's queries and values of the embedded model.
fn write(dir: &Path, rank: usize, hidden_change: usize) {
    std::fs::create_dir_all(dir).unwrap();
    let manifest = std::fs::read(model().join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let config = &manifest["config"];
    let number = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, layers, heads) =
        (number("hidden_size"), number("num_hidden_layers"), number("num_attention_heads"));
    let values = number("num_key_value_heads") * hidden / heads;
    let said = json!({
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "base_model_name_or_path": "lab/tiny-mixtral-q4_k_m", "target_modules": ["q_proj", "v_proj"],
    });
    std::fs::write(dir.join("adapter_config.json"), said.to_string()).unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
    let mut state = 12345_u32;
    let mut matrix = |name: String, rows: usize, cols: usize| {
        let start = data.len();
        for _ in 0..rows * cols {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
            data.extend((value * 0.4).to_le_bytes());
        }
        let offsets = json!([start, data.len()]);
        let entry = json!({ "dtype": "F32", "shape": [rows, cols], "data_offsets": offsets });
        header.insert(name, entry);
    };
    for layer in 0..layers {
        for (module, rows) in [("q_proj", hidden + hidden_change), ("v_proj", values)] {
            let name = format!("base_model.model.model.layers.{layer}.self_attn.{module}");
            matrix(format!("{name}.lora_A.weight"), rank, hidden);
            matrix(format!("{name}.lora_B.weight"), rows, rank);
        }
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.extend(data);
    std::fs::write(dir.join("adapter_model.safetensors"), file).unwrap();
}

#[test]
fn an_adapter_published_on_one_node_is_attached_on_another() {
    let dir = tempfile::tempdir().unwrap();
    let (tone, wide, model) = (dir.path().join("tone"), dir.path().join("wide"), model());
    let (tone_path, model_path) = (tone.to_str().unwrap(), model.to_str().unwrap());
    write(&tone, 4, 0);
    write(&wide, 4, 16);

    let said = ["-p", "Call me", "-n", "12", "--json"];
    let local = |more: &[&str]| {
        let args = [&["run", model_path], &said[..], &["--backend", "cpu"], more].concat();
        run(args)
    };
    let plain = local(&[]).ok().json()["tokens"].clone();
    let adapted = local(&["--adapter", tone_path]).ok().json()["tokens"].clone();
    assert_ne!(plain, adapted, "the adapter changes the text");
    let none = local(&["--adapter", &format!("{tone_path}:0")]).ok().json()["tokens"].clone();
    assert_eq!(plain, none, "a weight of 0 applies nothing");
    let wide = local(&["--adapter", wide.to_str().unwrap()]);
    wide.fails(&["adapter wide does not fit the model", "self_attn.q_proj.weight is ["]);

    let first = Node::start(&dir.path().join("a"), "adapters", &[], &[]);
    first.ask(&["publish", tone_path]).fails(&["\"tiny-mixtral-q4_k_m\"", "--base"]);
    let base = first.ask(&["publish", model_path, "--json"]).ok().json()["model"].clone();
    let published = first.ask(&["publish", tone_path, "--json"]).ok().json();
    assert_eq!(published["name"], "tone");
    let id = published["model"].as_str().unwrap();

    let second = Node::start(&dir.path().join("b"), "adapters", &[&first.address], &[]);
    let ask = |model: &str, more: &[&str]| second.ask(&[&["run", model], &said[..], more].concat());
    let name = "tiny-mixtral-q4_k_m";
    assert_eq!(ask(name, &["--adapter", "tone"]).ok().json()["tokens"], adapted);
    // Detached, and again in the other form: by its id, in the model's name.
    assert_eq!(ask(name, &[]).ok().json()["tokens"], plain);
    assert_eq!(ask(&format!("{name}+{}", &id[..12]), &[]).ok().json()["tokens"], adapted);
    assert_eq!(ask(&format!("{name}+tone:0"), &[]).ok().json()["tokens"], plain);
    let listed = second.ask(&["ls", "--json"]).ok().json();
    let row = listed.as_array().unwrap().iter().find(|row| row["id"] == id).unwrap();
    assert_eq!(row["base"], base);
    ask("tone", &[]).fails(&["an adapter, not a model", "--adapter"]);
    ask(name, &["--adapter", "tiny-mix"]).fails(&["not an adapter's"]);
}
