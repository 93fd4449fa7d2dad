//! The header of a GGUF file that is an adapter. Its matrices are read as a checkpoint's tensors.
//!
//! Format: `convert_lora_to_gguf.py` and `llama-adapter.cpp` of llama.cpp.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value as Json;

use super::header::Value;
use super::{Gguf, Tensor, config, form, open_part};
use crate::load::checkpoint::{Checkpoint, Stored};
use crate::load::files::OnDisk;
use crate::load::{LoadError, Result};

/// An opened adapter.
pub(crate) struct AdapterFile {
    pub checkpoint: Box<dyn Checkpoint>,
    /// `general.architecture`.
    pub architecture: String,
    /// 0 if the matrices are not to be scaled.
    pub alpha: f32,
    /// What it says it was made for. May be empty.
    pub base: String,
}

/// Whether a file is an adapter.
pub(super) fn is(metadata: &BTreeMap<String, Value>) -> bool {
    matches!(metadata.get("general.type"), Some(Value::String(kind)) if kind == "adapter")
}

/// Opens an adapter.
///
/// # Errors
/// If the file is none, or of another type than LoRA.
pub(crate) fn open_adapter(path: &Path) -> Result<AdapterFile> {
    let (part, header) = open_part(path, &OnDisk)?;
    let fail = |problem: String| LoadError::File { file: path.display().to_string(), problem };
    let metadata = header.metadata;
    if !is(&metadata) {
        return Err(fail("not an adapter: its general.type is not \"adapter\"".into()));
    }
    match metadata.get("adapter.type") {
        Some(Value::String(kind)) if kind == "lora" => {}
        other => {
            let kind = other.map_or("missing".to_owned(), Value::kind);
            return Err(fail(format!("adapter.type is {kind}, which is not supported (lora is)")));
        }
    }
    if metadata.contains_key("adapter.alora.invocation_tokens") {
        return Err(fail("adapter.alora.invocation_tokens, which is not supported".into()));
    }
    let architecture = config::architecture(metadata.get("general.architecture")).map_err(fail)?;
    let alpha = match metadata.get("adapter.lora.alpha") {
        Some(Value::Float(alpha)) => *alpha as f32,
        other => {
            let kind = other.map_or("missing".to_owned(), Value::kind);
            return Err(fail(format!("adapter.lora.alpha is {kind}, expected a number")));
        }
    };
    let base = match metadata.get("general.base_model.0.name") {
        Some(Value::String(name)) => name.clone(),
        _ => String::new(),
    };
    let tensors = header.tensors.into_iter().map(|(name, info)| {
        let stored = Stored { shape: info.shape.clone(), form: form(&info) };
        (name, Tensor { part: 0, info, stored })
    });
    let checkpoint = Gguf {
        path: path.to_owned(),
        opener: Arc::new(OnDisk),
        tensors: tensors.collect(),
        metadata,
        architecture,
        head_dim: 0,
        config: Json::Null,
        parts: vec![part],
    };
    let architecture = architecture.name.to_owned();
    Ok(AdapterFile { checkpoint: Box::new(checkpoint), architecture, alpha, base })
}
