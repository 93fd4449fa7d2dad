//! gpt-oss's own kernels for several tokens, compared with their twins: attention with sinks, experts
//! with biases.

use std::sync::Arc;

use super::experts::{EXPERTS, TinyMoe, VOCAB};
use super::models::{PROMPT, logits, rel};
use super::recurrent::vector;
use super::{BOTH, Random, assert_close, backend, device, run};
use crate::backend::{Backend, Capacity, Device, KvFormat};
use crate::check::REL_MAX;
use crate::cpu::attention::{Attention, attention};
use crate::cpu::attention_sinks_tile::attention_sinks_tile;
use crate::cpu::kv_write::{Cache, kv_write};
use crate::cpu::{CpuBackend, CpuDevice};
use crate::engine::LoadOptions;
use crate::gpu::Reduction;
use crate::gpu::executor::GpuBackend;
use crate::graph::{Activation, ExpertBiases, Graph, Kv, KvId, Op};
use crate::load::{Quantization, SHARD_BYTES_DEFAULT};
use crate::session::Session;
use crate::slots::SlotBudget;
use crate::testing::converted;
use doppler_store::DType;
use doppler_testing::root;

#[test]
fn a_sink_takes_its_part_of_each_head() {
    let mut random = Random::new("sinks");
    let (kv, scale) = (KvId(0), 0.4);
    for (reduction, format) in [BOTH[0], BOTH[1]].into_iter().zip([KvFormat::F16, KvFormat::F32]) {
        let Some(device) = device(reduction) else { return };
        for (heads, kv_heads, head_dim, window) in
            [(4, 2, 12, None), (6, 2, 64, Some(33)), (3, 1, 136, Some(7))]
        {
            let mut graph = Graph { vocab: 1, context_max: 192, ..Graph::default() };
            graph.kv.push(Kv { kv_heads, head_dim });
            let (q, out) =
                (graph.buffer("q", heads * head_dim), graph.buffer("out", heads * head_dim));
            let [k, v] = ["k", "v"].map(|name| graph.buffer(name, kv_heads * head_dim));
            let sinks = graph.weight("sinks", 1, heads);
            graph.ops.push(Op::KvWrite { kv, k, v });
            graph.ops.push(Op::AttendSinks { kv, q, out, heads, scale, window, sinks });
            let capacity = Capacity { batch: 90, context: 192, kv: format };
            let sunk: Vec<f32> = (0..heads).map(|head| head as f32 - random.float()).collect();
            let (spec, bytes) = vector(&sunk);
            let mut gpu = backend(&device, &graph, capacity, &[(sinks, spec, &bytes)]);
            let blocks = [0, 1, 2];
            let mut cache = Cache::new(kv_heads, head_dim, 3, format);
            let mut position = 0;
            for tokens in [1, 90, 3, 40] {
                let qs = random.floats(tokens * heads * head_dim);
                let mut more = || random.floats(tokens * kv_heads * head_dim);
                // Exact in half precision.
                let half = |x: f32| half::f16::from_f32(x).to_f32();
                let [ks, vs] = [(); 2].map(|()| more().into_iter().map(half).collect::<Vec<_>>());
                kv_write(&ks, &vs, position, &blocks, &mut cache);
                let (softcap, chunk, causal) = (None, None, true);
                let params = Attention { heads, scale, window, chunk, softcap, causal, position };
                let mut want = vec![0.0; qs.len()];
                attention_sinks_tile(&qs, &cache, &blocks, &params, &sunk, &mut want);
                let mut without = vec![0.0; qs.len()];
                attention(&qs, &cache, &blocks, &params, &mut without);
                // Whole heads, because single values that nearly cancel keep only rounding.
                let length = |head: &[f32]| head.iter().map(|x| f64::from(x * x)).sum::<f64>();
                for (head, plain) in want.chunks(head_dim).zip(without.chunks(head_dim)) {
                    assert!(length(head) < length(plain), "a sink takes weight from every head");
                }
                let inputs = [(q, &qs[..]), (k, &ks[..]), (v, &vs[..])];
                let got = run(&mut gpu, &graph, tokens, position, &inputs, out);
                let what = format!("{reduction:?} {head_dim}: {tokens} at {position}");
                assert_close(&got, &want, 5e-6, &what);
                position += tokens;
            }
        }
    }
}

/// A few tokens and many, in waves, op by op.
#[test]
fn experts_with_biases_match_the_cpu_and_waves_change_no_bit() {
    let mut random = Random::new("biased experts");
    let capacity = Capacity { batch: 67, context: 128, kv: KvFormat::F32 };
    for (reduction, inner, outer, activation) in [
        (Reduction::Lane, DType::Bf16, DType::F32, Activation::Clamped),
        (Reduction::Group, DType::F32, DType::Bf16, Activation::Silu),
    ] {
        let Some(device) = device(reduction) else { return };
        let (hidden, ff) = (96, 161);
        let mut tiny = TinyMoe::new(&mut random, hidden, ff, inner, outer);
        let gate_up = tiny.graph.weight("gate_up", 1, EXPERTS * 2 * ff);
        let down = tiny.graph.weight("down", 1, EXPERTS * hidden);
        tiny.graph.moe[0].activation = activation;
        tiny.graph.moe[0].biases = Some(ExpertBiases { gate_up, down });
        for (id, len) in [(gate_up, EXPERTS * 2 * ff), (down, EXPERTS * hidden)] {
            let values: Vec<f32> = (0..len).map(|_| 8.0 * random.float()).collect();
            let (spec, bytes) = vector(&values);
            tiny.weights.push((id, spec, bytes));
        }
        let graph = Arc::new(tiny.graph.clone());
        let mut cpu = CpuBackend::new(Arc::clone(&graph), capacity);
        tiny.load(&mut cpu, EXPERTS);
        let mut gpu = GpuBackend::new(device.clone(), graph, capacity).unwrap();
        let stride = gpu.slot_bytes(&tiny.layout);
        gpu.limit(stride * 3 + 16, 70);
        tiny.load(&mut gpu, EXPERTS);
        for tokens in [1, 5, 67] {
            let tokens: Vec<u32> = (0..tokens).map(|_| random.below(VOCAB) as u32).collect();
            let want = tiny.step(&mut cpu, &tokens, EXPERTS);
            let got = tiny.step(&mut gpu, &tokens, EXPERTS);
            assert_close(&got, &want, 1e-5, &format!("{} in {inner} {reduction:?}", tokens.len()));
            assert_eq!(got, tiny.step(&mut gpu, &tokens, 3), "in waves");
        }
    }
}

#[test]
fn single_tokens_agree_with_the_cpu_and_paging_changes_no_bit() {
    single_tokens(Quantization::Keep);
}

#[test]
fn single_tokens_in_mxfp4_agree_with_the_cpu_and_paging_changes_no_bit() {
    single_tokens(Quantization::Mxfp4Moe);
}

/// Single tokens over a half-precision cache: on the fused kernels, with experts resident, paged, and
/// fetched from host memory; and on a software adapter's.
fn single_tokens(quantization: Quantization) {
    let dir = root().join("tests/data/goldens/gpt-oss");
    let model = converted(&dir, quantization, SHARD_BYTES_DEFAULT);
    // Always the same, because with others two experts may nearly tie.
    let tokens: Vec<u32> = (0..PROMPT as u32 + 20).map(|i| (37 * i + 11) % 320).collect();
    let make = |device: &dyn Device, slots, host_bytes| {
        let (context, batch, kv) = (Some(80), PROMPT, KvFormat::F16);
        let options =
            LoadOptions { context, batch, slots, kv, host_bytes, ..LoadOptions::default() };
        Session::new(&model, device, &options).unwrap()
    };
    let want = logits(&mut make(&CpuDevice, SlotBudget::All, 0), &tokens);
    let half = SlotBudget::Experts(model.experts() / 2);
    let paged = logits(&mut make(&CpuDevice, half, 0), &tokens);
    assert!(paged == want, "paging changed the logits");
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        let got = logits(&mut make(&device, SlotBudget::All, 0), &tokens);
        let vocab = model.graph.vocab;
        let pairs = got.chunks_exact(vocab).zip(want.chunks_exact(vocab));
        let rels: Vec<f64> = pairs.map(|(got, want)| rel(got, want)).collect();
        let most = rels.iter().copied().fold(0.0, f64::max);
        println!("{reduction:?}: rel {most:.2e}");
        assert!(most <= REL_MAX, "{reduction:?}: {rels:?}");
        for host_bytes in [0, 1 << 30] {
            let paged = logits(&mut make(&device, half, host_bytes), &tokens);
            assert!(paged == got, "{reduction:?}, {host_bytes}: paging changed the logits");
        }
    }
}

#[test]
fn a_clamped_gate_is_refused_where_no_kernel_computes_it() {
    let mut random = Random::new("clamped");
    let Some(device) = device(Reduction::Lane) else { return };
    let mut tiny = TinyMoe::new(&mut random, 32, 32, DType::F32, DType::F32);
    tiny.graph.moe[0].activation = Activation::Clamped;
    let capacity = Capacity { batch: 1, context: 64, kv: KvFormat::F32 };
    let refused = GpuBackend::new(device, Arc::new(tiny.graph), capacity).err().unwrap();
    assert!(refused.to_string().contains("biases"), "{refused}");
}
