//! One generation that runs: its sequence, its text, and its listener.
//!
//! Never waits for the listener. A place for the last event is kept from the start, and the worker
//! gives no token to a generation whose listener has no room for it.

use std::ops::{ControlFlow, Deref};
use std::sync::Arc;
use std::time::Instant;

use doppler_infer::engine::{Engine, Next};
use doppler_infer::generate::{Generation, StopReason};
use doppler_infer::kv::BLOCK;
use doppler_infer::sequence::Sequence;
use doppler_infer::tokenizer::Tokenizer;
use tokio::sync::mpsc::{self, OwnedPermit};

use super::error::EngineError;
use super::models::{Job, Opened};
use crate::api::{GenerateEvent, Hits, Traffic};
use crate::generation::{Piece, Writing};

/// A model's tokenizer, which stays as long as somebody writes with it.
#[derive(Clone)]
struct Of(Arc<Opened>);

impl Deref for Of {
    type Target = Tokenizer;

    fn deref(&self) -> &Tokenizer {
        &self.0.tokenizer
    }
}

pub(super) struct Running {
    job: Job,
    sequence: Sequence,
    generation: Generation,
    writing: Writing<Of>,
    /// Tokens of the prompt that the sequence had.
    reused: usize,
    events: mpsc::Sender<GenerateEvent>,
    last: OwnedPermit<GenerateEvent>,
    /// The node's counters when it began.
    began: (Traffic, Hits),
    started: Instant,
}

/// What is left of a generation that has ended.
pub(super) struct Ended {
    /// Its sequence, if its request asked to keep it.
    pub kept: Option<Sequence>,
    pub prompt_tokens: u64,
    pub reused_tokens: u64,
    pub generated_tokens: u64,
    last: OwnedPermit<GenerateEvent>,
    event: GenerateEvent,
    is_gone: bool,
}

impl Ended {
    /// Tells how it ended. False if nobody listens.
    pub fn tell(self) -> bool {
        self.last.send(self.event);
        !self.is_gone
    }
}

/// The node's counters now. While several generations run, what moves belongs to all of them.
pub(super) fn traffic(engine: &Engine, traffic: Traffic, began: &(Traffic, Hits)) -> Traffic {
    let mut traffic = traffic.since(&began.0);
    traffic.hits = hits(engine).since(&began.1);
    traffic
}

pub(super) fn hits(engine: &Engine) -> Hits {
    let hits = engine.stats().pager.hits;
    Hits { vram: hits.vram, ram: hits.ram, disk: hits.disk, peer: hits.peer }
}

impl Running {
    /// Begins a job on a sequence that has its blocks, and perhaps the beginning of the prompt.
    pub fn begin(
        job: Job,
        events: mpsc::Sender<GenerateEvent>,
        engine: &Engine,
        mut sequence: Sequence,
        traffic: Traffic,
    ) -> Result<Self, EngineError> {
        let prompt = &job.asked.request.prompt;
        let reused = sequence.len().min(prompt.len());
        let rest = &prompt[reused..];
        let options = &job.asked.request.options;
        let generation = Generation::begin(engine, &mut sequence, rest, options)?;
        // A new channel has room, unless nobody listens any more.
        let last = events.clone().try_reserve_owned().map_err(|_| EngineError::Stopping)?;
        let (prompt_tokens, backend) = (prompt.len(), engine.describe());
        let _ = events.try_send(GenerateEvent::Start { prompt_tokens, backend });
        Ok(Self {
            writing: Writing::new(Of(job.opened.clone()), &job.asked),
            job,
            sequence,
            generation,
            reused,
            events,
            last,
            began: (traffic, hits(engine)),
            started: Instant::now(),
        })
    }

    /// Whether nobody listens any more.
    pub fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    /// Whether its listener lags so far behind that there is no room for another event.
    pub fn lags(&self) -> bool {
        self.events.capacity() == 0
    }

    /// Its tokens that others may go on from: none, if its request did not allow it.
    pub fn tokens(&self) -> &[u32] {
        if self.job.resume { self.sequence.tokens() } else { &[] }
    }

    /// Another sequence that begins with `count` of its tokens.
    pub fn fork(&self, count: usize) -> Sequence {
        let mut fork = self.sequence.fork();
        fork.rewind(fork.len() - count);
        fork
    }

    /// The prompt, if others' work may serve it and part of it has not run.
    pub fn shares(&self) -> Option<&[u32]> {
        let open = self.job.resume && !self.writes();
        open.then_some(&self.job.asked.request.prompt[..])
    }

    /// Goes on from another sequence, which has more of its prompt. If there is no room for it,
    /// nothing changes.
    pub fn take_over(&mut self, engine: &mut Engine, mut sequence: Sequence) -> Option<()> {
        let request = &self.job.asked.request;
        sequence.set_limit(request.context);
        engine.claim(&mut sequence, request.room()).ok()?;
        let rest = request.prompt.get(sequence.len()..)?;
        let begun = Generation::begin(engine, &mut sequence, rest, &request.options);
        self.generation = begun.ok()?;
        self.reused = sequence.len();
        self.sequence = sequence;
        Some(())
    }

    /// Goes on from blocks of the prompt, of which `at` is the first. As many as there is room for are
    /// taken. Returns how many tokens more than before need not be computed.
    pub fn restore(
        &mut self,
        engine: &mut Engine,
        at: usize,
        blocks: &[Vec<u8>],
    ) -> Result<usize, EngineError> {
        let request = &self.job.asked.request;
        let before = self.sequence.len();
        // What it had computed of the first block counts for nothing then.
        self.sequence.rewind(before - at * BLOCK);
        for (tokens, bytes) in request.prompt[at * BLOCK..].chunks_exact(BLOCK).zip(blocks) {
            if let Err(error) = engine.append_block(&mut self.sequence, tokens, bytes) {
                tracing::debug!("a block of a prompt is not used: {error}");
                break;
            }
        }
        engine.claim(&mut self.sequence, request.room())?;
        let rest = &request.prompt[self.sequence.len()..];
        self.generation = Generation::begin(engine, &mut self.sequence, rest, &request.options)?;
        self.reused = self.sequence.len();
        Ok(self.sequence.len().saturating_sub(before))
    }

    /// Whether its whole prompt has run.
    pub const fn writes(&self) -> bool {
        self.generation.prompt_left() == 0
    }

    /// Runs a chunk of the prompt. Returns how many tokens it had.
    pub fn feed(&mut self, engine: &mut Engine, most: usize) -> Result<usize, EngineError> {
        Ok(self.generation.feed(engine, &mut self.sequence, most)?)
    }

    /// The step that chooses its next token.
    pub fn step(&mut self) -> Next<'_> {
        self.generation.step(&mut self.sequence)
    }

    pub const fn chose(&mut self, token: u32) {
        self.generation.chose(token);
    }

    /// Tells the token that was chosen, unless it ends the answer. Returns why it ends, if it does.
    pub fn tell(
        &mut self,
        engine: &Engine,
        now: impl FnOnce() -> Traffic,
    ) -> Result<Option<StopReason>, EngineError> {
        let chosen = match self.generation.take(&mut self.sequence) {
            ControlFlow::Break(reason) => return Ok(Some(reason)),
            ControlFlow::Continue(chosen) => chosen,
        };
        let Piece { id, text, logprobs } = self.writing.push(&chosen)?;
        let traffic = traffic(engine, now(), &self.began);
        let told = self.events.try_send(GenerateEvent::Token { id, text, logprobs, traffic });
        if told.is_err() || self.writing.is_over() {
            return Ok(Some(StopReason::Cancelled));
        }
        Ok(self.generation.over(&self.sequence))
    }

    /// Ends it for a reason, or because it failed.
    pub fn end(
        self,
        engine: Option<&Engine>,
        why: Result<StopReason, EngineError>,
        now: Traffic,
    ) -> (Ended, Option<EngineError>) {
        let Self { job, sequence, generation, writing, reused, events, last, began, started } =
            self;
        let prompt_tokens = job.asked.request.prompt.len() as u64;
        let done = why.and_then(|reason| {
            let engine = engine.ok_or(EngineError::Stopping)?;
            let done = writing.end(generation.end(engine, reason), reused)?;
            Ok((done, traffic(engine, now, &began)))
        });
        let is_gone = events.is_closed();
        // What one that failed leaves.
        let ended = |event| Ended {
            kept: None,
            prompt_tokens: 0,
            reused_tokens: 0,
            generated_tokens: 0,
            last,
            event,
            is_gone,
        };
        let (done, traffic) = match done {
            Ok(done) => done,
            Err(error) => return (ended(GenerateEvent::of_error(&error)), Some(error)),
        };
        let tokens = done.tokens.len();
        let event = GenerateEvent::End {
            tokens,
            text: done.text,
            rest: done.rest,
            stop: done.reason,
            stop_text: done.stop_text,
            reused,
            seconds: started.elapsed().as_secs_f64(),
            tok_s: done.tok_s,
            clamped: done.clamped,
            traffic,
        };
        let kept = job.resume.then(|| {
            // Room that it had and did not use goes to others.
            let mut sequence = sequence;
            sequence.rewind(0);
            sequence
        });
        let (reused_tokens, generated_tokens) = (reused as u64, tokens as u64);
        let ended = Ended { kept, prompt_tokens, reused_tokens, generated_tokens, ..ended(event) };
        (ended, None)
    }
}
