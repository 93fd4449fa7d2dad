//! Steps of several sequences, one token of each.
//!
//! Invariant: what a sequence's step gives does not depend on the sequences that share it, and one
//! that fails stays where it was and harms no other.
//!
//! A device that can runs them as the rows of one step: each weight is read once for all of them,
//! attention and recurrent states are those of each row's own sequence, and experts are paged for
//! the union of what the rows chose. Tokens are chosen on the device if it can choose as all of the
//! samplers do, and then a second step of the same rows may be queued behind the first; otherwise on
//! the host.

use rayon::prelude::*;

use super::Engine;
use crate::backend::{LogitRows, Row, Taken, Want};
use crate::error::SessionError;
use crate::odds::REFUSED;
use crate::sampler::Sampler;
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
            rows => {
                let steps = rows.len().div_ceil(most);
                if steps > 1 {
                    // What is queued ahead would be dropped when the others step.
                    rows.iter_mut().for_each(|row| row.more = 1);
                }
                let each = rows.len().div_ceil(steps);
                rows.chunks_mut(each).flat_map(|rows| self.together(rows)).collect()
            }
        }
    }

    fn one_by_one(&mut self, rows: &mut [Next<'_>]) -> Vec<Result<u32, SessionError>> {
        // Tokens queued ahead would be dropped when the next sequence steps.
        rows.iter_mut().map(|row| self.next(row.sequence, row.token, 1)).collect()
    }

    /// In one step, if all can share one.
    fn together(&mut self, rows: &mut [Next<'_>]) -> Vec<Result<u32, SessionError>> {
        // What failed may concern only some of them: each runs alone, and nothing has changed.
        match self.chosen_together(rows) {
            Ok(Some(chosen)) => return chosen,
            Ok(None) => {}
            Err(_) => return self.one_by_one(rows),
        }
        let logits = match self.run_rows(rows) {
            Ok(Some(logits)) => logits,
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

    /// Runs a token of each, and returns what the device chose. `None`, with nothing run, if they
    /// cannot share a step or the device does not choose as they do.
    fn chosen_together(
        &mut self,
        rows: &mut [Next<'_>],
    ) -> Result<Option<Vec<Result<u32, SessionError>>>, SessionError> {
        for Next { sequence, token, .. } in rows.iter() {
            self.check(sequence, &[*token])?;
        }
        let numbers: Vec<u64> = rows.iter().map(|row| row.sequence.number()).collect();
        let tokens: Vec<u32> = rows.iter().map(|row| row.token).collect();
        if !self.flight.is(&numbers, &tokens) {
            self.land()?;
        }
        if self.flight.ahead == 0 {
            let samplers = rows.iter_mut().map(|row| row.sequence.chooser(row.token));
            let samplers: Vec<&Sampler> = samplers.collect();
            let plain = samplers.iter().all(|sampler| sampler.is_plain());
            if !plain || !self.backend.choose_rows(&samplers)? || !self.ready_together(rows)? {
                return Ok(None);
            }
            let step: Vec<Row<'_>> = rows.iter().map(Next::row).collect();
            self.backend.queue_rows(&step, Taken::Rows, Want::Choice)?;
            (self.flight.sequences, self.flight.ahead) = (numbers, 1);
        }
        let chosen = self.follow_together(rows);
        if chosen.is_err() {
            self.flight.ahead = 0;
            self.backend.give_up();
        }
        chosen.map(Some)
    }

    /// Takes what the oldest step chose, once the next one is queued behind it.
    fn follow_together(
        &mut self,
        rows: &mut [Next<'_>],
    ) -> Result<Vec<Result<u32, SessionError>>, SessionError> {
        while self.backend.rows_room() > 0 && self.goes_on(rows)? {
            let ahead = self.flight.ahead;
            let mut step: Vec<Row<'_>> = rows.iter().map(Next::row).collect();
            step.iter_mut().for_each(|row| row.position += ahead);
            self.backend.queue_rows(&step, Taken::Chosen, Want::Choice)?;
            self.flight.ahead += 1;
        }
        // Steps queued ahead have the form of the first.
        rows.iter_mut().for_each(|row| row.sequence.formed.count = row.sequence.len() + 1);
        let report = self.finish(rows.len())?;
        self.flight.ahead -= 1;
        self.tell_clamped();
        let refused = report.tokens.contains(&REFUSED);
        if refused {
            self.land()?;
        } else {
            self.flight.expected = Some(report.tokens.clone());
        }
        let follow = |(row, token): (&mut Next<'_>, u32)| {
            if token == REFUSED {
                return Err(SessionError::Output { position: row.sequence.len() });
            }
            row.sequence.feed(&[row.token]);
            row.sequence.sampler.follow(token);
            Ok(token)
        };
        Ok(rows.iter_mut().zip(report.tokens).map(follow).collect())
    }

    /// Whether a step more of the same rows may be queued: all want it, and it needs no more room.
    /// If so, gives them the blocks for it.
    fn goes_on(&mut self, rows: &mut [Next<'_>]) -> Result<bool, SessionError> {
        let ahead = self.flight.ahead;
        let lacks = |row: &Next<'_>| {
            let Next { sequence, more, .. } = row;
            let end = sequence.len() + ahead + 1;
            let full = end > sequence.limit().min(self.context_max);
            full || *more <= ahead || self.wants_other_form(sequence, end)
        };
        let at = |row: &Next<'_>| row.sequence.len() + ahead;
        let wanted = rows.iter().map(|row| row.sequence.table.wants(at(row), at(row) + 1));
        if self.halting
            || self.states.count() > 0
            || rows.iter().any(lacks)
            || wanted.sum::<usize>() > self.pool.free()
        {
            return Ok(false);
        }
        for row in rows.iter_mut() {
            let position = at(row);
            self.give_blocks(row.sequence, position, position + 1)?;
        }
        Ok(true)
    }

    /// Call when no step is in flight. Gives each what it needs for a step. `false` if they cannot
    /// share it.
    fn ready_together(&mut self, rows: &mut [Next<'_>]) -> Result<bool, SessionError> {
        let form =
            |this: &Self, row: &Next<'_>| this.long_form(row.sequence, row.sequence.len() + 1);
        let first = form(self, &rows[0]);
        if rows.iter().any(|row| form(self, row) != first) {
            return Ok(false);
        }
        for Next { sequence, .. } in rows.iter_mut() {
            let position = sequence.len();
            self.stretch(sequence, position, position + 1)?;
            self.recall(sequence, position)?;
            self.give_blocks(sequence, position, position + 1)?;
            self.prepare_state(sequence, position, position + 1)?;
        }
        Ok(true)
    }

    /// Runs a token of each. `None`, with nothing run, if they cannot share a step.
    fn run_rows(&mut self, rows: &mut [Next<'_>]) -> Result<Option<Vec<f32>>, SessionError> {
        for Next { sequence, token, .. } in rows.iter() {
            self.check(sequence, &[*token])?;
        }
        self.land()?;
        if !self.ready_together(rows)? {
            return Ok(None);
        }
        let step: Vec<Row<'_>> = rows.iter().map(Next::row).collect();
        self.backend.queue_rows(&step, Taken::Rows, Want::Logits(LogitRows::All))?;
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
