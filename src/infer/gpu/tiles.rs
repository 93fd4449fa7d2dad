//! Which tiles a product on cooperative matrices uses for how many tokens, and into how many parts
//! its columns are divided. Pure. The numbers are those of an H200
//! (benches/runs/h200-coop-2026-11-30.md).
//!
//! Invariant: the ways of a product cover every number of tokens from the first one's on, and never
//! overlap.

use std::ops::RangeInclusive;

/// Rows of weights of a tile (`ROWS` of shared/coop.wgsl).
pub(super) const ROWS: u32 = 128;
/// Tokens of a narrow tile and of a wide one (`TOKENS` there).
pub(super) const NARROW: u32 = 64;
pub(super) const WIDE: u32 = 128;

/// Workgroups that run at once on the largest devices: two for each of 132 multiprocessors.
const AT_ONCE: u32 = 264;
/// Tiles from which on columns stay whole.
const WHOLE_FROM: u32 = 200;
/// The most parts, and the fewest columns of one, in groups of 64.
const PARTS_MAX: u32 = 8;
const GROUPS_MIN: u32 = 8;
/// Pairs for each expert, on average, from which on some experts have enough for wide tiles.
const WIDE_PAIRS: u64 = 24;

/// The most f32 that the parts of a product take: those of all tiles that run at once.
pub(super) const PARTS_WORDS: usize = (AT_ONCE * ROWS * WIDE) as usize;

/// One way to compute a product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Way {
    /// Tokens (or pairs) of a tile.
    pub tile: u32,
    /// Parts of the columns, each of at least one group of 64.
    pub parts: u32,
    /// The numbers of tokens for which it is used.
    pub when: RangeInclusive<u32>,
}

impl Way {
    /// The suffix of its kernel: blocks of 16 tokens of a subgroup.
    pub const fn suffix(&self) -> &'static str {
        if self.tile == WIDE { "4" } else { "2" }
    }

    /// The suffixes of an expert's kernels: wide tiles that are at most half full are the narrow
    /// kernel's.
    pub const fn kernels(&self) -> &'static [&'static str] {
        if self.tile == WIDE { &["4", "2"] } else { &["2"] }
    }
}

/// The ways of a product of `rows` by `units` times 32 columns with `from` to `batch` tokens.
pub(super) fn linear(rows: u32, units: u32, from: u32, batch: u32) -> Vec<Way> {
    let (down, groups) = (rows.div_ceil(ROWS), units.div_ceil(2));
    let mut ways: Vec<Way> = Vec::new();
    let mut first = from;
    while ways.is_empty() || first <= batch {
        let tile = if first <= NARROW { NARROW } else { WIDE };
        let across = first.div_ceil(tile);
        let parts = parts(down.saturating_mul(across), groups);
        let last = across.saturating_mul(tile);
        match ways.last_mut().filter(|way| (way.tile, way.parts) == (tile, parts)) {
            Some(way) => way.when = *way.when.start()..=last,
            None => ways.push(Way { tile, parts, when: first..=last }),
        }
        first = last.saturating_add(1);
    }
    if let Some(way) = ways.last_mut() {
        way.when = *way.when.start()..=u32::MAX;
    }
    ways
}

/// Parts for so many tiles over so many groups of 64 columns: none of them is empty.
fn parts(tiles: u32, groups: u32) -> u32 {
    if tiles >= WHOLE_FROM || tiles == 0 {
        return 1;
    }
    let parts = (AT_ONCE / tiles).min(PARTS_MAX).min(groups / GROUPS_MIN).max(1);
    groups.div_ceil(groups.div_ceil(parts).max(1)).max(1)
}

/// The ways of a layer's experts: `top_k` pairs a token, of `experts`.
pub(super) fn experts(experts: usize, top_k: usize, from: u32) -> Vec<Way> {
    let tokens = (WIDE_PAIRS * experts as u64).div_ceil(top_k.max(1) as u64);
    let wide = u32::try_from(tokens).unwrap_or(u32::MAX).max(from);
    let mut ways = Vec::new();
    if wide > from {
        ways.push(Way { tile: NARROW, parts: 1, when: from..=wide - 1 });
    }
    ways.push(Way { tile: WIDE, parts: 1, when: wide..=u32::MAX });
    ways
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_cover_every_number_of_tokens_once() {
        for (rows, units) in
            [(1, 1), (67, 16), (1024, 128), (4096, 448), (14336, 128), (151_936, 64)]
        {
            for (from, batch) in [(16, 16), (16, 64), (16, 65), (16, 512), (16, 2048), (100, 7)] {
                let ways = linear(rows, units, from, batch);
                assert_eq!(*ways[0].when.start(), from);
                assert_eq!(*ways[ways.len() - 1].when.end(), u32::MAX);
                for pair in ways.windows(2) {
                    assert_eq!(*pair[0].when.end() + 1, *pair[1].when.start());
                    assert!((pair[0].tile, pair[0].parts) != (pair[1].tile, pair[1].parts));
                }
            }
        }
    }

    #[test]
    fn parts_fit_their_buffer_and_none_is_empty() {
        for groups in 1..700 {
            for tiles in (0..600).chain([100_000]) {
                let parts = parts(tiles, groups);
                assert!((1..=PARTS_MAX).contains(&parts));
                // As the kernel divides them.
                let each = groups.div_ceil(parts);
                assert!((parts - 1) * each < groups, "{groups} groups in {parts}");
                assert!(parts == 1 || (parts * tiles <= AT_ONCE && each >= GROUPS_MIN));
            }
        }
    }

    /// Llama-3.1-8B with 512 tokens.
    #[test]
    fn few_tiles_divide_their_columns_and_many_do_not() {
        let of = |rows, units, tokens| {
            let ways = linear(rows, units, 16, 512);
            let way = ways.iter().find(|way| way.when.contains(&tokens)).unwrap();
            (way.tile, way.parts)
        };
        assert_eq!(of(14336, 128, 512), (WIDE, 1));
        assert_eq!(of(4096, 128, 512), (WIDE, 2));
        assert_eq!(of(4096, 448, 512), (WIDE, 2));
        assert_eq!(of(1024, 128, 512), (WIDE, 8));
        assert_eq!(of(4096, 128, 65), (WIDE, 8));
        assert_eq!(of(4096, 128, 64), (NARROW, 8));
        assert_eq!(of(256, 8, 512), (WIDE, 1), "too few columns to divide");
    }

    #[test]
    fn experts_take_wide_tiles_once_their_pairs_fill_them() {
        // Qwen3-30B-A3B and Mixtral-8x7B.
        let of = |count, top_k, tokens| {
            experts(count, top_k, 16)
                .into_iter()
                .find(|way| way.when.contains(&tokens))
                .unwrap()
                .tile
        };
        assert_eq!([383, 384].map(|tokens| of(128, 8, tokens)), [NARROW, WIDE]);
        assert_eq!([95, 96].map(|tokens| of(8, 2, tokens)), [NARROW, WIDE]);
        assert_eq!(experts(1, 64, 16).len(), 1);
    }
}
