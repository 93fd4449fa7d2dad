//! What the kernels do not support, recognised from a model's shapes before anything is loaded.
//!
//! Lowering refuses the same, op by op. Here the error names the part of the model and the way out.
//! The CPU backend supports all of it.

use super::lower::HEAD_DIM_MAX;
use crate::backend::{BackendError, Result};
use crate::graph::{ExpertLayout, Graph, Op};

/// # Errors
/// If the kernels do not support the attention heads or the experts.
pub(super) fn check(graph: &Graph, experts: &[ExpertLayout]) -> Result<()> {
    let refuse = |what: String| {
        let what = format!("{what}; the CPU runs this model: --backend cpu");
        Err(BackendError::Unsupported(what))
    };
    for op in &graph.ops {
        let (Op::Attention { kv, .. } | Op::AttendChunk { kv, .. } | Op::AttendSinks { kv, .. }) =
            op
        else {
            continue;
        };
        let head_dim = graph.kv_spec(*kv).head_dim;
        if !head_dim.is_multiple_of(4) || head_dim > HEAD_DIM_MAX {
            return refuse(format!(
                "attention heads of {head_dim} elements (multiples of 4 up to {HEAD_DIM_MAX} are supported)"
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
