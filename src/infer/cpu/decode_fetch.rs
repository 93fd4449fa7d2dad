//! Experts from where they were set aside into slots, as words.

/// Copies for each choice that has one the expert at its place of `spill` into its slot of `slots`, both `stride` words
/// apart. `fetches`: by choice, the place and the slot.
pub fn decode_fetch(
    spill: &[u32],
    slots: &mut [u32],
    fetches: &[Option<(usize, usize)>],
    stride: usize,
) {
    for (place, slot) in fetches.iter().flatten() {
        let from = &spill[place * stride..][..stride];
        slots[slot * stride..][..stride].copy_from_slice(from);
    }
}
