//! A norm added to a row, alone.

use super::{Alone, Check, EPS, Random, TEAM, TEAMS, compare, floats, params, words};
use crate::cpu::decode_norm_add::decode_norm_add;
use crate::gpu::Reduction;

/// Adds the norm of a row of `cols` elements to another. The bindings' last quads contain data past
/// the last element, which stays as it is.
pub(super) fn norm_add(
    alone: &Alone<'_>,
    team: &str,
    random: &mut Random,
    cols: usize,
    eps: f32,
) -> Check {
    let quads = cols.next_multiple_of(4);
    let [y, weight, x] = [(); 3].map(|()| random.floats(quads));
    let mut want = x.clone();
    decode_norm_add(&y[..cols], &weight[..cols], eps, &mut want[..cols]);
    let p = params::NormAdd { cols: cols as u32, eps };
    let buffers = [words(&y), words(&weight), words(&x)];
    let grid = (cols.div_ceil(1024) as u32, 1);
    let got = alone.run(&format!("decode_norm_add_{team}"), 0, &p, &buffers, grid);
    // As for a norm alone; then the sum is rounded.
    let sums = (cols.div_ceil(1024) + 4 + TEAM + TEAMS) as f64;
    let roundings = 0.5 * (sums + 2.5 + 1.0) + 2.0 + 2.0;
    let slack: Vec<f64> = (0..quads)
        .map(|i| {
            let normed = f64::from((want[i] - x[i]).abs());
            roundings * EPS * normed + EPS * f64::from(want[i].abs().max(x[i].abs()))
        })
        .collect();
    compare(&floats(&got[2]), &want, &slack, &format!("{cols} columns, {team}"))
}

#[test]
fn a_norm_is_added_as_its_twin_does_over_several_workgroups() {
    let mut random = Random::new("decode_norm_add");
    let Some(device) = crate::gpu::tests::device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        for cols in [1, 7, 63, 64, 100, 1000, 1024, 1025, 2050, 4099] {
            for eps in [1e-5, 0.3] {
                norm_add(&alone, team, &mut random, cols, eps).unwrap();
            }
        }
    }
}
