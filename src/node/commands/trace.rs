//! `trace record` and `trace replay`: which experts a run asks for, and how well each eviction
//! policy would have done.

use std::ops::ControlFlow;

use anyhow::ensure;
use serde::Serialize;
use serde_json::json;

use super::print_json;
use super::prompts::Prompts;
use crate::args::{PolicyChoice, RecordArgs, ReplayArgs, TraceCommand};
use crate::output::outln;
use crate::{generation, progress, source};
use doppler_infer::backend::LogitRows;
use doppler_infer::generate::{GenerateOptions, generate};
use doppler_infer::slots::SlotBudget;
use doppler_infer::trace::{self, ReplayPolicy, Replayed, Trace};

pub fn trace(command: &TraceCommand) -> anyhow::Result<()> {
    match command {
        TraceCommand::Record(args) => record(args),
        TraceCommand::Replay(args) => replay(args),
    }
}

fn record(args: &RecordArgs) -> anyhow::Result<()> {
    let opened = source::open(&args.model)?;
    let model = &opened.model;
    ensure!(!model.moe.is_empty(), "{} has no experts to page", model.manifest.model_id);
    let mut texts = Vec::new();
    for prompt in &args.prompt {
        texts.push(generation::encode_prompt(opened.tokenizer()?, prompt)?);
    }
    let passage = args.prompts.prompt_tokens.saturating_add(args.tokens);
    let longest = texts.iter().map(|text| text.len().saturating_add(args.tokens)).max();
    let context = args.model.context.unwrap_or(longest.unwrap_or(passage));
    let slots = match args.slots {
        Some(slots) => SlotBudget::Experts(slots.of(model.experts())),
        None => args.model.slots(),
    };
    let prompts = match texts.is_empty() {
        true => Some(Prompts::open(&args.prompts, &opened, passage)?),
        false => None,
    };
    // A path that cannot be written is refused before anything runs.
    trace::write(&Trace::new(model), &args.out)?;
    let mut session = opened.session(&args.model, slots, Some(context))?;
    session.record(Trace::new(model));
    let options = GenerateOptions { max_tokens: args.tokens, ..GenerateOptions::default() };
    for text in &texts {
        session.reset();
        let (engine, sequence) = session.parts();
        generate(engine, sequence, text, &options, |_, _| ControlFlow::Continue(()))?;
    }
    if let Some(prompts) = prompts {
        let bar = progress::bar(args.prompts.prompts as u64, "recording");
        for number in 0..args.prompts.prompts {
            session.reset();
            let tokens = prompts.passage(number, passage);
            let (prompt, rest) = tokens.split_at(args.prompts.prompt_tokens);
            session.prefill(prompt)?;
            for token in rest {
                session.step(&[*token], LogitRows::None)?;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
    }
    let stats = session.stats();
    let recorded = session.take_trace().unwrap_or_else(|| Trace::new(model));
    trace::write(&recorded, &args.out)?;
    let policy = args.model.policy();
    if args.json {
        return print_json(&json!({
            "out": args.out.to_string_lossy(),
            "model": recorded.model,
            "steps": recorded.steps.len(),
            "tokens": recorded.steps.iter().map(|step| step.tokens).sum::<usize>(),
            "policy": policy,
            "session": stats,
        }));
    }
    let (steps, demands) = (recorded.steps.len(), stats.pager.demands);
    outln!("{}: {steps} steps, {demands} experts asked for", args.out.display());
    let hits = stats.pager.hits.vram as f64 * 100.0 / demands.max(1) as f64;
    outln!("  {hits:.1} % of them in one of {} slots, evicting by {policy}", stats.slots);
    Ok(())
}

/// One row of the result.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    replayed: Replayed,
    hit_percent: f64,
    decode_hit_percent: f64,
}

fn replay(args: &ReplayArgs) -> anyhow::Result<()> {
    let trace = trace::read(&args.file)?;
    let mut policies: Vec<ReplayPolicy> = Vec::new();
    for choice in &args.policy {
        match choice {
            PolicyChoice::All => policies.extend(ReplayPolicy::ALL),
            PolicyChoice::One(policy) => policies.push(*policy),
        }
    }
    let experts = trace.experts();
    let mut rows = Vec::new();
    for slots in &args.slots {
        for policy in &policies {
            let replayed = trace::replay(&trace, slots.of(experts), *policy)?;
            let (hit_percent, decode_hit_percent) =
                (replayed.all.percent(), replayed.decode.percent());
            rows.push(Row { replayed, hit_percent, decode_hit_percent });
        }
    }
    if args.json {
        return print_json(&json!({
            "model": trace.model,
            "steps": trace.steps.len(),
            "experts": experts,
            "demands": trace.demands(),
            "replays": rows,
        }));
    }
    let (layers, steps) = (trace.layers.len(), trace.steps.len());
    outln!("{}: {experts} experts in {layers} layers, {steps} steps", trace.model);
    outln!("{:>8} {:>6}  {:<8} {:>7} {:>8}", "slots", "", "policy", "hits %", "decode %");
    for Row { replayed, hit_percent, decode_hit_percent } in rows {
        let share = replayed.slots as f64 * 100.0 / experts as f64;
        outln!(
            "{:>8} {share:>5.1}%  {:<8} {hit_percent:>7.2} {decode_hit_percent:>8.2}",
            replayed.slots,
            replayed.policy
        );
    }
    Ok(())
}
