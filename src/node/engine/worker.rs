//! The engine's thread: one model loaded at a time, one job after another.
//!
//! Owns the session; nothing else touches the device. A job whose listener has gone stops at its
//! next token. What fails leaves the loaded model as it was, but for a lost device.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use doppler_infer::session::{Session, SessionOptions};
use doppler_infer::slots::SlotBudget;
use doppler_store::ModelId;
use tokio::sync::mpsc;

use super::error::EngineError;
use super::models::Job;
use super::queue::Queued;
use super::{EngineOptions, Shown};
use crate::api::{GenerateEvent, Hits, Traffic};
use crate::{generation, memory};

/// A model in memory, kept for the next request.
struct Loaded {
    model: ModelId,
    session: Session,
}

/// The thread's own state.
pub(super) struct Worker<T> {
    options: EngineOptions,
    traffic: T,
    loaded: Option<Loaded>,
    shown: Arc<Mutex<Shown>>,
}

impl<T: Fn() -> Traffic> Worker<T> {
    pub const fn new(options: EngineOptions, traffic: T, shown: Arc<Mutex<Shown>>) -> Self {
        Self { options, traffic, loaded: None, shown }
    }

    /// Runs jobs until the queue is closed and empty.
    pub fn work(mut self, mut jobs: mpsc::Receiver<Queued>) {
        while let Some((job, events)) = jobs.blocking_recv() {
            if let Err(error) = self.generate(&job, &events) {
                if error.is_lost() {
                    self.loaded = None;
                    self.show(|shown| shown.loaded = None);
                }
                let _ = events.blocking_send(GenerateEvent::of_error(&error));
            }
        }
    }

    fn generate(
        &mut self,
        job: &Job,
        events: &mpsc::Sender<GenerateEvent>,
    ) -> Result<(), EngineError> {
        let began = (self.traffic)();
        self.load(job)?;
        let Self { loaded: Some(loaded), traffic, .. } = self else {
            return Ok(());
        };
        let hits_before = hits(&loaded.session);
        let traffic = |session: &Session| {
            let mut traffic = traffic().since(&began);
            traffic.hits = hits(session).since(&hits_before);
            traffic
        };
        loaded.session.reset();
        let backend = loaded.session.describe();
        let prompt_tokens = job.request.prompt.len();
        let _ = events.blocking_send(GenerateEvent::Start { prompt_tokens, backend });
        let started = Instant::now();
        let done = generation::generate(
            &mut loaded.session,
            &job.opened.tokenizer,
            &job.request,
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
        Ok(())
    }

    /// Makes the job's model the loaded one. The device is opened first, so that a failure to do so
    /// costs nothing; then the one loaded before goes, since the budget is for one at a time.
    fn load(&mut self, job: &Job) -> Result<(), EngineError> {
        let context = job.request.context;
        let fits = |have: &Loaded| have.model == job.opened.id && have.session.context() >= context;
        if self.loaded.as_ref().is_some_and(fits) {
            return Ok(());
        }
        let device = generation::device(self.options.backend)?;
        memory::use_small_pages(false);
        self.loaded = None;
        self.show(|shown| shown.loaded = None);
        let options = SessionOptions {
            context: Some(context),
            slots: SlotBudget::Device(self.options.vram_budget),
            host_bytes: self.options.host_budget,
            ..SessionOptions::default()
        };
        let session = Session::new(&job.opened.model, device.as_ref(), &options)?;
        let (name, backend) = (job.opened.model.manifest.model_id.clone(), session.describe());
        self.loaded = Some(Loaded { model: job.opened.id, session });
        self.show(|shown| {
            shown.loaded = Some(name);
            shown.backend = backend;
            shown.loads += 1;
        });
        Ok(())
    }

    fn show(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut self.shown.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

fn hits(session: &Session) -> Hits {
    let hits = session.stats().pager.hits;
    Hits { vram: hits.vram, ram: hits.ram, disk: hits.disk, peer: hits.peer }
}
