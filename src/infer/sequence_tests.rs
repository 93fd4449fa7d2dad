//! Sequences of one engine are independent, rewinding leaves no trace, and a context grows without
//! a reload; on any device.

use std::ops::ControlFlow;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use super::backend::{Device, KvFormat, LogitRows};
use super::check::{Expected, GREEDY_PROMPT, check};
use super::cpu::CpuDevice;
use super::engine::{BlockId, Engine, LoadOptions, Rows};
use super::error::SessionError;
use super::extras::Extras;
use super::generate::{Chosen, GenerateOptions, generate};
use super::kv::BLOCK;
use super::model::Model;
use super::sampler::SamplerOptions;
use super::sequence::Sequence;
use super::session::Session;
use super::slots::SlotBudget;
use super::testing;
use doppler_store::{DType, ModelId};

pub const VOCAB: u32 = 131;
pub const CONTEXT: usize = 400;
pub const GREEDY: SamplerOptions = SamplerOptions {
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    repetition_window: 64,
    seed: 0,
};
pub const DRAWN: SamplerOptions = SamplerOptions {
    temperature: 0.9,
    repetition_penalty: 1.2,
    repetition_window: 5,
    seed: 7,
    ..GREEDY
};

/// 3 layers of 12 experts, top 3, each with attention.
pub fn attending(seed: u64) -> Model {
    small(
        seed,
        &json!({
            "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB,
            "max_position_embeddings": CONTEXT, "num_experts": 12, "num_experts_per_tok": 3,
            "rms_norm_eps": 1e-6,
        }),
    )
}

/// 3 layers of 12 experts, top 3, after a dense one; two of them convolve.
pub fn convolving(seed: u64) -> Model {
    small(
        seed,
        &json!({
            "architectures": ["Lfm2MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
            "num_experts": 12, "num_experts_per_tok": 3, "num_dense_layers": 1, "conv_L_cache": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        }),
    )
}

fn small(seed: u64, config: &Value) -> Model {
    testing::random(config, seed, |wanted| match wanted.name {
        name if name.contains("experts") => DType::Q5_0,
        _ => DType::F32,
    })
}

/// A device, and the options of an engine on it.
pub struct Bench<'a> {
    pub device: &'a dyn Device,
    pub kv: KvFormat,
    /// Expert slots, for 36 experts.
    pub slots: usize,
    /// A model of 36 experts, from a seed.
    pub model: fn(u64) -> Model,
}

impl Bench<'_> {
    pub fn engine(&self, model: &Model, context: usize) -> Engine {
        let slots = SlotBudget::Experts(self.slots);
        let (context, kv) = (Some(context), self.kv);
        let options = LoadOptions { context, batch: 32, slots, kv, ..LoadOptions::default() };
        Engine::load(model, self.device, &options).unwrap()
    }
}

fn sequence(options: SamplerOptions) -> Sequence {
    Sequence::new(options, CONTEXT).unwrap()
}

/// A text in progress, and the token that it is fed next.
struct Text {
    sequence: Sequence,
    next: u32,
    tokens: Vec<u32>,
}

impl Text {
    fn new(engine: &mut Engine, options: SamplerOptions, prompt: &[u32]) -> Self {
        let mut sequence = sequence(options);
        let logits = engine.prefill(&mut sequence, prompt).unwrap();
        let next = sequence.choose(&logits);
        Self { sequence, next, tokens: vec![next] }
    }

    /// Feeds the next token; up to `more` may be queued.
    fn go(&mut self, engine: &mut Engine, more: usize) {
        self.next = engine.next(&mut self.sequence, self.next, more).unwrap();
        self.tokens.push(self.next);
    }

    fn fork(&self) -> Self {
        Self { sequence: self.sequence.fork(), next: self.next, tokens: self.tokens.clone() }
    }
}

fn prompts(seed: u64) -> [Vec<u32>; 2] {
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    // One ends within a block, the other goes past its second block.
    [50, 2 * BLOCK + 3].map(|len| (0..len).map(|_| rng.random_range(0..VOCAB)).collect())
}

/// `count` tokens after the prompt, on a separate engine.
fn alone(
    bench: &Bench<'_>,
    model: &Model,
    options: SamplerOptions,
    prompt: &[u32],
    count: usize,
) -> Vec<u32> {
    let mut engine = bench.engine(model, CONTEXT);
    let mut text = Text::new(&mut engine, options, prompt);
    (1..count).for_each(|i| text.go(&mut engine, count - i));
    text.tokens
}

/// Two sequences alternate token by token, in an engine that initially has room for neither.
pub fn interleaved(bench: &Bench<'_>, seed: u64) {
    let (model, prompts, count) = ((bench.model)(seed), prompts(seed), 20);
    for options in [GREEDY, DRAWN] {
        let want = prompts.each_ref().map(|p| alone(bench, &model, options, p, count));
        let mut engine = bench.engine(&model, 8);
        let mut texts = prompts.each_ref().map(|p| Text::new(&mut engine, options, p));
        for i in 1..count {
            for text in &mut texts {
                // Tokens queued ahead are dropped when the other sequence runs.
                text.go(&mut engine, count - i);
            }
        }
        // And several tokens at a time.
        assert_eq!(texts.map(|text| text.tokens), want, "{options:?}");
        let mut texts = prompts.each_ref().map(|p| Text::new(&mut engine, options, p));
        for i in 1..count {
            texts[i / 4 % 2].go(&mut engine, 9);
        }
        for (text, want) in texts.iter().zip(&want) {
            assert_eq!(text.tokens, want[..text.tokens.len()], "{options:?}");
        }
        let held = engine.positions();
        drop(texts);
        for prompt in &prompts {
            Text::new(&mut engine, options, prompt);
        }
        assert_eq!(engine.positions(), held, "blocks of dropped sequences are reused");
    }
}

/// Rewinds by various numbers of tokens, within a block and across its boundary, and continues.
pub fn rewound(bench: &Bench<'_>, seed: u64) {
    let (model, [prompt, _], count) = ((bench.model)(seed), prompts(seed), 30);
    for options in [GREEDY, DRAWN] {
        let want = alone(bench, &model, options, &prompt, count);
        let mut engine = bench.engine(&model, 8);
        let mut text = Text::new(&mut engine, options, &prompt);
        for back in [1, 3, 17, 29] {
            while text.tokens.len() < count {
                text.go(&mut engine, 4);
            }
            assert_eq!(text.tokens, want, "before rewinding by {back}");
            text.sequence.rewind(back);
            text.tokens.truncate(count - back);
            text.next = text.tokens[text.tokens.len() - 1];
            assert_eq!(text.sequence.len(), prompt.len() + text.tokens.len() - 1);
        }
        // Takes another token, then rewinds again.
        let other = (text.next + 1) % VOCAB;
        engine.next(&mut text.sequence, other, 1).unwrap();
        text.sequence.rewind(1);
        while text.tokens.len() < count {
            text.go(&mut engine, 4);
        }
        assert_eq!(text.tokens, want, "{options:?}");
    }
}

/// A fork continues independently and leaves the original untouched. A snapshot restores the
/// earlier state.
pub fn forked(bench: &Bench<'_>, seed: u64) {
    let (model, [prompt, _], count) = ((bench.model)(seed), prompts(seed), 30);
    for options in [GREEDY, DRAWN] {
        let want = alone(bench, &model, options, &prompt, count);
        let mut engine = bench.engine(&model, 8);
        let mut text = Text::new(&mut engine, options, &prompt);
        (0..5).for_each(|_| text.go(&mut engine, 4));
        let snapshot = text.sequence.snapshot();
        let (mut fork, kept) = (text.fork(), text.tokens.clone());
        // The fork writes into the block that both share.
        let other = (fork.next + 1) % VOCAB;
        fork.next = engine.next(&mut fork.sequence, other, 1).unwrap();
        for _ in 0..15 {
            fork.go(&mut engine, 1);
            text.go(&mut engine, 3);
        }
        while text.tokens.len() < count {
            text.go(&mut engine, 4);
        }
        assert_eq!(text.tokens, want, "{options:?}");
        // The fork's cache is what a sequence of its tokens alone would have.
        let mut twin = sequence(options);
        engine.prefill(&mut twin, fork.sequence.tokens()).unwrap();
        let step = |engine: &mut Engine, sequence: &mut Sequence| {
            let rows = Rows { sequence, tokens: &[3], logits: LogitRows::Last };
            engine.step(&mut [rows]).unwrap()
        };
        let (got, want_logits) =
            (step(&mut engine, &mut fork.sequence), step(&mut engine, &mut twin));
        // The twin's tokens came as a prompt, which is another numeric class on a GPU.
        let off = got[0].iter().zip(&want_logits[0]).map(|(a, b)| (a - b).abs());
        assert!(off.fold(0.0, f32::max) < 2e-2, "{options:?}");
        for _ in 0..2 {
            text.sequence.restore(&snapshot);
            text.tokens.clone_from(&kept);
            text.next = kept[kept.len() - 1];
            while text.tokens.len() < count {
                text.go(&mut engine, 4);
            }
            assert_eq!(text.tokens, want, "restored, {options:?}");
        }
    }
}

/// A sequence made of another engine's blocks goes on as the one that they were read from.
pub fn restored(bench: &Bench<'_>, seed: u64) {
    let model = (bench.model)(seed);
    let id = |bytes: &[u8]| ModelId::of(bytes);
    let tokens: Vec<u32> = (0..3 * BLOCK as u32 + 9).map(|at| (at * 37 + at / 7) % VOCAB).collect();
    let mut engine = bench.engine(&model, CONTEXT);
    let mut source = sequence(GREEDY);
    engine.prefill(&mut source, &tokens).unwrap();
    let ids: Vec<BlockId> = engine.block_ids(id(b"m"), source.tokens()).collect();
    assert_eq!(ids.len(), 3);
    assert!(engine.block_ids(id(b"m"), &tokens[..3 * BLOCK - 1]).eq(ids[..2].iter().copied()));
    // An id says which model it is of, and all the tokens before.
    assert!(engine.block_ids(id(b"n"), &tokens).all(|other| !ids.contains(&other)));
    let mut others = tokens.clone();
    others[0] += 1;
    assert!(engine.block_ids(id(b"m"), &others).all(|other| !ids.contains(&other)));
    let blocks: Vec<Vec<u8>> = (0..3).map(|at| engine.read_block(&source, at).unwrap()).collect();
    assert!(blocks.iter().all(|block| block.len() as u64 == engine.stored_bytes()));
    let step = |engine: &mut Engine, sequence: &mut Sequence| {
        let rows = Rows { sequence, tokens: &[3], logits: LogitRows::Last };
        engine.step(&mut [rows]).unwrap()
    };
    let mut want = source.fork();
    want.rewind(9);
    let want = step(&mut engine, &mut want);

    let mut engine = bench.engine(&model, 8);
    assert!(engine.block_ids(id(b"m"), &tokens).eq(ids), "they are the same in another run");
    // Somebody else's blocks come first on this device.
    let mut other = sequence(GREEDY);
    engine.prefill(&mut other, &others[..BLOCK + 3]).unwrap();
    let mut copy = sequence(GREEDY);
    let short = engine.append_block(&mut copy, &tokens[..BLOCK], &blocks[0][1..]);
    assert!(short.is_err() && copy.is_empty());
    for (tokens, block) in tokens.chunks_exact(BLOCK).zip(&blocks) {
        engine.append_block(&mut copy, tokens, block).unwrap();
    }
    assert_eq!(step(&mut engine, &mut copy), want);
    assert_eq!(copy.len(), 3 * BLOCK + 1);
}

/// Rows of several sequences in one step give what each sequence gives alone.
pub fn stepped(bench: &Bench<'_>, seed: u64) {
    let (model, prompts) = ((bench.model)(seed), prompts(seed));
    let single = |tokens: &[u32]| {
        let mut engine = bench.engine(&model, CONTEXT);
        let mut one = sequence(GREEDY);
        let first = Rows { sequence: &mut one, tokens: &tokens[..9], logits: LogitRows::All };
        let first = engine.step(&mut [first]).unwrap();
        let then = Rows { sequence: &mut one, tokens: &tokens[9..10], logits: LogitRows::Last };
        [first, engine.step(&mut [then]).unwrap()].concat()
    };
    let want = prompts.each_ref().map(|tokens| single(tokens));
    let mut engine = bench.engine(&model, 8);
    let [mut a, mut b] = [sequence(GREEDY), sequence(GREEDY)];
    let mut step = |range: std::ops::Range<usize>, logits| {
        let mut rows = [
            Rows { sequence: &mut a, tokens: &prompts[0][range.clone()], logits },
            Rows { sequence: &mut b, tokens: &prompts[1][range], logits },
        ];
        engine.step(&mut rows).unwrap()
    };
    let (first, then) = (step(0..9, LogitRows::All), step(9..10, LogitRows::Last));
    for i in 0..2 {
        assert!([first[i].clone(), then[i].clone()] == want[i][..], "row {i}");
    }
    // If one does not fit, none of them runs.
    let (tokens, logits) = (&[1][..], LogitRows::Last);
    let mut rows = [
        Rows { sequence: &mut a, tokens, logits },
        Rows { sequence: &mut b, tokens: &[VOCAB], logits },
    ];
    assert!(matches!(engine.step(&mut rows), Err(SessionError::Token { .. })));
    assert_eq!((a.len(), b.len()), (10, 10));
}

/// What only the host can choose is chosen from the same logits: with probabilities to report, a text
/// is the one without; with a bias, the banned token never comes, and afterwards the device chooses
/// again.
pub fn hosted(bench: &Bench<'_>, seed: u64) {
    let (model, [prompt, _]) = ((bench.model)(seed), prompts(seed));
    let mut engine = bench.engine(&model, CONTEXT);
    let mut write = |sampler: SamplerOptions, extras: &Extras| {
        let extras = extras.clone();
        let options = GenerateOptions { max_tokens: 24, sampler, extras, stop: Vec::new() };
        let mut told = Vec::new();
        let mut text = sequence(sampler);
        let done = generate(&mut engine, &mut text, &prompt, &options, |_, chosen| {
            told.push(chosen.clone());
            ControlFlow::Continue(())
        });
        assert!(done.unwrap().tokens.iter().eq(told.iter().map(|chosen| &chosen.token)));
        told
    };
    let tokens = |told: &[Chosen]| told.iter().map(|chosen| chosen.token).collect::<Vec<_>>();
    for options in [GREEDY, DRAWN] {
        let plain = write(options, &Extras::default());
        assert!(plain.iter().all(|chosen| chosen.logprobs.is_none()));
        let told = write(options, &Extras { logprobs: Some(3), ..Extras::default() });
        assert_eq!(tokens(&told), tokens(&plain), "{options:?}");
        for Chosen { token, logprobs } in &told {
            let odds = logprobs.as_ref().unwrap();
            assert_eq!((odds.chosen.token, odds.top.len()), (*token, 3));
            assert!(odds.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
            assert!(odds.chosen.logprob <= odds.top[0].logprob && odds.top[0].logprob <= 0.0);
            assert!(options != GREEDY || odds.top[0].token == *token);
        }
        let banned = plain[0].token;
        let bias = [(banned, -1000.0)].into();
        let without = write(options, &Extras { bias, ..Extras::default() });
        assert!(without.iter().all(|chosen| chosen.token != banned), "{options:?}");
        assert_eq!(write(options, &Extras::default()), plain, "{options:?}");
    }
}

pub const ON_THE_CPU: [Bench<'static>; 5] = [
    Bench { device: &CpuDevice, kv: KvFormat::F16, slots: 36, model: attending },
    Bench { device: &CpuDevice, kv: KvFormat::F32, slots: 36, model: attending },
    Bench { device: &CpuDevice, kv: KvFormat::F16, slots: 10, model: attending },
    Bench { device: &CpuDevice, kv: KvFormat::F16, slots: 36, model: convolving },
    Bench { device: &CpuDevice, kv: KvFormat::F16, slots: 10, model: convolving },
];

#[test]
fn two_sequences_in_turns_write_what_each_writes_alone() {
    ON_THE_CPU.iter().for_each(|bench| interleaved(bench, rand::random()));
}

#[test]
fn going_back_and_on_is_never_having_gone() {
    ON_THE_CPU.iter().for_each(|bench| rewound(bench, rand::random()));
}

#[test]
fn a_fork_leaves_the_other_untouched_and_a_snapshot_is_what_was() {
    ON_THE_CPU.iter().for_each(|bench| forked(bench, rand::random()));
}

#[test]
fn blocks_of_another_engine_are_as_good_as_its_own() {
    ON_THE_CPU[..3].iter().for_each(|bench| restored(bench, rand::random()));
    // Where there is more to a sequence than keys and values, there are none.
    let bench = &ON_THE_CPU[3];
    let engine = bench.engine(&convolving(1), 8);
    assert_eq!(engine.block_ids(ModelId::of(b"m"), &[1; 3 * BLOCK]).count(), 0);
}

#[test]
fn rows_of_several_sequences_are_what_each_is_alone() {
    ON_THE_CPU.iter().for_each(|bench| stepped(bench, rand::random()));
}

#[test]
fn what_the_host_chooses_is_what_the_device_would_but_for_what_was_asked() {
    ON_THE_CPU.iter().for_each(|bench| hosted(bench, rand::random()));
}

#[test]
fn what_the_budget_has_no_room_for_is_refused_and_what_there_was_goes_on() {
    let model = attending(1);
    let load = |slots| {
        let options = LoadOptions { context: Some(8), batch: 32, slots, ..LoadOptions::default() };
        Engine::load(&model, &CpuDevice, &options).unwrap()
    };
    let stats = load(SlotBudget::All).stats();
    let mut engine = load(SlotBudget::Device(stats.trunk_bytes + stats.slot_bytes));
    assert_eq!((engine.stats(), engine.positions()), (stats, BLOCK));
    let mut sequence = sequence(GREEDY);
    engine.prefill(&mut sequence, &[1; 40]).unwrap();
    let error = engine.prefill(&mut sequence, &[1; 30]).unwrap_err();
    assert!(matches!(error, SessionError::Room { positions: 70, .. }), "{error}");
    assert_eq!(error.label(), "budget");
    assert_eq!(sequence.len(), 40);
    assert!(matches!(engine.reserve(&sequence, 70), Err(SessionError::Room { .. })));
    engine.prefill(&mut sequence, &[1; 24]).unwrap();
    let foreign = load(SlotBudget::All).prefill(&mut sequence, &[1]);
    assert!(matches!(foreign, Err(SessionError::Foreign)));
    // The blocks of a dropped sequence go to another.
    drop(sequence);
    engine.prefill(&mut self::sequence(GREEDY), &[1; 60]).unwrap();
}

/// As before, for the states of a layer with a recurrence, of which each sequence has its own.
#[test]
fn a_sequence_too_many_for_the_states_is_refused_and_the_first_goes_on() {
    let model = convolving(1);
    let load = |slots| {
        let options =
            LoadOptions { context: Some(200), batch: 32, slots, ..LoadOptions::default() };
        Engine::load(&model, &CpuDevice, &options).unwrap()
    };
    let stats = load(SlotBudget::All).stats();
    let mut engine = load(SlotBudget::Device(stats.trunk_bytes + stats.slot_bytes));
    let mut first = sequence(GREEDY);
    engine.prefill(&mut first, &[1; 20]).unwrap();
    let mut fork = first.fork();
    for other in [&mut sequence(GREEDY), &mut fork] {
        let error = engine.prefill(other, &[1; 3]).unwrap_err();
        assert!(matches!(error, SessionError::States { .. }), "{error}");
        assert_eq!(error.label(), "budget");
    }
    assert_eq!(fork.len(), 20);
    drop(fork);
    engine.prefill(&mut first, &[1; 20]).unwrap();
    // The place of a dropped sequence, or of one that forgot everything, goes to another.
    first.clear();
    engine.prefill(&mut sequence(GREEDY), &[1; 20]).unwrap();
    let mut plenty = load(SlotBudget::All);
    let mut all: Vec<Sequence> = (0..3).map(|_| sequence(GREEDY)).collect();
    all.iter_mut().for_each(|text| drop(plenty.prefill(text, &[1; 20]).unwrap()));
    let more = plenty.stats().trunk_bytes - stats.trunk_bytes;
    assert!(more > 0 && more.is_multiple_of(2), "the states of two sequences: {more}");
}

#[test]
fn a_value_that_no_f16_holds_is_counted_where_the_cache_has_f16() {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 16, "max_position_embeddings": 16,
    });
    let values = |wanted: &testing::Wanted<'_>| {
        let head = wanted.name.contains("lm_head");
        let value = |i| match i {
            _ if wanted.name.contains("v_proj") => 1e5,
            i if head => (i % 7) as f32 * 0.1,
            _ => 0.5,
        };
        (0..wanted.rows * wanted.cols).map(value).collect()
    };
    let (model, _) = testing::model(&config, values, |_| DType::F32);
    let load = |kv| {
        let options = LoadOptions { kv, ..LoadOptions::default() };
        Session::new(&model, &CpuDevice, &options).unwrap()
    };
    for (kv, clamped) in [(KvFormat::F16, 3 * 16), (KvFormat::F32, 0)] {
        let mut session = load(kv);
        session.step(&[1, 2, 3], LogitRows::Last).unwrap();
        assert_eq!(session.engine().clamped(), clamped, "{kv:?}");
    }
    // A check reports it, however close the logits are.
    let (input_ids, greedy) = (vec![1, 2, 3], Vec::new());
    let logits = load(KvFormat::F32).step(&input_ids, LogitRows::All).unwrap();
    let expected = Expected { input_ids, logits, vocab: 16, greedy, prefix: GREEDY_PROMPT };
    let [exact, halved] =
        [KvFormat::F32, KvFormat::F16].map(|kv| check(&mut load(kv), &expected).unwrap());
    assert!(exact.passes(0.0) && exact.clamped == 0, "{exact:?}");
    assert!(!halved.passes(f64::MAX) && halved.clamped > 0, "{halved:?}");
}
