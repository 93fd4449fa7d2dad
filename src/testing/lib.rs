//! Where tests find their data.

pub mod hub;

use std::path::PathBuf;

/// The repository: the nearest directory above the tested package that has a `Cargo.lock`.
/// Determined when the test runs, because clones that share a target directory also share
/// compiled tests.
pub fn root() -> PathBuf {
    let package =
        std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let found = package.ancestors().find(|dir| dir.join("Cargo.lock").is_file());
    found.map_or_else(|| package.clone(), PathBuf::from)
}

/// A file or directory of the larger test material that may be beside the repository. Prints
/// the reason and returns `None` if it is missing.
pub fn shared(what: &str) -> Option<PathBuf> {
    let base = std::env::var_os("DOPPLER_SHARED").map_or(root().join("../shared"), PathBuf::from);
    let path = base.join(what);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is not here (set DOPPLER_SHARED)", path.display());
    None
}

/// Every reference checkpoint: directories with `config.json` and `expected.safetensors`, of
/// this repository and of the larger material beside it. New ones are found automatically.
pub fn references() -> Vec<PathBuf> {
    let own = Some(root().join("tests/data/goldens"));
    let shared = ["goldens", "goldens2", "formats"].map(shared);
    let mut found: Vec<PathBuf> = shared
        .into_iter()
        .flatten()
        .chain(own)
        .filter_map(|dir| std::fs::read_dir(dir).ok())
        .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
        .filter(|dir| ["config.json", "expected.safetensors"].iter().all(|f| dir.join(f).is_file()))
        .collect();
    // A directory that is in both places is the same checkpoint.
    found.sort_by_key(|dir| dir.file_name().map(ToOwned::to_owned));
    found.dedup_by_key(|dir| dir.file_name().map(ToOwned::to_owned));
    found
}

/// Every GGUF file with reference outputs: directories with `model.gguf` and
/// `expected.safetensors`, of this repository and of the larger material beside it.
pub fn gguf_references() -> Vec<PathBuf> {
    let own = Some(root().join("tests/data/gguf"));
    let dirs = [own, shared("formats")].into_iter().flatten();
    let entries = dirs.filter_map(|dir| std::fs::read_dir(dir).ok()).flat_map(|dir| dir.flatten());
    let complete = |dir: &PathBuf| {
        ["model.gguf", "expected.safetensors"].iter().all(|file| dir.join(file).is_file())
    };
    let name = |dir: &PathBuf| {
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.trim_start_matches("gguf-").to_owned()
    };
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(complete).collect();
    // A directory that is in both places has the same files.
    found.sort_by_key(name);
    found.dedup_by_key(|dir| name(dir));
    found
}
