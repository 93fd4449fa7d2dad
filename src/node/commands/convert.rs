//! `convert`: a checkpoint to an RDRR directory.

use std::time::Instant;

use serde::Serialize;

use super::print_json;
use crate::args::ConvertArgs;
use crate::output::outln;
use crate::progress::ConvertBar;
use crate::signals;
use crate::size::ByteSize;
use doppler_infer::load::{DirSink, Progress, convert as run_conversion, open};

/// What `--json` prints.
#[derive(Serialize)]
struct Converted<'a> {
    model: String,
    name: &'a str,
    quantization: &'a str,
    out: &'a str,
    shards: usize,
    tensors: usize,
    bytes: u64,
    /// The tokenizer's file. `null` if the model has none, so that it cannot be run on text.
    tokenizer: Option<&'a str>,
    seconds: f64,
}

pub fn convert(args: &ConvertArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut sink = DirSink::new(&args.out)?;
    signals::remove_when_ended(sink.unfinished().to_owned(), || ())?;
    let bar = ConvertBar::new("converting");
    let mut show = |progress: Progress<'_>| bar.show(progress);
    let quantization = args.quantize;
    let checkpoint = open(&args.hf_dir)?;
    let shard_bytes = args.shard_size.0;
    let manifest =
        run_conversion(checkpoint.as_ref(), quantization, shard_bytes, &mut sink, &mut show)?;
    bar.finish();
    let converted = Converted {
        model: manifest.model_id_hash().to_string(),
        name: &manifest.model_id,
        quantization: &manifest.quantization,
        out: &args.out.to_string_lossy(),
        shards: manifest.shards.len(),
        tensors: manifest.tensors.len(),
        bytes: manifest.total_size,
        tokenizer: manifest.tokenizer.as_ref().map(|tokenizer| tokenizer.file.as_str()),
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json {
        return print_json(&converted);
    }
    outln!("{} -> {}", args.hf_dir.display(), args.out.display());
    outln!("  model     {}", converted.model);
    outln!(
        "  {} in {} tensors, {} shards, {:.1} s",
        ByteSize(converted.bytes),
        converted.tensors,
        converted.shards,
        converted.seconds
    );
    if converted.tokenizer.is_none() {
        let from = args.hf_dir.display();
        outln!("  no tokenizer: {from} has no tokenizer.json, so the model cannot be run on text");
    }
    Ok(())
}
