//! `bench`: tokens a second of a local model, decoding or taking in a prompt.
//!
//! Tokens are fixed ids, so that any model can be measured, with a tokenizer or
//! without. One unmeasured run comes first: it brings the experts in.

use std::time::Instant;

use serde::Serialize;

use super::print_json;
use crate::infer::backend::LogitRows;
use crate::infer::graph::Op;
use crate::infer::model::Model;
use crate::infer::session::{Session, SessionStats};
use crate::node::args::{BenchArgs, BenchCommand};
use crate::node::size::ByteSize;
use crate::node::source;

/// What `--json` prints.
#[derive(Serialize)]
struct Record {
    what: &'static str,
    model: String,
    quantization: String,
    device: String,
    host_cpu: String,
    /// The commit the binary was built from, if the build was told.
    commit: Option<&'static str>,
    command: String,
    prompt_tokens: usize,
    /// Tokens timed in each run.
    tokens: usize,
    /// Tokens a second of each run, in order.
    runs: Vec<f64>,
    tok_s: f64,
    tok_s_min: f64,
    tok_s_max: f64,
    /// Weight bytes that one step of decoding reads.
    weight_bytes_a_token: u64,
    /// Of those, a second; only for decoding.
    weight_bytes_s: Option<f64>,
    session: SessionStats,
}

pub fn bench(command: &BenchCommand) -> anyhow::Result<()> {
    let (what, args, decoded) = match command {
        BenchCommand::Decode { args, tokens } => ("decode", args, *tokens),
        BenchCommand::Prefill { args } => ("prefill", args, 0),
        BenchCommand::Store(args) => return super::bench_store::bench_store(args),
    };
    anyhow::ensure!(args.prompt_tokens > 0, "--prompt-tokens must be at least 1");
    anyhow::ensure!((1..=1000).contains(&args.runs), "--runs must be 1 to 1000");
    anyhow::ensure!(what == "prefill" || decoded > 0, "--tokens must be at least 1");
    let opened = source::open(&args.model)?;
    let context = args.prompt_tokens.saturating_add(decoded);
    let context = args.model.context.unwrap_or(context);
    let vram = args.model.vram_budget.map(|size| size.0);
    let mut session = opened.session(args.model.backend, vram, Some(context))?;
    run(&mut session, args, decoded)?;
    let mut runs = Vec::with_capacity(args.runs);
    for _ in 0..args.runs {
        runs.push(run(&mut session, args, decoded)?);
    }
    let mut sorted = runs.clone();
    sorted.sort_by(f64::total_cmp);
    let tok_s = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
    let bytes = weight_bytes_a_token(&opened.model);
    let record = Record {
        what,
        model: opened.model.manifest.model_id.clone(),
        quantization: opened.model.manifest.quantization.clone(),
        device: session.describe(),
        host_cpu: host_cpu(),
        commit: option_env!("DOPPLER_COMMIT"),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        prompt_tokens: args.prompt_tokens,
        tokens: if decoded > 0 { decoded } else { args.prompt_tokens },
        tok_s,
        tok_s_min: sorted[0],
        tok_s_max: sorted[sorted.len() - 1],
        runs,
        weight_bytes_a_token: bytes,
        weight_bytes_s: (decoded > 0).then_some(bytes as f64 * tok_s),
        session: session.stats(),
    };
    if args.json {
        return print_json(&record);
    }
    print(&record);
    Ok(())
}

fn print(record: &Record) {
    let Record { what, model, tok_s, tok_s_min, tok_s_max, .. } = record;
    println!("{what}: {tok_s:.2} tok/s   ({tok_s_min:.2} to {tok_s_max:.2})   {model}");
    println!(
        "  {} runs of {} tokens, prompt of {}, on {} ({})",
        record.runs.len(),
        record.tokens,
        record.prompt_tokens,
        record.device,
        record.host_cpu
    );
    if let Some(bytes_s) = record.weight_bytes_s {
        let bytes = ByteSize(record.weight_bytes_a_token);
        println!("  {bytes} of weights a token, {:.2} GB/s", bytes_s / 1e9);
    }
    println!("  commit {}: {}", record.commit.unwrap_or("unknown"), record.command);
}

/// One run from an empty cache; tokens a second of what is measured.
fn run(session: &mut Session, args: &BenchArgs, decoded: usize) -> anyhow::Result<f64> {
    let vocab = session.vocab();
    let token = |i: usize| ((i * 7919 + 11) % vocab) as u32;
    let prompt: Vec<u32> = (0..args.prompt_tokens).map(token).collect();
    session.reset();
    let started = Instant::now();
    session.prefill(&prompt)?;
    if decoded == 0 {
        return Ok(prompt.len() as f64 / started.elapsed().as_secs_f64());
    }
    let started = Instant::now();
    for i in 0..decoded {
        session.step(&[token(prompt.len() + i)], LogitRows::Last)?;
    }
    Ok(decoded as f64 / started.elapsed().as_secs_f64())
}

/// Stored bytes of all weights that a step of one token meets.
fn weight_bytes_a_token(model: &Model) -> u64 {
    let weight = |id: crate::infer::graph::WeightId| &model.trunk[id.0 as usize].spec;
    let bytes = model.graph.ops.iter().map(|op| match op {
        Op::Embed { table, .. } => weight(*table).dtype.row_bytes(weight(*table).cols),
        Op::RmsNorm { weight: id, .. } | Op::Logits { weight: id, .. } => weight(*id).bytes(),
        Op::Linear { weight: id, bias, .. } => {
            weight(*id).bytes() + bias.map_or(0, |bias| weight(bias).bytes())
        }
        Op::Experts { moe, .. } => {
            let layout = &model.moe[usize::from(moe.0)].layout;
            let expert = layout.gate.bytes() + layout.up.bytes() + layout.down.bytes();
            model.graph.moe_spec(*moe).top_k * expert
        }
        _ => 0,
    });
    bytes.sum::<usize>() as u64
}

/// The processor's name where the system tells it.
pub(super) fn host_cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_owned()
}
