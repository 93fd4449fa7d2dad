//! Pooling, dense heads and prompts, on small random models.

use serde_json::{Value, json};

use super::*;
use crate::cpu::CpuDevice;
use crate::testing;
use doppler_store::DType;

fn bert() -> Value {
    json!({
        "architectures": ["BertModel"], "hidden_size": 32, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
        "max_position_embeddings": 24, "hidden_act": "gelu",
    })
}

fn modules(pooling: &str, dense: &[Value], normalise: bool) -> Value {
    let mut modules = vec![
        json!({ "path": "", "type": "sentence_transformers.models.Transformer" }),
        json!({ "path": "1_Pooling", "type": "sentence_transformers.models.Pooling" }),
    ];
    let mut configs = json!({ "1_Pooling": { format!("pooling_mode_{pooling}"): true } });
    for (number, config) in dense.iter().enumerate() {
        let path = format!("{}_Dense", number + 2);
        modules.push(json!({ "path": path, "type": "sentence_transformers.models.Dense" }));
        configs[&path] = config.clone();
    }
    if normalise {
        modules.push(json!({ "path": "9", "type": "sentence_transformers.models.Normalize" }));
    }
    json!({
        "modules": modules, "configs": configs, "transformer": { "max_seq_length": 16 },
        "settings": { "prompts": { "query": "w1 w2 " }, "default_prompt_name": null },
    })
}

fn with(files: Value) -> Value {
    let mut config = bert();
    config["sentence_transformers"] = files;
    config
}

/// Words `w0` to `w49`; `[CLS]` is 48 and `[SEP]` 49.
fn tokenizer() -> Tokenizer {
    let vocab: serde_json::Map<String, Value> =
        (0..50).map(|id| (format!("w{id}"), json!(id))).collect();
    let special = |id: u32| json!({ "SpecialToken": { "id": format!("w{id}"), "type_id": 0 } });
    let file = json!({
        "version": "1.0", "truncation": { "direction": "Right", "max_length": 3,
            "strategy": "LongestFirst", "stride": 0 },
        "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "Whitespace" },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special(48), { "Sequence": { "id": "A", "type_id": 0 } }, special(49)],
            "pair": [special(48), { "Sequence": { "id": "A", "type_id": 0 } },
                { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": {
                "w48": { "id": "w48", "ids": [48], "tokens": ["w48"] },
                "w49": { "id": "w49", "ids": [49], "tokens": ["w49"] },
            },
        },
        "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w0" },
    });
    Tokenizer::from_bytes(file.to_string().as_bytes(), Vec::new()).unwrap()
}

fn embedded(model: &Model, texts: &[&str], prompt_name: Option<&str>) -> Vec<Embedded> {
    let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
    let asked = Asked { texts: &texts, prompt_name };
    let prepared = prepare(model, &tokenizer(), &asked).unwrap();
    let options = load_options(model, prepared.longest());
    let mut engine = Engine::load(model, &CpuDevice, &options).unwrap();
    run(&mut engine, model, &prepared).unwrap()
}

fn model(config: &Value) -> Model {
    testing::random(config, 5, |_| DType::F32)
}

fn length(vector: &[f32]) -> f64 {
    vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn texts_are_embedded_each_by_itself_and_to_length_1_only_if_asked() {
    let plain = model(&with(modules("mean_tokens", &[], false)));
    let both = embedded(&plain, &["w3 w4 w5", "w6"], None);
    assert_eq!(both[1], embedded(&plain, &["w6"], None)[0]);
    assert_eq!((both[0].tokens, both[1].tokens, both[0].cut), (5, 3, 0));
    assert!((length(&both[0].vector) - 1.0).abs() > 0.1);
    let unit = model(&with(modules("mean_tokens", &[], true)));
    let unit = embedded(&unit, &["w3 w4 w5"], None);
    assert!((length(&unit[0].vector) - 1.0).abs() < 1e-6);
    let ratio = f64::from(both[0].vector[3]) / length(&both[0].vector);
    assert!((f64::from(unit[0].vector[3]) - ratio).abs() < 1e-6);
}

#[test]
fn each_pooling_takes_its_states() {
    let by = |pooling| model(&with(modules(pooling, &[], false)));
    let [mean, first, last] = ["mean_tokens", "cls_token", "lasttoken"].map(by);
    let mut engine = Engine::load(&mean, &CpuDevice, &load_options(&mean, 5)).unwrap();
    let states = states(&mut engine, &[48, 3, 4, 5, 49]).unwrap();
    let text = ["w3 w4 w5"];
    assert_eq!(embedded(&first, &text, None)[0].vector, states[..32]);
    assert_eq!(embedded(&last, &text, None)[0].vector, states[4 * 32..]);
    let want: f32 = states.iter().skip(7).step_by(32).sum::<f32>() / 5.0;
    assert!((embedded(&mean, &text, None)[0].vector[7] - want).abs() < 1e-6);
}

/// A head is applied to the pooled state: here the states are computed without heads, pooled, and
/// multiplied by hand.
#[test]
fn dense_heads_follow_the_pooling() {
    let identity = "torch.nn.modules.linear.Identity";
    let tanh = "torch.nn.modules.activation.Tanh";
    for (pooling, last) in [("mean_tokens", identity), ("cls_token", tanh)] {
        let heads = [
            json!({ "in_features": 32, "out_features": 48, "bias": true,
                "activation_function": identity }),
            json!({ "in_features": 48, "out_features": 12, "bias": false,
                "activation_function": last }),
        ];
        let config = with(modules(pooling, &heads, false));
        // Weights that depend on their name alone.
        let values = |wanted: &testing::Wanted<'_>| {
            let seed: usize = wanted.name.bytes().map(usize::from).sum();
            let scale = 1.5 / (wanted.cols as f32).sqrt();
            let value = |i: usize| (((i * 37 + seed) % 101) as f32 / 50.0 - 1.0) * scale;
            (0..wanted.rows * wanted.cols).map(value).collect::<Vec<f32>>()
        };
        let (headed, _) = testing::model(&config, values, |_| DType::F32);
        let bare = with(modules(pooling, &[], false));
        let (bare, _) = testing::model(&bare, values, |_| DType::F32);
        let mut x = embedded(&bare, &["w3 w9 w4"], None).remove(0).vector;
        for (module, rows, bias, act) in
            [("2_Dense", 48, true, identity), ("3_Dense", 12, false, last)]
        {
            let of = |part: &str, rows, cols| {
                let name = format!("{module}.linear.{part}");
                values(&testing::Wanted { name: &name, rows, cols })
            };
            let (weight, shift) = (of("weight", rows, x.len()), of("bias", 1, rows));
            let out = weight.chunks_exact(x.len()).zip(&shift).map(|(row, shift)| {
                let dot: f32 = row.iter().zip(&x).map(|(a, b)| a * b).sum();
                let sum = dot + if bias { *shift } else { 0.0 };
                if act == tanh { sum.tanh() } else { sum }
            });
            x = out.collect();
        }
        let got = embedded(&headed, &["w3 w9 w4"], None).remove(0).vector;
        assert_eq!(got.len(), 12);
        for (got, want) in got.iter().zip(&x) {
            assert!((got - want).abs() < 1e-4, "{pooling}: {got}, not {want}");
        }
    }
}

#[test]
fn a_prompt_is_text_before_the_text_and_long_texts_lose_their_end() {
    let model = model(&with(modules("mean_tokens", &[], true)));
    let asked = embedded(&model, &["w7 w8"], Some("query"));
    assert_eq!(asked, embedded(&model, &["w1 w2 w7 w8"], None));
    // 16 tokens, of which two are special.
    let long = vec!["w5"; 20].join(" ");
    let cut = embedded(&model, &[&long], None).remove(0);
    assert_eq!((cut.tokens, cut.cut), (16, 6));
    assert_eq!(cut.vector, embedded(&model, &[&vec!["w5"; 14].join(" ")], None)[0].vector);
    let texts = ["w1".to_owned()];
    let wrong = |texts: &[String], prompt_name| {
        prepare(&model, &tokenizer(), &Asked { texts, prompt_name }).unwrap_err().to_string()
    };
    assert!(wrong(&texts, Some("passage")).contains("known: query"));
    assert!(wrong(&[], None).contains("no text"));
    assert!(wrong(&vec![String::new(); TEXTS_MAX + 1], None).contains("more than"));
}

#[test]
fn files_that_are_not_understood_are_refused_by_name() {
    let refused = |files: Value| crate::families::read(&with(files)).unwrap_err().to_string();
    assert!(refused(modules("max_tokens", &[], true)).contains("pooling_mode"));
    let mut two = modules("mean_tokens", &[], true);
    two["configs"]["1_Pooling"]["pooling_mode_cls_token"] = json!(true);
    assert!(refused(two).contains("pooling_mode"));
    let mut clip = modules("mean_tokens", &[], true);
    clip["modules"][0]["type"] = json!("sentence_transformers.models.CLIPModel");
    assert!(refused(clip).contains("CLIPModel"));
    let relu =
        json!({ "out_features": 8, "activation_function": "torch.nn.modules.activation.ReLU" });
    assert!(refused(modules("cls_token", &[relu], true)).contains("ReLU"));
    let tanh = json!({ "out_features": 8 });
    assert!(refused(modules("mean_tokens", &[tanh], true)).contains("Dense"));
    let mut prompt = modules("mean_tokens", &[], true);
    prompt["settings"]["default_prompt_name"] = json!("none");
    assert!(refused(prompt).contains("default_prompt_name"));
    let mut exclude = modules("mean_tokens", &[], true);
    exclude["configs"]["1_Pooling"]["include_prompt"] = json!(false);
    assert!(refused(exclude).contains("include_prompt"));
    let mut alone = modules("mean_tokens", &[], true);
    alone["modules"] = json!([{ "path": "", "type": "x.Transformer" }]);
    assert!(refused(alone).contains("modules.json"));
}

#[test]
fn a_model_that_makes_text_does_not_embed_and_the_reverse() {
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "intermediate_size": 40,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": 50, "max_position_embeddings": 24, "tie_word_embeddings": true,
    });
    let texts = ["w1".to_owned()];
    let asked = Asked { texts: &texts, prompt_name: None };
    let text = model(&config);
    let error = prepare(&text, &tokenizer(), &asked).unwrap_err();
    assert!(error.to_string().contains("makes text"), "{error}");
    // The same checkpoint with the files beside it.
    let mut beside = config.clone();
    beside["sentence_transformers"] = modules("lasttoken", &[], true);
    let embeds = model(&beside);
    assert_eq!(embedded(&embeds, &["w1 w2"], None)[0].vector.len(), 32);
    let options = crate::generate::GenerateOptions::default();
    let refused = crate::request::Request::check(&embeds.graph, vec![1], options, None);
    assert_eq!(refused.unwrap_err().label(), "not_text");
}
