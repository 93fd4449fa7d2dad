//! Copies experts from host memory, where they were set aside, into slots.

/// For each choice in `fetches` that has a place and a slot, copies the expert at that place of
/// `spill` into that slot of `slots`. Both hold an expert every `stride` words.
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
