// For shared/pieces.wgsl: every matrix is Q6_K.
fn format_of(m: Pieces) -> u32 {
    return Q6_K;
}
