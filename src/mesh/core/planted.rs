//! Bugs that are planted on purpose, to see whether the simulator's rules notice them. There are
//! none without the feature `planted`, which only that test enables.

/// A planted bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// The wrong node is chosen to copy an object.
    HealerChoice,
    /// A lease lasts an hour, regardless of its author.
    LeaseExpiry,
    /// The shard client accepts bytes without checking their hash.
    HashCheck,
    /// The rest of a failed request is forgotten.
    Picker,
    /// An older message is accepted after a newer one.
    EpochOrder,
    /// A node leaves without checking what others hold.
    Drain,
    /// A crowd has no topics of models.
    ModelTopics,
}

impl Plant {
    pub const ALL: [Self; 7] = [
        Self::HealerChoice,
        Self::LeaseExpiry,
        Self::HashCheck,
        Self::Picker,
        Self::EpochOrder,
        Self::Drain,
        Self::ModelTopics,
    ];
}

#[cfg(feature = "planted")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Plant>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug in the cores that run on this thread; `None` removes it. Does nothing without the
/// feature.
pub fn plant(plant: Option<Plant>) {
    #[cfg(feature = "planted")]
    PLANTED.set(plant);
    #[cfg(not(feature = "planted"))]
    let _ = plant;
}

/// Whether this bug is planted.
pub fn is(plant: Plant) -> bool {
    #[cfg(feature = "planted")]
    return PLANTED.get() == Some(plant);
    #[cfg(not(feature = "planted"))]
    {
        let _ = plant;
        false
    }
}
