//! Ten nodes for an hour: one publishes, others run, pin, remove and collect in a loop, while peers
//! are killed and come back, are stopped for a while, and lose their links. Memory, descriptors,
//! threads, disk and catalogue stay flat, every command answers in time, and a node that nobody asks
//! costs next to nothing.
//!
//! By hand, for so many minutes (60 unless said otherwise), with a table and one line of JSON at the end:
//!
//!     DOPPLER_SOAK_MINUTES=5 cargo test --release --test networks -- --ignored --nocapture soak
//!
//! Links are cut with nftables in a network namespace of the test's own (root); without it, nodes are
//! only killed and stopped.

mod fleet;
mod models;
mod report;
mod usage;

use std::time::{Duration, Instant};

use self::fleet::Fleet;
use self::models::variant;
use self::report::{Measure, Report};
use crate::common::model;

/// The node that publishes; those that run; those that pin; those to which something happens.
const PUBLISHER: usize = 0;
const RUNNERS: [usize; 3] = [1, 2, 3];
const KEEPERS: [usize; 2] = [4, 5];
const STOPPED: [usize; 4] = [6, 7, 8, 9];
const KILLED: [usize; 3] = [7, 8, 9];
/// The first nodes live from beginning to end, so what they use can be compared.
const STEADY: usize = 7;

/// A round takes at least this long, so that most of the hour is not the machine's full load.
const ROUND_MIN: Duration = Duration::from_secs(10);
/// A model that was removed is known nowhere so many rounds later: its lease is over.
const GONE_AFTER: usize = 4;
/// How long a node is left alone before its idle cost is measured, and for how long that is done.
const SETTLE: Duration = Duration::from_secs(20);
const QUIET: Duration = Duration::from_secs(60);
/// How soon all nodes have met again after the last mishap.
const MET_AGAIN: Duration = Duration::from_secs(60);

const PROMPT: &str = "Call me";

/// What happens to a node in a round.
#[derive(Debug, Clone, Copy)]
enum Mishap {
    Killed(usize),
    Stopped(usize),
    Cut(usize),
}

impl Mishap {
    fn of(round: usize) -> Self {
        match round % 3 {
            0 => Self::Killed(KILLED[round / 3 % KILLED.len()]),
            1 => Self::Stopped(STOPPED[round / 3 % STOPPED.len()]),
            _ => Self::Cut(STOPPED[(round / 3 + 2) % STOPPED.len()]),
        }
    }

    fn begin(self, fleet: &mut Fleet) {
        match self {
            Self::Killed(node) => fleet.kill(node),
            Self::Stopped(node) => fleet.signal(node, "STOP"),
            Self::Cut(node) => fleet.cut(node),
        }
    }

    fn end(self, fleet: &mut Fleet) {
        match self {
            Self::Killed(node) => fleet.start(node),
            Self::Stopped(node) => fleet.signal(node, "CONT"),
            Self::Cut(_) => fleet.mend(),
        }
    }
}

/// One round: a model comes, is used in every way, and goes again.
fn round(fleet: &mut Fleet, round: usize, text: &str) {
    let began = Instant::now();
    let name = format!("soak-{round}");
    let (runner, keeper) = (RUNNERS[round % RUNNERS.len()], KEEPERS[round % KEEPERS.len()]);
    let mishap = Mishap::of(round);
    mishap.begin(fleet);
    let dir = variant(fleet.dir(), &name);
    // One copy is enough, so that it goes for good when those who used it have removed it.
    fleet.ask(PUBLISHER, "publish", &[dir.to_str().unwrap(), "--replicas", "1:1"]);
    std::fs::remove_dir_all(&dir).unwrap();
    fleet.until([runner, keeper], &name, true);
    let said = fleet.ask(runner, "run", &[&name, "-p", PROMPT, "-n", "8", "--json"]);
    fleet
        .check(said.is_none_or(|said| said.json()["text"] == text), &format!("{name}: other text"));
    fleet.ask(keeper, "pin", &[&name, "--fetch"]);
    fleet.ask(runner, "gc", &["--disk-budget", "1MiB", "--last-copy"]);
    // The publisher first: whoever has said that it holds something keeps a model known for a lease,
    // so all nodes forget it alike.
    for node in [PUBLISHER, keeper, runner] {
        fleet.ask(node, "unpin", &[&name]);
        fleet.ask(node, "rm", &[&name, "--force", "--last-copy"]);
        fleet.ask(node, "status", &[]);
    }
    mishap.end(fleet);
    if let Some(gone) = round.checked_sub(GONE_AFTER) {
        fleet.until(0..STEADY, &format!("soak-{gone}"), false);
    }
    for node in 0..STEADY {
        let known = fleet.models(node);
        fleet.report.add(node, Measure::Catalogue, known.len() as f64);
    }
    std::thread::sleep(ROUND_MIN.saturating_sub(began.elapsed()));
}

#[test]
#[ignore = "takes an hour, or DOPPLER_SOAK_MINUTES"]
fn soak() {
    let minutes = std::env::var("DOPPLER_SOAK_MINUTES");
    let minutes: f64 = minutes.map_or(60.0, |text| text.parse().expect("a number of minutes"));
    let length = Duration::from_secs_f64(minutes * 60.0);
    let mut fleet = Fleet::new(10, Report::new(length));
    // A model that stays, on a node that is killed now and then and on one that is not.
    for node in [9, 6] {
        fleet.ask(node, "publish", &[model().to_str().unwrap()]);
    }
    let name = "tiny-mixtral-q4_k_m";
    fleet.until(0..10, name, true);
    let text = fleet.ask(1, "run", &[name, "-p", PROMPT, "-n", "8", "--json"]);
    let text = text.expect("the first run").json()["text"].as_str().unwrap().to_owned();

    let sampler = fleet.sample(0..STEADY);
    let began = Instant::now();
    let mut rounds = 0;
    while began.elapsed() < length {
        round(&mut fleet, rounds, &text);
        rounds += 1;
    }
    fleet.all_met(MET_AGAIN);
    sampler.stop();
    std::thread::sleep(SETTLE);
    let quiet = QUIET.min(length / 4);
    fleet.measure_idle(quiet);
    let report = fleet.finish(rounds);
    println!("{report}\n{}", report.json());
    report.assert_flat();
}
