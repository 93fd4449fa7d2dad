//! Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685): what they are, and where they come from.
//!
//! An adapter changes matrices of a model: `y = W x + scale B (A x)`, with `A [rank, cols]` and
//! `B [rows, rank]`. `peft`, `manifest` (Doppler's) and `gguf` read the forms in which adapters are
//! published, `stored` the manifest that this program publishes. `fit` finds the matrices of a graph,
//! `graft` makes the graph that computes the sum. Base weights are never changed. Refuses by name
//! what changes a model in another way. Invariant: an [`Adapter`]'s matrices are finite, and their
//! ranks agree.

mod fit;
mod gguf;
mod graft;
mod manifest;
mod peft;
mod stored;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use doppler_store::DType;

use super::load::LoadError;
pub use graft::{Grafted, graft};
pub use stored::{Described, ROLE, described, is_adapter, store};

/// The largest rank of an adapter.
pub const RANK_MAX: usize = 1024;
/// The most adapters that are attached at once.
pub const ADAPTERS_MAX: usize = 8;
/// The largest weight of an adapter, positive or negative.
pub const WEIGHT_MAX: f32 = 100.0;
/// The most matrices that an adapter changes.
pub const MATRICES_MAX: usize = 1 << 16;
/// The most bytes of one of its matrices, as f32.
const MATRIX_BYTES_MAX: u64 = 1 << 30;

/// Why an adapter cannot be read or attached. Each message is one line.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The files contradict themselves.
    #[error("{place}: {problem}")]
    Invalid { place: String, problem: String },
    /// It changes the model in a way that is not computed here.
    #[error("{place}: {what}, which is not supported")]
    Unsupported { place: String, what: String },
    /// It was made for another model.
    #[error("adapter {adapter} does not fit the model: {problem}")]
    Unfit { adapter: String, problem: String },
    #[error("{0} adapters at once (at most {ADAPTERS_MAX})")]
    TooMany(usize),
    #[error(
        "adapter {adapter}: a weight of {weight} is out of range (-{WEIGHT_MAX} to {WEIGHT_MAX})"
    )]
    Weight { adapter: String, weight: f32 },
    #[error(
        "no room for the adapters: they take {bytes} bytes, more than the budget of {budget} bytes \
         leaves"
    )]
    Room { bytes: u64, budget: u64 },
}

impl AdapterError {
    /// A stable name for JSON and metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Room { .. } => "budget",
            _ => "adapter",
        }
    }
}

pub type Result<T> = std::result::Result<T, AdapterError>;

/// What the changed matrices are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Naming {
    /// As Hugging Face's checkpoints call them: `model.layers.0.self_attn.q_proj.weight`.
    HuggingFace,
    /// By layer and module alone: `layer.0.q_proj`.
    Modules,
    /// As llama.cpp calls them, in its order of rows: `blk.0.attn_q.weight`.
    Ggml,
}

/// A matrix of an adapter, row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub values: Vec<f32>,
    /// The type in which it was stored, which holds it exactly.
    pub dtype: DType,
}

/// The change of one matrix: `scale B A`.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// `[rank, cols]`
    pub a: Matrix,
    /// `[rows, rank]`
    pub b: Matrix,
    pub scale: f32,
}

/// An adapter in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// The name of its directory or file, or the one that it states.
    pub name: String,
    /// What it says it was made for. May be empty.
    pub base: String,
    pub naming: Naming,
    /// llama.cpp's name of the architecture, of [`Naming::Ggml`].
    pub architecture: Option<String>,
    /// By the name of what it changes.
    pub deltas: BTreeMap<String, Delta>,
}

/// An adapter and its weight: 1 applies it as it was trained, 0 not at all.
#[derive(Debug, Clone)]
pub struct Attached {
    pub adapter: Arc<Adapter>,
    pub weight: f32,
}

/// Identifies a set of attached adapters with their weights. Two sets with the same id compute the
/// same; no adapters have the id of zeros.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct SetId([u8; 32]);

impl SetId {
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl Adapter {
    /// A checked adapter.
    ///
    /// # Errors
    /// If it changes nothing or too much, its ranks disagree, or a value is not finite.
    pub fn new(
        name: String,
        base: String,
        naming: Naming,
        architecture: Option<String>,
        deltas: BTreeMap<String, Delta>,
    ) -> Result<Self> {
        let adapter = Self { name, base, naming, architecture, deltas };
        let fail = |problem: String| {
            Err(AdapterError::Invalid { place: format!("adapter {}", adapter.name), problem })
        };
        if adapter.deltas.is_empty() {
            return fail("it changes nothing".into());
        }
        if adapter.deltas.len() > MATRICES_MAX {
            let count = adapter.deltas.len();
            return fail(format!("it changes {count} matrices (at most {MATRICES_MAX})"));
        }
        for (name, Delta { a, b, scale }) in &adapter.deltas {
            if a.rows != b.cols {
                return fail(format!(
                    "{name}: its A has rank {} and its B rank {}: they do not belong together",
                    a.rows, b.cols
                ));
            }
            if !(1..=RANK_MAX).contains(&a.rows) {
                return fail(format!("{name} has rank {} (1 to {RANK_MAX})", a.rows));
            }
            let finite = |matrix: &Matrix| matrix.values.iter().all(|value| value.is_finite());
            if !finite(a) || !finite(b) || !scale.is_finite() {
                return fail(format!("{name} has a value that is not finite: it is damaged"));
            }
        }
        Ok(adapter)
    }

    /// The largest rank.
    pub fn rank(&self) -> usize {
        self.deltas.values().map(|delta| delta.a.rows).max().unwrap_or(0)
    }

    /// BLAKE3 of everything that its effect depends on.
    fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let mut text = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        text(&format!("{:?}", self.naming));
        text(self.architecture.as_deref().unwrap_or_default());
        for (name, Delta { a, b, scale }) in &self.deltas {
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
            hasher.update(&scale.to_le_bytes());
            for matrix in [a, b] {
                hasher.update(&(matrix.rows as u64).to_le_bytes());
                hasher.update(&(matrix.cols as u64).to_le_bytes());
                hasher.update(bytemuck::cast_slice(&matrix.values));
            }
        }
        hasher.finalize()
    }
}

impl SetId {
    /// The id of a set.
    pub fn of(set: &[Attached]) -> Self {
        if set.is_empty() {
            return Self::default();
        }
        let mut hasher = blake3::Hasher::new();
        for Attached { adapter, weight } in set {
            hasher.update(adapter.digest().as_bytes());
            hasher.update(&weight.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// Checks the number of adapters and their weights.
///
/// # Errors
/// If one of them is out of range.
pub fn check_set(set: &[Attached]) -> Result<()> {
    if set.len() > ADAPTERS_MAX {
        return Err(AdapterError::TooMany(set.len()));
    }
    // NaN is out of range, too.
    let bad = |one: &&Attached| !(-WEIGHT_MAX..=WEIGHT_MAX).contains(&one.weight);
    match set.iter().find(bad) {
        None => Ok(()),
        Some(Attached { adapter, weight }) => {
            Err(AdapterError::Weight { adapter: adapter.name.clone(), weight: *weight })
        }
    }
}

/// Whether there is an adapter at `path`, in any of its forms. A file that cannot be read is none.
pub fn is_here(path: &Path) -> bool {
    if path.is_dir() {
        return path.join(peft::CONFIG).is_file()
            || path.join("manifest.json").is_file() && stored::is_here(path);
    }
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("json") => manifest::is_here(path),
        Some("gguf") => gguf::is_here(path),
        _ => false,
    }
}

/// Opens the adapter at `path`: a directory of PEFT's, one that `publish` or `convert` wrote, a
/// manifest of Doppler's, or a GGUF file.
///
/// # Errors
/// One line that names the file and what is wrong with it.
pub fn open(path: &Path) -> Result<Adapter> {
    let fail = |problem: &str| AdapterError::Invalid {
        place: path.display().to_string(),
        problem: problem.to_owned(),
    };
    if !path.exists() {
        return Err(fail("there is no such file or directory"));
    }
    if path.is_file() {
        return match path.extension().and_then(|ending| ending.to_str()) {
            Some("json") => manifest::open(path),
            Some("gguf") => gguf::open(path),
            _ => Err(fail("not an adapter: of single files *.json and *.gguf are read")),
        };
    }
    if path.join(peft::CONFIG).is_file() {
        return peft::open(path);
    }
    if path.join("manifest.json").is_file() {
        return stored::open(path);
    }
    Err(fail(
        "not an adapter: it has neither adapter_config.json (PEFT) nor manifest.json; one of Doppler's \
         or a GGUF file is given by its own name",
    ))
}

/// Opens a published adapter by its manifest. `bytes` returns a shard's bytes by its index.
///
/// # Errors
/// If it is no adapter's manifest, or a shard cannot be read.
pub fn open_manifest(
    manifest: &doppler_store::Manifest,
    bytes: &mut dyn FnMut(u32) -> Result<Vec<u8>>,
) -> Result<Adapter> {
    stored::from_manifest(manifest, bytes)
}

/// The name of a file or directory without its ending.
fn name_of(path: &Path) -> String {
    let full = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let name = if full.is_dir() { full.file_name() } else { full.file_stem() };
    name.unwrap_or_default().to_string_lossy().into_owned()
}

/// Reads a whole tensor of a checkpoint as a matrix.
fn matrix(from: &dyn super::load::Checkpoint, name: &str) -> std::result::Result<Matrix, String> {
    let stored = from.find(name).ok_or_else(|| format!("{name} is missing"))?;
    let [rows, cols] = stored.shape[..] else {
        return Err(format!("{name} has the shape {:?}, expected a matrix", stored.shape));
    };
    let dtype = stored.dtype().ok_or_else(|| {
        format!("{name} is of a type that cannot be read (F32, F16 and BF16 can)")
    })?;
    if rows.checked_mul(cols).and_then(|n| n.checked_mul(4)).is_none_or(|n| n > MATRIX_BYTES_MAX) {
        return Err(format!("{name} of shape {:?} is too large for an adapter", stored.shape));
    }
    let (rows, cols) = (rows as usize, cols as usize);
    let mut bytes = vec![0; rows * dtype.row_bytes(cols)];
    from.read(name, 0, &mut bytes).map_err(|error| error.to_string())?;
    Ok(decoded(rows, cols, dtype, &bytes))
}

/// A matrix from its stored rows.
fn decoded(rows: usize, cols: usize, dtype: DType, bytes: &[u8]) -> Matrix {
    let mut values = vec![0.0; rows * cols];
    if cols > 0 {
        let stored = bytes.chunks_exact(dtype.row_bytes(cols));
        for (row, stored) in values.chunks_exact_mut(cols).zip(stored) {
            super::quant::dequantize(dtype, stored, cols, row);
        }
    }
    // Quantised ones (of GGUF files) are stored wide again: their blocks are not made anew.
    let dtype = if dtype.is_quantised() { DType::F32 } else { dtype };
    Matrix { rows, cols, values, dtype }
}

impl Matrix {
    /// Its transpose.
    fn transposed(&self) -> Self {
        let (rows, cols) = (self.cols, self.rows);
        let values = (0..rows).flat_map(|row| (0..cols).map(move |col| col * rows + row));
        let values = values.map(|at| self.values[at]).collect();
        Self { rows, cols, values, dtype: self.dtype }
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..][..self.cols]
    }

    /// Some of its rows, in this order.
    fn rows_of(&self, rows: impl ExactSizeIterator<Item = usize>) -> Self {
        let count = rows.len();
        let values = rows.flat_map(|row| self.row(row).iter().copied()).collect();
        Self { rows: count, cols: self.cols, values, dtype: self.dtype }
    }
}
