//! A norm added to a row, alone, and with the norm of the sum.

use super::{
    Alone, Check, EPS, Random, TEAM, TEAMS, compare, compare_packed, floats, params, words,
};
use crate::cpu::decode_norm_add::decode_norm_add;
use crate::cpu::decode_norm_add_norm::decode_norm_add_norm;
use crate::cpu::pack::{Packed, packed_words, pieces};
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

/// As [`norm_add`] into another row, which is normalised, too. The last quads contain data past the
/// last element, and zeros in the sum.
pub(super) fn norm_add_norm(
    alone: &Alone<'_>,
    team: &str,
    random: &mut Random,
    cols: usize,
    eps: f32,
) -> Check {
    let quads = cols.next_multiple_of(4);
    let [y, weight, x, after] = [(); 4].map(|()| random.floats(quads));
    let (mut want, mut want_packed) = (vec![0.0; quads], vec![0; packed_words(cols)]);
    let rows = [&y[..cols], &x[..cols]];
    let (first, second) = ((&weight[..cols], eps), (&after[..cols], 0.5 * eps));
    decode_norm_add_norm(rows, first, second, &mut want[..cols], &mut want_packed);
    let pieces = pieces(cols) as u32;
    let p = params::NormAddNorm { cols: cols as u32, pieces, eps, eps_after: 0.5 * eps };
    let untouched = vec![0x7fc0_0000; quads];
    let buffers = [
        words(&y),
        words(&weight),
        words(&x),
        words(&after),
        untouched,
        vec![0x7fc0_0000; want_packed.len()],
    ];
    let grid = (pieces.div_ceil(32), 1);
    let got = alone.run(&format!("decode_norm_add_norm_{team}"), 0, &p, &buffers, grid);
    let sums = (cols.div_ceil(1024) + 4 + TEAM + TEAMS) as f64;
    let roundings = 0.5 * (sums + 2.5 + 1.0) + 2.0 + 2.0;
    let slack: Vec<f64> = (0..quads)
        .map(|i| {
            let before = if i < cols { x[i] } else { 0.0 };
            let normed = f64::from((want[i] - before).abs());
            roundings * EPS * normed + EPS * f64::from(want[i].abs().max(before.abs()))
        })
        .collect();
    let what = format!("{cols} columns, {team}");
    compare(&floats(&got[4]), &want, &slack, &what)?;
    // The second norm: its own roundings; and the sum's errors, in the element and, as their root mean
    // square relative to the row's, in the factor.
    let square = |of: &mut dyn Iterator<Item = f64>| of.map(|x| x * x).sum::<f64>() / cols as f64;
    let eps_after = f64::from(0.5 * eps);
    let root = (square(&mut want.iter().map(|x| f64::from(*x))) + eps_after).sqrt();
    let off = square(&mut slack.iter().copied()).sqrt() / root;
    let twin = Packed::new(&want_packed);
    let packed_slack: Vec<f64> = (0..cols)
        .map(|i| {
            let own = slack[i] * f64::from(after[i].abs()) / root;
            (roundings * EPS + off) * f64::from(twin.plain(i).abs()) + own
        })
        .collect();
    compare_packed(&got[5], &want_packed, &packed_slack, &what)
}

#[test]
fn a_norm_is_added_and_the_sum_normalised_as_their_twin_does() {
    let mut random = Random::new("decode_norm_add_norm");
    let Some(device) = crate::gpu::tests::device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        for cols in [1, 7, 63, 64, 100, 1000, 1024, 1025, 2050, 4096, 4099, 5376] {
            for eps in [1e-5, 0.3] {
                norm_add_norm(&alone, team, &mut random, cols, eps).unwrap();
            }
        }
    }
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
