//! Chooses one token's experts in a layer (as [`route`]) and looks up where they are.

use super::route::route;
use crate::graph::Scoring;

/// Where a layer's experts are.
pub struct Places<'a> {
    /// By expert, its slot.
    pub slots: &'a [Option<u32>],
    /// By expert, its place in host memory.
    pub spill: &'a [Option<u32>],
    /// Slots that may be filled. The first `taken` of them are taken.
    pub free: &'a [u32],
    pub taken: usize,
    /// Whether this token may take slots, because no other token has.
    pub takes: bool,
}

/// The result for the token.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The chosen experts and their routing weights, `top_k` of each.
    pub ids: Vec<u32>,
    pub weights: Vec<f32>,
    /// By choice, the slot. `None` if an expert cannot be fetched and the token halts here.
    pub slots: Option<Vec<u32>>,
    /// By choice, the place and the slot of an expert that must be fetched first.
    pub fetches: Vec<Option<(u32, u32)>>,
}

/// Chooses `top_k` experts by `logits` and perhaps `bias` (`[experts]` each) and looks up their slots. Experts without a
/// slot take free slots in the order of choice, if they can be fetched and there are enough free
/// slots.
pub fn decode_route(
    logits: &[f32],
    bias: Option<&[f32]>,
    top_k: usize,
    scoring: Scoring,
    of: &Places<'_>,
) -> Choice {
    let (mut ids, mut weights) = (vec![0; top_k], vec![0.0; top_k]);
    route(logits, bias, logits.len(), scoring, &mut ids, &mut weights, top_k);
    let mut fetches = vec![None; top_k];
    let mut free = of.free.iter().skip(of.taken);
    let mut slots = Vec::with_capacity(top_k);
    for (id, fetch) in ids.iter().map(|id| *id as usize).zip(&mut fetches) {
        if let Some(slot) = of.slots[id] {
            slots.push(slot);
        } else if let (true, Some(place)) = (of.takes, of.spill[id])
            && let Some(slot) = free.next()
        {
            *fetch = Some((place, *slot));
            slots.push(*slot);
        }
    }
    let all = slots.len() == top_k;
    if !all {
        fetches.fill(None);
    }
    Choice { ids, weights, slots: all.then_some(slots), fetches }
}
