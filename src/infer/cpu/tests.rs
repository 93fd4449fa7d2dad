//! Each twin against a plain f64 computation, on random data of odd shapes.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::attention::{Attention, attention};
use super::kv_write::{Cache, kv_write};
use super::matrix::Matrix;
use super::{
    add, embed, expert_down, expert_gate_up, expert_sum, gated, linear, rms_norm, rope, route,
};
use crate::backend::KvFormat;
use crate::graph::{Activation, ExpertLayout, MatrixSpec, Rope, Scoring};
use crate::quant::{dequantize, quantize};
use doppler_store::DType;

fn rng() -> StdRng {
    let seed = rand::random();
    println!("seed {seed}");
    StdRng::seed_from_u64(seed)
}

fn random(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Within the f32 rounding of sums of this length.
fn assert_close(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-3_f64, |max, x| max.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - want).abs() / scale;
        assert!(error < 2e-5, "element {i}: {got} for {want}, {error:e} of the largest");
    }
}

/// A random stored matrix, and its values.
fn matrix(
    rng: &mut StdRng,
    dtype: DType,
    rows: usize,
    cols: usize,
) -> (MatrixSpec, Vec<u8>, Vec<f64>) {
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    let mut stored = vec![0.0; cols];
    for _ in 0..rows {
        let at = bytes.len();
        quantize(dtype, &random(rng, cols), &mut bytes).unwrap();
        dequantize(dtype, &bytes[at..], cols, &mut stored);
        values.extend(stored.iter().copied().map(f64::from));
    }
    (MatrixSpec { dtype, rows, cols, offset: 0 }, bytes, values)
}

/// `x . weight^T` in f64.
fn product(x: &[f32], weight: &[f64], cols: usize) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f64]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * w).sum();
    x.chunks(cols).flat_map(|x| weight.chunks(cols).map(move |w| dot(x, w))).collect()
}

#[test]
fn linear_is_a_product_in_every_format_and_batch_size() {
    let mut rng = rng();
    for dtype in DType::ALL {
        for (rows, cols, tokens) in
            [(1, 1, 1), (3, 5, 2), (67, 300, 1), (35, 777, 5), (300, 520, 3)]
        {
            let (spec, bytes, values) = matrix(&mut rng, dtype, rows, cols);
            let (x, bias) = (random(&mut rng, tokens * cols), random(&mut rng, rows));
            let mut out = vec![f32::NAN; tokens * rows];
            linear::linear(&x, Matrix::new(&spec, &bytes), None, &mut out);
            let mut want = product(&x, &values, cols);
            assert_close(&out, &want);
            linear::linear(&x, Matrix::new(&spec, &bytes), Some(&bias), &mut out);
            want.iter_mut().enumerate().for_each(|(i, x)| *x += f64::from(bias[i % rows]));
            assert_close(&out, &want);
        }
    }
}

#[test]
fn linear_gives_the_same_bits_on_any_number_of_threads() {
    let mut rng = rng();
    for dtype in DType::ALL {
        let (rows, cols) = (701, 512); // enough work for several threads
        let (spec, bytes, _) = matrix(&mut rng, dtype, rows, cols);
        let x = random(&mut rng, cols);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![f32::NAN; rows];
            pool.install(|| linear::linear(&x, Matrix::new(&spec, &bytes), None, &mut out));
            out.iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
        };
        let one = on(1);
        assert!([2, 3, 7].into_iter().all(|threads| on(threads) == one), "{dtype}");
    }
}

#[test]
fn embed_reads_rows_of_any_format() {
    let mut rng = rng();
    for dtype in DType::ALL {
        let (spec, bytes, values) = matrix(&mut rng, dtype, 9, 33);
        let mut out = vec![f32::NAN; 3 * 33];
        embed::embed(&[8, 0, 8], Matrix::new(&spec, &bytes), 2.5, &mut out);
        let rows = [8, 0, 8].into_iter().flat_map(|t| &values[t * 33..(t + 1) * 33]);
        assert_close(&out, &rows.map(|x| x * 2.5).collect::<Vec<_>>());
    }
}

#[test]
fn rms_norm_normalises_each_group() {
    let mut rng = rng();
    for (groups, width) in [(1, 1), (3, 7), (5, 130)] {
        let (mut x, weight) = (random(&mut rng, groups * width), random(&mut rng, width));
        let want = x.chunks(width).flat_map(|row| {
            let squares = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            let scale = (squares / width as f64 + 1e-5).sqrt();
            row.iter().zip(&weight).map(move |(x, w)| f64::from(*x) / scale * f64::from(*w))
        });
        let want: Vec<f64> = want.collect();
        rms_norm::rms_norm(&mut x, &weight, 1e-5);
        assert_close(&x, &want);
    }
}

#[test]
fn rope_turns_pairs_half_a_head_apart() {
    let mut rng = rng();
    let (heads, head_dim, half, position, tokens) = (3, 14, 5, 37, 4);
    let spec = Rope { inv_freq: random(&mut rng, half), attention_factor: 1.25, long: None };
    let mut x = random(&mut rng, tokens * heads * head_dim);
    let mut want: Vec<f64> = x.iter().copied().map(f64::from).collect();
    for (t, row) in want.chunks_mut(heads * head_dim).enumerate() {
        for head in row.chunks_mut(head_dim) {
            for i in 0..half {
                // The product is computed in f32, as in every implementation.
                let angle = f64::from((position + t) as f32 * spec.inv_freq[i]);
                let (a, b) = (head[i], head[i + half]);
                head[i] = 1.25 * (a * angle.cos() - b * angle.sin());
                head[i + half] = 1.25 * (b * angle.cos() + a * angle.sin());
            }
        }
    }
    let angles = rope::Angles::new(&spec, false, position..position + tokens);
    rope::rope(&mut x, heads, head_dim, half, &angles);
    assert_close(&x, &want);
}

#[test]
fn attention_sees_the_cache_up_to_each_token_and_no_further_back_than_its_window() {
    let mut rng = rng();
    for (heads, kv_heads, head_dim, window, softcap) in
        [(4, 2, 10, None, None), (6, 2, 17, Some(5), Some(0.4)), (3, 1, 64, Some(1), None)]
    {
        // The batch's own positions are in two blocks, which are out of order.
        let (old, tokens, blocks) = (61, 6, [2, 0]);
        let width = kv_heads * head_dim;
        let (k, v) = (random(&mut rng, 67 * width), random(&mut rng, 67 * width));
        let mut cache = Cache::new(kv_heads, head_dim, 3, KvFormat::F32);
        kv_write(&k[..old * width], &v[..old * width], 0, &blocks, &mut cache);
        kv_write(&k[old * width..], &v[old * width..], old, &blocks, &mut cache);
        let q = random(&mut rng, tokens * heads * head_dim);
        let mut out = vec![f32::NAN; q.len()];
        let (scale, chunk, causal, position) = (0.3, None, true, old);
        let params = Attention { heads, scale, window, chunk, softcap, causal, position };
        attention(&q, &cache, &blocks, &params, &mut out);

        let mut want = Vec::new();
        for (i, q) in q.chunks(head_dim).enumerate() {
            let (position, kv_head) = (old + i / heads, (i % heads) / (heads / kv_heads));
            let start = window.map_or(0, |w: usize| (position + 1).saturating_sub(w));
            let at =
                |of: &[f32], p: usize, d: usize| f64::from(of[p * width + kv_head * head_dim + d]);
            let score = |p: usize| {
                let dot: f64 = (0..head_dim).map(|d| f64::from(q[d]) * at(&k, p, d)).sum();
                let cap = softcap.map_or(f64::INFINITY, f64::from);
                let score = 0.3 * dot;
                if cap.is_finite() { cap * (score / cap).tanh() } else { score }.exp()
            };
            let scores: Vec<(usize, f64)> = (start..=position).map(|p| (p, score(p))).collect();
            let sum: f64 = scores.iter().map(|(_, s)| s).sum();
            want.extend(
                (0..head_dim)
                    .map(|d| scores.iter().map(|(p, s)| s / sum * at(&v, *p, d)).sum::<f64>()),
            );
        }
        assert_close(&out, &want);
    }
}

const ALL_ACTIVATIONS: [Activation; 5] = [
    Activation::Silu,
    Activation::GeluTanh,
    Activation::Gelu,
    Activation::SquaredRelu,
    Activation::Tanh,
];

fn activated(x: f64, activation: Activation) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Activation::Clamped => unreachable!("it needs gate and up"),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + libm::erf(x / 2.0f64.sqrt())),
        Activation::SquaredRelu => x.max(0.0).powi(2),
        Activation::Tanh => x.tanh(),
    }
}

#[test]
fn gated_and_add_work_element_by_element() {
    let mut rng = rng();
    for activation in ALL_ACTIVATIONS {
        let (gate, up) = (random(&mut rng, 77), random(&mut rng, 77));
        let pairs = gate.iter().zip(&up);
        let want: Vec<f64> = pairs
            .map(|(g, u)| activated(4.0 * f64::from(*g), activation) * f64::from(*u))
            .collect();
        let mut out: Vec<f32> = gate.iter().map(|x| 4.0 * x).collect();
        gated::gated(&mut out, &up, activation);
        assert_close(&out, &want);
        add::add(&mut out, &up);
        let sums: Vec<f64> = want.iter().zip(&up).map(|(a, b)| a + f64::from(*b)).collect();
        assert_close(&out, &sums);
    }
}

#[test]
fn route_takes_the_highest_logits_and_breaks_ties_by_number() {
    let mut rng = rng();
    for (experts, top_k) in [(1, 1), (7, 3), (16, 16), (60, 4)] {
        let mut logits = random(&mut rng, 5 * experts);
        // Equal logits, so that ties occur. Adding zero turns -0 into 0; for the router they tie.
        logits.iter_mut().for_each(|x| *x = (*x * 4.0).round() + 0.0);
        for renormalise in [true, false] {
            let (mut ids, mut weights) = (vec![0; 5 * top_k], vec![0.0; 5 * top_k]);
            let scoring = Scoring::Softmax { renormalise };
            route::route(&logits, None, experts, scoring, &mut ids, &mut weights, top_k);
            for (t, row) in logits.chunks(experts).enumerate() {
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|a, b| row[*b].total_cmp(&row[*a])); // stable: ties by id
                let ids: Vec<usize> =
                    ids[t * top_k..(t + 1) * top_k].iter().map(|id| *id as usize).collect();
                assert_eq!(ids, order[..top_k]);
                let exp = |id: &usize| f64::from(row[*id]).exp();
                let chosen: f64 = ids.iter().map(exp).sum();
                let all: f64 = order.iter().map(exp).sum();
                let sum = if renormalise { chosen } else { all };
                let want: Vec<f64> = ids.iter().map(|id| exp(id) / sum).collect();
                assert_close(&weights[t * top_k..(t + 1) * top_k], &want);
            }
        }
    }
}

#[test]
fn an_expert_is_gate_up_down_and_the_sum_goes_by_choice() {
    let mut rng = rng();
    let (hidden, ff, tokens, top_k) = (37, 53, 3, 2);
    let (gate, gate_bytes, gate_values) = matrix(&mut rng, DType::Q8_0, ff, hidden);
    let (up, up_bytes, up_values) = matrix(&mut rng, DType::Bf16, ff, hidden);
    let (down, down_bytes, down_values) = matrix(&mut rng, DType::Q5_0, hidden, ff);
    let mut expert = gate_bytes;
    let up = MatrixSpec { offset: expert.len(), ..up };
    expert.extend(up_bytes);
    expert.extend([0xff; 3]); // a gap, never read
    let down = MatrixSpec { offset: expert.len(), ..down };
    expert.extend(down_bytes);
    let layout = ExpertLayout { gate, up, down, bytes: expert.len() };
    let x = random(&mut rng, tokens * hidden);
    let inner = expert_gate_up::expert_gate_up(&x, &layout, &expert, Activation::Silu, false);
    let ups = product(&x, &up_values, hidden);
    let gates = product(&x, &gate_values, hidden);
    let want: Vec<f64> =
        gates.iter().zip(&ups).map(|(g, u)| activated(*g, Activation::Silu) * u).collect();
    assert_close(&inner, &want);
    let out = expert_down::expert_down(&inner, &layout, &expert, false);
    assert_close(&out, &product(&inner, &down_values, ff));

    let (pairs, weights) =
        (random(&mut rng, tokens * top_k * hidden), random(&mut rng, tokens * top_k));
    let mut sum = vec![f32::NAN; tokens * hidden];
    expert_sum::expert_sum(&pairs, &weights, top_k, &mut sum);
    let at = |t: usize, j: usize, i: usize| f64::from(pairs[(t * top_k + j) * hidden + i]);
    let term = |t: usize, j: usize, i: usize| f64::from(weights[t * top_k + j]) * at(t, j, i);
    let sums =
        (0..tokens * hidden).map(|n| (0..top_k).map(|j| term(n / hidden, j, n % hidden)).sum());
    assert_close(&sum, &sums.collect::<Vec<f64>>());
}

/// Run by hand: `cargo test --release --lib matvec_speed -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a check"]
fn matvec_speed() {
    let mut rng = rng();
    for dtype in DType::ALL {
        let (rows, cols) = (2048, 4096);
        let mut row = Vec::new();
        quantize(dtype, &random(&mut rng, cols), &mut row).unwrap();
        let bytes = row.repeat(rows);
        let spec = MatrixSpec { dtype, rows, cols, offset: 0 };
        for tokens in [1, 32] {
            let x = random(&mut rng, tokens * cols);
            let mut out = vec![0.0; tokens * rows];
            let mut best = f64::INFINITY;
            for _ in 0..20 {
                let started = std::time::Instant::now();
                linear::linear(&x, Matrix::new(&spec, &bytes), None, &mut out);
                best = best.min(started.elapsed().as_secs_f64());
            }
            let weights = (rows * cols * tokens) as f64 / best / 1e9;
            println!("{dtype} x {tokens}: {:.2} ms, {weights:.1} G weights/s", best * 1e3);
        }
    }
}
