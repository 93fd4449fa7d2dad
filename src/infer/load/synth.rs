//! Models of random weights, with real shapes and types, without training or download.
//!
//! For measuring speed. Blocks are drawn as random bytes, not quantized from floats. Each block's
//! scale is set so that its weights have standard deviation [`WEIGHT_STD`] and mean near 0, and
//! norms are 1, so activations stay finite. The same options and seed give the same bytes.

use rand::rngs::StdRng as Stream;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::convert::{
    Progress, SHARD_BYTES_DEFAULT, SpansLeft, Writer, body, check_shard_bytes, plan,
    planned_shards, with_tensors,
};
use super::layout::Plan;
use super::mixture::Quantization;
use super::routing::{Routing, Shaper};
use super::sink::ShardSink;
use super::{Arch, LoadError, Result};
use crate::families;
use crate::graph::Weight;
use crate::quant::{self, layout, quantize};
use doppler_store::manifest::{ManifestBody, Role, TensorEntry, read_eos};
use doppler_store::{DType, Manifest};

/// Standard deviation of every matrix: Transformers' `initializer_range`.
pub const WEIGHT_STD: f32 = 0.02;

/// About how many bytes are drawn at a time: enough for every core.
const CHUNK_BYTES: usize = 4 << 20;
/// Blocks filled from one random stream.
const STREAM_BLOCKS: usize = 512;

/// What to generate.
#[derive(Debug, Clone)]
pub struct SynthOptions {
    /// A `config.json`, for example [`super::Arch::config`].
    pub config: Value,
    /// The number of layers, if it should differ from the config.
    pub layers: Option<usize>,
    /// The manifest's `modelId`.
    pub name: String,
    pub quantization: Quantization,
    pub shard_bytes: u64,
    pub seed: u64,
    /// How tokens are routed; `None` means evenly.
    pub routing: Option<Routing>,
}

impl SynthOptions {
    /// A whole model of this shape, stored as its architecture usually is and routed evenly.
    pub fn new(arch: Arch) -> Self {
        Self {
            config: arch.config(),
            layers: None,
            name: format!("synth-{}-{}", arch.name(), arch.quantization()),
            quantization: arch.quantization(),
            shard_bytes: SHARD_BYTES_DEFAULT,
            seed: 0,
            routing: None,
        }
    }

    /// What to write, and the manifest without its shards.
    fn plan(&self) -> Result<(Plan, ManifestBody, Option<Shaper>)> {
        check_shard_bytes(self.shard_bytes)?;
        let mut config = self.config.clone();
        if let Some(layers) = self.layers {
            let max = families::COUNT_MAX;
            if !(1..=max).contains(&layers) {
                return Err(LoadError::Layers { layers, max });
            }
            if let Value::Object(config) = &mut config {
                config.insert("num_hidden_layers".into(), json!(layers));
            }
        }
        let model = families::read(&config)?;
        let graph = &model.graph;
        let stored_as = |weight: &Weight| {
            let (rows, cols) = (weight.rows as u64, weight.cols as u64);
            let shape = if weight.rows == 1 { vec![cols] } else { vec![rows, cols] };
            Ok((shape, DType::Bf16))
        };
        let plan = plan(&stored_as, graph, self.quantization, self.shard_bytes)?;
        let eos = read_eos(config.get("eos_token_id").unwrap_or(&Value::Null))?;
        let body = body(eos, &config, &model, self.quantization, self.name.clone())?;
        let shaper = self.routing.map(|routing| Shaper::new(&routing, graph, self.seed));
        Ok((plan, body, shaper.transpose()?))
    }
}

/// The manifest that [`synth`] would write, except that the shards' hashes are zero. For callers
/// that need shapes but no weights.
pub fn synth_manifest(options: &SynthOptions) -> Result<Manifest> {
    let (plan, body, _) = options.plan()?;
    Ok(Manifest::new(with_tensors(body, &plan, planned_shards(&plan), None)?)?)
}

/// Writes a model of random weights to `sink`.
///
/// # Errors
/// If the config is not that of a model, the layers are not 1..=4096, the shard size is not
/// possible, or the model cannot have this routing.
pub fn synth(
    options: &SynthOptions,
    sink: &mut dyn ShardSink,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Manifest> {
    // The plan must be a valid manifest before it is carried out.
    synth_manifest(options)?;
    let (plan, body, shaper) = options.plan()?;
    let total = plan.tensors.iter().map(|(_, tensor)| tensor.size).sum();
    let mut done = 0;
    let mut writer = Writer::new(&plan.shards, sink);
    for (number, (name, tensor)) in plan.tensors.iter().enumerate() {
        progress(Progress { tensor: name, done, total });
        let mut place = SpansLeft { spans: &tensor.spans, filled: 0 };
        let seed = options.seed.wrapping_add((number as u64) << 32);
        let draw = Draw { name, tensor, seed, shaper: shaper.as_ref() };
        draw.draw(&mut |bytes| writer.append(&mut place, bytes))?;
        done += tensor.size;
    }
    writer.close()?;
    let shards = writer.shards;
    progress(Progress { tensor: "", done, total });
    let manifest = Manifest::new(with_tensors(body, &plan, shards, None)?)?;
    sink.finish(manifest.to_json_bytes())?;
    Ok(manifest)
}

/// One tensor to draw.
struct Draw<'a> {
    name: &'a str,
    tensor: &'a TensorEntry,
    seed: u64,
    shaper: Option<&'a Shaper>,
}

impl Draw<'_> {
    /// Passes the tensor's bytes to `out`, some blocks at a time.
    fn draw(&self, out: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let Self { name, tensor, seed, shaper } = *self;
        let stream = STREAM_BLOCKS * tensor.dtype.block_bytes();
        let chunk = CHUNK_BYTES.next_multiple_of(stream);
        let std = shaper.map_or(WEIGHT_STD, |shaper| shaper.std(name, &tensor.role));
        let mut bytes = Vec::new();
        let mut done = 0;
        while done < tensor.size {
            let left = usize::try_from(tensor.size - done).unwrap_or(usize::MAX);
            bytes.resize(chunk.min(left), 0);
            let first = done / stream as u64;
            bytes.par_chunks_mut(stream).enumerate().for_each(|(i, bytes)| {
                let stream = first + i as u64;
                let mut rng = Stream::seed_from_u64(seed.wrapping_add(stream));
                fill(tensor.dtype, &tensor.role, std, &mut rng, bytes);
                if let Some(shaper) = shaper {
                    shaper.shape(name, tensor, stream as usize * STREAM_BLOCKS, bytes);
                }
            });
            out(&bytes)?;
            done += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Fills `bytes` with whole random blocks of one type.
pub fn random_blocks(dtype: DType, seed: u64, bytes: &mut [u8]) {
    fill(dtype, &Role::Matmul, WEIGHT_STD, &mut Stream::seed_from_u64(seed), bytes);
}

/// Fills `bytes` with whole blocks of one type.
fn fill(dtype: DType, role: &Role, std: f32, rng: &mut Stream, bytes: &mut [u8]) {
    let plain = |bits: u16| (f32::from(bits) / 32767.5 - 1.0) * std * 3_f32.sqrt();
    if !dtype.is_quantised() {
        let one = *role == Role::Norm;
        let count = bytes.len() / dtype.block_bytes();
        let mut value = || if one { 1.0 } else { plain(rng.next_u32() as u16) };
        let row: Vec<f32> = (0..count).map(|_| value()).collect();
        let mut stored = Vec::with_capacity(bytes.len());
        quantize(dtype, &row, &mut stored).expect("weights of a small standard deviation fit");
        bytes.copy_from_slice(&stored);
        return;
    }
    rng.fill_bytes(bytes);
    let scales = layout(dtype).scales;
    let gain = std / WEIGHT_STD;
    let numbers: Vec<f32> =
        quant::random(dtype, WEIGHT_STD).into_iter().map(|number| number * gain).collect();
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        let draw = block[0];
        scales.write(block, &numbers, draw);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{DirSink, MemorySink};
    use super::*;
    use crate::backend::LogitRows;
    use crate::cpu::CpuDevice;
    use crate::engine::LoadOptions;
    use crate::model::Model;
    use crate::quant::dequantize;
    use crate::reader::WeightReader;
    use crate::session::Session;
    use crate::testing::runtime;

    /// `arch`, with all sizes made small.
    fn tiny(arch: Arch) -> SynthOptions {
        let mut config = arch.config();
        for (key, value) in [
            ("hidden_size", 256),
            ("intermediate_size", 512),
            ("moe_intermediate_size", 256),
            ("num_attention_heads", 4),
            ("num_key_value_heads", 2),
            ("head_dim", 64),
            ("num_experts", 6),
            ("num_experts_per_tok", 2),
            ("vocab_size", 300),
            ("num_local_experts", 8),
            ("shared_expert_intermediate_size", 256),
            ("full_attention_interval", 2),
            ("first_k_dense_replace", 1),
            ("n_routed_experts", 16),
            ("q_lora_rank", 256),
        ] {
            if config.get(key).is_some() {
                config[key] = json!(value);
            }
        }
        if config.get("kv_lora_rank").is_some() {
            config["num_key_value_heads"] = config["num_attention_heads"].clone();
        }
        if config["rope_scaling"].get("short_factor").is_some() {
            for list in ["short_factor", "long_factor"] {
                config["rope_scaling"][list] = json!([1.0; 32].to_vec());
            }
        }
        SynthOptions {
            config,
            layers: Some(2),
            name: arch.name().into(),
            seed: rand::random(),
            ..SynthOptions::new(arch)
        }
    }

    #[test]
    fn a_small_one_of_each_shape_opens_and_runs() {
        for arch in Arch::ALL {
            let options = tiny(arch);
            println!("{}, seed {}", arch.name(), options.seed);
            let mut sink = MemorySink::default();
            let manifest = synth(&options, &mut sink, &mut |_| {}).unwrap();
            let reader = WeightReader::new(Arc::new(sink), runtime().handle().clone());
            let model = Model::open(manifest, reader).unwrap();
            assert_eq!(model.graph.layers, 2);
            let mut session = Session::new(&model, &CpuDevice, &LoadOptions::default()).unwrap();
            let logits = session.step(&[3, 299, 0, 7, 7], LogitRows::All).unwrap();
            let mean = logits.iter().sum::<f32>() / logits.len() as f32;
            let std = logits.iter().map(|x| (x - mean).powi(2)).sum::<f32>();
            let std = (std / logits.len() as f32).sqrt();
            assert!(logits.iter().all(|x| x.is_finite()));
            assert!((0.03..30.0).contains(&std), "logits of standard deviation {std}");
        }
    }

    #[test]
    fn every_type_has_the_spread_it_should() {
        for dtype in DType::ALL {
            let mut bytes = vec![0; dtype.row_bytes(1 << 16)];
            fill(
                dtype,
                &Role::Matmul,
                WEIGHT_STD,
                &mut Stream::seed_from_u64(rand::random()),
                &mut bytes,
            );
            let mut values = vec![0.0; 1 << 16];
            dequantize(dtype, &bytes, 1 << 16, &mut values);
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            let std = values.iter().map(|x| (x - mean).powi(2)).sum::<f32>();
            let std = (std / values.len() as f32).sqrt();
            assert!((std / WEIGHT_STD - 1.0).abs() < 0.1, "{dtype}: {std}");
            assert!(mean.abs() < 0.1 * WEIGHT_STD, "{dtype}: mean {mean}");
        }
    }

    #[test]
    fn the_seed_decides_the_bytes() {
        let make = |options: &SynthOptions| {
            synth(options, &mut MemorySink::default(), &mut |_| {}).unwrap().model_id_hash()
        };
        let options = tiny(Arch::Llama32_1B);
        let other = SynthOptions { seed: options.seed.wrapping_add(1), ..options.clone() };
        assert_eq!(make(&options), make(&options));
        assert_ne!(make(&options), make(&other));
    }

    #[test]
    fn what_is_not_possible_is_refused() {
        assert!("llama-9".parse::<Arch>().unwrap_err().to_string().contains("mixtral-8x7b"));
        for arch in Arch::ALL {
            assert_eq!(arch.name().parse::<Arch>().unwrap(), arch);
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("kept"), "x").unwrap();
        assert!(matches!(DirSink::new(dir.path()), Err(LoadError::OutputExists(_))));
        for layers in [0, usize::MAX] {
            let options = SynthOptions { layers: Some(layers), ..tiny(Arch::Llama32_1B) };
            let made = synth(&options, &mut MemorySink::default(), &mut |_| {});
            assert!(matches!(made, Err(LoadError::Layers { .. })));
        }
    }
}
