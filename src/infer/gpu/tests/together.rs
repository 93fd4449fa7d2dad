//! Several sequences as rows of one step on a device: what each writes is what it writes alone, the
//! step is one submission, and graphs that have no such step run one sequence after another.

use serde_json::json;

use super::device;
use super::models::mixture;
use crate::backend::KvFormat;
use crate::engine::{Engine, Next};
use crate::gpu::Reduction;
use crate::many_tests::together;
use crate::model::Model;
use crate::sequence::Sequence;
use crate::sequence_tests::{Bench, CONTEXT, GREEDY, VOCAB, attending, convolving};
use crate::testing;
use doppler_store::DType;

/// Three dense layers, in the formats of a Q4_K_M file.
fn dense(seed: u64) -> Model {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
        "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6,
    });
    testing::random(&config, seed, mixture)
}

/// Queries, keys and values in three formats.
fn mixed(seed: u64) -> Model {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6,
    });
    testing::random(&config, seed, |wanted| match wanted.name {
        name if wanted.rows > 1 && name.contains("q_proj") => DType::Q5K,
        name if wanted.rows > 1 && name.contains("k_proj") => DType::Q6K,
        name if wanted.rows > 1 && name.contains("v_proj") => DType::Q4_1,
        _ => mixture(wanted),
    })
}

/// Norms behind the blocks, windows, and capped logits.
fn normed(seed: u64) -> Model {
    let config = json!({
        "architectures": ["Gemma2ForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6,
        "sliding_window": 40, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh",
    });
    testing::random(&config, seed, mixture)
}

#[test]
fn rows_of_a_step_on_a_device_write_what_each_writes_alone() {
    let Some(device) = device(Reduction::Group) else { return };
    let bench = |model| Bench { device: &device, kv: KvFormat::F16, slots: 36, model };
    for model in [dense, mixed, normed] {
        together(&bench(model), rand::random());
    }
}

/// Experts that all have slots, which are filled as they are asked for.
#[test]
fn rows_with_experts_write_what_each_writes_alone() {
    let Some(device) = device(Reduction::Group) else { return };
    let bench = Bench { device: &device, kv: KvFormat::F16, slots: 36, model: attending };
    // With the first, a step that had waited for an expert took other tokens.
    for seed in [15899311146902198148, rand::random()] {
        together(&bench, seed);
    }
}

/// Recurrent states and experts that are paged.
#[test]
fn sequences_that_cannot_share_a_step_take_turns() {
    let Some(device) = device(Reduction::Group) else { return };
    for model in [attending, convolving] {
        let bench = Bench { device: &device, kv: KvFormat::F16, slots: 10, model };
        together(&bench, rand::random());
    }
}

fn writer(engine: &mut Engine, prompt: &[u32]) -> (Sequence, u32) {
    let mut sequence = Sequence::new(GREEDY, CONTEXT).unwrap();
    let logits = engine.prefill(&mut sequence, prompt).unwrap();
    let token = sequence.choose(&logits);
    (sequence, token)
}

/// A sequence's tokens and the one that follows them.
fn written((sequence, token): &(Sequence, u32)) -> Vec<u32> {
    sequence.tokens().iter().copied().chain([*token]).collect()
}

/// A token of each.
fn go(engine: &mut Engine, writers: &mut [(Sequence, u32)], more: usize) {
    let rows = writers.iter_mut().map(|(sequence, token)| (sequence, *token));
    let mut rows: Vec<Next<'_>> =
        rows.map(|(sequence, token)| Next { sequence, token, more }).collect();
    let chosen = engine.next_of_each(&mut rows);
    for (writer, token) in writers.iter_mut().zip(chosen) {
        writer.1 = token.unwrap();
    }
}

/// A step that halts is behind another whose rows were others, so that all it finds on the device is
/// theirs; and another is queued behind it. Prompts of one token leave most experts unread.
#[test]
fn a_step_that_waits_for_experts_runs_again_with_the_tokens_that_it_was_given() {
    const STEPS: usize = 8;
    let Some(device) = device(Reduction::Group) else { return };
    let bench = Bench { device: &device, kv: KvFormat::F16, slots: 36, model: attending };
    let mut halted = 0;
    for (seed, more) in [(1, 1), (2, STEPS), (3, 2)] {
        let model = attending(seed);
        let mut engine = bench.engine(&model, CONTEXT);
        let alone: Vec<Vec<u32>> = (0..STEPS as u32)
            .map(|i| {
                let mut writers = [writer(&mut engine, &[7 * i])];
                (0..STEPS).for_each(|_| go(&mut engine, &mut writers, 1));
                written(&writers[0])
            })
            .collect();
        let mut engine = bench.engine(&model, CONTEXT);
        let mut writers = Vec::new();
        // One more begins at every step.
        for i in 0..STEPS {
            writers.insert(0, writer(&mut engine, &[7 * i as u32]));
            let before = engine.stats().pager.filled_bytes;
            go(&mut engine, &mut writers, more);
            halted += usize::from(i > 0 && engine.stats().pager.filled_bytes > before);
        }
        for (i, writer) in writers.iter().rev().enumerate() {
            let tokens = written(writer);
            assert_eq!(tokens, alone[i][..tokens.len()], "of seed {seed}, sequence {i}");
        }
    }
    assert!(halted > 3, "{halted} steps waited for experts");
}

#[test]
fn a_step_of_rows_is_one_submission_and_the_next_is_queued_behind_it() {
    let Some(device) = device(Reduction::Group) else { return };
    let bench = Bench { device: &device, kv: KvFormat::F16, slots: 36, model: dense };
    let mut engine = bench.engine(&dense(1), CONTEXT);
    let prompts = (1..6).map(|len| (0..7 * len).collect::<Vec<u32>>());
    let mut writers: Vec<_> = prompts.map(|prompt| writer(&mut engine, &prompt)).collect();
    let mut go = |engine: &mut Engine, more| {
        let before = engine.counters();
        go(engine, &mut writers, more);
        engine.counters().since(&before)
    };
    // Makes the plan.
    go(&mut engine, 1);
    let one = go(&mut engine, 1);
    assert_eq!((one.submissions, one.readbacks), (1, 1));
    let ahead = go(&mut engine, 9);
    assert_eq!((ahead.submissions, ahead.readbacks), (2, 1));
    let next = go(&mut engine, 8);
    assert_eq!((next.submissions, next.readbacks), (1, 1));
    let last = go(&mut engine, 1);
    assert_eq!((last.submissions, last.readbacks), (0, 1));
}
