//! `bench paging`: decoding with fewer slots than experts, compared with all experts resident.
//!
//! One session holds every expert; for each policy another one holds some. They alternate, prompt
//! by prompt, and the resident one runs before and after each of the others, so that other load on
//! the machine affects all of them alike. The bound is the speed that paging would reach if moving
//! the missed bytes to the device were its only cost:
//! `1 / (resident step time + missed bytes / upload bandwidth)`, with the resident step time of
//! generating.
//!
//! On a device that guesses experts, each policy has two sessions, one of which reads ahead.
//!
//! The cost of paging when nothing is missed is measured on the resident session, in pairs:
//! generating as usual, and with its pager switched off, so that uses of experts are neither
//! counted nor ordered.

use std::fmt::Write as _;

use anyhow::ensure;
use serde::Serialize;

use super::machine::{Machine, peak_rss_bytes};
use super::sample::{PerToken, Sample};
use super::stats::Summary;
use super::{Runs, record_file, report};
use crate::args::{BenchArgs, SlotCount};
use crate::{generation, source};
use doppler_infer::backend::Bandwidth;
use doppler_infer::pager::PagerStats;
use doppler_infer::session::Session;
use doppler_infer::slots::SlotBudget;
use doppler_store::PolicyKind;

/// What `--json` prints.
#[derive(Serialize)]
struct Record {
    what: &'static str,
    machine: Machine,
    model: String,
    quantization: String,
    experts: usize,
    slots: usize,
    prompt_tokens: usize,
    prompts: usize,
    /// Tokens measured in each run.
    tokens: usize,
    runs: usize,
    resident: Resident,
    paged: Vec<Paged>,
    bandwidth: Bandwidth,
    peak_rss_bytes: Option<u64>,
}

/// The session that holds all experts.
#[derive(Serialize)]
struct Resident {
    tok_s: Summary,
    hit_percent: Option<f64>,
    per_token: PerToken,
    /// Generating, several tokens ahead if the device can: with the pager, without it, and the
    /// ratio of a token's times with and without.
    generating_tok_s: Summary,
    unpaged_tok_s: Summary,
    paging_cost: Summary,
}

/// A session that pages.
#[derive(Serialize)]
struct Paged {
    policy: PolicyKind,
    /// Whether experts were guessed and read ahead.
    read_ahead: bool,
    tok_s: Summary,
    /// As a fraction of the resident runs' speed just before and after.
    of_resident: Summary,
    hit_percent: Option<f64>,
    per_token: PerToken,
    pager: PagerStats,
    bound_tok_s: Summary,
    /// As a fraction of the bound.
    of_bound: Summary,
}

/// A paging session and its runs.
struct Side {
    policy: PolicyKind,
    read_ahead: bool,
    session: Session,
    samples: Vec<Sample>,
}

// Long: one measurement, from its options to its record.
pub fn paging(
    args: &BenchArgs,
    decoded: usize,
    slots: SlotCount,
    policies: &[PolicyKind],
) -> anyhow::Result<()> {
    let opened = source::open(&args.model)?;
    let experts = opened.model.experts();
    ensure!(experts > 0, "{} has no experts to page", opened.model.manifest.model_id);
    ensure!(args.model.vram_budget.is_none(), "give --slots instead of --vram-budget");
    let runs = Runs::new(args, &opened, decoded)?;
    let file = record_file(args.record.as_deref())?;
    let device = generation::timed_device(args.model.backend)?;
    let slots = SlotBudget::Experts(slots.of(experts));
    let own = [args.model.policy()];
    let mut sides = Vec::new();
    for policy in if policies.is_empty() { &own } else { policies } {
        for read_ahead in [true, false] {
            let mut session = opened.session_on(
                device.as_ref(),
                &args.model,
                slots,
                *policy,
                Some(runs.context),
            )?;
            let guesses = session.switch_read_ahead(read_ahead);
            sides.push(Side {
                policy: *policy,
                read_ahead: read_ahead && guesses,
                session,
                samples: Vec::new(),
            });
            if !guesses {
                break;
            }
        }
    }
    let all = SlotBudget::All;
    let mut whole =
        opened.session_on(device.as_ref(), &args.model, all, own[0], Some(runs.context))?;
    for run in 0..runs.count {
        let passage = runs.passage(run);
        Sample::take(&mut whole, &passage, decoded)?;
        for side in &mut sides {
            Sample::take(&mut side.session, &passage, decoded)?;
        }
    }
    let mut resident = vec![Sample::take(&mut whole, &runs.passage(0), decoded)?];
    for run in 0..args.runs {
        let passage = runs.passage(run);
        for side in &mut sides {
            side.samples.push(Sample::take(&mut side.session, &passage, decoded)?);
            resident.push(Sample::take(&mut whole, &passage, decoded)?);
        }
    }
    let mut idle = Idle::default();
    whole.settle_all()?;
    for run in 0..args.runs {
        idle.measure(&mut whole, &runs.passage(run), decoded, run)?;
    }
    let peak_rss_bytes = peak_rss_bytes();
    let machine = Machine::new(whole.describe());
    let slots = sides[0].session.stats().slots;
    let bandwidth = device.bandwidth()?;
    let count = sides.len();
    let generating = Summary::of(idle.paged);
    let step_s = 1.0 / generating.median;
    let paged = sides.iter().enumerate().map(|(at, side)| {
        // The resident runs just before and after run r.
        let near = |run: usize| &resident[run * count + at..][..2];
        side.summary(near, step_s, bandwidth.upload_bytes_s)
    });
    let record = Record {
        what: "paging",
        model: opened.model.manifest.model_id.clone(),
        quantization: opened.model.manifest.quantization.clone(),
        experts,
        slots,
        prompt_tokens: args.prompts.prompt_tokens,
        prompts: runs.count,
        tokens: decoded,
        runs: args.runs,
        paged: paged.collect(),
        resident: Resident {
            tok_s: Summary::of(resident.iter().map(Sample::tok_s).collect()),
            hit_percent: Sample::sum(&resident).hit_percent(),
            per_token: Sample::sum(&resident).per_token(),
            generating_tok_s: generating,
            unpaged_tok_s: Summary::of(idle.unpaged),
            paging_cost: Summary::of(idle.cost),
        },
        bandwidth,
        peak_rss_bytes,
        machine,
    };
    let title = format!("paging, {}", record.model);
    report(args.json, file, &record, &title, &record.machine, &text(&record))
}

/// Measures generating with every expert in its slot, with the pager and without.
#[derive(Default)]
struct Idle {
    paged: Vec<f64>,
    unpaged: Vec<f64>,
    cost: Vec<f64>,
}

impl Idle {
    fn measure(
        &mut self,
        session: &mut Session,
        passage: &[u32],
        decoded: usize,
        run: usize,
    ) -> anyhow::Result<()> {
        let mut speed = |paged| -> anyhow::Result<f64> {
            session.switch_pager(paged);
            Ok(Sample::generate(session, passage, decoded)?.tok_s())
        };
        // The order alternates from run to run.
        let paged_first = run.is_multiple_of(2);
        let (first, second) = (speed(paged_first)?, speed(!paged_first)?);
        session.switch_pager(true);
        let (paged, unpaged) = if paged_first { (first, second) } else { (second, first) };
        self.cost.push(unpaged / paged);
        self.paged.push(paged);
        self.unpaged.push(unpaged);
        Ok(())
    }
}

impl Side {
    /// `near` gives the resident samples before and after a run; `step_s` is the time of a resident
    /// token when generating.
    fn summary<'a>(
        &self,
        near: impl Fn(usize) -> &'a [Sample],
        step_s: f64,
        upload_bytes_s: f64,
    ) -> Paged {
        let (mut of_resident, mut bounds, mut of_bound) = (Vec::new(), Vec::new(), Vec::new());
        for (run, sample) in self.samples.iter().enumerate() {
            let beside = Sample::sum(near(run));
            let missed_s = sample.per_token().missed_bytes / upload_bytes_s;
            let bound = 1.0 / (step_s + missed_s);
            of_resident.push(sample.tok_s() / beside.tok_s());
            of_bound.push(sample.tok_s() / bound);
            bounds.push(bound);
        }
        let sum = Sample::sum(&self.samples);
        Paged {
            policy: self.policy,
            read_ahead: self.read_ahead,
            tok_s: Summary::of(self.samples.iter().map(Sample::tok_s).collect()),
            of_resident: Summary::of(of_resident),
            hit_percent: sum.hit_percent(),
            per_token: sum.per_token(),
            pager: sum.pager,
            bound_tok_s: Summary::of(bounds),
            of_bound: Summary::of(of_bound),
        }
    }
}

fn text(record: &Record) -> String {
    let Record { runs, tokens, prompts, prompt_tokens, slots, experts, .. } = record;
    let mut text = format!(
        "paging: {slots} slots for {experts} experts   {}\n  \
         {runs} runs of {tokens} tokens over {prompts} prompts of {prompt_tokens}\n",
        record.model
    );
    let resident = &record.resident;
    let _ = writeln!(text, "  all resident  {} tok/s", resident.tok_s);
    let _ = writeln!(
        text,
        "    generating {} tok/s, {} without a pager: it makes a token {} times as long",
        resident.generating_tok_s, resident.unpaged_tok_s, resident.paging_cost
    );
    for side in &record.paged {
        let hits = side.pager.hits;
        let ahead = if side.read_ahead { ", read ahead" } else { "" };
        let _ = writeln!(text, "  paged by {:<4}{ahead} {} tok/s", side.policy, side.tok_s);
        let _ = writeln!(text, "    of resident {}", side.of_resident);
        let _ = writeln!(
            text,
            "    {:.1} % of experts had a slot; vram {}, ram {}, disk {}, peer {}; \
             {:.2} MB missed a token",
            side.hit_percent.unwrap_or_default(),
            hits.vram,
            hits.ram,
            hits.disk,
            hits.peer,
            side.per_token.missed_bytes / 1e6
        );
        let _ = writeln!(
            text,
            "    bound {} tok/s at {:.2} GB/s of upload; reached {}",
            side.bound_tok_s,
            record.bandwidth.upload_bytes_s / 1e9,
            side.of_bound
        );
        if side.read_ahead {
            let PagerStats { demands, hits, read_ahead, read_ahead_used, .. } = side.pager;
            let of = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
            let _ = writeln!(
                text,
                "    {:.1} % of the experts without a slot were read ahead, {:.1} % of those read ahead were asked for",
                of(read_ahead_used, demands - hits.vram),
                of(read_ahead_used, read_ahead)
            );
        }
    }
    text
}
