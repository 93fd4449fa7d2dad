//! The RDRR manifest: which bytes of which shards make up each tensor.
//!
//! Owns the types and their queries. Reading is in `manifest_read`, the rules in
//! `manifest_check`, writing in `manifest_write`. Invariant: a [`Manifest`]
//! exists only if it keeps every rule: spans lie within their shards, no two
//! spans overlap, sizes follow from shapes and types, and file names cannot leave
//! their directory. It is immutable. Its id is the BLAKE3 hash of the exact bytes
//! that it was read from, or that it is written as.
//!
//! Format: version 1 as the Doppler project writes it (`manifest.json` beside
//! `shard_00000.bin`...). `tests/data/rdrr` has real ones.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Deref;

use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::chat::ChatTemplates;
use super::manifest_check::check;
pub use super::manifest_read::read_eos;
use super::{ByteRange, DType, ModelId, ShardId};

/// The largest manifest that is read, in bytes. A trillion-parameter MoE of 70,000 tensors needs
/// about 16 MB.
pub const MANIFEST_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Why a manifest was not accepted. Each message is one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("the manifest is {0} bytes, more than {MANIFEST_BYTES_MAX}")]
    TooLarge(usize),
    #[error("the manifest is not valid RDRR JSON: {0}")]
    Json(String),
    #[error("RDRR version {0} is not supported (this build reads version 1)")]
    Version(u64),
    #[error("the manifest keeps its tensors in {0:?}: pass the directory, not this file alone")]
    TensorsElsewhere(String),
    #[error("manifest field {field}: {problem}")]
    Field { field: &'static str, problem: String },
    #[error("shard {index}: {problem}")]
    Shard { index: usize, problem: String },
    #[error("tensor {name:?}: {problem}")]
    Tensor { name: String, problem: String },
    #[error("tensor {tensor:?}: bytes {start}..{end} are outside shard {shard} of {size} bytes")]
    OutOfRange { tensor: String, shard: u32, start: u64, end: u64, size: u64 },
    #[error(
        "tensors {first:?} and {second:?} overlap in shard {shard}: \
         one ends at {end}, the other starts at {start}"
    )]
    Overlap { first: String, second: String, shard: u32, start: u64, end: u64 },
    #[error("shard {0} is hashed with sha256: only shards hashed with BLAKE3 can be addressed")]
    NotBlake3(u32),
    #[error("the manifest has no {0}")]
    Missing(String),
    #[error("{path}: {problem}")]
    Io { path: String, problem: String },
}

/// The hash function of a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HashAlgorithm {
    Sha256,
    Blake3,
}

impl HashAlgorithm {
    /// The name in a manifest's `hashAlgorithm`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Blake3 => "blake3",
        }
    }
}

/// A shard's hash together with its hash function.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ShardHash {
    pub algorithm: HashAlgorithm,
    pub bytes: [u8; 32],
}

impl ShardHash {
    /// The hash of these bytes.
    pub fn of(algorithm: HashAlgorithm, bytes: &[u8]) -> Self {
        let bytes = match algorithm {
            HashAlgorithm::Blake3 => *blake3::hash(bytes).as_bytes(),
            HashAlgorithm::Sha256 => Sha256::digest(bytes).into(),
        };
        Self { algorithm, bytes }
    }

    /// Whether this is the hash of these bytes.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        Self::of(self.algorithm, bytes) == *self
    }

    /// 64 hexadecimal digits, without the algorithm's name.
    pub fn to_hex(&self) -> String {
        blake3::Hash::from_bytes(self.bytes).to_hex().to_string()
    }
}

impl fmt::Display for ShardHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.to_hex())
    }
}

impl fmt::Debug for ShardHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One file of weights, at most 64 MiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Its place in the list, counted from 0.
    pub index: u32,
    /// A plain file name, without a directory.
    pub filename: String,
    /// Bytes, 1..=64 MiB.
    pub size: u64,
    pub hash: ShardHash,
    /// Total bytes of the shards before it.
    pub offset: u64,
}

impl Shard {
    /// The content address. [`ManifestError::NotBlake3`] if the shard is hashed otherwise.
    pub fn id(&self) -> Result<ShardId, ManifestError> {
        match self.hash.algorithm {
            HashAlgorithm::Blake3 => Ok(ShardId::from(self.hash.bytes)),
            HashAlgorithm::Sha256 => Err(ManifestError::NotBlake3(self.index)),
        }
    }
}

/// Consecutive bytes of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub shard: u32,
    /// Bytes from the start of the shard.
    pub offset: u64,
    /// Bytes, at least 1.
    pub size: u64,
}

impl Span {
    /// The range within the shard. Never `None` in a checked manifest.
    pub fn range(&self) -> Option<ByteRange> {
        ByteRange::at(self.offset, self.size)
    }
}

/// What a tensor is for. Unknown names are kept as they are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Embedding,
    LmHead,
    Norm,
    Matmul,
    Router,
    Expert,
    Vision,
    /// One of the two matrices by which an adapter changes a matrix of its base.
    Adapter,
    Other,
    Unknown(String),
}

impl Role {
    pub fn from_name(name: &str) -> Self {
        match name {
            "embedding" => Self::Embedding,
            "lm_head" => Self::LmHead,
            "norm" => Self::Norm,
            "matmul" => Self::Matmul,
            "router" => Self::Router,
            "expert" => Self::Expert,
            "vision" => Self::Vision,
            "adapter" => Self::Adapter,
            "other" => Self::Other,
            other => Self::Unknown(other.to_owned()),
        }
    }

    /// The name in the manifest.
    pub fn name(&self) -> &str {
        match self {
            Self::Embedding => "embedding",
            Self::LmHead => "lm_head",
            Self::Norm => "norm",
            Self::Matmul => "matmul",
            Self::Router => "router",
            Self::Expert => "expert",
            Self::Vision => "vision",
            Self::Adapter => "adapter",
            Self::Other => "other",
            Self::Unknown(name) => name,
        }
    }
}

/// One tensor: where its bytes are and what they mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// In order. More than one if the tensor crosses shards.
    pub spans: Vec<Span>,
    /// Bytes, the sum of the spans.
    pub size: u64,
    /// Outermost dimension first; the last one is the row length. Empty for a scalar.
    pub shape: Vec<u64>,
    pub dtype: DType,
    pub role: Role,
    /// The unit of loading that it belongs to: `embed`, `layer.3`, `layer.3.expert.7`, `head`...
    pub group: String,
    /// `row`: each row is padded to whole blocks. `None` for types without blocks.
    pub layout: Option<String>,
}

impl TensorEntry {
    /// The shape as a matrix: (product of all but the last dimension, last dimension).
    pub fn rows_cols(&self) -> (u64, u64) {
        match self.shape.split_last() {
            None => (1, 1),
            Some((&cols, rows)) => (rows.iter().product(), cols),
        }
    }

    /// The only span; `None` if there are several.
    pub fn single_span(&self) -> Option<Span> {
        match self.spans[..] {
            [span] => Some(span),
            _ => None,
        }
    }

    /// `(layer, expert)` of the group `layer.L.expert.E`.
    pub fn expert(&self) -> Option<(u32, u32)> {
        let rest = self.group.strip_prefix("layer.")?;
        let (layer, expert) = rest.split_once(".expert.")?;
        Some((layer.parse().ok()?, expert.parse().ok()?))
    }
}

/// Tensors by name, in the manifest's order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tensors {
    entries: Vec<(String, TensorEntry)>,
    index: HashMap<String, usize>,
}

impl Tensors {
    /// Adds a tensor. An error if the name is taken.
    pub fn insert(&mut self, name: String, tensor: TensorEntry) -> Result<(), ManifestError> {
        if self.index.contains_key(&name) {
            return Err(ManifestError::Tensor { name, problem: "named twice".into() });
        }
        self.index.insert(name.clone(), self.entries.len());
        self.entries.push((name, tensor));
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<&TensorEntry> {
        self.index.get(name).map(|&at| &self.entries[at].1)
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &TensorEntry)> {
        self.entries.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// The network's sizes, as far as the manifest states them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Architecture {
    pub num_layers: Option<u64>,
    pub hidden_size: Option<u64>,
    pub intermediate_size: Option<u64>,
    pub num_attention_heads: Option<u64>,
    pub num_key_value_heads: Option<u64>,
    pub head_dim: Option<u64>,
    pub vocab_size: Option<u64>,
    pub max_seq_len: Option<u64>,
}

/// The mixture of experts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MoeConfig {
    pub num_experts: u64,
    pub num_experts_per_token: u64,
    #[serde(default)]
    pub expert_format: Option<String>,
    #[serde(default)]
    pub expert_intermediate_size: Option<u64>,
}

/// The tokenizer file that goes with the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerEntry {
    /// A plain file name beside the manifest.
    pub file: String,
    /// Bytes. Manifests written by this program always state it.
    pub size: Option<u64>,
    /// The file's BLAKE3 hash: its address in the store. Manifests written by this program
    /// always state it.
    pub id: Option<ShardId>,
}

/// The contents of a manifest, not yet checked: see [`Manifest::new`].
#[derive(Debug, Clone, PartialEq)]
pub struct ManifestBody {
    pub version: u64,
    pub model_id: String,
    pub model_type: String,
    pub quantization: String,
    pub architecture: Architecture,
    pub moe: Option<MoeConfig>,
    /// RDRR's `inference` block, unchanged; `Null` if absent.
    pub inference: Value,
    /// The Hugging Face `config.json`, unchanged; `Null` if absent.
    pub config: Value,
    pub shards: Vec<Shard>,
    pub tensors: Tensors,
    /// Total bytes of all shards.
    pub total_size: u64,
    pub eos_token_ids: Vec<u32>,
    pub tokenizer: Option<TokenizerEntry>,
    /// Absent from the file if the model has none.
    pub chat: Option<ChatTemplates>,
}

/// One tensor of an expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertPart {
    pub name: String,
    /// Its first byte within the expert's bytes, which are its pieces concatenated.
    pub offset: u64,
    pub size: u64,
}

/// One expert: the ranges to read, and how their bytes divide into tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertGroup {
    pub layer: u32,
    pub expert: u32,
    /// Its tensors, ordered by offset.
    pub parts: Vec<ExpertPart>,
    /// Shard and range of each piece, in the order in which to read them. Exactly
    /// one unless the expert is larger than a shard. Padding between two tensors
    /// belongs to the piece.
    pub pieces: Vec<(u32, ByteRange)>,
}

impl ExpertGroup {
    /// Total bytes of its pieces.
    pub fn size(&self) -> u64 {
        self.pieces.iter().map(|(_, range)| range.len()).sum()
    }

    /// The only piece; `None` if there are several.
    pub fn place(&self) -> Option<(u32, ByteRange)> {
        match self.pieces[..] {
            [piece] => Some(piece),
            _ => None,
        }
    }
}

/// A checked manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    body: ManifestBody,
    id: ModelId,
    experts: BTreeMap<(u32, u32), ExpertGroup>,
}

impl Deref for Manifest {
    type Target = ManifestBody;
    fn deref(&self) -> &ManifestBody {
        &self.body
    }
}

impl Manifest {
    /// Checks a body; the id becomes the hash of [`Self::to_json_bytes`]. An error
    /// names the broken rule.
    pub fn new(body: ManifestBody) -> Result<Self, ManifestError> {
        let id = ModelId::of(&super::manifest_write::to_json_bytes(&body));
        Self::with_id(body, id)
    }

    pub(super) fn with_id(body: ManifestBody, id: ModelId) -> Result<Self, ManifestError> {
        check(&body)?;
        let experts = group_experts(&body.tensors);
        Ok(Self { body, id, experts })
    }

    /// Parses `manifest.json`. Refuses a manifest with a `tensorsFile`: see
    /// [`Self::parse_with`] and [`Self::read_dir`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        Self::parse_with(bytes, None)
    }

    /// The model's id: the BLAKE3 hash of the manifest's bytes.
    pub const fn model_id_hash(&self) -> ModelId {
        self.id
    }

    /// The manifest as this program writes it; the same bytes for the same body,
    /// always. For a manifest written elsewhere they differ from the bytes that it
    /// was read from (unknown keys are not kept), and so does their hash from
    /// [`Self::model_id_hash`].
    pub fn to_json_bytes(&self) -> Vec<u8> {
        super::manifest_write::to_json_bytes(&self.body)
    }

    /// The content address of a shard.
    pub fn shard_id(&self, index: u32) -> Result<ShardId, ManifestError> {
        let shard = usize::try_from(index).ok().and_then(|index| self.shards.get(index));
        shard.ok_or_else(|| ManifestError::Missing(format!("shard {index}")))?.id()
    }

    /// The model's objects in the order that every node derives from its manifest, with their
    /// sizes in bytes: the shards, then the tokenizer if it has an address.
    pub fn objects(&self) -> Result<Vec<(ShardId, u64)>, ManifestError> {
        let shards = self.shards.iter().map(|shard| Ok((shard.id()?, shard.size)));
        let mut objects = shards.collect::<Result<Vec<_>, ManifestError>>()?;
        let tokenizer = self.tokenizer.as_ref();
        objects.extend(tokenizer.and_then(|tokenizer| tokenizer.id.zip(tokenizer.size)));
        Ok(objects)
    }

    /// All experts, sorted by layer, then by number.
    pub fn expert_groups(&self) -> impl ExactSizeIterator<Item = &ExpertGroup> {
        self.experts.values()
    }

    pub fn expert(&self, layer: u32, expert: u32) -> Option<&ExpertGroup> {
        self.experts.get(&(layer, expert))
    }

    /// Bytes of all tensors that belong to an expert (by role or group), without padding.
    pub fn expert_bytes(&self) -> u64 {
        self.tensors.iter().filter(|(_, t)| is_expert(t)).map(|(_, t)| t.size).sum()
    }

    /// Bytes of all other tensors.
    pub fn trunk_bytes(&self) -> u64 {
        self.tensors.iter().filter(|(_, t)| !is_expert(t)).map(|(_, t)| t.size).sum()
    }
}

fn is_expert(tensor: &TensorEntry) -> bool {
    tensor.role == Role::Expert || tensor.expert().is_some()
}

/// Collects the groups `layer.L.expert.E`. Spans were checked, so their ends fit.
/// Leaves out a group in which a tensor's bytes are not contiguous.
fn group_experts(tensors: &Tensors) -> BTreeMap<(u32, u32), ExpertGroup> {
    let mut spans: BTreeMap<(u32, u32), Vec<(Span, &str)>> = BTreeMap::new();
    for (name, tensor) in tensors.iter() {
        if let Some(key) = tensor.expert() {
            let of = spans.entry(key).or_default();
            of.extend(tensor.spans.iter().map(|&span| (span, name)));
        }
    }
    spans.into_iter().filter_map(|(key, spans)| Some((key, group_expert(key, spans)?))).collect()
}

fn group_expert((layer, expert): (u32, u32), mut spans: Vec<(Span, &str)>) -> Option<ExpertGroup> {
    spans.sort_by_key(|(span, _)| (span.shard, span.offset));
    let mut pieces: Vec<(u32, ByteRange)> = Vec::new();
    let mut parts: Vec<ExpertPart> = Vec::new();
    let mut read = 0; // bytes of the pieces before the last one
    for (span, name) in spans {
        let end = span.offset.checked_add(span.size)?;
        match pieces.last_mut() {
            Some((shard, range)) if *shard == span.shard => {
                *range = ByteRange::new(range.start(), end)?;
            }
            last => {
                read += last.map_or(0, |(_, range)| range.len());
                pieces.push((span.shard, ByteRange::new(span.offset, end)?));
            }
        }
        let start = pieces.last().map_or(0, |(_, range)| range.start());
        let offset = read + span.offset - start;
        if let Some(part) = parts.last_mut().filter(|part| part.name == name) {
            if part.offset + part.size != offset {
                return None;
            }
            part.size += span.size;
        } else if parts.iter().any(|part| part.name == name) {
            return None;
        } else {
            parts.push(ExpertPart { name: name.to_owned(), offset, size: span.size });
        }
    }
    Some(ExpertGroup { layer, expert, parts, pieces })
}
