// For shared/pieces.wgsl: every matrix is Q4_K.
fn format_of(m: Pieces) -> u32 {
    return Q4_K;
}
