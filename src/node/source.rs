//! Models named by a path: an RDRR directory, or a Hugging Face directory converted in memory.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use tokio::runtime::Runtime;

use super::args::{KvChoice, ModelArgs, Quantize};
use super::generation;
use super::progress::{self, ConvertBar};
use super::size::ByteSize;
use doppler_infer::backend::{Device, KvFormat};
use doppler_infer::load::{
    Arch, MemorySink, Progress, Quantization, SHARD_BYTES_DEFAULT, SynthOptions, convert,
    synth_manifest,
};
use doppler_infer::model::Model;
use doppler_infer::reader::WeightReader;
use doppler_infer::session::{Session, SessionOptions};
use doppler_infer::slots::SlotBudget;
use doppler_infer::tokenizer::Tokenizer;
use doppler_store::dir::{DirReader, DirShard};
use doppler_store::manifest::Manifest;
use doppler_store::{PolicyKind, RangeReader};

/// A local model, ready for sessions.
pub struct Opened {
    pub model: Model,
    tokenizer: Option<Tokenizer>,
    /// Runs the reads; must outlive the sessions.
    _runtime: Runtime,
}

/// Whether `text` names something on this disk rather than in the swarm.
pub fn is_local(text: &str) -> bool {
    Path::new(text).exists()
}

/// Opens what `args.model` names on this disk.
pub fn open(args: &ModelArgs) -> anyhow::Result<Opened> {
    open_path(&args.model, args.quantize)
}

/// The shapes of a well-known model, without any weights: reading one fails.
pub fn open_arch(arch: Arch) -> anyhow::Result<Opened> {
    opened(synth_manifest(&SynthOptions::new(arch))?, None, Arc::new(MemorySink::default()))
}

/// As `open`; `quantize` is for a Hugging Face directory.
pub fn open_path(path: &str, quantize: Option<Quantize>) -> anyhow::Result<Opened> {
    let path = Path::new(path);
    if !path.exists() {
        bail!("{}: there is no such directory", path.display());
    }
    if path.join("manifest.json").is_file() {
        return open_rdrr(path);
    }
    if path.join("config.json").is_file() {
        return open_hugging_face(path, quantize);
    }
    bail!(
        "{} is no model: it has neither manifest.json (RDRR) nor config.json (Hugging Face)",
        path.display()
    )
}

/// Opens an RDRR directory. Shards are verified when they are first read.
pub fn open_rdrr(dir: &Path) -> anyhow::Result<Opened> {
    let manifest = Manifest::read_dir(dir).with_context(|| format!("{}", dir.display()))?;
    let tokenizer = match &manifest.tokenizer {
        Some(entry) => {
            let path = dir.join(&entry.file);
            let bytes =
                std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            Some(
                Tokenizer::from_bytes(&bytes, manifest.eos_token_ids.clone())
                    .with_context(|| format!("{}", path.display()))?,
            )
        }
        None => None,
    };
    let shards = manifest.shards.iter().map(|shard| {
        Ok(DirShard { shard: shard.id()?, path: dir.join(&shard.filename), size: shard.size })
    });
    let reader = DirReader::new(shards.collect::<anyhow::Result<Vec<_>>>()?);
    opened(manifest, tokenizer, Arc::new(reader))
}

fn open_hugging_face(dir: &Path, quantize: Option<Quantize>) -> anyhow::Result<Opened> {
    let quantization = quantize.map_or(Quantization::Keep, Quantization::from);
    let mut sink = MemorySink::default();
    let bar = ConvertBar::new("converting in memory");
    let manifest = {
        let mut show = |progress: Progress<'_>| bar.show(progress);
        convert(dir, quantization, SHARD_BYTES_DEFAULT, &mut sink, &mut show)?
    };
    bar.finish();
    let path = dir.join("tokenizer.json");
    let tokenizer = match std::fs::read(&path) {
        Ok(bytes) => Some(
            Tokenizer::from_bytes(&bytes, manifest.eos_token_ids.clone())
                .with_context(|| format!("{}", path.display()))?,
        ),
        Err(_) => None,
    };
    opened(manifest, tokenizer, Arc::new(sink))
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

    /// A session on the device and with the policy that `args` name, with these slots and
    /// room for `context` tokens (the engine's default if `None`).
    pub fn session(
        &self,
        args: &ModelArgs,
        slots: SlotBudget,
        context: Option<usize>,
    ) -> anyhow::Result<Session> {
        let device = generation::device(args.backend)?;
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
        let options = SessionOptions {
            context,
            slots,
            kv,
            policy,
            host_bytes: args.host_bytes(),
            ..SessionOptions::default()
        };
        let bytes = ByteSize(self.model.manifest.trunk_bytes());
        let loading = progress::spinner(format!("loading {bytes} of resident weights"));
        let session = Session::new(&self.model, device, &options);
        loading.finish_and_clear();
        Ok(session?)
    }
}

impl From<Quantize> for Quantization {
    fn from(quantize: Quantize) -> Self {
        match quantize {
            Quantize::Q4KM => Self::Q4KM,
            Quantize::Q8_0 => Self::Q8_0,
            Quantize::Bf16 => Self::Bf16,
        }
    }
}
