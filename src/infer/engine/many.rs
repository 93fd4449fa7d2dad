//! Steps of several sequences, one token of each.
//!
//! Invariant: what a sequence's step gives does not depend on the sequences that share it, and one
//! that fails stays where it was and harms no other.
//!
//! A device that can runs them as the rows of one step: each weight is read once for all of them,
//! attention and recurrent states are those of each row's own sequence, and experts are paged for
//! the union of what the rows chose. Tokens are then chosen on the host.

use rayon::prelude::*;

use super::Engine;
use crate::backend::Row;
use crate::error::SessionError;
use crate::sequence::Sequence;

/// One sequence's part in a step.
#[derive(Debug)]
pub struct Next<'a> {
    pub sequence: &'a mut Sequence,
    /// Appended to the sequence.
    pub token: u32,
    /// How many tokens will be asked for, this one's choice included, if nothing ends it before.
    pub more: usize,
}

impl Next<'_> {
    fn row(&self) -> Row<'_> {
        let Self { sequence, token, .. } = self;
        let (blocks, state) = (sequence.table.indices(), sequence.state.index());
        Row { token: *token, position: sequence.len(), blocks, state }
    }
}

impl Engine {
    /// Appends a token to each of these sequences, and returns what their samplers choose next.
    pub fn next_of_each(&mut self, rows: &mut [Next<'_>]) -> Vec<Result<u32, SessionError>> {
        let most = self.backend.rows_max();
        match rows {
            [] => Vec::new(),
            [Next { sequence, token, more }] => vec![self.next(sequence, *token, *more)],
            rows if most < 2 || self.graph.embeds() => self.one_by_one(rows),
            rows => rows.chunks_mut(most).flat_map(|rows| self.together(rows)).collect(),
        }
    }

    fn one_by_one(&mut self, rows: &mut [Next<'_>]) -> Vec<Result<u32, SessionError>> {
        // Tokens queued ahead would be dropped when the next sequence steps.
        rows.iter_mut().map(|row| self.next(row.sequence, row.token, 1)).collect()
    }

    /// In one step, if all can share one.
    fn together(&mut self, rows: &mut [Next<'_>]) -> Vec<Result<u32, SessionError>> {
        let logits = match self.run_rows(rows) {
            Ok(Some(logits)) => logits,
            // What failed may concern only some of them: each runs alone, and nothing has changed.
            Ok(None) | Err(_) => return self.one_by_one(rows),
        };
        self.tell_clamped();
        let width = self.width;
        let choose = |(row, logits): (&mut Next<'_>, &[f32])| {
            if logits.iter().fold(false, |any, logit| any | !logit.is_finite()) {
                return Err(SessionError::Output { position: row.sequence.len() });
            }
            row.sequence.feed(&[row.token]);
            row.sequence.try_choose(logits)
        };
        rows.par_iter_mut().zip(logits.par_chunks_exact(width)).map(choose).collect()
    }

    /// Runs a token of each. `None`, with nothing run, if they cannot share a step.
    fn run_rows(&mut self, rows: &mut [Next<'_>]) -> Result<Option<Vec<f32>>, SessionError> {
        for Next { sequence, token, .. } in rows.iter() {
            self.check(sequence, &[*token])?;
        }
        self.land()?;
        let form =
            |this: &Self, row: &Next<'_>| this.long_form(row.sequence, row.sequence.len() + 1);
        let first = form(self, &rows[0]);
        if rows.iter().any(|row| form(self, row) != first) {
            return Ok(None);
        }
        for Next { sequence, .. } in rows.iter_mut() {
            let position = sequence.len();
            self.stretch(sequence, position, position + 1)?;
            self.recall(sequence, position)?;
            self.prepare(sequence, position, position + 1)?;
        }
        let step: Vec<Row<'_>> = rows.iter().map(Next::row).collect();
        self.backend.queue_rows(&step)?;
        self.finish(rows.len())?;
        Ok(Some(self.backend.logits()?))
    }

    /// Gives the sequence the blocks of its next positions up to `positions`, and a place for its
    /// recurrent states, so that no other takes them.
    ///
    /// # Errors
    /// If the device or its budget has no room.
    pub fn claim(&mut self, sequence: &mut Sequence, positions: usize) -> Result<(), SessionError> {
        self.reserve(sequence, positions)?;
        self.land()?;
        self.claim_state(sequence)?;
        self.give_blocks(sequence, sequence.len(), positions)
    }
}
