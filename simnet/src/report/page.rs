//! The page: headings, plots, tables and how each figure comes about. Self-contained: no script, no
//! font and no picture from elsewhere.

use std::fmt::Write;

use super::chart::{Chart, Form, Series, Value, escaped, number};
use super::{FIGURES, Report};
use crate::measure::{Killing, Quiet, Reads};

const STYLE: &str = include_str!("page.css");

/// A part of the page.
struct Section {
    id: &'static str,
    title: &'static str,
    /// What is measured and how, in a sentence or two.
    text: String,
    charts: Vec<Chart>,
}

pub fn page(report: &Report) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>A simulated swarm</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
    );
    head(&mut out, report);
    for section in [heal(report), bytes(report), load(report), gossip(report), traffic(report)] {
        if section.charts.iter().any(|chart| !chart.places.is_empty()) {
            write_section(&mut out, &section);
        }
    }
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

fn head(out: &mut String, report: &Report) {
    let seeds: Vec<String> = report.seeds.iter().map(ToString::to_string).collect();
    let commit = if report.commit.is_empty() { "unknown" } else { &report.commit };
    let _ = write!(
        out,
        "<header>\n<h1>A simulated swarm</h1>\n<p>The decisions are those of real nodes; network, disks and \
         clocks are simulated, so all times are virtual. The figures are in <code>{FIGURES}</code>, too.</p>\n\
         <dl><dt>Commit</dt><dd><code>{}</code></dd><dt>Seeds</dt><dd>{}</dd>\
         <dt>Made by</dt><dd><code>{}</code></dd></dl>\n",
        escaped(commit),
        seeds.join(", "),
        escaped(&report.command)
    );
    let violations = report.violations();
    if !violations.is_empty() {
        out.push_str("<div class=\"broken\" id=\"violations\"><h2>Broken rules</h2><ul>");
        for violation in violations {
            let _ = write!(out, "<li>{}</li>", escaped(&violation));
        }
        out.push_str("</ul></div>\n");
    }
    tiles(out, report);
    out.push_str("</header>\n");
}

/// The figures that one looks for first.
fn tiles(out: &mut String, report: &Report) {
    let mut tiles: Vec<(String, String)> = Vec::new();
    if let Some(worst) = report
        .killed
        .iter()
        .filter(|run| run.killed == 3)
        .max_by(|a, b| a.heal_s.total_cmp(&b.heal_s))
    {
        tiles.push((
            format!("{} s", number(worst.heal_s)),
            format!(
                "to heal after 3 of 10 nodes died, of {} s allowed; the lines alone take {} s",
                number(worst.allowed_s()),
                number(worst.least_s)
            ),
        ));
        let more = |run: &Killing| run.moved_bytes as f64 / run.least_bytes.max(1) as f64;
        let more = report.killed.iter().filter(|run| run.killed == 3).map(more).fold(0.0, f64::max);
        tiles.push((format!("{more:.2} ×"), "the least possible bytes are moved at most".into()));
    }
    if let Some(largest) = report.quiet.last() {
        let nodes = number(largest.nodes as f64);
        tiles.push((
            format!("{} s", number(largest.p99_s)),
            format!("until 99 % of {nodes} nodes know a new model"),
        ));
        tiles.push((
            format!("{} kB/s", number(largest.bytes_per_s / 1e3)),
            format!("is what a node says in a quiet swarm of {nodes}"),
        ));
    }
    out.push_str("<div class=\"tiles\">");
    for (figure, text) in tiles {
        let _ =
            write!(out, "<div><b>{}</b><span>{}</span></div>", escaped(&figure), escaped(&text));
    }
    out.push_str("</div>\n");
}

fn write_section(out: &mut String, section: &Section) {
    let Section { id, title, text, charts } = section;
    let _ = write!(
        out,
        "<section id=\"{id}\">\n<h2>{title}</h2>\n<p>{text}</p>\n<div class=\"charts\">\n"
    );
    for chart in charts {
        let _ = write!(
            out,
            "<figure>\n{}{}<details><summary>Figures</summary>{}</details>\n</figure>\n",
            chart.legend(),
            chart.svg(),
            chart.table()
        );
    }
    out.push_str("</div>\n</section>\n");
}

/// The different values of `key`, in order.
fn places<T>(runs: &[T], key: impl Fn(&T) -> usize) -> Vec<usize> {
    let mut places: Vec<usize> = runs.iter().map(key).collect();
    places.sort_unstable();
    places.dedup();
    places
}

/// For each place the mean over its runs.
fn series<T>(
    name: &str,
    runs: &[T],
    key: impl Fn(&T) -> usize,
    value: impl Fn(&T) -> Option<f64>,
) -> Series {
    let values = places(runs, &key)
        .into_iter()
        .map(|place| {
            let of: Vec<f64> =
                runs.iter().filter(|run| key(run) == place).filter_map(&value).collect();
            Value::of(of.into_iter())
        })
        .collect();
    Series { name: name.to_owned(), values }
}

fn of_killed(name: &str, runs: &[Killing], value: impl Fn(&Killing) -> f64) -> Series {
    series(name, runs, |run| run.killed, |run| Some(value(run)))
}

fn of_size(name: &str, runs: &[Quiet], value: impl Fn(&Quiet) -> f64) -> Series {
    series(name, runs, |run| run.nodes, |run| Some(value(run)))
}

fn texts(places: &[usize]) -> Vec<String> {
    places.iter().map(|place| number(*place as f64)).collect()
}

fn heal(report: &Report) -> Section {
    let runs = &report.killed;
    let places = texts(&places(runs, |run| run.killed));
    let x = "nodes killed at once, of ten";
    let times = Chart {
        form: Form::Bars,
        y: "seconds after the killing".into(),
        x: x.into(),
        places: places.clone(),
        series: vec![
            of_killed("noticed by all", runs, |run| run.detect_s),
            of_killed("the lines alone", runs, |run| run.least_s),
            of_killed("every copy back", runs, |run| run.heal_s),
        ],
        limit: None,
    };
    let lost = Chart {
        form: Form::Bars,
        y: "objects without a copy left, of 395".into(),
        x: x.into(),
        places,
        series: vec![of_killed("lost", runs, |run| run.lost as f64)],
        limit: None,
    };
    Section {
        id: "heal",
        title: "Detecting and healing",
        text: "Ten nodes at 1 Gbit/s hold Mixtral: 26.4 GB in 394 objects, four copies of each. Some nodes die in \
               the same moment and never come back. <em>The lines alone</em> is what the missing bytes take at the \
               survivors’ joint bandwidth; allowed are a quarter more, what noticing took, and 5 s. With four or more dead, some objects had all their copies on the dead."
            .into(),
        charts: vec![times, lost],
    }
}

fn bytes(report: &Report) -> Section {
    let runs = &report.killed;
    let places = texts(&places(runs, |run| run.killed));
    let x = "nodes killed at once, of ten";
    let moved = Chart {
        form: Form::Bars,
        y: "gigabytes".into(),
        x: x.into(),
        places: places.clone(),
        series: vec![
            of_killed("least possible", runs, |run| run.least_bytes as f64 / 1e9),
            of_killed("moved", runs, |run| run.moved_bytes as f64 / 1e9),
        ],
        limit: None,
    };
    let share = Chart {
        form: Form::Lines,
        y: "moved / least possible".into(),
        x: x.into(),
        places,
        series: vec![of_killed("moved / least", runs, |run| {
            run.moved_bytes as f64 / run.least_bytes.max(1) as f64
        })],
        limit: Some((1.1, "bound: 1.1".into())),
    };
    Section {
        id: "bytes",
        title: "Bytes moved",
        text: "Copies made by all survivors together, beside the copies that were missing when the last node had \
               died."
            .into(),
        charts: vec![moved, share],
    }
}

fn load(report: &Report) -> Section {
    // The same three killed, with and without reads.
    let idle = report.killed.iter().filter(|run| run.killed == 3).cloned();
    let runs: Vec<(usize, Killing)> =
        idle.map(|run| (0, run)).chain(report.busy.iter().cloned().map(|run| (1, run))).collect();
    let names = ["idle", "busy"];
    let x = "reads for tokens";
    let kinds: Vec<usize> = places(&runs, |(kind, _)| *kind);
    let heal = Chart {
        form: Form::Bars,
        y: "seconds until every copy is back".into(),
        x: x.into(),
        places: kinds.iter().map(|kind| names[*kind].to_owned()).collect(),
        series: vec![series("healed", &runs, |(kind, _)| *kind, |(_, run)| Some(run.heal_s))],
        limit: None,
    };
    let busy = &report.busy;
    let both = |name: &str, value: fn(&Reads) -> f64| {
        let mean = |reads: fn(&Killing) -> Option<Reads>| {
            let all: Vec<f64> = busy.iter().filter_map(|run| Some(value(&reads(run)?))).collect();
            Value::of(all.into_iter())
        };
        Series {
            name: name.to_owned(),
            values: vec![mean(|run| run.before), mean(|run| run.during)],
        }
    };
    let reads = Chart {
        form: Form::Bars,
        y: "seconds that a read for a token takes".into(),
        x: "three of ten nodes killed".into(),
        places: if busy.is_empty() {
            Vec::new()
        } else {
            vec!["before".into(), "while it heals".into()]
        },
        series: vec![
            both("half take at most", |reads| reads.p50_s),
            both("99 of 100", |reads| reads.p99_s),
        ],
        limit: None,
    };
    Section {
        id: "load",
        title: "Healing under load",
        text: "Three of ten nodes die while every node reads a range of at most 8 MiB of a random object for a token, \
               every 0.5 to 1 s. Copies yield to such reads: while one waits, a node copies one object at a time."
            .into(),
        charts: vec![heal, reads],
    }
}

fn gossip(report: &Report) -> Section {
    let runs = &report.quiet;
    let places = texts(&places(runs, |run| run.nodes));
    let times = Chart {
        form: Form::Lines,
        y: "seconds until a node knows".into(),
        x: "nodes".into(),
        places: places.clone(),
        series: vec![
            of_size("half of the nodes", runs, |run| run.p50_s),
            of_size("99 of 100", runs, |run| run.p99_s),
        ],
        limit: None,
    };
    let learned = Chart {
        form: Form::Bars,
        y: "percent that learned of it".into(),
        x: "nodes".into(),
        places,
        series: vec![of_size("learned", runs, |run| run.learned_percent)],
        limit: None,
    };
    Section {
        id: "gossip",
        title: "How fast news travels",
        text: "Ten models are published, one a second, by nodes spread over the swarm. Counted is when each other \
               node learns of each, within 20 s; announcements wait 0.2 s for others before they are sent. The \
               bounds are 1 s for 10 nodes and 3 s for 1,000."
            .into(),
        charts: vec![times, learned],
    }
}

fn traffic(report: &Report) -> Section {
    let runs = &report.quiet;
    let places = texts(&places(runs, |run| run.nodes));
    let messages = Chart {
        form: Form::Lines,
        y: "messages a node sends a second".into(),
        x: "nodes".into(),
        places: places.clone(),
        series: vec![of_size("messages", runs, |run| run.messages_per_s)],
        limit: None,
    };
    let bytes = Chart {
        form: Form::Lines,
        y: "kilobytes a node sends a second".into(),
        x: "nodes".into(),
        places,
        series: vec![
            of_size("mean", runs, |run| run.bytes_per_s / 1e3),
            of_size("the node that sends most", runs, |run| run.most_bytes_per_s / 1e3),
        ],
        limit: None,
    };
    Section {
        id: "traffic",
        title: "What a quiet swarm costs",
        text: "Nothing is published, read or lost for a minute. Messages are gossip messages, every copy that is sent; \
               bytes are those, with gossipsub’s own, its framing and encryption, without TCP and IP. The model of \
               gossip is measured against real swarms and is within 20 % of them."
            .into(),
        charts: vec![messages, bytes],
    }
}
