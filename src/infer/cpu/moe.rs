//! A layer's experts between routing and sum: the (token, choice) pairs that have not run yet, and
//! the slots that hold experts' bytes.
//!
//! Pairs run expert by expert, in whatever waves experts arrive. Their results are kept separately
//! and summed only at the end, in the order of choice.

use rayon::prelude::*;

use super::expert_down::expert_down;
use super::expert_gate_up::expert_gate_up;
use super::expert_gate_up_biased::expert_gate_up_biased;
use super::expert_sum::expert_sum;
use super::expert_sum_biased::expert_sum_biased;
use super::route::route;
use crate::backend::{BackendError, Result, Slot, SlotClass};
use crate::graph::{ExpertLayout, Moe, Scoring};

/// Below this many multiplications in each of an expert's matrices, over all pairs,
/// waking another thread costs more than it saves.
const SERIAL_MAX: usize = 1 << 17;

/// The memory of one slot class.
pub struct SlotBytes {
    layout: ExpertLayout,
    bytes: Vec<u8>,
}

impl SlotBytes {
    pub fn new(class: &SlotClass) -> Result<Self> {
        let total = class.layout.bytes.checked_mul(class.count);
        let mut bytes = Vec::new();
        let reserved = total.is_some_and(|total| bytes.try_reserve_exact(total).is_ok());
        let Some(total) = total.filter(|_| reserved) else {
            let what = format!("{} expert slots", class.count);
            let bytes = class.layout.bytes as u64;
            return Err(BackendError::OutOfMemory {
                what,
                bytes: bytes.saturating_mul(class.count as u64),
            });
        };
        bytes.resize(total, 0);
        Ok(Self { layout: class.layout, bytes })
    }

    fn range(&self, index: u32) -> std::ops::Range<usize> {
        let start = index as usize * self.layout.bytes;
        start..start + self.layout.bytes
    }

    pub fn expert(&self, index: u32) -> &[u8] {
        &self.bytes[self.range(index)]
    }

    pub fn expert_mut(&mut self, index: u32) -> &mut [u8] {
        let range = self.range(index);
        &mut self.bytes[range]
    }
}

/// One layer's (token, choice) pairs, `[T, top_k]`.
#[derive(Default)]
pub struct Pairs {
    top_k: usize,
    ids: Vec<u32>,
    weights: Vec<f32>,
    /// Each pair's result, `[T, top_k, hidden]`.
    results: Vec<f32>,
    /// Which pairs have run.
    done: Vec<bool>,
}

impl Pairs {
    /// Chooses experts for each token and marks all pairs as not run.
    pub fn route(&mut self, logits: &[f32], bias: Option<&[f32]>, moe: &Moe, scoring: Scoring) {
        let experts = moe.experts.len();
        let pairs = logits.len() / experts * moe.top_k;
        self.top_k = moe.top_k;
        self.ids.resize(pairs, 0);
        self.weights.resize(pairs, 0.0);
        let (ids, weights) = (&mut self.ids, &mut self.weights);
        route(logits, bias, experts, scoring, ids, weights, moe.top_k);
        self.results.resize(pairs * moe.hidden, 0.0);
        self.done.clear();
        self.done.resize(pairs, false);
    }

    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Runs the waiting pairs whose expert has a slot. `singles` as in `linears`; `biases` are those of
    /// gates and ups.
    pub fn run(
        &mut self,
        (x, singles): (&[f32], bool),
        moe: &Moe,
        biases: Option<&[f32]>,
        classes: &[SlotBytes],
        slots: &[Option<Slot>],
    ) {
        // Gather: the waiting pairs of each expert present, in pair order.
        let mut work: Vec<(Slot, Vec<usize>)> = Vec::new();
        let mut place: Vec<Option<usize>> = vec![None; slots.len()];
        for (pair, id) in self.ids.iter().enumerate() {
            let id = *id as usize;
            let Some(slot) = slots[id].filter(|_| !self.done[pair]) else { continue };
            let at = *place[id].get_or_insert_with(|| {
                work.push((slot, Vec::new()));
                work.len() - 1
            });
            work[at].1.push(pair);
        }
        let run_one = |(slot, pairs): &(Slot, Vec<usize>)| {
            let class = &classes[usize::from(slot.class)];
            let bytes = class.expert(slot.index);
            let mut gathered = Vec::with_capacity(pairs.len() * moe.hidden);
            for pair in pairs {
                let token = pair / moe.top_k;
                gathered.extend_from_slice(&x[token * moe.hidden..(token + 1) * moe.hidden]);
            }
            let (layout, activation) = (&class.layout, moe.activation);
            let inner = match biases {
                None => expert_gate_up(&gathered, layout, bytes, activation, singles),
                Some(biases) => {
                    let id = self.ids[pairs[0]] as usize;
                    let biases = &biases[2 * moe.ff * id..2 * moe.ff * (id + 1)];
                    expert_gate_up_biased(&gathered, layout, bytes, biases, activation, singles)
                }
            };
            expert_down(&inner, &class.layout, bytes, singles)
        };
        let pairs: usize = work.iter().map(|(_, pairs)| pairs.len()).sum();
        let results: Vec<Vec<f32>> = if pairs * moe.hidden * moe.ff < SERIAL_MAX {
            work.iter().map(run_one).collect()
        } else {
            work.par_iter().map(run_one).collect()
        };
        for ((_, pairs), rows) in work.iter().zip(results) {
            for (pair, row) in pairs.iter().zip(rows.chunks_exact(moe.hidden)) {
                self.results[pair * moe.hidden..(pair + 1) * moe.hidden].copy_from_slice(row);
                self.done[*pair] = true;
            }
        }
    }

    /// Sums the results into `out [T, hidden]`. `biases` are those of the down projections.
    pub fn finish(&self, biases: Option<&[f32]>, out: &mut [f32]) -> Result<()> {
        if let Some(pair) = self.done.iter().position(|done| !done) {
            let expert = self.ids[pair];
            return Err(BackendError::Unsupported(format!("a sum before expert {expert} had run")));
        }
        let Self { results, weights, ids, top_k, .. } = self;
        match biases {
            None => expert_sum(results, weights, *top_k, out),
            Some(biases) => expert_sum_biased(results, weights, ids, biases, *top_k, out),
        }
        Ok(())
    }
}
