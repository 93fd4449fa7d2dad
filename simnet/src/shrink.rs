//! Makes a failing run smaller: fewer faults, fewer nodes, less time, as long as the same rule is
//! broken.

use crate::options::Options;
use crate::world::World;
use crate::{faults, options};
use doppler_mesh::core::planted::Plant;

/// Runs that shrinking may take.
const RUNS_MAX: usize = 100;

/// The smallest run found that breaks `rule`.
pub fn shrink(from: &Options, plant: Option<Plant>, rule: &str) -> Options {
    let mut runs = 0;
    let mut fails = |options: &Options| {
        runs += 1;
        let broken = World::run(options, plant).violation;
        runs <= RUNS_MAX && broken.is_some_and(|violation| violation.rule == rule)
    };
    let mut best = from.clone();
    for seconds in [options::LIVENESS_SECONDS + 60, 300, 400] {
        let shorter = Options { seconds, ..best.clone() };
        if seconds < best.seconds && fails(&shorter) {
            best = shorter;
            break;
        }
    }
    // Mostly one fault is enough. In a swarm of another size each is another fault, so this comes first.
    for fault in faults::plan(&best) {
        let alone = Options { faults: Some(vec![fault.number]), ..best.clone() };
        if fails(&alone) {
            best = alone;
            break;
        }
    }
    for nodes in 3..best.nodes {
        let fewer = Options { nodes, ..best.clone() };
        if fails(&fewer) {
            best = fewer;
            break;
        }
    }
    // Halves, quarters and so on of the faults are left out, then single ones.
    let mut kept: Vec<usize> = faults::plan(&best).iter().map(|fault| fault.number).collect();
    let mut size = kept.len().div_ceil(2);
    while size > 0 && !kept.is_empty() {
        let mut at = 0;
        while at < kept.len() {
            let mut fewer = kept.clone();
            fewer.drain(at..(at + size).min(kept.len()));
            if fails(&Options { faults: Some(fewer.clone()), ..best.clone() }) {
                kept = fewer;
            } else {
                at += size;
            }
        }
        size = if size == 1 { 0 } else { size.div_ceil(2) };
    }
    Options { faults: Some(kept), ..best }
}
