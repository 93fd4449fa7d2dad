// Where positions are in a cache made of blocks (src/infer/kv.rs): the i-th block of the sequence
// is cache_blocks.at[list + i], and each block is BLOCK_POSITIONS rows. The kernel declares
// `cache_blocks`, whose list ends with two unused words.

const BLOCK_POSITIONS: u32 = 64u;

// Where the sequence's list begins. Not 0 only in kernels for several sequences.
var<private> list: u32;

// The blocks of a tile of at most BLOCK_POSITIONS positions: what is added to a position to get its
// row (modulo 2^32), before `boundary` and from there on.
struct Span { boundary: u32, first: u32, second: u32 }

fn row_offset(number: u32) -> u32 {
    return (cache_blocks.at[list + number] - number) * BLOCK_POSITIONS;
}

fn span_at(start: u32) -> Span {
    let number = start / BLOCK_POSITIONS;
    return Span((number + 1u) * BLOCK_POSITIONS, row_offset(number), row_offset(number + 1u));
}

// For a tile that lies in one block.
fn span_within(start: u32) -> Span {
    let offset = row_offset(start / BLOCK_POSITIONS);
    return Span(0xffffffffu, offset, offset);
}

// The row of a position of the tile.
fn row_of(span: Span, position: u32) -> u32 {
    return position + select(span.second, span.first, position < span.boundary);
}
