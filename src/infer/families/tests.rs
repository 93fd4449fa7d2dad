//! Families: shapes, names and refusals.

use serde_json::{Value, json};

use super::{FamilyError, RopeScaling, Spec, from_config, graph};
use crate::graph::{Activation, Graph, Op, Scoring};

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 99, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "hidden_act": "silu",
    })
}

fn with(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn spec(config: &Value) -> Spec {
    from_config(config).unwrap()
}

fn refusal(config: &Value) -> String {
    let error = from_config(config).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

fn tensors(graph: &Graph) -> Vec<&str> {
    graph.weights.iter().map(|weight| weight.tensor.as_str()).collect()
}

/// Every op's shapes agree with its buffers and weights.
fn well_formed(graph: &Graph) {
    let width = |buf| graph.width(buf);
    let shape = |id| {
        let weight = graph.weight_spec(id);
        (weight.rows, weight.cols)
    };
    for op in &graph.ops {
        match *op {
            Op::Embed { table, out, .. } => assert_eq!(shape(table), (graph.vocab, width(out))),
            Op::RmsNorm { x, weight, out, .. } => {
                assert_eq!(width(x), width(out));
                assert_eq!((shape(weight).0, width(x) % shape(weight).1), (1, 0));
            }
            Op::Linear { x, weight, bias, out } => {
                assert_eq!(shape(weight), (width(out), width(x)));
                assert!(bias.is_none_or(|bias| shape(bias) == (1, width(out))));
            }
            Op::Rope { x, heads, head_dim, rope } => {
                assert_eq!(width(x), heads * head_dim);
                assert!(graph.rope_spec(rope).inv_freq.len() * 2 <= head_dim);
            }
            Op::KvWrite { kv, k, v } => {
                let kv = graph.kv_spec(kv);
                assert_eq!([width(k), width(v)], [kv.kv_heads * kv.head_dim; 2]);
            }
            Op::Attention { kv, q, out, heads, .. } => {
                assert_eq!([width(q), width(out)], [heads * graph.kv_spec(kv).head_dim; 2]);
                assert_eq!(heads % graph.kv_spec(kv).kv_heads, 0);
            }
            Op::Gated { gate, up, out, .. } => {
                assert_eq!([width(up), width(out)], [width(gate); 2])
            }
            Op::Add { x, y } => assert_eq!(width(x), width(y)),
            Op::Route { moe, logits, .. } => {
                assert_eq!(width(logits), graph.moe_spec(moe).experts.len());
            }
            Op::Experts { moe, x, out } => {
                assert_eq!([width(x), width(out)], [graph.moe_spec(moe).hidden; 2]);
            }
            Op::Logits { x, weight } => assert_eq!(shape(weight), (graph.vocab, width(x))),
        }
    }
}

#[test]
fn llama_has_the_ops_and_tensors_of_its_checkpoints() {
    let graph = graph(&spec(&llama()));
    well_formed(&graph);
    assert_eq!(graph.ops.len(), 1 + 3 * 16 + 2);
    let names = tensors(&graph);
    assert_eq!(names.len(), 1 + 3 * 9 + 2);
    for name in
        ["model.embed_tokens.weight", "model.layers.2.self_attn.o_proj.weight", "lm_head.weight"]
    {
        assert!(names.contains(&name), "{name}");
    }
    assert_eq!((graph.kv.len(), graph.moe.len(), graph.ropes.len()), (3, 0, 1));
    let tied = graph_of(with(llama(), json!({ "tie_word_embeddings": true })));
    assert!(!tensors(&tied).contains(&"lm_head.weight"));
    assert_eq!(tied.weights.len(), graph.weights.len() - 1);
}

fn graph_of(config: Value) -> Graph {
    let graph = graph(&spec(&config));
    well_formed(&graph);
    graph
}

#[test]
fn biases_are_honoured_where_the_config_says() {
    let graph = graph_of(with(llama(), json!({ "attention_bias": true, "mlp_bias": true })));
    for name in ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"] {
        let name = format!("model.layers.1.{name}.bias");
        assert!(tensors(&graph).contains(&name.as_str()), "{name}");
    }
    let plain = graph_of(llama());
    assert!(tensors(&plain).iter().all(|name| !name.ends_with("bias")));
}

#[test]
fn both_rope_forms_mean_the_same() {
    let params = json!({
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    });
    let new = with(params.clone(), json!({ "rope_type": "llama3", "rope_theta": 500000.0 }));
    let new = spec(&with(llama(), json!({ "rope_theta": null, "rope_parameters": new })));
    for key in ["rope_type", "type"] {
        let old = with(params.clone(), json!({ key: "llama3" }));
        assert_eq!(spec(&with(llama(), json!({ "rope_scaling": old }))), new);
    }
    let RopeScaling::Llama3 { original_context, .. } = new.rope.scaling else { panic!("{new:?}") };
    assert_eq!((original_context, new.rope.theta), (64.0, 500_000.0));
    let old = spec(&with(llama(), json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } })));
    assert_eq!(old.rope.scaling, RopeScaling::Linear { factor: 4.0 });
    let plain = spec(&llama()).rope.rope(16);
    let linear = old.rope.rope(16);
    for (plain, linear) in plain.inv_freq.iter().zip(&linear.inv_freq) {
        assert!((plain / 4.0 - linear).abs() <= plain * 1e-6);
    }
}

/// Frequencies of Llama-3.1-8B against the reference's branches, computed by hand.
#[test]
fn llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    });
    let scaled = spec(&with(llama(), json!({ "rope_scaling": scaling }))).rope.rope(128);
    let plain = spec(&llama()).rope.rope(128);
    assert_eq!(plain.inv_freq.len(), 64);
    let mut kinds = [0; 3];
    for (plain, scaled) in plain.inv_freq.iter().zip(&scaled.inv_freq) {
        let wavelength = std::f32::consts::TAU / plain;
        let kind = usize::from(wavelength >= 2048.0) + usize::from(wavelength > 8192.0);
        kinds[kind] += 1;
        match kind {
            0 => assert_eq!(plain, scaled),
            2 => assert!((plain / 8.0 - scaled).abs() < plain * 1e-6),
            _ => assert!(*scaled < *plain && *scaled > plain / 8.0),
        }
    }
    assert!(kinds.iter().all(|count| *count > 3), "{kinds:?}");
}

#[test]
fn heads_follow_from_the_config_or_are_refused() {
    assert_eq!(spec(&llama()).head_dim, 16);
    assert_eq!(spec(&with(llama(), json!({ "head_dim": null }))).head_dim, 16);
    assert_eq!(spec(&with(llama(), json!({ "head_dim": 24 }))).head_dim, 24);
    assert_eq!(spec(&with(llama(), json!({ "num_key_value_heads": null }))).kv_heads, 4);
    assert!(refusal(&with(llama(), json!({ "head_dim": 7 }))).contains("head_dim is 7"));
    assert!(refusal(&with(llama(), json!({ "num_key_value_heads": 3 }))).contains("divisor"));
    assert!(
        refusal(&with(llama(), json!({ "num_attention_heads": 6, "num_key_value_heads": 6 })))
            .contains("hidden_size 64")
    );
}

fn qwen3(changes: Value) -> Value {
    let base = json!({ "architectures": ["Qwen3ForCausalLM"], "head_dim": 32 });
    with(with(llama(), base), changes)
}

#[test]
fn qwen3_normalises_heads_and_slides_where_it_says() {
    let graph = graph_of(qwen3(json!({})));
    assert!(tensors(&graph).contains(&"model.layers.0.self_attn.k_norm.weight"));
    assert_eq!(graph.ops.len(), 1 + 3 * 18 + 2);
    let windows = |changes| spec(&qwen3(changes)).windows;
    let on = json!({ "use_sliding_window": true, "sliding_window": 9, "max_window_layers": 1 });
    assert_eq!(windows(on.clone()), [None, Some(9), Some(9)]);
    assert_eq!(windows(with(on.clone(), json!({ "use_sliding_window": false }))), [None; 3]);
    let types = json!({ "layer_types": ["sliding_attention", "full_attention", "full_attention"] });
    assert_eq!(windows(with(on.clone(), types)), [Some(9), None, None]);
    let short = json!({ "layer_types": ["full_attention"] });
    assert!(refusal(&qwen3(with(on.clone(), short))).contains("layer_types"));
    let odd = json!({ "layer_types": ["linear_attention", "full_attention", "full_attention"] });
    assert!(refusal(&qwen3(with(on, odd))).contains("linear_attention"));
}

#[test]
fn mistral_slides_in_every_layer_unless_the_window_is_null() {
    let mistral =
        |changes| with(with(llama(), json!({ "architectures": ["MistralForCausalLM"] })), changes);
    let windows = |changes| spec(&mistral(changes)).windows;
    assert_eq!(windows(json!({ "sliding_window": 16 })), [Some(16); 3]);
    assert_eq!(windows(json!({ "sliding_window": null })), [None; 3]);
    assert_eq!(windows(json!({})), [Some(4096); 3], "MistralConfig's default");
}

fn mixtral(changes: Value) -> Value {
    let base = json!({
        "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2,
        "sliding_window": null,
    });
    with(with(llama(), base), changes)
}

#[test]
fn mixtral_routes_in_every_layer() {
    let graph = graph_of(mixtral(json!({})));
    assert_eq!(graph.moe.len(), 3);
    assert_eq!(graph.moe[2].experts[7].down, "model.layers.2.block_sparse_moe.experts.7.w2.weight");
    assert_eq!(graph.moe[2].experts[7].up, "model.layers.2.block_sparse_moe.experts.7.w3.weight");
    assert!(tensors(&graph).contains(&"model.layers.0.block_sparse_moe.gate.weight"));
    assert!(tensors(&graph).iter().all(|name| !name.contains("experts")), "experts are paged");
    assert_eq!(spec(&mixtral(json!({}))).experts_per_token(), 6);
    assert!(refusal(&mixtral(json!({ "num_experts_per_tok": 9 }))).contains("1..=8"));
    assert_eq!(spec(&mixtral(json!({ "sliding_window": 5 }))).windows, [Some(5); 3]);
}

fn qwen3_moe(changes: Value) -> Value {
    let base = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 16, "num_experts_per_tok": 4,
        "moe_intermediate_size": 40, "num_hidden_layers": 5,
    });
    with(with(llama(), base), changes)
}

#[test]
fn qwen3_moe_mixes_sparse_and_dense_layers() {
    let changes = json!({ "decoder_sparse_step": 2, "mlp_only_layers": [3] });
    let spec_of = |changes| spec(&qwen3_moe(changes));
    let moe = spec_of(changes.clone()).moe.unwrap();
    assert_eq!(moe.sparse, [false, true, false, false, false]);
    let graph = graph_of(qwen3_moe(changes));
    assert_eq!((graph.moe.len(), graph.moe[0].layer, graph.moe[0].ff), (1, 1, 40));
    assert!(tensors(&graph).contains(&"model.layers.3.mlp.down_proj.weight"));
    assert_eq!(graph.moe[0].experts[15].gate, "model.layers.1.mlp.experts.15.gate_proj.weight");
    for (key, renormalise) in [(json!({}), true), (json!({ "norm_topk_prob": false }), false)] {
        let graph = graph_of(qwen3_moe(key));
        let scoring = Scoring::Softmax { renormalise };
        assert!(
            graph.ops.iter().any(|op| matches!(op, Op::Route { scoring: s, .. } if *s == scoring))
        );
    }
    let other_name = json!({ "num_experts": null, "num_local_experts": 12 });
    assert_eq!(spec_of(other_name).moe.unwrap().experts, 12);
    assert_eq!(spec_of(json!({ "mlp_only_layers": [0, 1, 2, 3, 4] })).moe, None);
    assert!(
        refusal(&qwen3_moe(json!({ "num_experts": null })))
            .contains("num_local_experts is missing")
    );
    assert!(
        refusal(&qwen3_moe(json!({ "moe_intermediate_size": 0 }))).contains("moe_intermediate")
    );
    assert!(refusal(&qwen3_moe(json!({ "mlp_only_layers": [-1] }))).contains("mlp_only_layers"));
}

#[test]
fn an_unknown_architecture_is_named_with_those_known() {
    let error = refusal(&with(llama(), json!({ "architectures": ["FooForCausalLM"] })));
    assert!(
        error.contains("\"FooForCausalLM\"") && error.contains("Qwen3MoeForCausalLM"),
        "{error}"
    );
    assert!(refusal(&json!([1])).contains("not a JSON object"));
    let nameless = with(llama(), json!({ "architectures": [] }));
    assert_eq!(from_config(&nameless), Err(FamilyError::Missing { key: "architectures" }));
    assert_eq!(spec(&with(nameless, json!({ "model_type": "llama" }))).family, "llama");
}

#[test]
fn numbers_that_are_missing_or_absurd_are_refused_by_name() {
    for key in ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"] {
        for bad in [json!(0), json!(-4), json!(1e30), json!("64"), json!(u64::MAX), json!([64])] {
            let error = refusal(&with(llama(), json!({ key: bad })));
            assert!(error.contains(key), "{error}");
        }
        assert!(refusal(&with(llama(), json!({ key: null }))).contains("is missing"));
    }
    for bad in [json!(0.0), json!(-1e-6), json!("small")] {
        assert!(refusal(&with(llama(), json!({ "rms_norm_eps": bad }))).contains("rms_norm_eps"));
    }
    assert!(refusal(&with(llama(), json!({ "tie_word_embeddings": 1 }))).contains("tie_word"));
}

#[test]
fn what_no_kernel_computes_is_refused_by_name() {
    assert_eq!(
        spec(&with(llama(), json!({ "hidden_act": "gelu_pytorch_tanh" }))).activation,
        Activation::GeluTanh
    );
    assert!(refusal(&with(llama(), json!({ "hidden_act": "relu" }))).contains("\"relu\""));
    let awq = json!({ "quantization_config": { "quant_method": "awq" } });
    assert!(refusal(&with(llama(), awq)).contains("quantization_config"));
    for kind in ["yarn", "dynamic", "longrope"] {
        let scaling = json!({ "rope_type": kind, "factor": 2.0 });
        assert!(refusal(&with(llama(), json!({ "rope_scaling": scaling }))).contains(kind));
    }
    for scaling in [
        json!({ "rope_type": "linear" }),
        json!({ "rope_type": "linear", "factor": 0 }),
        json!({ "rope_type": 3 }),
        json!("linear"),
        json!({ "full_attention": { "rope_type": "default" } }),
        json!({ "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4 }),
        json!({ "rope_type": "default", "partial_rotary_factor": 0.5 }),
    ] {
        refusal(&with(llama(), json!({ "rope_scaling": scaling })));
    }
}
