//! What a report is made of: runs of the simulator from which figures are taken. Times are virtual
//! seconds.

use doppler_ids::ModelId;
use doppler_mesh::core::Event;
use doppler_store::signature::SignedModel;
use serde::Serialize;

use crate::check::Violation;
use crate::gossip::Traffic;
use crate::options::{Options, SECOND, Scenario};
use crate::work::{FEW, STARTS};
use crate::world::World;

/// How long a run with killed nodes lasts: its last 200 s are the liveness phase, and nodes die in the
/// middle of what comes before.
const KILL_SECONDS: u64 = 260;
/// A quiet swarm: when nodes have met after the last has started, and in a crowd what they need besides
/// to find its pace; for how long its traffic is counted, how many models are then published, how far
/// apart, and how long after the last of them it is looked at.
const MEET: u64 = 60 * SECOND;
const PACE: u64 = 90 * SECOND;
const COUNT: u64 = 60 * SECOND;
const PUBLISHED: u64 = 10;
const APART: u64 = SECOND;
const HEAR: u64 = 20 * SECOND;

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / SECOND as f64
}

/// The value below which so many of a hundred are; 0 if there is none.
pub fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let at = (values.len() * percent / 100).min(values.len().saturating_sub(1));
    values.get(at).copied().unwrap_or(0.0)
}

/// What became of a swarm of ten of which some were killed at once.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Killing {
    pub seed: u64,
    pub killed: usize,
    /// Until nobody counted on any of the dead.
    pub detect_s: f64,
    /// Until the last copy was durable, the detection included.
    pub heal_s: f64,
    /// Bytes of copies made, and of those that were missing.
    pub moved_bytes: u64,
    pub least_bytes: u64,
    /// How long the least takes at the survivors' joint bandwidth.
    pub least_s: f64,
    /// Objects of which every copy was on a killed node.
    pub lost: u64,
    /// Reads for tokens before the killing and from then until all is healed, if there were any: the
    /// median, and what 99 of 100 take at most.
    pub before: Option<Reads>,
    pub during: Option<Reads>,
    pub violation: Option<String>,
}

impl Killing {
    /// How long healing may take: a quarter longer than the least at the survivors' joint bandwidth, beside
    /// what noticing took and 5 s.
    pub fn allowed_s(&self) -> f64 {
        1.25 * self.least_s + self.detect_s + 5.0
    }
}

/// How long reads took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Reads {
    pub count: usize,
    pub p50_s: f64,
    pub p99_s: f64,
}

impl Reads {
    fn of(mut took: Vec<f64>) -> Option<Self> {
        let count = took.len();
        let (p50_s, p99_s) = (percentile(&mut took, 50), percentile(&mut took, 99));
        (count > 0).then_some(Self { count, p50_s, p99_s })
    }
}

/// Kills nodes of a swarm of ten that holds Mixtral.
pub fn killing(seed: u64, killed: usize, is_busy: bool) -> Killing {
    let scenario = if is_busy { Scenario::Busy } else { Scenario::Kill };
    let faults = Some((0..killed).collect());
    let options = Options { seconds: KILL_SECONDS, faults, ..Options::new(seed, scenario) };
    let mut world = World::new(&options);
    world.run_until(options.end());
    if world.violation.is_none() {
        world.check_end();
    }
    let healed = world.healed;
    let since = |at: u64| seconds(at.saturating_sub(healed.died));
    let took = |from: u64, until: u64| {
        let reads = world.token_times.iter().filter(|(at, _)| (from..until).contains(at));
        Reads::of(reads.map(|(_, took)| seconds(*took)).collect())
    };
    Killing {
        seed,
        killed,
        detect_s: since(healed.noticed),
        heal_s: since(healed.healed),
        moved_bytes: healed.moved,
        least_bytes: healed.least,
        least_s: healed.least as f64 / healed.joint.max(1) as f64,
        lost: healed.lost,
        // Nodes have met by then.
        before: took(healed.died / 2, healed.died),
        during: took(healed.died, healed.healed),
        violation: world.violation.map(|violation| violation.to_string()),
    }
}

/// What a swarm to which nothing happens costs, and how fast news travels in it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quiet {
    pub seed: u64,
    pub nodes: usize,
    /// Copies of gossip messages and bytes that a node sends a second on average, and the node that
    /// sends most.
    pub messages_per_s: f64,
    pub bytes_per_s: f64,
    pub most_bytes_per_s: f64,
    /// Until half of the nodes, and 99 of 100, have learned of a published model.
    pub p50_s: f64,
    pub p99_s: f64,
    /// Of a hundred times that a node should have learned of a model, how often it has.
    pub learned_percent: f64,
    pub violation: Option<String>,
}

/// Runs a quiet swarm on so many threads; models are published by nodes spread over it.
pub fn quiet(seed: u64, nodes: usize, threads: usize) -> Quiet {
    let pace = if nodes > FEW { PACE } else { 0 };
    let met = MEET + nodes as u64 / STARTS * SECOND + pace;
    let end = met + COUNT + PUBLISHED * APART + HEAR;
    let options =
        Options { nodes, seconds: end / SECOND + 1, ..Options::new(seed, Scenario::Quiet) };
    let mut world = World::new(&options);
    world.run_until_with(met, threads);
    let sent = |world: &World| -> Vec<Traffic> {
        (0..nodes).map(|node| world.gossip.sent(node)).collect()
    };
    let before = sent(&world);
    world.run_until_with(met + COUNT, threads);
    let after = sent(&world);
    let each = before.iter().zip(&after).map(|(before, after)| after.bytes - before.bytes);
    let most = each.clone().max().unwrap_or(0);
    let bytes: u64 = each.sum();
    let copies: u64 =
        before.iter().zip(&after).map(|(before, after)| after.copies - before.copies).sum();
    let mut delays = Vec::new();
    let mut published = Vec::new();
    for number in 0..PUBLISHED {
        world.run_until_with(met + COUNT + number * APART, threads);
        let node = number as usize * nodes / PUBLISHED as usize;
        published.push((world.publish_news(node, number), world.now));
    }
    world.run_until_with(end, threads);
    for (model, at) in published {
        let times = world.watched.remove(&model).unwrap_or_default();
        delays.extend(times.into_iter().map(|time| seconds(time - at)));
    }
    let expected = PUBLISHED as f64 * (nodes - 1) as f64;
    let rate = |count: u64| count as f64 / nodes as f64 / seconds(COUNT);
    Quiet {
        seed,
        nodes,
        messages_per_s: rate(copies),
        bytes_per_s: rate(bytes),
        most_bytes_per_s: most as f64 / seconds(COUNT),
        learned_percent: delays.len() as f64 * 100.0 / expected,
        p50_s: percentile(&mut delays, 50),
        p99_s: percentile(&mut delays, 99),
        violation: world.violation.as_ref().map(Violation::to_string),
    }
}

impl World {
    /// A node publishes a model of which nothing is known but its name, and everybody is watched who
    /// learns of it.
    fn publish_news(&mut self, node: usize, number: u64) -> ModelId {
        let mut id = [0xaa; 32];
        id[..8].copy_from_slice(&number.to_le_bytes());
        let model = ModelId::from(id);
        let Ok(signed) = SignedModel::sign(&[9; 32], model, "news", 1000) else { return model };
        self.watched.insert(model, Vec::new());
        self.tell(node, Event::Publish(signed));
        model
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_what_is_there() {
        let mut values: Vec<f64> = (0..200).rev().map(f64::from).collect();
        assert_eq!(
            [0, 50, 99, 100].map(|at| percentile(&mut values, at)),
            [0.0, 100.0, 198.0, 199.0]
        );
        assert_eq!(percentile(&mut [], 50), 0.0);
    }

    #[test]
    fn a_quiet_swarm_costs_little_and_hears_news_within_a_second() {
        let quiet = quiet(1, 10, 1);
        println!("{quiet:?}");
        assert_eq!(quiet.violation, None);
        assert_eq!(quiet.learned_percent, 100.0);
        assert!(quiet.p50_s > 0.0 && quiet.p50_s <= quiet.p99_s && quiet.p99_s <= 1.0);
        assert!(quiet.messages_per_s > 1.0 && quiet.bytes_per_s > 100.0);
    }

    #[test]
    fn reads_for_tokens_are_timed_before_and_while_a_swarm_heals() {
        let busy = killing(1, 1, true);
        println!("{busy:?}");
        assert_eq!((busy.violation, busy.lost), (None, 0));
        let (before, during) = (busy.before.unwrap(), busy.during.unwrap());
        assert!(before.count > 50 && during.count > 50, "{before:?}, {during:?}");
        assert!(busy.least_bytes > 0 && busy.heal_s > busy.detect_s);
    }

    /// While a token waits a node copies one object at a time, so it must begin the next when one has ended:
    /// one that looks only each second takes 59 s here.
    #[test]
    fn a_swarm_heals_in_time_while_tokens_are_read() {
        let busy = killing(2, 3, true);
        println!("{busy:?}, allowed {} s", busy.allowed_s());
        assert_eq!((&busy.violation, busy.lost), (&None, 0));
        assert!(busy.heal_s <= busy.allowed_s());
    }
}
