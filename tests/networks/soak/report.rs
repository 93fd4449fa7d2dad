//! What the soak measured, and whether it is flat: the median of the second sixth of the time
//! against the median of the last. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How much more may be used at the end.
const GROWTH_MAX: f64 = 0.05;
/// What an idle node may take of one core.
pub const IDLE_MAX: f64 = 0.01;

/// What is measured of each node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    Memory,
    Descriptors,
    Threads,
    Disk,
    Catalogue,
}

impl Measure {
    const ALL: [Self; 5] =
        [Self::Memory, Self::Descriptors, Self::Threads, Self::Disk, Self::Catalogue];

    const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Descriptors => "descriptors",
            Self::Threads => "threads",
            Self::Disk => "disk",
            Self::Catalogue => "catalogue",
        }
    }
}

/// How a command has fared.
#[derive(Default)]
struct Asked {
    times: usize,
    longest: Duration,
    limit: Duration,
}

pub struct Report {
    began: Instant,
    length: Duration,
    series: BTreeMap<(Measure, usize), Vec<(Duration, f64)>>,
    asked: BTreeMap<&'static str, Asked>,
    /// Share of a core that each node took when nobody asked it anything.
    pub idle: Vec<f64>,
    pub rounds: usize,
    pub failures: Vec<String>,
}

/// The medians of the second and of the last sixth.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Change {
    early: f64,
    late: f64,
}

impl Change {
    fn of(series: &[(Duration, f64)], length: Duration) -> Option<Self> {
        let sixth = length / 6;
        let between = |from: Duration, to: Duration| {
            let within = series.iter().filter(|(at, _)| *at >= from && *at < to);
            median(within.map(|(_, value)| *value).collect())
        };
        // The last round may end after the time is over.
        Some(Self { early: between(sixth, 2 * sixth)?, late: between(5 * sixth, Duration::MAX)? })
    }

    fn growth(self) -> f64 {
        if self.late <= self.early { 0.0 } else { self.late / self.early - 1.0 }
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

impl Report {
    pub fn new(length: Duration) -> Self {
        Self {
            began: Instant::now(),
            length,
            series: BTreeMap::new(),
            asked: BTreeMap::new(),
            idle: Vec::new(),
            rounds: 0,
            failures: Vec::new(),
        }
    }

    /// The time that is measured begins now.
    pub fn begin(&mut self) {
        self.began = Instant::now();
        self.series.clear();
    }

    pub fn add(&mut self, node: usize, measure: Measure, value: f64) {
        let at = self.began.elapsed();
        self.series.entry((measure, node)).or_default().push((at, value));
    }

    pub fn answered(&mut self, command: &'static str, took: Duration, limit: Duration) {
        let asked = self.asked.entry(command).or_default();
        asked.times += 1;
        asked.longest = asked.longest.max(took);
        asked.limit = limit;
    }

    fn changes(&self, measure: Measure) -> Vec<(usize, Change)> {
        let of = self.series.iter().filter(|((have, _), _)| *have == measure);
        of.filter_map(|((_, node), series)| Some((*node, Change::of(series, self.length)?)))
            .collect()
    }

    /// All nodes together.
    fn change(&self, measure: Measure) -> Option<Change> {
        let add = |a: Change, b: Change| Change { early: a.early + b.early, late: a.late + b.late };
        self.changes(measure).into_iter().map(|(_, change)| change).reduce(add)
    }

    /// What is not as it should be.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = self.failures.clone();
        for measure in Measure::ALL {
            match self.change(measure) {
                None => faults.push(format!("{}: too few readings", measure.name())),
                Some(change) if change.growth() > GROWTH_MAX => faults.push(format!(
                    "{} grew from {:.0} to {:.0}",
                    measure.name(),
                    change.early,
                    change.late
                )),
                Some(_) => {}
            }
        }
        for (command, Asked { longest, limit, .. }) in &self.asked {
            if longest > limit {
                faults.push(format!("{command} took {longest:?}, more than {limit:?}"));
            }
        }
        for (node, share) in self.idle.iter().enumerate().filter(|(_, share)| **share >= IDLE_MAX) {
            faults.push(format!("node {node} takes {:.2} % of a core when idle", 100.0 * share));
        }
        faults
    }

    pub fn json(&self) -> Value {
        let measures = Measure::ALL.into_iter().map(|measure| {
            let row = |(node, change): (usize, Change)| {
                json!({ "node": node, "early": change.early, "late": change.late })
            };
            let nodes: Vec<Value> = self.changes(measure).into_iter().map(row).collect();
            let all = self.change(measure);
            let all = all.map(|all| json!({ "early": all.early, "late": all.late }));
            (measure.name().to_owned(), json!({ "all": all, "nodes": nodes }))
        });
        let commands = self.asked.iter().map(|(command, asked)| {
            let longest = asked.longest.as_secs_f64();
            let row = json!({ "times": asked.times, "longest_s": longest, "limit_s": asked.limit.as_secs() });
            ((*command).to_owned(), row)
        });
        json!({
            "minutes": self.length.as_secs_f64() / 60.0,
            "rounds": self.rounds,
            "measures": measures.collect::<serde_json::Map<_, _>>(),
            "commands": commands.collect::<serde_json::Map<_, _>>(),
            "idle": self.idle,
            "faults": self.faults(),
        })
    }

    pub fn assert_flat(&self) {
        let faults = self.faults();
        assert!(faults.is_empty(), "{}", faults.join("\n"));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} rounds in {:.0} minutes", self.rounds, self.length.as_secs_f64() / 60.0)?;
        writeln!(f, "{:<12} {:>5} {:>14} {:>14} {:>9}", "", "node", "early", "late", "change")?;
        for measure in Measure::ALL {
            let rows = self.changes(measure).into_iter().map(|(node, row)| (node.to_string(), row));
            let all = self.change(measure).map(|all| ("all".to_owned(), all));
            for (node, Change { early, late }) in rows.chain(all) {
                let change = 100.0 * (late / early - 1.0);
                let name = measure.name();
                writeln!(f, "{name:<12} {node:>5} {early:>14.0} {late:>14.0} {change:>+8.1}%")?;
            }
        }
        writeln!(f, "{:<12} {:>5} {:>14} {:>14}", "command", "times", "longest", "limit")?;
        for (command, Asked { times, longest, limit }) in &self.asked {
            let (longest, limit) = (longest.as_secs_f64(), limit.as_secs());
            writeln!(f, "{command:<12} {times:>5} {longest:>12.2} s {limit:>12} s")?;
        }
        for (node, share) in self.idle.iter().enumerate() {
            writeln!(f, "idle         {node:>5} {:>12.2} %", 100.0 * share)?;
        }
        write!(f, "{}", self.faults().join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A report of one hour with one reading a minute.
    fn report(value: impl Fn(u64) -> f64) -> Report {
        let mut report = Report::new(Duration::from_secs(3600));
        for measure in Measure::ALL {
            let series = (0..60).map(|minute| (Duration::from_secs(60 * minute), value(minute)));
            report.series.insert((measure, 0), series.collect());
        }
        report
    }

    #[test]
    fn growth_is_seen_and_noise_is_not() {
        // The first ten minutes do not count, nor does a reading now and then.
        let warm = |minute: u64| if minute < 10 { 10.0 * minute as f64 } else { 100.0 };
        assert_eq!(report(warm).faults(), [""; 0]);
        let spiky = |minute: u64| if minute.is_multiple_of(3) { 500.0 } else { 100.0 };
        assert_eq!(report(spiky).faults(), [""; 0]);
        let shrinking = |minute: u64| 200.0 - minute as f64;
        assert_eq!(report(shrinking).faults(), [""; 0]);
        let leaking = |minute: u64| 100.0 + 0.2 * minute as f64;
        let faults = report(leaking).faults();
        assert_eq!(faults.len(), Measure::ALL.len());
        assert_eq!(faults[0], "memory grew from 103 to 111");
    }

    #[test]
    fn lateness_and_idle_cost_are_seen() {
        let mut report = report(|_| 1.0);
        let limit = Duration::from_secs(5);
        report.answered("ls", Duration::from_secs(6), limit);
        report.answered("ls", Duration::from_secs(1), limit);
        report.answered("run", limit, limit);
        report.idle = vec![0.002, 0.02];
        let faults = report.faults();
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(
            faults[0].starts_with("ls took 6s") && faults[1].starts_with("node 1 takes 2.00 %")
        );
        assert_eq!(Report::new(limit).faults().len(), Measure::ALL.len(), "nothing was read");
    }
}
