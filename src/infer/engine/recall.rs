//! Recurrent states of sequences: a place for each before it steps, and states that are no longer
//! known computed again (`crate::recurrent`).
//!
//! Invariant: a step begins from a state that its sequence's tokens led to, whatever failed before.

use super::Engine;
use crate::backend::{BackendError, Fed, LogitRows, Want};
use crate::error::SessionError;
use crate::sequence::Sequence;

impl Engine {
    /// Gives the sequence a place for the recurrent state after `end` tokens, which is computed from
    /// the one after `start`.
    pub(super) fn prepare_state(
        &mut self,
        sequence: &mut Sequence,
        start: usize,
        end: usize,
    ) -> Result<(), SessionError> {
        let count = self.states.count();
        if count == 0 {
            return Ok(());
        }
        if !self.has_state_for(sequence) {
            self.grow_states()?;
        }
        let Some(copy) = sequence.state.prepare(&self.states, start, end) else {
            let what = "the recurrent states of a sequence".into();
            return Err(
                BackendError::OutOfMemory { what, bytes: self.backend.state_bytes() }.into()
            );
        };
        if let Some(copy) = copy {
            self.backend.copy_state(copy)?;
        }
        self.backend.set_state(sequence.state.index());
        Ok(())
    }

    /// Makes room for the recurrent states of another sequence.
    fn grow_states(&mut self) -> Result<(), SessionError> {
        let (held, bytes) =
            (self.loaded_bytes + self.backend.fixed_bytes(), self.backend.state_bytes());
        if held.saturating_add(bytes) > self.budget {
            return Err(SessionError::States { bytes, budget: self.budget });
        }
        let count = self.states.count() + 1;
        self.backend.grow_states(count)?;
        self.states.grow(count);
        Ok(())
    }

    /// Gives a sequence that has no place for its states one, so that no other takes it. Call when
    /// no token is in flight.
    pub(super) fn claim_state(&mut self, sequence: &mut Sequence) -> Result<(), SessionError> {
        if self.states.count() > 0 && !sequence.state.claim(&self.states) {
            self.grow_states()?;
            sequence.state.claim(&self.states);
        }
        Ok(())
    }

    /// Whether a step of this sequence needs no more room for recurrent states.
    pub(super) fn has_state_for(&self, sequence: &Sequence) -> bool {
        self.states.count() == 0 || !sequence.state.wants() || self.states.free() > 0
    }

    /// Computes the recurrent state after the sequence's first `len` tokens, unless it is known.
    /// Runs the tokens again from the longest beginning whose state is known. Call when no token is
    /// in flight.
    pub(super) fn recall(
        &mut self,
        sequence: &mut Sequence,
        len: usize,
    ) -> Result<(), SessionError> {
        if self.states.count() == 0 {
            return Ok(());
        }
        loop {
            let known = sequence.state.known(len);
            if known == len {
                return Ok(());
            }
            let end = len.min(known + self.batch);
            let again = self.run_again(sequence, known, end);
            if again.is_err() {
                sequence.state.truncate(known);
                return again;
            }
        }
    }

    /// Runs tokens `start..end` of a sequence once more.
    fn run_again(
        &mut self,
        sequence: &mut Sequence,
        start: usize,
        end: usize,
    ) -> Result<(), SessionError> {
        if end - start == 1 {
            self.make_room();
        }
        self.prepare(sequence, start, end)?;
        let tokens = &sequence.tokens()[start..end];
        self.backend.queue(Fed::Tokens(tokens), start, Want::Logits(LogitRows::None))?;
        self.finish(end - start)?;
        Ok(())
    }
}
