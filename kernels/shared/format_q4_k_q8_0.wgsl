// For shared/pieces.wgsl: matrices are Q4_K or Q8_0, as models of eight experts have queries, keys
// and values.
fn format_of(m: Pieces) -> u32 {
    return select(Q8_0, Q4_K, m.format == Q4_K);
}
