//! Skewed routing for models of random weights: which experts are popular, and how many of a
//! token's experts are also those of the previous token. The engine does not know of it; everything
//! is in the weights.
//!
//! - Every embedding holds the same value in its first [`CONSTANT`] elements and random values
//!   elsewhere, which are far larger than what layers add. So a router sees a constant, and noise
//!   that is nearly normal and different for each token.
//! - A router's first [`CONSTANT`] columns turn the constant into a bias for each expert. The
//!   biases are fitted (once, by simulation) so that the n-th most popular expert is among the top
//!   k in proportion to `n^-S`, though never for more than [`SHARE_MAX`] of the tokens. Each layer
//!   has its own order of popularity.
//! - For stickiness, the first layer's queries are zero, so its attention is the mean over the
//!   context: a part of the noise that hardly changes from token to token. Its size is fitted so
//!   that with [`STICK_CONTEXT`] tokens of context a share P of a token's experts is also the next
//!   token's. A mean of independent tokens shrinks as the context grows, so routing sticks more
//!   before that point and less after it. If popularity alone already gives two tokens a larger
//!   share in common, this part is left out.
//!
//! This holds for varying tokens, as in text. A token's own noise is always the same, so a repeated
//! token is always routed alike.

use std::collections::HashMap;
use std::str::FromStr;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use super::synth::WEIGHT_STD;
use super::{LoadError, Result};
use crate::graph::{Graph, Op, WeightRole};
use crate::quant::{dequantize, quantize};
use doppler_store::DType;
use doppler_store::manifest::{Role, TensorEntry};

/// Elements of the hidden state that are the same for every token.
const CONSTANT: usize = 32;
/// Standard deviation of the embeddings. A layer adds a few units at most.
const EMBEDDING_STD: f64 = 128.0;
/// The largest share of tokens that any expert gets.
const SHARE_MAX: f64 = 0.95;
/// The context, in tokens, at which the requested stickiness holds.
const STICK_CONTEXT: f64 = 64.0;
/// The most experts that a layer may have here. The fit's memory grows with them.
const EXPERTS_MAX: usize = 4096;
/// Normally distributed numbers that one fit draws.
const FIT_DRAWS: usize = 1 << 18;
const FIT_ROUNDS: usize = 60;

/// How tokens should be routed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// Popularity is proportional to the rank to the power of minus this.
    pub zipf: f64,
    /// The share of a token's experts that the next token uses, too. 0 means that it does not
    /// matter.
    pub stick: f64,
}

impl FromStr for Routing {
    type Err = LoadError;
    /// `zipf:S` or `zipf:S,stick:P`.
    fn from_str(text: &str) -> Result<Self> {
        let bad = || LoadError::Routing(text.to_owned());
        let mut parts = text.split(',');
        let number = |part: Option<&str>, name: &str, max: f64| -> Result<f64> {
            let number = part.and_then(|part| part.strip_prefix(name)).ok_or_else(bad)?;
            let number: f64 = number.parse().map_err(|_| bad())?;
            if (0.0..=max).contains(&number) { Ok(number) } else { Err(bad()) }
        };
        let zipf = number(parts.next(), "zipf:", 4.0)?;
        let stick = match parts.next() {
            None => 0.0,
            part => number(part, "stick:", 0.95)?,
        };
        if parts.next().is_some() { Err(bad()) } else { Ok(Self { zipf, stick }) }
    }
}

/// Changes the tensors of one model.
pub(super) struct Shaper {
    /// The constant's value in an embedding.
    constant: f32,
    /// For each router: each expert's weight in the constant's columns.
    biases: HashMap<String, Vec<f32>>,
    /// The first layer's attention module, and the standard deviation of its value and output
    /// weights.
    sticky: Option<(String, f32)>,
    seed: u64,
}

impl Shaper {
    /// # Errors
    /// If the model has no routers, or its hidden state is too small to reserve a part.
    pub fn new(routing: &Routing, graph: &Graph, seed: u64) -> Result<Self> {
        let routers = graph.weights.iter().filter(|weight| weight.role == WeightRole::Router);
        let hidden = graph.moe.first().map_or(0, |moe| moe.hidden);
        let shape = graph.moe.first().map(|moe| (moe.experts.len(), moe.top_k));
        let Some((experts, top_k)) = shape.filter(|(experts, _)| *experts <= EXPERTS_MAX) else {
            return Err(LoadError::NoRouting("it has no experts to route to".into()));
        };
        if hidden < 4 * CONSTANT || graph.moe.iter().any(|moe| moe.experts.len() != experts) {
            return Err(LoadError::NoRouting(format!(
                "it takes a hidden state of at least {} and layers of one size",
                4 * CONSTANT
            )));
        }
        let mut rng = StdRng::seed_from_u64(seed ^ 0x0005_7261_6365);
        let fit = Fit::new(experts, top_k, routing, &mut rng);
        // The constant is a fifth of the hidden state's squared norm.
        let constant = EMBEDDING_STD * (hidden as f64 / CONSTANT as f64).sqrt() / 2.0;
        let free = (hidden - CONSTANT) as f64;
        // Everything that is not constant, including the sticky part.
        let noise_std = EMBEDDING_STD / (1.0 - fit.slow).sqrt();
        let unit = f64::from(WEIGHT_STD) * free.sqrt() * noise_std;
        let by_rank: Vec<f32> = fit
            .biases
            .iter()
            .map(|bias| (bias * unit / (CONSTANT as f64 * constant)) as f32)
            .collect();
        let biases = routers.map(|router| {
            let mut biases = by_rank.clone();
            biases.shuffle(&mut rng);
            (router.tensor.clone(), biases)
        });
        let biases = biases.collect();
        let sticky = (fit.slow > 0.0).then(|| {
            // What the first layer adds: std^2 * sqrt(attention width * hidden) * rms(h)
            // / sqrt(context), `h` being 1 / sqrt(1.25) where it is not constant.
            let wanted = EMBEDDING_STD * (fit.slow / (1.0 - fit.slow)).sqrt();
            let attended = graph.ops.iter().find_map(|op| match op {
                Op::Attention { q, .. } | Op::AttendSinks { q, .. } => Some(graph.width(*q)),
                _ => None,
            });
            let width = attended.unwrap_or(hidden) as f64;
            let gain = (width * free / 1.25 / STICK_CONTEXT).sqrt();
            ("model.layers.0.self_attn.".to_owned(), (wanted / gain).sqrt() as f32)
        });
        Ok(Self { constant: constant as f32, biases, sticky, seed })
    }

    /// The name of a tensor within the sticky attention: `q_proj.weight` and so on.
    fn attention<'a>(&self, name: &'a str) -> Option<(&'a str, f32)> {
        let (prefix, std) = self.sticky.as_ref()?;
        Some((name.strip_prefix(prefix.as_str())?, *std))
    }

    /// The standard deviation of a tensor's random weights.
    pub fn std(&self, name: &str, role: &Role) -> f32 {
        match (role, self.attention(name)) {
            (Role::Embedding, _) => EMBEDDING_STD as f32,
            (_, Some(("v_proj.weight" | "o_proj.weight", std))) => std,
            _ => WEIGHT_STD,
        }
    }

    /// Changes whole blocks of a tensor, starting with block number `first_block`.
    pub fn shape(&self, name: &str, tensor: &TensorEntry, first_block: usize, bytes: &mut [u8]) {
        let (_, cols) = tensor.rows_cols();
        let row_blocks = (cols as usize).div_ceil(tensor.dtype.block_len());
        let constant_blocks = CONSTANT.div_ceil(tensor.dtype.block_len());
        let blocks = bytes.chunks_exact_mut(tensor.dtype.block_bytes());
        for (number, block) in (first_block..).zip(blocks) {
            let (row, within) = (number / row_blocks, number % row_blocks);
            let constant_block = within < constant_blocks;
            if tensor.role == Role::Embedding && constant_block {
                set_constant(tensor.dtype, block, self.constant);
            } else if let Some(biases) = self.biases.get(name).filter(|_| constant_block) {
                set_constant(tensor.dtype, block, biases[row]);
            }
            match self.attention(name) {
                Some(("q_proj.weight", _)) => block.fill(0),
                Some(("v_proj.weight", std)) => {
                    // The 32 weights of a part of a block drawn as bytes have a common offset, and
                    // so do those of an embedding; the offsets would add up. Individually drawn
                    // weights have none.
                    let mut rng = StdRng::seed_from_u64(self.seed ^ number as u64);
                    let most = std * 3_f32.sqrt();
                    let skip = if constant_block { CONSTANT } else { 0 };
                    let draw = |at| if at < skip { 0.0 } else { rng.random_range(-most..most) };
                    set(block, tensor.dtype, (0..tensor.dtype.block_len()).map(draw).collect());
                }
                // The constant must not change.
                Some(("o_proj.weight", _)) if row < CONSTANT => block.fill(0),
                _ => {}
            }
        }
    }
}

/// Sets the first [`CONSTANT`] elements of a row's block (or all of a smaller block) to `value`.
fn set_constant(dtype: DType, block: &mut [u8], value: f32) {
    let mut values = vec![0.0; dtype.block_len()];
    dequantize(dtype, block, dtype.block_len(), &mut values);
    values.iter_mut().take(CONSTANT).for_each(|v| *v = value);
    set(block, dtype, values);
}

fn set(block: &mut [u8], dtype: DType, values: Vec<f32>) {
    let mut changed = Vec::with_capacity(block.len());
    // A whole block of finite values cannot be refused.
    if quantize(dtype, &values, &mut changed).is_ok() {
        block.copy_from_slice(&changed);
    }
}

/// The biases, and the slow share of the unit normal noise.
struct Fit {
    /// By rank of popularity.
    biases: Vec<f64>,
    slow: f64,
}

impl Fit {
    fn new(experts: usize, top_k: usize, routing: &Routing, rng: &mut StdRng) -> Self {
        let tokens = (FIT_DRAWS / experts).max(16);
        let noise: Vec<f64> = (0..tokens * experts).map(|_| normal(rng)).collect();
        let wanted = shares(experts, top_k, routing.zipf);
        let mut biases = vec![0.0; experts];
        let mut chosen = Vec::new();
        for _ in 0..FIT_ROUNDS {
            let mut counts = vec![0_usize; experts];
            for noise in noise.chunks_exact(experts) {
                top(noise.iter().zip(&biases).map(|(n, b)| n + b), top_k, &mut chosen);
                chosen.iter().for_each(|expert| counts[*expert] += 1);
            }
            for (bias, (count, wanted)) in biases.iter_mut().zip(counts.iter().zip(&wanted)) {
                let least = 0.5 / tokens as f64;
                let share = (*count as f64 / tokens as f64).clamp(least, 1.0 - least);
                // Even steps in log odds, with noise of standard deviation 1.
                let odds = |p: f64| (p / (1.0 - p)).ln();
                *bias += 0.4 * (odds(*wanted) - odds(share));
            }
        }
        Self { slow: slow_share(&noise, &biases, top_k, routing.stick), biases }
    }
}

/// The share of tokens that use each expert, by rank: proportional to `rank^-zipf`, at most
/// [`SHARE_MAX`], with the sum `top_k`.
fn shares(experts: usize, top_k: usize, zipf: f64) -> Vec<f64> {
    let weights: Vec<f64> = (1..=experts).map(|rank| (rank as f64).powf(-zipf)).collect();
    let max = SHARE_MAX.max(top_k as f64 / experts as f64).min(1.0 - 1e-6);
    let mut capped = 0;
    loop {
        // The most popular ones are at the limit; the others share the rest.
        let left = top_k as f64 - capped as f64 * max;
        let scale = left.max(0.0) / weights[capped.min(experts - 1)..].iter().sum::<f64>();
        if capped == experts || weights[capped] * scale <= max {
            let share = |(rank, weight)| if rank < capped { max } else { weight * scale };
            return weights.iter().enumerate().map(share).collect();
        }
        capped += 1;
    }
}

/// How much of the noise two tokens must have in common to have `stick` of their experts in common.
fn slow_share(noise: &[f64], biases: &[f64], top_k: usize, stick: f64) -> f64 {
    let experts = biases.len();
    let rows: Vec<&[f64]> = noise.chunks_exact(experts).collect();
    let common = |slow: f64| {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let (mut common, mut all) = (0, 0);
        for rows in rows.chunks_exact(3) {
            let logits = |fast: usize| {
                let noise = rows[0].iter().zip(rows[fast]);
                let noise = noise.map(move |(s, f)| slow.sqrt() * s + (1.0 - slow).sqrt() * f);
                noise.zip(biases).map(|(n, b)| n + b)
            };
            top(logits(1), top_k, &mut first);
            top(logits(2), top_k, &mut second);
            common += first.iter().filter(|expert| second.contains(expert)).count();
            all += top_k;
        }
        f64::from(common as u32) / f64::from(all as u32)
    };
    if stick <= common(0.0) {
        return 0.0;
    }
    let (mut low, mut high) = (0.0, 0.999);
    for _ in 0..16 {
        let middle = (low + high) / 2.0;
        if common(middle) < stick { low = middle } else { high = middle }
    }
    high
}

/// The `top_k` largest of `logits`, in any order.
fn top(logits: impl Iterator<Item = f64>, top_k: usize, chosen: &mut Vec<usize>) {
    let logits: Vec<f64> = logits.collect();
    chosen.clear();
    chosen.extend(0..logits.len());
    if top_k < logits.len() {
        chosen.select_nth_unstable_by(top_k, |a, b| logits[*b].total_cmp(&logits[*a]));
        chosen.truncate(top_k);
    }
}

/// Box and Muller, "A Note on the Generation of Random Normal Deviates", 1958.
fn normal(rng: &mut StdRng) -> f64 {
    let (u, v): (f64, f64) = (rng.random_range(f64::EPSILON..1.0), rng.random_range(0.0..1.0));
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::super::{Arch, MemorySink, Quantization, SynthOptions, synth};
    use super::*;
    use crate::backend::LogitRows;
    use crate::cpu::CpuDevice;
    use crate::engine::LoadOptions;
    use crate::model::Model;
    use crate::reader::WeightReader;
    use crate::session::Session;
    use crate::testing::runtime;
    use crate::trace::Trace;

    const VOCAB: u32 = 3000;

    fn options(arch: Arch, routing: Option<Routing>, seed: u64) -> SynthOptions {
        let mut config = arch.config();
        for (key, value) in [
            ("hidden_size", 256),
            ("intermediate_size", 256),
            ("moe_intermediate_size", 256),
            ("num_attention_heads", 4),
            ("num_key_value_heads", 2),
            ("head_dim", 64),
            ("num_experts", 24),
            ("num_experts_per_tok", 4),
            ("vocab_size", VOCAB as usize),
        ] {
            // Mixtral keeps its 8 experts, of which a token uses 2.
            if config.get(key).is_some() && (arch != Arch::Mixtral8x7B || !key.contains("experts"))
            {
                config[key] = json!(value);
            }
        }
        let quantization = Quantization::Q4KM;
        SynthOptions {
            config,
            layers: Some(3),
            seed,
            routing,
            quantization,
            ..SynthOptions::new(arch)
        }
    }

    /// The routing of random tokens, in prompts of 96, one token at a time.
    fn trace(options: &SynthOptions) -> Trace {
        let mut sink = MemorySink::default();
        let manifest = synth(options, &mut sink, &mut |_| {}).unwrap();
        let reader = WeightReader::new(Arc::new(sink), runtime().handle().clone());
        let model = Model::open(manifest, reader).unwrap();
        let context = Some(96);
        let session_options = LoadOptions { context, ..LoadOptions::default() };
        let mut session = Session::new(&model, &CpuDevice, &session_options).unwrap();
        session.record(Trace::new(&model));
        let mut rng = StdRng::seed_from_u64(options.seed);
        for _ in 0..8 {
            session.reset();
            for _ in 0..96 {
                let logits = session.step(&[rng.random_range(0..VOCAB)], LogitRows::Last).unwrap();
                assert!(logits.iter().all(|logit| logit.is_finite()));
            }
        }
        session.take_trace().unwrap()
    }

    /// By layer, the share of tokens that use each expert, most popular first.
    fn popularity(trace: &Trace) -> Vec<Vec<f64>> {
        let layers = trace.layers.iter().enumerate().map(|(at, layer)| {
            let mut shares = vec![0.0; layer.experts];
            for step in &trace.steps {
                for expert in &step.experts[at] {
                    shares[*expert as usize] += 1.0 / trace.steps.len() as f64;
                }
            }
            shares.sort_by(|a, b| b.total_cmp(a));
            shares
        });
        layers.collect()
    }

    /// By layer, the share of a token's experts that the next token uses, too, at positions 48 to
    /// 80.
    fn overlap(trace: &Trace) -> Vec<f64> {
        let layers = trace.layers.iter().enumerate().map(|(at, layer)| {
            let (mut common, mut all) = (0, 0);
            for prompt in trace.steps.chunks_exact(96) {
                for pair in prompt[48..80].windows(2) {
                    let (a, b) = (&pair[0].experts[at], &pair[1].experts[at]);
                    common += a.iter().filter(|expert| b.contains(expert)).count();
                    all += layer.top_k;
                }
            }
            f64::from(common as u32) / f64::from(all as u32)
        });
        layers.collect()
    }

    #[test]
    fn popularity_follows_zipf_where_random_routers_are_near_even() {
        let seed = rand::random();
        println!("seed {seed}");
        for (arch, experts, top_k) in [(Arch::Qwen3_30BA3B, 24, 4), (Arch::Mixtral8x7B, 8, 2)] {
            let even = popularity(&trace(&options(arch, None, seed)));
            let routing = Routing { zipf: 1.0, stick: 0.0 };
            let skewed = popularity(&trace(&options(arch, Some(routing), seed)));
            let wanted = shares(experts, top_k, 1.0);
            println!("{arch:?} even {even:.2?}\nskewed {skewed:.2?}\nwanted {wanted:.2?}");
            let off = |shares: &Vec<f64>| -> f64 {
                shares.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).sum()
            };
            let offs: Vec<f64> = skewed.iter().map(off).collect();
            // Layers as narrow as these vary by chance (one in 200 is 0.33 of the way to even
            // routing). A layer that is not skewed at all shows in their mean.
            let mean = offs.iter().sum::<f64>() / offs.len() as f64;
            let even_off: f64 =
                wanted.iter().map(|b| (top_k as f64 / experts as f64 - b).abs()).sum();
            assert!(mean < 0.3 * even_off, "{offs:?} of {even_off}");
        }
    }

    #[test]
    fn routing_sticks_as_much_as_asked_for_at_the_context_it_is_made_for() {
        let seed = rand::random();
        println!("seed {seed}");
        let at = |stick| {
            let routing = Routing { zipf: 0.6, stick };
            overlap(&trace(&options(Arch::Qwen3_30BA3B, Some(routing), seed)))
        };
        let (loose, sticky) = (at(0.0), at(0.6));
        println!("loose {loose:.2?}, sticky {sticky:.2?}");
        // What a layer shows of a text this short scatters by some 0.05; all layers together scatter less.
        let mean = |layers: &[f64]| layers.iter().sum::<f64>() / layers.len() as f64;
        assert!(mean(&loose) < 0.45, "{loose:?}");
        assert!((0.5..0.7).contains(&mean(&sticky)), "{sticky:?}");
    }

    #[test]
    fn shares_add_up_and_none_is_above_the_limit() {
        for (experts, top_k, zipf) in [(128, 8, 1.0), (8, 2, 4.0), (8, 8, 1.0), (24, 4, 0.0)] {
            let shares = shares(experts, top_k, zipf);
            let sum: f64 = shares.iter().sum();
            assert!((sum - top_k as f64).abs() < 1e-4, "{sum}: {shares:?}");
            assert!(shares.is_sorted_by(|a, b| a >= b) && shares[0] <= 1.0);
        }
    }

    #[test]
    fn what_is_not_possible_is_refused() {
        assert_eq!(
            "zipf:1.2,stick:0.5".parse::<Routing>().unwrap(),
            Routing { zipf: 1.2, stick: 0.5 }
        );
        for text in ["", "zipf", "zipf:x", "zipf:-1", "zipf:9", "stick:1", "zipf:1,stick:2"] {
            let error = text.parse::<Routing>().unwrap_err().to_string();
            assert!(error.contains("zipf:S"), "{error}");
        }
        assert!("zipf:1,stick:0.5,more".parse::<Routing>().is_err());
        let routing = Some(Routing { zipf: 1.0, stick: 0.0 });
        let dense = SynthOptions { routing, ..SynthOptions::new(Arch::Llama32_1B) };
        let error = synth(&dense, &mut MemorySink::default(), &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("no experts"), "{error}");
    }
}
