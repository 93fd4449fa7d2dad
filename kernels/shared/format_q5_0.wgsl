// For shared/pieces.wgsl: every matrix is Q5_0.
fn format_of(m: Pieces) -> u32 {
    return Q5_0;
}
