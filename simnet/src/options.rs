//! What a run is: a seed, a scenario, how many nodes, how long, which faults. The same options
//! give the same run.

use std::fmt::Write;

use clap::ValueEnum;

/// Virtual nanoseconds of a second.
pub const SECOND: u64 = 1_000_000_000;
/// And of a millisecond.
pub const MS: u64 = 1_000_000;

/// What happens to the swarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// Nodes are killed, leave and come back; disks are slow, full, and flip bits.
    Churn,
    /// Everything that the others do.
    Mixed,
    /// Links are cut, in one direction or both, and lose packets in bursts.
    Partition,
    /// Peers send wrong bytes, lie about what they hold, stall and flood.
    Liars,
    /// Three nodes are killed at once and do not come back; a model of real size.
    Kill,
    /// The same, while every node reads for tokens.
    Busy,
    /// Nothing goes wrong, and nobody reads: what a swarm costs by itself.
    Quiet,
    /// The same with a model of a few MB.
    KillSmall,
    /// Many nodes and models, nothing goes wrong: what gossip costs, and how fast it is.
    Crowd,
    /// Many nodes and models, each node interested in a few; a tenth of the nodes die at once.
    Models,
    /// Nodes leave for good, once others hold what they hold.
    Drain,
    /// One node has everything, the others begin empty and want all of it.
    ColdStart,
}

impl Scenario {
    /// Whether nodes are killed for ever.
    pub const fn kills(self) -> bool {
        matches!(self, Self::Kill | Self::KillSmall | Self::Busy)
    }

    /// Whether each object lies on as many nodes as it should, and no other.
    pub const fn is_placed(self) -> bool {
        matches!(self, Self::Kill | Self::KillSmall | Self::Busy | Self::Quiet)
    }
}

/// One run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub seed: u64,
    pub scenario: Scenario,
    pub nodes: usize,
    /// Virtual seconds; faults happen in the first part ([`Options::safety`]).
    pub seconds: u64,
    /// Only these faults of the plan; all of them if absent.
    pub faults: Option<Vec<usize>>,
}

impl Options {
    pub const fn new(seed: u64, scenario: Scenario) -> Self {
        Self { seed, scenario, nodes: 10, seconds: 600, faults: None }
    }

    /// When the faults have stopped, in nanoseconds. What is left of a run is the liveness
    /// phase: enough for leases to end, dials to be tried again and reads to be done.
    pub const fn safety(&self) -> u64 {
        self.seconds.saturating_sub(LIVENESS_SECONDS) * SECOND
    }

    pub const fn end(&self) -> u64 {
        self.seconds * SECOND
    }

    /// The command that runs this again.
    pub fn command(&self) -> String {
        let scenario = self.scenario.to_possible_value();
        let scenario = scenario.as_ref().map_or("mixed", |value| value.get_name());
        let mut text = format!(
            "cargo run --release -p simnet -- --first-seed {} --seeds 1 --scenario {scenario} \
             --nodes {} --seconds {}",
            self.seed, self.nodes, self.seconds
        );
        if let Some(faults) = &self.faults {
            let list: Vec<String> = faults.iter().map(ToString::to_string).collect();
            let list = if list.is_empty() { "none".to_owned() } else { list.join(",") };
            let _ = write!(text, " --faults {list}");
        }
        text
    }
}

/// Length of the liveness phase: a lease (35 s), the longest wait before a dial (60 s), reads
/// (60 s each at most, all at once), and some.
pub const LIVENESS_SECONDS: u64 = 200;
