//! `bench decode` and `bench prefill`: tokens a second of one session.

use std::fmt::Write as _;

use serde::Serialize;

use super::machine::{Machine, peak_rss_bytes};
use super::sample::{PerToken, Sample, weight_bytes_a_token};
use super::stats::Summary;
use super::{Runs, record_file, report};
use crate::infer::backend::{Bandwidth, Counters};
use crate::infer::pager::PagerStats;
use crate::infer::session::SessionStats;
use crate::node::args::BenchArgs;
use crate::node::size::ByteSize;
use crate::node::{generation, source};
use crate::store::PolicyKind;

/// What `--json` prints.
#[derive(Serialize)]
struct Record {
    what: &'static str,
    machine: Machine,
    model: String,
    quantization: String,
    policy: PolicyKind,
    experts: usize,
    prompt_tokens: usize,
    prompts: usize,
    /// Tokens measured in each run.
    tokens: usize,
    runs: usize,
    tok_s: Summary,
    /// Weight bytes that one step of decoding reads.
    weight_bytes_a_token: u64,
    /// Of those, a second; only for decoding.
    weight_bytes_s: Option<f64>,
    bandwidth: Bandwidth,
    /// Of the copy bandwidth, what reading the weights reaches; only for decoding.
    bandwidth_share: Option<f64>,
    per_token: PerToken,
    /// Over all measured runs.
    counters: Counters,
    pager: PagerStats,
    /// Since the session was made.
    session: SessionStats,
    peak_rss_bytes: Option<u64>,
}

/// `decoded` tokens a run are measured; with none, the prompt.
pub fn speed(what: &'static str, args: &BenchArgs, decoded: usize) -> anyhow::Result<()> {
    let opened = source::open(&args.model)?;
    let runs = Runs::new(args, &opened, decoded)?;
    let file = record_file(args.record.as_deref())?;
    let device = generation::timed_device(args.model.backend)?;
    let (slots, policy) = (args.model.slots(), args.model.policy());
    let mut session =
        opened.session_on(device.as_ref(), &args.model, slots, policy, Some(runs.context))?;
    for run in 0..runs.count {
        Sample::take(&mut session, &runs.passage(run), decoded)?;
    }
    let mut samples = Vec::with_capacity(args.runs);
    for run in 0..args.runs {
        samples.push(Sample::take(&mut session, &runs.passage(run), decoded)?);
    }
    let peak_rss_bytes = peak_rss_bytes();
    let stats = session.stats();
    let machine = Machine::new(session.describe());
    let bandwidth = device.bandwidth()?;
    let sum = Sample::sum(&samples);
    let tok_s = Summary::of(samples.iter().map(Sample::tok_s).collect());
    let bytes = weight_bytes_a_token(&opened.model);
    let weight_bytes_s = (decoded > 0).then_some(bytes as f64 * tok_s.median);
    let record = Record {
        what,
        machine,
        model: opened.model.manifest.model_id.clone(),
        quantization: opened.model.manifest.quantization.clone(),
        policy,
        experts: opened.model.experts(),
        prompt_tokens: args.prompts.prompt_tokens,
        prompts: runs.count,
        tokens: samples[0].tokens,
        runs: args.runs,
        weight_bytes_a_token: bytes,
        weight_bytes_s,
        bandwidth_share: weight_bytes_s.map(|bytes_s| bytes_s / bandwidth.copy_bytes_s),
        bandwidth,
        per_token: sum.per_token(),
        counters: sum.counters,
        pager: sum.pager,
        session: stats,
        peak_rss_bytes,
        tok_s,
    };
    let text = text(&record, &sum);
    let title = format!("{what}, {}", record.model);
    report(args.json, file, &record, &title, &record.machine, &text)
}

fn text(record: &Record, sum: &Sample) -> String {
    let mut text = format!("{}: {} tok/s   {}\n", record.what, record.tok_s, record.model);
    let Record { runs, tokens, prompts, prompt_tokens, .. } = record;
    let _ = writeln!(
        text,
        "  {runs} runs of {tokens} tokens over {prompts} prompts of {prompt_tokens}"
    );
    let per = &record.per_token;
    let _ = write!(
        text,
        "  a token: {:.1} dispatches, {:.1} submissions, {:.1} readbacks",
        per.dispatches, per.submissions, per.readbacks
    );
    if let Some(seconds) = per.device_seconds {
        let _ = write!(text, ", {:.3} ms on the device", seconds * 1e3);
    }
    text.push('\n');
    if let (Some(bytes_s), Some(share)) = (record.weight_bytes_s, record.bandwidth_share) {
        let _ = writeln!(
            text,
            "  {} of weights a token, {:.2} GB/s: {:.1} % of the {:.1} GB/s measured",
            ByteSize(record.weight_bytes_a_token),
            bytes_s / 1e9,
            share * 100.0,
            record.bandwidth.copy_bytes_s / 1e9
        );
    }
    if let Some(percent) = sum.hit_percent() {
        let hits = record.pager.hits;
        let _ = writeln!(
            text,
            "  experts: {percent:.1} % in {} slots ({}); vram {}, ram {}, disk {}, peer {}",
            record.session.slots, record.policy, hits.vram, hits.ram, hits.disk, hits.peer
        );
    }
    if let Some(bytes) = record.peak_rss_bytes {
        let _ = writeln!(text, "  peak memory {}", ByteSize(bytes));
    }
    text
}
