//! A replay counts what the engine counted, Belady's policy is optimal, and bad files are refused.

use std::collections::HashMap;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use super::file::parse;
use super::*;
use crate::backend::LogitRows;
use crate::cpu::CpuDevice;
use crate::engine::LoadOptions;
use crate::session::Session;
use crate::slots::SlotBudget;
use crate::testing;
use doppler_store::{DType, PolicyKind};

fn mixtral() -> Value {
    json!({
        "architectures": ["MixtralForCausalLM"], "hidden_size": 40, "intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 5, "num_key_value_heads": 1,
        "vocab_size": 131, "max_position_embeddings": 96, "num_local_experts": 7,
        "num_experts_per_tok": 2, "rms_norm_eps": 1e-6,
    })
}

fn qwen3_moe() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 40, "intermediate_size": 56,
        "moe_intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 10, "vocab_size": 131,
        "max_position_embeddings": 96, "num_experts": 12, "num_experts_per_tok": 3,
        "mlp_only_layers": [1], "rms_norm_eps": 1e-6,
    })
}

/// The last layer's down projections have another type, which makes two slot classes.
fn two_classes(wanted: &testing::Wanted<'_>) -> DType {
    let last = wanted.name.contains("layers.2.") || wanted.name.contains("layers.3.");
    match wanted.name {
        name if name.contains("experts") && last && name.contains("w2") => DType::Q6K,
        name if name.contains("experts") && last && name.contains("down") => DType::Q6K,
        name if name.contains("experts") => DType::Q4K,
        _ => DType::F32,
    }
}

/// Two prompts in batches of 16, each followed by single tokens.
fn run(session: &mut Session, rng: &mut StdRng) {
    for (prompt, decoded) in [(37, 30), (3, 20)] {
        session.reset();
        let tokens: Vec<u32> = (0..prompt).map(|_| rng.random_range(0..131)).collect();
        session.prefill(&tokens).unwrap();
        for _ in 0..decoded {
            session.step(&[rng.random_range(0..131)], LogitRows::None).unwrap();
        }
    }
}

#[test]
fn a_replay_counts_what_the_engine_counted() {
    let seed = rand::random();
    println!("seed {seed}");
    for config in [mixtral(), qwen3_moe()] {
        let model = testing::random(&config, seed, two_classes);
        for slots in [9, 14, 1000] {
            for policy in PolicyKind::ALL {
                let slots = SlotBudget::Experts(slots);
                let options = LoadOptions {
                    context: Some(96),
                    batch: 16,
                    slots,
                    policy,
                    ..LoadOptions::default()
                };
                let mut session = Session::new(&model, &CpuDevice, &options).unwrap();
                session.record(Trace::new(&model));
                run(&mut session, &mut StdRng::seed_from_u64(seed));
                let trace = session.take_trace().unwrap();
                assert!(session.take_trace().is_none());
                let stats = session.stats();
                let replayed = replay(&trace, stats.slots, ReplayPolicy::Online(policy)).unwrap();
                assert_eq!(trace.classes().len(), 2);
                assert_eq!(trace.demands(), stats.pager.demands);
                assert_eq!(replayed.slots, stats.slots);
                assert_eq!(replayed.all.demands, stats.pager.demands, "{policy} {slots:?}");
                assert_eq!(replayed.all.hits, stats.pager.hits.vram, "{policy} {slots:?}");
                assert_eq!(replayed.evictions, stats.pager.evictions);
                assert_eq!(replayed.extra_waves, stats.pager.extra_waves);
                let per_token: usize = trace.layers.iter().map(|layer| layer.top_k).sum();
                assert_eq!(replayed.decode.demands, 50 * per_token as u64);
            }
        }
    }
}

#[test]
fn a_step_that_failed_is_recorded_as_far_as_it_was_served() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let values = |wanted: &testing::Wanted<'_>| {
        (0..wanted.rows * wanted.cols).map(|_| rng.random_range(-0.3..0.3)).collect()
    };
    let (model, reader) = testing::model(&qwen3_moe(), values, two_classes);
    let options = LoadOptions {
        context: Some(96),
        batch: 16,
        slots: SlotBudget::Experts(9),
        ..LoadOptions::default()
    };
    let mut session = Session::new(&model, &CpuDevice, &options).unwrap();
    session.record(Trace::new(&model));
    session.step(&[1, 2, 3], LogitRows::None).unwrap();
    reader.broken.store(true, std::sync::atomic::Ordering::Relaxed);
    session.step(&(0..16).collect::<Vec<_>>(), LogitRows::None).unwrap_err();
    reader.broken.store(false, std::sync::atomic::Ordering::Relaxed);
    session.step(&(0..16).collect::<Vec<_>>(), LogitRows::None).unwrap();
    let trace = session.take_trace().unwrap();
    assert_eq!(trace.steps.len(), 3);
    assert_eq!(trace.demands(), session.stats().pager.demands);
}

/// A trace of one class of layers with random distinct experts.
fn random_trace(rng: &mut StdRng, layers: usize, experts: usize, steps: usize) -> Trace {
    let layer = |layer| TraceLayer { layer, experts, top_k: 2, class: 0 };
    let mut trace =
        Trace { model: "random".into(), layers: (0..layers).map(layer).collect(), steps: vec![] };
    for _ in 0..steps {
        trace.begin(1, false);
        for moe in 0..layers {
            // Squared, so that some experts are far likelier than others.
            let mut draw = || {
                let x: f64 = rng.random_range(0.0..1.0);
                (x * x * experts as f64) as u32
            };
            let (a, b) = (draw(), draw());
            trace.served(MoeId(moe as u16), [a, b].into_iter());
        }
    }
    trace
}

/// The fewest misses that any choice of victims achieves.
fn fewest_misses(trace: &Trace, slots: usize) -> u64 {
    let visits: Vec<(u32, &Vec<u32>)> =
        trace.steps.iter().flat_map(|step| (0_u32..).zip(&step.experts)).collect();
    let mut states: HashMap<Vec<(u32, u32)>, u64> = HashMap::from([(Vec::new(), 0)]);
    for (layer, wanted) in visits {
        let mut next: HashMap<Vec<(u32, u32)>, u64> = HashMap::new();
        for (held, misses) in states {
            let mut after: Vec<Vec<(u32, u32)>> = vec![held.clone()];
            let mut missed = misses;
            for expert in wanted {
                let key = (layer, *expert);
                if held.contains(&key) {
                    continue;
                }
                missed += 1;
                let mut grown = Vec::new();
                for state in after {
                    if state.len() < slots {
                        let mut state = state.clone();
                        state.push(key);
                        grown.push(state);
                        continue;
                    }
                    for (victim, (of, expert)) in state.iter().enumerate() {
                        let needed = *of == layer && wanted.contains(expert);
                        if !needed {
                            let mut state = state.clone();
                            state[victim] = key;
                            grown.push(state);
                        }
                    }
                }
                after = grown;
            }
            for mut state in after {
                state.sort_unstable();
                let best = next.entry(state).or_insert(u64::MAX);
                *best = missed.min(*best);
            }
        }
        states = next;
    }
    states.into_values().min().unwrap()
}

#[test]
fn the_optimum_misses_as_little_as_any_choice_of_victims_could() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for slots in [4, 5] {
        let trace = random_trace(&mut rng, 2, 5, 14);
        let optimal = replay(&trace, slots, ReplayPolicy::Optimal).unwrap();
        let misses = optimal.all.demands - optimal.all.hits;
        assert_eq!(misses, fewest_misses(&trace, slots), "{slots} slots");
        assert!(optimal.evictions > 0);
    }
    let trace = random_trace(&mut rng, 3, 40, 300);
    for slots in [6, 20, 77, 120] {
        let rates = ReplayPolicy::ALL.map(|policy| replay(&trace, slots, policy).unwrap().all.hits);
        assert!(rates.iter().all(|hits| *hits <= rates[3]), "{slots} slots: {rates:?}");
    }
}

#[test]
fn too_few_slots_are_refused_and_too_many_are_as_many_as_experts() {
    let trace = random_trace(&mut StdRng::seed_from_u64(1), 3, 4, 5);
    let lru = ReplayPolicy::Online(PolicyKind::Lru);
    let error = replay(&trace, 5, lru).unwrap_err();
    assert!(matches!(error, TraceError::TooFewSlots { slots: 5, smallest: 6 }), "{error}");
    assert_eq!(replay(&trace, 1000, lru).unwrap().slots, 12);
}

#[test]
fn a_trace_is_written_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.trace");
    let seed = rand::random();
    println!("seed {seed}");
    let mut trace = random_trace(&mut StdRng::seed_from_u64(seed), 3, 9, 20);
    trace.layers[1].class = 1;
    trace.begin(3, false); // a step that did not reach any layer
    write(&trace, &path).unwrap();
    assert_eq!(read(&path).unwrap(), trace);
    let error = write(&trace, &dir.path().join("no/such/dir")).unwrap_err().to_string();
    assert!(error.contains("no/such/dir"), "{error}");
    assert!(matches!(read(&dir.path().join("none")), Err(TraceError::Io { .. })));
}

#[test]
fn bad_files_are_refused_naming_the_line() {
    const LAYERS: &str = r#""layers":[{"layer":0,"experts":4,"top_k":2,"class":0}]"#;
    let header = |rest: &str| {
        format!(r#"{{"format":"doppler-routing-trace","version":1,"model":"m",{rest}}}"#)
    };
    let good = format!("{}\n{}\n", header(LAYERS), r#"{"tokens":1,"experts":[[1,3]]}"#);
    let trace = parse(good.as_bytes(), "x").unwrap();
    assert_eq!(trace.steps, [TraceStep { tokens: 1, spared: false, experts: vec![vec![1, 3]] }]);
    let layers = |layers: &str| header(&format!(r#""layers":[{layers}]"#));
    let many = r#"{"layer":0,"experts":4,"top_k":2,"class":0},"#.repeat(5000);
    for (text, words) in [
        (String::new(), "not a routing trace"),
        ("hello\n".to_owned(), "not a routing trace"),
        (r#"{"format":"other","version":1}"#.to_owned(), "other"),
        (r#"{"format":"doppler-routing-trace","version":7}"#.to_owned(), "version 7"),
        (header(r#""layers":[]"#), "line 1: 0 layers"),
        (layers(many.trim_end_matches(',')), "line 1: 5000 layers"),
        (layers(r#"{"layer":0,"experts":4,"top_k":5,"class":0}"#), "5 of 4 experts"),
        (layers(r#"{"layer":0,"experts":99999999,"top_k":1,"class":0}"#), "of 99999999"),
        (layers(r#"{"layer":0,"experts":4,"top_k":2,"class":1}"#), "class 1"),
        (header(r#""layers":[],"more":1"#), "more"),
        (good.clone() + "{\"tokens\":1,\"experts\":[[1,3]", "line 3"),
        (good.clone() + r#"{"tokens":0,"experts":[[]]}"#, "line 3: a step of 0 tokens"),
        (good.clone() + r#"{"tokens":1,"experts":[[1,3],[1]]}"#, "of 2 layers"),
        (good.clone() + r#"{"tokens":1,"experts":[[3,1]]}"#, "ascending"),
        (good.clone() + r#"{"tokens":1,"experts":[[1,1]]}"#, "distinct"),
        (good.clone() + r#"{"tokens":1,"experts":[[1,4]]}"#, "no expert 4"),
        (good.clone() + r#"{"tokens":1,"experts":[[1,2,3]]}"#, "3 experts for 1 tokens"),
        (good.clone() + r#"{"tokens":1,"experts":[[-1]]}"#, "line 3"),
        (good.clone() + &" ".repeat(17 << 20), "line 3: longer than"),
    ] {
        let error = parse(text.as_bytes(), "a.trace").unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("a.trace"), "{words:?}: {error}");
        assert_eq!(error.lines().count(), 1);
    }
}
