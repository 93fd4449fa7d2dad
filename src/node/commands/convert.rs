//! `convert`: a Hugging Face checkpoint to an RDRR directory.

use std::time::Instant;

use serde::Serialize;

use super::print_json;
use crate::args::ConvertArgs;
use crate::progress::ConvertBar;
use crate::size::ByteSize;
use doppler_infer::load::{DirSink, Progress, convert as run_conversion};

/// What `--json` prints.
#[derive(Serialize)]
struct Converted<'a> {
    model: String,
    name: &'a str,
    quantization: &'a str,
    out: &'a std::path::Path,
    shards: usize,
    tensors: usize,
    bytes: u64,
    seconds: f64,
}

pub fn convert(args: &ConvertArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut sink = DirSink::new(&args.out)?;
    let bar = ConvertBar::new("converting");
    let mut show = |progress: Progress<'_>| bar.show(progress);
    let quantization = args.quantize.into();
    let manifest =
        run_conversion(&args.hf_dir, quantization, args.shard_size.0, &mut sink, &mut show)?;
    bar.finish();
    let converted = Converted {
        model: manifest.model_id_hash().to_string(),
        name: &manifest.model_id,
        quantization: &manifest.quantization,
        out: &args.out,
        shards: manifest.shards.len(),
        tensors: manifest.tensors.len(),
        bytes: manifest.total_size,
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json {
        return print_json(&converted);
    }
    println!("{} -> {}", args.hf_dir.display(), args.out.display());
    println!("  model     {}", converted.model);
    println!(
        "  {} in {} tensors, {} shards, {:.1} s",
        ByteSize(converted.bytes),
        converted.tensors,
        converted.shards,
        converted.seconds
    );
    Ok(())
}
