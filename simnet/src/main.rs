//! `simnet`: runs seeds of a scenario and says whether every rule held.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::{Parser, Subcommand};
use simnet::report::{PAGE, ReportOptions};
use simnet::{Options, Outcome, Scenario, Stats, World, plan, shrink};

/// A run of so many nodes takes long enough to say how far it is.
const LARGE: usize = 1000;

/// Runs swarms in virtual time and checks what must always hold.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// How many seeds to run
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 1)]
    first_seed: u64,
    #[arg(long, value_enum, default_value_t = Scenario::Mixed)]
    scenario: Scenario,
    #[arg(long, default_value_t = 10)]
    nodes: usize,
    /// Virtual seconds of a run; its last 200 are without faults
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Only these faults of the plan, by number, or `none`
    #[arg(long)]
    faults: Option<String>,
    /// Threads; as many as there are processors if absent. The schedules do not depend on it
    #[arg(long)]
    jobs: Option<usize>,
    /// Prints each seed's schedule hash and faults
    #[arg(long)]
    verbose: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Measures healing and gossip, and writes a page with plots and the figures as JSON
    Report(ReportOptions),
}

impl Args {
    fn options(&self, seed: u64) -> Result<Options, String> {
        let numbers = |list: &String| -> Result<Vec<usize>, String> {
            let list = list.split(',').filter(|number| *number != "none");
            list.map(|number| number.parse().map_err(|_| format!("--faults: {number:?}"))).collect()
        };
        let faults = self.faults.as_ref().map(numbers).transpose()?;
        let Self { scenario, nodes, seconds, .. } = *self;
        Ok(Options { seed, scenario, nodes: nodes.max(3), seconds, faults })
    }
}

/// Runs all seeds; outcomes in their order.
fn run_all(args: &Args) -> Result<Vec<(Options, Outcome)>, String> {
    let options: Vec<Options> = (0..args.seeds)
        .map(|index| args.options(args.first_seed.wrapping_add(index)))
        .collect::<Result<_, _>>()?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = args.jobs.unwrap_or(processors).clamp(1, 64);
    // What is left of the processors helps those few that run.
    let threads = (jobs / options.len().max(1)).max(1);
    let (next, done) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(options) = options.get(next.fetch_add(1, Ordering::Relaxed) as usize)
                {
                    let told = |minute| {
                        if options.nodes >= LARGE {
                            let took = started.elapsed().as_secs_f64();
                            eprintln!("seed {}: minute {minute}, {took:.1} s", options.seed);
                        }
                    };
                    let outcome = World::run_telling(options, threads, told);
                    let mut done = done.lock().unwrap_or_else(|e| e.into_inner());
                    done.push((options.clone(), outcome));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(|e| e.into_inner());
    done.sort_by_key(|(options, _)| options.seed.wrapping_sub(args.first_seed));
    Ok(done)
}

/// Writes a report; the exit code is 1 if a rule was broken.
fn report(options: &ReportOptions) -> ExitCode {
    println!("{}", options.headline());
    let report = options.collect(|done| println!("{done}"));
    if let Err(error) = report.write(options) {
        eprintln!("error: cannot write {}: {error}", options.out.display());
        return ExitCode::from(2);
    }
    let violations = report.violations();
    for violation in &violations {
        println!("{violation}");
    }
    println!("{} violations, {}", violations.len(), options.out.join(PAGE).display());
    if violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(Command::Report(options)) = &args.command {
        return report(options);
    }
    let (first, last) = (args.first_seed, args.first_seed.wrapping_add(args.seeds.max(1) - 1));
    let scenario = args.scenario;
    println!(
        "simnet: seeds {first} to {last}, {scenario:?}, {} nodes, {} virtual seconds, faults {}",
        args.nodes,
        args.seconds,
        args.faults.as_deref().unwrap_or("all")
    );
    let started = Instant::now();
    let done = match run_all(&args) {
        Ok(done) => done,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let (mut total, mut failed) = (Stats::default(), 0);
    for (options, outcome) in &done {
        total.add(&outcome.stats);
        if args.verbose {
            println!(
                "seed {}: schedule {:016x}, {:?}",
                options.seed, outcome.schedule, outcome.stats
            );
            for fault in plan(options) {
                println!("  {fault:?}");
            }
        }
        if scenario.kills() {
            println!("seed {}: {}", options.seed, outcome.healed);
        }
        if matches!(scenario, Scenario::Crowd | Scenario::Models) {
            println!("seed {}: {}", options.seed, outcome.news);
        }
        let Some(violation) = &outcome.violation else { continue };
        failed += 1;
        println!("seed {}: {violation}", options.seed);
        // The first few are shrunk: each may take as long as a hundred runs.
        if failed <= 3 {
            let small = shrink(options, None, violation.rule);
            if let Some(violation) = World::run(&small, None).violation {
                println!("  shrunk: {violation}");
            }
            for fault in plan(&small) {
                println!("  {fault:?}");
            }
            println!("  {}", small.command());
        }
    }
    let hash = done.iter().fold(0_u64, |hash, (_, o)| hash.rotate_left(7) ^ o.schedule);
    println!(
        "{} seeds, {failed} violations: {} events, {} messages, {} reads ({} failed under faults), {} MB, \
         {} bans, {} faults, {} probes, schedule {hash:016x}, {:.1} s",
        done.len(),
        total.events,
        total.messages,
        total.reads,
        total.failed_reads,
        total.bytes / 1_000_000,
        total.bans,
        total.faults,
        total.probes,
        started.elapsed().as_secs_f64(),
    );
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
