//! Which matrices of a graph an adapter changes, and by what. Pure.
//!
//! An adapter is trained on a checkpoint's tensors; a graph's matrix may be made from them (some rows
//! of packed queries, keys and values, say). The change is made in the same way: rows of a matrix are
//! rows of B, its columns are columns of A. Refuses an adapter of which something is left over or
//! does not fit, because leaving it out would change the text silently.

use std::collections::{BTreeMap, HashSet};

use super::{Adapter, AdapterError, Delta, Matrix, Naming, Result};
use crate::graph::{Graph, Op, Weight, WeightId};
use crate::load;
use crate::source::{Source, Take};

/// What an adapter adds to one matrix of a graph: `scale B A`.
pub(super) struct Low {
    pub a: Matrix,
    pub b: Matrix,
    pub scale: f32,
}

/// The changes of a graph's matrices.
///
/// # Errors
/// If a tensor that the adapter changes is no matrix of the graph, or has another shape.
pub(super) fn fit(adapter: &Adapter, graph: &Graph) -> Result<BTreeMap<WeightId, Low>> {
    let unfit = |problem: String| AdapterError::Unfit { adapter: adapter.name.clone(), problem };
    let mut found = BTreeMap::new();
    let mut used = HashSet::new();
    for id in products(graph) {
        let weight = graph.weight_spec(id);
        let mut seen = Vec::new();
        let low = change(adapter, graph, weight, &mut seen).map_err(unfit)?;
        used.extend(seen);
        let Some(low) = low else { continue };
        let (rows, cols) = (low.b.rows, low.a.cols);
        if (rows, cols) != (weight.rows, weight.cols) {
            return Err(unfit(format!(
                "it changes a matrix of [{rows}, {cols}], and {} is [{}, {}]",
                weight.tensor, weight.rows, weight.cols
            )));
        }
        found.insert(id, low);
    }
    match adapter.deltas.keys().find(|name| !used.contains(*name)) {
        None => Ok(found),
        Some(left) => Err(unfit(left_over(left, graph))),
    }
}

/// Why a tensor cannot be changed.
fn left_over(name: &str, graph: &Graph) -> String {
    if name.contains("expert") || name.contains("_exps") {
        return format!("it changes experts ({name}), which is not supported");
    }
    let table = ["embed_tokens", "lm_head", "token_embd", "output.weight", "word_embeddings"];
    if table.iter().any(|table| name.contains(table)) {
        return format!("it changes the vocabulary's matrix {name}, which is not supported");
    }
    let known = graph.weights.iter().any(|weight| weight.tensor == name);
    match known {
        true => format!("it changes {name}, which is not a matrix that is multiplied"),
        false => format!("it changes {name}, which the model does not have"),
    }
}

/// The matrices of a graph that are multiplied with activations, without the head.
fn products(graph: &Graph) -> Vec<WeightId> {
    let products = graph.ops.iter().filter_map(|op| match op {
        Op::Linear { weight, .. } => Some(*weight),
        _ => None,
    });
    let mut products: Vec<WeightId> = products.collect();
    products.sort_unstable();
    products.dedup();
    products
}

/// The change of one weight. `used` gets the names of the deltas that it is made from.
fn change(
    adapter: &Adapter,
    graph: &Graph,
    weight: &Weight,
    used: &mut Vec<String>,
) -> std::result::Result<Option<Low>, String> {
    let name = &weight.tensor;
    match adapter.naming {
        Naming::HuggingFace => resolve(adapter, &weight.source, name, used),
        Naming::Ggml => {
            let of = adapter.architecture.as_deref().unwrap_or_default();
            let head_dim = graph.kv.first().map_or(0, |kv| kv.head_dim);
            let source = load::gguf_source(of, head_dim as u64, weight)?;
            resolve(adapter, &source, name, used)
        }
        Naming::Modules => {
            let (Some(layer), Some(module)) = (weight.layer, weight.role.adapter_target()) else {
                return Ok(None);
            };
            // Experts that all tokens use have the same roles.
            if name.contains("shared") {
                return Ok(None);
            }
            Ok(get(adapter, &format!("layer.{layer}.{module}"), used))
        }
    }
}

fn get(adapter: &Adapter, name: &str, used: &mut Vec<String>) -> Option<Low> {
    let Delta { a, b, scale } = adapter.deltas.get(name)?;
    used.push(name.to_owned());
    Some(Low { a: a.clone(), b: b.clone(), scale: *scale })
}

/// The change of what a source makes. `None` if nothing of it is changed.
fn resolve(
    adapter: &Adapter,
    source: &Source,
    own: &str,
    used: &mut Vec<String>,
) -> std::result::Result<Option<Low>, String> {
    let mut inner = |source: &Source| resolve(adapter, source, own, used);
    let Some(low) = (match source {
        Source::Itself => return Ok(get(adapter, own, used)),
        Source::Stored(name) => return Ok(get(adapter, name, used)),
        Source::Ones => None,
        Source::FirstOf(sources) => {
            for source in sources {
                if let Some(low) = inner(source)? {
                    return Ok(Some(low));
                }
            }
            None
        }
        Source::Concatenate(parts) => {
            let parts = parts.iter().map(inner).collect::<std::result::Result<Vec<_>, _>>()?;
            if parts.iter().any(Option::is_some) {
                return Err(format!("it changes a part of {own}, which is not supported"));
            }
            None
        }
        Source::Rows { of, .. }
        | Source::Cols { of, .. }
        | Source::Transpose(of)
        | Source::Permute { of, .. }
        | Source::Flat(of)
        | Source::AddOne(of)
        | Source::Times(of, _) => inner(of)?,
    }) else {
        return Ok(None);
    };
    made(source, low, own).map(Some)
}

/// Makes the change of a source from the change of what it is made from.
fn made(source: &Source, low: Low, own: &str) -> std::result::Result<Low, String> {
    let Low { a, b, scale } = low;
    Ok(match source {
        Source::Rows { take, .. } => {
            let rows = taken(take, b.rows, own)?;
            Low { b: b.rows_of(rows), a, scale }
        }
        Source::Cols { take, .. } => {
            let cols = taken(take, a.cols, own)?;
            Low { a: a.transposed().rows_of(cols).transposed(), b, scale }
        }
        Source::Transpose(_) => Low { a: b.transposed(), b: a.transposed(), scale },
        Source::Permute { outer, inner, .. } => {
            let block = outer * inner;
            if block == 0 || !b.rows.is_multiple_of(block) {
                return Err(format!("its {} rows of {own} are not whole heads", b.rows));
            }
            let from = |row: usize| {
                let (start, within) = (row / block * block, row % block);
                start + within % outer * inner + within / outer
            };
            Low { b: b.rows_of((0..b.rows).map(from)), a, scale }
        }
        Source::Times(_, factor) => Low { a, b, scale: scale * factor },
        _ => return Err(format!("it changes {own}, which is not a matrix that is multiplied")),
    })
}

/// The numbers that are taken, of `have`.
fn taken(
    take: &Take,
    have: usize,
    own: &str,
) -> std::result::Result<impl ExactSizeIterator<Item = usize> + use<>, String> {
    let Take { start, count, step } = *take;
    let last = start + count.saturating_sub(1) * step;
    if count > 0 && last >= have {
        return Err(format!("it changes {have} rows or columns where {own} needs {}", last + 1));
    }
    Ok((0..count).map(move |number| start + number * step))
}
