//! Checkpoints whose config ties the output matrix to the embeddings, but whose files contain an
//! output matrix nevertheless.
//!
//! A copy is left out. A different matrix is refused: Transformers 4 drops it, Transformers 5 uses
//! it and does not tie, so it is unclear which of the two the model is.

use super::checkpoint::Checkpoint;
use super::{LoadError, Result};
use crate::graph::{Graph, Op};

/// The output matrix.
pub const HEAD: &str = "lm_head.weight";

/// About how many bytes are compared at a time.
const CHUNK_BYTES: u64 = 4 << 20;

/// # Errors
/// If the graph is tied and the checkpoint has a head that is not the embedding table.
pub fn refuse_another_head(checkpoint: &dyn Checkpoint, graph: &Graph) -> Result<()> {
    if !graph.tied() || checkpoint.find(HEAD).is_none() {
        return Ok(());
    }
    let table = graph.ops.iter().find_map(|op| match op {
        Op::Embed { table, .. } => Some(graph.weight_spec(*table).tensor.as_str()),
        _ => None,
    });
    match table {
        Some(table) if !same(checkpoint, table)? => Err(LoadError::Tensor {
            tensor: HEAD.to_owned(),
            problem: format!(
                "it differs from {table}, though config.json has tie_word_embeddings true; \
                 set that to false to use this head, or remove the tensor to use the embeddings"
            ),
        }),
        _ => Ok(()),
    }
}

/// Whether the head has exactly the table's values.
fn same(checkpoint: &dyn Checkpoint, table: &str) -> Result<bool> {
    let (Some(head), Some(stored)) = (checkpoint.find(HEAD), checkpoint.find(table)) else {
        return Ok(true);
    };
    let Some(dtype) = stored.dtype().filter(|_| head == stored) else { return Ok(false) };
    let (rows, cols) = stored.rows_cols();
    let row = dtype.row_bytes(cols as usize) as u64;
    let step = (CHUNK_BYTES / row.max(1)).clamp(1, rows.max(1));
    let mut bytes = [vec![0; (step * row) as usize], vec![0; (step * row) as usize]];
    let mut first = 0;
    while first < rows {
        let count = (step.min(rows - first) * row) as usize;
        let [a, b] = &mut bytes;
        checkpoint.read(HEAD, first, &mut a[..count])?;
        checkpoint.read(table, first, &mut b[..count])?;
        if a[..count] != b[..count] {
            return Ok(false);
        }
        first += step;
    }
    Ok(true)
}
