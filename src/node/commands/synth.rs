//! `synth`: a model of a well-known shape with random weights, for measuring speed.

use std::time::Instant;

use serde_json::json;

use super::print_json;
use crate::args::SynthArgs;
use crate::output::outln;
use crate::progress::ConvertBar;
use crate::signals;
use crate::size::ByteSize;
use doppler_infer::load::{Arch, DirSink, Progress, Routing, SynthOptions, synth as make};

pub fn synth(args: &SynthArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let arch: Arch = args.arch.parse()?;
    let routing = args.routing.as_deref().map(str::parse::<Routing>).transpose()?;
    let options =
        SynthOptions { layers: args.layers, seed: args.seed, routing, ..SynthOptions::new(arch) };
    let mut sink = DirSink::new(&args.out)?;
    signals::remove_when_ended(sink.unfinished().to_owned(), || ())?;
    let bar = ConvertBar::new("writing");
    let mut show = |progress: Progress<'_>| bar.show(progress);
    let manifest = make(&options, &mut sink, &mut show)?;
    bar.finish();
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        return print_json(&json!({
            "model": manifest.model_id_hash().to_string(),
            "name": manifest.model_id,
            "out": args.out.to_string_lossy(),
            "shards": manifest.shards.len(),
            "tensors": manifest.tensors.len(),
            "bytes": manifest.total_size,
            "seconds": seconds,
        }));
    }
    outln!("{}: random weights -> {}", manifest.model_id, args.out.display());
    let (size, shards) = (ByteSize(manifest.total_size), manifest.shards.len());
    outln!("  {size} in {} tensors, {shards} shards, {seconds:.1} s", manifest.tensors.len());
    Ok(())
}
