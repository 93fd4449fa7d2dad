// For shared/pieces.wgsl: every matrix is Q8_0.
fn format_of(m: Pieces) -> u32 {
    return Q8_0;
}
