//! Requests for text: which model answers, and the way of a request to the engine.
//!
//! A model is one that the node knows, or one of this disk that `serve` was given. The latter has no
//! publisher and is never announced.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use anyhow::Context;
use tokio::sync::mpsc;

use super::api::{GenerateEvent, GenerateRequest, LoadedInfo, Ps};
use super::engine::{self, EngineError, Job, Lane, Opened, check_request};
use super::failures;
use super::kept;
use super::loading;
use super::opening::{Opening, Openings};
use super::service::Service;
use super::source;
use doppler_infer::adapter::{self, Attached};
use doppler_infer::embedding::Embedded;
use doppler_infer::model::{Model, ModelError};
use doppler_infer::reader::WeightReader;
use doppler_store::ModelId;
use doppler_store::manifest::Manifest;
use doppler_store::signature::PublicKey;

/// A model that may be asked.
#[derive(Clone)]
pub struct Ready {
    pub opened: Arc<Opened>,
    /// Of a model whose weights may have to come from peers.
    fetched: Option<Arc<Manifest>>,
    adapters: Vec<Attached>,
}

/// Models of this disk, by their names.
#[derive(Default)]
pub struct Locals(Mutex<Vec<Local>>, pub Openings);

struct Local {
    names: Vec<String>,
    ready: Ready,
    /// When its file was written.
    written: Option<SystemTime>,
}

impl Locals {
    fn get(&self, text: &str) -> Option<Ready> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let means = |one: &&Local| one.names.iter().any(|name| name.eq_ignore_ascii_case(text));
        all.iter().find(means).map(|one| one.ready.clone())
    }

    /// Whether one has this name.
    pub fn has(&self, text: &str) -> bool {
        self.get(text).is_some()
    }

    /// Their names and ids, and when their files were written.
    pub fn list(&self) -> Vec<(String, ModelId, Option<SystemTime>)> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = |one: &Local| {
            let opened = &one.ready.opened;
            (opened.model.manifest.model_id.clone(), opened.id, one.written)
        };
        all.iter().map(entry).collect()
    }
}

impl Service {
    /// Opens a model of this disk: a directory, or a file that is converted in memory. Returns its
    /// name.
    ///
    /// # Errors
    /// If it is no model, or comes without a tokenizer.
    pub async fn add_local(&self, path: &Path) -> anyhow::Result<String> {
        let (runtime, path) = (tokio::runtime::Handle::current(), path.to_owned());
        let parts = [path.file_name(), path.file_stem()].into_iter().flatten();
        let mut files: Vec<String> =
            parts.map(|part| part.to_string_lossy().into_owned()).collect();
        files.push(path.display().to_string());
        // It ends with this function, whatever comes of it.
        let entry = self.locals.1.begin(files.clone());
        let opening = entry.opening.clone();
        let open = move || -> anyhow::Result<_> {
            let show = |done, total| opening.show(done, total);
            let (manifest, tokenizer, reader) = source::read_path(&path, None, show)?;
            let id = manifest.model_id_hash();
            let tokenizer = tokenizer.ok_or(EngineError::NoTokenizer(id))?;
            let name = manifest.model_id.clone();
            files.extend([name.clone(), id.to_string()]);
            let written = std::fs::metadata(&path).and_then(|file| file.modified()).ok();
            let model = Model::open(manifest, WeightReader::new(reader, runtime))
                .with_context(|| path.display().to_string())?;
            let opened = Arc::new(Opened { id, model, tokenizer });
            let ready = Ready { opened, fetched: None, adapters: Vec::new() };
            Ok((name, Local { names: files, ready, written }))
        };
        let (name, local) = tokio::task::spawn_blocking(open).await??;
        self.locals.0.lock().unwrap_or_else(PoisonError::into_inner).push(local);
        Ok(name)
    }

    /// The model that `text` means, with the adapters that it names, opened.
    ///
    /// # Errors
    /// As [`wanted`](Self::wanted), or if it cannot run.
    pub async fn ready(
        &self,
        text: &str,
        trust: &[PublicKey],
        can_ask: bool,
    ) -> anyhow::Result<Ready> {
        let (base, asked) = self.with_adapters(text)?;
        let mut ready = self.base(base, trust, can_ask).await?;
        ready.adapters = self.attached(&asked, false, trust, can_ask).await?;
        Ok(ready)
    }

    async fn base(&self, text: &str, trust: &[PublicKey], can_ask: bool) -> anyhow::Result<Ready> {
        if let Some(local) = self.locals.get(text) {
            return Ok(local);
        }
        let wanted = self.wanted(text, trust, can_ask).await;
        let (model, manifest) = wanted.map_err(|error| {
            let is_unknown = failures::of(&error).label == "unknown_model";
            let not_ready = is_unknown.then(|| self.locals.1.not_ready(text)).flatten();
            not_ready.map_or(error, anyhow::Error::from)
        })?;
        let opened = self.opened(model, manifest.clone()).await?;
        Ok(Ready { opened, fetched: Some(manifest), adapters: Vec::new() })
    }

    /// Queues requests to one model, all of them or none, in one lane.
    ///
    /// # Errors
    /// A request that the model cannot do is refused before it waits for the engine.
    pub async fn submit(
        &self,
        ready: &Ready,
        lane: Lane,
        requests: Vec<GenerateRequest>,
    ) -> anyhow::Result<Vec<mpsc::Receiver<GenerateEvent>>> {
        let (opened, adapters) = (ready.opened.clone(), ready.adapters.clone());
        // Long prompts take a while to tokenize.
        let check = tokio::task::spawn_blocking(move || {
            let job = |request| Job::check(opened.clone(), adapters.clone(), request);
            requests.iter().map(job).collect::<Result<Vec<_>, _>>()
        });
        Ok(self.engine.submit(lane, check.await??)?)
    }

    /// Generates; the events arrive on the returned channel, an error as the last of them.
    ///
    /// # Errors
    /// A request that the model cannot do is refused before it waits for the engine.
    pub async fn generate(
        &self,
        request: GenerateRequest,
    ) -> anyhow::Result<mpsc::Receiver<GenerateEvent>> {
        check_request(&request)?;
        let (trust, can_ask) = (&request.trust, request.can_ask);
        let mut ready = self.ready(&request.model, trust, can_ask).await?;
        let more = self.attached(&request.adapters, true, trust, can_ask).await?;
        ready.adapters.extend(more);
        adapter::check_set(&ready.adapters)?;
        let missing = match &ready.fetched {
            Some(manifest) if request.progress => {
                loading::resident_missing(&self.disk, manifest).await
            }
            _ => 0,
        };
        let events = self.submit(&ready, Lane::own(), vec![request]).await?;
        let events = events.into_iter().next().context("the engine took no request")?;
        Ok(match missing {
            0 => events,
            missing => loading::follow(self.mesh.clone(), missing, events),
        })
    }

    /// The embeddings of texts, in order.
    ///
    /// # Errors
    /// If the model does not embed, a text is wrong, too many requests wait, or the device fails.
    pub async fn embed(
        &self,
        ready: &Ready,
        lane: Lane,
        texts: Vec<String>,
        prompt_name: Option<String>,
    ) -> anyhow::Result<Vec<Embedded>> {
        let opened = ready.opened.clone();
        let prepare = move || engine::prepare(&opened, &texts, prompt_name.as_deref());
        let prepared = tokio::task::spawn_blocking(prepare).await??;
        let (opened, adapters) = (ready.opened.clone(), ready.adapters.clone());
        Ok(self.engine.embed(lane, opened, adapters, prepared)?.wait().await?)
    }

    /// Since when this node knows a model, over restarts if it keeps the model.
    pub fn known_since(&self, model: ModelId) -> Option<SystemTime> {
        let now = self.catalog.get(model).and_then(|known| known.since);
        let kept = kept::since(&self.config().data, model);
        now.into_iter().chain(kept).min()
    }

    /// A model of this disk that is still being read.
    pub fn opening(&self) -> Option<Arc<Opening>> {
        self.locals.1.find("")
    }

    /// What the engine has loaded, and who waits.
    pub fn ps(&self) -> Ps {
        let engine = self.engine.shown();
        let loaded = engine.loaded.into_iter().map(|model| {
            let idle = model.idle_since.map(|since| since.elapsed());
            let stays = idle.zip(self.config().keep_alive);
            LoadedInfo {
                name: model.name,
                id: model.id.to_string(),
                backend: model.backend,
                bytes: model.bytes,
                idle_s: idle.map(|idle| idle.as_secs_f64()),
                unload_s: stays.map(|(idle, stay)| stay.saturating_sub(idle).as_secs_f64()),
            }
        });
        Ps { loaded: loaded.collect(), running: engine.running, waiting: self.engine.waiting() }
    }

    /// A model's graph and tokenizer, kept by the engine from one request to the next.
    async fn opened(&self, model: ModelId, manifest: Arc<Manifest>) -> anyhow::Result<Arc<Opened>> {
        if let Some(opened) = self.engine.models().get(model) {
            return Ok(opened);
        }
        if adapter::is_adapter(&manifest) {
            return Err(EngineError::Model { model, source: Box::new(ModelError::Adapter) }.into());
        }
        let tokenizer = manifest.tokenizer.as_ref();
        let (id, size) = tokenizer
            .and_then(|tokenizer| tokenizer.id.zip(tokenizer.size))
            .ok_or(EngineError::NoTokenizer(model))?;
        let tokenizer = self.whole(id, size).await?;
        let runtime = tokio::runtime::Handle::current();
        let reader = WeightReader::new(Arc::new(self.ladder.clone()), runtime);
        let models = self.engine.models().clone();
        let open = move || models.open(model, Manifest::clone(&manifest), &tokenizer, reader);
        Ok(tokio::task::spawn_blocking(open).await??)
    }
}
