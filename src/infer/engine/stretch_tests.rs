//! Sequences that cross the original context of a longrope, on both backends.

use serde_json::json;

use crate::backend::{Device, KvFormat, LogitRows};
use crate::cpu::CpuDevice;
use crate::engine::{Engine, LoadOptions, Rows};
use crate::gpu::Reduction;
use crate::gpu::test_device;
use crate::model::Model;
use crate::sampler::{SamplerOptions, greedy};
use crate::sequence::Sequence;
use crate::testing;
use doppler_store::DType;

/// The original context of 16 tokens, of 64.
fn model() -> Model {
    let config = json!({
        "architectures": ["Phi3ForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 61, "max_position_embeddings": 64, "original_max_position_embeddings": 16,
        "rope_scaling": { "type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 3.0, 6.0, 12.0] },
    });
    testing::random(&config, 3, |_| DType::F32)
}

fn engine(model: &Model, device: &dyn Device) -> Engine {
    let (context, kv) = (Some(64), KvFormat::F32);
    let options = LoadOptions { context, batch: 7, kv, ..LoadOptions::default() };
    Engine::load(model, device, &options).unwrap()
}

fn sequence() -> Sequence {
    Sequence::new(SamplerOptions::default(), 64).unwrap()
}

fn text() -> Vec<u32> {
    (0..30).map(|i| (i * 17 + 5) % 61).collect()
}

/// The logits after `tokens`, in one go.
fn fresh(engine: &mut Engine, tokens: &[u32]) -> Vec<f32> {
    engine.prefill(&mut sequence(), tokens).unwrap()
}

fn same(got: &[f32], want: &[f32], what: &str) {
    let off = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off < 1e-4, "{what}: off by {off}");
}

fn devices() -> Vec<Box<dyn Device>> {
    let gpus = [Reduction::Lane, Reduction::Group].into_iter().filter_map(test_device);
    let gpus = gpus.map(|device| Box::new(device) as Box<dyn Device>);
    [Box::new(CpuDevice) as Box<dyn Device>].into_iter().chain(gpus).collect()
}

#[test]
fn every_length_has_its_own_keys_whichever_way_it_was_reached() {
    let (model, text) = (model(), text());
    for device in devices() {
        let mut engine = engine(&model, device.as_ref());
        let want: Vec<Vec<f32>> = (0..=24).map(|len| fresh(&mut engine, &text[..len])).collect();
        let mut one = sequence();
        engine.prefill(&mut one, &text[..10]).unwrap();
        let mut forked = None;
        for len in 11..=24 {
            let got = engine.prefill(&mut one, &text[len - 1..len]).unwrap();
            same(&got, &want[len], &format!("{len} tokens, one by one"));
            if len == 15 {
                forked = Some(one.fork());
            }
        }
        // The fork has the short form, although its blocks were shared.
        let mut forked = forked.unwrap();
        let got = engine.prefill(&mut forked, &text[15..16]).unwrap();
        same(&got, &want[16], "a fork of 16");
        // Back behind the original context, and beyond it again.
        one.rewind(12);
        let got = engine.prefill(&mut one, &text[12..13]).unwrap();
        same(&got, &want[13], "rewound to 13");
        let got = engine.prefill(&mut one, &text[13..20]).unwrap();
        same(&got, &want[20], "from 13 to 20 in one step");
        let got = engine.prefill(&mut forked, &text[16..24]).unwrap();
        same(&got, &want[24], "the fork in two batches");
    }
}

/// The two forms give different logits, or the test above would show nothing.
#[test]
fn the_forms_differ() {
    let (model, text) = (model(), text());
    let mut engine = engine(&model, &CpuDevice);
    let short = fresh(&mut engine, &text[..16]);
    let mut long = sequence();
    long.expect(30);
    let rows = Rows { sequence: &mut long, tokens: &text[..7], logits: LogitRows::None };
    engine.step(&mut [rows]).unwrap();
    for tokens in [&text[7..14], &text[14..16]] {
        let logits = LogitRows::Last;
        let rows = Rows { sequence: &mut long, tokens, logits };
        let got = engine.step(&mut [rows]).unwrap().remove(0);
        if tokens.len() == 2 {
            let off = got.iter().zip(&short).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off > 1e-2, "{off}");
        }
    }
}

/// Tokens queued ahead on a device stop at the original context.
#[test]
fn a_device_that_runs_ahead_chooses_what_fresh_sequences_would() {
    let (model, text) = (model(), text());
    for device in devices() {
        let mut engine = engine(&model, device.as_ref());
        let mut known = text[..12].to_vec();
        let mut one = sequence();
        let logits = engine.prefill(&mut one, &known).unwrap();
        known.push(greedy(&logits));
        for left in (1..=8).rev() {
            known.push(engine.next(&mut one, known[known.len() - 1], left).unwrap());
        }
        for len in 12..known.len() {
            let want = greedy(&fresh(&mut engine, &known[..len]));
            assert_eq!(known[len], want, "after {len} tokens");
        }
    }
}
