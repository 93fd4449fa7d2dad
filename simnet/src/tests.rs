//! Runs of each scenario, that they repeat, and that a broken rule is seen and made small.

use crate::{News, Options, Outcome, Scenario, World};

const ALL: [Scenario; 6] = [
    Scenario::Drain,
    Scenario::Churn,
    Scenario::Mixed,
    Scenario::Partition,
    Scenario::Liars,
    Scenario::ColdStart,
];

fn run(options: &Options) -> Outcome {
    World::run(options, None)
}

/// Runs seeds on both processors; says which failed.
fn sweep(scenario: Scenario, first: u64, seeds: u64) {
    let half = |odd: u64| {
        let seeds = (first..first + seeds).filter(move |seed| seed % 2 == odd);
        let runs = seeds.map(|seed| Options::new(seed, scenario));
        runs.filter_map(|options| Some((run(&options).violation?, options))).collect::<Vec<_>>()
    };
    let failed = std::thread::scope(|scope| {
        let other = scope.spawn(|| half(1));
        let mut failed = half(0);
        failed.extend(other.join().unwrap());
        failed
    });
    for (violation, options) in &failed {
        println!("{violation}\n  {}", options.command());
    }
    assert!(failed.is_empty(), "{} of {seeds} seeds broke a rule", failed.len());
}

#[test]
fn a_hundred_swarms_in_which_everything_goes_wrong_keep_every_rule() {
    sweep(Scenario::Mixed, 1, 100);
}

#[test]
fn each_scenario_alone_keeps_every_rule() {
    for scenario in ALL {
        sweep(scenario, 1000, 4);
    }
}

/// Nodes that had banned a peer doubted it again and again, it did not answer two doubts within a second, and
/// so another node did not count on it for a moment every fifteen seconds: it never saw for a minute that its
/// copy is one too many.
#[test]
fn who_answers_a_doubt_is_counted_on_without_a_break() {
    let faults =
        [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 20, 21, 22, 23, 27, 28, 31, 32, 33, 34, 36, 37];
    let options = Options { faults: Some(faults.into()), ..Options::new(237, Scenario::Mixed) };
    assert_eq!(run(&options).violation, None, "{}", options.command());
}

#[test]
#[ignore = "the long sweep"]
fn a_thousand_mixed_swarms_and_as_many_of_the_others_keep_every_rule() {
    sweep(Scenario::Mixed, 10_000, 1000);
    for scenario in ALL {
        sweep(scenario, 20_000, 200);
    }
}

#[test]
fn the_same_seed_gives_the_same_schedule_and_another_seed_another() {
    for scenario in ALL {
        let options = Options { seconds: 300, ..Options::new(7, scenario) };
        let (one, same) = (run(&options), run(&options));
        assert_eq!((one.schedule, one.stats), (same.schedule, same.stats));
        let other = run(&Options { seed: 8, ..options });
        assert_ne!(one.schedule, other.schedule);
        assert!(one.stats.reads > 50 && one.stats.messages > 500, "{:?}", one.stats);
    }
}

/// Schedules of seed 42, 260 virtual seconds. They change whenever a decision of the core or something in the
/// simulator does. If that was meant, copy what the test prints; if not, something is decided otherwise
/// than before, or differs from machine to machine.
const PINNED: [(Scenario, u64); 4] = [
    (Scenario::Mixed, 0xa286_7f50_bfef_4974),
    (Scenario::Drain, 0x7843_f595_95f9_fa58),
    (Scenario::Partition, 0xe748_fc0e_c686_ba48),
    (Scenario::Kill, 0xe68b_05bc_aff8_ea39),
];

#[test]
fn schedules_are_the_same_on_every_machine() {
    let found = PINNED.map(|(scenario, _)| {
        (scenario, run(&Options { seconds: 260, ..Options::new(42, scenario) }).schedule)
    });
    let lines =
        found.map(|(scenario, hash)| format!("    (Scenario::{scenario:?}, {hash:#018x}),\n"));
    assert!(found == PINNED, "other schedules. If they were meant to change:\n{}", lines.concat());
}

/// Each planted bug breaks a rule within a few seeds.
#[cfg(feature = "planted")]
#[test]
fn planted_bugs_are_caught() {
    use crate::Plant;
    for plant in Plant::ALL {
        let (scenario, seconds) = match plant {
            Plant::HealerChoice => (Scenario::Kill, 260),
            Plant::Drain => (Scenario::Drain, 600),
            Plant::ModelTopics => (Scenario::Models, MODELS_SECONDS),
            _ => (Scenario::Mixed, 600),
        };
        let caught = (1..=60).find_map(|seed| {
            let nodes = if plant == Plant::ModelTopics { 1000 } else { 10 };
            let options = Options { nodes, seconds, ..Options::new(seed, scenario) };
            World::run(&options, Some(plant)).violation.map(|violation| (seed, violation))
        });
        let (seed, violation) = caught.unwrap_or_else(|| panic!("{plant:?} was not noticed"));
        println!("{plant:?}: seed {seed}: {violation}");
    }
}

/// A failing run is made small, and the small one breaks the same rule.
#[cfg(feature = "planted")]
#[test]
fn planted_bugs_are_shrunk() {
    use crate::{Plant, plan, shrink};
    let plant = Some(Plant::HashCheck);
    let fails = |seed| {
        let options = Options::new(seed, Scenario::Liars);
        World::run(&options, plant).violation.map(|violation| (options, violation.rule))
    };
    let (options, rule) = (1..=20).find_map(fails).expect("liars are believed");
    let small = shrink(&options, plant, rule);
    assert_eq!(World::run(&small, plant).violation.map(|violation| violation.rule), Some(rule));
    let (before, after) = (plan(&options).len(), plan(&small).len());
    assert!(after <= 2 && before > 10, "{before} faults became {after}: {}", small.command());
}

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

/// Mixtral at 1 Gbit/s, four copies of each of its 394 shards on ten nodes, three nodes killed.
#[test]
fn what_three_dead_nodes_held_is_copied_at_nearly_the_survivors_joint_bandwidth() {
    let options = Options { seconds: 260, ..Options::new(1, Scenario::Kill) };
    let Outcome { violation, healed, .. } = run(&options);
    assert_eq!(violation, None);
    let noticed = seconds(healed.noticed - healed.died);
    let took = seconds(healed.healed - healed.died);
    let least = healed.least as f64 / healed.joint as f64;
    println!("{healed}");
    assert!(noticed <= 10.0, "{noticed}");
    assert!(took <= 1.25 * least + noticed + 5.0, "{took} s");
    assert!(healed.moved as f64 <= 1.1 * healed.least as f64, "{healed:?}");
}

/// The model that comes with the program, on ten nodes, three nodes killed: whenever pings show it.
#[test]
fn a_small_model_is_whole_again_within_half_a_minute() {
    for seed in 1..=40 {
        let options = Options { seconds: 260, ..Options::new(seed, Scenario::KillSmall) };
        let Outcome { violation, healed, .. } = run(&options);
        assert_eq!(violation, None, "{}", options.command());
        let noticed = seconds(healed.noticed - healed.died);
        let took = seconds(healed.healed.saturating_sub(healed.died));
        assert!(noticed <= 10.0, "seed {seed}: noticed after {noticed} s");
        assert!(took <= 30.0, "seed {seed}: healed after {took} s");
        assert!(healed.least > 0 && healed.moved as f64 <= 1.1 * healed.least as f64);
    }
}

/// A swarm of so many nodes, in which a newly published model is announced to everybody in time.
fn crowd(nodes: usize, limit: f64) -> News {
    let options = Options { nodes, seconds: 250, ..Options::new(1, Scenario::Crowd) };
    let Outcome { violation, news, .. } = run(&options);
    println!("{news}");
    assert_eq!(violation, None);
    let most = news.within(990).expect("it reached everybody");
    assert!(most <= limit, "{nodes} nodes: {most} s");
    assert!(news.within(1000).is_some(), "{nodes} nodes: somebody was not reached");
    news
}

#[test]
fn news_are_fast() {
    crowd(10, 1.0);
    crowd(100, 1.0);
}

/// Nodes die 70 s after the first has started, and have two minutes to be made up for.
const MODELS_SECONDS: u64 = 340;

/// A thousand nodes and a hundred models, each node interested in three: those interested know who holds a model,
/// though nobody knows most nodes, and copies that die with a tenth of the nodes are made up for.
#[test]
#[ignore = "takes a minute or two"]
fn in_a_crowd_holders_are_known_to_those_interested_and_copies_are_healed() {
    let options =
        Options { nodes: 1000, seconds: MODELS_SECONDS, ..Options::new(1, Scenario::Models) };
    let Outcome { violation, news, healed, .. } = World::run_with(&options, 2);
    println!("{news}; {} bytes copied", healed.moved);
    assert_eq!(violation, None, "{}", options.command());
    assert!(healed.moved > 0 && news.members <= 256, "{news}");
}

/// Threads only share the work: batches and helpers change nothing of what happens.
#[test]
fn any_number_of_threads_gives_the_same_schedule() {
    for scenario in [Scenario::Crowd, Scenario::Models, Scenario::Quiet, Scenario::Mixed] {
        let options = Options { nodes: 40, seconds: 300, ..Options::new(3, scenario) };
        let alone = run(&options);
        assert!(alone.stats.messages > 1000, "{:?}", alone.stats);
        for threads in [2, 3] {
            let shared = World::run_with(&options, threads);
            assert_eq!(shared.violation, None);
            assert_eq!((shared.schedule, shared.stats), (alone.schedule, alone.stats));
            assert_eq!(shared.news, alone.news);
        }
    }
}

/// What a node hears, says and remembers does not grow with the swarm.
#[test]
#[ignore = "takes a minute or two"]
fn a_node_of_a_thousand_hears_no_more_than_one_of_a_few() {
    let (few, many) = (crowd(100, 1.0), crowd(1000, 3.0));
    assert!(many.heard <= 1.3 * few.heard, "{} messages a second, {}", few.heard, many.heard);
    assert!(many.sent_bytes <= 1.3 * few.sent_bytes, "{} B/s, {}", few.sent_bytes, many.sent_bytes);
    assert!(many.members <= 256 && many.known <= 600, "{many}");
}
