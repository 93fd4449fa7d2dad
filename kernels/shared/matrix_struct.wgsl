// What a kernel knows of a weight matrix (shared/matrix.wgsl, shared/coop.wgsl).

struct Matrix {
    // The first plane's first word.
    base: u32,
    // Blocks of the whole matrix.
    blocks: u32,
    // Blocks of one row.
    row_blocks: u32,
    // Units of one row that hold columns: ceil(cols / 32).
    units: u32,
}
