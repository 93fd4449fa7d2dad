//! The sequences of a step: consecutive tokens of one, or one token of each of several.

use std::ops::Range;

/// One sequence's tokens in a step.
#[derive(Debug, Clone, Default)]
pub struct Part {
    /// Which rows of the step they are.
    pub rows: Range<usize>,
    /// The first one's position.
    pub position: usize,
    /// The sequence's blocks.
    pub blocks: Vec<u32>,
    /// The place of its recurrent states.
    pub slot: usize,
}

impl Part {
    /// The positions of its tokens.
    pub const fn positions(&self) -> Range<usize> {
        self.position..self.end()
    }

    /// The position after its last token.
    pub const fn end(&self) -> usize {
        self.position + self.rows.end - self.rows.start
    }

    /// Its rows of a buffer of the step, of so many elements each.
    pub const fn of(&self, width: usize) -> Range<usize> {
        self.rows.start * width..self.rows.end * width
    }
}
