//! `bench decode` and `bench prefill`: tokens a second of one session.

use std::fmt::Write as _;

use serde::Serialize;

use super::machine::{Machine, peak_rss_bytes};
use super::sample::{PerToken, Sample, weight_bytes_a_token};
use super::stats::Summary;
use super::{Runs, record_file, report};
use crate::args::BenchArgs;
use crate::size::ByteSize;
use crate::{generation, source};
use doppler_infer::backend::{BackendError, Bandwidth, Counters};
use doppler_infer::engine::EngineStats;
use doppler_infer::error::SessionError;
use doppler_infer::pager::PagerStats;
use doppler_infer::sampler::greedy;
use doppler_infer::session::Session;
use doppler_store::PolicyKind;

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
    /// Weight bytes read a second. Only for decoding.
    weight_bytes_s: Option<f64>,
    bandwidth: Bandwidth,
    /// Weight bytes a second as a fraction of the copy bandwidth. Only for decoding.
    bandwidth_share: Option<f64>,
    per_token: PerToken,
    /// Over all measured runs.
    counters: Counters,
    pager: PagerStats,
    /// A token's kernels, the slowest first, if the device has timestamps.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernels: Option<Vec<KernelTime>>,
    /// Since the session was made.
    session: EngineStats,
    peak_rss_bytes: Option<u64>,
}

/// One kernel's part of a token.
#[derive(Serialize)]
struct KernelTime {
    kernel: &'static str,
    dispatches: usize,
    microseconds: f64,
}

/// The number of profiled tokens, of which each kernel's median counts.
const PROFILES: usize = 9;

/// Times the kernels of the first token that a run decodes. It was decoded before, so its experts
/// have slots.
fn kernel_times(session: &mut Session, prompt: &[u32]) -> anyhow::Result<Option<Vec<KernelTime>>> {
    session.reset();
    let token = greedy(&session.prefill(prompt)?);
    let mut profiles = Vec::new();
    for _ in 0..PROFILES {
        match session.profile(token) {
            Ok(profile) => profiles.push(profile),
            Err(SessionError::Backend(BackendError::Unsupported(_))) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    let mut times: Vec<KernelTime> = Vec::new();
    for (i, (kernel, _)) in profiles[0].iter().enumerate() {
        let mut seconds: Vec<f64> = profiles.iter().map(|profile| profile[i].1).collect();
        seconds.sort_by(f64::total_cmp);
        let microseconds = seconds[PROFILES / 2] * 1e6;
        match times.iter_mut().find(|time| time.kernel == *kernel) {
            Some(time) => {
                time.dispatches += 1;
                time.microseconds += microseconds;
            }
            None => times.push(KernelTime { kernel, dispatches: 1, microseconds }),
        }
    }
    times.sort_by(|a, b| b.microseconds.total_cmp(&a.microseconds));
    Ok(Some(times))
}

/// Measures `decoded` tokens per run, or the prompt if `decoded` is 0.
pub fn speed(what: &'static str, args: &BenchArgs, decoded: usize) -> anyhow::Result<()> {
    let opened = source::open(&args.model)?;
    let runs = Runs::new(args, &opened, decoded)?;
    let file = record_file(args.record.as_deref())?;
    let device = generation::timed_device(args.model.backend)?;
    let (slots, policy) = (args.model.slots(), args.model.policy());
    let mut session =
        opened.session_on(device.as_ref(), &args.model, slots, policy, Some(runs.context))?;
    for run in 0..runs.count {
        Sample::generate(&mut session, &runs.passage(run), decoded)?;
    }
    let mut samples = Vec::with_capacity(args.runs);
    for run in 0..args.runs {
        samples.push(Sample::generate(&mut session, &runs.passage(run), decoded)?);
    }
    let peak_rss_bytes = peak_rss_bytes();
    let kernels = match decoded {
        0 => None,
        _ => kernel_times(&mut session, &runs.passage(0)[..args.prompts.prompt_tokens])?,
    };
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
        kernels,
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
        "  per token: {:.1} dispatches, {:.1} submissions, {:.1} readbacks",
        per.dispatches, per.submissions, per.readbacks
    );
    if let Some(seconds) = per.device_seconds {
        let _ = write!(text, ", {:.3} ms on the device", seconds * 1e3);
    }
    text.push('\n');
    if let (Some(bytes_s), Some(share)) = (record.weight_bytes_s, record.bandwidth_share) {
        let _ = writeln!(
            text,
            "  {} of weights per token, {:.2} GB/s: {:.1} % of the {:.1} GB/s measured",
            ByteSize(record.weight_bytes_a_token),
            bytes_s / 1e9,
            share * 100.0,
            record.bandwidth.copy_bytes_s / 1e9
        );
    }
    for time in record.kernels.iter().flatten() {
        let KernelTime { kernel, dispatches, microseconds } = time;
        let each = microseconds / *dispatches as f64;
        let _ = writeln!(
            text,
            "  {microseconds:9.1} us in {dispatches:4} of {kernel} ({each:.1} us each)"
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
