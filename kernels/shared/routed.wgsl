// One token's choices as decode_route writes them: (slot, routing weight), with EMPTY if the step
// is halted.
const EMPTY: u32 = 0xffffffffu;

// A matrix of the expert whose slot begins at vec4 `at`.
fn in_slot(m: Pieces, at: u32) -> Pieces {
    return Pieces(at + m.base, m.blocks, m.row_blocks, m.pieces, m.format);
}
