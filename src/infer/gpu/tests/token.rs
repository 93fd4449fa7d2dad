//! Tokens as single submissions: which kernels, how many, and what a halted layer needs.

use serde_json::{Value, json};

use crate::backend::{KvFormat, SlotClass};
use crate::families;
use crate::gpu::decode::{Aside, Fuse, Layout, Points, TokenSteps, together};
use crate::gpu::experts::{Class, Home};
use crate::gpu::lower::{Lower, Place, Recipe};
use crate::gpu::pipelines::Reduction;
use crate::gpu::weights::{WeightShape, cut, join_shapes, vectors};
use crate::graph::{Activation, Buf, ExpertLayout, Graph, MatrixSpec, Op};
use doppler_store::DType;

fn graph(config: Value) -> Graph {
    families::read(&config).unwrap().graph
}

fn llama(bias: bool) -> Graph {
    graph(json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 8, "vocab_size": 50, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        "attention_bias": bias, "hidden_act": "silu", "rope_theta": 10000.0,
    }))
}

fn mixture() -> Graph {
    graph(json!({
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 50, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 64, "hidden_act": "silu", "norm_topk_prob": true,
        "mlp_only_layers": [0],
    }))
}

const F32: MatrixSpec = MatrixSpec { dtype: DType::F32, rows: 0, cols: 0, offset: 0 };

/// The layers' slots, all in one chunk.
fn homes(graph: &Graph, up: DType) -> Vec<Option<Home>> {
    let home = |(i, spec): (u16, &crate::graph::Moe)| {
        let gate = MatrixSpec { rows: spec.ff, cols: spec.hidden, ..F32 };
        let down = MatrixSpec { rows: spec.hidden, cols: spec.ff, ..F32 };
        let up = MatrixSpec { dtype: up, ..gate };
        let layout = ExpertLayout { gate, up, down, bytes: 1 << 20 };
        Class::new(&SlotClass { layout, count: 4 }, usize::from(i), 1 << 30).unwrap().home(i, spec)
    };
    (0..).zip(&graph.moe).map(home).collect()
}

/// The token of a graph with f32 weights, with bindings of this many bytes.
fn token(
    graph: &Graph,
    kv: KvFormat,
    most: u64,
    up: DType,
    fetches: bool,
) -> Option<TokenSteps<Recipe, Place>> {
    token_by(Reduction::Group, graph, kv, most, up, fetches)
}

fn token_by(
    reduction: Reduction,
    graph: &Graph,
    kv: KvFormat,
    most: u64,
    up: DType,
    fetches: bool,
) -> Option<TokenSteps<Recipe, Place>> {
    let shape = |(weight, vector): (&crate::graph::Weight, bool)| match vector {
        true => WeightShape::Vector,
        false => {
            let spec = MatrixSpec { rows: weight.rows, cols: weight.cols, ..F32 };
            WeightShape::Matrix(cut("a weight", &spec, most).unwrap())
        }
    };
    let mut weights: Vec<_> = graph.weights.iter().zip(vectors(graph)).map(shape).collect();
    for group in together(graph, reduction, kv == KvFormat::F16) {
        join_shapes(&mut weights, &group, most);
    }
    let homes = homes(graph, up);
    let chunks: Vec<_> = homes.iter().flatten().map(|home| home.shape).collect();
    let mut fuse = Fuse {
        lower: Lower {
            graph,
            weights: &weights,
            chunks: &chunks,
            kv,
            batch: 1,
            reduction,
            cooperative: None,
            halved: None,
        },
        team: "group",
        layout: &Layout::of(graph),
        homes: &homes,
        fetches: &vec![fetches; graph.moe.len()],
        many: false,
        moved: None,
    };
    fuse.token().unwrap()
}

fn lowered(graph: &Graph) -> TokenSteps<Recipe, Place> {
    token(graph, KvFormat::F16, 1 << 30, DType::F32, false).unwrap()
}

/// Dispatches of a token as one submission. `None` if the graph runs op by op.
pub(crate) fn dispatches(graph: &Graph) -> Option<usize> {
    if graph.embeds() {
        return None;
    }
    let token = token(graph, KvFormat::F16, 1 << 30, DType::F32, false);
    token.map(|TokenSteps { steps, .. }| steps.len())
}

/// The kernels in order.
fn kernels(steps: &[Recipe]) -> Vec<&str> {
    steps.iter().map(|recipe| recipe.kernel.as_str()).collect()
}

#[test]
fn a_dense_layer_is_eight_dispatches_biased_or_not() {
    for bias in [false, true] {
        let graph = llama(bias);
        let TokenSteps { steps, tail, layers } = lowered(&graph);
        assert_eq!(steps.len(), 1 + 3 * 8 + 2, "{:?}", kernels(&steps));
        assert!(layers.is_empty());
        let layer = [
            "decode_norm_group",
            "decode_linear_f32_group",
            "decode_attention_group",
            "decode_combine",
            "decode_linear_f32_group",
            "decode_norm_group",
            "decode_gate_up_f32_group",
            "decode_linear_f32_group",
        ];
        assert_eq!(kernels(&steps[1..9]), layer);
        assert_eq!(kernels(&steps[17..25]), layer);
        // After the last attention no persistent state changes.
        assert_eq!(tail, 1 + 2 * 8 + 4);
        let joined = steps[2].storage.iter().any(|place| matches!(place, Place::Biases(_)));
        assert_eq!(joined, bias);
    }
}

#[test]
fn a_layer_without_gate_is_ten_dispatches() {
    let graph = graph(json!({
        "architectures": ["NemotronForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
        "vocab_size": 50, "max_position_embeddings": 64, "hidden_act": "relu2",
    }));
    let TokenSteps { steps, .. } = lowered(&graph);
    let layer = [
        "decode_layer_norm_group",
        "decode_linear_f32_group",
        "decode_attention_group",
        "decode_combine",
        "decode_linear_f32_group",
        "decode_layer_norm_group",
        "decode_linear_f32_group",
        "activate",
        "decode_pack",
        "decode_linear_f32_group",
    ];
    assert_eq!(kernels(&steps[1..11]), layer);
    assert_eq!(steps.len(), 1 + 2 * 10 + 2);
}

#[test]
fn a_layer_of_experts_is_ten_dispatches_and_eleven_where_it_fetches() {
    let graph = mixture();
    let TokenSteps { steps, layers, tail } = lowered(&graph);
    assert_eq!(steps.len(), 1 + 8 + 2 * 10 + 2, "{:?}", kernels(&steps));
    let aside = vec![Aside { of: Place::Activation(Buf(0)), at: 0, bytes: 256 }];
    let points =
        |begin: usize| Points { resume: begin + 5, aside: aside.clone(), routed: begin + 8 };
    assert_eq!(layers, [points(9), points(19)]);
    assert_eq!(tail, 29);
    let names = kernels(&steps[14..19]);
    assert_eq!(names[..3], ["decode_norm_group", "decode_linear_f32_group", "decode_route"]);
    assert_eq!(names[3..], ["decode_expert_gate_up_f32_group", "decode_expert_down_f32_group"]);
    let fetching = token(&graph, KvFormat::F16, 1 << 30, DType::F32, true).unwrap();
    assert_eq!(fetching.steps.len(), steps.len() + 2);
    assert_eq!(fetching.steps[fetching.layers[1].routed].kernel, "decode_fetch");
}

#[test]
fn a_cache_of_f32_runs_attention_op_by_op_and_the_rest_fused() {
    let steps = token(&llama(false), KvFormat::F32, 1 << 30, DType::F32, false).unwrap().steps;
    let layer = [
        "decode_norm_group",
        "decode_linear_f32_group",
        "decode_linear_f32_group",
        "decode_linear_f32_group",
        "rope",
        "rope",
        "kv_write_f32",
        "attention_f32",
        "decode_pack",
        "decode_linear_f32_group",
        "decode_norm_group",
        "decode_gate_up_f32_group",
        "decode_linear_f32_group",
    ];
    assert_eq!(kernels(&steps[1..14]), layer);
}

#[test]
fn matrices_that_no_binding_holds_are_products_of_their_pieces() {
    let graph = llama(true);
    // 16 rows of 64 columns.
    let steps = token(&graph, KvFormat::F16, 4096, DType::F32, false).unwrap().steps;
    let names = kernels(&steps);
    // The table in four row ranges; queries in four, keys and values in one each.
    assert_eq!(names[..4], ["embed_f32"; 4]);
    assert_eq!(names[4], "decode_norm_group");
    assert_eq!(names[5..11], ["decode_linear_f32_group"; 6]);
    assert_eq!(names[11], "decode_attention_group");
    // Gate and up are not in one buffer.
    assert!(names.contains(&"gated_inplace") && !names.contains(&"decode_gate_up_f32_group"));
}

#[test]
fn a_norm_behind_a_block_is_added_in_one_dispatch() {
    let graph = graph(json!({
        "architectures": ["Gemma2ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 50, "query_pre_attn_scalar": 16, "sliding_window": 8,
        "max_position_embeddings": 64,
    }));
    let TokenSteps { steps, .. } = lowered(&graph);
    let names = kernels(&steps);
    let layer = [
        "decode_norm_group",
        "decode_linear_f32_group",
        "decode_attention_group",
        "decode_combine",
        "decode_linear_f32_group",
        "decode_norm_add_norm_group",
        "decode_gate_up_f32_group",
        "decode_linear_f32_group",
        "decode_norm_add_norm_group",
        "decode_linear_f32_group",
    ];
    assert_eq!(names[1..11], layer);
    assert_eq!(steps.len(), 1 + 1 + 3 * 8 + 1 + 1, "{names:?}");
}

#[test]
fn without_any_op_or_with_one_more_there_is_still_a_token() {
    let whole = mixture();
    let count = lowered(&whole).steps.len();
    let normed = Buf(1);
    for at in 1..whole.ops.len() - 1 {
        let mut odd = whole.clone();
        let gated =
            Op::Gated { gate: normed, up: normed, out: normed, activation: Activation::Silu };
        odd.ops.insert(at, gated);
        let more = lowered(&odd).steps.len();
        assert!((count + 1..=count + 16).contains(&more), "{more} with an op at {at}");
        let mut cut = whole.clone();
        let op = cut.ops.remove(at);
        let token = token(&cut, KvFormat::F16, 1 << 30, DType::F32, false);
        // Experts never run without routing.
        let lost = matches!(op, Op::Route { .. });
        assert_eq!(
            token.map(|token| token.steps.len() <= count + 16),
            (!lost).then_some(true),
            "{op:?}"
        );
    }
}

#[test]
fn a_software_adapter_looks_experts_up_without_barriers_unless_they_are_fetched() {
    let graph = mixture();
    let by = |fetches| {
        token_by(Reduction::Lane, &graph, KvFormat::F16, 1 << 30, DType::F32, fetches).unwrap()
    };
    let TokenSteps { steps, layers, .. } = by(false);
    let names = kernels(&steps);
    let routes = names.iter().position(|name| *name == "route").unwrap();
    assert_eq!(names[routes - 2..routes], ["rms_norm_split_lane", "linear_f32_lane"]);
    let after = [
        "decode_seek",
        "decode_aside",
        "expert_gate_up_f32_lane",
        "expert_down_f32_lane",
        "expert_sum",
        "add",
    ];
    assert_eq!(names[routes + 1..routes + 7], after);
    // Only the kernels that look up slots, and those that set aside what a halted layer restarts
    // with.
    assert_eq!(names.iter().filter(|name| name.starts_with("decode_")).count(), 2 * 2);
    assert!(layers.iter().all(|points| points.aside.len() == 1), "{layers:?}");
    let fetched = by(true);
    let names = kernels(&fetched.steps);
    for name in ["decode_route", "decode_fetch", "decode_expert_gate_up_f32_group"] {
        assert!(names.contains(&name), "{name}");
    }
}
