//! Where a command's model comes from: an RDRR directory, another checkpoint
//! converted in memory, or the store of a data directory.

use std::path::{Component, MAIN_SEPARATOR, Path};
use std::sync::Arc;

use anyhow::{Context, bail};
use tokio::runtime::Runtime;

use super::api::ModelInfo;
use super::args::{KvChoice, ModelArgs};
use super::client::Client;
use super::commands::note_restored;
use super::config::data_dir;
use super::generation;
use super::held::{self, Held};
use super::output::note;
use super::progress::{self, ConvertBar};
use super::size::ByteSize;
use doppler_infer::backend::{Device, KvFormat};
use doppler_infer::engine::LoadOptions;
use doppler_infer::load::{
    self, Arch, Checkpoint, MemorySink, Progress, Quantization, SHARD_BYTES_DEFAULT, SynthOptions,
    convert, synth_manifest,
};
use doppler_infer::model::Model;
use doppler_infer::reader::WeightReader;
use doppler_infer::session::Session;
use doppler_infer::slots::SlotBudget;
use doppler_infer::tokenizer::Tokenizer;
use doppler_store::manifest::Manifest;
use doppler_store::{ModelId, PolicyKind, RangeReader, regular};

/// A local model that is ready for sessions.
pub struct Opened {
    pub model: Model,
    tokenizer: Option<Tokenizer>,
    /// Runs the reads. Must outlive the sessions.
    _runtime: Runtime,
}

/// What a model argument means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelArgument {
    /// A directory or a file on this disk.
    Directory,
    /// A name or an id.
    Named,
}

/// Whether `args.model` is a directory or the name of a model. Anything with a separator is a path.
/// Other text is a name, unless there is a model's directory with that name. `in_swarm` says
/// whether a swarm was asked for.
///
/// # Errors
/// If it could be both: a directory here, and a different model that the running node knows.
pub fn place(args: &ModelArgs, in_swarm: bool) -> anyhow::Result<ModelArgument> {
    let (path, text) = (args.model.as_path(), &*args.name());
    if has_separator(path) {
        return Ok(ModelArgument::Directory);
    }
    if !path.exists() {
        return Ok(ModelArgument::Named);
    }
    if in_swarm {
        note!("{text} is taken for a model of the swarm; the directory here is ./{text}");
        return Ok(ModelArgument::Named);
    }
    let known =
        running(args).and_then(|node| node.get::<Vec<ModelInfo>>("/control/v1/models").ok());
    let known = known.unwrap_or_default();
    let manifest = regular::read(&path.join("manifest.json")).map(|bytes| ModelId::of(&bytes));
    let is_model = manifest.is_ok() || path.join("config.json").is_file() || path.is_file();
    match known.iter().find(|model| model.name == text || model.id == text) {
        None => Ok(ModelArgument::Directory),
        Some(_) if !is_model => Ok(ModelArgument::Named),
        Some(model) if manifest.is_ok_and(|id| id.to_string() == model.id) => {
            Ok(ModelArgument::Directory)
        }
        Some(model) => bail!(
            "{text} is a directory here and another model of the swarm: write ./{text} for the \
             directory, or {} for the model",
            model.id
        ),
    }
}

/// Whether it can only be a path.
fn has_separator(path: &Path) -> bool {
    let parts: Vec<Component<'_>> = path.components().collect();
    !matches!(parts[..], [Component::Normal(_)])
        || path.to_string_lossy().contains(['/', MAIN_SEPARATOR])
}

/// Whether it is a path, for a node that knows no swarm: what has a separator, a file, or a model's
/// directory.
pub fn is_path(path: &Path) -> bool {
    has_separator(path)
        || path.is_file()
        || ["manifest.json", "config.json"].iter().any(|file| path.join(file).is_file())
}

/// The node that runs on the data directory, if one does.
fn running(args: &ModelArgs) -> Option<Client> {
    Client::find(&data_dir(&args.data).ok()?).ok()?
}

/// Opens the model that `args.model` means: a directory, or a model in the store at `--data`.
pub fn open(args: &ModelArgs) -> anyhow::Result<Opened> {
    match place(args, false)? {
        ModelArgument::Directory => open_path(&args.model, args.quantize),
        ModelArgument::Named => {
            let found = held::open(&data_dir(&args.data)?, &args.name());
            open_held(found.with_context(|| not_a_directory(&args.name()))?)
        }
    }
}

/// Introduces the reason why a name was not found, either.
pub fn not_a_directory(text: &str) -> String {
    format!("{text:?} is not a directory here, so it must name a model")
}

/// Opens a model of a store.
pub fn open_held(held: Held) -> anyhow::Result<Opened> {
    let Held { manifest, tokenizer, reader } = held;
    let tokenizer = tokenizer
        .map(|bytes| Tokenizer::from_bytes(&bytes, manifest.eos_token_ids.clone()))
        .transpose()?;
    opened(manifest, tokenizer, reader)
}

/// The shapes of a well-known model, without weights: reading one fails.
pub fn open_arch(arch: Arch) -> anyhow::Result<Opened> {
    opened(synth_manifest(&SynthOptions::new(arch))?, None, Arc::new(MemorySink::default()))
}

/// As `open`. Anything that is not an RDRR directory, or is requested in another type, is converted
/// in memory.
pub fn open_path(path: &Path, quantize: Option<Quantization>) -> anyhow::Result<Opened> {
    let (manifest, tokenizer, reader) = read_path(path, quantize, |_, _| {})?;
    opened(manifest, tokenizer, reader)
}

/// A model's manifest, tokenizer and weights.
type Parts = (Manifest, Option<Tokenizer>, Arc<dyn RangeReader>);

/// The parts of a model at a path, as [`open_path`] takes it. `show` is told how many of the bytes to
/// convert are done.
pub fn read_path(
    path: &Path,
    quantize: Option<Quantization>,
    show: impl FnMut(u64, u64),
) -> anyhow::Result<Parts> {
    let checkpoint = load::open(path)?;
    let (manifest, reader) = match checkpoint.manifest().filter(|_| quantize.is_none()) {
        Some(manifest) => (manifest.clone(), checkpoint.shards()?),
        None => converted(checkpoint.as_ref(), quantize, show)?,
    };
    let tokenizer = checkpoint.tokenizer()?.map(|bytes| {
        let tokenizer = Tokenizer::from_bytes(&bytes, manifest.eos_token_ids.clone());
        tokenizer.with_context(|| path.display().to_string())
    });
    Ok((manifest, tokenizer.transpose()?, reader))
}

fn converted(
    checkpoint: &dyn Checkpoint,
    quantize: Option<Quantization>,
    mut show: impl FnMut(u64, u64),
) -> anyhow::Result<(Manifest, Arc<dyn RangeReader>)> {
    let quantization = quantize.unwrap_or(Quantization::Keep);
    note_restored(checkpoint);
    let mut sink = MemorySink::default();
    let bar = ConvertBar::new("converting in memory");
    let mut each = |progress: Progress<'_>| {
        show(progress.done, progress.total);
        bar.show(progress);
    };
    let manifest = convert(checkpoint, quantization, SHARD_BYTES_DEFAULT, &mut sink, &mut each)?;
    bar.finish();
    Ok((manifest, Arc::new(sink)))
}

fn opened(
    manifest: Manifest,
    tokenizer: Option<Tokenizer>,
    reader: Arc<dyn RangeReader>,
) -> anyhow::Result<Opened> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let reader = WeightReader::new(reader, runtime.handle().clone());
    let model = Model::open(manifest, reader)?;
    Ok(Opened { model, tokenizer, _runtime: runtime })
}

impl Opened {
    pub fn tokenizer(&self) -> anyhow::Result<&Tokenizer> {
        self.tokenizer.as_ref().context("the model comes without a tokenizer.json")
    }

    /// A session on the device and with the policy named in `args`, with these slots and room for
    /// `context` tokens (`None` means the engine's default).
    pub fn session(
        &self,
        args: &ModelArgs,
        slots: SlotBudget,
        context: Option<usize>,
    ) -> anyhow::Result<Session> {
        let device = generation::device_for(args.backend, &self.model)?;
        self.session_on(device.as_ref(), args, slots, args.policy(), context)
    }

    /// As `session`, on this device and with this policy.
    pub fn session_on(
        &self,
        device: &dyn Device,
        args: &ModelArgs,
        slots: SlotBudget,
        policy: PolicyKind,
        context: Option<usize>,
    ) -> anyhow::Result<Session> {
        let kv = match args.kv.unwrap_or_default() {
            KvChoice::F16 => KvFormat::F16,
            KvChoice::F32 => KvFormat::F32,
        };
        let options = LoadOptions {
            context,
            slots,
            kv,
            policy,
            host_bytes: args.host_bytes(),
            ..LoadOptions::default()
        };
        let bytes = ByteSize(self.model.manifest.trunk_bytes());
        let loading = progress::spinner(format!("loading {bytes} of resident weights"));
        let session = Session::new(&self.model, device, &options);
        loading.finish_and_clear();
        Ok(session?)
    }
}
