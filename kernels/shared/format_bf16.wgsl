// For shared/pieces.wgsl: every matrix is BF16.
fn format_of(m: Pieces) -> u32 {
    return BF16;
}
