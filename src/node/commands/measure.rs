//! `check` and `perplexity`: whether a model is computed correctly, and how good it is.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use serde::Serialize;

use super::print_json;
use crate::args::{CheckArgs, KvChoice, ModelArgs, PerplexityArgs};
use crate::output::outln;
use crate::{generation, progress, source};
use doppler_infer::check::{CheckReport, Expected, check as compare};
use doppler_infer::check_states::{COSINE_MIN, ExpectedStates, check_states};
use doppler_infer::embedding::load_options;
use doppler_infer::engine::{Engine, LoadOptions};
use doppler_infer::perplexity::{PerplexityOptions, perplexity as measure};
use doppler_infer::tokenizer::Tokenizer;

/// What `check --json` prints.
#[derive(Serialize)]
struct Checked {
    #[serde(flatten)]
    report: CheckReport,
    /// The same with the cache format that `run` uses, unless `--kv` gives one.
    #[serde(skip_serializing_if = "Option::is_none")]
    run: Option<CheckReport>,
}

/// Positions of a perplexity window, unless `--context` is given.
const PERPLEXITY_WINDOW: usize = 512;

pub fn check(args: &CheckArgs) -> anyhow::Result<()> {
    let bytes = read(&args.expected)?;
    let named = || args.expected.display().to_string();
    if let Some(expected) = ExpectedStates::parse(&bytes).with_context(named)? {
        return check_embeddings(args, &expected);
    }
    let expected = Expected::parse(&bytes).with_context(named)?;
    let opened = source::open(&args.model)?;
    let context = args.model.context.unwrap_or_else(|| expected.positions());
    let with = |kv| {
        let model = ModelArgs { kv: Some(kv), ..args.model.clone() };
        let mut session = opened.session(&model, model.slots(), Some(context))?;
        anyhow::Ok((compare(&mut session, &expected)?, session.describe()))
    };
    // Unless `--kv` is given, the comparison uses the reference's own precision, and is repeated
    // with the cache format that `run` uses, whose range is narrower.
    let (report, device) = with(args.model.kv.unwrap_or(KvChoice::F32))?;
    let run = match args.model.kv {
        Some(_) => None,
        None => Some(with(KvChoice::default())?.0),
    };
    if args.json {
        print_json(&Checked { report, run })?;
    } else {
        outln!("on {device}");
        outln!("  max_abs       {:.3e}", report.max_abs);
        outln!("  rel           {:.3e}   (max_abs / std of the reference)", report.rel);
        outln!("  top1_agree    {:.4}", report.top1_agree);
        outln!("  greedy_match  {}", report.greedy_match);
        if let Some(run) = &run {
            outln!("with the f16 cache of run");
            outln!("  rel           {:.3e}", run.rel);
            outln!("  top1_agree    {:.4}", run.top1_agree);
            outln!("  greedy_match  {}", run.greedy_match);
        }
    }
    let clamped = report.clamped.max(run.map_or(0, |run| run.clamped));
    if clamped > 0 {
        bail!(
            "{clamped} elements of keys and values do not fit an f16 cache and were \
             clamped: run this model with --kv f32"
        );
    }
    if !report.passes(args.tolerance) {
        bail!(
            "outside tolerance: rel {:.3e} (at most {:.0e}), top1_agree {:.4} (1), greedy_match {}",
            report.rel,
            args.tolerance,
            report.top1_agree,
            report.greedy_match
        );
    }
    Ok(())
}

/// As `check`, for an embedding model. Its texts are short and their caches never rounded.
fn check_embeddings(args: &CheckArgs, expected: &ExpectedStates) -> anyhow::Result<()> {
    let opened = source::open(&args.model)?;
    let device = generation::device_for(args.model.backend, &opened.model)?;
    let options = load_options(&opened.model, expected.tokens.len());
    let options = LoadOptions { slots: args.model.slots(), ..options };
    let mut engine = Engine::load(&opened.model, device.as_ref(), &options)?;
    let report = check_states(&mut engine, &opened.model, expected)?;
    if args.json {
        print_json(&report)?;
    } else {
        outln!("on {}", engine.describe());
        outln!("  max_abs       {:.3e}", report.max_abs);
        outln!("  rel           {:.3e}   (max_abs / std of the reference)", report.rel);
        outln!("  cosine        {:.8}", report.cosine);
    }
    ensure!(
        report.passes(args.tolerance),
        "outside tolerance: rel {:.3e} (at most {:.0e}), cosine {:.6} (at least {COSINE_MIN})",
        report.rel,
        args.tolerance,
        report.cosine
    );
    Ok(())
}

pub fn perplexity(args: &PerplexityArgs) -> anyhow::Result<()> {
    let text = String::from_utf8(read(&args.text)?)
        .with_context(|| format!("{} is not UTF-8 text", args.text.display()))?;
    let opened = source::open(&args.model)?;
    let (tokens, bos) = tokens(opened.tokenizer()?, &text)?;
    ensure!(
        tokens.len() + usize::from(bos.is_some()) >= 2,
        "{} has {} tokens, and a prediction needs 2: give a longer text",
        args.text.display(),
        tokens.len()
    );
    let window = args.model.context.unwrap_or(PERPLEXITY_WINDOW);
    let context = window.min(opened.model.graph.context_max);
    let mut session = opened.session(&args.model, args.model.slots(), Some(context))?;
    let bar = progress::bar(tokens.len() as u64, "measuring");
    let options = PerplexityOptions { window: context, bos };
    let result = measure(&mut session, &tokens, &options, |so_far| {
        bar.set_position(so_far.tokens as u64);
        bar.set_message(format!("perplexity {:.3}", so_far.perplexity));
    })?;
    bar.finish_and_clear();
    if args.json {
        return print_json(&result);
    }
    outln!("perplexity {:.4}", result.perplexity);
    outln!(
        "  {:.4} nats per token over {} tokens in {} windows of {context}, on {}",
        result.mean_nll,
        result.tokens,
        result.windows,
        session.describe()
    );
    Ok(())
}

/// The text's tokens, and the token with which each window begins. If the tokenizer adds anything
/// else than a single token before the text, it stays part of the text.
fn tokens(tokenizer: &Tokenizer, text: &str) -> anyhow::Result<(Vec<u32>, Option<u32>)> {
    Ok(match tokenizer.prefix()?[..] {
        [bos] => (tokenizer.encode_bare(text)?, Some(bos)),
        _ => (tokenizer.encode(text)?, None),
    })
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
