//! `pull`: a model of the Hugging Face Hub into the store; and the same for commands that run one.

use std::path::{Path, PathBuf};

use super::print_json;
use crate::args::{DataArgs, ModelArgs, PullArgs, ServeArgs};
use crate::config::data_dir;
use crate::hub::{self, Asked, Order, is_hub};
use crate::output::{note, outln};
use crate::size::ByteSize;
use doppler_infer::load::Quantization;
use doppler_store::Replicas;

pub fn pull(args: &PullArgs) -> anyhow::Result<()> {
    let data = data_dir(&args.control.data)?;
    let asked = Asked::parse(&args.model)?;
    let (quantize, replicas) = (args.quantize, args.replicas);
    let pulled = hub::pull(&Order { asked: &asked, data: &data, quantize, replicas })?;
    if args.control.json {
        return print_json(&pulled);
    }
    if pulled.present {
        outln!("{} is here already, as {} ({})", pulled.origin, pulled.name, pulled.model);
        return Ok(());
    }
    outln!("pulled {} as {}", pulled.origin, pulled.name);
    outln!("  model     {}", pulled.model);
    outln!("  commit    {}", pulled.commit);
    let cached = match pulled.cached_bytes {
        0 => String::new(),
        bytes => format!(", {} of it from the Hub's cache on this disk", ByteSize(bytes)),
    };
    let (source, bytes) = (ByteSize(pulled.source_bytes), ByteSize(pulled.bytes));
    outln!("  {source} became {bytes} in {:.1} s{cached}", pulled.seconds);
    Ok(())
}

/// If the model is one of the Hub, pulls it unless it is here, and puts its id in its place.
///
/// # Errors
/// As `pull`.
pub fn from_hub(args: &mut ModelArgs) -> anyhow::Result<()> {
    if let Some(id) = pulled(&args.model, &args.data, args.quantize)? {
        args.model = id;
    }
    Ok(())
}

/// As [`from_hub`], for `serve`.
///
/// # Errors
/// As `pull`.
pub fn serve_from_hub(args: &mut ServeArgs) -> anyhow::Result<()> {
    if let Some(model) = &args.model
        && let Some(id) = pulled(model, &args.data, None)?
    {
        args.model = Some(id);
    }
    Ok(())
}

fn pulled(
    model: &Path,
    data: &DataArgs,
    quantize: Option<Quantization>,
) -> anyhow::Result<Option<PathBuf>> {
    let Some(text) = model.to_str().filter(|text| is_hub(text)) else { return Ok(None) };
    let (asked, data) = (Asked::parse(text)?, data_dir(data)?);
    let order = Order { asked: &asked, data: &data, quantize, replicas: Replicas::DEFAULT };
    if let Some(model) = order.remembered() {
        return Ok(Some(model.to_string().into()));
    }
    let pulled = hub::pull(&order)?;
    note!("{asked} is {} in the store of {}", pulled.name, data.display());
    Ok(Some(pulled.model.into()))
}
