//! Which seeder gets which shards: every shard is on two seeders, the whole model on none.

/// The seeders of the demo.
pub const SEEDERS: usize = 3;

/// Shard numbers for each seeder. Only seeder `i % 3` lacks shard `i`, so with at least three
/// shards no seeder holds all of them.
pub fn place(shards: usize) -> [Vec<usize>; SEEDERS] {
    std::array::from_fn(|seeder| (0..shards).filter(|shard| shard % SEEDERS != seeder).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shard_lives_twice_and_nobody_has_all() {
        for shards in 3..40 {
            let placed = place(shards);
            for shard in 0..shards {
                assert_eq!(placed.iter().filter(|held| held.contains(&shard)).count(), 2);
            }
            assert!(placed.iter().all(|held| held.len() < shards));
        }
    }
}
