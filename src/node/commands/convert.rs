//! `convert`: a checkpoint to an RDRR directory, or to a GGUF file.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use serde::Serialize;

use super::print_json;
use crate::args::{Container, ConvertArgs};
use crate::output::{note, outln};
use crate::progress::ConvertBar;
use crate::signals;
use crate::size::{ByteSize, count};
use doppler_infer::load::{
    Checkpoint, DirSink, Progress, Quantization, Written, convert as run_conversion, open,
    restored, to_gguf,
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
    if args.to == Container::Gguf {
        return gguf(args);
    }
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

/// What `--json` prints of a GGUF file.
#[derive(Serialize)]
struct WrittenFile<'a> {
    architecture: &'static str,
    out: &'a str,
    tensors: usize,
    bytes: u64,
    tokenizer: bool,
    seconds: f64,
}

/// Writes a GGUF file beside its place, and moves it there once it is complete.
fn gguf(args: &ConvertArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let out = &args.out;
    ensure!(!out.exists(), "{} exists: choose another output", out.display());
    let checkpoint = open(&args.source)?;
    note_restored(checkpoint.as_ref());
    let quantization = quantization(checkpoint.as_ref(), args.quantize);
    let name = out.file_name().context("--out names no file")?.to_string_lossy();
    let unfinished = out.with_file_name(format!(".{name}.partial-{}", std::process::id()));
    let failed = || format!("cannot write {}", out.display());
    // Once it has been moved there is nothing to remove.
    let _removed = Removed(unfinished.clone());
    let mut file = BufWriter::new(File::create_new(&unfinished).with_context(failed)?);
    let at_end = Removed(unfinished.clone());
    signals::remove_when_ended(unfinished.clone(), move || drop(at_end))?;
    let bar = ConvertBar::new("converting");
    let mut show = |progress: Progress<'_>| bar.show(progress);
    let written = to_gguf(checkpoint.as_ref(), quantization, &mut file, &mut show)?;
    file.into_inner()?.sync_all().with_context(failed)?;
    std::fs::rename(&unfinished, out).with_context(failed)?;
    bar.finish();
    let Written { architecture, tensors, bytes, has_tokenizer } = written;
    if args.json {
        return print_json(&WrittenFile {
            architecture,
            out: &out.to_string_lossy(),
            tensors,
            bytes,
            tokenizer: has_tokenizer,
            seconds: started.elapsed().as_secs_f64(),
        });
    }
    outln!("{} -> {}", args.source.display(), out.display());
    outln!("  {architecture}, {} in {}", ByteSize(bytes), count(tensors, "tensor"));
    if !has_tokenizer {
        outln!("  no tokenizer: {} has none, so llama.cpp cannot run it", args.source.display());
    }
    Ok(())
}

/// A file that is removed when this is dropped.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // What cannot be removed is left; the error that is being reported says more.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// How the weights are stored unless something else is asked for.
fn quantization(checkpoint: &dyn Checkpoint, asked: Option<Quantization>) -> Quantization {
    asked.unwrap_or(match checkpoint.quantization() {
        Some(_) => Quantization::Keep,
        None => Quantization::Q4KM,
    })
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
    let quantization = quantization(checkpoint, quantize);
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
