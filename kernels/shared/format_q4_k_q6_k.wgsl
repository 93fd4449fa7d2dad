// For shared/pieces.wgsl: matrices are Q4_K or Q6_K, as a mixture gives queries, keys and values.
fn format_of(m: Pieces) -> u32 {
    return select(Q6_K, Q4_K, m.format == Q4_K);
}
