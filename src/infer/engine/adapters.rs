//! Adapters attached to a loaded model and detached again, between steps.
//!
//! Attaching makes a graph with the adapters' products in it (`crate::adapter`); base weights are not
//! touched, so detaching leaves exactly the model that was loaded. Keys, values and states depend on
//! the adapters with which they were computed. A sequence knows which these were
//! ([`Formed`](super::Formed)), and its tokens run again before it steps with others. Invariant: if
//! attaching fails, the engine has no adapters.

use std::sync::Arc;

use super::Engine;
use crate::adapter::{AdapterError, Attached, Grafted, SetId, graft};
use crate::error::SessionError;
use crate::graph::WeightId;
use crate::sequence::Sequence;

/// The adapters of an engine.
#[derive(Default)]
pub(super) struct Adapters {
    set: SetId,
    attached: Vec<Attached>,
    /// Device bytes of their matrices.
    bytes: u64,
}

impl Engine {
    /// Attaches these adapters in place of those that are attached; none detaches them. Nothing is
    /// done if they are attached already. Several adapters add up, each by its weight.
    ///
    /// # Errors
    /// If one does not fit the model, or the device has no room. Of a set that does not fit nothing
    /// is attached.
    pub fn adapt(&mut self, set: &[Attached]) -> Result<(), SessionError> {
        if self.has(set) {
            return Ok(());
        }
        let id = SetId::of(set);
        // What does not fit changes nothing.
        let grafted = if set.is_empty() { None } else { Some(graft(&self.base, set)?) };
        self.land()?;
        self.detach()?;
        let Some(grafted) = grafted else { return Ok(()) };
        self.attach(grafted).inspect_err(|_| {
            // The first error says more than one of this.
            let _ = self.detach();
        })?;
        (self.adapters.set, self.adapters.attached) = (id, set.to_vec());
        Ok(())
    }

    /// Whether exactly these are attached.
    fn has(&self, set: &[Attached]) -> bool {
        let same = |(a, b): (&Attached, &Attached)| {
            Arc::ptr_eq(&a.adapter, &b.adapter) && a.weight == b.weight
        };
        let have = &self.adapters.attached;
        have.len() == set.len() && have.iter().zip(set).all(same)
    }

    /// The adapters that are attached.
    pub const fn adapters(&self) -> SetId {
        self.adapters.set
    }

    /// Whether a sequence's keys and values are those that the attached adapters lead to. Otherwise its
    /// tokens run again before its next step.
    pub fn has_keys_of(&self, sequence: &Sequence) -> bool {
        sequence.formed.adapters == self.adapters.set
    }

    fn detach(&mut self) -> Result<(), SessionError> {
        self.loaded_bytes -= std::mem::take(&mut self.adapters.bytes);
        (self.adapters.set, self.adapters.attached) = (SetId::default(), Vec::new());
        if !Arc::ptr_eq(&self.graph, &self.base) {
            self.graph = self.base.clone();
            self.backend.adapt(self.base.clone())?;
        }
        Ok(())
    }

    fn attach(&mut self, grafted: Grafted) -> Result<(), SessionError> {
        let Grafted { graph, weights } = grafted;
        let bytes = weights.iter().map(|(spec, _)| self.backend.weight_bytes(spec)).sum::<u64>();
        let used = self.loaded_bytes + self.backend.fixed_bytes();
        if used.saturating_add(bytes) > self.budget {
            return Err(AdapterError::Room { bytes, budget: self.budget }.into());
        }
        let graph = Arc::new(graph);
        self.graph = graph.clone();
        self.backend.adapt(graph)?;
        for (id, (spec, bytes)) in (self.base.weights.len() as u32..).zip(&weights) {
            self.backend.load_weight(WeightId(id), spec, bytes)?;
        }
        self.adapters.bytes = bytes;
        self.loaded_bytes += bytes;
        Ok(())
    }
}
