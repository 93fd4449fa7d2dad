//! Runs of each scenario, that they repeat, and that a broken rule is seen and made small.

use crate::{Options, Outcome, Plant, Scenario, World};

const ALL: [Scenario; 5] =
    [Scenario::Churn, Scenario::Mixed, Scenario::Partition, Scenario::Liars, Scenario::ColdStart];

fn run(options: &Options) -> Outcome {
    World::run(options, Plant::Nothing)
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
        sweep(scenario, 1000, 10);
    }
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
