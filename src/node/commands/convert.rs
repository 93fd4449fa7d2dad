//! `convert`: a checkpoint to an RDRR directory.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::print_json;
use crate::args::ConvertArgs;
use crate::output::{note, outln};
use crate::progress::ConvertBar;
use crate::signals;
use crate::size::{ByteSize, count};
use doppler_infer::load::{
    Checkpoint, DirSink, Progress, Quantization, convert as run_conversion, open, restored,
};
use doppler_store::Manifest;

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
    let manifest = into_dir(&args.source, &args.out, args.quantize, args.shard_size)?;
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
    outln!("{} -> {}", args.source.display(), args.out.display());
    outln!("  model     {}", converted.model);
    outln!(
        "  {} in {} tensors, {} shards, {:.1} s",
        ByteSize(converted.bytes),
        converted.tensors,
        converted.shards,
        converted.seconds
    );
    if converted.tokenizer.is_none() {
        let from = args.source.display();
        outln!("  no tokenizer: {from} has none, so the model cannot be run on text");
    }
    Ok(())
}

/// Converts a checkpoint into a directory, which is removed if a signal ends the process meanwhile.
pub fn into_dir(
    source: &Path,
    out: &Path,
    quantize: Option<Quantization>,
    shard_size: ByteSize,
) -> anyhow::Result<Manifest> {
    let mut sink = DirSink::new(out)?;
    signals::remove_when_ended(sink.unfinished().to_owned(), || ())?;
    let bar = ConvertBar::new("converting");
    let mut show = |progress: Progress<'_>| bar.show(progress);
    let checkpoint = open(source)?;
    let checkpoint = checkpoint.as_ref();
    note_restored(checkpoint);
    let quantization = quantize.unwrap_or(match checkpoint.quantization() {
        Some(_) => Quantization::Keep,
        None => Quantization::Q4KM,
    });
    let manifest = run_conversion(checkpoint, quantization, shard_size.0, &mut sink, &mut show)?;
    bar.finish();
    Ok(manifest)
}

/// Says which types of a checkpoint are held as another type.
pub fn note_restored(checkpoint: &dyn Checkpoint) {
    for found in restored(checkpoint) {
        let dtype = found.dtype;
        let bits = 8.0 * dtype.block_bytes() as f64 / dtype.block_len() as f64;
        note!(
            "{} of {} held as {dtype}, which takes {bits} bits per weight and loses nothing",
            count(found.tensors, "tensor"),
            found.what,
        );
    }
}
