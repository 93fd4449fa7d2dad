// A matrix of a dispatch over several.
struct Segment {
    base: u32,
    blocks: u32,
    row_blocks: u32,
    pieces: u32,
    format: u32,
    rows: u32,
    // Where its rows begin in `result` and `bias`.
    result_at: u32,
    // The first workgroup after those of this segment.
    end: u32,
}
