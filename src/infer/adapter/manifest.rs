//! Adapters as Doppler's manifests describe them: one JSON file, with its matrices in it or in a
//! safetensors file beside it.
//!
//! Matrices are named `layer.{L}.{module}.lora_{a|b}`. Inline ones are `[cols, rank]` and `[rank,
//! rows]`; those of safetensors files may also be the other way round, which their shapes tell. The
//! scale is `alpha / rank`. A checksum is verified. Refuses matrices that lie elsewhere (`url`,
//! `opfsPath`), and weights in other formats than safetensors, by name.
//!
//! Format: Doppler, `docs/rdrr-lora-format.md` and `src/adapters/adapter-manifest.js`.

use std::collections::BTreeMap;
use std::path::Path;

use doppler_store::DType;
use doppler_store::manifest::{HashAlgorithm, ShardHash};
use serde::Deserialize;

use super::{Adapter, AdapterError, Delta, Matrix, Naming, RANK_MAX, Result, matrix};
use crate::load::{self, Checkpoint};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    id: String,
    base_model: String,
    rank: u64,
    alpha: f64,
    target_modules: Vec<String>,
    #[serde(default)]
    checksum: Option<String>,
    #[serde(default)]
    checksum_algorithm: Option<String>,
    #[serde(default)]
    weights_format: Option<String>,
    #[serde(default)]
    weights_path: Option<String>,
    #[serde(default)]
    tensors: Vec<Tensor>,
}

#[derive(Deserialize)]
struct Tensor {
    name: String,
    shape: [usize; 2],
    #[serde(default)]
    dtype: Option<String>,
    #[serde(default)]
    data: Option<Vec<f32>>,
    #[serde(default)]
    base64: Option<String>,
}

/// Doppler's names of modules that differ from the usual ones.
const ALIASES: &[(&str, &str)] = &[
    ("q", "q_proj"),
    ("k", "k_proj"),
    ("v", "v_proj"),
    ("o", "o_proj"),
    ("wq", "q_proj"),
    ("wk", "k_proj"),
    ("wv", "v_proj"),
    ("wo", "o_proj"),
    ("gate", "gate_proj"),
    ("up", "up_proj"),
    ("down", "down_proj"),
];
const MODULES: &[&str] =
    &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

pub(super) fn is_here(path: &Path) -> bool {
    load::read_big_json(path).is_ok_and(|json| {
        ["baseModel", "rank", "alpha", "targetModules"].iter().all(|key| json.get(key).is_some())
    })
}

pub(super) fn open(path: &Path) -> Result<Adapter> {
    let json = load::read_big_json(path)?;
    let place = path.display().to_string();
    let wrong = |problem: String| AdapterError::Invalid { place: place.clone(), problem };
    let manifest: Manifest = serde_json::from_value(json)
        .map_err(|error| wrong(format!("not a manifest of an adapter: {error}")))?;
    let rank = usize::try_from(manifest.rank).unwrap_or(usize::MAX);
    if !(1..=RANK_MAX).contains(&rank) || !manifest.alpha.is_finite() {
        return Err(wrong(format!("rank {rank} (1 to {RANK_MAX}) or alpha is out of range")));
    }
    let unsupported = |what: String| AdapterError::Unsupported { place: place.clone(), what };
    let matrices = match (&manifest.weights_path, manifest.weights_format.as_deref()) {
        (Some(file), Some("safetensors") | None) if manifest.tensors.is_empty() => {
            beside(path, file, &manifest, &wrong)?
        }
        (_, Some(format)) if manifest.tensors.is_empty() => {
            return Err(unsupported(format!("weightsFormat {format:?} (safetensors is)")));
        }
        _ => inline(&manifest).map_err(wrong)?,
    };
    let scale = (manifest.alpha / rank as f64) as f32;
    let mut parts: BTreeMap<String, [Option<Matrix>; 2]> = BTreeMap::new();
    for (name, matrix) in matrices {
        let Some((layer, module, first)) = named(&name) else {
            return Err(unsupported(format!("the tensor {name}")));
        };
        if !manifest.target_modules.iter().any(|target| usual(target) == Some(module)) {
            return Err(wrong(format!("{name} changes a module that targetModules does not name")));
        }
        let matrix = turned(matrix, rank, first);
        let matrix = matrix.ok_or_else(|| wrong(format!("{name} does not have rank {rank}")))?;
        let place = usize::from(!first);
        parts.entry(format!("layer.{layer}.{module}")).or_default()[place] = Some(matrix);
    }
    let mut deltas = BTreeMap::new();
    for (name, pair) in parts {
        let [Some(a), Some(b)] = pair else {
            return Err(wrong(format!("{name} has only one of lora_a and lora_b")));
        };
        deltas.insert(name, Delta { a, b, scale });
    }
    Adapter::new(manifest.id, manifest.base_model, Naming::Modules, None, deltas)
}

/// The layer, the module, and whether it is the module's A.
fn named(name: &str) -> Option<(usize, &'static str, bool)> {
    let rest = name.strip_prefix("layers").or_else(|| name.strip_prefix("layer"))?;
    let (layer, rest) = rest.strip_prefix('.').unwrap_or(rest).split_once('.')?;
    let (module, kind) = rest.split_once(".lora_")?;
    let first = match kind {
        "a" | "A" => true,
        "b" | "B" => false,
        _ => return None,
    };
    Some((layer.parse().ok()?, usual(module)?, first))
}

fn usual(module: &str) -> Option<&'static str> {
    let lower = module.to_ascii_lowercase();
    let alias = ALIASES.iter().find(|(known, _)| *known == lower).map(|(_, usual)| *usual);
    alias.or_else(|| MODULES.iter().find(|known| **known == lower).copied())
}

/// A as `[rank, cols]`, B as `[rows, rank]`. Inline, and if both are possible, it is stored the other
/// way round. `None` if neither side is the rank.
fn turned(of: (Matrix, bool), rank: usize, first: bool) -> Option<Matrix> {
    let (matrix, inline) = of;
    let sides = if first { (matrix.rows, matrix.cols) } else { (matrix.cols, matrix.rows) };
    match (sides.0 == rank, sides.1 == rank) {
        (true, true) if inline => Some(matrix.transposed()),
        (true, _) => Some(matrix),
        (false, true) => Some(matrix.transposed()),
        (false, false) => None,
    }
}

type Named = Vec<(String, (Matrix, bool))>;

fn inline(manifest: &Manifest) -> std::result::Result<Named, String> {
    let mut summed = Vec::new();
    let mut all = Vec::new();
    for tensor in &manifest.tensors {
        let Tensor { name, shape: [rows, cols], dtype, data, base64 } = tensor;
        if dtype.as_deref().is_some_and(|dtype| dtype != "f32") {
            return Err(format!("{name} is {dtype:?} (f32 is)"));
        }
        let values = match (data, base64) {
            (Some(data), _) => data.clone(),
            (None, Some(text)) => {
                let bytes = decode(text).ok_or_else(|| format!("{name} is not base64"))?;
                let (words, rest) = bytes.as_chunks::<4>();
                if !rest.is_empty() {
                    return Err(format!("{name} is not whole f32"));
                }
                words.iter().map(|word| f32::from_le_bytes(*word)).collect()
            }
            (None, None) => {
                return Err(format!("{name} is not in the file (neither data nor base64)"));
            }
        };
        if rows.checked_mul(*cols) != Some(values.len()) {
            return Err(format!("{name} has {} values of [{rows}, {cols}]", values.len()));
        }
        values.iter().for_each(|value| summed.extend_from_slice(&value.to_le_bytes()));
        let matrix = Matrix { rows: *rows, cols: *cols, values, dtype: DType::F32 };
        all.push((name.clone(), (matrix, true)));
    }
    verify(manifest, &summed)?;
    Ok(all)
}

fn verify(manifest: &Manifest, bytes: &[u8]) -> std::result::Result<(), String> {
    let Some(checksum) = &manifest.checksum else { return Ok(()) };
    match manifest.checksum_algorithm.as_deref() {
        None | Some("sha256") => {}
        Some(other) => return Err(format!("checksumAlgorithm {other:?} (sha256 is known)")),
    }
    let found = ShardHash::of(HashAlgorithm::Sha256, bytes).to_hex();
    match found.eq_ignore_ascii_case(checksum) {
        true => Ok(()),
        false => Err(format!("its weights have the checksum {found}, not {checksum}")),
    }
}

/// The matrices of a safetensors file beside the manifest.
fn beside(
    path: &Path,
    file: &str,
    manifest: &Manifest,
    wrong: &dyn Fn(String) -> AdapterError,
) -> Result<Named> {
    if !load::is_plain(file) {
        return Err(wrong(format!("weightsPath {file:?} is not a file beside it")));
    }
    let file = path.with_file_name(file);
    if manifest.checksum.is_some() {
        let bytes = load::read_whole(&file)?;
        verify(manifest, &bytes).map_err(wrong)?;
    }
    let checkpoint = load::open_safetensors(&file)?;
    let all = checkpoint.names().map(|name| {
        let matrix = matrix(&checkpoint, name).map_err(wrong)?;
        Ok((name.trim_end_matches(".weight").to_owned(), (matrix, false)))
    });
    all.collect()
}

/// Standard base64 (RFC 4648). `None` if it is not.
fn decode(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    for chunk in text.chunks(4) {
        let mut word = 0_u32;
        for (place, byte) in chunk.iter().enumerate() {
            let value = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            word |= u32::from(value) << (18 - 6 * place);
        }
        let count = match chunk.len() {
            4 => 3,
            3 => 2,
            2 => 1,
            _ => return None,
        };
        bytes.extend_from_slice(&word.to_be_bytes()[1..1 + count]);
    }
    Some(bytes)
}
