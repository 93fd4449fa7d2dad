//! One dispatch: what to bind, for which steps it is used, and how its grid grows with the step's
//! rows.

use std::ops::RangeInclusive;
use std::sync::Arc;

use serde::Serialize;

use super::params;
use super::pipelines::Pipeline;
use crate::cpu::decode_attention::Splits;

/// Which rows a grid grows with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    Tokens,
    /// The rows whose logits are wanted.
    Logits,
}

/// Workgroups for a number of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Grid {
    /// Items of one row, and how many of them a workgroup computes. Folded into y.
    Items { items: u64, per_workgroup: u32 },
    /// In x, tiles of `tile` rows (each row of the step counts as `per_row`) and `spare` more; in
    /// y, the given number of workgroups for each.
    Tiles { per_row: u32, tile: u32, spare: u32, y: u32 },
    /// One workgroup, whatever the number of rows.
    One,
    /// In x, `each` workgroups; in y, the step's rows.
    Rows { each: u32 },
    /// `each` workgroups for each group of up to `most` rows.
    Groups { each: u32, most: u32 },
    /// In x, `each` workgroups for every split of the positions that a token sees, of which there are
    /// at most `window` (0 means all); in y, the step's rows, of which the one with the most splits
    /// counts. See kernels/shared/splits.wgsl.
    Splits { each: u32, window: u32, most: u32 },
}

impl Grid {
    /// Tiles of the step's own rows.
    pub const fn tiles(tile: u32, y: u32) -> Self {
        Self::Tiles { per_row: 1, tile, spare: 0, y }
    }

    /// So many workgroups, whatever the number of rows.
    pub const fn fixed(count: u32) -> Self {
        Self::Tiles { per_row: 0, tile: 1, spare: count, y: 1 }
    }

    /// Workgroups in x and y for this many rows. `None` if there are more than `most` in one of
    /// them, or the items cannot be numbered by u32.
    fn workgroups(self, rows: u32, most: u32) -> Option<(u32, u32)> {
        match self {
            Self::Items { items, per_workgroup } => fold(items, per_workgroup, rows, most),
            Self::Tiles { per_row, tile, spare, y } => {
                let x = rows.checked_mul(per_row)?.div_ceil(tile).checked_add(spare)?;
                (x <= most && y <= most).then_some((x, y))
            }
            Self::One => Some((1, 1)),
            Self::Groups { each, most: rows_each } => {
                let x = rows.div_ceil(rows_each).checked_mul(each)?;
                (x <= most).then_some((x, 1))
            }
            Self::Rows { each } => (each <= most && rows <= most).then_some((each, rows)),
            Self::Splits { .. } => None,
        }
    }
}

/// One dispatch, ready to encode.
pub(super) struct Dispatch {
    pub pipeline: Arc<Pipeline>,
    pub storage: wgpu::BindGroup,
    /// Dynamic offset of its parameters.
    pub params: u32,
    pub rows: Rows,
    pub grid: Grid,
    /// The numbers of rows for which it is used.
    pub when: RangeInclusive<u32>,
}

impl Dispatch {
    /// The workgroups for this step, whose tokens are at `positions` (where grids depend on them).
    /// `None` if the dispatch is not used for this number of rows. An error if no grid can hold the
    /// rows.
    pub fn workgroups(
        &self,
        step: &params::Step,
        positions: &[u32],
        most: u32,
    ) -> std::result::Result<Option<(u32, u32)>, u32> {
        let rows = match self.rows {
            Rows::Tokens => step.tokens,
            Rows::Logits => step.logit_rows,
        };
        if rows == 0 || !self.when.contains(&rows) {
            return Ok(None);
        }
        if let Grid::Splits { each, window, most } = self.grid {
            let splits = positions.iter().map(|position| splits(*position, window, most));
            return Ok(Some((each * splits.max().unwrap_or(1), rows)));
        }
        self.grid.workgroups(rows, most).map(Some).ok_or(rows)
    }
}

/// Splits of the positions that the token at `position` sees.
fn splits(position: u32, window: u32, most: u32) -> u32 {
    let window = (window > 0).then_some(window as usize);
    Splits::of(position as usize, window, most as usize).count as u32
}

fn fold(items: u64, per_workgroup: u32, rows: u32, most: u32) -> Option<(u32, u32)> {
    let groups = items.checked_mul(u64::from(rows))?.div_ceil(u64::from(per_workgroup));
    let x = groups.min(u64::from(most));
    let y = if x == 0 { 0 } else { groups.div_ceil(x) };
    // Invocations past the last item are numbered, too.
    let numbered = x * y * u64::from(per_workgroup);
    if y > u64::from(most) || numbered > u64::from(u32::MAX) {
        return None;
    }
    Some((u32::try_from(x).ok()?, u32::try_from(y).ok()?))
}

#[cfg(test)]
mod unit {
    use super::*;
    use crate::cpu::decode_attention::TILE;

    #[test]
    fn grids_fold_into_y_and_number_every_item() {
        assert_eq!(fold(1, 64, 0, 65_535), Some((0, 0)));
        assert_eq!(fold(65, 64, 1, 65_535), Some((2, 1)));
        assert_eq!(fold(65_536, 1, 1, 65_535), Some((65_535, 2)));
        assert_eq!(fold(151_936, 1, 5, 65_535), Some((65_535, 12)));
        assert_eq!(fold(u64::from(u32::MAX), 1, 2, 65_535), None);
    }

    #[test]
    fn splits_are_whole_tiles_and_never_more_than_allowed() {
        assert_eq!([0, 31, 32, 640].map(|p| splits(p, 0, 64)), [1, 1, 2, 21]);
        assert_eq!(splits(1_000_000, 128, 64), 4);
        for position in (0..200_000).step_by(777) {
            let tiles = (position + 1_u32).div_ceil(TILE as u32);
            let count = splits(position, 0, 64);
            let each = tiles.div_ceil(64);
            assert!(count <= 64 && count * each >= tiles && (count - 1) * each < tiles);
        }
    }

    #[test]
    fn tiles_cover_every_row_and_are_refused_beyond_a_dimension() {
        assert_eq!(Grid::tiles(64, 7).workgroups(64, 65_535), Some((1, 7)));
        assert_eq!(Grid::tiles(64, 7).workgroups(65, 65_535), Some((2, 7)));
        let pairs = Grid::Tiles { per_row: 8, tile: 64, spare: 5, y: 2 };
        assert_eq!(pairs.workgroups(9, 65_535), Some((7, 2)));
        assert_eq!(Grid::tiles(64, 70_000).workgroups(1, 65_535), None);
        assert_eq!(pairs.workgroups(u32::MAX, 65_535), None);
    }
}
