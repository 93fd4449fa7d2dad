//! Models of the soak: the embedded one with other bytes, so that nothing of it is held already.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::model;

/// A copy of the embedded model whose name is `name`. Each shard ends with the name, which no
/// tensor reads: the text stays the same, and every object is a new one.
pub fn variant(dir: &Path, name: &str) -> PathBuf {
    let (from, to) = (model(), dir.join(name));
    fs::create_dir_all(&to).unwrap();
    let text = fs::read(from.join("manifest.json")).unwrap();
    let mut manifest: Value = serde_json::from_slice(&text).unwrap();
    manifest["modelId"] = name.into();
    let mut total = 0;
    for shard in manifest["shards"].as_array_mut().unwrap() {
        let file = shard["filename"].as_str().unwrap().to_owned();
        let mut bytes = fs::read(from.join(&file)).unwrap();
        bytes.extend(name.bytes().cycle().take(64));
        shard["hash"] = blake3::hash(&bytes).to_hex().as_str().into();
        shard["size"] = bytes.len().into();
        shard["offset"] = total.into();
        total += bytes.len();
        fs::write(to.join(file), bytes).unwrap();
    }
    manifest["totalSize"] = total.into();
    fs::write(to.join("manifest.json"), manifest.to_string()).unwrap();
    fs::copy(from.join("tokenizer.json"), to.join("tokenizer.json")).unwrap();
    to
}
