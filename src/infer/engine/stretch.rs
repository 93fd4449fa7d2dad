//! The form of a sequence's keys: ropes that change with its length (longrope) have a short and a long
//! one, and adapters change keys as they change everything.
//!
//! A sequence longer than the original context rotates all its keys, the first ones too, by the long
//! factors, as Transformers does. So when a sequence crosses that length, or is rewound behind it, the
//! keys in its cache are of the wrong form, and its tokens run again. A prompt's length is known
//! beforehand, so a long prompt begins with the long form. In the same way its tokens run again when
//! other adapters are attached than those with which they ran.
//!
//! Invariant: the first [`Formed::count`] tokens of a sequence have keys of the form that it names,
//! whatever failed in between.

use super::Engine;
use crate::adapter::SetId;
use crate::backend::{Fed, LogitRows, Want};
use crate::error::SessionError;
use crate::sequence::Sequence;

/// The form of a sequence's keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Formed {
    pub long: bool,
    /// The adapters with which they were computed.
    pub adapters: SetId,
    /// Tokens whose keys have this form.
    pub count: usize,
    /// The length that the sequence will soon have, if it is known.
    pub expected: usize,
}

impl Formed {
    /// Forgets all but the first `count` tokens.
    pub fn truncate(&mut self, count: usize) {
        self.count = self.count.min(count);
    }
}

impl Engine {
    /// Whether a sequence of `end` tokens needs its keys in another form.
    pub(super) fn wants_other_form(&self, sequence: &Sequence, end: usize) -> bool {
        let other = self.long_form(sequence, end).is_some_and(|long| long != sequence.formed.long);
        other || sequence.formed.adapters != self.adapters()
    }

    pub(super) fn long_form(&self, sequence: &Sequence, end: usize) -> Option<bool> {
        let from = self.stretches_from?;
        Some(end.max(sequence.formed.expected) > from)
    }

    /// Call before tokens `start..end` of a sequence run, when no token is in flight. Brings the keys
    /// before them into the form that the length `end` and the adapters ask for.
    pub(super) fn stretch(
        &mut self,
        sequence: &mut Sequence,
        start: usize,
        end: usize,
    ) -> Result<(), SessionError> {
        let long = self.long_form(sequence, end);
        let adapters = self.adapters();
        let now = super::Formed { long: long.unwrap_or(false), adapters, ..sequence.formed };
        if sequence.formed != now {
            if sequence.formed.adapters != adapters {
                sequence.state.truncate(0);
            }
            sequence.formed = super::Formed { count: 0, ..now };
        }
        if let Some(long) = long {
            self.backend.set_stretched(long)?;
        }
        while sequence.formed.count < start {
            let first = sequence.formed.count;
            let last = start.min(first + self.batch);
            if last - first == 1 {
                self.make_room();
            }
            self.prepare(sequence, first, last)?;
            let tokens = &sequence.tokens()[first..last];
            self.backend.queue(Fed::Tokens(tokens), first, Want::Logits(LogitRows::None))?;
            self.finish(last - first)?;
            sequence.formed.count = last;
        }
        sequence.formed.count = end;
        Ok(())
    }
}

#[cfg(test)]
#[path = "stretch_tests.rs"]
mod tests;
