//! Adapters for a model: which ones a request means, and where their bytes come from.
//!
//! An adapter is a path of this disk, or a name: one that the node knows as it knows models, or one that
//! `serve` was given. The control API takes both (`adapters`); the public APIs take names, in the
//! model's name: `BASE+ADAPTER` or `BASE+ADAPTER:WEIGHT`, also several. Opened ones are kept for the next request,
//! [`OPENED_MAX`] at most.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use super::args::AdapterArg;
use super::config::data_dir;
use super::held;
use super::resolve::resolve;
use super::service::Service;
use super::source;
use doppler_infer::adapter::{self, ADAPTERS_MAX, Adapter, AdapterError, Attached};
use doppler_store::manifest::Manifest;
use doppler_store::signature::PublicKey;
use doppler_store::{ModelId, ShardId};

/// Adapters kept open.
const OPENED_MAX: usize = 16;
/// The most bytes of an adapter that is fetched.
const BYTES_MAX: u64 = 4 << 30;

/// An adapter as a request of the control API names it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AskedAdapter {
    /// A name, an id, or an absolute path.
    pub adapter: String,
    #[serde(default = "whole")]
    pub weight: f32,
}

const fn whole() -> f32 {
    1.0
}

/// Reads `ADAPTER` or `ADAPTER:WEIGHT`.
pub fn weighed(text: &str) -> (&str, f32) {
    text.rsplit_once(':')
        .filter(|(name, _)| !name.is_empty())
        .and_then(|(name, weight)| Some((name, weight.parse().ok()?)))
        .unwrap_or((text, 1.0))
}

/// The base and the adapters of `BASE+ADAPTER[:WEIGHT]...`. `None` if the text has no such form.
fn split(text: &str) -> Option<(&str, Vec<AskedAdapter>)> {
    let mut parts = text.split('+');
    let base = parts.next().filter(|base| !base.is_empty())?;
    let adapters: Vec<AskedAdapter> = parts
        .map(|part| {
            let (adapter, weight) = weighed(part);
            AskedAdapter { adapter: adapter.to_owned(), weight }
        })
        .collect();
    let named = !adapters.is_empty() && adapters.iter().all(|asked| !asked.adapter.is_empty());
    named.then_some((base, adapters))
}

/// What a command's arguments ask a node for. Paths are made absolute, because the node may run
/// elsewhere.
///
/// # Errors
/// If the current directory is gone.
pub fn asked(args: &[AdapterArg]) -> anyhow::Result<Vec<AskedAdapter>> {
    let asked = |arg: &AdapterArg| {
        let path = Path::new(&arg.adapter);
        let adapter = match is_path(path) {
            true => std::path::absolute(path)?.to_string_lossy().into_owned(),
            false => arg.adapter.clone(),
        };
        Ok(AskedAdapter { adapter, weight: arg.weight })
    };
    args.iter().map(asked).collect()
}

/// Opens what a command's arguments mean, for a run in this process.
///
/// # Errors
/// If one is not found, or is no adapter.
pub fn open(args: &[AdapterArg], data: &super::args::DataArgs) -> anyhow::Result<Vec<Attached>> {
    let open = |arg: &AdapterArg| {
        let path = Path::new(&arg.adapter);
        let adapter = match is_path(path) {
            true => adapter::open(path)?,
            false => held::adapter(&data_dir(data)?, &arg.adapter)
                .with_context(|| source::not_a_directory(&arg.adapter))?,
        };
        Ok(Attached { adapter: Arc::new(adapter), weight: arg.weight })
    };
    let set = args.iter().map(open).collect::<anyhow::Result<Vec<_>>>()?;
    adapter::check_set(&set)?;
    Ok(set)
}

/// Whether it is a path: it has a separator, or there is an adapter of that name here.
fn is_path(path: &Path) -> bool {
    path.components().count() > 1 || path.is_absolute() || adapter::is_here(path)
}

/// Adapters that the node has open.
#[derive(Default)]
pub struct Adapters {
    /// By id, the most recently used at the end.
    opened: Mutex<Vec<(ModelId, Arc<Adapter>)>>,
    /// Those of this disk that `serve` was given.
    local: Mutex<Vec<Arc<Adapter>>>,
}

impl Adapters {
    fn get(&self, id: ModelId) -> Option<Arc<Adapter>> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let at = opened.iter().position(|(one, _)| *one == id)?;
        let found = opened.remove(at);
        opened.push(found.clone());
        Some(found.1)
    }

    fn keep(&self, id: ModelId, adapter: Arc<Adapter>) {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.retain(|(one, _)| *one != id);
        if opened.len() == OPENED_MAX {
            opened.remove(0);
        }
        opened.push((id, adapter));
    }

    fn local(&self, name: &str) -> Option<Arc<Adapter>> {
        let local = self.local.lock().unwrap_or_else(PoisonError::into_inner);
        local.iter().find(|adapter| adapter.name.eq_ignore_ascii_case(name)).cloned()
    }

    /// The names of those that `serve` was given.
    pub fn names(&self) -> Vec<String> {
        let local = self.local.lock().unwrap_or_else(PoisonError::into_inner);
        local.iter().map(|adapter| adapter.name.clone()).collect()
    }
}

impl Service {
    /// Opens an adapter of this disk, which requests then name as it names itself.
    ///
    /// # Errors
    /// If it is none.
    pub async fn add_adapter(&self, path: &Path) -> anyhow::Result<()> {
        let path = path.to_owned();
        let opened = tokio::task::spawn_blocking(move || adapter::open(&path)).await??;
        let mut local = self.adapters.local.lock().unwrap_or_else(PoisonError::into_inner);
        local.push(Arc::new(opened));
        Ok(())
    }

    /// The base and the adapters that a model's name means, if it is not the name of a model itself.
    pub(super) fn with_adapters<'a>(
        &self,
        text: &'a str,
    ) -> anyhow::Result<(&'a str, Vec<AskedAdapter>)> {
        let Some(split) = split(text) else { return Ok((text, Vec::new())) };
        let is_model = self.locals.has(text) || resolve(text, &self.candidates()?).is_ok();
        Ok(if is_model { (text, Vec::new()) } else { split })
    }

    /// Opens adapters, fetching those that are known but not here.
    ///
    /// # Errors
    /// As [`wanted`](Self::wanted), or if one is no adapter, or a weight is out of range.
    pub(super) async fn attached(
        &self,
        asked: &[AskedAdapter],
        paths: bool,
        trust: &[PublicKey],
        can_ask: bool,
    ) -> anyhow::Result<Vec<Attached>> {
        ensure!(asked.len() <= ADAPTERS_MAX, AdapterError::TooMany(asked.len()));
        let mut set = Vec::with_capacity(asked.len());
        for AskedAdapter { adapter: text, weight } in asked {
            let path = Path::new(text).to_owned();
            let adapter = if paths && path.is_absolute() {
                Arc::new(tokio::task::spawn_blocking(move || adapter::open(&path)).await??)
            } else if let Some(local) = self.adapters.local(text) {
                local
            } else {
                let (id, manifest) = self.wanted(text, trust, can_ask).await?;
                self.fetched(id, manifest).await.with_context(|| format!("adapter {text}"))?
            };
            set.push(Attached { adapter, weight: *weight });
        }
        adapter::check_set(&set)?;
        Ok(set)
    }

    /// A published adapter, with bytes from whichever tier has them.
    async fn fetched(&self, id: ModelId, manifest: Arc<Manifest>) -> anyhow::Result<Arc<Adapter>> {
        if let Some(opened) = self.adapters.get(id) {
            return Ok(opened);
        }
        // What is no adapter is not fetched.
        adapter::described(&manifest)?;
        let bytes = manifest.total_size;
        ensure!(bytes <= BYTES_MAX, "{bytes} bytes are too many for an adapter");
        let mut shards = Vec::with_capacity(manifest.shards.len());
        for shard in &manifest.shards {
            shards.push(self.whole(shard.id()?, shard.size).await?);
        }
        let open = move || {
            adapter::open_manifest(&manifest, &mut |index| Ok(shards[index as usize].to_vec()))
        };
        let opened = Arc::new(tokio::task::spawn_blocking(open).await??);
        self.adapters.keep(id, opened.clone());
        Ok(opened)
    }
}

/// The id of the model that an adapter is for. `None` for what is no adapter.
pub fn base_of(manifest: &Manifest) -> Option<String> {
    adapter::described(manifest).ok().map(|described| described.base.to_string())
}

/// Opens an adapter of a store, whose objects `read` returns.
///
/// # Errors
/// If it is none, or `read` fails.
pub fn stored(
    manifest: &Manifest,
    mut read: impl FnMut(ShardId) -> anyhow::Result<Vec<u8>>,
) -> anyhow::Result<Adapter> {
    adapter::described(manifest)?;
    let shards = manifest.shards.iter().map(|shard| read(shard.id()?));
    let shards = shards.collect::<anyhow::Result<Vec<_>>>()?;
    Ok(adapter::open_manifest(manifest, &mut |index| Ok(shards[index as usize].clone()))?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::{Duration, Instant};

    use doppler_infer::adapter::{Delta, Matrix, Naming};
    use doppler_infer::backend::LogitRows;
    use doppler_infer::cpu::CpuDevice;
    use doppler_infer::engine::LoadOptions;
    use doppler_infer::graph::{Op, WeightRole};
    use doppler_infer::session::Session;
    use doppler_store::DType;

    use super::*;
    use crate::embedded;

    /// An adapter of every product of a graph but those of routers.
    fn of_all(graph: &doppler_infer::graph::Graph, rank: usize) -> Adapter {
        let mut deltas = BTreeMap::new();
        for op in &graph.ops {
            let Op::Linear { weight, .. } = op else { continue };
            let weight = graph.weight_spec(*weight);
            if weight.role == WeightRole::Router {
                continue;
            }
            let matrix = |rows, cols| {
                let values = (0..rows * cols).map(|i| ((i * 37 + 11) % 101) as f32 / 2e3 - 0.025);
                Matrix { rows, cols, values: values.collect(), dtype: DType::F32 }
            };
            let (a, b) = (matrix(rank, weight.cols), matrix(weight.rows, rank));
            deltas.insert(weight.tensor.clone(), Delta { a, b, scale: 1.0 });
        }
        let naming = Naming::HuggingFace;
        Adapter::new("all".into(), String::new(), naming, None, deltas).unwrap()
    }

    #[test]
    fn attaching_to_the_embedded_model_takes_less_than_50_ms_and_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        embedded::extract(dir.path()).unwrap();
        let opened = source::open_path(dir.path(), None).unwrap();
        let options = LoadOptions { context: Some(64), batch: 16, ..LoadOptions::default() };
        let mut session = Session::new(&opened.model, &CpuDevice, &options).unwrap();
        let logits = |session: &mut Session| {
            session.reset();
            session.step(&[1, 5, 9, 300, 44], LogitRows::All).unwrap()
        };
        let plain = logits(&mut session);
        let adapter = Arc::new(of_all(&opened.model.graph, 16));
        let (mut attached, mut detached) = (Duration::MAX, Duration::MAX);
        // The machine may be busy with something else, but not each time.
        for _ in 0..10 {
            let begun = Instant::now();
            session.adapt(&[Attached { adapter: adapter.clone(), weight: 1.0 }]).unwrap();
            attached = attached.min(begun.elapsed());
            assert_ne!(logits(&mut session), plain);
            let begun = Instant::now();
            session.adapt(&[]).unwrap();
            detached = detached.min(begun.elapsed());
            assert_eq!(logits(&mut session), plain);
        }
        println!("attached in {attached:?}, detached in {detached:?}");
        assert!(attached.max(detached) < Duration::from_millis(50), "{attached:?}, {detached:?}");
    }

    #[test]
    fn names_and_weights_are_told_apart() {
        assert_eq!(weighed("tone"), ("tone", 1.0));
        assert_eq!(weighed("tone:0.5"), ("tone", 0.5));
        assert_eq!(weighed("a:b:-2"), ("a:b", -2.0));
        assert_eq!(weighed("a:b"), ("a:b", 1.0));
        assert_eq!(weighed(":1"), (":1", 1.0));
        let of = |adapter: &str, weight| AskedAdapter { adapter: adapter.to_owned(), weight };
        assert_eq!(split("base+tone"), Some(("base", vec![of("tone", 1.0)])));
        let two = vec![of("tone", 0.25), of("style", 1.0)];
        assert_eq!(split("base+tone:0.25+style"), Some(("base", two)));
        for plain in ["base", "+tone", "base+", "base+a+", "base+:1+"] {
            assert_eq!(split(plain), None, "{plain}");
        }
    }
}
