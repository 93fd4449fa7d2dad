//! `act(gate) * up`, element by element.

use rayon::prelude::*;

use crate::graph::Activation;

/// Elements of one task. Fewer are not worth another thread.
const TASK: usize = 1 << 13;

/// Replaces `gate` by `act(gate) * up`.
pub fn gated(gate: &mut [f32], up: &[f32], activation: Activation) {
    let part = |(gate, up): (&mut [f32], &[f32])| {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = joined(*gate, *up, activation);
        }
    };
    if gate.len() < 2 * TASK {
        part((gate, up));
    } else {
        gate.par_chunks_mut(TASK).zip(up.par_chunks(TASK)).for_each(part);
    }
}

/// `act(gate) * up` of one element.
#[inline]
pub fn joined(gate: f32, up: f32, activation: Activation) -> f32 {
    let act = activate(gate, activation);
    match activation {
        Activation::Clamped => act * (up.clamp(-CLAMP, CLAMP) + 1.0),
        _ => act * up,
    }
}

/// The limit of [`Activation::Clamped`].
const CLAMP: f32 = 7.0;

#[inline]
pub fn activate(x: f32, activation: Activation) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        // The tanh approximation (Hendrycks and Gimpel, 2016); the constant is sqrt(2 / pi).
        Activation::GeluTanh => {
            let inner = std::f32::consts::FRAC_2_SQRT_PI
                * std::f32::consts::FRAC_1_SQRT_2
                * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2)),
        Activation::SquaredRelu => x.max(0.0) * x,
        Activation::Tanh => x.tanh(),
        Activation::Clamped => {
            // Not `min`, which drops a NaN.
            let x = if x > CLAMP { CLAMP } else { x };
            x / (1.0 + (-1.702 * x).exp())
        }
    }
}
