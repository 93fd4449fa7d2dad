//! Which faults a run has, when, and what they hit. Each is drawn from a generator of its own.
//!
//! Invariants: every fault has ended when the safety phase ends; whoever lies is not a keeper,
//! so that every object has an honest holder.

use crate::models;
use crate::options::{MS, Options, SECOND, Scenario};
use crate::rng::{Rng, mix};

/// How a peer is dishonest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// A group of what it sends does not match its hash.
    Bytes,
    /// It says that objects are one group longer.
    Size,
    /// It says that it holds everything, and denies it when it is asked.
    Holdings,
    /// It takes requests and sends nothing, or half.
    Stall,
    /// It gossips without end, some of it nonsense, some of it in others' names.
    Flood,
}

const LIES: [Lie; 5] = [Lie::Bytes, Lie::Size, Lie::Holdings, Lie::Stall, Lie::Flood];

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Killed; started again, with what was durable, when the fault ends.
    Crash {
        node: usize,
    },
    /// Stops in good order, and is started again.
    Leave {
        node: usize,
    },
    /// Two sides do not reach each other; in one direction only if `is_one_way`.
    Partition {
        salt: u64,
        is_one_way: bool,
    },
    /// One node is cut off, or reaches nobody.
    Isolate {
        node: usize,
        is_one_way: bool,
    },
    /// Everything from and to a node is slow, and comes late, in bursts.
    Burst {
        node: usize,
    },
    /// Gossip overtakes gossip, and comes twice.
    Disorder,
    /// Every read of a node's disk takes this long, in nanoseconds.
    SlowDisk {
        node: usize,
        by: u64,
    },
    /// A bit of something on a node's disk flips; `pick` chooses what.
    Flip {
        node: usize,
        pick: u64,
    },
    /// Nothing can be written.
    FullDisk {
        node: usize,
    },
    /// The wall clock of a node steps by so many milliseconds.
    Skew {
        node: usize,
        by_ms: i64,
    },
    Lie {
        node: usize,
        lie: Lie,
    },
    /// Killed, and never seen again.
    Die {
        node: usize,
    },
    /// Leaves for good, with its disk, when others hold what it holds.
    Drain {
        node: usize,
    },
}

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Its place in the plan; `--faults` names it.
    pub number: usize,
    /// Virtual nanoseconds.
    pub from: u64,
    pub until: u64,
    pub kind: Kind,
}

/// Nodes that never lie and hold every object.
pub const KEEPERS: usize = 2;

impl Fault {
    fn draw(options: &Options, number: usize) -> Self {
        let mut rng = Rng::fork(options.seed, "fault", number as u64);
        let safety = options.safety();
        // In thousandths, so that a shorter run has the same faults, closer together.
        let from = safety / 1000 * rng.below(900);
        let longest = if rng.percent(20) { 120 * SECOND } else { 30 * SECOND };
        let until = (from + rng.between(200 * MS, longest)).min(safety);
        let nodes = options.nodes as u64;
        let node = rng.below(nodes) as usize;
        let liar = (KEEPERS as u64 + rng.below(nodes.saturating_sub(KEEPERS as u64))) as usize;
        let pick = rng.next();
        let is_one_way = rng.percent(40);
        let kind = match Self::family(options.scenario, &mut rng) {
            Scenario::Churn => match rng.below(10) {
                0..=3 => Kind::Crash { node },
                4 | 5 => Kind::Leave { node },
                6 => Kind::SlowDisk { node, by: rng.between(50, 3000) * MS },
                7 => Kind::Flip { node, pick },
                8 => Kind::FullDisk { node },
                _ => Kind::Skew { node, by_ms: rng.between(0, 600_000) as i64 - 300_000 },
            },
            Scenario::Partition => match rng.below(5) {
                0 => Kind::Partition { salt: pick, is_one_way },
                1 => Kind::Isolate { node, is_one_way },
                2 | 3 => Kind::Burst { node },
                _ => Kind::Disorder,
            },
            // In a mixed run whoever is dialled by all stays.
            Scenario::Drain if options.scenario == Scenario::Drain || node > KEEPERS => {
                Kind::Drain { node }
            }
            Scenario::Liars if liar < options.nodes => {
                Kind::Lie { node: liar, lie: LIES[rng.below(LIES.len() as u64) as usize] }
            }
            _ => Kind::Burst { node },
        };
        Self { number, from, until, kind }
    }

    fn family(scenario: Scenario, rng: &mut Rng) -> Scenario {
        let die = rng.below(10);
        match (scenario, die) {
            (Scenario::Mixed, 0) => Scenario::Drain,
            (Scenario::Mixed, 1..=3) => Scenario::Churn,
            (Scenario::Mixed, 4..=6) => Scenario::Partition,
            (Scenario::Mixed, _) => Scenario::Liars,
            (Scenario::ColdStart, 0) => Scenario::Churn,
            (Scenario::ColdStart, _) => Scenario::ColdStart,
            (other, _) => other,
        }
    }

    /// Whether nothing goes from one node to another while this fault lasts.
    pub fn blocks(&self, from: usize, to: usize) -> bool {
        match self.kind {
            Kind::Partition { salt, is_one_way } => {
                let side = |node: usize| mix(salt ^ node as u64) & 1;
                side(from) != side(to) && !(is_one_way && side(from) == 1)
            }
            Kind::Isolate { node, is_one_way } => from == node || to == node && !is_one_way,
            _ => false,
        }
    }
}

/// Nodes that the scenarios `kill` and `busy` kill unless they are told.
const KILLED: usize = 3;

/// The last of the nodes die together in the middle of the safety phase.
fn kill(options: &Options, number: usize) -> Fault {
    let node = match options.scenario {
        Scenario::Models => models::mortal(options, number),
        _ => options.nodes.saturating_sub(1 + number),
    };
    let (from, until) = (options.safety() / 2, options.safety());
    Fault { number, from, until, kind: Kind::Die { node } }
}

/// All faults of a run, or those of them that its options name.
pub fn plan(options: &Options) -> Vec<Fault> {
    let per_minute = match options.scenario {
        Scenario::ColdStart => 1,
        Scenario::Mixed => 6,
        _ => 5,
    };
    let minutes = options.safety() / SECOND * per_minute * options.nodes as u64;
    let count = (minutes / 600) as usize;
    let is_kill = options.scenario.kills();
    let count = match options.scenario {
        Scenario::Quiet | Scenario::Crowd => 0,
        Scenario::Models => models::mortals(options),
        _ if is_kill => KILLED,
        _ => count,
    };
    let numbers = options.faults.clone().unwrap_or_else(|| (0..count).collect());
    let draw = if is_kill || options.scenario == Scenario::Models { kill } else { Fault::draw };
    numbers.into_iter().map(|number| draw(options, number)).collect()
}
