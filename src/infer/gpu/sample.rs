//! Sampling on the device: the dispatches from a row of logits to the next token,
//! without the host between one token and the next.
//!
//! The choice is the CPU sampler's, bit by bit (`infer::odds`). What it depends on besides
//! the logits lies on the device: the count of draws and the ring of recent tokens, both
//! moved on by the last kernel. So tokens may be recorded ahead; a halted step (`state`)
//! leaves no trace. Refused: vocabularies and windows longer than the kernels hold.

use std::sync::Arc;

use wgpu::BufferUsages;

use super::device::GpuDevice;
use super::params::{self, ARENA_SLOT, Params};
use super::pipelines::Pipeline;
use crate::backend::{BackendError, Result};
use crate::odds::{CHUNK, Recipe, VOCAB_MAX, WINDOW_MAX};
use crate::sampler::Sampler;

/// Words of `bins` and before the ring in `memory`, and of one chunk's part
/// (kernels/shared/odds.wgsl).
const BIN_WORDS: u64 = 8208;
const RING: usize = 4;
const PART: u64 = 4;

const SCRATCH: BufferUsages = BufferUsages::STORAGE.union(BufferUsages::COPY_SRC);

/// The buffers that sampling shares with the rest of a step, all of u32 words.
#[derive(Clone, Copy)]
pub(super) struct Links<'a> {
    /// Read: the f32 logits of one token, `[vocab]`, from the buffer's start.
    pub logits: &'a wgpu::Buffer,
    /// Read: if word 0 is not 0, the step was halted and nothing is chosen.
    pub state: &'a wgpu::Buffer,
    /// Written: word 0 becomes the token, for the next step.
    pub tokens: &'a wgpu::Buffer,
    /// Written: word 0 becomes the token, for the host.
    pub chosen: &'a wgpu::Buffer,
}

struct Stage {
    pipeline: Arc<Pipeline>,
    storage: wgpu::BindGroup,
    workgroups: u32,
}

/// One sampler's choice of a token, ready to encode again and again.
pub(super) struct SamplePlan {
    recipe: Recipe,
    common: wgpu::BindGroup,
    /// Draws made (low, high), tokens accepted, one word, the ring.
    memory: wgpu::Buffer,
    /// Keys, then ranks; `[vocab]` unless greedy.
    #[cfg_attr(not(test), expect(dead_code))]
    pub(super) ranks: wgpu::Buffer,
    stages: Vec<Stage>,
}

impl SamplePlan {
    /// For a vocabulary and a sampler's options; begins in the sampler's state.
    pub fn new(
        device: &GpuDevice,
        vocab: usize,
        links: Links<'_>,
        sampler: &Sampler,
    ) -> Result<Self> {
        let recipe = *sampler.recipe();
        if vocab == 0 || vocab > VOCAB_MAX {
            return Err(refused(format!("a vocabulary of {vocab}, not 1 to {VOCAB_MAX}")));
        }
        if recipe.window > WINDOW_MAX {
            let window = recipe.window;
            return Err(refused(format!("a repetition window of {window}, over {WINDOW_MAX}")));
        }
        if links.logits.size() < 4 * vocab as u64 {
            return Err(refused(format!("logits of {} bytes for {vocab}", links.logits.size())));
        }
        let chunks = vocab.div_ceil(CHUNK) as u32;
        let params = params(&recipe, vocab as u32);
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let arena = device.buffer("sampling parameters", ARENA_SLOT, usage)?;
        device.write(&arena, 0, bytemuck::bytes_of(&params));
        let words = (RING + WINDOW_MAX) as u64;
        let memory =
            device.buffer("sampling memory", 4 * words, SCRATCH | BufferUsages::COPY_DST)?;
        let (drawn, bins) = if recipe.greedy { (1, 1) } else { (vocab as u64, BIN_WORDS) };
        let ranks = device.buffer("token ranks", 4 * drawn, SCRATCH)?;
        let bins = device.buffer("rank histograms", 4 * bins, SCRATCH)?;
        let parts = device.buffer("vocabulary chunks", 4 * PART * u64::from(chunks), SCRATCH)?;
        let common = device.common(&arena)?;
        let mut stages = Vec::new();
        let mut stage = |kernel: &str, workgroups, storage: &[&wgpu::Buffer]| {
            stages.push(Stage::new(device, kernel, workgroups, storage)?);
            Ok::<_, BackendError>(())
        };
        let Links { logits, state, tokens, chosen } = links;
        stage("sample_keys", chunks, &[logits, &memory, &ranks, &bins, &parts])?;
        if recipe.greedy {
            stage("sample_greedy", 1, &[&parts, state, &memory, tokens, chosen])?;
        } else {
            stage("sample_ranks", chunks, &[&parts, &ranks, &bins])?;
            if recipe.top_k > 0 {
                stage("sample_top_k", chunks, &[&ranks, &bins])?;
            }
            if recipe.top_p > 0 {
                stage("sample_top_p", chunks, &[&ranks, &bins])?;
            }
            stage("sample_cut", chunks, &[&ranks, &bins, &parts])?;
            let last = [&ranks, &bins, &parts, state, &memory, tokens, chosen];
            stage("sample_draw", 1, &last)?;
        }
        let plan = Self { recipe, common, memory, ranks, stages };
        plan.restore(device, sampler)?;
        Ok(plan)
    }

    /// Whether it chooses as this sampler does.
    pub fn is_for(&self, sampler: &Sampler) -> bool {
        *sampler.recipe() == self.recipe
    }

    /// Goes on from the sampler's state, in what is submitted from now on. Its options must be
    /// those that the plan was made for.
    pub fn restore(&self, device: &GpuDevice, sampler: &Sampler) -> Result<()> {
        if !self.is_for(sampler) {
            return Err(refused("a sampler with other options than the plan's".into()));
        }
        let recent = sampler.recent();
        let draws = sampler.draws();
        let mut words = vec![draws as u32, (draws >> 32) as u32, recent.len() as u32, 0];
        words.extend(recent);
        words.resize(RING + WINDOW_MAX, 0);
        device.write(&self.memory, 0, bytemuck::cast_slice(&words));
        Ok(())
    }

    /// Records the choice of one token. Each recording after the first takes the one before
    /// it as accepted, so the host's sampler is to `follow` each token that was not halted.
    pub fn encode(&self, pass: &mut wgpu::ComputePass<'_>) {
        self.encode_first(self.stages.len(), pass);
    }

    /// Records the first kernels of a choice.
    pub(super) fn encode_first(&self, kernels: usize, pass: &mut wgpu::ComputePass<'_>) {
        pass.set_bind_group(0, &self.common, &[0]);
        for stage in &self.stages[..kernels] {
            pass.set_pipeline(&stage.pipeline.pipeline);
            pass.set_bind_group(1, &stage.storage, &[]);
            pass.dispatch_workgroups(stage.workgroups, 1, 1);
        }
    }

    /// Dispatches a token takes.
    pub fn dispatches(&self) -> usize {
        self.stages.len()
    }
}

impl Stage {
    fn new(
        device: &GpuDevice,
        kernel: &str,
        workgroups: u32,
        storage: &[&wgpu::Buffer],
    ) -> Result<Self> {
        let pipeline = device.pipelines().get(device, kernel)?;
        // A mismatch is a mistake in this file.
        assert_eq!(pipeline.kernel.params, params::Sample::NAME);
        let storage = pipeline.bind(device, storage)?;
        Ok(Self { pipeline, storage, workgroups })
    }
}

fn params(recipe: &Recipe, vocab: u32) -> params::Sample {
    let (unit, scale) = recipe.steepness();
    params::Sample {
        vocab,
        greedy: u32::from(recipe.greedy),
        relief: recipe.relief.to_bits(),
        penalty: recipe.penalty.to_bits(),
        window: recipe.window as u32,
        unit,
        scale,
        top_k: recipe.top_k,
        top_p: recipe.top_p,
        seed_low: recipe.seed as u32,
        seed_high: (recipe.seed >> 32) as u32,
    }
}

fn refused(what: String) -> BackendError {
    BackendError::Unsupported(format!("sampling on the device: {what}"))
}
