//! Adapters as this program publishes them: an RDRR manifest of the type "adapter", whose tensors
//! have the role "adapter", and shards as a model's.
//!
//! The manifest's config has one key, `adapter`: the id and the name of the base, how the changed
//! matrices are called, and the scale of each. Tensors are `NAME.lora_a` and `NAME.lora_b`, in the type
//! in which they came, so nothing is rounded. The same adapter gives the same bytes.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

use doppler_store::manifest::{
    Architecture, HashAlgorithm, ManifestBody, Role, Shard, ShardHash, Span, TensorEntry, Tensors,
};
use doppler_store::verified::OBJECT_BYTES_MAX;
use doppler_store::{Manifest, ModelId, ShardId};
use serde::{Deserialize, Serialize};

use super::{Adapter, AdapterError, Delta, Matrix, Naming, Result, decoded};
use crate::load::{LoadError, ShardSink};
use crate::quant::quantize;

/// A manifest's type, and its tensors' role.
pub const ROLE: &str = "adapter";
const FORMAT: u32 = 1;

/// The names of namings in a manifest.
const NAMING: [(Naming, &str); 3] =
    [(Naming::HuggingFace, "hugging_face"), (Naming::Modules, "modules"), (Naming::Ggml, "ggml")];

/// What a manifest's config has under `adapter`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Described {
    /// 1.
    pub format: u32,
    /// The model that it was published for.
    pub base: ModelId,
    /// What the adapter itself calls its base.
    pub base_name: String,
    naming: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    architecture: Option<String>,
    scales: BTreeMap<String, f64>,
}

/// Whether a manifest is an adapter's.
pub fn is_adapter(manifest: &Manifest) -> bool {
    manifest.model_type == ROLE
}

/// What an adapter's manifest says of it.
///
/// # Errors
/// If it is no adapter's, or of a later format.
pub fn described(manifest: &Manifest) -> Result<Described> {
    let fail = |problem: String| AdapterError::Invalid {
        place: format!("adapter {}", manifest.model_id),
        problem,
    };
    let found = manifest.config.get(ROLE).filter(|_| is_adapter(manifest));
    let found = found.ok_or_else(|| fail("its manifest is not an adapter's".into()))?;
    let described: Described = serde_json::from_value(found.clone())
        .map_err(|error| fail(format!("its manifest's config: {error}")))?;
    match described.format {
        FORMAT => Ok(described),
        other => Err(fail(format!("its manifest has format {other} ({FORMAT} is known)"))),
    }
}

pub(super) fn is_here(dir: &Path) -> bool {
    Manifest::read_dir(dir).is_ok_and(|manifest| is_adapter(&manifest))
}

pub(super) fn open(dir: &Path) -> Result<Adapter> {
    let manifest = Manifest::read_dir(dir).map_err(|error| AdapterError::Invalid {
        place: dir.join("manifest.json").display().to_string(),
        problem: error.to_string(),
    })?;
    from_manifest(&manifest, &mut |index| {
        let shard = &manifest.shards[index as usize];
        let path = dir.join(&shard.filename);
        let fail =
            |problem: String| AdapterError::Invalid { place: path.display().to_string(), problem };
        let bytes = doppler_store::regular::read(&path).map_err(|error| fail(error.to_string()))?;
        match bytes.len() as u64 == shard.size && shard.hash.matches(&bytes) {
            true => Ok(bytes),
            false => Err(fail("damaged: its hash is not the one in the manifest".into())),
        }
    })
}

/// Reads an adapter by its manifest; `bytes` returns a shard's by its index.
pub(super) fn from_manifest(
    manifest: &Manifest,
    bytes: &mut dyn FnMut(u32) -> Result<Vec<u8>>,
) -> Result<Adapter> {
    let described = described(manifest)?;
    let wrong = |problem: String| AdapterError::Invalid {
        place: format!("adapter {}", manifest.model_id),
        problem,
    };
    let naming = NAMING.iter().find(|(_, name)| *name == described.naming);
    let (naming, _) =
        naming.ok_or_else(|| wrong(format!("its naming {:?} is unknown", described.naming)))?;
    let mut shards: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    let mut read = |name: String| {
        let entry = manifest.tensors.get(&name);
        let entry = entry.ok_or_else(|| wrong(format!("it has no tensor {name}")))?;
        let (&[rows, cols], false) = (&entry.shape[..], entry.dtype.is_quantised()) else {
            return Err(wrong(format!("{name} is no plain matrix")));
        };
        let mut stored = Vec::new();
        for span in &entry.spans {
            if let Entry::Vacant(entry) = shards.entry(span.shard) {
                entry.insert(bytes(span.shard)?);
            }
            // Spans of a checked manifest are within their shards.
            let from = span.offset as usize..(span.offset + span.size) as usize;
            let part = shards[&span.shard].get(from);
            stored.extend_from_slice(part.ok_or_else(|| wrong(format!("{name} is cut off")))?);
        }
        Ok(decoded(rows as usize, cols as usize, entry.dtype, &stored))
    };
    let mut deltas = BTreeMap::new();
    for (name, scale) in &described.scales {
        let (a, b) = (read(format!("{name}.lora_a"))?, read(format!("{name}.lora_b"))?);
        deltas.insert(name.clone(), Delta { a, b, scale: *scale as f32 });
    }
    let (name, base) = (manifest.model_id.clone(), described.base_name);
    Adapter::new(name, base, *naming, described.architecture, deltas)
}

/// Writes an adapter as a manifest and shards. `base` is the model that it is for.
///
/// # Errors
/// If the sink fails.
pub fn store(
    adapter: &Adapter,
    base: ModelId,
    sink: &mut dyn ShardSink,
) -> std::result::Result<Manifest, LoadError> {
    let mut tensors = Tensors::default();
    let mut all = Vec::new();
    for (name, Delta { a, b, .. }) in &adapter.deltas {
        for (part, matrix) in [("lora_a", a), ("lora_b", b)] {
            let (start, bytes) = (all.len() as u64, bytes(matrix));
            all.extend_from_slice(&bytes);
            let entry = TensorEntry {
                spans: spans(start, bytes.len() as u64),
                size: bytes.len() as u64,
                shape: vec![matrix.rows as u64, matrix.cols as u64],
                dtype: matrix.dtype,
                role: Role::Adapter,
                group: ROLE.to_owned(),
                layout: None,
            };
            tensors.insert(format!("{name}.{part}"), entry)?;
        }
    }
    let total_size = all.len() as u64;
    let mut shards = Vec::new();
    for (index, bytes) in (0..).zip(all.chunks(OBJECT_BYTES_MAX as usize)) {
        let filename = format!("shard_{index:05}.bin");
        sink.shard(&filename, ShardId::of(bytes), bytes.to_vec())?;
        let hash = ShardHash::of(HashAlgorithm::Blake3, bytes);
        let offset = u64::from(index) * OBJECT_BYTES_MAX;
        shards.push(Shard { index, filename, size: bytes.len() as u64, hash, offset });
    }
    let described = Described {
        format: FORMAT,
        base,
        base_name: adapter.base.clone(),
        naming: NAMING
            .iter()
            .find(|(naming, _)| *naming == adapter.naming)
            .map_or("", |n| n.1)
            .into(),
        architecture: adapter.architecture.clone(),
        scales: adapter.deltas.iter().map(|(n, d)| (n.clone(), f64::from(d.scale))).collect(),
    };
    let described = serde_json::to_value(described).expect("plain data serialises");
    let manifest = Manifest::new(ManifestBody {
        version: 1,
        model_id: adapter.name.clone(),
        model_type: ROLE.to_owned(),
        quantization: "none".to_owned(),
        architecture: Architecture::default(),
        moe: None,
        inference: serde_json::Value::Null,
        config: serde_json::json!({ ROLE: described }),
        shards,
        tensors,
        total_size,
        eos_token_ids: Vec::new(),
        tokenizer: None,
        chat: None,
    })?;
    sink.finish(manifest.to_json_bytes())?;
    Ok(manifest)
}

/// Where `size` bytes from `start` on are in shards of the largest size.
fn spans(mut start: u64, mut size: u64) -> Vec<Span> {
    let mut spans = Vec::new();
    while size > 0 {
        let (shard, offset) = (start / OBJECT_BYTES_MAX, start % OBJECT_BYTES_MAX);
        let here = size.min(OBJECT_BYTES_MAX - offset);
        spans.push(Span { shard: shard as u32, offset, size: here });
        (start, size) = (start + here, size - here);
    }
    spans
}

/// A matrix in its own type, which holds its values exactly.
fn bytes(matrix: &Matrix) -> Vec<u8> {
    let mut out = Vec::new();
    for row in matrix.values.chunks_exact(matrix.cols.max(1)) {
        quantize(matrix.dtype, row, &mut out).expect("an adapter's values are finite");
    }
    out
}
