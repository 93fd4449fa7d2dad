//! Sampling on the device: the dispatches from a row of logits to the next token, without the host
//! in between.
//!
//! The choice is exactly the CPU sampler's (`infer::odds`). What it depends on besides the logits
//! is on the device: the count of draws and the ring of recent tokens, both updated by the last
//! kernel. So tokens may be recorded ahead, and a halted step (`state`) changes nothing.
//! Vocabularies and windows larger than the kernels support are refused.

use std::sync::Arc;

use wgpu::BufferUsages;

use super::decode::logits_stride;
use super::device::GpuDevice;
use super::lower::Place;
use super::params::{self, ARENA_SLOT, Params};
use super::pipelines::Pipeline;
use crate::backend::{BackendError, Result};
use crate::odds::{CHUNK, Recipe, VOCAB_MAX, WINDOW_MAX};
use crate::sampler::Sampler;

/// Words of `bins`, words before the ring in `memory`, and words of one chunk's part
/// (kernels/shared/odds.wgsl).
const BIN_WORDS: usize = 8208;
const RING: usize = 4;
const PART: usize = 4;

const SCRATCH: BufferUsages = BufferUsages::STORAGE.union(BufferUsages::COPY_SRC);

/// The buffers that sampling shares with the rest of a step. All consist of u32 words.
#[derive(Clone, Copy)]
pub(super) struct Links<'a> {
    /// Read: the f32 logits of one token, `[vocab]`, at the buffer's start.
    pub logits: &'a wgpu::Buffer,
    /// Read: if word 0 is not 0, the step was halted and nothing is chosen.
    pub state: &'a wgpu::Buffer,
    /// Written: word 0 becomes the token, for the next step.
    pub tokens: &'a wgpu::Buffer,
    /// Written: word 0 becomes the token, for the host.
    pub chosen: &'a wgpu::Buffer,
    /// Which row of several: its logits begin a whole number of `logits_stride`s from the start, and
    /// its tokens a whole number of [`TOKEN_STRIDE`]s.
    pub row: usize,
}

/// Bytes from one row's token to the next, so that each can be bound by itself.
pub(super) const TOKEN_STRIDE: u64 = 256;

/// One dispatch of a choice.
pub(super) struct Pass {
    pub kernel: &'static str,
    pub workgroups: u32,
    pub storage: Vec<Place>,
}

/// The dispatches that choose a token from [`Place::Logits`].
///
/// # Errors
/// If the vocabulary or the window is larger than the kernels support.
pub(super) fn passes(recipe: &Recipe, vocab: usize) -> Result<Vec<Pass>> {
    if vocab == 0 || vocab > VOCAB_MAX {
        return Err(refused(format!("a vocabulary of {vocab} (1 to {VOCAB_MAX} are possible)")));
    }
    if recipe.window > WINDOW_MAX {
        let window = recipe.window;
        return Err(refused(format!("a repetition window of {window}, more than {WINDOW_MAX}")));
    }
    let chunks = vocab.div_ceil(CHUNK) as u32;
    let (logits, state, tokens) = (Place::Logits, Place::State, Place::Tokens);
    let (memory, chosen) = (Place::SampleMemory, Place::Chosen);
    let (ranks, bins, parts) = (Place::SampleRanks, Place::SampleBins, Place::SampleParts);
    let mut passes = Vec::new();
    let mut pass = |kernel, workgroups, storage: &[Place]| {
        passes.push(Pass { kernel, workgroups, storage: storage.to_vec() });
    };
    pass("sample_keys", chunks, &[logits, memory, ranks, bins, parts]);
    if recipe.greedy {
        pass("sample_greedy", 1, &[parts, state, memory, tokens, chosen]);
        return Ok(passes);
    }
    pass("sample_ranks", chunks, &[parts, ranks, bins]);
    if recipe.top_k > 0 {
        pass("sample_top_k", chunks, &[ranks, bins]);
    }
    if recipe.top_p > 0 {
        pass("sample_top_p", chunks, &[ranks, bins]);
    }
    pass("sample_cut", chunks, &[ranks, bins, parts]);
    pass("sample_draw", 1, &[ranks, bins, parts, state, memory, tokens, chosen]);
    Ok(passes)
}

/// Words of a buffer that only the choice of a token needs. `None` for all others.
pub(super) fn words(recipe: &Recipe, vocab: usize, place: Place) -> Option<usize> {
    Some(match place {
        Place::Chosen => 1,
        Place::SampleMemory => RING + WINDOW_MAX,
        Place::SampleRanks => {
            if recipe.greedy {
                1
            } else {
                vocab
            }
        }
        Place::SampleBins => {
            if recipe.greedy {
                1
            } else {
                BIN_WORDS
            }
        }
        Place::SampleParts => PART * vocab.div_ceil(CHUNK),
        _ => return None,
    })
}

struct Stage {
    pipeline: Arc<Pipeline>,
    storage: wgpu::BindGroup,
    workgroups: u32,
}

/// A sampler's choice of a token, which can be encoded repeatedly.
pub(super) struct SamplePlan {
    recipe: Recipe,
    arena: wgpu::Buffer,
    common: wgpu::BindGroup,
    /// Draws made (low, high), tokens accepted, one word, the ring.
    memory: wgpu::Buffer,
    /// Keys, then ranks; `[vocab]` unless greedy.
    #[cfg_attr(not(test), expect(dead_code))]
    pub(super) ranks: wgpu::Buffer,
    stages: Vec<Stage>,
}

impl SamplePlan {
    /// For a vocabulary and a sampler's options. Starts in the sampler's state.
    pub fn new(
        device: &GpuDevice,
        vocab: usize,
        links: Links<'_>,
        sampler: &Sampler,
    ) -> Result<Self> {
        let recipe = *sampler.recipe();
        let passes = passes(&recipe, vocab)?;
        let logits_at = 4 * (links.row * logits_stride(vocab)) as u64;
        if links.logits.size() < logits_at + 4 * vocab as u64 {
            return Err(refused(format!("logits of {} bytes for {vocab}", links.logits.size())));
        }
        let params = params(&recipe, vocab as u32);
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let arena = device.buffer("sampling parameters", ARENA_SLOT, usage)?;
        device.write(&arena, 0, bytemuck::bytes_of(&params));
        let make = |what, place, usage| {
            let words = words(&recipe, vocab, place).unwrap_or(0);
            device.buffer(what, 4 * words as u64, usage)
        };
        let kept = SCRATCH | BufferUsages::COPY_DST;
        let memory = make("sampling memory", Place::SampleMemory, kept)?;
        let ranks = make("token ranks", Place::SampleRanks, SCRATCH)?;
        let bins = make("rank histograms", Place::SampleBins, SCRATCH)?;
        let parts = make("vocabulary chunks", Place::SampleParts, SCRATCH)?;
        let common = device.common(&arena)?;
        let token_at = links.row as u64 * TOKEN_STRIDE;
        let resolve = |place: &Place| match place {
            Place::Logits => Ok((links.logits, logits_at)),
            Place::State => Ok((links.state, 0)),
            Place::Tokens => Ok((links.tokens, token_at)),
            Place::Chosen => Ok((links.chosen, token_at)),
            Place::SampleMemory => Ok((&memory, 0)),
            Place::SampleRanks => Ok((&ranks, 0)),
            Place::SampleBins => Ok((&bins, 0)),
            Place::SampleParts => Ok((&parts, 0)),
            other => Err(refused(format!("{other:?}"))),
        };
        let mut stages = Vec::new();
        for Pass { kernel, workgroups, storage } in passes {
            let storage = storage.iter().map(resolve).collect::<Result<Vec<_>>>()?;
            stages.push(Stage::new(device, kernel, workgroups, &storage)?);
        }
        let plan = Self { recipe, arena, common, memory, ranks, stages };
        plan.restore(device, sampler)?;
        Ok(plan)
    }

    /// Whether it has this sampler's options.
    pub fn is_for(&self, sampler: &Sampler) -> bool {
        *sampler.recipe() == self.recipe
    }

    /// From now on chooses as this sampler, from its state. `false` if that needs other kernels.
    pub fn turn_to(&mut self, device: &GpuDevice, vocab: usize, sampler: &Sampler) -> Result<bool> {
        let recipe = *sampler.recipe();
        let kernels = |of: &Recipe| (of.greedy, of.top_k > 0, of.top_p > 0);
        if kernels(&recipe) != kernels(&self.recipe) || recipe.window > WINDOW_MAX {
            return Ok(false);
        }
        if recipe != self.recipe {
            device.write(&self.arena, 0, bytemuck::bytes_of(&params(&recipe, vocab as u32)));
            self.recipe = recipe;
        }
        self.restore(device, sampler)?;
        Ok(true)
    }

    /// Everything submitted from now on continues from the sampler's state. Its options must be
    /// those for which the plan was made.
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

    /// Records the choice of one token. Each further recording assumes that the previous token was
    /// accepted, so the host's sampler must `follow` each token that was not halted.
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

    /// Records one kernel of a choice, if there are so many.
    pub fn encode_one(&self, kernel: usize, pass: &mut wgpu::ComputePass<'_>) {
        let Some(stage) = self.stages.get(kernel) else { return };
        pass.set_bind_group(0, &self.common, &[0]);
        pass.set_pipeline(&stage.pipeline.pipeline);
        pass.set_bind_group(1, &stage.storage, &[]);
        pass.dispatch_workgroups(stage.workgroups, 1, 1);
    }

    /// Dispatches per token.
    pub fn dispatches(&self) -> usize {
        self.stages.len()
    }
}

impl Stage {
    fn new(
        device: &GpuDevice,
        kernel: &str,
        workgroups: u32,
        storage: &[(&wgpu::Buffer, u64)],
    ) -> Result<Self> {
        let pipeline = device.pipelines().get(device, kernel)?;
        // A mismatch is a mistake in this file.
        assert_eq!(pipeline.kernel.params, params::Sample::NAME);
        let storage = pipeline.bind_from(device, storage)?;
        Ok(Self { pipeline, storage, workgroups })
    }
}

pub(super) fn params(recipe: &Recipe, vocab: u32) -> params::Sample {
    let (unit, scale) = recipe.steepness();
    params::Sample {
        vocab,
        greedy: u32::from(recipe.greedy),
        penalty_inverse: recipe.penalty_inverse.to_bits(),
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
