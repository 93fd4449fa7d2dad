//! Where tests find their data.

use std::path::{Path, PathBuf};

/// The repository: the nearest directory above the tested package that has a `Cargo.lock`.
/// Looked up when the test runs, because clones that share a target directory share what
/// was compiled, too.
pub fn root() -> PathBuf {
    let package =
        std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let found = package.ancestors().find(|dir| dir.join("Cargo.lock").is_file());
    found.map_or_else(|| package.clone(), PathBuf::from)
}

/// A file or directory of the larger test material that may lie beside the repository
/// (`$DOPPLER_SHARED`, else `../shared`); `None`, with the reason printed, where it does not.
///
/// # Panics
/// If it is missing while `DOPPLER_REQUIRE_SHARED` is set.
pub fn shared(what: &str) -> Option<PathBuf> {
    let base = std::env::var_os("DOPPLER_SHARED").map_or(root().join("../shared"), PathBuf::from);
    let path = base.join(what);
    if path.exists() {
        return Some(path);
    }
    let required = std::env::var_os("DOPPLER_REQUIRE_SHARED").is_some();
    assert!(!required, "{} is missing, and DOPPLER_REQUIRE_SHARED is set", path.display());
    println!("skipped: {} is not here (set DOPPLER_SHARED)", path.display());
    None
}

/// Directories with a checkpoint and its reference outputs (`config.json` and
/// `expected.safetensors`), by rising name: the repository's own, then the shared ones.
pub fn checkpoints() -> Vec<PathBuf> {
    let mut found = own_checkpoints();
    for base in ["goldens", "goldens2"].into_iter().filter_map(shared) {
        found.extend(checkpoints_in(&base));
    }
    found
}

/// The same, of the repository's own.
pub fn own_checkpoints() -> Vec<PathBuf> {
    checkpoints_in(&root().join("tests/data/goldens"))
}

fn checkpoints_in(base: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(base).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|dir| {
            ["config.json", "expected.safetensors"].iter().all(|file| dir.join(file).is_file())
        })
        .collect();
    found.sort();
    found
}
