//! How a weight of the graph is made from a checkpoint's stored tensors.
//!
//! A family declares what it needs; `load::recipe` carries it out row by row. A stored tensor is
//! treated as a matrix: its last dimension is the row, and the product of the others is the number
//! of rows. So a stack of experts `[experts, rows, cols]` is one tall matrix, and one expert is a
//! slice of it. The plain case, [`Source::Itself`], costs nothing: the bytes are used as stored.

use std::ops::Range;

/// Where a weight's values come from.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Source {
    /// The stored tensor with the weight's own name.
    #[default]
    Itself,
    /// The stored tensor of this name.
    Stored(String),
    /// Some rows of another source.
    Rows { of: Box<Source>, take: Take },
    /// Some columns of another source.
    Cols { of: Box<Source>, take: Take },
    /// Sources of the same width, one below the other.
    Concatenate(Vec<Source>),
    /// The transpose of another source.
    Transpose(Box<Source>),
    /// Rows in the order `[.., outer, inner]` are reordered to `[.., inner, outer]`.
    Permute { of: Box<Source>, outer: usize, inner: usize },
    /// All rows of another source in one row.
    Flat(Box<Source>),
    /// Each value plus one, as F32. For norms that are stored as the difference from 1.
    AddOne(Box<Source>),
    /// Each value times a factor, as F32.
    Times(Box<Source>, f32),
    /// A one for each column. Nothing is stored.
    Ones,
    /// The first of these whose stored tensors all exist. For architectures whose checkpoints come
    /// in several forms.
    FirstOf(Vec<Source>),
}

/// Evenly spaced rows or columns: `start`, `start + step`, ..., `count` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Take {
    pub start: usize,
    pub count: usize,
    /// At least 1.
    pub step: usize,
}

impl From<Range<usize>> for Take {
    fn from(range: Range<usize>) -> Self {
        Self { start: range.start, count: range.len(), step: 1 }
    }
}

impl Source {
    pub fn stored(name: impl Into<String>) -> Self {
        Self::Stored(name.into())
    }

    pub fn rows(self, take: impl Into<Take>) -> Self {
        Self::Rows { of: Box::new(self), take: take.into() }
    }

    pub fn cols(self, take: impl Into<Take>) -> Self {
        Self::Cols { of: Box::new(self), take: take.into() }
    }

    pub fn transpose(self) -> Self {
        Self::Transpose(Box::new(self))
    }

    pub fn permute(self, outer: usize, inner: usize) -> Self {
        Self::Permute { of: Box::new(self), outer, inner }
    }

    pub fn flat(self) -> Self {
        Self::Flat(Box::new(self))
    }

    pub fn add_one(self) -> Self {
        Self::AddOne(Box::new(self))
    }

    pub fn times(self, factor: f32) -> Self {
        Self::Times(Box::new(self), factor)
    }

    /// Calls `each` with the name of every stored tensor that it mentions, including alternatives.
    /// `own` is the weight's own name.
    pub fn names<'a>(&'a self, own: &'a str, each: &mut dyn FnMut(&'a str)) {
        match self {
            Self::Ones => {}
            Self::Itself => each(own),
            Self::Stored(name) => each(name),
            Self::Concatenate(parts) | Self::FirstOf(parts) => {
                parts.iter().for_each(|part| part.names(own, each));
            }
            Self::Rows { of, .. }
            | Self::Cols { of, .. }
            | Self::Transpose(of)
            | Self::Flat(of)
            | Self::Permute { of, .. }
            | Self::AddOne(of)
            | Self::Times(of, _) => of.names(own, each),
        }
    }
}
