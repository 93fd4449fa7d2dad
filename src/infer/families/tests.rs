//! Families: shapes, names and refusals.

use serde_json::{Value, json};

use super::{Described, FamilyError, RopeScaling, RopeSpec, name, read};
use crate::graph::{Activation, ConvForm, Graph, Kv, Op, Rope, Scoring, WeightRole};
use crate::source::Source;

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

fn rope(config: &Value) -> RopeSpec {
    let Described { graph, ropes, .. } = read(config).unwrap();
    assert_eq!((graph.ropes.len(), ropes.len()), (1, 1));
    ropes.into_iter().next().unwrap()
}

/// The window of each layer's attention.
fn windows(config: Value) -> Vec<Option<usize>> {
    let windows = graph_of(config).ops.into_iter().filter_map(|op| match op {
        Op::Attention { window, .. } => Some(window),
        _ => None,
    });
    windows.collect()
}

fn refusal(config: &Value) -> String {
    let error = read(config).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

fn tensors(graph: &Graph) -> Vec<&str> {
    graph.weights.iter().map(|weight| weight.tensor.as_str()).collect()
}

// Long: one arm an op.
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
            Op::LayerNorm { x, weight, bias, out, .. } => {
                assert_eq!([width(out), shape(weight).1], [width(x); 2]);
                assert!(bias.is_none_or(|bias| shape(bias) == (1, width(x))));
            }
            Op::Activate { x, .. } | Op::States { x } => assert!(width(x) > 0),
            Op::EmbedMore { table, x, .. } => assert_eq!(shape(table).1, width(x)),
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
            Op::Conv { state, x, filter, out, form } => {
                let parts = if form == ConvForm::Gated { 3 } else { 1 };
                assert_eq!(width(x), parts * width(out));
                assert_eq!(shape(filter), (1, graph.state_spec(state).width + width(out)));
            }
            Op::AttendChunk { kv, q, out, heads, .. } => {
                assert_eq!([width(q), width(out)], [heads * graph.kv_spec(kv).head_dim; 2]);
                assert_eq!(heads % graph.kv_spec(kv).kv_heads, 0);
            }
            Op::AttendSinks { kv, q, out, heads, sinks, .. } => {
                assert_eq!([width(q), width(out)], [heads * graph.kv_spec(kv).head_dim; 2]);
                assert_eq!(shape(sinks), (1, heads));
            }
            Op::Scale { weight, .. } => assert_eq!(shape(weight), (1, 1)),
            Op::Temper { each, .. } => assert!(each > 0),
            Op::WeighInput { x, out, .. } => assert_eq!(width(x), width(out)),
            Op::Delta { state, x, gates, decays, shifts, out, shape: of } => {
                assert_eq!([width(x), width(gates)], [of.x_width(), 2 * of.heads]);
                assert_eq!(width(out), of.heads * of.value_dim);
                assert_eq!([shape(decays), shape(shifts)], [(1, of.heads); 2]);
                assert_eq!(graph.state_spec(state).width, of.state_width());
            }
            Op::Heads { x, from, out, to, heads, width: copied } => {
                for (of, buf) in [(from, x), (to, out)] {
                    assert!(of.start + (heads - 1) * of.stride + copied <= width(buf));
                }
            }
            Op::Gated { gate, up, out, .. } => {
                assert_eq!([width(up), width(out)], [width(gate); 2])
            }
            Op::Add { x, y } => assert_eq!(width(x), width(y)),
            Op::AddGated { x, y, gate } => assert_eq!((width(x), width(gate)), (width(y), 1)),
            Op::Route { moe, logits, bias, .. } => {
                let experts = graph.moe_spec(moe).experts.len();
                assert_eq!(width(logits), experts);
                assert!(bias.is_none_or(|bias| shape(bias) == (1, experts)));
            }
            Op::Experts { moe, x, out } => {
                let spec = graph.moe_spec(moe);
                assert_eq!([width(x), width(out)], [spec.hidden; 2]);
                if let Some(biases) = spec.biases {
                    let count = spec.experts.len();
                    assert_eq!(shape(biases.gate_up), (1, 2 * spec.ff * count));
                    assert_eq!(shape(biases.down), (1, spec.hidden * count));
                }
            }
            Op::Logits { x, weight, bias, .. } => {
                assert_eq!(shape(weight), (graph.vocab, width(x)));
                assert!(bias.is_none_or(|bias| shape(bias) == (1, graph.vocab)));
            }
        }
    }
}

#[test]
fn llama_has_the_ops_and_tensors_of_its_checkpoints() {
    let graph = graph_of(llama());
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
    let graph = read(&config).unwrap().graph;
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
    let new = rope(&with(llama(), json!({ "rope_theta": null, "rope_parameters": new })));
    for key in ["rope_type", "type"] {
        let old = with(params.clone(), json!({ key: "llama3" }));
        assert_eq!(rope(&with(llama(), json!({ "rope_scaling": old }))), new);
    }
    let RopeScaling::Llama3 { original_context, .. } = new.scaling else { panic!("{new:?}") };
    assert_eq!((original_context, new.theta), (64.0, 500_000.0));
    let old = rope(&with(llama(), json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } })));
    assert_eq!(old.scaling, RopeScaling::Linear { factor: 4.0 });
    let plain = rope(&llama()).rope(16);
    let linear = old.rope(16);
    for (plain, linear) in plain.inv_freq.iter().zip(&linear.inv_freq) {
        assert!((plain / 4.0 - linear).abs() <= plain * 1e-6);
    }
}

/// Compares the frequencies of Llama-3.1-8B with the reference's branches, computed by hand.
#[test]
fn llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    });
    let scaled = rope(&with(llama(), json!({ "rope_scaling": scaling }))).rope(128);
    let plain = rope(&llama()).rope(128);
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
    let kv = |changes| graph_of(with(llama(), changes)).kv[0];
    assert_eq!(kv(json!({})), Kv { kv_heads: 2, head_dim: 16 });
    assert_eq!(kv(json!({ "head_dim": null })).head_dim, 16);
    assert_eq!(kv(json!({ "head_dim": 24 })).head_dim, 24);
    assert_eq!(kv(json!({ "num_key_value_heads": null })).kv_heads, 4);
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
    let windows = |changes| windows(qwen3(changes));
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
    let windows = |changes| windows(mistral(changes));
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
    assert_eq!(
        graph.moe[2].experts[7].down.name,
        "model.layers.2.block_sparse_moe.experts.7.w2.weight"
    );
    assert_eq!(
        graph.moe[2].experts[7].up.name,
        "model.layers.2.block_sparse_moe.experts.7.w3.weight"
    );
    assert!(tensors(&graph).contains(&"model.layers.0.block_sparse_moe.gate.weight"));
    assert!(tensors(&graph).iter().all(|name| !name.contains("experts")), "experts are paged");
    assert_eq!(graph.experts_per_token(), 6);
    assert!(refusal(&mixtral(json!({ "num_experts_per_tok": 9 }))).contains("1..=8"));
    assert_eq!(windows(mixtral(json!({ "sliding_window": 5 }))), [Some(5); 3]);
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
    let graph = graph_of(qwen3_moe(changes));
    assert_eq!((graph.moe.len(), graph.moe[0].layer, graph.moe[0].ff), (1, 1, 40));
    assert!(tensors(&graph).contains(&"model.layers.3.mlp.down_proj.weight"));
    assert_eq!(
        graph.moe[0].experts[15].gate.name,
        "model.layers.1.mlp.experts.15.gate_proj.weight"
    );
    for (key, renormalise) in [
        (json!({}), false),
        (json!({ "norm_topk_prob": null }), false),
        (json!({ "norm_topk_prob": false }), false),
        (json!({ "norm_topk_prob": true }), true),
    ] {
        let graph = graph_of(qwen3_moe(key));
        let scoring = Scoring::Softmax { renormalise };
        assert!(
            graph.ops.iter().any(|op| matches!(op, Op::Route { scoring: s, .. } if *s == scoring))
        );
    }
    let other_name = json!({ "num_experts": null, "num_local_experts": 12 });
    assert_eq!(graph_of(qwen3_moe(other_name)).moe[0].experts.len(), 12);
    assert_eq!(graph_of(qwen3_moe(json!({ "mlp_only_layers": [0, 1, 2, 3, 4] }))).moe, []);
    assert!(
        refusal(&qwen3_moe(json!({ "num_experts": null })))
            .contains("num_local_experts is missing")
    );
    assert!(
        refusal(&qwen3_moe(json!({ "moe_intermediate_size": 0 }))).contains("moe_intermediate")
    );
    assert!(refusal(&qwen3_moe(json!({ "mlp_only_layers": [-1] }))).contains("mlp_only_layers"));
}

/// Against `_compute_yarn_parameters` in double precision.
#[test]
fn yarn_keeps_short_wavelengths_and_divides_long_ones() {
    let yarn = |changes: Value| {
        let base = json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
            "original_max_position_embeddings": 64 });
        rope(&with(llama(), json!({ "rope_scaling": with(base, changes) }))).rope(16)
    };
    let close = |rope: &Rope, want: [f64; 4]| {
        let near = |(have, want): (&f32, f64)| (f64::from(*have) / want - 1.0).abs() < 1e-6;
        assert!(rope.inv_freq.iter().zip(want).all(near), "{:?}", rope.inv_freq);
    };
    let whole = yarn(json!({}));
    close(&whole, [1.0, 0.237_170_824_512_628, 0.05, 0.007_905_694_150_421]);
    assert!((whole.attention_factor - 1.138_629_4).abs() < 1e-6);
    let exact = yarn(json!({ "truncate": false, "attention_factor": 1.5 }));
    close(&exact, [1.0, 0.198_583_520_153_693, 0.025_595_245_891_924, 0.007_905_694_150_421]);
    assert_eq!(exact.attention_factor, 1.5);
    // DeepSeek's two factors: (0.1 * 0.5 ln 4 + 1) / (0.1 * 2 ln 4 + 1).
    let both = yarn(json!({ "mscale": 0.5, "mscale_all_dim": 2.0 }));
    assert!((both.attention_factor - 0.837_195_5).abs() < 1e-6, "{}", both.attention_factor);
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
    assert_eq!(read(&nameless), Err(FamilyError::Missing { key: "architectures" }));
    assert_eq!(name(&with(nameless, json!({ "model_type": "llama" }))), Ok("llama"));
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
    let gelu = graph_of(with(llama(), json!({ "hidden_act": "gelu_pytorch_tanh" })));
    let tanh = |op: &Op| matches!(op, Op::Gated { activation: Activation::GeluTanh, .. });
    assert_eq!(gelu.ops.iter().filter(|op| tanh(op)).count(), 3);
    assert!(refusal(&with(llama(), json!({ "hidden_act": "relu" }))).contains("\"relu\""));
    let awq = json!({ "quantization_config": { "quant_method": "awq" } });
    assert!(refusal(&with(llama(), awq)).contains("quantization_config"));
    for kind in ["dynamic", "longrope"] {
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
        json!({ "rope_type": "yarn" }),
        json!({ "rope_type": "yarn", "factor": 4.0, "truncate": 1 }),
        json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0 }),
        json!({ "rope_type": "yarn", "factor": 4.0, "beta_medium": 2.0 }),
    ] {
        refusal(&with(llama(), json!({ "rope_scaling": scaling })));
    }
}

#[test]
fn a_key_that_nothing_reads_is_refused_by_name() {
    for (key, value) in [
        ("attn_logit_softcapping", json!(50.0)),
        ("logit_scale", json!(0.0625)),
        ("sliding_window", json!(4096)),
        ("use_mrope", json!(true)),
        ("num_experts", json!(8)),
    ] {
        let error = refusal(&with(llama(), json!({ key: value })));
        assert!(error.contains(key) && error.contains("llama does not read"), "{error}");
        read(&with(llama(), json!({ key: null }))).unwrap();
    }
    let mistral = json!({ "architectures": ["MistralForCausalLM"], "attention_bias": true });
    assert!(refusal(&with(llama(), mistral)).contains("attention_bias"));
    let extra = json!({ "rope_type": "linear", "factor": 2.0, "beta_fast": 32 });
    let error = refusal(&with(llama(), json!({ "rope_scaling": extra })));
    assert!(error.contains("rope_scaling.beta_fast"), "{error}");
}

/// The further keys in published checkpoints of these families.
#[test]
fn what_published_configs_carry_is_read_or_known_to_be_harmless() {
    let common = json!({
        "_name_or_path": "x", "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3],
        "pad_token_id": null, "initializer_range": 0.02, "model_type": "llama",
        "pretraining_tp": 1, "torch_dtype": "bfloat16", "dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "tie_word_embeddings": false,
    });
    graph_of(with(with(llama(), common.clone()), json!({ "mlp_bias": false })));
    let routed = json!({
        "output_router_logits": false, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    });
    graph_of(with(with(mixtral(json!({})), common.clone()), routed.clone()));
    let switched = json!({
        "sliding_window": 4096, "use_sliding_window": false, "max_window_layers": 28,
        "attention_bias": false,
    });
    let qwen = with(with(qwen3(json!({})), common.clone()), switched.clone());
    assert_eq!(windows(qwen), [None; 3]);
    graph_of(with(with(with(qwen3_moe(json!({})), common), switched), routed));
}

/// If both are present, Transformers uses `rope_scaling`. What it would ignore is refused.
#[test]
fn rope_scaling_beside_rope_parameters_counts() {
    let both = |scaling: Value, parameters: Value| {
        let config = json!({ "rope_scaling": scaling, "rope_parameters": parameters });
        with(with(llama(), json!({ "rope_theta": 10000.0 })), config)
    };
    let plain = json!({ "rope_type": "default", "rope_theta": 10000.0 });
    let linear = json!({ "rope_type": "linear", "factor": 4.0 });
    let spec = rope(&both(linear.clone(), plain.clone()));
    assert_eq!(spec, RopeSpec { theta: 1e4, scaling: RopeScaling::Linear { factor: 4.0 } });
    assert_eq!(rope(&both(linear.clone(), linear.clone())), spec);
    for nothing in [json!(null), json!({})] {
        assert_eq!(rope(&both(nothing.clone(), linear.clone())), spec);
        assert_eq!(rope(&both(linear.clone(), nothing)), spec);
    }
    let dynamic = json!({ "rope_type": "dynamic", "factor": 4.0 });
    let error = refusal(&both(dynamic.clone(), plain.clone()));
    assert!(error.contains("rope_scaling.rope_type") && error.contains("dynamic"), "{error}");
    assert!(refusal(&both(plain.clone(), dynamic)).contains("rope_parameters.rope_type"));
    let other_base = with(plain.clone(), json!({ "rope_theta": 5e5 }));
    let error = refusal(&both(linear.clone(), other_base));
    assert!(error.contains("rope_scaling") && error.contains("rope_parameters"), "{error}");
    let other = with(linear.clone(), json!({ "factor": 2.0 }));
    assert!(refusal(&both(linear.clone(), other)).contains("rope_parameters"));
    assert!(refusal(&both(plain, linear)).contains("rope_parameters"));
}

#[test]
fn weights_say_what_they_are_for_and_where_they_come_from() {
    let graph = graph_of(mixtral(json!({})));
    let role = |name: &str| {
        let weight = graph.weights.iter().find(|weight| weight.tensor == name).unwrap();
        (weight.role, weight.layer)
    };
    for (name, expected) in [
        ("model.embed_tokens.weight", (WeightRole::Embedding, None)),
        ("model.layers.1.self_attn.k_proj.weight", (WeightRole::Key, Some(1))),
        ("model.layers.2.post_attention_layernorm.weight", (WeightRole::Norm, Some(2))),
        ("model.layers.0.block_sparse_moe.gate.weight", (WeightRole::Router, Some(0))),
        ("model.norm.weight", (WeightRole::Norm, None)),
        ("lm_head.weight", (WeightRole::Head, None)),
    ] {
        assert_eq!(role(name), expected, "{name}");
    }
    let [gate, up, down] = graph.moe[1].weights(3);
    assert_eq!(
        (gate.role, up.role, down.role),
        (WeightRole::Gate, WeightRole::Up, WeightRole::Down)
    );
    assert_eq!(gate.role.adapter_target(), Some("gate_proj"));
    assert_eq!(WeightRole::Router.adapter_target(), None);
    // Expert 3 of a stack: gates first, 96 rows each.
    let stack = Source::stored("model.layers.1.mlp.experts.gate_up_proj").rows(7 * 96..8 * 96);
    assert_eq!(up.source, Source::FirstOf(vec![Source::Itself, stack]));
}

/// A decoder whose layers differ in every argument of the building blocks.
#[test]
fn layers_may_differ_in_ropes_windows_widths_biases_and_norms() {
    use super::block::{Attention, Builder, FeedForward, QueryKeyNorm};
    use super::config::Shape;
    let shape = |kv_heads, head_dim| Shape {
        layers: 3,
        hidden: 32,
        heads: 4,
        kv_heads,
        head_dim,
        vocab: 50,
        context_max: 64,
    };
    let local = RopeSpec { theta: 1e4, scaling: RopeScaling::None };
    let global = RopeSpec { theta: 1e6, scaling: RopeScaling::None };
    let mut b = Builder::new(&shape(2, 8));
    let ropes = [b.rope(&local, 8), b.rope(&global, 16), b.rope(&local, 8)];
    assert_eq!((ropes[0], ropes[0] == ropes[1]), (ropes[2], false));
    let x = b.embed(32, 32_f32.sqrt());
    for (layer, shape) in [shape(2, 8), shape(1, 16), shape(2, 8)].iter().enumerate() {
        b.layer(layer);
        let attention = Attention {
            rope: (layer < 2).then_some(ropes[layer]),
            qkv_bias: layer == 0,
            norm: if layer == 1 { QueryKeyNorm::Heads(1e-6) } else { QueryKeyNorm::None },
            ..Attention::new(shape, ropes[0], [Some(4), None, Some(9)][layer])
        };
        b.residual(x, "input_layernorm", 1e-5, |b, x| b.attention(x, &attention));
        let ff = FeedForward::plain(40 + 8 * layer, Activation::Silu);
        b.residual(x, "post_attention_layernorm", 1e-5, |b, x| b.feed_forward(x, &ff));
    }
    let Described { graph, ropes, .. } = b.finish(x, 1e-5, true);
    well_formed(&graph);
    assert_eq!(ropes, [local, global]);
    assert_eq!(graph.kv[1], Kv { kv_heads: 1, head_dim: 16 });
    assert!(graph.tied());
    let count = |wanted: &dyn Fn(&Op) -> bool| graph.ops.iter().filter(|op| wanted(op)).count();
    assert_eq!(count(&|op| matches!(op, Op::Rope { .. })), 4, "the last layer has no rope");
    assert_eq!(count(&|op| matches!(op, Op::Linear { bias: Some(_), .. })), 3);
    assert_eq!(graph.weights.iter().filter(|weight| weight.tensor.ends_with(".bias")).count(), 3);
}
