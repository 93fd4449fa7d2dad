// For shared/pieces.wgsl: every matrix is F16.
fn format_of(m: Pieces) -> u32 {
    return F16;
}
