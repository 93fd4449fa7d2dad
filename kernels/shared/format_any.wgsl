// For shared/pieces.wgsl: each matrix says its own format.
fn format_of(m: Pieces) -> u32 {
    return m.format;
}
