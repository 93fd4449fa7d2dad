//! How many copies a model's objects should have. A publisher signs it with the model.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The most copies that may be asked for: more would fill other people's disks.
pub const REPLICAS_MAX: usize = 64;

/// How many live nodes should hold an object whole. Reads and prints `MIN:MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replicas {
    /// With fewer, the object lacks copies. At least 1.
    pub min: usize,
    /// More are not needed. At least `min`, at most [`REPLICAS_MAX`].
    pub max: usize,
}

impl Replicas {
    pub const DEFAULT: Self = Self { min: 2, max: 4 };

    /// Whether both numbers are within their bounds.
    pub const fn is_valid(self) -> bool {
        1 <= self.min && self.min <= self.max && self.max <= REPLICAS_MAX
    }

    /// Whether this is what holds where nobody says anything else.
    pub fn is_default(&self) -> bool {
        *self == Self::DEFAULT
    }

    /// What satisfies both.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self { min: self.min.max(other.min), max: self.max.max(other.max) }
    }
}

impl Default for Replicas {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Display for Replicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}:{}", self.min, self.max))
    }
}

/// A text, or numbers out of bounds, that say no number of copies.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not MIN:MAX copies (write 2:4; MIN is at least 1, MAX at least MIN and at most {REPLICAS_MAX})"
)]
pub struct BadReplicas(pub String);

impl FromStr for Replicas {
    type Err = BadReplicas;

    fn from_str(text: &str) -> Result<Self, BadReplicas> {
        let bad = || BadReplicas(text.to_owned());
        let (min, max) = text.split_once(':').ok_or_else(bad)?;
        let number = |text: &str| text.trim().parse::<usize>().map_err(|_| bad());
        let replicas = Self { min: number(min)?, max: number(max)? };
        if replicas.is_valid() { Ok(replicas) } else { Err(bad()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_within_their_bounds() {
        assert_eq!("4:5".parse(), Ok(Replicas { min: 4, max: 5 }));
        assert_eq!(Replicas::default().to_string().parse(), Ok(Replicas::DEFAULT));
        assert_eq!("64:64".parse::<Replicas>().unwrap().max, REPLICAS_MAX);
        for text in ["", "2", "0:4", "3:2", "2:65", "-1:4", "2:4:6", "a:b"] {
            let error = text.parse::<Replicas>().unwrap_err().to_string();
            assert!(error.contains("at most 64") && error.contains("at least 1"), "{error}");
        }
        let (low, high) = (Replicas { min: 1, max: 9 }, Replicas { min: 3, max: 4 });
        assert_eq!(low.or(high), Replicas { min: 3, max: 9 });
    }
}
