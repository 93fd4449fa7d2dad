//! Any checkpoint as a GGUF file that llama.cpp reads, for the architectures in [`metadata`].
//!
//! The inverse of reading: llama.cpp's names, its order of rows, experts stacked, norms with their 1,
//! vectors and routers in F32. Invariant: what is written is read back before the first weight is
//! written, and must describe the same graph and cut the same texts into the same tokens. So what a
//! file cannot say is refused, not lost.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

mod bytes;
mod metadata;
#[cfg(test)]
mod tests;
mod tokenizer;

use std::borrow::Cow;
use std::io::Write;

use serde_json::Value as Json;

pub(crate) use self::bytes::Meta;
#[cfg(test)]
pub(crate) use self::bytes::header as header_bytes;
use self::bytes::{Listed, header};
use super::super::checkpoint::{Checkpoint, Stored};
use super::super::convert::{Progress, kind, store_rows};
use super::super::mixture::{Kind, Mixture, Quantization};
use super::super::recipe::Resolved;
use super::super::{LoadError, Result, tied};
use super::config::{self, Architecture, Facts};
use super::header::{self as read, TensorInfo};
use super::keys::Keys;
use super::types::GgmlType;
use super::vocabulary::Vocabulary;
use super::{DIVISORS, names};
use crate::families;
use crate::graph::{Graph, Weight, WeightRole};
use crate::source::Source;
use crate::tokenizer::Tokenizer;
use doppler_store::DType;

/// Where tensors begin, in bytes.
const ALIGNMENT: u64 = 32;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    pub architecture: &'static str,
    pub tensors: usize,
    pub bytes: u64,
    pub has_tokenizer: bool,
}

/// A tensor of the file.
struct Item {
    name: String,
    /// Outermost dimension first.
    shape: Vec<u64>,
    dtype: DType,
    from: Origin,
}

enum Origin {
    Made(Box<Resolved>),
    /// What the frequencies of a rope are divided by.
    Divisors(Vec<f32>),
}

/// A checkpoint whose weights have exactly the sources that they state.
struct Exact<'a>(&'a dyn Checkpoint);

impl Checkpoint for Exact<'_> {
    fn place(&self) -> String {
        self.0.place()
    }

    fn name(&self) -> String {
        self.0.name()
    }

    fn config(&self) -> &Json {
        self.0.config()
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>> {
        self.0.eos_token_ids()
    }

    fn tokenizer(&self) -> Result<Option<Vec<u8>>> {
        self.0.tokenizer()
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        self.0.names()
    }

    fn find(&self, name: &str) -> Option<&Stored> {
        self.0.find(name)
    }

    fn source<'a>(&self, weight: &'a Weight) -> Cow<'a, Source> {
        Cow::Borrowed(&weight.source)
    }

    fn read(&self, name: &str, first: u64, out: &mut [u8]) -> Result<()> {
        self.0.read(name, first, out)
    }
}

/// Writes a checkpoint as a GGUF file.
///
/// # Errors
/// One line. Unless writing or reading fails, or a weight is not finite, nothing has been written.
pub fn to_gguf(
    checkpoint: &dyn Checkpoint,
    quantization: Quantization,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Written> {
    let fail = |problem: String| LoadError::File { file: checkpoint.place(), problem };
    let described = families::read(checkpoint.config())?;
    let graph = &described.graph;
    tied::refuse_another_head(checkpoint, graph)?;
    let of = metadata::architecture(checkpoint.config()).map_err(fail)?;
    let items = items(checkpoint, of, graph, quantization)?;
    let mut keys = metadata::keys(of, checkpoint, graph, quantization).map_err(fail)?;
    let tokenizer = super::super::tokenizer::read(checkpoint)?;
    if let Some(file) = &tokenizer {
        let ends = checkpoint.eos_token_ids()?;
        let made = tokenizer::keys(file, graph.vocab, &ends, checkpoint.config());
        keys.extend(made.map_err(fail)?);
        if let Some(chat) = checkpoint.chat_templates()?
            && let Some(template) = chat.templates.get(doppler_store::chat::DEFAULT)
        {
            keys.push(("tokenizer.chat_template".into(), Meta::Text(template.clone())));
        }
    }
    let (head, offsets, bytes) = header(&keys, &listed(&items).map_err(fail)?, ALIGNMENT);
    let divisors = metadata::divisors(of, checkpoint.config(), graph);
    verify((&head, bytes), of, graph, divisors, tokenizer.as_deref()).map_err(fail)?;
    let io = |source| LoadError::Io { path: "the output".into(), source };
    out.write_all(&head).map_err(io)?;
    let total = items.iter().map(Item::source_bytes).sum();
    let (mut done, mut at) = (0, 0);
    for (item, offset) in items.iter().zip(offsets) {
        progress(Progress { tensor: &item.name, done, total });
        out.write_all(&vec![0; (offset - at) as usize]).map_err(io)?;
        at = offset + item.bytes();
        match &item.from {
            Origin::Divisors(values) => {
                out.write_all(bytemuck::cast_slice(values)).map_err(io)?;
            }
            Origin::Made(source) => {
                store_rows(&Exact(checkpoint), (&item.name, item.dtype), source, &mut |bytes| {
                    out.write_all(bytes).map_err(io)
                })?;
            }
        }
        done += item.source_bytes();
    }
    out.flush().map_err(io)?;
    progress(Progress { tensor: "", done, total });
    let (architecture, tensors) = (of.name, items.len());
    Ok(Written { architecture, tensors, bytes, has_tokenizer: tokenizer.is_some() })
}

impl Item {
    fn rows_cols(&self) -> (u64, u64) {
        let (cols, rows) =
            self.shape.split_last().map_or((1, &[][..]), |(cols, rows)| (*cols, rows));
        (rows.iter().product(), cols)
    }

    fn bytes(&self) -> u64 {
        let (rows, cols) = self.rows_cols();
        rows * self.dtype.row_bytes(cols as usize) as u64
    }

    fn source_bytes(&self) -> u64 {
        match &self.from {
            Origin::Made(source) => source.rows * source.row_bytes() as u64,
            Origin::Divisors(values) => values.len() as u64 * 4,
        }
    }
}

/// Names, shapes and types as the header lists them.
fn listed(items: &[Item]) -> std::result::Result<Vec<Listed>, String> {
    let one = |item: &Item| {
        let number = GgmlType::number_of(item.dtype)
            .ok_or_else(|| format!("{}: GGUF files have no {}", item.name, item.dtype))?;
        let (_, cols) = item.rows_cols();
        if !cols.is_multiple_of(item.dtype.block_len() as u64) {
            return Err(format!("{}: rows of {cols} are not whole blocks", item.name));
        }
        Ok((item.name.clone(), item.shape.clone(), number, item.bytes()))
    };
    items.iter().map(one).collect()
}

/// Every tensor, in the order in which it is written.
fn items(
    checkpoint: &dyn Checkpoint,
    of: &Architecture,
    graph: &Graph,
    quantization: Quantization,
) -> Result<Vec<Item>> {
    let experts = graph.moe.first().map_or(0, |moe| moe.experts.len());
    let mixture = Mixture { quantization, layers: graph.layers, experts };
    let head_dim = graph.kv.first().map_or(0, |kv| kv.head_dim);
    let exact = Exact(checkpoint);
    let item = |weight: Weight, shape: Vec<u64>, kind: Kind| -> Result<Item> {
        let made = Resolved::new(&exact, &weight)?;
        let dtype = match (weight.rows, kind) {
            // llama.cpp's kernels take vectors and routers in F32 alone.
            (1, _) | (_, Kind::Kept) => DType::F32,
            _ => mixture.dtype(kind, weight.layer, made.dtype, weight.cols as u64),
        };
        if made.dtype.is_quantised() && dtype != made.dtype {
            let problem = format!(
                "it is {} already, and making {dtype} of it would lose more; convert the original \
                 checkpoint",
                made.dtype
            );
            return Err(LoadError::Tensor { tensor: weight.tensor, problem });
        }
        Ok(Item { name: weight.tensor, shape, dtype, from: Origin::Made(Box::new(made)) })
    };
    let mut items = Vec::new();
    if let Some(divisors) = metadata::divisors(of, checkpoint.config(), graph) {
        let (name, shape) = (DIVISORS.to_owned(), vec![divisors.len() as u64]);
        items.push(Item { name, shape, dtype: DType::F32, from: Origin::Divisors(divisors) });
    }
    for weight in &graph.weights {
        let name = names::name(of, &weight.tensor);
        if name == weight.tensor {
            let problem = format!("llama.cpp has no name for it in {}", of.name);
            return Err(LoadError::Tensor { tensor: name, problem });
        }
        let source = stored_order(of, head_dim, weight, checkpoint.source(weight).into_owned());
        let shape = match weight.rows {
            1 if weight.role != WeightRole::Router => vec![weight.cols as u64],
            rows => vec![rows as u64, weight.cols as u64],
        };
        let kind = kind(weight.role, graph.tied());
        items.push(item(Weight { tensor: name, source, ..weight.clone() }, shape, kind)?);
    }
    for moe in &graph.moe {
        for (part, name) in ["gate", "up", "down"].into_iter().enumerate() {
            let parts: Vec<Weight> =
                (0..moe.experts.len()).map(|number| moe.weights(number)[part].clone()).collect();
            let own = |part: &Weight| own_names(checkpoint.source(part).into_owned(), &part.tensor);
            let sources = parts.iter().map(own).collect();
            let Some(first) = parts.first() else { continue };
            let shape = vec![parts.len() as u64, first.rows as u64, first.cols as u64];
            let weight = Weight {
                tensor: format!("blk.{}.ffn_{name}_exps.weight", moe.layer),
                rows: first.rows * parts.len(),
                source: Source::Concatenate(sources),
                ..first.clone()
            };
            let kind = if name == "down" { Kind::ExpertDown } else { Kind::Expert };
            items.push(item(weight, shape, kind)?);
        }
    }
    Ok(items)
}

/// A source that names tensors in full, because the weight has another name in the file.
fn own_names(source: Source, own: &str) -> Source {
    let inner = |source: Box<Source>| Box::new(own_names(*source, own));
    let list = |sources: Vec<Source>| sources.into_iter().map(|one| own_names(one, own)).collect();
    match source {
        Source::Itself => Source::stored(own),
        Source::Rows { of, take } => Source::Rows { of: inner(of), take },
        Source::Cols { of, take } => Source::Cols { of: inner(of), take },
        Source::Concatenate(sources) => Source::Concatenate(list(sources)),
        Source::Transpose(of) => Source::Transpose(inner(of)),
        Source::Permute { of, outer, inner: within } => {
            Source::Permute { of: inner(of), outer, inner: within }
        }
        Source::Flat(of) => Source::Flat(inner(of)),
        Source::AddOne(of) => Source::AddOne(inner(of)),
        Source::Times(of, factor) => Source::Times(inner(of), factor),
        Source::FirstOf(sources) => Source::FirstOf(list(sources)),
        plain @ (Source::Stored(_) | Source::Ones) => plain,
    }
}

/// A weight's rows in the order in which llama.cpp stores them: the inverse of `names::source`.
fn stored_order(of: &Architecture, head_dim: usize, weight: &Weight, source: Source) -> Source {
    let source = own_names(source, &weight.tensor);
    let is = |end: &str| weight.tensor.ends_with(end);
    match weight.role {
        _ if !of.interleaved => source,
        WeightRole::Query | WeightRole::Key => source.permute(2, head_dim / 2),
        WeightRole::Bias if is("q_proj.bias") || is("k_proj.bias") => {
            source.transpose().permute(2, head_dim / 2).transpose()
        }
        _ => source,
    }
}

/// Texts in which tokenizers differ.
const PROBE: &str =
    "Hello, world! It's 12345.67 don't  stop\n\n\tnow: naïve Ünïcode 漢字かな 🐳 (a+b)*c==d";

/// Reads a header back. It must describe the same model.
fn verify(
    (head, bytes): (&[u8], u64),
    of: &Architecture,
    graph: &Graph,
    divisors: Option<Vec<f32>>,
    tokenizer: Option<&[u8]>,
) -> std::result::Result<(), String> {
    let read::Header { metadata, tensors } = read::read(head, bytes)?;
    let has = |name: &str| tensors.contains_key(name);
    let rows = |info: &TensorInfo| -> u64 { info.shape.iter().rev().skip(1).product() };
    let facts = Facts {
        vocab: tensors.get("token_embd.weight").map_or(0, rows),
        tied: !has("output.weight"),
        biased: has("blk.0.attn_q.bias"),
        normed: has("blk.0.attn_q_norm.weight"),
        divisors: divisors.filter(|_| has(DIVISORS)),
    };
    let config = config::config(of, &Keys::new(&metadata, of.name), &facts)?;
    let other = families::read(&config).map_err(|error| error.to_string())?.graph;
    if let Some(what) = metadata::difference(graph, &other) {
        return Err(format!(
            "a GGUF file of the architecture {} would describe another model ({what}), so it is not \
             written",
            of.name
        ));
    }
    let Some(tokenizer) = tokenizer else { return Ok(()) };
    let vocabulary = Vocabulary::new(&metadata, facts.vocab)?.ok_or("it has no vocabulary")?;
    let encode = |file: &[u8]| {
        let tokenizer = Tokenizer::from_bytes(file, Vec::new()).map_err(|e| e.to_string())?;
        tokenizer.encode(PROBE).map_err(|error| error.to_string())
    };
    match encode(&vocabulary.tokenizer()?)? == encode(tokenizer)? {
        true => Ok(()),
        false => {
            Err("a GGUF file cannot say how its tokenizer cuts text, so it is not written".into())
        }
    }
}
