//! The rules that a manifest must keep before anything else uses it.
//!
//! All arithmetic on sizes is checked, and every message names the tensor or
//! shard. Counts are bounded, so a hostile manifest costs little.

use std::collections::HashSet;

use super::chat::ChatTemplates;
use super::manifest::{ManifestBody, ManifestError, Shard, TensorEntry};
use super::verified::OBJECT_BYTES_MAX;

/// The most shards: 4 TiB of them.
pub const SHARDS_MAX: usize = 65_536;
/// The most tensors.
pub const TENSORS_MAX: usize = 524_288;
/// The most dimensions of a tensor.
const RANK_MAX: usize = 8;
/// The longest tensor, group or model name, bytes.
const NAME_BYTES_MAX: usize = 512;

/// Checks every rule. Later rules rely on earlier ones. An error names the first broken rule.
pub fn check(body: &ManifestBody) -> Result<(), ManifestError> {
    check_names(body)?;
    check_shards(body)?;
    for (name, tensor) in body.tensors.iter() {
        check_tensor(name, tensor, &body.shards)?;
    }
    check_overlaps(body)?;
    if let Some(tokenizer) = &body.tokenizer {
        let problem = filename_problem(&tokenizer.file).or_else(|| {
            let wrong = tokenizer.size.is_some_and(|size| size == 0 || size > OBJECT_BYTES_MAX);
            wrong.then(|| format!("its size must be 1..={OBJECT_BYTES_MAX} bytes"))
        });
        if let Some(problem) = problem {
            return Err(ManifestError::Field { field: "tokenizer", problem });
        }
    }
    if let Some(problem) = body.chat.as_ref().and_then(ChatTemplates::problem) {
        return Err(ManifestError::Field { field: "chatTemplates", problem });
    }
    Ok(())
}

fn check_names(body: &ManifestBody) -> Result<(), ManifestError> {
    let fields = [
        ("modelId", &body.model_id),
        ("modelType", &body.model_type),
        ("quantization", &body.quantization),
    ];
    for (field, text) in fields {
        if let Some(problem) = text_problem(text) {
            return Err(ManifestError::Field { field, problem });
        }
    }
    Ok(())
}

/// Checks text that is printed to terminals: it must be short and without control characters.
fn text_problem(text: &str) -> Option<String> {
    if text.len() > NAME_BYTES_MAX {
        return Some(format!("{} bytes long, more than {NAME_BYTES_MAX}", text.len()));
    }
    text.chars().any(char::is_control).then(|| "it has control characters".into())
}

/// Checks that a name is a plain file name, which cannot leave its directory on any system.
pub fn filename_problem(name: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let shown: String = name.chars().take(80).collect();
    if name.is_empty() || name.len() > 255 || name.starts_with('.') || !name.chars().all(plain) {
        return Some(format!(
            "{shown:?} is not a plain file name (letters, digits, '.', '_', '-')"
        ));
    }
    None
}

fn check_shards(body: &ManifestBody) -> Result<(), ManifestError> {
    if body.shards.len() > SHARDS_MAX {
        let problem = format!("{} of them, more than {SHARDS_MAX}", body.shards.len());
        return Err(ManifestError::Field { field: "shards", problem });
    }
    let mut names = HashSet::new();
    let mut offset = 0_u64;
    for (index, shard) in body.shards.iter().enumerate() {
        let fail = |problem: String| Err(ManifestError::Shard { index, problem });
        if usize::try_from(shard.index) != Ok(index) {
            return fail(format!("it is numbered {}: shards must be numbered from 0", shard.index));
        }
        if shard.size == 0 || shard.size > OBJECT_BYTES_MAX {
            return fail(format!("{} bytes; a shard has 1..={OBJECT_BYTES_MAX}", shard.size));
        }
        if shard.hash.algorithm != body.shards[0].hash.algorithm {
            return fail("it is hashed with another function than shard 0".into());
        }
        if let Some(problem) = filename_problem(&shard.filename) {
            return fail(format!("file name {problem}"));
        }
        if !names.insert(shard.filename.as_str()) {
            return fail(format!("file name {:?} is used twice", shard.filename));
        }
        if shard.offset != offset {
            return fail(format!(
                "offset {}, but the shards before it have {offset} bytes",
                shard.offset
            ));
        }
        offset += shard.size; // at most SHARDS_MAX * 64 MiB
    }
    if body.total_size != offset {
        let problem = format!("{}, but the shards sum to {offset} bytes", body.total_size);
        return Err(ManifestError::Field { field: "totalSize", problem });
    }
    Ok(())
}

fn check_tensor(name: &str, tensor: &TensorEntry, shards: &[Shard]) -> Result<(), ManifestError> {
    let fail = |problem: String| {
        let name = name.chars().take(NAME_BYTES_MAX).collect();
        Err(ManifestError::Tensor { name, problem })
    };
    if let Some(problem) = text_problem(name) {
        return fail(format!("its name is not usable: {problem}"));
    }
    for (what, text) in [("group", tensor.group.as_str()), ("role", tensor.role.name())] {
        if let Some(problem) = text_problem(text) {
            return fail(format!("its {what} is not usable: {problem}"));
        }
    }
    if let Some(layout) = tensor.layout.as_deref()
        && layout != "row"
    {
        let layout: String = layout.chars().take(40).collect();
        return fail(format!("layout {layout:?} is not supported (only \"row\" is)"));
    }
    let expected = match stored_bytes(tensor) {
        Ok(bytes) => bytes,
        Err(problem) => return fail(problem),
    };
    if tensor.size != expected {
        return fail(format!(
            "{} bytes, but {} of shape {:?} takes {expected}",
            tensor.size, tensor.dtype, tensor.shape
        ));
    }
    check_spans(name, tensor, shards)
}

/// The bytes that the shape and type need, in rows of whole blocks.
fn stored_bytes(tensor: &TensorEntry) -> Result<u64, String> {
    if tensor.shape.len() > RANK_MAX {
        return Err(format!("{} dimensions, more than {RANK_MAX}", tensor.shape.len()));
    }
    if tensor.shape.contains(&0) {
        return Err(format!("shape {:?} has a dimension of 0", tensor.shape));
    }
    let (cols, outer) = match tensor.shape.split_last() {
        None => (1, &[][..]),
        Some((&cols, outer)) => (cols, outer),
    };
    let blocks = cols.div_ceil(tensor.dtype.block_len() as u64);
    let row = blocks.checked_mul(tensor.dtype.block_bytes() as u64);
    outer
        .iter()
        .try_fold(row, |bytes, &dim| bytes?.checked_mul(dim).map(Some))
        .flatten()
        .filter(|&bytes| bytes <= OBJECT_BYTES_MAX * SHARDS_MAX as u64)
        .ok_or_else(|| format!("shape {:?} is too large", tensor.shape))
}

fn check_spans(name: &str, tensor: &TensorEntry, shards: &[Shard]) -> Result<(), ManifestError> {
    let fail = |problem: String| Err(ManifestError::Tensor { name: name.to_owned(), problem });
    let mut sum = 0_u64;
    for span in &tensor.spans {
        let Some(shard) = shards.get(span.shard as usize) else {
            return fail(format!(
                "it is in shard {}, but there are {} shards",
                span.shard,
                shards.len()
            ));
        };
        if span.size == 0 {
            return fail(format!("an empty span in shard {}", span.shard));
        }
        let end = span.offset.saturating_add(span.size);
        if end > shard.size {
            return Err(ManifestError::OutOfRange {
                tensor: name.to_owned(),
                shard: span.shard,
                start: span.offset,
                end,
                size: shard.size,
            });
        }
        sum = sum.saturating_add(span.size);
    }
    if sum != tensor.size {
        return fail(format!("its spans sum to {sum} bytes, not {}", tensor.size));
    }
    Ok(())
}

fn check_overlaps(body: &ManifestBody) -> Result<(), ManifestError> {
    let mut spans: Vec<(u32, u64, u64, &str)> = body
        .tensors
        .iter()
        .flat_map(|(name, t)| {
            t.spans.iter().map(move |s| (s.shard, s.offset, s.offset + s.size, name))
        })
        .collect();
    spans.sort_unstable();
    for pair in spans.windows(2) {
        let ((shard, _, end, first), (next_shard, start, _, second)) = (pair[0], pair[1]);
        if shard == next_shard && start < end {
            let (first, second) = (first.to_owned(), second.to_owned());
            return Err(ManifestError::Overlap { first, second, shard, start, end });
        }
    }
    Ok(())
}
