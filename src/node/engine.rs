//! The engine's thread: one model loaded at a time, one request after another.
//!
//! Owns the session; nothing else touches the device. A request whose listener
//! has gone stops at its next token. Queue bounded: a full one is refused.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, anyhow};
use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use super::api::{GenerateEvent, GenerateRequest, Hits, Traffic};
use super::args::BackendChoice;
use super::{generation, memory};
use doppler_infer::generate::GenerateOptions;
use doppler_infer::model::Model;
use doppler_infer::reader::WeightReader;
use doppler_infer::session::{Session, SessionOptions};
use doppler_infer::slots::SlotBudget;
use doppler_infer::tokenizer::Tokenizer;
use doppler_store::manifest::Manifest;
use doppler_store::{ModelId, RangeReader};

/// Requests waiting for the one running.
const QUEUE_MAX: usize = 8;
/// Events a slow listener may lag behind before the engine waits for it.
const EVENTS_MAX: usize = 256;

/// A request with all it needs.
pub struct Job {
    pub model: ModelId,
    pub manifest: Arc<Manifest>,
    /// The bytes of tokenizer.json.
    pub tokenizer: Bytes,
    pub reader: Arc<dyn RangeReader>,
    pub runtime: Handle,
    pub request: GenerateRequest,
}

/// A job and where its events go.
type Queued = (Job, mpsc::Sender<GenerateEvent>);

/// A handle on the engine's thread.
pub struct Engine {
    queue: Mutex<Option<mpsc::Sender<Queued>>>,
    ended: Mutex<Option<oneshot::Receiver<()>>>,
    shown: Arc<Mutex<Shown>>,
}

/// What `status` shows of the engine.
#[derive(Default)]
struct Shown {
    backend: String,
    loaded: Option<String>,
}

impl Engine {
    /// `traffic` reads the mesh's counters.
    pub fn start(
        backend: BackendChoice,
        vram_budget: u64,
        host_budget: u64,
        traffic: impl Fn() -> Traffic + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (queue, jobs) = mpsc::channel(QUEUE_MAX);
        let (end, ended) = oneshot::channel();
        let shown = Arc::new(Mutex::new(Shown {
            backend: generation::describe_choice(backend).to_owned(),
            loaded: None,
        }));
        let shared = shown.clone();
        let worker =
            Worker { backend, vram_budget, host_budget, traffic, loaded: None, shown: shared };
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                worker.work(jobs);
                let _ = end.send(());
            })
            .context("cannot start the engine's thread")?;
        Ok(Self { queue: Mutex::new(Some(queue)), ended: Mutex::new(Some(ended)), shown })
    }

    /// Queues a request; its events come on the returned channel.
    pub fn submit(&self, job: Job) -> anyhow::Result<mpsc::Receiver<GenerateEvent>> {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = queue.as_ref().context("the node is stopping")?;
        queue.try_send((job, sender)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                anyhow!("{QUEUE_MAX} requests are already waiting: try again later")
            }
            mpsc::error::TrySendError::Closed(_) => anyhow!("the engine has stopped"),
        })?;
        Ok(events)
    }

    pub fn describe(&self) -> String {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).backend.clone()
    }

    /// The loaded model's name.
    pub fn loaded(&self) -> Option<String> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).loaded.clone()
    }

    /// Takes no more requests and waits for the running one's present token.
    pub async fn stop(&self) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(ended) = ended {
            let _ = ended.await;
        }
    }
}

/// A model in memory, kept for the next request.
struct Loaded {
    model: ModelId,
    tokenizer: Tokenizer,
    session: Session,
}

/// The thread's own state.
struct Worker<T> {
    backend: BackendChoice,
    vram_budget: u64,
    /// Main memory for experts that lost their slots on a GPU.
    host_budget: u64,
    traffic: T,
    loaded: Option<Loaded>,
    shown: Arc<Mutex<Shown>>,
}

impl<T: Fn() -> Traffic> Worker<T> {
    fn work(mut self, mut jobs: mpsc::Receiver<Queued>) {
        while let Some((job, events)) = jobs.blocking_recv() {
            if let Err(error) = self.generate(&job, &events) {
                // After an error the session's state is not worth trusting.
                self.loaded = None;
                let _ =
                    events.blocking_send(GenerateEvent::Error { message: super::one_line(&error) });
            }
            let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
            shown.loaded = self.loaded.as_ref().map(|_| job.manifest.model_id.clone());
            if let Some(loaded) = &self.loaded {
                shown.backend = loaded.session.describe();
            }
        }
    }

    fn generate(&mut self, job: &Job, events: &mpsc::Sender<GenerateEvent>) -> anyhow::Result<()> {
        let began = (self.traffic)();
        let request = &job.request;
        let tokenizer = Tokenizer::from_bytes(&job.tokenizer, job.manifest.eos_token_ids.clone())?;
        let prompt = generation::encode_prompt(&tokenizer, &request.prompt)?;
        let context = request.context.unwrap_or(0).max(prompt.len() + request.tokens);
        let reusable = self
            .loaded
            .take()
            .filter(|have| have.model == job.model && have.session.context() >= context);
        let mut loaded = match reusable {
            Some(loaded) => loaded,
            None => self.load(job, tokenizer, context)?,
        };
        let hits_before = hits(&loaded.session);
        let traffic = |session: &Session| {
            let mut traffic = (self.traffic)().since(&began);
            traffic.hits = hits(session).since(&hits_before);
            traffic
        };

        loaded.session.reset();
        let backend = loaded.session.describe();
        let _ = events.blocking_send(GenerateEvent::Start { prompt_tokens: prompt.len(), backend });
        let options = GenerateOptions {
            max_tokens: request.tokens,
            stop: job.manifest.eos_token_ids.clone(),
            sampler: request.sampler(),
        };
        let started = Instant::now();
        let done = generation::generate(
            &mut loaded.session,
            &loaded.tokenizer,
            &prompt,
            &options,
            |session, id, text| {
                let traffic = traffic(session);
                events
                    .blocking_send(GenerateEvent::Token { id, text: text.to_owned(), traffic })
                    .is_ok()
            },
        )?;
        let traffic = traffic(&loaded.session);
        let _ = events.blocking_send(GenerateEvent::End {
            tokens: done.tokens.len(),
            text: done.text,
            stop: done.reason,
            seconds: started.elapsed().as_secs_f64(),
            tok_s: done.tok_s,
            traffic,
        });
        self.loaded = Some(loaded);
        Ok(())
    }

    fn load(&self, job: &Job, tokenizer: Tokenizer, context: usize) -> anyhow::Result<Loaded> {
        memory::use_small_pages(false);
        let reader = WeightReader::new(job.reader.clone(), job.runtime.clone());
        let model = Model::open(Manifest::clone(&job.manifest), reader)?;
        let device = generation::device_for(self.backend, &model)?;
        let options = SessionOptions {
            context: Some(context),
            slots: SlotBudget::Device(self.vram_budget),
            host_bytes: self.host_budget,
            ..SessionOptions::default()
        };
        let session = Session::new(&model, device.as_ref(), &options)?;
        Ok(Loaded { model: job.model, tokenizer, session })
    }
}

fn hits(session: &Session) -> Hits {
    let hits = session.stats().pager.hits;
    Hits { vram: hits.vram, ram: hits.ram, disk: hits.disk, peer: hits.peer }
}
