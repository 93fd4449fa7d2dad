//! Adapters in GGUF files, as `convert_lora_to_gguf.py` of llama.cpp writes them.
//!
//! `general.type` is "adapter", `adapter.type` "lora"; the matrices are `TENSOR.lora_a` and
//! `TENSOR.lora_b`, the scale is `adapter.lora.alpha / rank`. Names and the order of rows are
//! llama.cpp's ([`Naming::Ggml`]).

use std::collections::BTreeMap;
use std::path::Path;

use super::{Adapter, AdapterError, Delta, Naming, Result, matrix, name_of};
use crate::load::{self, AdapterFile};

pub(super) fn is_here(path: &Path) -> bool {
    load::open_gguf_adapter(path).is_ok()
}

pub(super) fn open(path: &Path) -> Result<Adapter> {
    let AdapterFile { checkpoint, architecture, alpha, base } = load::open_gguf_adapter(path)?;
    let place = path.display().to_string();
    let wrong = |problem: String| AdapterError::Invalid { place: place.clone(), problem };
    let mut parts: BTreeMap<String, [Option<super::Matrix>; 2]> = BTreeMap::new();
    for name in checkpoint.names() {
        let (tensor, part) = match (name.strip_suffix(".lora_a"), name.strip_suffix(".lora_b")) {
            (Some(tensor), _) => (tensor, 0),
            (_, Some(tensor)) => (tensor, 1),
            _ => {
                let what = format!("the tensor {name}");
                return Err(AdapterError::Unsupported { place: path.display().to_string(), what });
            }
        };
        if tensor.contains("_exps") {
            let what = format!("a change of experts ({tensor})");
            return Err(AdapterError::Unsupported { place: path.display().to_string(), what });
        }
        let matrix = matrix(checkpoint.as_ref(), name).map_err(wrong)?;
        parts.entry(tensor.to_owned()).or_default()[part] = Some(matrix);
    }
    let mut deltas = BTreeMap::new();
    for (tensor, pair) in parts {
        let [Some(a), Some(b)] = pair else {
            return Err(wrong(format!("{tensor} has only one of lora_a and lora_b")));
        };
        let scale = if alpha == 0.0 { 1.0 } else { alpha / b.cols as f32 };
        deltas.insert(tensor, Delta { a, b, scale });
    }
    Adapter::new(name_of(path), base, Naming::Ggml, Some(architecture), deltas)
}
