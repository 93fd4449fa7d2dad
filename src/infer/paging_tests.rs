//! Paging does not change a bit of the results, counts add up, and too few slots are refused.

use std::sync::atomic::Ordering;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use super::backend::{Backend, Capacity, KvFormat, LogitRows, Slot};
use super::cpu::{CpuBackend, CpuDevice};
use super::engine::LoadOptions;
use super::error::SessionError;
use super::generate::{GenerateOptions, StopReason, generate};
use super::graph::MoeId;
use super::model::Model;
use super::pager::Pager;
use super::session::Session;
use super::slots::{SlotBudget, SlotPlan};
use super::testing;
use doppler_store::{DType, PolicyKind, ReadError};

/// 3 sparse layers of 12 experts, top 3, and a dense layer. The sizes are deliberately odd.
fn config() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 40, "intermediate_size": 56,
        "moe_intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 10, "vocab_size": 131,
        "max_position_embeddings": 64, "num_experts": 12, "num_experts_per_tok": 3,
        "mlp_only_layers": [1], "rms_norm_eps": 1e-6,
    })
}

/// The last layer's down projections have another type, which makes two slot classes.
fn two_classes(wanted: &testing::Wanted<'_>) -> DType {
    match wanted.name {
        name if name.contains("layers.3.mlp.experts") && name.contains("down") => DType::Q6K,
        name if name.contains("experts") => DType::Q4K,
        _ => DType::F32,
    }
}

fn session(model: &Model, slots: SlotBudget) -> Result<Session, SessionError> {
    let options = LoadOptions { context: Some(64), batch: 16, slots, ..LoadOptions::default() };
    Session::new(model, &CpuDevice, &options)
}

/// Logits of a prompt in batches of 16, and of single tokens after it.
fn logits(session: &mut Session, tokens: &[u32]) -> Vec<Vec<f32>> {
    session.reset();
    let mut all = vec![session.step(&tokens[..16], LogitRows::All).unwrap()];
    all.push(session.step(&tokens[16..21], LogitRows::All).unwrap());
    all.extend(tokens[21..].iter().map(|t| session.step(&[*t], LogitRows::Last).unwrap()));
    all
}

fn tokens(seed: u64) -> Vec<u32> {
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    (0..40).map(|_| rng.random_range(0..131)).collect()
}

#[test]
fn a_quarter_of_the_experts_gives_the_same_bits_as_all_of_them() {
    let seed = rand::random();
    let (tokens, model) = (tokens(seed), testing::random(&config(), seed, two_classes));
    assert_eq!(model.experts(), 36);
    let mut whole = session(&model, SlotBudget::All).unwrap();
    let mut paged = session(&model, SlotBudget::Experts(9)).unwrap();
    assert_eq!(logits(&mut whole, &tokens), logits(&mut paged, &tokens));

    let stats = paged.stats();
    println!("{stats:?}");
    assert_eq!((stats.slots, stats.resident), (9, 9));
    assert_eq!(stats.pager.demands, stats.pager.hits.total());
    assert!(stats.pager.evictions > 0 && stats.pager.extra_waves > 0, "{stats:?}");
    let misses = stats.pager.hits.disk;
    assert_eq!(
        misses,
        stats.pager.evictions + 9,
        "each miss took a free slot or evicted an expert"
    );
    let all = whole.stats().pager;
    assert_eq!(all.demands, stats.pager.demands, "the same experts were asked for");
    assert_eq!((all.evictions, all.extra_waves), (0, 0));
    assert_eq!(all.hits.disk as usize, whole.stats().resident, "each came once");
    assert!(all.filled_bytes > 0 && all.filled_bytes < stats.pager.filled_bytes);
}

/// Layers change the state so little that the next layer's choice can be seen before they are
/// computed.
fn quiet(rng: &mut StdRng, wanted: &testing::Wanted<'_>) -> Vec<f32> {
    let adds = wanted.name.contains("o_proj") || wanted.name.contains("down");
    let scale = if adds { 1e-3 } else { 0.3 };
    (0..wanted.rows * wanted.cols).map(|_| rng.random_range(-1.0..1.0) * scale).collect()
}

#[test]
fn what_a_token_misses_is_read_before_it_asks() {
    let seed = rand::random();
    let (tokens, mut rng) = (tokens(seed), StdRng::seed_from_u64(seed));
    let (model, reader) = testing::model(&config(), |wanted| quiet(&mut rng, wanted), two_classes);
    let mut whole = session(&model, SlotBudget::All).unwrap();
    let wanted = logits(&mut whole, &tokens);

    let mut ahead = session(&model, SlotBudget::Experts(12)).unwrap();
    assert_eq!(logits(&mut ahead, &tokens), wanted);
    let stats = ahead.stats().pager;
    println!("{stats:?}");
    assert_eq!(stats.demands, stats.hits.total());
    assert!(stats.read_ahead_used * 2 > stats.read_ahead, "most guesses are right");

    let mut behind = session(&model, SlotBudget::Experts(12)).unwrap();
    assert!(behind.switch_read_ahead(false), "this device can guess");
    assert_eq!(logits(&mut behind, &tokens), wanted);
    let other = behind.stats().pager;
    assert_eq!((other.read_ahead, other.read_ahead_used), (0, 0));
    assert_eq!((stats.hits, stats.evictions), (other.hits, other.evictions));

    // Reads ahead that fail are repeated when the expert is needed.
    reader.breaks_ahead.store(true, Ordering::Relaxed);
    let mut ahead = session(&model, SlotBudget::Experts(12)).unwrap();
    assert_eq!(logits(&mut ahead, &tokens), wanted);
    assert_eq!(ahead.stats().pager, stats);
}

#[test]
fn experts_with_a_slot_run_while_the_others_are_read() {
    let model = testing::random(&config(), 1, two_classes);
    let capacity = Capacity { batch: 1, context: 8, kv: KvFormat::F32 };
    let mut backend = CpuBackend::new(model.graph.clone(), capacity);
    let plan = SlotPlan::new(&model, &backend, SlotBudget::Experts(9)).unwrap();
    backend.alloc_slots(&plan.classes, &plan.class_of).unwrap();
    let mut pager = Pager::new(&model, &plan, PolicyKind::default());
    let mut wave = |wanted: &[u32]| {
        let (mut waiting, mut meanwhile) = (wanted.to_vec(), None);
        let named = |slots: &[Option<Slot>]| -> Vec<usize> {
            slots.iter().enumerate().filter_map(|(expert, slot)| slot.map(|_| expert)).collect()
        };
        let rest = pager.next_wave(MoeId(0), &mut waiting, &mut backend, |_, slots| {
            meanwhile = Some(named(slots));
            Ok(())
        });
        (meanwhile, named(rest.unwrap()))
    };
    assert_eq!(wave(&[0, 1]), (None, vec![0, 1]), "no expert had a slot");
    assert_eq!(wave(&[0, 1]), (None, vec![0, 1]), "nothing is read");
    assert_eq!(wave(&[1, 5]), (Some(vec![1]), vec![5]));
}

#[test]
fn slots_below_one_tokens_demand_are_refused_naming_the_smallest_budget_that_works() {
    let seed = rand::random();
    let (tokens, model) = (tokens(seed), testing::random(&config(), seed, two_classes));
    let Err(SessionError::BudgetTooSmall { smallest_bytes, smallest_slots, .. }) =
        session(&model, SlotBudget::Experts(8))
    else {
        panic!("8 slots for 9 experts a token");
    };
    assert_eq!(smallest_slots, 9);
    let error = session(&model, SlotBudget::Bytes(smallest_bytes - 1)).err().unwrap();
    assert!(error.to_string().contains(&format!("{smallest_bytes}B")), "{error}");
    let mut smallest = session(&model, SlotBudget::Bytes(smallest_bytes)).unwrap();
    let mut whole = session(&model, SlotBudget::All).unwrap();
    assert_eq!(logits(&mut whole, &tokens), logits(&mut smallest, &tokens));
}

#[test]
fn a_step_whose_expert_cannot_be_read_fails_and_can_be_tried_again() {
    let seed = rand::random();
    let tokens = tokens(seed);
    let mut rng = StdRng::seed_from_u64(seed);
    let values = |wanted: &testing::Wanted<'_>| {
        (0..wanted.rows * wanted.cols).map(|_| rng.random_range(-0.3..0.3)).collect()
    };
    let (model, reader) = testing::model(&config(), values, two_classes);
    let mut whole = session(&model, SlotBudget::All).unwrap();
    let wanted = logits(&mut whole, &tokens);

    let mut paged = session(&model, SlotBudget::Experts(9)).unwrap();
    let first = paged.step(&tokens[..16], LogitRows::All).unwrap();
    reader.broken.store(true, Ordering::Relaxed);
    let before = paged.stats().pager;
    let error = paged.step(&tokens[16..21], LogitRows::All).unwrap_err();
    assert!(matches!(error, SessionError::Read(ReadError::NotFound { .. })), "{error}");
    assert_eq!((paged.position(), before.demands > 0), (16, true));
    let after = paged.stats().pager;
    assert_eq!(after.demands, after.hits.total(), "a failed wave is not a demand served");
    reader.broken.store(false, Ordering::Relaxed);
    let again = paged.step(&tokens[16..21], LogitRows::All).unwrap();
    assert_eq!(vec![first, again], wanted[..2]);
}

#[test]
fn generation_stops_for_each_of_its_reasons() {
    let seed = rand::random();
    let (tokens, model) = (tokens(seed), testing::random(&config(), seed, two_classes));
    let mut session = session(&model, SlotBudget::Experts(12)).unwrap();
    let mut run = |max_tokens: usize, stop: Vec<u32>, cancel_after: usize| {
        session.reset();
        let options = GenerateOptions { max_tokens, stop, ..GenerateOptions::default() };
        let mut seen = Vec::new();
        let (engine, sequence) = session.parts();
        let generated = generate(engine, sequence, &tokens[..20], &options, |_, chosen| {
            seen.push(chosen.token);
            match seen.len() == cancel_after {
                true => std::ops::ControlFlow::Break(()),
                false => std::ops::ControlFlow::Continue(()),
            }
        })
        .unwrap();
        assert_eq!((seen, generated.prompt_tokens), (generated.tokens.clone(), 20));
        generated
    };
    let free = run(10, vec![], 0);
    assert_eq!((free.reason, free.tokens.len()), (StopReason::MaxTokens, 10));
    let stop = free.tokens[4];
    let before = free.tokens.iter().position(|token| *token == stop).unwrap();
    let stopped = run(10, vec![stop], 0);
    assert_eq!(
        (stopped.reason, &stopped.tokens[..]),
        (StopReason::StopToken, &free.tokens[..before])
    );
    let cancelled = run(10, vec![], 3);
    assert_eq!(
        (cancelled.reason, &cancelled.tokens[..]),
        (StopReason::Cancelled, &free.tokens[..3])
    );
    let full = run(1000, vec![], 0);
    assert_eq!((full.reason, full.tokens.len()), (StopReason::ContextFull, 64 - 20 + 1));
    assert!(run(0, vec![], 0).tokens.is_empty());
    let (engine, sequence) = session.parts();
    let options = GenerateOptions::default();
    let error = generate(engine, sequence, &[], &options, |_, _| unreachable!());
    assert!(matches!(error, Err(SessionError::EmptyPrompt)));
}

#[test]
fn steps_that_do_not_fit_are_refused() {
    let model = testing::random(&config(), 1, two_classes);
    let mut session = session(&model, SlotBudget::All).unwrap();
    let refused = |result: Result<Vec<f32>, SessionError>| result.unwrap_err().to_string();
    assert!(refused(session.step(&[], LogitRows::Last)).contains("a step of 0 tokens"));
    assert!(refused(session.step(&[0; 17], LogitRows::Last)).contains("1..=16"));
    assert!(refused(session.step(&[131], LogitRows::Last)).contains("vocabulary of 131"));
    assert_eq!(session.prefill(&[1; 60]).unwrap().len(), 131);
    assert!(refused(session.step(&[0; 5], LogitRows::Last)).contains("60 of 64"));
    assert_eq!(session.position(), 60);
    let options = LoadOptions { context: Some(65), ..LoadOptions::default() };
    let error = Session::new(&model, &CpuDevice, &options).err().unwrap();
    assert!(error.to_string().contains("1..=64"), "{error}");
}
