//! Bugs that are planted on purpose, to see whether the simulator's rules notice them. Without the
//! feature `planted`, which only that test switches on, there are none.

/// A planted bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// The wrong node is taken for the one that should copy an object.
    HealerChoice,
    /// A lease lasts an hour, whatever its author says.
    LeaseExpiry,
    /// The shard client takes bytes without looking at their hash.
    HashCheck,
    /// What is missing of a request that failed is forgotten.
    Picker,
    /// An older message is believed after a newer one.
    EpochOrder,
    /// A node leaves without looking at what others hold.
    Drain,
}

impl Plant {
    pub const ALL: [Self; 6] = [
        Self::HealerChoice,
        Self::LeaseExpiry,
        Self::HashCheck,
        Self::Picker,
        Self::EpochOrder,
        Self::Drain,
    ];
}

#[cfg(feature = "planted")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Plant>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug in the cores that run on this thread; `None` takes it out. Does nothing without
/// the feature.
pub fn plant(plant: Option<Plant>) {
    #[cfg(feature = "planted")]
    PLANTED.set(plant);
    #[cfg(not(feature = "planted"))]
    let _ = plant;
}

/// Whether this is the bug that is planted.
pub fn is(plant: Plant) -> bool {
    #[cfg(feature = "planted")]
    return PLANTED.get() == Some(plant);
    #[cfg(not(feature = "planted"))]
    {
        let _ = plant;
        false
    }
}
