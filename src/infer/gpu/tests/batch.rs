//! The forms for many tokens against their twins: tiles that rows and tokens do not fill.

use super::{BOTH, Random, assert_close, backend, device, run};
use crate::infer::backend::{Backend, Capacity, KvFormat, LogitRows, Step};
use crate::infer::cpu::{linear_tile::linear_tile, matrix::Matrix};
use crate::infer::graph::{Graph, MatrixSpec, Op};
use crate::store::DType;

const CAPACITY: Capacity = Capacity { batch: 70, context: 200, kv: KvFormat::F32 };

/// Odd counts of rows on both sides of a tile's 64, and columns that are no whole number of blocks.
fn shapes(dtype: DType) -> [(usize, usize); 3] {
    match dtype.block_len() {
        256 => [(67, 512), (3, 256), (130, 300)],
        32 => [(67, 96), (3, 32), (130, 80)],
        _ => [(67, 33), (3, 7), (130, 256)],
    }
}

#[test]
fn linear_over_many_tokens_matches_its_twin_in_every_format() {
    let mut random = Random::new("linear batch");
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        for dtype in DType::ALL {
            for ((rows, cols), biased) in shapes(dtype).into_iter().zip([false, true, true]) {
                let (spec, bytes) = random.matrix(dtype, rows, cols);
                let bias = random.floats(rows);
                let mut graph = Graph { vocab: 1, ..Graph::default() };
                let (x, out) = (graph.buffer("x", cols), graph.buffer("out", rows));
                let weight = graph.weight("w", rows, cols);
                let bias_id = graph.weight("b", 1, rows);
                graph.ops.push(Op::Linear { x, weight, bias: biased.then_some(bias_id), out });
                let bias_spec = MatrixSpec { dtype: DType::F32, rows: 1, cols: rows, offset: 0 };
                let bias_bytes: &[u8] = bytemuck::cast_slice(&bias);
                let weights = [(weight, spec, &bytes[..]), (bias_id, bias_spec, bias_bytes)];
                let mut gpu = backend(&device, &graph, CAPACITY, &weights);
                for tokens in [2, 3, 15, 16, 33, 64, 70] {
                    let input = random.floats(tokens * cols);
                    let mut want = vec![0.0; tokens * rows];
                    let matrix = Matrix::new(&spec, &bytes);
                    linear_tile(&input, matrix, biased.then_some(&bias[..]), &mut want);
                    let got = run(&mut gpu, &graph, tokens, 0, &[(x, &input)], out);
                    let what = format!("{dtype} {rows}x{cols} T={tokens} {reduction:?}");
                    assert_close(&got, &want, 3e-6, &what);
                }
            }
        }
    }
}

/// Logits come in pieces, each from its own first row.
#[test]
fn logits_of_many_rows_match_their_twin_in_pieces() {
    let mut random = Random::new("logits batch");
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        let (rows, cols, tokens) = (77, 64, 61);
        let (spec, bytes) = random.matrix(DType::Q8_0, rows, cols);
        let mut graph = Graph { vocab: rows, ..Graph::default() };
        let x = graph.buffer("x", cols);
        let weight = graph.weight("w", rows, cols);
        graph.ops.push(Op::Logits { x, weight });
        let mut gpu = backend(&device, &graph, CAPACITY, &[(weight, spec, &bytes)]);
        gpu.limit(u64::MAX, 23);
        let input = random.floats(tokens * cols);
        let mut want = vec![0.0; tokens * rows];
        linear_tile(&input, Matrix::new(&spec, &bytes), None, &mut want);
        let zeros = vec![0; tokens];
        gpu.begin(&Step { tokens: &zeros, position: 0, logits: LogitRows::All }).unwrap();
        gpu.set(x, &input);
        gpu.run(0..1).unwrap();
        assert_close(&gpu.logits().unwrap(), &want, 3e-6, &format!("{reduction:?}"));
    }
}
