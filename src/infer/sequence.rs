//! A sequence as a value: its tokens, the blocks that hold their keys and values, and its sampler.
//!
//! It belongs to the engine that made it. A fork or a snapshot shares blocks; nothing is copied
//! until one of them writes. Rewinding forgets tokens, positions and draws together, so that the
//! continuation is the same as if they had never been.

use std::sync::atomic::{AtomicU64, Ordering};

use super::engine::Formed;
use super::error::SessionError;
use super::extras::{Extras, Logprobs};
use super::grammar::Progress;
use super::kv::Table;
use super::recurrent::State;
use super::sampler::{Sampler, SamplerError, SamplerOptions};

/// Numbers the sequences, so that an engine knows whose tokens are in flight.
static NEXT: AtomicU64 = AtomicU64::new(1);

fn number() -> u64 {
    // Numbers are compared only for equality.
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// One text in progress.
#[derive(Debug)]
pub struct Sequence {
    number: u64,
    /// The tokens whose keys and values the blocks hold.
    tokens: Vec<u32>,
    pub(super) table: Table,
    pub(super) state: State,
    pub(super) sampler: Sampler,
    pub(super) formed: Formed,
    /// Positions that it may use.
    limit: usize,
}

/// A sequence's state at some moment.
#[derive(Debug)]
pub struct Snapshot(Sequence);

impl Sequence {
    /// An empty sequence of at most `limit` positions.
    ///
    /// # Errors
    /// If an option is out of range.
    pub fn new(options: SamplerOptions, limit: usize) -> Result<Self, SamplerError> {
        let sampler = Sampler::new(options)?;
        Ok(Self {
            number: number(),
            tokens: Vec::new(),
            table: Table::default(),
            state: State::default(),
            sampler,
            formed: Formed::default(),
            limit,
        })
    }

    /// Identifies this sequence. Changes when it is rewound.
    pub(super) const fn number(&self) -> u64 {
        self.number
    }

    /// How many tokens were fed. The next one is at position `len`.
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

    /// Sets how many positions it may use.
    pub const fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Says how long the sequence will soon be, so that keys have the form of that length from the start
    /// where it matters. It holds until the sequence is rewound, or longer.
    pub const fn expect(&mut self, len: usize) {
        self.formed.expected = len;
    }

    /// Continues with other sampling options. What was drawn so far counts as fed.
    ///
    /// # Errors
    /// If an option is out of range.
    pub fn set_sampler(
        &mut self,
        options: SamplerOptions,
        extras: &Extras,
    ) -> Result<(), SamplerError> {
        let mut sampler = Sampler::with(options, extras.clone())?;
        self.tokens.iter().for_each(|token| sampler.accept(*token));
        self.sampler = sampler;
        self.number = number();
        Ok(())
    }

    /// Appends these tokens. If others were chosen in their place, those choices do not count.
    pub(super) fn feed(&mut self, tokens: &[u32]) {
        for token in tokens {
            self.expect_token(*token);
            self.tokens.push(*token);
        }
    }

    /// Prepares the sampler for a token that is fed next.
    fn expect_token(&mut self, token: u32) {
        if self.sampler.accepted(self.tokens.len()) != Some(token) {
            self.sampler.rewind(self.tokens.len());
            self.sampler.accept(token);
        }
    }

    /// The sampler as it chooses what follows `token`, which is fed next.
    pub(super) fn chooser(&mut self, token: u32) -> &Sampler {
        self.expect_token(token);
        self.sampler.rewind(self.tokens.len() + 1);
        &self.sampler
    }

    /// Takes back the last `count` tokens, which were not computed after all. The sampler keeps its
    /// choices.
    pub(super) fn unfeed(&mut self, count: usize) {
        self.tokens.truncate(self.tokens.len().saturating_sub(count));
        self.formed.truncate(self.tokens.len());
    }

    /// The token that the sampler chooses from the logits of the last token. The caller feeds it
    /// next.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        self.sampler.rewind(self.tokens.len());
        let token = self.sampler.sample(logits);
        self.sampler.accept(token);
        token
    }

    /// The probabilities at the last choice, if they were asked for and not yet taken.
    pub fn take_logprobs(&mut self) -> Option<Logprobs> {
        self.sampler.take_logprobs()
    }

    /// As [`Self::choose`].
    ///
    /// # Errors
    /// If the text is held to a form, and it cannot be told any more what may come next.
    pub fn try_choose(&mut self, logits: &[f32]) -> Result<u32, SessionError> {
        let token = self.choose(logits);
        match self.sampler.progress() {
            Some(Progress::Failed(why)) => Err(SessionError::Grammar(why)),
            _ => Ok(token),
        }
    }

    /// Whether the text has the form that it is held to and nothing can follow the token just chosen.
    pub fn is_complete(&self) -> bool {
        self.sampler.progress() == Some(Progress::Complete)
    }

    /// Forgets the last `count` tokens (or all, if there are fewer), with their positions and
    /// draws.
    pub fn rewind(&mut self, count: usize) {
        let keep = self.tokens.len().saturating_sub(count);
        self.tokens.truncate(keep);
        self.sampler.rewind(keep);
        self.table.truncate(keep);
        self.formed.truncate(keep);
        self.formed.expected = 0;
        self.state.truncate(keep);
        self.number = number();
    }

    /// Forgets everything but the sampling options and the limit.
    pub fn clear(&mut self) {
        self.rewind(usize::MAX);
    }

    /// Another sequence that begins with all of this one. From then on they are independent.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            number: number(),
            tokens: self.tokens.clone(),
            table: self.table.clone(),
            state: self.state.clone(),
            sampler: self.sampler.clone(),
            formed: self.formed,
            limit: self.limit,
        }
    }

    /// The current state, which can be restored later any number of times. It keeps its blocks
    /// alive.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.fork())
    }

    /// Returns to the state of a snapshot.
    pub fn restore(&mut self, snapshot: &Snapshot) {
        *self = snapshot.0.fork();
    }
}
