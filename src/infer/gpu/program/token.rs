//! The part of a program that runs one token as one submission: its dispatches, the choice of the
//! next token after them, and what a page must know to page experts.
//!
//! The page submits the list, then a copy of the chosen token into the state, and a copy of the
//! state to where it can be read: one small report. Word 0 of the report is 0, or the layer that
//! halted (counted from 1); word 1 is the token; then come each layer's choices. After a halt the
//! page fills slots, updates the table, copies back what was set aside, clears word 0, and submits
//! the list from the layer's `resume` on.

use serde::Serialize;

use super::{Make, ProgramError, ProgramOptions};
use crate::backend::BackendError;
use crate::gpu::decode::{Aside, Fuse, Layout, Points, TokenSteps, workgroups_of};
use crate::gpu::dispatch::Rows;
use crate::gpu::experts::Home;
use crate::gpu::lower::{Lower, Place, recipe_grid};
use crate::gpu::sample;
use crate::graph::Moe;
use crate::odds::Recipe;
use crate::sampler::SamplerOptions;
use crate::slots::SlotPlan;

/// A step of one token.
#[derive(Debug, Serialize)]
pub struct TokenInfo {
    /// The dispatches in order, ending with the choice of the next token, which is the likeliest.
    pub dispatches: Vec<usize>,
    /// The buffers of the state, and of the chosen token, which is copied to its word 1.
    pub state: usize,
    pub chosen: usize,
    /// The table in which experts are looked up: by layer and expert the slot, or all ones. The
    /// rest of it is for devices that fetch by themselves: `entries` words of all ones, then zeros.
    pub places: usize,
    pub entries: usize,
    /// The buffer of what a halted layer set aside.
    pub aside: usize,
    /// By MoE layer.
    pub layers: Vec<TokenLayer>,
}

/// A MoE layer of a token.
#[derive(Debug, Serialize)]
pub struct TokenLayer {
    /// The first of the dispatches to run again after a halt.
    pub resume: usize,
    /// The first dispatch after the layer's routing, from which a token that was submitted up to
    /// there continues.
    pub routed: usize,
    pub kept: Vec<Kept>,
    /// Where its experts begin in the table of places, and its choices in the state, in words.
    pub row: usize,
    pub ids_at: usize,
}

/// Bytes `at..at + bytes` of what was set aside, which go to the start of a buffer.
#[derive(Debug, Serialize)]
pub struct Kept {
    pub buffer: usize,
    pub at: usize,
    pub bytes: usize,
}

/// A tab chooses the likeliest token.
fn greedy() -> Recipe {
    Recipe::new(&SamplerOptions { temperature: 0.0, ..SamplerOptions::default() })
}

/// Words of a buffer that only the choice of a token needs.
pub(super) fn choice_words(vocab: usize, place: Place) -> Option<usize> {
    sample::words(&greedy(), vocab, place)
}

impl Make<'_> {
    /// The token's step, if there is one.
    pub(super) fn token(
        &mut self,
        lower: Lower<'_>,
        plan: &SlotPlan,
        options: &ProgramOptions,
    ) -> Result<(), ProgramError> {
        let graph = lower.graph;
        let layout = Layout::of(graph);
        let home = |(spec, class): (&Moe, &u16)| -> Option<Home> {
            self.classes[usize::from(*class)].home(*class, spec)
        };
        let homes: Vec<_> = graph.moe.iter().zip(&plan.class_of).map(home).collect();
        let mut fuse = Fuse {
            lower: Lower { batch: 1, halved: None, ..lower },
            team: if options.subgroups { "subgroup" } else { "group" },
            layout: &layout,
            homes: &homes,
            fetches: &[],
            many: false,
            moved: None,
        };
        let choice = match sample::passes(&greedy(), graph.vocab) {
            Ok(passes) => passes,
            // The page then chooses tokens itself, and runs op by op.
            Err(BackendError::Unsupported(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let Some(TokenSteps { steps, layers, .. }) = fuse.token()? else { return Ok(()) };
        let mut dispatches = self.dispatches(&steps)?;
        let params = sample::params(&greedy(), graph.vocab as u32);
        for pass in choice {
            let grid = workgroups_of(pass.workgroups as usize);
            let recipe = recipe_grid(pass.kernel, &params, &pass.storage, Rows::Tokens, grid);
            dispatches.push(self.dispatch(&recipe)?);
        }
        let mut made = Vec::new();
        for (i, Points { resume, aside, routed }) in layers.into_iter().enumerate() {
            let kept = aside
                .into_iter()
                .map(|Aside { of, at, bytes }| Ok(Kept { buffer: self.buffer(of)?, at, bytes }));
            let kept = kept.collect::<Result<_, ProgramError>>()?;
            let (row, ids_at) = (layout.rows[i], layout.ids_at[i]);
            made.push(TokenLayer { resume, routed, kept, row, ids_at });
        }
        self.made.token = Some(TokenInfo {
            dispatches,
            state: self.buffer(Place::State)?,
            chosen: self.buffer(Place::Chosen)?,
            places: self.buffer(Place::ExpertPlaces)?,
            entries: layout.entries,
            aside: self.buffer(Place::Aside)?,
            layers: made,
        });
        Ok(())
    }
}
