//! The cap of logits, alone and behind a product.

use super::alone::Alone;
use super::{BOTH, Random, assert_close, backend, device};
use crate::backend::{Backend, Capacity, KvFormat, LogitRows, Ops, Step};
use crate::cpu::matrix::Matrix;
use crate::cpu::{linear::linear, softcap::softcap};
use crate::gpu::{Reduction, params};
use crate::graph::{Graph, Op};
use doppler_store::DType;

/// Values from tiny ones to far beyond the cap.
fn values(random: &mut Random, count: usize, cap: f32) -> Vec<f32> {
    (0..count).map(|i| random.float() * cap * (i as f32 % 17.0 - 13.0).exp2()).collect()
}

fn alone(on: &Alone<'_>, random: &mut Random, (width, cap): (usize, f32)) -> Result<(), String> {
    let mut x = values(random, width, cap);
    if width > 5 {
        (x[1], x[3], x[5]) = (f32::INFINITY, f32::NEG_INFINITY, f32::NAN);
    }
    // What lies past the row stays as it is.
    let mut words: Vec<u32> = x.iter().map(|x| x.to_bits()).collect();
    words.extend([77; 3]);
    let params = params::Softcap { width: width as u32, cap };
    let got = on.run("softcap", 9, &params, &[words], (width.div_ceil(64) as u32, 1));
    softcap(&mut x, cap);
    for (i, (got, want)) in got[0].iter().map(|bits| f32::from_bits(*bits)).zip(&x).enumerate() {
        // 8 units of the quotient's tanh, of which small values have a part.
        let most =
            8.0 * f32::EPSILON * want.abs().max(0.2 * cap * f32::from(want.abs() > 0.15 * cap));
        let same = got == *want || got.is_nan() && want.is_nan();
        let off = (got - want).abs();
        if !same && (off.is_nan() || off > most) {
            return Err(format!("{width} of cap {cap}: {got} at {i}, not {want}"));
        }
    }
    match got[0][width..] == [77; 3] {
        true => Ok(()),
        false => Err(format!("{width}: past the row")),
    }
}

#[test]
fn a_cap_matches_its_twin_and_mistakes_are_noticed() {
    let mut random = Random::new("softcap");
    let Some(device) = device(Reduction::Lane) else { return };
    let cases = [(1, 30.0), (63, 30.0), (64, 0.5), (65, 50.0), (331, 1e4)];
    for case in cases {
        alone(&Alone::new(&device), &mut random, case).unwrap();
    }
    for change in [
        ("tanh(clamp(t, -15.0, 15.0))", "clamp(t, -1.0, 1.0)"),
        ("0.33333334", "0.33"),
        ("cap * select", "select"),
        ("(bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u", "true"),
        ("now.logit_rows * params.width", "now.logit_rows * params.width + 1u"),
    ] {
        let wrong = Alone::with(&device, change);
        let noticed = cases.iter().any(|case| alone(&wrong, &mut random, *case).is_err());
        assert!(noticed, "not noticed: {change:?}");
    }
}

#[test]
fn capped_logits_match_their_twin_in_pieces() {
    let mut random = Random::new("capped logits");
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        let (rows, cols, tokens) = (77, 64, 61);
        let (spec, bytes) = random.matrix(DType::Q8_0, rows, cols);
        let input = random.floats(tokens * cols);
        let mut want = vec![0.0; tokens * rows];
        linear(&input, Matrix::new(&spec, &bytes), None, &mut want);
        // The largest becomes 2 tanh(1/2) = 0.92 of it.
        let cap = 2.0 * want.iter().fold(0.0, |most: f32, logit| most.max(logit.abs()));
        softcap(&mut want, cap);
        let mut graph = Graph { vocab: rows, ..Graph::default() };
        let x = graph.buffer("x", cols);
        let weight = graph.weight("w", rows, cols);
        graph.ops.push(Op::Logits { x, weight, bias: None, softcap: Some(cap) });
        let capacity = Capacity { batch: tokens, context: tokens, kv: KvFormat::F32 };
        let mut gpu = backend(&device, &graph, capacity, &[(weight, spec, &bytes)]);
        gpu.limit(u64::MAX, 23);
        let zeros = vec![0; tokens];
        for (logits, from) in [(LogitRows::All, 0), (LogitRows::Last, tokens - 1)] {
            gpu.begin(&Step { tokens: &zeros, position: 0, logits }).unwrap();
            gpu.set(x, &input);
            gpu.run(0..1).unwrap();
            let got = gpu.logits().unwrap();
            let halves = device.cooperative() && logits == LogitRows::All;
            let tolerance = if halves { 3e-3 } else { 5e-6 };
            let what = format!("{reduction:?} {logits:?}");
            assert_close(&got, &want[from * rows..], tolerance, &what);
        }
    }
}
