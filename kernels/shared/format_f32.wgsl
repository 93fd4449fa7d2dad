// For shared/pieces.wgsl: every matrix is F32.
fn format_of(m: Pieces) -> u32 {
    return F32;
}
