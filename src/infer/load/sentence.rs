//! The files of sentence-transformers beside a Hugging Face checkpoint: modules.json, each module's
//! config, and the settings with their prompts.
//!
//! They become one value in the config (`families::sentence` understands it). Tensors of dense heads
//! get their module's name in front.
//!
//! Format: sentence-transformers, `SentenceTransformer.save`.

use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value, json};

use super::hf::read_json;
use super::{LoadError, Result};

/// The longest of these files.
const BYTES_MAX: u64 = 1 << 20;
/// The most modules.
const MODULES_MAX: usize = 16;

/// What is there.
pub(super) struct Found {
    pub config: Value,
    /// The names of dense heads, and the files with their tensors.
    pub dense: Vec<(String, PathBuf)>,
}

/// `None` if there is no modules.json.
pub(super) fn read(dir: &Path) -> Result<Option<Found>> {
    let file = dir.join("modules.json");
    if !file.exists() {
        return Ok(None);
    }
    let modules = read_json(&file, BYTES_MAX)?;
    let fail = |problem: String| LoadError::File { file: file.display().to_string(), problem };
    let list = modules.as_array().filter(|list| list.len() <= MODULES_MAX);
    let list = list.ok_or_else(|| fail(format!("not a list of at most {MODULES_MAX} modules")))?;
    let (mut configs, mut dense) = (Map::new(), Vec::new());
    for module in list {
        let text = |key: &str| module.get(key).and_then(Value::as_str).unwrap_or_default();
        let path = text("path");
        if path.is_empty() {
            continue;
        }
        let mut parts = Path::new(path).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(fail(format!("{path:?} is not the name of a directory")));
        }
        let config = dir.join(path).join("config.json");
        if config.exists() {
            configs.insert(path.to_owned(), read_json(&config, BYTES_MAX)?);
        }
        if text("type").ends_with(".Dense") {
            dense.push((path.to_owned(), dir.join(path).join("model.safetensors")));
        }
    }
    let optional = |name: &str| {
        let path = dir.join(name);
        if path.exists() { read_json(&path, BYTES_MAX) } else { Ok(Value::Null) }
    };
    let settings = optional("config_sentence_transformers.json")?;
    let transformer = optional("sentence_bert_config.json")?;
    let config = json!({
        "modules": modules, "configs": configs, "settings": settings, "transformer": transformer,
    });
    Ok(Some(Found { config, dense }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_outside_of_the_directory_and_endless_lists_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).unwrap().is_none());
        let odd = |modules: Value| {
            std::fs::write(dir.path().join("modules.json"), modules.to_string()).unwrap();
            read(dir.path()).err().unwrap().to_string()
        };
        for path in ["../x", "/etc", "a/b"] {
            assert!(odd(json!([{ "path": path, "type": "x.Pooling" }])).contains("directory"));
        }
        assert!(odd(json!({})).contains("not a list"));
        assert!(odd(json!(vec![json!({}); 17])).contains("at most 16"));
    }
}
