//! Looks up the slots of a token's chosen experts.

/// The table's entry for an expert without a slot.
const EMPTY: u32 = u32::MAX;

/// Writes a layer's chosen `ids` to `state` from word `ids_at` on. If one has no slot in `slots`,
/// the layer's row of the table, the state says that layer `halt` (from 1) halted the step at
/// `position`. If the step is already halted, the state stays as it is.
pub fn decode_seek(
    ids: &[u32],
    slots: &[u32],
    (halt, position): (u32, u32),
    ids_at: usize,
    state: &mut [u32],
) {
    if state[0] != 0 {
        return;
    }
    state[ids_at..ids_at + ids.len()].copy_from_slice(ids);
    if ids.iter().any(|id| slots[*id as usize] == EMPTY) {
        (state[0], state[2]) = (halt, position + 1);
    }
}
