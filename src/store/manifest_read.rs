//! Parses `manifest.json` bytes, which are not trusted, into a body.
//!
//! Refuses values that it cannot read exactly and ignores unknown keys. Hashes
//! are those of `hashAlgorithm`; a shard's extra `blake3` key does not override
//! it, because real manifests have sha256 values under that key.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use serde_json::Value;

use super::chat::ChatTemplates;
use super::manifest::{
    Architecture, HashAlgorithm, MANIFEST_BYTES_MAX, Manifest, ManifestBody, ManifestError,
    MoeConfig, Role, Shard, ShardHash, Span, TensorEntry, Tensors, TokenizerEntry,
};
use super::manifest_check::{TENSORS_MAX, filename_problem};
use super::{DType, ModelId};

/// The most end-of-sequence ids kept.
const EOS_IDS_MAX: usize = 64;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    version: u64,
    #[serde(default)]
    model_id: Option<String>,
    #[serde(default)]
    model_type: Option<String>,
    #[serde(default)]
    quantization: Option<String>,
    #[serde(default)]
    architecture: Value,
    #[serde(default)]
    moe_config: Option<MoeConfig>,
    #[serde(default)]
    inference: Value,
    #[serde(default)]
    config: Value,
    shards: Vec<RawShard>,
    #[serde(default)]
    tensors: Option<RawTensors>,
    #[serde(default)]
    tensors_file: Option<String>,
    #[serde(default)]
    total_size: Option<u64>,
    #[serde(default)]
    hash_algorithm: Option<String>,
    #[serde(default, rename = "eos_token_id")]
    eos_token_id: Value,
    #[serde(default)]
    tokenizer: Value,
    #[serde(default)]
    chat_templates: Option<ChatTemplates>,
}

#[derive(Deserialize)]
struct RawShard {
    index: Option<u64>,
    filename: String,
    size: u64,
    hash: Option<String>,
    blake3: Option<String>,
    offset: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawTensor {
    spans: Option<Vec<RawSpan>>,
    #[serde(alias = "shardIndex")]
    shard: Option<u32>,
    offset: Option<u64>,
    size: u64,
    shape: Vec<u64>,
    dtype: String,
    role: Option<String>,
    group: Option<String>,
    layout: Option<String>,
}

#[derive(Deserialize)]
struct RawSpan {
    #[serde(alias = "shard", rename = "shardIndex")]
    shard: u32,
    offset: u64,
    size: u64,
}

/// A JSON object read pair by pair, so that a repeated name is noticed.
struct RawTensors(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for RawTensors {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = RawTensors;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawTensors, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    if pairs.len() == TENSORS_MAX {
                        return Err(serde::de::Error::custom(format_args!(
                            "more than {TENSORS_MAX} tensors"
                        )));
                    }
                    pairs.push(pair);
                }
                Ok(RawTensors(pairs))
            }
        }
        d.deserialize_map(Pairs)
    }
}

impl Manifest {
    /// Parses `manifest.json`, with the bytes of its `tensorsFile` if it has one.
    pub fn parse_with(bytes: &[u8], tensors: Option<&[u8]>) -> Result<Self, ManifestError> {
        let raw: Raw = from_json(bytes)?;
        if raw.version != 1 {
            return Err(ManifestError::Version(raw.version));
        }
        let body = read_body(raw, tensors)?;
        Self::with_id(body, ModelId::of(bytes))
    }

    /// Reads the manifest of an RDRR directory, or a manifest file and the tensors file beside it.
    pub fn read_dir(path: &Path) -> Result<Self, ManifestError> {
        let file = if path.is_dir() { path.join("manifest.json") } else { path.to_owned() };
        let bytes = read_file(&file)?;
        let Some(beside) = tensors_file(&bytes)? else {
            return Self::parse(&bytes);
        };
        if let Some(problem) = filename_problem(&beside) {
            return Err(ManifestError::Field { field: "tensorsFile", problem });
        }
        let tensors = read_file(&file.with_file_name(beside))?;
        Self::parse_with(&bytes, Some(&tensors))
    }
}

/// The name of the tensors file, if the tensors are not inline.
fn tensors_file(bytes: &[u8]) -> Result<Option<String>, ManifestError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Peek {
        tensors: Option<serde::de::IgnoredAny>,
        tensors_file: Option<String>,
    }
    let peek: Peek = from_json(bytes)?;
    Ok(if peek.tensors.is_none() { peek.tensors_file } else { None })
}

fn from_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, ManifestError> {
    if bytes.len() > MANIFEST_BYTES_MAX {
        return Err(ManifestError::TooLarge(bytes.len()));
    }
    serde_json::from_slice(bytes).map_err(|e| ManifestError::Json(e.to_string()))
}

fn read_file(path: &Path) -> Result<Vec<u8>, ManifestError> {
    let io = |e: std::io::Error| ManifestError::Io {
        path: path.display().to_string(),
        problem: e.to_string(),
    };
    let bytes = super::regular::read_at_most(path, MANIFEST_BYTES_MAX as u64).map_err(io)?;
    bytes.ok_or(ManifestError::TooLarge(MANIFEST_BYTES_MAX + 1))
}

fn read_body(raw: Raw, tensors_file: Option<&[u8]>) -> Result<ManifestBody, ManifestError> {
    let tensors = match (raw.tensors, raw.tensors_file, tensors_file) {
        (Some(inline), _, _) => inline,
        (None, Some(_), Some(bytes)) => read_tensors_file(bytes)?,
        (None, Some(file), None) => return Err(ManifestError::TensorsElsewhere(file)),
        (None, None, _) => return Err(ManifestError::Missing("tensors".into())),
    };
    let algorithm = read_algorithm(raw.hash_algorithm.as_deref())?;
    let shards = read_shards(raw.shards, algorithm)?;
    let total: u64 = shards.iter().fold(0, |sum, shard| sum.saturating_add(shard.size));
    let mut table = Tensors::default();
    for (name, tensor) in tensors.0 {
        let entry = read_tensor(tensor)
            .map_err(|problem| ManifestError::Tensor { name: name.clone(), problem })?;
        table.insert(name, entry)?;
    }
    Ok(ManifestBody {
        version: raw.version,
        model_id: raw.model_id.unwrap_or_default(),
        model_type: raw.model_type.unwrap_or_default(),
        quantization: raw.quantization.unwrap_or_default(),
        architecture: read_architecture(raw.architecture)?,
        moe: raw.moe_config,
        inference: raw.inference,
        config: raw.config,
        shards,
        tensors: table,
        total_size: raw.total_size.unwrap_or(total),
        eos_token_ids: read_eos(&raw.eos_token_id)?,
        tokenizer: read_tokenizer(&raw.tokenizer)?,
        chat: raw.chat_templates,
    })
}

/// Parses a tensors file, which is the object of tensors itself or has it under `tensors`.
fn read_tensors_file(bytes: &[u8]) -> Result<RawTensors, ManifestError> {
    #[derive(Deserialize)]
    struct Wrapped {
        tensors: RawTensors,
    }
    from_json(bytes).or_else(|plain| {
        from_json::<Wrapped>(bytes).map(|wrapped| wrapped.tensors).map_err(|_| plain)
    })
}

fn read_algorithm(name: Option<&str>) -> Result<HashAlgorithm, ManifestError> {
    match name {
        Some("sha256") => Ok(HashAlgorithm::Sha256),
        Some("blake3") => Ok(HashAlgorithm::Blake3),
        Some(other) => Err(ManifestError::Field {
            field: "hashAlgorithm",
            problem: format!("{other:?} is unknown (known: sha256, blake3)"),
        }),
        None => Err(ManifestError::Missing("hashAlgorithm".into())),
    }
}

fn read_shards(raw: Vec<RawShard>, algorithm: HashAlgorithm) -> Result<Vec<Shard>, ManifestError> {
    let mut offset = 0_u64;
    let mut shards = Vec::with_capacity(raw.len());
    for (at, raw) in raw.into_iter().enumerate() {
        let fail = |problem: String| ManifestError::Shard { index: at, problem };
        let index = raw.index.unwrap_or(at as u64);
        let index =
            u32::try_from(index).map_err(|_| fail(format!("index {index} is too large")))?;
        let hex = match (raw.hash, raw.blake3) {
            (Some(hash), Some(other)) if algorithm == HashAlgorithm::Blake3 && hash != other => {
                return Err(fail("its hash and its blake3 differ".into()));
            }
            (Some(hash), _) => hash,
            (None, Some(hash)) if algorithm == HashAlgorithm::Blake3 => hash,
            (None, _) => return Err(fail(format!("no {} hash", algorithm.name()))),
        };
        let bytes = blake3::Hash::from_hex(&hex)
            .map_err(|_| fail(format!("hash {hex:?} is not 64 hexadecimal digits")))?;
        let hash = ShardHash { algorithm, bytes: *bytes.as_bytes() };
        shards.push(Shard {
            index,
            filename: raw.filename,
            size: raw.size,
            hash,
            offset: raw.offset.unwrap_or(offset),
        });
        offset = offset.saturating_add(raw.size);
    }
    Ok(shards)
}

fn read_tensor(raw: RawTensor) -> Result<TensorEntry, String> {
    let spans = match (raw.spans, raw.shard) {
        (Some(spans), _) => spans
            .into_iter()
            .map(|s| Span { shard: s.shard, offset: s.offset, size: s.size })
            .collect(),
        (None, Some(shard)) => {
            let offset = raw.offset.ok_or("it has a shard but no offset")?;
            vec![Span { shard, offset, size: raw.size }]
        }
        (None, None) => return Err("it has neither a shard nor spans".into()),
    };
    Ok(TensorEntry {
        spans,
        size: raw.size,
        shape: raw.shape,
        dtype: DType::from_name(&raw.dtype).map_err(|e| e.to_string())?,
        role: raw.role.as_deref().map_or(Role::Other, Role::from_name),
        group: raw.group.unwrap_or_default(),
        layout: raw.layout,
    })
}

fn read_architecture(raw: Value) -> Result<Architecture, ManifestError> {
    // Older manifests have a class name here, which states no sizes.
    if !raw.is_object() {
        return Ok(Architecture::default());
    }
    serde_json::from_value(raw)
        .map_err(|e| ManifestError::Field { field: "architecture", problem: e.to_string() })
}

/// Token ids from a number, a list or nothing.
pub fn read_eos(raw: &Value) -> Result<Vec<u32>, ManifestError> {
    let problem = |problem: String| ManifestError::Field { field: "eos_token_id", problem };
    let one = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| problem(format!("{} is not a token id", short(value))))
    };
    match raw {
        Value::Null => Ok(Vec::new()),
        Value::Array(list) if list.len() > EOS_IDS_MAX => {
            Err(problem(format!("{} ids, more than {EOS_IDS_MAX}", list.len())))
        }
        Value::Array(list) => list.iter().map(one).collect(),
        single => Ok(vec![one(single)?]),
    }
}

fn short(value: &Value) -> String {
    value.to_string().chars().take(40).collect()
}

fn read_tokenizer(raw: &Value) -> Result<Option<TokenizerEntry>, ManifestError> {
    let problem = |problem: String| ManifestError::Field { field: "tokenizer", problem };
    let Some(file) = raw.get("file").and_then(Value::as_str) else {
        return Ok(None);
    };
    let id = match raw.get("blake3") {
        None | Some(Value::Null) => None,
        Some(hash) => {
            let id = hash.as_str().and_then(|text| text.parse().ok());
            Some(id.ok_or_else(|| problem(format!("{} is not a BLAKE3 hash", short(hash))))?)
        }
    };
    Ok(Some(TokenizerEntry {
        file: file.to_owned(),
        size: raw.get("size").and_then(Value::as_u64),
        id,
    }))
}
