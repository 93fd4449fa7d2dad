//! An engine with a single sequence: for checks, measurements and local runs.

use super::adapter::Attached;
use super::backend::{Counters, Device, LogitRows};
use super::engine::{CONTEXT_DEFAULT, Engine, EngineStats, LoadOptions, Rows};
use super::error::SessionError;
use super::extras::Extras;
use super::model::Model;
use super::sampler::SamplerOptions;
use super::sequence::Sequence;
use super::trace::Trace;

/// One sequence of a model on a device. Its context is the one for which the engine was loaded.
pub struct Session {
    engine: Engine,
    sequence: Sequence,
}

impl Session {
    /// Loads the model, as [`Engine::load`] does.
    pub fn new(
        model: &Model,
        device: &dyn Device,
        options: &LoadOptions,
    ) -> Result<Self, SessionError> {
        let context =
            options.context.unwrap_or_else(|| model.graph.context_max.min(CONTEXT_DEFAULT));
        // A single sequence never needs a batch longer than its context.
        let batch = options.batch.min(context);
        let options = LoadOptions { context: Some(context), batch, ..*options };
        let engine = Engine::load(model, device, &options)?;
        Ok(Self { engine, sequence: Sequence::new(SamplerOptions::default(), context)? })
    }

    /// The engine and the sequence.
    pub const fn parts(&mut self) -> (&mut Engine, &mut Sequence) {
        (&mut self.engine, &mut self.sequence)
    }

    pub const fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Runs 1..=batch tokens at the current position and returns the requested logits,
    /// `[rows, vocab]`.
    pub fn step(&mut self, tokens: &[u32], logits: LogitRows) -> Result<Vec<f32>, SessionError> {
        let rows = Rows { sequence: &mut self.sequence, tokens, logits };
        Ok(self.engine.step(&mut [rows])?.pop().unwrap_or_default())
    }

    /// As [`Engine::next`].
    pub fn next(&mut self, token: u32, more: usize) -> Result<u32, SessionError> {
        self.engine.next(&mut self.sequence, token, more)
    }

    /// As [`Engine::prefill`].
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<Vec<f32>, SessionError> {
        self.engine.prefill(&mut self.sequence, tokens)
    }

    /// The token that the sampler chooses from the logits of the last token.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        self.sequence.choose(logits)
    }

    /// As [`Engine::profile`].
    pub fn profile(&mut self, token: u32) -> Result<Vec<(&'static str, f64)>, SessionError> {
        self.engine.profile(&mut self.sequence, token)
    }

    /// As [`Sequence::expect`].
    pub const fn expect(&mut self, len: usize) {
        self.sequence.expect(len);
    }

    /// Forgets the sequence. Experts stay resident.
    pub fn reset(&mut self) {
        self.sequence.clear();
    }

    /// Forgets the sequence, and uses other sampling options from now on.
    ///
    /// # Errors
    /// If an option is out of range.
    pub fn reset_with(&mut self, options: SamplerOptions) -> Result<(), SessionError> {
        self.sequence.clear();
        Ok(self.sequence.set_sampler(options, &Extras::default())?)
    }

    /// As [`Engine::adapt`].
    pub fn adapt(&mut self, set: &[Attached]) -> Result<(), SessionError> {
        self.engine.adapt(set)
    }

    /// As [`Engine::settle_all`].
    pub fn settle_all(&mut self) -> Result<(), SessionError> {
        self.engine.settle_all()
    }

    /// As [`Engine::switch_pager`].
    pub const fn switch_pager(&mut self, counts: bool) {
        self.engine.switch_pager(counts);
    }

    /// As [`Engine::switch_read_ahead`].
    pub fn switch_read_ahead(&mut self, ahead: bool) -> bool {
        self.engine.switch_read_ahead(ahead)
    }

    /// As [`Engine::record`].
    pub fn record(&mut self, trace: Trace) {
        self.engine.record(trace);
    }

    /// As [`Engine::take_trace`].
    pub fn take_trace(&mut self) -> Option<Trace> {
        self.engine.take_trace()
    }

    /// The number of tokens in the cache.
    pub const fn position(&self) -> usize {
        self.sequence.len()
    }

    /// Positions that the sequence may use.
    pub const fn context(&self) -> usize {
        self.sequence.limit()
    }

    /// The most tokens of a step.
    pub const fn batch(&self) -> usize {
        self.engine.batch()
    }

    pub const fn vocab(&self) -> usize {
        self.engine.vocab()
    }

    /// The device, for people.
    pub fn describe(&self) -> String {
        self.engine.describe()
    }

    /// What the device has done so far, including loading.
    pub fn counters(&self) -> Counters {
        self.engine.counters()
    }

    pub fn stats(&self) -> EngineStats {
        self.engine.stats()
    }
}
