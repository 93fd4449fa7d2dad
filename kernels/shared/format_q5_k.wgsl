// For shared/pieces.wgsl: every matrix is Q5_K.
fn format_of(m: Pieces) -> u32 {
    return Q5_K;
}
