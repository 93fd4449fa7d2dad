//! What `inspect` shows of a GGUF file: a model's or an adapter's, as data and as a table.
//!
//! Reads the header alone, of the first part if there are several, and needs to know neither the
//! architecture nor the types of the tensors' contents.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::header::Value;
use super::{open_part, types};
use crate::load::Result;
use crate::load::files::OnDisk;
use crate::load::inspect::Sum;

/// A summary of a file. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GgufSummary {
    pub name: Option<String>,
    /// "model", or "adapter".
    pub kind: String,
    pub architecture: Option<String>,
    /// The mixture of types.
    pub quantization: String,
    pub layers: Option<i64>,
    pub hidden: Option<i64>,
    pub context: Option<i64>,
    pub experts: Option<i64>,
    /// Tokens of its vocabulary, and how it is read.
    pub vocab: Option<usize>,
    pub tokenizer: Option<String>,
    pub chat_template: bool,
    /// Parts of the model; this is the first of them.
    pub parts: i64,
    pub file_bytes: u64,
    pub tensors: u64,
    /// Weights.
    pub parameters: u64,
    pub dtypes: BTreeMap<String, Sum>,
    /// Keys of the metadata.
    pub keys: usize,
}

/// Summarises a file.
///
/// # Errors
/// If it is not a GGUF file, or is damaged.
pub fn inspect_gguf(path: &Path) -> Result<GgufSummary> {
    let (part, header) = open_part(path, &OnDisk)?;
    drop(part);
    let metadata = header.metadata;
    let text = |key: &str| match metadata.get(key) {
        Some(Value::String(text)) => Some(text.clone()),
        _ => None,
    };
    let architecture = text("general.architecture");
    let number = |key: &str| match metadata.get(key) {
        Some(Value::Integer(number)) => i64::try_from(*number).ok(),
        Some(Value::Integers(list)) => list.iter().copied().max(),
        _ => None,
    };
    let own = |key: &str| number(&format!("{}.{key}", architecture.as_deref().unwrap_or_default()));
    let mut dtypes: BTreeMap<String, Sum> = BTreeMap::new();
    let mut parameters = 0_u64;
    for info in header.tensors.values() {
        let weights: u64 = info.shape.iter().product();
        let (len, bytes) = info.ggml.block();
        let sum = dtypes.entry(info.ggml.to_string()).or_default();
        sum.tensors += 1;
        sum.bytes += weights / len * bytes;
        parameters = parameters.saturating_add(weights);
    }
    let vocab = match metadata.get("tokenizer.ggml.tokens") {
        Some(Value::Strings(tokens)) => Some(tokens.len()),
        _ => None,
    };
    Ok(GgufSummary {
        name: text("general.name"),
        kind: text("general.type").unwrap_or_else(|| "model".into()),
        quantization: types::file_type(metadata.get("general.file_type")).to_owned(),
        layers: own("block_count"),
        hidden: own("embedding_length"),
        context: own("context_length"),
        experts: own("expert_count").filter(|count| *count > 0),
        vocab,
        tokenizer: text("tokenizer.ggml.model"),
        chat_template: metadata.contains_key("tokenizer.chat_template"),
        parts: number("split.count").unwrap_or(1),
        file_bytes: std::fs::metadata(path).map_err(crate::load::io_error(path))?.len(),
        tensors: header.tensors.len() as u64,
        parameters,
        dtypes,
        keys: metadata.len(),
        architecture,
    })
}

impl fmt::Display for GgufSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unknown = || "-".to_owned();
        let number = |number: Option<i64>| number.map_or_else(unknown, |number| number.to_string());
        let text = |text: &Option<String>| text.clone().unwrap_or_else(unknown);
        writeln!(f, "GGUF {} {}", self.kind, text(&self.name))?;
        writeln!(f, "  architecture  {}", text(&self.architecture))?;
        writeln!(f, "  quantization  {}", self.quantization)?;
        let (layers, hidden, context) =
            (number(self.layers), number(self.hidden), number(self.context));
        writeln!(f, "  layers        {layers}, hidden {hidden}, context {context}")?;
        if let Some(experts) = self.experts {
            writeln!(f, "  experts       {experts} a layer")?;
        }
        let vocab = self.vocab.map_or_else(unknown, |tokens| tokens.to_string());
        let chat = if self.chat_template { ", with a chat template" } else { "" };
        writeln!(f, "  vocabulary    {vocab} tokens ({}){chat}", text(&self.tokenizer))?;
        let parts = if self.parts > 1 {
            format!(" in the first of {} parts", self.parts)
        } else {
            String::new()
        };
        writeln!(f, "  tensors       {}{parts}, {} weights", self.tensors, self.parameters)?;
        writeln!(f, "  file          {} bytes, {} metadata keys", self.file_bytes, self.keys)?;
        for (dtype, Sum { tensors, bytes }) in &self.dtypes {
            writeln!(f, "    {dtype:<8} {tensors:>6} tensors {bytes:>16} bytes")?;
        }
        Ok(())
    }
}
