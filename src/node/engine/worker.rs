//! The engine's thread, which loads models and runs one model's jobs side by side, turn by turn.
//!
//! Owns the loaded models (`loading`), one of which answers; nothing else touches the device.
//! `schedule` decides whose turn it is, and `recalling` finds prompts on disk. A job whose listener has
//! gone ends before its next step, also within its prompt, and so do all when the node stops. A failure
//! ends its own job and leaves the loaded model unchanged, unless the device was lost. A model that
//! nobody asks for is dropped after `keep_alive`.

mod loading;
mod recalling;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use doppler_infer::backend::BackendError;
use doppler_infer::engine::{LoadOptions, Next};
use doppler_infer::error::SessionError;
use doppler_infer::generate::StopReason;
use doppler_infer::kv::BLOCK;
use doppler_infer::sequence::Sequence;
use tokio::sync::mpsc;

use super::embedding::EmbedJob;
use super::error::EngineError;
use super::kept::alike;
use super::models::Job;
use super::prefixes::Prefixes;
use super::queue::{Queue, Queued, Taken};
use super::running::{self, Running};
use super::schedule::{Id, Schedule};
use super::shelf::{Loaded, Shelf, due};
use super::{EngineOptions, Shown};
use crate::api::{GenerateEvent, Traffic};
use crate::generation;
use recalling::spill;

/// What the thread is asked for.
pub enum Work {
    Text(Job),
    Vectors(EmbedJob),
}

/// The thread's own state.
pub(super) struct Worker<T> {
    options: EngineOptions,
    traffic: T,
    /// Keys and values on disk.
    prefixes: Option<Prefixes>,
    /// The model that answers.
    loaded: Option<Loaded>,
    /// Other models that are loaded.
    shelf: Shelf<Loaded>,
    shown: Arc<Mutex<Shown>>,
    queue: Queue<Work>,
    schedule: Schedule,
    running: BTreeMap<Id, Running>,
    /// A job whose turn it is, and that waits until those that run have ended: it needs another
    /// model, other adapters, or more room. Nobody overtakes it.
    held: Option<Queued<Work>>,
}

/// The kept sequences' part of the device's budget: one in so many.
const KEPT_SHARE: u64 = 4;
/// A prompt changes to another generation's sequence if that has at least this many tokens more.
const CATCH_UP_MIN: usize = 16;

/// How often listeners that lag behind are looked at while nothing else is to do.
const LOOK: Duration = Duration::from_millis(20);

impl<T: Fn() -> Traffic> Worker<T> {
    pub fn new(
        options: EngineOptions,
        prefixes: Option<Prefixes>,
        traffic: T,
        shown: Arc<Mutex<Shown>>,
        queue: Queue<Work>,
    ) -> Self {
        let (schedule, running) = (Schedule::default(), BTreeMap::new());
        let (loaded, shelf) = (None, Shelf::default());
        Self {
            options,
            traffic,
            prefixes,
            loaded,
            shelf,
            shown,
            queue,
            schedule,
            running,
            held: None,
        }
    }

    /// Runs jobs until the queue is closed.
    pub fn work(mut self) {
        loop {
            if self.running.is_empty() && self.held.is_none() {
                let used = self.shelf.iter().chain(&self.loaded).map(|loaded| loaded.used);
                match self.queue.take(due(used, self.options.keep_alive)) {
                    Taken::Job(queued) => self.held = Some(*queued),
                    Taken::Nothing => {}
                    Taken::Closed => break,
                }
            }
            self.expire();
            self.admit();
            self.turn();
        }
        let all = self.shelf.drop_all().into_iter().chain(self.loaded.take());
        self.let_go(all.rev(), true);
    }

    /// Begins waiting jobs while there is room for them.
    pub fn admit(&mut self) {
        while self.schedule.has_room() && !self.queue.is_closed() {
            let Some(queued) = self.held.take().or_else(|| self.queue.next()) else { break };
            if queued.1.is_closed() {
                continue;
            }
            self.held = self.begin(queued);
            if self.held.is_some() {
                break;
            }
        }
        let (running, held) = (self.running.len(), self.held.is_some());
        self.show(|shown| (shown.running, shown.held) = (running, held));
    }

    /// Begins a job. Returns it if it must wait until those that run have ended.
    fn begin(&mut self, (job, events): Queued<Work>) -> Option<Queued<Work>> {
        match job {
            Work::Vectors(job) if !self.running.is_empty() => {
                return Some((Work::Vectors(job), events));
            }
            Work::Vectors(job) => {
                let done = self.embed(&job);
                let told = done.as_ref().map(|_| ()).map_err(EngineError::is_lost);
                let gone = job.reply.send(done).is_err();
                self.count(told.is_err(), gone);
                if told == Err(true) {
                    self.unload();
                }
            }
            Work::Text(job) => match self.sequence(&job) {
                Ok(None) => return Some((Work::Text(job), events)),
                Ok(Some((sequence, began))) => self.run(job, events, sequence, began),
                Err(error) => {
                    let _ = events.try_send(GenerateEvent::of_error(&error));
                    self.failed(&error);
                }
            },
        }
        None
    }

    fn run(
        &mut self,
        job: Job,
        events: mpsc::Sender<GenerateEvent>,
        sequence: Sequence,
        began: Traffic,
    ) {
        let Some(engine) = self.answers() else { return };
        let listener = events.clone();
        match Running::begin(job, events, engine, sequence, began) {
            Ok(running) => {
                let id = self.schedule.begin();
                self.running.insert(id, running);
            }
            Err(error) => {
                let _ = listener.try_send(GenerateEvent::of_error(&error));
                self.failed(&error);
            }
        }
    }

    /// Gives those whose turn it is a token or a part of their prompt. Ends those that are to end.
    pub fn turn(&mut self) {
        let closed = self.queue.is_closed();
        let gone = self.running.iter().filter(|(_, one)| closed || one.is_gone());
        for id in gone.map(|(id, _)| *id).collect::<Vec<Id>>() {
            self.end(id, Ok(StopReason::Cancelled));
        }
        if closed && let Some((_, events)) = self.held.take() {
            let _ = events.try_send(GenerateEvent::of_error(&EngineError::Stopping));
        }
        self.running.iter().for_each(|(id, one)| self.schedule.pause(*id, one.lags()));
        let turn = self.schedule.turn();
        if turn.is_empty() && !self.running.is_empty() {
            self.queue.doze(LOOK);
        }
        if !turn.tokens.is_empty() {
            self.tokens(&turn.tokens, turn.prompt.is_some());
        }
        if let Some((id, most)) = turn.prompt {
            self.prompt(id, most);
        }
    }

    /// The next token of each of these. If a prompt runs after them, nothing is queued ahead, since it
    /// would be dropped.
    fn tokens(&mut self, ids: &[Id], prompt: bool) {
        let Some(loaded) = &mut self.loaded else { return };
        let turns = self.running.iter_mut().filter(|(id, _)| ids.contains(id));
        let (ids, mut steps): (Vec<Id>, Vec<Next<'_>>) =
            turns.map(|(id, running)| (*id, running.step())).unzip();
        if prompt {
            steps.iter_mut().for_each(|step| step.more = 1);
        }
        let chosen = loaded.engine.next_of_each(&mut steps);
        for (id, chosen) in ids.into_iter().zip(chosen) {
            match chosen {
                Ok(token) => {
                    if let Some(running) = self.running.get_mut(&id) {
                        running.chose(token);
                    }
                    self.tell(id);
                }
                // What nobody needs now gives its room up first: it goes on in its next turn.
                Err(error) if is_room(&error) && self.makes_room() => {}
                Err(error) if is_room(&error) && self.running.len() > 1 => {
                    if let Some(ends) = self.schedule.starve(id) {
                        self.end(ends, Err(error.into()));
                    }
                }
                Err(error) => self.end(id, Err(error.into())),
            }
        }
    }

    /// Drops a kept sequence or, if there is none, another model. False if there is neither.
    fn makes_room(&mut self) -> bool {
        let Some(loaded) = &mut self.loaded else { return false };
        match loaded.kept.drop_one() {
            None => self.drops_a_model(),
            Some(kept) => {
                spill(self.prefixes.as_ref(), loaded, &[kept], false);
                true
            }
        }
    }

    /// A part of a prompt.
    fn prompt(&mut self, id: Id, most: usize) {
        // The step before may have ended it.
        self.catch_up(id);
        if self.restore(id) {
            return;
        }
        let (Some(loaded), Some(running)) = (&mut self.loaded, self.running.get_mut(&id)) else {
            return;
        };
        let started = Instant::now();
        match running.feed(&mut loaded.engine, most) {
            Ok(tokens) => {
                let writes = running.writes();
                self.schedule.fed(id, tokens, started.elapsed().as_secs_f64(), !writes);
                if writes {
                    self.tell(id);
                }
            }
            Err(error) => self.end(id, Err(error)),
        }
    }

    /// Lets a prompt go on from another generation that began in the same way and has come further:
    /// what several have in common is computed by one of them.
    fn catch_up(&mut self, id: Id) {
        let Some(loaded) = self.loaded.as_mut().filter(|loaded| loaded.engine.goes_back()) else {
            return;
        };
        let Some(mine) = self.running.get(&id) else { return };
        let Some(prompt) = mine.shares() else { return };
        let others = self.running.iter().filter(|(other, _)| **other != id);
        let ahead = others.map(|(_, other)| (alike(other.tokens(), prompt), other));
        let Some((count, other)) = ahead.max_by_key(|(count, _)| *count) else { return };
        if count < mine.tokens().len() + CATCH_UP_MIN {
            return;
        }
        let fork = other.fork(count);
        if let Some(running) = self.running.get_mut(&id) {
            running.take_over(&mut loaded.engine, fork);
        }
    }

    /// Tells a generation's listener the token that was chosen.
    fn tell(&mut self, id: Id) {
        let (Some(loaded), Some(running)) = (&self.loaded, self.running.get_mut(&id)) else {
            return;
        };
        match running.tell(&loaded.engine, &self.traffic) {
            Ok(None) => {}
            Ok(Some(reason)) => self.end(id, Ok(reason)),
            Err(error) => self.end(id, Err(error)),
        }
    }

    /// Ends a generation, and with a lost device all of them.
    fn end(&mut self, id: Id, why: Result<StopReason, EngineError>) {
        let Some(running) = self.running.remove(&id) else { return };
        self.schedule.end(id);
        let now = (self.traffic)();
        let engine = self.loaded.as_ref().map(|loaded| &loaded.engine);
        let (mut ended, error) = running.end(engine, why, now);
        let budget = self.options.vram_budget;
        let hits = self.loaded.as_mut().map(|loaded| {
            if let Some(sequence) = ended.kept.take() {
                let most = budget / KEPT_SHARE / loaded.engine.block_bytes().max(1);
                let gone = loaded.kept.keep(sequence, most as usize * BLOCK);
                spill(self.prefixes.as_ref(), loaded, &gone, false);
            }
            let now = running::hits(&loaded.engine);
            now.since(&std::mem::replace(&mut loaded.counted, now))
        });
        let running = self.running.len();
        self.show(|shown| {
            shown.running = running;
            let counts = &mut shown.counts;
            counts.prompt_tokens += ended.prompt_tokens;
            counts.reused_tokens += ended.reused_tokens;
            counts.generated_tokens += ended.generated_tokens;
            counts.hits.add(hits.unwrap_or_default());
        });
        // Whoever was told how it ended may go before it is counted.
        let told = ended.tell();
        match error {
            None => self.count(false, !told),
            Some(error) => self.failed(&error),
        }
    }

    /// Counts a request that has failed. A lost device fails all that run on it.
    fn failed(&mut self, error: &EngineError) {
        self.count(true, false);
        if !error.is_lost() {
            return;
        }
        let others: Vec<Id> = self.running.keys().copied().collect();
        for (id, message) in others.into_iter().map(|id| (id, error.to_string())) {
            let Some(running) = self.running.remove(&id) else { continue };
            self.schedule.end(id);
            let lost = EngineError::Device(BackendError::Lost(message));
            running.end(None, Err(lost), (self.traffic)()).0.tell();
            self.count(true, false);
        }
        self.unload();
    }

    /// Counts a request that has ended.
    fn count(&mut self, failed: bool, cancelled: bool) {
        self.show(|shown| {
            shown.counts.ended += 1;
            shown.counts.failed += u64::from(failed);
            shown.counts.cancelled += u64::from(cancelled && !failed);
        });
        if let Some(loaded) = &mut self.loaded {
            loaded.used = Instant::now();
        }
        if self.running.is_empty() {
            self.show_loaded(false);
        }
    }

    /// A sequence for a job, with room on the engine, and the node's counters before anything was
    /// loaded for it. `None` if the job must wait for those that run: it needs another model or
    /// other adapters, or there is no room beside them.
    ///
    /// The same model is loaded again only if its expert slots must make room for a longer context.
    fn sequence(&mut self, job: &Job) -> Result<Option<(Sequence, Traffic)>, EngineError> {
        let (alone, began) = (self.running.is_empty(), (self.traffic)());
        let request = &job.asked.request;
        let (model, room) = (job.opened.id, request.room());
        if !alone && !self.has(model, &job.adapters) {
            return Ok(None);
        }
        self.switch(model);
        let fresh = || Sequence::new(request.options.sampler, request.context);
        if let Some(Loaded { engine, kept, .. }) = &mut self.loaded {
            engine.adapt(&job.adapters)?;
            let whole = !engine.goes_back();
            let known = kept.longest(&request.prompt, whole);
            let known = known.filter(|known| job.resume && engine.has_keys_of(known));
            let mut sequence = known.map_or_else(fresh, |known| Ok(known.fork()))?;
            sequence.set_limit(request.context);
            generation::resume(&mut sequence, &request.prompt);
            while let Some(loaded) = &mut self.loaded {
                match loaded.engine.claim(&mut sequence, room) {
                    Ok(()) => return Ok(Some((sequence, began))),
                    // Room that nobody needs now goes first.
                    Err(error) if is_room(&error) && self.makes_room() => {}
                    Err(error) if is_room(&error) && !alone => return Ok(None),
                    Err(error) if is_room(&error) => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        let options = LoadOptions { context: Some(room), ..LoadOptions::default() };
        self.load(&job.opened, options, None)?;
        // Its keys and values went with the engine that held them.
        let mut sequence = fresh()?;
        if let Some(loaded) = &mut self.loaded {
            loaded.engine.adapt(&job.adapters)?;
            loaded.engine.claim(&mut sequence, room)?;
        }
        Ok(Some((sequence, began)))
    }

    fn show(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut self.shown.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Whether a step failed for want of room, which others may make when they end.
const fn is_room(error: &SessionError) -> bool {
    matches!(
        error,
        SessionError::Room { .. }
            | SessionError::States { .. }
            | SessionError::Backend(BackendError::OutOfMemory { .. })
    )
}
