// (token, choice) pairs as expert_group.wgsl sorted them: `tiles[i]` is (expert, first,
// count, 0), and pair_order[first .. first + count] are pairs of that expert.
const PAIR_TILE: u32 = 64u;
