//! Compares the kernels with their CPU twins, on a software Vulkan adapter.
//!
//! Without an adapter, a test prints why it is skipped and passes, unless `DOPPLER_REQUIRE_GPU=1`.
//! Data is random; `DOPPLER_TEST_SEED` repeats a run.

mod adapters;
mod add_gated;
mod alone;
mod batch;
mod coop;
mod decode;
mod encoder;
mod experts;
mod fetch;
mod finite;
mod gpt_oss;
mod head_bias;
mod kernels;
mod limits;
mod llama4;
mod models;
mod odd;
mod recurrent;
mod sample;
mod softcap;
mod together;
pub(crate) mod token;

use std::sync::{Arc, OnceLock};

use super::executor::GpuBackend;
use super::{AdapterChoice, GpuDevice, Reduction};
use crate::backend::{Backend, Capacity, LogitRows, Ops, Step};
use crate::graph::{Buf, Graph, MatrixSpec, WeightId};
use crate::quant::{self, Scales};
use doppler_store::DType;

/// SplitMix64 (Steele, Lea and Flood, 2014), seeded afresh in each run.
pub(in crate::gpu) struct Random(u64);

impl Random {
    pub fn new(test: &str) -> Self {
        let seed = match std::env::var("DOPPLER_TEST_SEED") {
            Ok(seed) => seed.parse().expect("DOPPLER_TEST_SEED is a number"),
            Err(_) => {
                let since = std::time::UNIX_EPOCH.elapsed().expect("a clock past 1970");
                u64::from(since.subsec_nanos()) ^ (since.as_secs() << 30)
            }
        };
        println!("{test}: DOPPLER_TEST_SEED={seed}");
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }

    /// Uniform in -1 .. 1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    /// Random weights of about 1 / sqrt(cols), quantized.
    pub fn matrix(&mut self, dtype: DType, rows: usize, cols: usize) -> (MatrixSpec, Vec<u8>) {
        let scale = 1.7 / (cols as f32).sqrt();
        let mut bytes = Vec::new();
        for _ in 0..rows {
            let row: Vec<f32> = (0..cols).map(|_| self.float() * scale).collect();
            quant::quantize(dtype, &row, &mut bytes).unwrap();
        }
        (MatrixSpec { dtype, rows, cols, offset: 0 }, bytes)
    }

    /// Blocks of arbitrary bytes with finite scales, which our quantizers might never write. Of
    /// each three rows, one has subnormal scales, one has scales of any size, one has similar
    /// scales.
    pub fn blocks(&mut self, dtype: DType, rows: usize, cols: usize) -> (MatrixSpec, Vec<u8>) {
        let scales = quant::layout(dtype).scales;
        let mut bytes = self.bytes(rows * dtype.row_bytes(cols));
        for (row, blocks) in bytes.chunks_exact_mut(dtype.row_bytes(cols)).enumerate() {
            for block in blocks.chunks_exact_mut(dtype.block_bytes()) {
                match scales {
                    Scales::Halves(places) => {
                        for at in places {
                            let (mask, high) = [(0x83, 0), (0xab, 0), (0x83, 0x28)][row % 3];
                            block[at + 1] = (self.next() as u8 & mask) | high;
                            // Zero would say nothing about subnormal scales.
                            block[*at] |= 1;
                        }
                    }
                    Scales::Float(_) => {
                        let scale = [1e-6, self.float(), 0.01][row % 3];
                        scales.write(block, &[scale], 0);
                    }
                    // The powers of two that f16 has there.
                    Scales::Exponent(at) => {
                        let (least, count) = [(103, 10), (103, 20), (122, 1)][row % 3];
                        block[at] = least + self.below(count) as u8;
                    }
                }
            }
        }
        (MatrixSpec { dtype, rows, cols, offset: 0 }, bytes)
    }
}

/// The test adapter, opened once for each way of summing. Without one, `None`, which is printed.
pub(crate) fn device(reduction: Reduction) -> Option<GpuDevice> {
    static DEVICES: [OnceLock<Option<GpuDevice>>; 2] = [OnceLock::new(), OnceLock::new()];
    let made = DEVICES[usize::from(reduction == Reduction::Group)].get_or_init(|| {
        let open = |choice| GpuDevice::open_with(choice, Some(reduction));
        match open(AdapterChoice::Software).or_else(|_| open(AdapterChoice::Any)) {
            Ok(device) => {
                println!("on {}", device.describe());
                Some(device)
            }
            Err(e) => {
                let required = std::env::var("DOPPLER_REQUIRE_GPU").is_ok_and(|v| v == "1");
                assert!(!required, "DOPPLER_REQUIRE_GPU=1, but {e}");
                None
            }
        }
    });
    if made.is_none() {
        println!("skipped: no Vulkan adapter at all (install mesa-vulkan-drivers)");
    }
    made.clone()
}

pub(super) const BOTH: [Reduction; 2] = [Reduction::Lane, Reduction::Group];

/// A backend for a complete graph, with weights loaded and no slots.
pub(super) fn backend(
    device: &GpuDevice,
    graph: &Graph,
    capacity: Capacity,
    weights: &[(WeightId, MatrixSpec, &[u8])],
) -> GpuBackend {
    let mut backend = GpuBackend::new(device.clone(), Arc::new(graph.clone()), capacity).unwrap();
    for (id, spec, bytes) in weights {
        backend.load_weight(*id, spec, bytes).unwrap();
    }
    backend
}

/// Puts `inputs` into their buffers, runs all ops of the graph over `tokens` zeros at `position`,
/// and returns `out`.
pub(super) fn run(
    backend: &mut GpuBackend,
    graph: &Graph,
    tokens: usize,
    position: usize,
    inputs: &[(Buf, &[f32])],
    out: Buf,
) -> Vec<f32> {
    let tokens = vec![0; tokens];
    let step = Step { tokens: &tokens, position, logits: LogitRows::None };
    backend.begin(&step).unwrap();
    for (buf, values) in inputs {
        backend.set(*buf, values);
    }
    backend.run(0..graph.ops.len()).unwrap();
    backend.get(out, tokens.len())
}

/// Fails if any element is off by more than `tolerance` of the largest.
pub(super) fn assert_close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let off = (got - want).abs();
        assert!(off <= tolerance * scale, "{what}: [{i}] is {got}, not {want} (scale {scale})");
    }
}
