// Where positions are in a cache made of blocks (src/infer/kv.rs): the i-th block of the sequence
// is cache_blocks.at[i], and each block is BLOCK_POSITIONS rows. The kernel declares
// `cache_blocks`, whose list ends with two unused words.

const BLOCK_POSITIONS: u32 = 64u;

// The blocks of a tile of at most BLOCK_POSITIONS positions: the first one's index in the list, the
// first block and the next one.
struct Span { number: u32, first: u32, second: u32 }

fn span_at(start: u32) -> Span {
    let number = start / BLOCK_POSITIONS;
    return Span(number, cache_blocks.at[number], cache_blocks.at[number + 1u]);
}

// The row of a position of the tile.
fn row_of(span: Span, position: u32) -> u32 {
    let block = select(span.second, span.first, position / BLOCK_POSITIONS == span.number);
    return block * BLOCK_POSITIONS + position % BLOCK_POSITIONS;
}
