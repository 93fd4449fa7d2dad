//! Bugs that are planted to see whether the checkers notice. Only with the feature `planted`.

/// A planted bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// None.
    Nothing,
    /// The shard client takes bytes without looking at their hash.
    HashCheck,
}

impl Plant {
    /// Whether this is the bug that is planted.
    pub fn is(self, plant: Self) -> bool {
        cfg!(feature = "planted") && self == plant
    }
}
