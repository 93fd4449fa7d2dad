//! `bench streams`: tokens a second of several sequences together, stepped side by side.
//!
//! Each number of sequences runs in every round, so that other load on the machine affects all
//! numbers alike. Prompts are not measured. What is measured begins once experts are settled: the
//! texts have been written until no expert was read any more, or, where slots are fewer than experts,
//! until as many were read as the time before.

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::ensure;
use serde::Serialize;

use super::machine::{Machine, peak_rss_bytes};
use super::stats::Summary;
use super::{Runs, record_file, report};
use crate::args::BenchArgs;
use crate::size::ByteSize;
use crate::{generation, source};
use doppler_infer::engine::{Engine, Next};
use doppler_infer::sampler::SamplerOptions;
use doppler_infer::sequence::Sequence;

/// The most sequences of a measurement.
const STREAMS_MAX: usize = 256;

/// The most times that the texts are written before they are measured.
const SETTLE_MAX: usize = 8;

/// What `--json` prints.
#[derive(Serialize)]
struct Record {
    what: &'static str,
    machine: Machine,
    model: String,
    quantization: String,
    prompt_tokens: usize,
    /// Tokens of each sequence that are measured in each run.
    tokens: usize,
    runs: usize,
    streams: Vec<Streams>,
    /// How often the texts were written before, and bytes of experts put into slots while measured.
    settled_after: usize,
    filled_bytes: u64,
    peak_rss_bytes: Option<u64>,
}

/// One number of sequences.
#[derive(Serialize)]
struct Streams {
    count: usize,
    /// Tokens a second of all of them.
    tok_s: Summary,
    /// As a multiple of the first number's, run by run.
    of_first: Summary,
    /// Whether each sequence wrote the same tokens as in all other steps that it shared.
    same: bool,
}

/// Seconds for so many tokens of each of `count` sequences, whose prompts have run; and the tokens of
/// each.
fn time(
    engine: &mut Engine,
    runs: &Runs,
    count: usize,
    prompt_tokens: usize,
    tokens: usize,
) -> anyhow::Result<(f64, Vec<Vec<u32>>)> {
    let mut sequences = Vec::with_capacity(count);
    let mut next = Vec::with_capacity(count);
    for number in 0..count {
        let mut sequence = Sequence::new(SamplerOptions::default(), runs.context)?;
        let passage = runs.passage(number);
        engine.claim(&mut sequence, prompt_tokens + tokens)?;
        let logits = engine.prefill(&mut sequence, &passage[..prompt_tokens])?;
        next.push(sequence.choose(&logits));
        sequences.push(sequence);
    }
    let mut written = vec![Vec::with_capacity(tokens); count];
    let started = Instant::now();
    for done in 0..tokens {
        let row = |(sequence, token)| Next { sequence, token, more: tokens - done };
        let mut rows: Vec<Next<'_>> =
            sequences.iter_mut().zip(next.iter().copied()).map(row).collect();
        next = engine.next_of_each(&mut rows).into_iter().collect::<Result<_, _>>()?;
        written.iter_mut().zip(&next).for_each(|(written, token)| written.push(*token));
    }
    Ok((started.elapsed().as_secs_f64(), written))
}

/// Writes the texts until experts are settled. `write` returns the bytes of experts that it read.
/// Returns how often it wrote them.
fn settle(mut write: impl FnMut() -> anyhow::Result<u64>) -> anyhow::Result<usize> {
    let mut before = u64::MAX;
    for round in 1..SETTLE_MAX {
        let read = write()?;
        // A tenth less is no progress.
        if read == 0 || read >= before - before / 10 {
            return Ok(round);
        }
        before = read;
    }
    write()?;
    Ok(SETTLE_MAX)
}

pub fn streams(args: &BenchArgs, tokens: usize, counts: &[usize]) -> anyhow::Result<()> {
    let good = |count: &usize| (1..=STREAMS_MAX).contains(count);
    ensure!(!counts.is_empty() && counts.iter().all(good), "--streams must be 1 to {STREAMS_MAX}");
    let opened = source::open(&args.model)?;
    let runs = Runs::new(args, &opened, tokens)?;
    let prompt_tokens = args.prompts.prompt_tokens;
    let file = record_file(args.record.as_deref())?;
    let device = generation::device(args.model.backend)?;
    let (slots, policy) = (args.model.slots(), args.model.policy());
    let mut session =
        opened.session_on(device.as_ref(), &args.model, slots, policy, Some(runs.context))?;
    let (engine, _) = session.parts();
    // Unmeasured: makes room.
    for count in counts {
        time(engine, &runs, *count, prompt_tokens, tokens.min(8))?;
    }
    // The others' texts are among those of the largest number.
    let most = counts.iter().copied().max().unwrap_or(1);
    let settled_after = settle(|| {
        let before = engine.stats().pager.filled_bytes;
        time(engine, &runs, most, prompt_tokens, tokens)?;
        Ok(engine.stats().pager.filled_bytes - before)
    })?;
    let filled = engine.stats().pager.filled_bytes;
    let mut seconds: Vec<Vec<f64>> = vec![Vec::new(); counts.len()];
    let (mut same, mut known) = (vec![true; counts.len()], Vec::new());
    for _ in 0..args.runs {
        for (i, count) in counts.iter().enumerate() {
            let (took, written) = time(engine, &runs, *count, prompt_tokens, tokens)?;
            seconds[i].push(took);
            same[i] &= known.iter().zip(&written).all(|(known, written)| known == written);
            known.extend(written.into_iter().skip(known.len()));
        }
    }
    let filled_bytes = engine.stats().pager.filled_bytes - filled;
    let rate = |count: usize, seconds: f64| (count * tokens) as f64 / seconds.max(1e-9);
    let streams = counts.iter().zip(&seconds).zip(same).map(|((count, all), same)| {
        let of_first = all.iter().zip(&seconds[0]);
        let of_first = of_first.map(|(all, first)| rate(*count, *all) / rate(counts[0], *first));
        Streams {
            count: *count,
            tok_s: Summary::of(all.iter().map(|seconds| rate(*count, *seconds)).collect()),
            of_first: Summary::of(of_first.collect()),
            same,
        }
    });
    let record = Record {
        what: "streams",
        model: opened.model.manifest.model_id.clone(),
        quantization: opened.model.manifest.quantization.clone(),
        prompt_tokens,
        tokens,
        runs: args.runs,
        streams: streams.collect(),
        settled_after,
        filled_bytes,
        peak_rss_bytes: peak_rss_bytes(),
        machine: Machine::new(session.describe()),
    };
    let title = format!("streams, {}", record.model);
    report(args.json, file, &record, &title, &record.machine, &text(&record))
}

fn text(record: &Record) -> String {
    let Record { model, tokens, runs, prompt_tokens, .. } = record;
    let mut text = format!(
        "streams: {model}, median of {runs} runs of {tokens} tokens after prompts of {prompt_tokens}\n"
    );
    let (count, all, each) = ("streams", "tok/s", "each");
    let _ = writeln!(text, "  {count:>7} {all:>10} {each:>9} {:>9}", "of first");
    for Streams { count, tok_s, of_first, same } in &record.streams {
        let (all, each) = (tok_s.median, tok_s.median / *count as f64);
        let other = if *same { "" } else { "  other tokens" };
        let of_first = of_first.median;
        let _ = writeln!(text, "  {count:>7} {all:>10.1} {each:>9.1} {of_first:>8.2}x{other}");
    }
    if record.filled_bytes > 0 {
        let read = ByteSize(record.filled_bytes);
        let _ = writeln!(text, "  {read} of experts were read meanwhile");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes texts that read so many bytes, one number after the other.
    fn settled_after(reads: &[u64]) -> usize {
        let mut reads = reads.iter();
        settle(|| Ok(*reads.next().expect("no more reads"))).unwrap()
    }

    #[test]
    fn texts_are_written_until_no_expert_is_read_or_as_many_as_before() {
        assert_eq!(settled_after(&[0]), 1);
        assert_eq!(settled_after(&[900, 0]), 2);
        assert_eq!(settled_after(&[900, 100, 0]), 3);
        assert_eq!(settled_after(&[900, 500, 460]), 3);
        assert_eq!(settled_after(&[900, 500, 450]), 3);
        assert_eq!(settled_after(&[500, 900]), 2);
        let falling: Vec<u64> = (0..SETTLE_MAX as u32).map(|i| 1_000_000 >> i).collect();
        assert_eq!(settled_after(&falling), SETTLE_MAX);
    }

    #[test]
    fn an_error_ends_it() {
        assert!(settle(|| anyhow::bail!("no device")).is_err());
    }
}
