//! Whole models: compared with Transformers' reference outputs, and quantized models with the CPU
//! backend.

use std::path::Path;
use std::time::Instant;

use super::{BOTH, Random, device};
use crate::backend::{Device, KvFormat, LogitRows};
use crate::check::{Expected, REL_MAX, check};
use crate::cpu::CpuDevice;
use crate::engine::LoadOptions;
use crate::gpu::{GpuDevice, Reduction};
use crate::load::{Quantization, SHARD_BYTES_DEFAULT};
use crate::model::Model;
use crate::sampler::{Sampler, SamplerOptions};
use crate::sequence_tests::{Bench, attending, convolving};
use crate::sequence_tests::{forked, hosted, interleaved, restored, rewound, stepped};
use crate::session::Session;
use crate::slots::SlotBudget;
use crate::testing::{self, Wanted, checkpoint};
use crate::trace::{self, ReplayPolicy, Trace};
use doppler_store::{DType, PolicyKind};
use doppler_testing::shared;
use serde_json::json;

fn golden(dir: &Path, source: &Path) {
    let mut errors = Vec::new();
    for file in ["expected.safetensors", "expected-long.safetensors"] {
        let Ok(expected) = std::fs::read(dir.join(file)) else { continue };
        errors.extend(golden_of(dir, source, &Expected::parse(&expected).unwrap()));
    }
    let Some((on, _)) = errors.first().cloned() else { return };
    let largest = errors.into_iter().map(|(_, error)| error).fold(0.0, f64::max);
    crate::measured::note(dir, source, &on, largest);
}

/// The device, and the error with a cache in f32, if there is one.
fn golden_of(dir: &Path, source: &Path, expected: &Expected) -> Option<(String, f64)> {
    let mut found = None;
    let name = dir.display();
    let model = testing::converted(source, Quantization::Keep, SHARD_BYTES_DEFAULT);
    for (reduction, batch, kv) in [
        (Reduction::Lane, 64, KvFormat::F16),
        (Reduction::Lane, 7, KvFormat::F32),
        (Reduction::Group, 64, KvFormat::F16),
    ] {
        let device = device(reduction)?;
        let slots = SlotBudget::All;
        let kv = if testing::keeps_in_half_precision(dir) { kv } else { KvFormat::F32 };
        let options = LoadOptions { context: Some(96), batch, slots, kv, ..LoadOptions::default() };
        let mut session = match Session::new(&model, &device, &options) {
            Ok(session) => session,
            // Its experts' gates and ups are of different types, which no GPU kernel reads.
            Err(error) if dir.ends_with("qwen3moe") || dir.ends_with("gguf-qwen3moe") => {
                assert!(error.to_string().contains("gate matrices are Q8_0"), "{error}");
                return None;
            }
            Err(error) => panic!("{name}: {error}"),
        };
        let report = check(&mut session, expected).unwrap();
        println!("{name}, {reduction:?}, batch {batch}, {kv:?}: {report:?}");
        assert!(report.passes(REL_MAX), "{name}, {reduction:?}: {report:?}");
        if kv == KvFormat::F32 {
            let on = crate::golden_tests::device_name(&session.describe());
            found = Some((on, report.rel));
        }
    }
    found
}

#[test]
fn dense_references_agree() {
    testing::references(false).iter().for_each(|dir| golden(dir, dir));
}

#[test]
fn references_with_experts_agree() {
    testing::references(true).iter().for_each(|dir| golden(dir, dir));
}

#[test]
fn embedding_references_agree() {
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        let dirs = testing::embedding_references();
        dirs.iter().for_each(|dir| crate::golden_tests::embeds(dir, &device));
    }
}

#[test]
fn gguf_references_agree() {
    testing::gguf_references().iter().for_each(|dir| golden(dir, &dir.join("model.gguf")));
}

/// What is stored as packed on the device, too.
#[test]
fn packed_references_of_stored_formats_agree() {
    let mut seen = 0;
    for dir in testing::packed_references() {
        if ["gpt-oss-mxfp4", "mlx-mxfp4", "deepseek-fp8-block", "ct-fp8-channel"]
            .iter()
            .any(|name| dir.ends_with(name))
        {
            golden(&dir, &dir);
            seen += 1;
        }
    }
    assert!(seen == 4 || shared("formats").is_none());
}

/// A tensor's format.
type Mixture = fn(&Wanted<'_>) -> DType;

/// Every format that a Q4_K_M file may contain, in its usual place. Norms and the router stay bf16.
pub(super) fn mixture(wanted: &Wanted<'_>) -> DType {
    let whole = wanted.cols.is_multiple_of(256);
    let is = |part: &str| wanted.name.contains(part);
    if wanted.rows == 1 || is("block_sparse_moe.gate") || is("mlp.gate.weight") {
        DType::Bf16
    } else if is("k_proj") || is("v_proj") {
        DType::Q8_0
    } else if is("o_proj") && whole {
        DType::Q5K
    } else if is("lm_head") || is("embed") || is("w2") || is("down_proj") {
        if whole { DType::Q6K } else { DType::Q8_0 }
    } else if whole {
        DType::Q4K
    } else {
        DType::Q5_0
    }
}

fn q8_0(wanted: &Wanted<'_>) -> DType {
    if mixture(wanted) == DType::Bf16 { DType::Bf16 } else { DType::Q8_0 }
}

pub(super) const PROMPT: usize = 13;

fn session(model: &Model, device: &dyn Device, slots: SlotBudget) -> Session {
    let kv = KvFormat::F32;
    let options =
        LoadOptions { context: Some(80), batch: PROMPT, slots, kv, ..LoadOptions::default() };
    Session::new(model, device, &options).unwrap()
}

/// All logits of a prefill and some single tokens.
pub(super) fn logits(session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    session.reset();
    let (prompt, rest) = tokens.split_at(PROMPT);
    let mut logits = session.step(prompt, LogitRows::All).unwrap();
    for token in rest {
        logits.extend(session.step(&[*token], LogitRows::Last).unwrap());
    }
    logits
}

/// The largest difference, divided by the reference's standard deviation.
pub(super) fn rel(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let n = want.len() as f64;
    let mean = want.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let variance = want.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
    let off = got.iter().zip(want).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    off / variance.sqrt()
}

fn against_the_cpu(name: &str) {
    let mut random = Random::new(name);
    let Some(dir) = shared(&format!("models/{name}")) else { return };
    let kinds: [(&str, Mixture); 2] = [("Q4_K_M", mixture), ("Q8_0", q8_0)];
    for (kind, dtype) in kinds {
        let model = checkpoint(&dir, dtype);
        let vocab = model.graph.vocab;
        let tokens: Vec<u32> = (0..PROMPT + 5).map(|_| random.below(vocab) as u32).collect();
        let want = logits(&mut session(&model, &CpuDevice, SlotBudget::All), &tokens);
        for reduction in BOTH {
            // Workgroups of 64 are slow in software. The kernels' own tests cover their formats.
            if reduction == Reduction::Group && kind != "Q4_K_M" {
                continue;
            }
            let Some(device) = device(reduction) else { return };
            let mut gpu = session(&model, &device, SlotBudget::All);
            let got = logits(&mut gpu, &tokens);
            let rel = rel(&got, &want);
            // Warm by now: pipelines are compiled and experts loaded.
            let start = Instant::now();
            let rounds = 4;
            for token in &tokens[..rounds] {
                gpu.step(&[*token], LogitRows::Last).unwrap();
            }
            let token_ms = start.elapsed().as_secs_f64() * 1e3 / rounds as f64;
            println!("{name} {kind} {reduction:?}: rel {rel:.2e}, {token_ms:.1} ms a token");
            assert!(rel <= REL_MAX, "{name} {kind} {reduction:?}: {rel}");
            // Paged in waves: the results are bit-identical.
            let slots = SlotBudget::Experts(model.experts() / 4);
            let paged = logits(&mut session(&model, &device, slots), &tokens);
            assert!(paged == got, "{name} {kind} {reduction:?}: paging changed the logits");
        }
    }
}

#[test]
fn a_quantized_mixtral_agrees_with_the_cpu_and_paging_changes_no_bit() {
    against_the_cpu("tiny-mixtral");
}

#[test]
fn a_quantized_qwen3_moe_agrees_with_the_cpu_and_paging_changes_no_bit() {
    against_the_cpu("tiny-qwen3moe");
}

/// Prompts on cooperative matrices. Weights and activations are rounded to 11 bits, an error of at
/// most 2^-11 each, which the layers' products pass on. The bound is eight such errors, and applies
/// to the median token: where two experts nearly tie, rounding may choose the other.
#[test]
fn a_prompt_on_cooperative_matrices_stays_within_half_precision_of_the_cpu() {
    let mut random = Random::new("cooperative prompts");
    let Some(device) = device(Reduction::Group) else { return };
    if !device.cooperative() {
        println!("skipped: {} has no cooperative matrices of f16", device.describe());
        return;
    }
    for name in ["tiny-mixtral", "tiny-qwen3moe"] {
        let Some(dir) = shared(&format!("models/{name}")) else { return };
        let model = checkpoint(&dir, mixture);
        let vocab = model.graph.vocab;
        let tokens: Vec<u32> = (0..64).map(|_| random.below(vocab) as u32).collect();
        let prefill = |device: &dyn Device, slots| {
            let kv = KvFormat::F16;
            let options =
                LoadOptions { context: Some(80), batch: 64, slots, kv, ..LoadOptions::default() };
            Session::new(&model, device, &options).unwrap().step(&tokens, LogitRows::All).unwrap()
        };
        let want = prefill(&CpuDevice, SlotBudget::All);
        let got = prefill(&device, SlotBudget::All);
        let pairs = got.chunks_exact(vocab).zip(want.chunks_exact(vocab));
        let mut rels: Vec<f64> = pairs.map(|(got, want)| rel(got, want)).collect();
        rels.sort_by(f64::total_cmp);
        let middle = rels[rels.len() / 2];
        println!("{name}: rel {middle:.2e} in the middle, {:.2e} at most", rels[rels.len() - 1]);
        assert!(middle <= 8.0 / 2048.0, "{name}: {middle}");
        assert!(middle > 1e-5, "{name}: {middle} is too small for half precision");
        let paged = prefill(&device, SlotBudget::Experts(model.experts() / 2));
        assert!(paged == got, "{name}: paging changed the logits");
    }
}

/// Single tokens on the fused kernels, in every format of a Q4_K_M file: compared with the CPU,
/// paged, and chosen on the device several at a time. f16s are unpacked by the adapter or by hand.
fn fused(name: &str, keeps_halves: bool) {
    let mut random = Random::new(name);
    let Some(dir) = shared(&format!("models/{name}")) else { return };
    let Some(device) = device(Reduction::Group) else { return };
    if !keeps_halves {
        device.pipelines().set_keeps_halves(false);
    }
    let model = checkpoint(&dir, mixture);
    let tokens: Vec<u32> =
        (0..PROMPT + 3).map(|_| random.below(model.graph.vocab) as u32).collect();
    let make = |device: &dyn Device, slots| {
        let (context, batch) = (Some(80), PROMPT);
        let host_bytes =
            if slots == SlotBudget::Experts(model.experts() / 2) { 1 << 30 } else { 0 };
        let options = LoadOptions { context, batch, slots, host_bytes, ..LoadOptions::default() };
        Session::new(&model, device, &options).unwrap()
    };
    let want = logits(&mut make(&CpuDevice, SlotBudget::All), &tokens);
    let mut whole = make(&device, SlotBudget::All);
    let got = logits(&mut whole, &tokens);
    let rel = rel(&got, &want);
    println!("{name}, fused: rel {rel:.2e}");
    assert!(rel <= REL_MAX, "{name}: {rel}");
    let mut paged = make(&device, SlotBudget::Experts(model.experts() / 4));
    assert!(logits(&mut paged, &tokens) == got, "{name}: paging changed the logits");
    // Running ahead of the host, the device chooses what the host would, paged or not.
    let options = SamplerOptions { temperature: 0.8, seed: 5, ..SamplerOptions::default() };
    let mut chosen = Vec::new();
    // A new session has not seen a token halt yet, so several are queued behind the first one that
    // does. The same is true if the device fetches experts by itself.
    let mut paged = make(&device, SlotBudget::Experts(model.experts() / 4));
    let mut fetching = make(&device, SlotBudget::Experts(model.experts() / 2));
    for session in [&mut whole, &mut paged, &mut fetching] {
        session.reset_with(options).unwrap();
        session.prefill(&tokens[..PROMPT]).unwrap();
        let mut token = tokens[0];
        let mut run = Vec::new();
        for left in (1..=6).rev() {
            token = session.next(token, left).unwrap();
            run.push(token);
        }
        chosen.push(run);
    }
    whole.reset();
    whole.prefill(&tokens[..PROMPT]).unwrap();
    let mut sampler = Sampler::new(options).unwrap();
    let mut token = tokens[0];
    for i in 0..chosen[0].len() {
        let logits = whole.step(&[token], LogitRows::Last).unwrap();
        token = sampler.sample(&logits);
        sampler.accept(token);
        assert!(chosen.iter().all(|run| run[i] == token), "{name}: {chosen:?}");
    }
}

#[test]
fn fused_tokens_of_a_mixtral_agree_with_the_cpu_and_are_chosen_ahead() {
    fused("tiny-mixtral", true);
}

#[test]
fn fused_tokens_of_a_qwen3_moe_agree_with_the_cpu_and_are_chosen_ahead() {
    fused("tiny-qwen3moe", false);
}

/// Fused, with all experts in slots, paged, and queued ahead; and op by op.
#[test]
fn sequences_of_one_engine_are_what_each_is_alone() {
    let Some((plain, fused)) = plain_and_fused() else { return };
    let whole = Bench { device: &fused, kv: KvFormat::F16, slots: 36, model: attending };
    let paged = Bench { slots: 10, ..whole };
    interleaved(&paged, rand::random());
    hosted(&paged, rand::random());
    stepped(&paged, rand::random());
    rewound(&whole, rand::random());
    forked(&whole, rand::random());
    restored(&whole, rand::random());
    restored(&Bench { device: &plain, kv: KvFormat::F32, ..whole }, rand::random());
    interleaved(&Bench { device: &plain, kv: KvFormat::F32, ..paged }, rand::random());
}

/// The same where layers pass a state from token to token.
#[test]
fn sequences_with_recurrent_states_are_what_each_is_alone() {
    let Some((plain, fused)) = plain_and_fused() else { return };
    let whole = Bench { device: &fused, kv: KvFormat::F16, slots: 36, model: convolving };
    let paged = Bench { slots: 10, ..whole };
    interleaved(&paged, rand::random());
    stepped(&paged, rand::random());
    // Going far back computes tokens again as a prompt, which is another numeric class. So the
    // texts are always the same.
    rewound(&paged, 6);
    forked(&whole, 7);
    interleaved(&Bench { device: &plain, kv: KvFormat::F32, ..paged }, rand::random());
}

/// What the two tests above leave out.
#[test]
#[ignore = "a sweep"]
fn sequences_are_what_each_is_alone_in_every_form() {
    let Some((plain, fused)) = plain_and_fused() else { return };
    for model in [attending, convolving] {
        let whole = Bench { device: &fused, kv: KvFormat::F16, slots: 36, model };
        let op_by_op = Bench { device: &plain, kv: KvFormat::F32, slots: 10, model };
        interleaved(&whole, rand::random());
        stepped(&op_by_op, rand::random());
        hosted(&op_by_op, rand::random());
        rewound(&whole, 5);
    }
}

/// A device whose tokens run op by op, and one whose tokens are fused.
fn plain_and_fused() -> Option<(GpuDevice, GpuDevice)> {
    Some((device(Reduction::Lane)?, device(Reduction::Group)?))
}

/// Ops that no rewrite matches run in the token's own submission.
#[test]
fn a_token_is_one_submission_whatever_its_layers_are() {
    let Some(device) = device(Reduction::Group) else { return };
    let names = [
        "lfm2",
        "lfm2-moe",
        "deepseek-v3",
        "qwen3.5",
        "qwen3-next",
        "llama4",
        "gemma4-moe",
        "gpt-oss",
    ];
    let all = [testing::references(false), testing::references(true)].concat();
    for dir in all.iter().filter(|dir| names.iter().any(|name| dir.ends_with(name))) {
        let model = testing::converted(dir, Quantization::Keep, SHARD_BYTES_DEFAULT);
        let mut session = session(&model, &device, SlotBudget::All);
        session.settle_all().unwrap();
        let mut submissions = |count: usize| {
            let greedy = SamplerOptions { temperature: 0.0, ..SamplerOptions::default() };
            session.reset_with(greedy).unwrap();
            let before = session.counters().submissions;
            session.prefill(&[1, 2, 3, 4, 5]).unwrap();
            let mut token = 6;
            for left in (1..=count).rev() {
                token = session.next(token, left).unwrap();
            }
            session.counters().submissions - before
        };
        // The first run makes the plan.
        submissions(1);
        let (one, eight) = (submissions(1), submissions(8));
        assert_eq!(eight - one, 7, "{}", dir.display());
    }
}

/// 3 layers of 12 experts, top 3, in two classes of slots.
fn small(random: &mut Random) -> Model {
    let config = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131,
        "max_position_embeddings": 96, "num_experts": 12, "num_experts_per_tok": 3,
        "rms_norm_eps": 1e-6,
    });
    testing::random(&config, random.below(1 << 30) as u64, |wanted| match wanted.name {
        name if name.contains("layers.2.mlp.experts") => DType::Q8_0,
        name if name.contains("experts") => DType::Q5_0,
        _ => DType::F32,
    })
}

/// An expert that lost its slot comes back from host memory, bit by bit, if there was room for it
/// there. Others are read again.
#[test]
fn evicted_experts_come_back_from_memory_of_the_host() {
    let mut random = Random::new("experts set aside");
    let model = small(&mut random);
    let tokens: Vec<u32> = (0..PROMPT + 20).map(|_| random.below(131) as u32).collect();
    for (reduction, kv) in [(Reduction::Lane, KvFormat::F32), (Reduction::Group, KvFormat::F16)] {
        let Some(device) = device(reduction) else { return };
        let make = |slots, host_bytes| {
            let context = Some(80);
            let options = LoadOptions {
                context,
                batch: PROMPT,
                slots,
                kv,
                host_bytes,
                ..LoadOptions::default()
            };
            Session::new(&model, &device, &options).unwrap()
        };
        let want = logits(&mut make(SlotBudget::All, 0), &tokens);
        let paged = |host_bytes| {
            let mut session = make(SlotBudget::Experts(12), host_bytes);
            for _ in 0..2 {
                assert!(logits(&mut session, &tokens) == want, "{reduction:?}, {host_bytes}");
            }
            let pager = session.stats().pager;
            assert_eq!(pager.demands, pager.hits.total());
            assert!(pager.evictions > 36, "{pager:?}");
            pager.hits
        };
        let [none, few, all] = [0, 40_000, 1 << 30].map(paged);
        println!("{reduction:?}: none {none:?}, few {few:?}, all {all:?}");
        assert_eq!(none.ram, 0);
        assert!(few.ram > 0 && few.disk > 36, "{few:?}");
        assert!(all.ram > few.ram && all.disk <= 36, "each is read at most once: {all:?}");
        // If a device fetches by itself, a few slots are emptied ahead.
        if reduction == Reduction::Lane {
            assert_eq!(none.disk, all.disk + all.ram, "the same experts were missed");
        }
    }
}

/// A fused token fetches the experts that it misses from host memory by itself: the tokens are the
/// same, most of them take one submission, and replaying the trace gives the same counts.
#[test]
fn a_token_fetches_the_experts_it_misses() {
    let mut random = Random::new("experts fetched");
    let model = small(&mut random);
    let prompt: Vec<u32> = (0..PROMPT).map(|_| random.below(131) as u32).collect();
    let Some(device) = device(Reduction::Group) else { return };
    let make = |slots, host_bytes| {
        let (context, batch) = (Some(96), PROMPT);
        let options = LoadOptions { context, batch, slots, host_bytes, ..LoadOptions::default() };
        Session::new(&model, &device, &options).unwrap()
    };
    let tokens = 96 - PROMPT - 1;
    let given: Vec<u32> = (0..60).map(|_| random.below(131) as u32).collect();
    let run = |session: &mut Session| {
        let options = SamplerOptions { temperature: 0.9, seed: 3, ..SamplerOptions::default() };
        session.reset_with(options).unwrap();
        session.prefill(&prompt).unwrap();
        // Random tokens are routed all over; then it generates.
        let mut chosen = Vec::new();
        for token in &given {
            chosen.push(session.next(*token, 1).unwrap());
        }
        for left in (1..=tokens - given.len()).rev() {
            let token = chosen[chosen.len() - 1];
            chosen.push(session.next(token, left).unwrap());
        }
        chosen
    };
    let want = run(&mut make(SlotBudget::All, 0));
    // Without host memory every miss ends a submission.
    let mut alone = u64::MAX;
    for host_bytes in [0, 1 << 30, 60_000] {
        let mut session = make(SlotBudget::Experts(20), host_bytes);
        session.record(Trace::new(&model));
        assert!(run(&mut session) == want, "cold, {host_bytes}");
        let before = (session.counters(), session.stats().pager);
        assert!(run(&mut session) == want, "warm, {host_bytes}");
        let (counters, pager) = (session.counters().since(&before.0), session.stats().pager);
        let brought = pager.hits.ram - before.1.hits.ram;
        println!("{host_bytes}: {} submissions, {brought} of {pager:?}", counters.submissions);
        assert_eq!(pager.demands, pager.hits.total());
        match host_bytes {
            0 => alone = counters.submissions,
            60_000 => assert!(counters.submissions <= alone, "{alone} without host memory"),
            _ => {
                assert!(brought > 5, "{brought}");
                assert!(counters.submissions < alone, "{alone} without host memory");
            }
        }
        let replayed = trace::replay(
            &session.take_trace().unwrap(),
            session.stats().slots,
            ReplayPolicy::Online(PolicyKind::default()),
        )
        .unwrap();
        assert_eq!((replayed.all.demands, replayed.all.hits), (pager.demands, pager.hits.vram));
        assert_eq!(replayed.evictions, pager.evictions);
    }
}
