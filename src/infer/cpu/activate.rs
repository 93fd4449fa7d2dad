//! An activation without a gate, element by element.

use rayon::prelude::*;

use super::gated;
use crate::graph::Activation;

/// Elements of one task. Fewer are not worth another thread.
const TASK: usize = 1 << 13;

/// Replaces every element by its activation.
pub fn activate(x: &mut [f32], activation: Activation) {
    let part = |x: &mut [f32]| {
        x.iter_mut().for_each(|x| *x = gated::activate(*x, activation));
    };
    if x.len() < 2 * TASK {
        part(x);
    } else {
        x.par_chunks_mut(TASK).for_each(part);
    }
}
