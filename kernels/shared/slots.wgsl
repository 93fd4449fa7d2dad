// slot_table[slots_at + expert] is an expert's slot within the chunk that is bound as `weights`, or
// EMPTY if the expert is not in this wave.
const EMPTY: u32 = 0xffffffffu;

// The matrix at words `offset` of the slot.
fn in_slot(m: Matrix, slot: u32, stride: u32) -> Matrix {
    return Matrix(slot * stride + m.base, m.blocks, m.row_blocks, m.units);
}
