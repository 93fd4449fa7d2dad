//! Sorts (token, choice) pairs by expert and divides each expert's pairs into tiles.

/// Returns the pairs in order of expert, and the tiles as (expert, first pair, number of pairs). A
/// tile has at most `tile` pairs, all of one expert.
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
