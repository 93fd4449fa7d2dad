//! Splitting, folding and refusing: what happens at the device's limits.

use std::collections::HashSet;
use std::sync::Arc;

use super::experts::TinyMoe;
use super::{BOTH, Random, assert_close, backend, device, run};
use crate::backend::{
    Backend, BackendError, Capacity, Device, KvFormat, LogitRows, Ops, SlotClass, Step,
};
use crate::cpu::{embed::embed, linear::linear, matrix::Matrix};
use crate::gpu::executor::GpuBackend;
use crate::gpu::experts::Class;
use crate::gpu::{AdapterChoice, GpuDevice, Kernel, Reduction};
use crate::graph::{ExpertLayout, Graph, Kv, MatrixSpec, Op};
use doppler_store::DType;

#[test]
fn a_weight_beyond_a_binding_is_split_into_row_ranges() {
    let mut random = Random::new("split");
    let Some(device) = device(Reduction::Lane) else { return };
    for dtype in [DType::Q6K, DType::Q4K, DType::Bf16] {
        let (rows, cols) = (101, 512);
        let (spec, bytes) = random.matrix(dtype, rows, cols);
        let mut graph = Graph { vocab: rows, ..Graph::default() };
        let x = graph.buffer("x", cols);
        let weight = graph.weight("tied", rows, cols);
        graph.ops.push(Op::Embed { table: weight, out: x, scale: 1.0 });
        graph.ops.push(Op::Logits { x, weight, bias: None, softcap: None });
        let capacity = Capacity { batch: 5, context: 5, kv: KvFormat::F32 };
        let mut gpu = GpuBackend::new(device.clone(), Arc::new(graph.clone()), capacity).unwrap();
        // 13 rows a range, 2 rows of logits at a time.
        gpu.limit(13 * dtype.row_bytes(cols) as u64 + 5, 2);
        gpu.load_weight(weight, &spec, &bytes).unwrap();
        let tokens = [0, 12, 13, 100, 64];
        let mut rows_of = vec![0.0; 5 * cols];
        embed(&tokens, Matrix::new(&spec, &bytes), 1.0, &mut rows_of);
        let mut want = vec![0.0; 5 * rows];
        linear(&rows_of, Matrix::new(&spec, &bytes), None, &mut want);
        for (logits, from) in [(LogitRows::All, 0), (LogitRows::Last, 4), (LogitRows::None, 5)] {
            gpu.begin(&Step { tokens: &tokens, position: 0, logits }).unwrap();
            gpu.run(0..2).unwrap();
            let got = gpu.logits().unwrap();
            assert_close(&got, &want[from * rows..], 5e-6, &format!("{dtype} {logits:?}"));
            assert_close(&gpu.get(x, 5), &rows_of, 1e-6, "the embedding");
        }
    }
}

#[test]
fn more_workgroups_than_one_dimension_allows_fold_into_y() {
    let mut random = Random::new("fold");
    let Some(device) = device(Reduction::Group) else { return };
    let (rows, cols) = (70_001, 32);
    let (spec, bytes) = random.matrix(DType::Q8_0, rows, cols);
    let mut graph = Graph { vocab: 1, ..Graph::default() };
    let (x, out) = (graph.buffer("x", cols), graph.buffer("out", rows));
    let weight = graph.weight("w", rows, cols);
    graph.ops.push(Op::Linear { x, weight, bias: None, out });
    let capacity = Capacity { batch: 1, context: 1, kv: KvFormat::F32 };
    let mut gpu = backend(&device, &graph, capacity, &[(weight, spec, &bytes)]);
    let input = random.floats(cols);
    let mut want = vec![0.0; rows];
    linear(&input, Matrix::new(&spec, &bytes), None, &mut want);
    let got = run(&mut gpu, &graph, 1, 0, &[(x, &input)], out);
    assert_close(&got, &want, 3e-6, "70,001 rows");
}

/// Whether an error is that of a refused allocation.
fn out_of_memory(error: &BackendError) -> bool {
    matches!(error, BackendError::OutOfMemory { .. })
}

#[test]
fn an_allocation_that_cannot_be_is_an_error_and_the_next_step_works() {
    let mut random = Random::new("memory");
    let Some(device) = device(Reduction::Lane) else { return };
    let tiny = TinyMoe::new(&mut random, 64, 96, DType::Q8_0, DType::Q8_0);
    let graph = Arc::new(tiny.graph.clone());
    let capacity = Capacity { batch: 2, context: 8, kv: KvFormat::F32 };
    let mut gpu = GpuBackend::new(device.clone(), Arc::clone(&graph), capacity).unwrap();
    tiny.load(&mut gpu, 3);
    let before = tiny.step(&mut gpu, &[3, 4], 3);

    // Beyond any limit: activations, a cache, and sizes past u64.
    for batch in [1 << 40, usize::MAX] {
        let capacity = Capacity { batch, context: 8, kv: KvFormat::F32 };
        let error = device.backend(Arc::clone(&graph), capacity).err().unwrap();
        assert!(out_of_memory(&error), "{error}");
        assert!(!error.to_string().contains('\n'));
    }
    let mut deep = tiny.graph.clone();
    deep.kv.push(Kv { kv_heads: 64, head_dim: 128 });
    let capacity = Capacity { batch: 2, context: 1 << 30, kv: KvFormat::F32 };
    let error = device.backend(Arc::new(deep), capacity).err().unwrap();
    assert!(error.to_string().contains("KV cache"), "{error}");

    // Beyond the driver's limit: the same request without our own check first.
    let error = device
        .scoped("a test's buffer", 1 << 60, |wgpu| {
            wgpu.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: 1 << 60,
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            })
        })
        .err()
        .unwrap();
    println!("the driver's own refusal: {error}");

    assert_eq!(tiny.step(&mut gpu, &[3, 4], 3), before);
    // Slots for more experts than fit the memory are refused; then a few are possible again.
    let class = SlotClass { layout: tiny.layout, count: usize::MAX };
    assert!(out_of_memory(&gpu.alloc_slots(&[class], &[0]).unwrap_err()));
    tiny.load(&mut gpu, 3);
    assert_eq!(tiny.step(&mut gpu, &[3, 4], 3), before);
}

#[test]
fn what_no_kernel_does_is_refused_and_names_itself() {
    let mut random = Random::new("refusals");
    let Some(device) = device(Reduction::Lane) else { return };
    let mut graph = Graph { vocab: 9, ..Graph::default() };
    let (x, y) = (graph.buffer("x", 64), graph.buffer("y", 64));
    let norm = graph.weight("the.norm", 1, 64);
    let square = graph.weight("the.square", 64, 64);
    graph.ops.push(Op::RmsNorm { x, weight: norm, out: y, eps: 1e-5 });
    graph.ops.push(Op::Linear { x: y, weight: square, bias: None, out: x });
    let capacity = Capacity { batch: 3, context: 8, kv: KvFormat::F32 };
    let mut gpu = backend(&device, &graph, capacity, &[]);
    let step = |tokens, position| Step { tokens, position, logits: LogitRows::None };
    let refused = |result: Result<(), BackendError>, part: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{error}");
    };
    refused(gpu.begin(&step(&[0], 0)), "the.norm was never loaded");
    let (spec, bytes) = random.matrix(DType::Q8_0, 1, 64);
    refused(gpu.load_weight(norm, &spec, &bytes), "stored as Q8_0");
    let (spec, bytes) = random.matrix(DType::F16, 1, 64);
    gpu.load_weight(norm, &spec, &bytes).unwrap();
    let (spec, bytes) = random.matrix(DType::Q5_0, 64, 64);
    refused(gpu.load_weight(square, &spec, &bytes[1..]), "the.square");
    gpu.load_weight(square, &spec, &bytes).unwrap();
    refused(gpu.begin(&step(&[], 0)), "0 tokens");
    refused(gpu.begin(&step(&[1; 4], 0)), "4 tokens");
    refused(gpu.begin(&step(&[1, 2], 7)), "context of 8");
    refused(gpu.begin(&step(&[1], usize::MAX)), "context of 8");
    refused(gpu.begin(&step(&[9], 0)), "token 9");
    refused(gpu.run(0..3), "op 2");
    gpu.begin(&step(&[8], 7)).unwrap();
    gpu.run(0..2).unwrap();

    // Shapes that do not fit, and an op that would read what it writes.
    let wide = MatrixSpec { dtype: DType::F32, rows: 64, cols: 64, offset: 0 };
    graph.ops[1] = Op::Linear { x, weight: square, bias: None, out: x };
    let weights =
        [(norm, MatrixSpec { rows: 1, ..wide }, &[0; 256][..]), (square, wide, &[0; 16384])];
    let mut gpu = backend(&device, &graph, capacity, &weights);
    refused(gpu.begin(&step(&[1], 0)), "reads the buffer it writes");
    graph.kv.push(Kv { kv_heads: 2, head_dim: 6 });
    let kv = crate::graph::KvId(0);
    graph.ops[1] = Op::Attention {
        kv,
        q: x,
        out: y,
        heads: 4,
        scale: 1.0,
        window: None,
        softcap: None,
        causal: true,
    };
    // Reported in words, before a weight is loaded.
    let made = GpuBackend::new(device.clone(), Arc::new(graph.clone()), capacity).map(drop);
    refused(made, "attention heads of 6 elements (a GPU takes multiples of 4");
    graph.kv[0].head_dim = 8;
    graph.ops[1] = Op::Attention {
        kv,
        q: x,
        out: y,
        heads: 4,
        scale: 1.0,
        window: None,
        softcap: None,
        causal: true,
    };
    let mut gpu = backend(&device, &graph, capacity, &weights);
    refused(gpu.begin(&step(&[1], 0)), "attention of these sizes");
    let matrix = |dtype, offset| MatrixSpec { dtype, rows: 32, cols: 32, offset };
    let layout = ExpertLayout {
        gate: matrix(DType::F32, 0),
        up: matrix(DType::F16, 4096),
        down: matrix(DType::F32, 6144),
        bytes: 10240,
    };
    let made = Class::new(&SlotClass { layout, count: 1 }, 0, 1 << 27).map(drop);
    refused(made, "gate matrices are F32 and whose up matrices are F16");
}

#[test]
fn every_kernel_becomes_a_pipeline_on_this_adapter() {
    // A pipeline of the same text is the same on the second device.
    let mut made = HashSet::new();
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        for kernel in crate::gpu::KERNELS {
            let takes = device.pipelines().takes(kernel);
            if takes && !made.insert(kernel.name) {
                continue;
            }
            let pipeline = device.pipelines().get(&device, kernel.name);
            match takes {
                true => drop(pipeline.unwrap()),
                false => assert!(matches!(pipeline, Err(BackendError::Unsupported(_)))),
            }
        }
        assert!(device.pipelines().get(&device, "no_such_kernel").is_err());
    }
    assert!(Kernel::find("attention_f16").is_some());
}

#[test]
fn a_lost_device_is_an_error_from_then_on_and_another_one_works() {
    let mut random = Random::new("lost");
    if device(Reduction::Lane).is_none() {
        return;
    }
    let tiny = TinyMoe::new(&mut random, 64, 96, DType::Bf16, DType::Bf16);
    let capacity = Capacity { batch: 2, context: 8, kv: KvFormat::F32 };
    let open = || {
        let device = GpuDevice::open(AdapterChoice::Any).unwrap();
        let mut gpu =
            GpuBackend::new(device.clone(), Arc::new(tiny.graph.clone()), capacity).unwrap();
        tiny.load(&mut gpu, 3);
        (device, gpu)
    };
    let (device, mut gpu) = open();
    tiny.begin(&mut gpu, &[1]);
    device.wgpu().destroy();
    // The first call that encounters the loss reports it, and so do all later ones.
    let lost = |error: &BackendError| matches!(error, BackendError::Lost(_));
    let met = gpu
        .routing(super::experts::EXPERTS_OP)
        .and_then(|_| gpu.begin(&Step { tokens: &[1], position: 0, logits: LogitRows::Last }))
        .and_then(|()| gpu.run(0..1));
    let error = met.unwrap_err();
    assert!(lost(&error), "{error}");
    assert!(lost(&gpu.logits().and_then(|_| device.flush()).unwrap_err()));
    assert!(lost(&device.backend(Arc::new(tiny.graph.clone()), capacity).err().unwrap()));

    let (_device, mut gpu) = open();
    assert_eq!(tiny.step(&mut gpu, &[1, 2], 3).len(), 22);
}

/// The driver's compiled kernels are kept. Whatever the file contains later, kernels run.
#[test]
fn compiled_kernels_are_kept_and_a_foreign_file_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let opened = || {
        let device = GpuDevice::open_with(AdapterChoice::Software, Some(Reduction::Group));
        let Ok(device) = device else {
            println!("skipped: no software adapter");
            return None;
        };
        device.keep_pipelines(dir.path());
        Some(device)
    };
    let mut random = Random::new("compiled kernels");
    let (spec, bytes) = random.matrix(DType::Q4K, 33, 256);
    let input = random.floats(256);
    let mut want = vec![0.0; 33];
    linear(&input, Matrix::new(&spec, &bytes), None, &mut want);
    let computes = |device: &GpuDevice| {
        let mut graph = Graph { vocab: 1, ..Graph::default() };
        let (x, out) = (graph.buffer("x", 256), graph.buffer("out", 33));
        let weight = graph.weight("w", 33, 256);
        graph.ops.push(Op::Linear { x, weight, bias: None, out });
        let capacity = Capacity { batch: 1, context: 1, kv: KvFormat::F32 };
        let mut gpu = backend(device, &graph, capacity, &[(weight, spec, &bytes[..])]);
        assert_close(&run(&mut gpu, &graph, 1, 0, &[(x, &input)], out), &want, 5e-6, "linear");
    };
    let Some(device) = opened() else { return };
    computes(&device);
    let files = || {
        let files = std::fs::read_dir(dir.path()).unwrap();
        files.map(|file| file.unwrap().path()).collect::<Vec<_>>()
    };
    let [file] = files().try_into().expect("one file for the adapter");
    let kept = std::fs::read(&file).unwrap();
    assert!(kept.len() > blake3::OUT_LEN);
    // From another driver: complete, but not this driver's own.
    let mut foreign = kept[blake3::OUT_LEN..].to_vec();
    foreign.iter_mut().take(40).for_each(|byte| *byte ^= 0x5a);
    let foreign = [blake3::hash(&foreign).as_bytes().as_slice(), &foreign].concat();
    for found in [kept.clone(), kept[..kept.len() - 1].to_vec(), foreign] {
        std::fs::write(&file, &found).unwrap();
        computes(&opened().unwrap());
        assert_eq!(files(), std::slice::from_ref(&file));
    }
}
