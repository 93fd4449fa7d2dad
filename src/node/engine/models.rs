//! The models that the engine knows: graphs and tokenizers, which are kept between requests. Checks
//! requests against them.
//!
//! Opening a model reads no weights, so a request is refused here before it waits in the queue and
//! before the loaded model is touched. Bounded: if there are more than [`OPENED_MAX`] models, the
//! one not used for longest is dropped, and opened again when it is needed.

use std::sync::{Arc, Mutex, PoisonError};

use doppler_infer::adapter::Attached;
use doppler_infer::model::Model;
use doppler_infer::reader::WeightReader;
use doppler_infer::tokenizer::Tokenizer;
use doppler_store::ModelId;
use doppler_store::manifest::Manifest;

use super::asked::Asked;
use super::error::EngineError;
use crate::api::GenerateRequest;

/// Models kept open. A tokenizer of 150,000 tokens takes some 50 MB.
const OPENED_MAX: usize = 4;

/// A model's graph, the locations of its weights, and its tokenizer.
pub struct Opened {
    pub id: ModelId,
    pub model: Model,
    pub tokenizer: Tokenizer,
}

impl Opened {
    /// Bytes of its weights as they are stored; the device holds about as many.
    pub fn bytes(&self) -> u64 {
        self.model.manifest.shards.iter().map(|shard| shard.size).sum()
    }
}

/// A request that fits its model.
pub struct Job {
    pub opened: Arc<Opened>,
    /// Attached while it runs.
    pub adapters: Vec<Attached>,
    pub asked: Asked,
    /// As in [`GenerateRequest`].
    pub resume: bool,
}

/// Models by id, with the most recently used one at the end.
#[derive(Clone, Default)]
pub struct Models {
    opened: Arc<Mutex<Vec<Arc<Opened>>>>,
}

impl Models {
    /// The model, if it is open. Marks it as most recently used.
    pub fn get(&self, id: ModelId) -> Option<Arc<Opened>> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let at = opened.iter().position(|one| one.id == id)?;
        let found = opened.remove(at);
        opened.push(found.clone());
        Some(found)
    }

    /// Closes a model. Requests that have it go on.
    pub fn close(&self, id: ModelId) {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.retain(|one| one.id != id);
    }

    /// Opens a model by its manifest and the bytes of its tokenizer.json.
    ///
    /// # Errors
    /// If the manifest does not describe a model that can run, or the tokenizer cannot be used.
    pub fn open(
        &self,
        id: ModelId,
        manifest: Manifest,
        tokenizer: &[u8],
        reader: WeightReader,
    ) -> Result<Arc<Opened>, EngineError> {
        let tokenizer = Tokenizer::from_bytes(tokenizer, manifest.eos_token_ids.clone())
            .map_err(|source| EngineError::Tokenizer { model: id, source })?;
        let model = Model::open(manifest, reader)
            .map_err(|source| EngineError::Model { model: id, source: Box::new(source) })?;
        let new = Arc::new(Opened { id, model, tokenizer });
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.retain(|one| one.id != id);
        if opened.len() == OPENED_MAX {
            opened.remove(0);
        }
        opened.push(new.clone());
        Ok(new)
    }
}

impl Job {
    /// Turns a request into tokens that fit the model.
    ///
    /// # Errors
    /// If the model cannot do what is asked.
    pub fn check(
        opened: Arc<Opened>,
        adapters: Vec<Attached>,
        request: &GenerateRequest,
    ) -> Result<Self, EngineError> {
        let asked = Asked::check(&opened.model, &opened.tokenizer, request)?;
        Ok(Self { opened, adapters, asked, resume: request.resume })
    }
}
