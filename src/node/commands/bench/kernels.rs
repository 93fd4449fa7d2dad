//! `bench kernels`: the kernels that read weights, at a model's shapes.

use std::fmt::Write as _;

use anyhow::ensure;
use serde::Serialize;

use super::machine::Machine;
use super::stats::Summary;
use super::{record_file, report};
use crate::args::KernelArgs;
use crate::{generation, source};
use doppler_infer::backend::Bandwidth;
use doppler_infer::kernel_bench::{Shape, Timer, shapes};

/// What `--json` prints.
#[derive(Serialize)]
struct Record {
    what: &'static str,
    machine: Machine,
    model: String,
    runs: usize,
    kernels: Vec<Kernel>,
    /// All of them together, as often as a token uses them.
    token_seconds: f64,
    bandwidth: Bandwidth,
}

#[derive(Serialize)]
struct Kernel {
    kernel: String,
    shape: String,
    /// How often a token uses it.
    count: usize,
    /// Stored bytes of the weights it reads.
    bytes: usize,
    seconds: Summary,
    bytes_s: f64,
    bandwidth_share: f64,
}

pub fn kernels(args: &KernelArgs) -> anyhow::Result<()> {
    ensure!((1..=1000).contains(&args.runs), "--runs must be 1 to 1000");
    let opened = match (&args.model, &args.arch) {
        (Some(model), _) => source::open_path(model, None)?,
        (None, arch) => source::open_arch(arch.as_deref().unwrap_or_default().parse()?)?,
    };
    let all = shapes(&opened.model);
    let wanted = |shape: &Shape| match &args.kernel {
        Some(name) => shape.name().contains(name.as_str()),
        None => true,
    };
    let chosen: Vec<(Shape, usize)> =
        all.iter().filter(|(shape, _)| wanted(shape)).copied().collect();
    let mut names: Vec<String> = all.iter().map(|(shape, _)| shape.name()).collect();
    names.sort();
    names.dedup();
    let name = args.kernel.as_deref().unwrap_or_default();
    ensure!(!chosen.is_empty(), "no kernel {name:?}; the model has {}", names.join(", "));
    let file = record_file(args.record.as_deref())?;
    let device = generation::timed_device(args.backend)?;
    let mut timers = Vec::new();
    for (shape, _) in &chosen {
        let mut timer = Timer::new(device.as_ref(), shape)?;
        timer.time()?; // unmeasured: compilation, first touch
        timers.push((timer, Vec::new()));
    }
    for _ in 0..args.runs {
        for (timer, seconds) in &mut timers {
            seconds.push(timer.time()?);
        }
    }
    let machine = Machine::new(timers[0].0.describe());
    let seconds: Vec<Vec<f64>> = timers.into_iter().map(|(_, seconds)| seconds).collect();
    let bandwidth = device.bandwidth()?;
    let kernels = chosen.iter().zip(seconds).map(|((shape, count), seconds)| {
        let seconds = Summary::of(seconds);
        let bytes_s = shape.bytes() as f64 / seconds.median.max(1e-12);
        Kernel {
            kernel: shape.name(),
            shape: shape.size(),
            count: *count,
            bytes: shape.bytes(),
            seconds,
            bytes_s,
            bandwidth_share: bytes_s / bandwidth.copy_bytes_s,
        }
    });
    let kernels: Vec<Kernel> = kernels.collect();
    let record = Record {
        what: "kernels",
        model: opened.model.manifest.model_id.clone(),
        runs: args.runs,
        token_seconds: kernels.iter().map(|k| k.count as f64 * k.seconds.median).sum(),
        kernels,
        bandwidth,
        machine,
    };
    let title = format!("kernels, {}", record.model);
    report(args.json, file, &record, &title, &record.machine, &text(&record))
}

fn text(record: &Record) -> String {
    let copy = record.bandwidth.copy_bytes_s;
    let mut text = format!(
        "kernels: {}, median of {} runs; {:.1} GB/s copied\n",
        record.model,
        record.runs,
        copy / 1e9
    );
    let (kernel, shape, each) = ("kernel", "shape", "per token");
    let _ = writeln!(
        text,
        "  {kernel:<20} {shape:<18} {each:>7} {:>10} {:>9} {:>6}",
        "us", "GB/s", "share"
    );
    for k in &record.kernels {
        let _ = writeln!(
            text,
            "  {:<20} {:<18} {:>7} {:>10.2} {:>9.2} {:>5.1}%",
            k.kernel,
            k.shape,
            k.count,
            k.seconds.median * 1e6,
            k.bytes_s / 1e9,
            k.bandwidth_share * 100.0
        );
    }
    let _ = writeln!(text, "  together {:.3} ms per token", record.token_seconds * 1e3);
    text
}
