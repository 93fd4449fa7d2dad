//! A sequence as a value: its tokens, the blocks that hold their keys and values, its sampler.
//!
//! It belongs to the engine that made it, and outlives none of its steps: a fork or a snapshot shares
//! blocks and costs no copy until one of them writes. Going back forgets tokens, positions and draws
//! together, so that what follows is what would have followed had they never been.

use std::sync::atomic::{AtomicU64, Ordering};

use super::kv::Table;
use super::sampler::{Sampler, SamplerError, SamplerOptions};

/// Numbers sequences, so that an engine knows whose tokens are in flight.
static NEXT: AtomicU64 = AtomicU64::new(1);

fn number() -> u64 {
    // Numbers are compared only for equality.
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// One text under way.
#[derive(Debug)]
pub struct Sequence {
    number: u64,
    /// Those whose keys and values the blocks hold.
    tokens: Vec<u32>,
    pub(super) table: Table,
    pub(super) sampler: Sampler,
    /// Positions that it may use.
    limit: usize,
}

/// A sequence as it was.
#[derive(Debug)]
pub struct Snapshot(Sequence);

impl Sequence {
    /// An empty one of at most `limit` positions.
    ///
    /// # Errors
    /// An option out of range.
    pub fn new(options: SamplerOptions, limit: usize) -> Result<Self, SamplerError> {
        let sampler = Sampler::new(options)?;
        Ok(Self { number: number(), tokens: Vec::new(), table: Table::default(), sampler, limit })
    }

    /// Tells it from every other, and from itself before it went back.
    pub(super) const fn number(&self) -> u64 {
        self.number
    }

    /// Tokens that were fed; the next one is at position `len`.
    pub const fn len(&self) -> usize {
        self.tokens.len()
    }

    pub const fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Positions that it may use.
    pub const fn limit(&self) -> usize {
        self.limit
    }

    /// May use so many positions from now on.
    pub const fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Goes on with other sampling options: what was drawn so far counts as fed.
    ///
    /// # Errors
    /// An option out of range.
    pub fn set_sampler(&mut self, options: SamplerOptions) -> Result<(), SamplerError> {
        let mut sampler = Sampler::new(options)?;
        self.tokens.iter().for_each(|token| sampler.accept(*token));
        self.sampler = sampler;
        self.number = number();
        Ok(())
    }

    /// These tokens are fed next. What was chosen instead of them does not count as chosen.
    pub(super) fn feed(&mut self, tokens: &[u32]) {
        for token in tokens {
            if self.sampler.accepted(self.tokens.len()) != Some(*token) {
                self.sampler.rewind(self.tokens.len());
                self.sampler.accept(*token);
            }
            self.tokens.push(*token);
        }
    }

    /// The last `count` tokens were not fed after all; what comes next may still be what it was.
    pub(super) fn unfeed(&mut self, count: usize) {
        self.tokens.truncate(self.tokens.len().saturating_sub(count));
    }

    /// The token that its sampler chooses from the logits after the last one; it is to be fed next.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        self.sampler.rewind(self.tokens.len());
        let token = self.sampler.sample(logits);
        self.sampler.accept(token);
        token
    }

    /// Forgets the last `count` tokens (all, if there are fewer), with their positions and draws.
    pub fn rewind(&mut self, count: usize) {
        let keep = self.tokens.len().saturating_sub(count);
        self.tokens.truncate(keep);
        self.sampler.rewind(keep);
        self.table.truncate(keep);
        self.number = number();
    }

    /// Forgets everything but the sampling options and the limit.
    pub fn clear(&mut self) {
        self.rewind(usize::MAX);
    }

    /// Another sequence that begins with all of this one, and goes its own way.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            number: number(),
            tokens: self.tokens.clone(),
            table: self.table.clone(),
            sampler: self.sampler.clone(),
            limit: self.limit,
        }
    }

    /// What it is now, to be restored later, as often as wanted. Its blocks are kept as long.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.fork())
    }

    /// Becomes what it was.
    pub fn restore(&mut self, snapshot: &Snapshot) {
        *self = snapshot.0.fork();
    }
}
