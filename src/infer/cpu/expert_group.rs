//! Sorts (token, choice) pairs by their expert and cuts each expert's into tiles.

/// Pairs in order of their experts, and the tiles: (expert, first pair, pairs), each of at
/// most `tile` pairs of one expert.
pub fn expert_group(ids: &[u32], tile: usize) -> (Vec<u32>, Vec<(u32, u32, u32)>) {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|pair| ids[*pair as usize]);
    let mut tiles = Vec::new();
    let mut first = 0;
    for pairs in order.chunk_by(|a, b| ids[*a as usize] == ids[*b as usize]) {
        for part in pairs.chunks(tile) {
            tiles.push((ids[part[0] as usize], first, part.len() as u32));
            first += part.len() as u32;
        }
    }
    (order, tiles)
}
