//! What the kernels do not compute, told from a model's shapes before anything is loaded.
//!
//! Lowering refuses the same, op by op; here it is a sentence that names the model's part and
//! the way out. The CPU backend computes all of it.

use super::lower::HEAD_DIM_MAX;
use crate::backend::{BackendError, Result};
use crate::graph::{ExpertLayout, Graph, Op};

/// # Errors
/// Attention heads or experts that no kernel computes.
pub(super) fn check(graph: &Graph, experts: &[ExpertLayout]) -> Result<()> {
    let refuse = |what: String| {
        let what = format!("{what}; the CPU runs this model: --backend cpu");
        Err(BackendError::Unsupported(what))
    };
    for op in &graph.ops {
        let Op::Attention { kv, .. } = op else { continue };
        let head_dim = graph.kv_spec(*kv).head_dim;
        if !head_dim.is_multiple_of(4) || head_dim > HEAD_DIM_MAX {
            return refuse(format!(
                "attention heads of {head_dim} elements (multiples of 4 up to {HEAD_DIM_MAX} are)"
            ));
        }
    }
    for (moe, layout) in graph.moe.iter().zip(experts) {
        let (gate, up) = (layout.gate.dtype, layout.up.dtype);
        if gate != up {
            let layer = moe.layer;
            return refuse(format!(
                "experts whose gate matrices are {gate} and up matrices {up}, as in layer {layer}"
            ));
        }
    }
    Ok(())
}
