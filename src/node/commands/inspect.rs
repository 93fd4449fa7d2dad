//! `inspect`: what an RDRR model, a manifest or a GGUF file contains.

use std::path::Path;

use anyhow::Context;

use super::print_json;
use crate::args::InspectArgs;
use crate::output::outln;
use doppler_infer::load::inspect::inspect as sum_up;
use doppler_infer::load::inspect_gguf;
use doppler_store::Manifest;

pub fn inspect(args: &InspectArgs) -> anyhow::Result<()> {
    let is_gguf = args.path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"));
    if is_gguf && args.path.is_file() {
        let summary = inspect_gguf(&args.path)?;
        if args.json {
            return print_json(&summary);
        }
        outln!("{}", summary.to_string().trim_end());
        return Ok(());
    }
    let manifest = read(&args.path).with_context(|| args.path.display().to_string())?;
    let summary = sum_up(&manifest);
    if args.json {
        return print_json(&summary);
    }
    outln!("{}", summary.to_string().trim_end());
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<Manifest> {
    if path.is_dir() {
        return Ok(Manifest::read_dir(path)?);
    }
    Ok(Manifest::parse(&std::fs::read(path)?)?)
}
