// Where positions lie in a cache of blocks (src/infer/kv.rs): the i-th block of the sequence is cache_blocks.at[i], and each
// is BLOCK_POSITIONS rows. The kernel declares `cache_blocks`, whose list ends with two words that nobody uses.

const BLOCK_POSITIONS: u32 = 64u;

// The blocks of a tile of at most BLOCK_POSITIONS positions: the number of the first in the list, that one and the next.
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
