//! Values that are not finite give the same error on both backends: weights when they are loaded,
//! logits when they are computed.

use super::{Random, device};
use crate::backend::{Device, LogitRows};
use crate::check::Expected;
use crate::cpu::CpuDevice;
use crate::engine::LoadOptions;
use crate::error::SessionError;
use crate::gpu::Reduction;
use crate::model::Model;
use crate::perplexity::{PerplexityOptions, perplexity};
use crate::sampler::SamplerOptions;
use crate::session::Session;
use crate::testing::{self, Wanted};
use doppler_store::DType;
use serde_json::{Value, json};

fn config() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 50, "max_position_embeddings": 64, "norm_topk_prob": true,
        "mlp_only_layers": [0],
    })
}

/// Random weights, each of which `change` may replace, given the tensor and the index.
fn model(dtype: DType, change: impl Fn(&str, usize) -> Option<f32>) -> Model {
    let mut random = Random::new("finite");
    let values = |wanted: &Wanted<'_>| {
        let draw = |i| change(wanted.name, i).unwrap_or(random.float() * 0.3);
        (0..wanted.rows * wanted.cols).map(draw).collect()
    };
    let plain = |wanted: &Wanted<'_>| wanted.rows == 1 || wanted.name.ends_with("mlp.gate.weight");
    testing::model(&config(), values, |wanted| if plain(wanted) { DType::F32 } else { dtype }).0
}

fn devices() -> Vec<Box<dyn Device>> {
    let gpu = device(Reduction::Lane).map(|gpu| Box::new(gpu) as Box<dyn Device>);
    [Some(Box::new(CpuDevice) as Box<dyn Device>), gpu].into_iter().flatten().collect()
}

fn options() -> LoadOptions {
    LoadOptions { context: Some(32), ..LoadOptions::default() }
}

#[test]
fn a_weight_that_is_not_finite_is_refused_where_it_is_loaded() {
    for (tensor, dtype, named) in [
        ("model.embed_tokens.weight", DType::Bf16, "tensor model.embed_tokens.weight, row 1"),
        ("model.norm.weight", DType::Bf16, "tensor model.norm.weight, row 0"),
        ("model.layers.1.mlp.gate.weight", DType::Q8_0, "layers.1.mlp.gate.weight, row 1"),
        ("model.layers.0.mlp.up_proj.weight", DType::Q8_0, "layers.0.mlp.up_proj.weight, row 1"),
        ("model.layers.1.mlp.experts.2.down_proj.weight", DType::Q8_0, "layer 1 expert 2, down"),
    ] {
        for odd in [f32::NAN, f32::NEG_INFINITY] {
            let at = if tensor.contains("norm") { 3 } else { 64 + 3 };
            let model = model(dtype, |name, i| (name == tensor && i == at).then_some(odd));
            for device in devices() {
                let loaded = Session::new(&model, device.as_ref(), &options());
                let error = match loaded {
                    Err(error) => error,
                    // An expert is loaded when a token needs it.
                    Ok(mut session) => session.settle_all().unwrap_err(),
                };
                assert!(matches!(error, SessionError::Weight(_)), "{error:?}");
                let error = error.to_string();
                assert!(error.contains(named) && error.contains("convert it again"), "{error}");
            }
        }
    }
}

/// Weights that are fine one by one but overflow together.
#[test]
fn logits_that_are_not_finite_are_refused_wherever_they_are_asked_for() {
    let huge = |name: &str, _: usize| match name {
        name if name.ends_with("v_proj.weight") => Some(1e3),
        name if name.ends_with("o_proj.weight") => Some(3e38),
        _ => None,
    };
    let model = model(DType::F32, huge);
    for device in devices() {
        let mut session = Session::new(&model, device.as_ref(), &options()).unwrap();
        let step = session.step(&[1, 2, 3], LogitRows::All);
        assert!(matches!(step, Err(SessionError::Output { position: 0 })), "{step:?}");
        assert_eq!(session.position(), 0, "it can be tried again");
        let last = session.step(&[1, 2, 3], LogitRows::Last);
        assert!(matches!(last, Err(SessionError::Output { position: 2 })), "{last:?}");
        for temperature in [0.0, 1.0] {
            let options = SamplerOptions { temperature, ..SamplerOptions::default() };
            session.reset_with(options).unwrap();
            let next = session.next(1, 4);
            assert!(matches!(next, Err(SessionError::Output { position: 0 })), "{next:?}");
        }
        let text = PerplexityOptions { window: 16, bos: None };
        let scored = perplexity(&mut session, &[1, 2, 3, 4], &text, |_| {});
        assert!(matches!(scored, Err(SessionError::Output { .. })), "{scored:?}");
    }
}

/// Logits that are finite but so far apart that a likelihood is not.
#[test]
fn a_perplexity_that_is_not_finite_is_an_error() {
    // Far apart even where the sum over a random row, by which these are multiplied, is near 0.
    let steep = |name: &str, i: usize| (name == "lm_head.weight").then_some((i / 64) as f32 * 1e30);
    let model = model(DType::F32, steep);
    let mut session = Session::new(&model, &CpuDevice, &options()).unwrap();
    let text = PerplexityOptions { window: 16, bos: None };
    let scored = perplexity(&mut session, &[7, 7, 7, 7, 7, 7], &text, |_| {});
    assert!(matches!(scored, Err(SessionError::Perplexity { .. })), "{scored:?}");
}

#[test]
fn a_reference_that_is_not_finite_is_refused() {
    use safetensors::tensor::{Dtype, TensorView, serialize};
    let file = |odd: f32| {
        let ids = [1_i64, 2].map(i64::to_le_bytes).concat();
        let logits = [0.5, odd, 1.0, 2.0].map(f32::to_le_bytes).concat();
        let view =
            |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
        let tensors = [
            ("input_ids", view(Dtype::I64, &[2], &ids)),
            ("greedy", view(Dtype::I64, &[2], &ids)),
            ("logits", view(Dtype::F32, &[2, 2], &logits)),
        ];
        Expected::parse(&serialize(tensors, None).unwrap())
    };
    assert!(file(0.25).is_ok());
    for odd in [f32::NAN, f32::INFINITY] {
        let error = file(odd).unwrap_err().to_string();
        assert!(error.contains("logits") && error.contains("not finite"), "{error}");
    }
}

/// What the GPU's kernels do not support is reported before anything is read. The CPU supports it.
#[test]
fn a_model_that_a_device_cannot_run_is_refused_before_it_is_loaded() {
    let small = |head_dim: usize| {
        let mut config = config();
        config["head_dim"] = json!(head_dim);
        config
    };
    let mixed = |wanted: &Wanted<'_>| match wanted.name {
        name if name.contains("experts") && name.ends_with("up_proj.weight") => DType::Q8_0,
        _ => DType::Bf16,
    };
    for (config, named) in [
        (small(18), ["attention heads of 18 elements", "multiples of 4"]),
        (config(), ["gate matrices are BF16 and up matrices Q8_0", "layer 1"]),
    ] {
        let mut random = Random::new("refused");
        let values = |wanted: &Wanted<'_>| random.floats(wanted.rows * wanted.cols);
        let (model, reader) = testing::model(&config, values, mixed);
        let mut on_the_cpu = Session::new(&model, &CpuDevice, &options()).unwrap();
        on_the_cpu.step(&[1, 2, 3], LogitRows::Last).unwrap();
        let Some(device) = device(Reduction::Lane) else { return };
        reader.broken.store(true, std::sync::atomic::Ordering::Relaxed);
        let error = Session::new(&model, &device, &options()).err().unwrap().to_string();
        for named in named.iter().chain(&["--backend cpu"]) {
            assert!(error.contains(named), "{named} in {error}");
        }
        assert!(!error.contains('{'), "no debug print: {error}");
    }
}
