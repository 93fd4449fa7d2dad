// How the positions that one token sees are divided among workgroups: in tiles of 32, with the same
// number of tiles in each split. The host counts workgroups in the same way
// (src/infer/gpu/dispatch.rs).

const TILE: u32 = 32u;

struct Splits { first: u32, end: u32, count: u32, tiles_each: u32 }

fn splits_of(position: u32, window: u32, most: u32) -> Splits {
    let end = position + 1u;
    let first = select(0u, end - min(window, end), window > 0u);
    let tiles = (end - first + TILE - 1u) / TILE;
    let each = (tiles + most - 1u) / most;
    return Splits(first, end, (tiles + each - 1u) / each, each);
}
