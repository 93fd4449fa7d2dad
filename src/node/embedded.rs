//! The small Mixtral that comes with the binary, for `demo` and for pages to run.
//!
//! 15.5 M parameters in Q4_K_M, trained for this project on public-domain books. Its shards have 1
//! MiB, so that they can be spread over several nodes. It was made with
//! `convert tiny-mixtral --quantize q4_k_m --shard-size 1MiB`.

use std::fs;
use std::path::Path;

use anyhow::Context;

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!("../../models/tiny-mixtral-q4_k_m/", $name)).as_slice())),*]
    };
}

/// File names and bytes of the RDRR directory.
const FILES: [(&str, &[u8]); 13] = files![
    "manifest.json",
    "tokenizer.json",
    "shard_00000.bin",
    "shard_00001.bin",
    "shard_00002.bin",
    "shard_00003.bin",
    "shard_00004.bin",
    "shard_00005.bin",
    "shard_00006.bin",
    "shard_00007.bin",
    "shard_00008.bin",
    "shard_00009.bin",
    "shard_00010.bin",
];

/// The bytes of `manifest.json`. Their hash is the model's id.
pub const fn manifest() -> &'static [u8] {
    FILES[0].1
}

/// The bytes of each object: manifest, tokenizer, shards.
pub fn objects() -> impl Iterator<Item = &'static [u8]> {
    FILES.iter().map(|(_, bytes)| *bytes)
}

/// Writes the model as an RDRR directory.
pub fn extract(dir: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    for (name, bytes) in FILES {
        let path = dir.join(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use doppler_store::Manifest;

    #[test]
    fn every_file_of_the_manifest_is_embedded_and_matches_its_hash() {
        let bytes_of = |name: &str| FILES.iter().find(|(file, _)| *file == name).unwrap().1;
        let manifest = Manifest::parse(bytes_of("manifest.json")).unwrap();
        for shard in &manifest.shards {
            assert!(shard.hash.matches(bytes_of(&shard.filename)), "{}", shard.filename);
        }
        let total: usize = FILES.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(total < 10_000_000, "{total} bytes");
        assert_eq!(FILES.len(), manifest.shards.len() + 2);
        assert_eq!((FILES[0].0, objects().count()), ("manifest.json", FILES.len()));
    }
}
