//! Which values a token's groups of dispatches pass on, and from where a halted layer is restarted.
//! Pure.
//!
//! A token that misses an expert computes garbage after its routing. The layer is restarted from a
//! point before the routing; every value that is still needed there is set aside by the routing
//! itself. So no dispatch between the two may change such a value.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::graph::Buf;

/// The form in which one token's row of a buffer is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::gpu) enum Form {
    /// As f32, padded with zeros.
    Plain,
    /// Packed for products (kernels/shared/pack.wgsl).
    Packed,
    /// As plain, in a buffer of its own (`rewrites/norm_add_norm.rs`).
    Moved,
}

/// One token's row of a buffer in one form.
pub(in crate::gpu) type Value = (Buf, Form);

/// The values that a group reads and writes. A written value is written in full.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::gpu) struct Flow {
    pub reads: Vec<Value>,
    pub writes: Vec<Value>,
    /// Whether it changes persistent state (a cache, experts counted as used), so that it must not
    /// run twice.
    pub lasts: bool,
}

/// Where a layer that halted in its routing is restarted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Resume {
    /// The first group to run again.
    pub from: usize,
    /// The values that are set aside for it. A plain value comes first, if there is one.
    pub aside: Vec<Value>,
}

/// For each group, the values that are read by it or later groups before they are written.
fn live(flows: &[Flow]) -> Vec<BTreeSet<Value>> {
    let mut live = vec![BTreeSet::new(); flows.len()];
    let mut after = BTreeSet::new();
    for (flow, live) in flows.iter().zip(&mut live).rev() {
        for value in &flow.writes {
            after.remove(value);
        }
        after.extend(&flow.reads);
        live.clone_from(&after);
    }
    live
}

/// The groups before the routing `at` that may run again: those since persistent state was last
/// changed.
fn since(flows: &[Flow], at: usize) -> Range<usize> {
    let first = flows[..at].iter().rposition(|flow| flow.lasts).map_or(0, |last| last + 1);
    first..at + 1
}

/// For each of `routings` (groups, in order), where its layer is restarted: the possible point that
/// needs the fewest values; among equals, the latest.
pub(super) fn resumes(flows: &[Flow], routings: &[usize]) -> Vec<Resume> {
    let live = live(flows);
    let resume = |at: &usize| {
        let kept = |from: &usize| {
            let written = flows[*from..*at].iter().flat_map(|flow| &flow.writes);
            written.into_iter().all(|value| !live[*from].contains(value))
        };
        let from = since(flows, *at).rev().filter(kept);
        // Among equals `min_by_key` returns the first, which is the latest point. At the routing
        // itself nothing was written.
        let from = from.min_by_key(|from| live[*from].len()).unwrap_or(*at);
        let mut aside: Vec<Value> = live[from].iter().copied().collect();
        aside.sort_by_key(|(buf, form)| (*form, *buf));
        Resume { from, aside }
    };
    routings.iter().map(resume).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const X: Value = (Buf(0), Form::Plain);
    const NORMED: Value = (Buf(1), Form::Packed);
    const ROUTER: Value = (Buf(2), Form::Plain);
    const ODD: Value = (Buf(3), Form::Plain);

    fn flow(reads: &[Value], writes: &[Value], lasts: bool) -> Flow {
        Flow { reads: reads.to_vec(), writes: writes.to_vec(), lasts }
    }

    /// Attention's output product, norm, router, routing, experts, norm.
    fn layer() -> Vec<Flow> {
        vec![
            flow(&[], &[X], true),
            flow(&[X], &[X], false),
            flow(&[X], &[NORMED], false),
            flow(&[NORMED], &[ROUTER], false),
            flow(&[ROUTER], &[], true),
            flow(&[NORMED, X], &[X], true),
            flow(&[X], &[NORMED], false),
        ]
    }

    #[test]
    fn a_layer_is_begun_again_at_its_norm_with_the_stream_alone() {
        let resume = Resume { from: 2, aside: vec![X] };
        assert_eq!(resumes(&layer(), &[4]), vec![resume]);
    }

    #[test]
    fn what_else_is_wanted_later_is_set_aside_too() {
        let mut flows = layer();
        flows[6].reads.push(ODD);
        let resume = Resume { from: 2, aside: vec![X, ODD] };
        assert_eq!(resumes(&flows, &[4]), vec![resume]);
    }

    #[test]
    fn a_value_that_is_changed_before_the_routing_moves_the_point_behind_the_change() {
        let mut flows = layer();
        flows.insert(3, flow(&[X, ODD], &[X], false));
        flows[0].writes.push(ODD);
        // After the change, the stream and the norm are needed; before it, the stream is changed.
        let resume = Resume { from: 4, aside: vec![X, NORMED] };
        assert_eq!(resumes(&flows, &[5]), vec![resume]);
        // If the router's result is changed in place, the routing itself is the point.
        let mut flows = layer();
        flows.insert(4, flow(&[ROUTER, X], &[ROUTER, X], false));
        let resume = Resume { from: 5, aside: vec![X, ROUTER, NORMED] };
        assert_eq!(resumes(&flows, &[5]), vec![resume]);
    }

    #[test]
    fn what_lasts_is_not_run_again() {
        let flows = [
            flow(&[], &[X], false),
            flow(&[X], &[ROUTER], false),
            flow(&[ROUTER], &[], true),
            flow(&[X], &[X], true),
            flow(&[X], &[ROUTER], false),
            flow(&[ROUTER], &[], true),
            flow(&[X], &[X], true),
        ];
        let found = resumes(&flows, &[2, 5]);
        // From the start, nothing is needed at all.
        assert_eq!(found[0], Resume { from: 0, aside: Vec::new() });
        assert_eq!(found[1], Resume { from: 4, aside: vec![X] });
    }
}
