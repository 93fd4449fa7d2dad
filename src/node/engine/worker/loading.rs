//! Which models are loaded: one answers, others wait on the shelf while the budget has room for all.
//!
//! Invariant: all loaded models together stay within the device's budget; the one that answers may use
//! what the others leave.

use std::time::Instant;

use doppler_infer::adapter::{Attached, SetId};
use doppler_infer::engine::{Engine, LoadOptions};
use doppler_infer::error::SessionError;
use doppler_infer::slots::SlotBudget;
use doppler_store::ModelId;

use super::{Worker, is_room};
use crate::api::{Hits, Traffic};
use crate::engine::LoadedModel;
use crate::engine::error::EngineError;
use crate::engine::kept::Kept;
use crate::engine::models::Opened;
use crate::engine::prefixes::Prefixes;
use crate::engine::shelf::{Held, Loaded};
use crate::{generation, memory};

impl<T: Fn() -> Traffic> Worker<T> {
    /// Drops the model on the shelf that was not used for longest, if there is one. The one that
    /// answers may use its room.
    pub(super) fn drops_a_model(&mut self) -> bool {
        let dropped = self.shelf.drop_one();
        let any = dropped.is_some();
        self.let_go(dropped, false);
        if any {
            self.shelf_changed();
        }
        any
    }

    /// Unloads every model: a lost device takes all of them along.
    pub(super) fn unload(&mut self) {
        self.loaded = None;
        self.shelf.drop_all();
        self.show_loaded(false);
    }

    /// Unloads the models that nobody has asked for during the time that they are kept.
    pub(super) fn expire(&mut self) {
        let Some(since) = self.options.keep_alive.and_then(|time| Instant::now().checked_sub(time))
        else {
            return;
        };
        let idle = self.running.is_empty() && self.held.is_none();
        let mut gone = self.shelf.expire(since);
        gone.extend(self.loaded.take_if(|loaded| idle && loaded.used <= since));
        if !gone.is_empty() {
            self.let_go(gone, false);
            self.shelf_changed();
        }
    }

    /// Makes this model the one that answers, if it is loaded.
    pub(in crate::engine) fn switch(&mut self, model: ModelId) {
        if self.loaded.as_ref().is_some_and(|loaded| loaded.model == model) {
            return;
        }
        if let Some(loaded) = self.loaded.take() {
            let gone = self.shelf.put(loaded);
            self.let_go(gone, false);
        }
        self.loaded = self.shelf.take(model);
        self.shelf_changed();
    }

    /// The model that answers may use what the others leave of the budget.
    pub(super) fn shelf_changed(&mut self) {
        let left = self.options.vram_budget.saturating_sub(self.shelf.bytes());
        if let Some(loaded) = &mut self.loaded {
            loaded.engine.set_budget(left);
        }
        self.show_loaded(false);
    }

    /// Whether a model is loaded, with exactly these adapters.
    pub(super) fn has(&self, model: ModelId, adapters: &[Attached]) -> bool {
        let loaded = self.loaded.as_ref().filter(|loaded| loaded.model == model);
        loaded.is_some_and(|loaded| loaded.engine.adapters() == SetId::of(adapters))
    }

    /// Loads a model, which answers from now on; call after [`Self::switch`]. Others stay loaded if it
    /// fits beside them as a whole; a model that must page its experts has the budget to itself.
    ///
    /// A device is opened before anything is dropped, so that a failure to open it costs nothing.
    pub(in crate::engine) fn load(
        &mut self,
        opened: &Opened,
        options: LoadOptions,
        embeds: Option<usize>,
    ) -> Result<(), EngineError> {
        let device = generation::device_for(self.options.backend, &opened.model)?;
        // A model that the device cannot run is refused before another is dropped.
        opened.model.runs_on(device.as_ref())?;
        memory::use_small_pages(false);
        let budget = self.options.vram_budget;
        let mut gone = self.shelf.make_room(budget, opened.bytes());
        // Its own previous form goes in any case.
        gone.extend(self.loaded.take());
        self.let_go(gone, false);
        let engine = loop {
            let slots = SlotBudget::Device(budget - self.shelf.bytes().min(budget));
            let options = LoadOptions { slots, host_bytes: self.options.host_budget, ..options };
            match Engine::load(&opened.model, device.as_ref(), &options) {
                Ok(engine) => break engine,
                Err(error) if lacks_room(&error) && self.drops_a_model() => {}
                Err(error) => {
                    self.show_loaded(false);
                    return Err(error.into());
                }
            }
        };
        let backend = engine.describe();
        self.loaded = Some(Loaded {
            model: opened.id,
            name: opened.model.manifest.model_id.clone(),
            engine,
            kept: Kept::default(),
            counted: Hits::default(),
            embeds,
            used: Instant::now(),
            restores: None,
        });
        self.show(|shown| {
            shown.backend = backend;
            shown.loads += 1;
        });
        self.show_loaded(false);
        Ok(())
    }

    /// Whether the model that answers is loaded for texts of as many tokens.
    pub(in crate::engine) fn embeds(&self, longest: usize) -> bool {
        let tokens = self.loaded.as_ref().and_then(|loaded| loaded.embeds);
        tokens.is_some_and(|tokens| longest <= tokens)
    }

    /// The engine that answers, from now on.
    pub(in crate::engine) fn answers(&mut self) -> Option<&mut Engine> {
        self.show_loaded(true);
        self.loaded.as_mut().map(|loaded| &mut loaded.engine)
    }

    /// Shows which models are loaded, and whether one of them answers.
    pub(super) fn show_loaded(&self, answers: bool) {
        let of = |loaded: &Loaded, answers: bool| LoadedModel {
            id: loaded.model,
            name: loaded.name.clone(),
            backend: loaded.engine.describe(),
            bytes: loaded.bytes(),
            idle_since: (!answers).then_some(loaded.used),
        };
        let answers = answers || !self.running.is_empty();
        let active = self.loaded.iter().map(|loaded| of(loaded, answers));
        let loaded = active.chain(self.shelf.iter().rev().map(|one| of(one, false))).collect();
        let prefixes = self.prefixes.as_ref().map(Prefixes::held).unwrap_or_default();
        self.show(|shown| (shown.loaded, shown.prefixes) = (loaded, prefixes));
    }
}

/// Whether a model could be loaded if others were not.
const fn lacks_room(error: &SessionError) -> bool {
    matches!(error, SessionError::BudgetTooSmall { .. }) || is_room(error)
}
