//! Llama 4's own ops, compared with their twins: attention within chunks, queries that grow with their
//! position, an expert's weighed input.

use super::recurrent::vector;
use super::{BOTH, Random, assert_close, backend, device, run};
use crate::backend::{Capacity, KvFormat};
use crate::cpu::attention::{Attention, attention};
use crate::cpu::kv_write::{Cache, kv_write};
use crate::cpu::temper::temper;
use crate::cpu::weigh_input::weigh_input;
use crate::gpu::Reduction;
use crate::graph::{Graph, Kv, KvId, Op};

#[test]
fn a_token_sees_its_own_chunk() {
    let mut random = Random::new("chunks");
    let (kv, heads, kv_heads, head_dim, scale) = (KvId(0), 4, 2, 12, 0.4);
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        for chunk in [1, 7, 64, 70, 500] {
            let mut graph = Graph { vocab: 1, context_max: 192, ..Graph::default() };
            graph.kv.push(Kv { kv_heads, head_dim });
            let (q, out) =
                (graph.buffer("q", heads * head_dim), graph.buffer("out", heads * head_dim));
            let [k, v] = ["k", "v"].map(|name| graph.buffer(name, kv_heads * head_dim));
            graph.ops.push(Op::KvWrite { kv, k, v });
            graph.ops.push(Op::AttendChunk { kv, q, out, heads, scale, chunk });
            let capacity = Capacity { batch: 90, context: 192, kv: KvFormat::F32 };
            let mut gpu = backend(&device, &graph, capacity, &[]);
            let blocks = [0, 1, 2];
            let mut cache = Cache::new(kv_heads, head_dim, 3, KvFormat::F32);
            let mut position = 0;
            for tokens in [1, 90, 3, 40] {
                let qs = random.floats(tokens * heads * head_dim);
                let [ks, vs] = [(); 2].map(|()| random.floats(tokens * kv_heads * head_dim));
                kv_write(&ks, &vs, position, &blocks, &mut cache);
                let (window, softcap, chunk, causal) = (None, None, Some(chunk), true);
                let params = Attention { heads, scale, window, chunk, softcap, causal, position };
                let mut want = vec![0.0; qs.len()];
                attention(&qs, &cache, &blocks, &params, &mut want);
                let inputs = [(q, &qs[..]), (k, &ks[..]), (v, &vs[..])];
                let got = run(&mut gpu, &graph, tokens, position, &inputs, out);
                assert_close(&got, &want, 5e-6, &format!("{chunk:?}: {tokens} at {position}"));
                position += tokens;
            }
        }
    }
}

#[test]
fn a_row_is_scaled() {
    let mut random = Random::new("scale");
    let Some(device) = device(Reduction::Lane) else { return };
    let mut graph = Graph { vocab: 1, ..Graph::default() };
    let (x, weight) = (graph.buffer("x", 77), graph.weight("scale", 1, 1));
    graph.ops.push(Op::Scale { x, weight });
    let (spec, bytes) = vector(&[-1.75]);
    let capacity = Capacity { batch: 3, context: 3, kv: KvFormat::F32 };
    let mut gpu = backend(&device, &graph, capacity, &[(weight, spec, &bytes)]);
    let xs = random.floats(3 * 77);
    let mut want = xs.clone();
    crate::cpu::scale::scale(&mut want, -1.75);
    let got = run(&mut gpu, &graph, 3, 0, &[(x, &xs)], x);
    assert_close(&got, &want, 1e-7, "three rows");
}

#[test]
fn queries_grow_with_their_position_and_inputs_are_weighed() {
    let mut random = Random::new("temper");
    let Some(device) = device(Reduction::Lane) else { return };
    for (width, count) in [(64, 4), (77, 1), (5, 33)] {
        let mut graph = Graph { vocab: 1, context_max: 192, ..Graph::default() };
        let (x, out) = (graph.buffer("x", width), graph.buffer("out", width));
        let logits = graph.buffer("logits", count);
        graph.ops.push(Op::WeighInput { x, logits, out });
        graph.ops.push(Op::Temper { x: out, each: 8, scale: 0.1 });
        let capacity = Capacity { batch: 20, context: 192, kv: KvFormat::F32 };
        let mut gpu = backend(&device, &graph, capacity, &[]);
        for (tokens, position) in [(1, 0), (1, 7), (20, 100)] {
            let (xs, scores) = (random.floats(tokens * width), random.floats(tokens * count));
            let mut want = vec![0.0; tokens * width];
            weigh_input(&xs, &scores, count, &mut want);
            temper(&mut want, width, position, 8, 0.1);
            let inputs = [(x, &xs[..]), (logits, &scores[..])];
            let got = run(&mut gpu, &graph, tokens, position, &inputs, out);
            assert_close(&got, &want, 2e-6, &format!("{tokens} rows of {width} at {position}"));
        }
    }
    let mut one = [1.0; 3];
    temper(&mut one, 1, 6, 8, 0.5);
    let at = |steps: f32| 1.0 + 0.5 * (1.0 + steps).ln();
    assert_eq!(one, [1.0, at(1.0), at(1.0)]);
}
