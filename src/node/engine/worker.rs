//! The engine's thread, which loads one model at a time and runs one job after another.
//!
//! Owns the loaded model; nothing else touches the device. A job whose listener has gone stops at
//! its next token, and so does the running one when the node stops. A failure leaves the loaded
//! model unchanged, unless the device was lost. A model that nobody asks for is dropped after
//! `keep_alive`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use doppler_infer::backend::BackendError;
use doppler_infer::engine::{Engine, LoadOptions};
use doppler_infer::error::SessionError;
use doppler_infer::sequence::Sequence;
use doppler_infer::slots::SlotBudget;
use doppler_store::ModelId;
use tokio::sync::mpsc;

use super::embedding::EmbedJob;
use super::error::EngineError;
use super::models::{Job, Opened};
use super::queue::{Queue, Taken};
use super::{EngineOptions, LoadedModel, Shown};
use crate::api::{GenerateEvent, Hits, Traffic};
use crate::generation::{self, Piece};
use crate::memory;

/// What the thread is asked for.
pub enum Work {
    Text(Job),
    Vectors(EmbedJob),
}

/// A model in memory, kept for the next request.
struct Loaded {
    model: ModelId,
    engine: Engine,
    /// The last sequence, if its request asked to keep it for the next. Any other request drops it,
    /// so it never takes room that one needs.
    kept: Option<Sequence>,
    /// Of an embedding model: the longest text, in tokens, for which it was loaded.
    embeds: Option<usize>,
}

/// The thread's own state.
pub(super) struct Worker<T> {
    options: EngineOptions,
    traffic: T,
    loaded: Option<Loaded>,
    shown: Arc<Mutex<Shown>>,
    queue: Queue<Work>,
}

impl<T: Fn() -> Traffic> Worker<T> {
    pub const fn new(
        options: EngineOptions,
        traffic: T,
        shown: Arc<Mutex<Shown>>,
        queue: Queue<Work>,
    ) -> Self {
        Self { options, traffic, loaded: None, shown, queue }
    }

    /// Runs jobs until the queue is closed.
    pub fn work(mut self) {
        loop {
            let idle = self.loaded.as_ref().and(self.options.keep_alive);
            let deadline = idle.and_then(|time| Instant::now().checked_add(time));
            let (job, events) = match self.queue.take(deadline) {
                Taken::Job(queued) => *queued,
                Taken::Nothing => {
                    self.unload();
                    continue;
                }
                Taken::Closed => return,
            };
            let done = match job {
                Work::Text(job) => self.generate(&job, &events),
                Work::Vectors(job) => {
                    let done = self.embed(&job);
                    let told = done.as_ref().map(|_| ()).map_err(EngineError::is_lost);
                    let gone = job.reply.send(done).is_err();
                    self.count(told.is_err(), gone);
                    if told == Err(true) {
                        self.unload();
                    }
                    continue;
                }
            };
            self.count(done.is_err(), done.as_ref().is_ok_and(|told| !told));
            if let Err(error) = done {
                if error.is_lost() {
                    self.unload();
                }
                let _ = events.blocking_send(GenerateEvent::of_error(&error));
            }
        }
    }

    /// Counts a request that has ended.
    fn count(&self, failed: bool, cancelled: bool) {
        self.show(|shown| {
            shown.counts.ended += 1;
            shown.counts.failed += u64::from(failed);
            shown.counts.cancelled += u64::from(cancelled && !failed);
            if let Some(loaded) = &mut shown.loaded {
                loaded.idle_since = Some(Instant::now());
            }
        });
    }

    fn unload(&mut self) {
        self.loaded = None;
        self.show(|shown| shown.loaded = None);
    }

    /// Whether whoever asked was still there when it ended.
    fn generate(
        &mut self,
        job: &Job,
        events: &mpsc::Sender<GenerateEvent>,
    ) -> Result<bool, EngineError> {
        let began = (self.traffic)();
        let request = &job.asked.request;
        let fresh = || Sequence::new(request.options.sampler, request.context);
        let kept = self.loaded.as_mut().and_then(|loaded| loaded.kept.take());
        let kept = kept.filter(|_| job.resume && self.has(job.opened.id));
        let mut sequence = kept.map_or_else(fresh, Ok)?;
        sequence.set_limit(request.context);
        if self.load(job, &sequence)? {
            // Its keys and values went with the engine that held them.
            sequence = fresh()?;
        }
        self.begin();
        let Self { loaded: Some(Loaded { engine, kept, .. }), traffic, queue, .. } = self else {
            return Ok(true);
        };
        engine.adapt(&job.adapters)?;
        if !engine.has_keys_of(&sequence) {
            // Nothing of it can be used.
            sequence.clear();
        }
        let hits_before = hits(engine);
        let traffic = |engine: &Engine| {
            let mut traffic = traffic().since(&began);
            traffic.hits = hits(engine).since(&hits_before);
            traffic
        };
        let backend = engine.describe();
        let prompt_tokens = request.prompt.len();
        let _ = events.blocking_send(GenerateEvent::Start { prompt_tokens, backend });
        let started = Instant::now();
        let done = generation::generate(
            engine,
            &mut sequence,
            &job.opened.tokenizer,
            &job.asked,
            |engine, Piece { id, text, logprobs }| {
                let (text, logprobs) = (text.to_owned(), logprobs.cloned());
                let traffic = traffic(engine);
                let token = GenerateEvent::Token { id, text, logprobs, traffic };
                events.blocking_send(token).is_ok() && !queue.is_closed()
            },
        )?;
        let traffic = traffic(engine);
        let hits = traffic.hits;
        let (generated, reused) = (done.tokens.len() as u64, done.reused as u64);
        let end = GenerateEvent::End {
            tokens: done.tokens.len(),
            text: done.text,
            rest: done.rest,
            stop: done.reason,
            stop_text: done.stop_text,
            reused: done.reused,
            seconds: started.elapsed().as_secs_f64(),
            tok_s: done.tok_s,
            clamped: done.clamped,
            traffic,
        };
        *kept = Some(sequence).filter(|_| job.resume);
        self.show(|shown| {
            let counts = &mut shown.counts;
            counts.prompt_tokens += prompt_tokens as u64;
            counts.reused_tokens += reused;
            counts.generated_tokens += generated;
            counts.hits.add(hits);
        });
        // Whoever was told how it ended may go before it is counted.
        Ok(events.blocking_send(end).is_ok())
    }

    fn has(&self, model: ModelId) -> bool {
        self.loaded.as_ref().is_some_and(|loaded| loaded.model == model)
    }

    /// Loads the job's model, with room for its sequence. The device is opened first, so that a
    /// failure to open it costs nothing. Then the previous model is dropped, because the budget is
    /// for one at a time. The same model is loaded again only if its expert slots must make room
    /// for a longer context. Returns whether anything was loaded.
    fn load(&mut self, job: &Job, sequence: &Sequence) -> Result<bool, EngineError> {
        let room = job.asked.request.room();
        if let Some(loaded) = self.loaded.as_mut().filter(|have| have.model == job.opened.id) {
            match loaded.engine.reserve(sequence, room) {
                Err(
                    SessionError::Room { .. }
                    | SessionError::Backend(BackendError::OutOfMemory { .. }),
                ) => {}
                reserved => return Ok(reserved.map(|()| false)?),
            }
        }
        let options = LoadOptions { context: Some(room), ..LoadOptions::default() };
        self.replace(&job.opened, options, None)?;
        Ok(true)
    }

    /// Loads a model in place of the one that is loaded, within the budgets.
    pub(super) fn replace(
        &mut self,
        opened: &Opened,
        options: LoadOptions,
        embeds: Option<usize>,
    ) -> Result<(), EngineError> {
        let device = generation::device_for(self.options.backend, &opened.model)?;
        // A model that the device cannot run is refused before the previous one is dropped.
        opened.model.runs_on(device.as_ref())?;
        memory::use_small_pages(false);
        self.unload();
        let options = LoadOptions {
            slots: SlotBudget::Device(self.options.vram_budget),
            host_bytes: self.options.host_budget,
            ..options
        };
        let engine = Engine::load(&opened.model, device.as_ref(), &options)?;
        let (name, backend) = (opened.model.manifest.model_id.clone(), engine.describe());
        let id = opened.id;
        self.loaded = Some(Loaded { model: id, engine, kept: None, embeds });
        self.show(|shown| {
            shown.loaded = Some(LoadedModel { id, name, idle_since: None });
            shown.backend = backend;
            shown.loads += 1;
        });
        Ok(())
    }

    /// Whether this model is loaded for texts of as many tokens.
    pub(super) fn embeds(&self, model: ModelId, longest: usize) -> bool {
        let loaded = self.loaded.as_ref().filter(|loaded| loaded.model == model);
        loaded.and_then(|loaded| loaded.embeds).is_some_and(|tokens| longest <= tokens)
    }

    /// The loaded engine, which answers from now on.
    pub(super) fn begin(&mut self) -> Option<&mut Engine> {
        self.show(|shown| {
            if let Some(loaded) = &mut shown.loaded {
                loaded.idle_since = None;
            }
        });
        self.loaded.as_mut().map(|loaded| &mut loaded.engine)
    }

    fn show(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut self.shown.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

fn hits(engine: &Engine) -> Hits {
    let hits = engine.stats().pager.hits;
    Hits { vram: hits.vram, ram: hits.ram, disk: hits.disk, peer: hits.peer }
}
