//! `simnet report`: one page with plots that needs no network, and the same figures as JSON.
//!
//! Owns which runs are made and what is written where. The same options and sources give the same
//! figures on any machine.

mod chart;
mod page;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use crate::measure::{Killing, Quiet, killing, quiet};

/// Files that a report consists of.
pub const PAGE: &str = "report.html";
pub const FIGURES: &str = "report.json";

/// What a report covers.
#[derive(Debug, Clone, Args)]
pub struct ReportOptions {
    /// Where to write report.html and report.json
    #[arg(long, value_name = "DIR", default_value = "simnet-report")]
    pub out: PathBuf,
    /// Runs of each kind, with one seed after the other
    #[arg(long, default_value_t = 3)]
    pub seeds: u64,
    /// The first of the seeds
    #[arg(long, default_value_t = 1)]
    pub first_seed: u64,
    /// Kill so many of ten nodes at once
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 3, 4, 5])]
    pub killed: Vec<usize>,
    /// Quiet swarms of so many nodes; the largest take minutes
    #[arg(long, value_delimiter = ',', default_values_t = [10, 30, 100, 300, 1000])]
    pub sizes: Vec<usize>,
    /// A quiet swarm of 10,000 nodes, too
    #[arg(long)]
    pub large: bool,
    /// Threads; as many as there are processors if absent. The figures do not depend on it
    #[arg(long)]
    pub jobs: Option<usize>,
}

/// A swarm of this many nodes is run with `--large`, with one seed.
const LARGE: usize = 10_000;
/// From this many nodes on, one seed is enough: every node is a sample.
const ONE_SEED: usize = 1000;

/// The figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Of the sources, with `-dirty` if they were changed since; empty outside a repository.
    pub commit: String,
    pub command: String,
    pub seeds: Vec<u64>,
    /// Ten nodes with Mixtral at 1 Gbit/s, some killed at once.
    pub killed: Vec<Killing>,
    /// The same while every node reads for tokens, three killed.
    pub busy: Vec<Killing>,
    /// Swarms to which nothing happens, by size.
    pub quiet: Vec<Quiet>,
}

/// Nodes that are killed under load.
const BUSY_KILLED: usize = 3;

/// One run of a report.
#[derive(Debug, Clone, Copy)]
enum Job {
    Kill { seed: u64, killed: usize, is_busy: bool },
    Quiet { seed: u64, nodes: usize },
}

/// What a run gave.
enum Done {
    Killed(Killing),
    Busy(Killing),
    Quiet(Quiet),
}

impl Job {
    /// Whether it is made alone, on all threads.
    const fn is_large(self) -> bool {
        matches!(self, Self::Quiet { nodes, .. } if nodes >= ONE_SEED)
    }

    fn run(self, threads: usize) -> Done {
        match self {
            Self::Kill { seed, killed, is_busy: true } => Done::Busy(killing(seed, killed, true)),
            Self::Kill { seed, killed, .. } => Done::Killed(killing(seed, killed, false)),
            Self::Quiet { seed, nodes } => Done::Quiet(quiet(seed, nodes, threads)),
        }
    }
}

impl ReportOptions {
    fn seeds(&self) -> Vec<u64> {
        (0..self.seeds.max(1)).map(|index| self.first_seed.wrapping_add(index)).collect()
    }

    /// The runs, those that take longest first.
    fn jobs(&self) -> Vec<Job> {
        let seeds = self.seeds();
        let mut sizes = self.sizes.clone();
        sizes.extend(self.large.then_some(LARGE));
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        sizes.dedup();
        let mut jobs = Vec::new();
        for nodes in sizes {
            let count = if nodes >= ONE_SEED { 1 } else { seeds.len() };
            jobs.extend(seeds.iter().take(count).map(|seed| Job::Quiet { seed: *seed, nodes }));
        }
        for seed in &seeds {
            let kill = |killed: usize, is_busy| Job::Kill { seed: *seed, killed, is_busy };
            jobs.extend(self.killed.iter().map(|killed| kill(*killed, false)));
            jobs.extend(self.killed.contains(&BUSY_KILLED).then(|| kill(BUSY_KILLED, true)));
        }
        jobs
    }

    /// What will be run, from which sources.
    pub fn headline(&self) -> String {
        let (commit, command) = (commit(), self.command());
        format!("simnet report: commit {commit}, seeds {:?}, {command}", self.seeds())
    }

    /// Makes the runs; `told` hears of each that has ended.
    pub fn collect(&self, told: impl Fn(&str) + Sync) -> Report {
        let jobs = self.jobs();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.jobs.unwrap_or(processors).clamp(1, 64);
        let done = Mutex::new(Vec::new());
        let make = |job: Job, threads: usize| {
            let started = Instant::now();
            let result = job.run(threads);
            let mut done = done.lock().unwrap_or_else(|e| e.into_inner());
            done.push(result);
            let took = started.elapsed().as_secs_f64();
            told(&format!("{}/{}: {job:?}, {took:.1} s", done.len(), jobs.len()));
        };
        let (large, small): (Vec<Job>, Vec<Job>) = jobs.iter().partition(|job| job.is_large());
        large.into_iter().for_each(|job| make(job, threads));
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(job) = small.get(next.fetch_add(1, Ordering::Relaxed)) {
                        make(*job, 1);
                    }
                });
            }
        });
        let mut report = Report {
            commit: commit(),
            command: self.command(),
            seeds: self.seeds(),
            killed: Vec::new(),
            busy: Vec::new(),
            quiet: Vec::new(),
        };
        for done in done.into_inner().unwrap_or_else(|e| e.into_inner()) {
            match done {
                Done::Killed(killing) => report.killed.push(killing),
                Done::Busy(killing) => report.busy.push(killing),
                Done::Quiet(quiet) => report.quiet.push(quiet),
            }
        }
        report.killed.sort_by_key(|killing| (killing.killed, killing.seed));
        report.busy.sort_by_key(|killing| killing.seed);
        report.quiet.sort_by_key(|quiet| (quiet.nodes, quiet.seed));
        report
    }

    /// The command that makes the same figures again.
    fn command(&self) -> String {
        let list = |numbers: &[usize]| {
            numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
        };
        let large = if self.large { " --large" } else { "" };
        format!(
            "cargo run --release -p simnet -- report --first-seed {} --seeds {} --killed {} --sizes {}{large}",
            self.first_seed,
            self.seeds,
            list(&self.killed),
            list(&self.sizes),
        )
    }
}

impl Report {
    /// Broken rules, each with the run in which it was.
    pub fn violations(&self) -> Vec<String> {
        let killed = self.killed.iter().chain(&self.busy).filter_map(|run| {
            let what = run.violation.as_ref()?;
            Some(format!("seed {}, {} killed: {what}", run.seed, run.killed))
        });
        let quiet = self.quiet.iter().filter_map(|run| {
            let what = run.violation.as_ref()?;
            Some(format!("seed {}, {} quiet nodes: {what}", run.seed, run.nodes))
        });
        killed.chain(quiet).collect()
    }

    /// Writes the page and the figures into a directory, which is made.
    ///
    /// # Errors
    /// If that is not possible.
    pub fn write(&self, options: &ReportOptions) -> io::Result<()> {
        std::fs::create_dir_all(&options.out)?;
        let figures = serde_json::to_string_pretty(self).map_err(io::Error::other)?;
        std::fs::write(options.out.join(FIGURES), figures + "\n")?;
        std::fs::write(options.out.join(PAGE), page::page(self))
    }
}

/// The commit of the sources in the working directory.
fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let Some(head) = git(&["rev-parse", "--short=12", "HEAD"]) else { return String::new() };
    let is_clean =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| s.is_empty());
    if is_clean { head } else { head + "-dirty" }
}
