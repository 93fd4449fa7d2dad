//! The documentation: the book lists every page, every link leads somewhere, every command exists, and the
//! README stays short.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use doppler_testing::root;

const README_LINES_MAX: usize = 120;

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The Markdown files of a directory and those below it, by their paths within the repository.
fn pages_in(dir: &str, pages: &mut BTreeSet<String>) {
    for entry in fs::read_dir(root().join(dir)).unwrap().flatten() {
        let path = format!("{dir}/{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            pages_in(&path, pages);
        } else if path.ends_with(".md") {
            pages.insert(path);
        }
    }
}

fn pages() -> BTreeSet<String> {
    let mut pages = BTreeSet::new();
    pages_in("docs", &mut pages);
    assert!(pages.len() > 20, "only {} pages were found", pages.len());
    pages
}

/// A page's text without its code: blocks (indented or fenced) and spans.
fn prose(text: &str) -> String {
    let mut fenced = false;
    let mut prose = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced && !line.starts_with("    ") {
            prose.extend(line.split('`').step_by(2));
            prose.push('\n');
        }
    }
    prose
}

/// Where a page's links lead.
fn links(text: &str) -> Vec<String> {
    let prose = prose(text);
    let after = prose.split("](").skip(1);
    after.filter_map(|rest| Some(rest.split_once(')')?.0.to_owned())).collect()
}

/// A heading as an anchor, as GitHub and mdBook form it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().to_lowercase().trim().replace(' ', "-")
}

fn anchors(text: &str) -> Vec<String> {
    let lines = text.lines().filter(|line| line.starts_with('#'));
    lines.map(|line| anchor(line.trim_start_matches('#'))).collect()
}

/// `docs/internals` and `../limits.md` give `docs/limits.md`.
fn joined(dir: &Path, link: &str) -> PathBuf {
    let mut path = dir.to_owned();
    for part in link.split('/') {
        match part {
            ".." => drop(path.pop()),
            "." | "" => {}
            part => path.push(part),
        }
    }
    path
}

#[test]
fn the_book_lists_every_page_once() {
    let listed: Vec<String> =
        links(&read("docs/SUMMARY.md")).iter().map(|link| format!("docs/{link}")).collect();
    let mut wanted = pages();
    wanted.remove("docs/SUMMARY.md");
    for page in &wanted {
        let count = listed.iter().filter(|one| *one == page).count();
        assert_eq!(count, 1, "docs/SUMMARY.md lists {page} {count} times");
    }
    assert_eq!(listed.len(), wanted.len(), "it lists what does not exist: {listed:?}");
}

#[test]
fn every_link_leads_somewhere() {
    let mut seen = 0;
    let outside = ["README.md", "ARCHITECTURE.md"].map(str::to_owned);
    for page in pages().into_iter().chain(outside) {
        let text = read(&page);
        for link in links(&text) {
            if link.starts_with("https://") {
                continue;
            }
            let (path, fragment) = link.split_once('#').unwrap_or((&link, ""));
            let target = match path {
                "" => PathBuf::from(&page),
                path => joined(Path::new(&page).parent().unwrap(), path),
            };
            seen += 1;
            assert!(root().join(&target).exists(), "{page}: ({link}) leads nowhere");
            if !fragment.is_empty() {
                let known = anchors(&read(target.to_str().unwrap()));
                assert!(known.contains(&fragment.to_owned()), "{page}: ({link}): {known:?}");
            }
        }
    }
    assert!(seen > 60, "only {seen} links were found");
}

/// Each command of docs/commands.md, which is generated, with its options.
fn commands() -> BTreeMap<String, BTreeSet<String>> {
    let mut commands: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut now = String::new();
    for line in read("docs/commands.md").lines() {
        if let Some(command) = line.strip_prefix("## ") {
            now = command.to_owned();
            commands.entry(now.clone()).or_default();
        } else if let Some(option) = line.strip_prefix("- `-") {
            let names = option.split_once('`').unwrap().0;
            let names = format!("-{names}");
            let words = names.split([' ', ',']).filter(|word| word.starts_with('-'));
            commands.get_mut(&now).unwrap().extend(words.map(str::to_owned));
        }
    }
    assert!(commands.len() > 30, "only {} commands were found", commands.len());
    commands
}

/// The command lines that a page's code blocks show, without their comments.
fn shown(text: &str) -> Vec<String> {
    let mut fenced = false;
    let mut lines: Vec<String> = Vec::new();
    let mut goes_on = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            continue;
        }
        if !fenced && !line.starts_with("    ") {
            goes_on = false;
            continue;
        }
        let line = line.trim_start().trim_start_matches("$ ");
        let line = line.split("  #").next().unwrap_or_default().trim_end();
        let part = line.trim_end_matches('\\').trim();
        match lines.last_mut().filter(|_| goes_on) {
            Some(last) => *last = format!("{last} {part}"),
            None => lines.push(part.to_owned()),
        }
        goes_on = line.ends_with('\\');
    }
    let run = "cargo run --release -- ";
    lines
        .into_iter()
        .filter_map(|line| match line.strip_prefix(run) {
            Some(rest) => Some(format!("doppler-node {rest}")),
            None => line.find("doppler-node ").filter(|at| *at == 0).map(|_| line.clone()),
        })
        .collect()
}

#[test]
fn every_command_that_the_pages_show_exists() {
    let commands = commands();
    let global = &commands["doppler-node"];
    let mut seen = 0;
    for page in pages().into_iter().chain(["README.md".to_owned()]) {
        if page == "docs/commands.md" {
            continue;
        }
        for line in shown(&read(&page)) {
            let line = line.split(" | ").next().unwrap_or_default();
            let words: Vec<&str> = line.split(' ').filter(|word| !word.is_empty()).collect();
            let two = words.iter().take(3).copied().collect::<Vec<_>>().join(" ");
            let one = words.iter().take(2).copied().collect::<Vec<_>>().join(" ");
            let Some(options) = commands.get(&two).or_else(|| commands.get(&one)) else {
                // Options of the program itself.
                assert!(words.get(1).is_some_and(|word| word.starts_with("--")), "{page}: {line}");
                continue;
            };
            seen += 1;
            for word in words.iter().filter(|word| word.starts_with('-') && word.len() > 1) {
                let name = word.split('=').next().unwrap_or_default();
                let known = options.contains(name) || global.contains(name) || name == "--help";
                assert!(known, "{page}: {line}: there is no option {name}");
            }
        }
    }
    assert!(seen > 40, "only {seen} commands were found");
}

/// What units and containers start takes the options that they give it.
#[test]
fn every_option_that_is_shipped_exists() {
    let commands = commands();
    let mut seen = 0;
    for file in [
        "compose.yaml",
        "Dockerfile",
        "packaging/systemd/doppler-node.service",
        "packaging/systemd/doppler-node-user.service",
        "packaging/systemd/drain.conf",
    ] {
        let text = read(file);
        let lines = text.lines().map(str::trim).filter(|line| {
            let starts = ["Exec", "--", "join ", "command: publish ", "CMD [\"join\""];
            starts.iter().any(|start| line.starts_with(start))
        });
        for line in lines {
            let words = line.split([' ', '"', ',']).filter(|word| word.starts_with("--"));
            for word in words {
                seen += 1;
                let of = ["join", "publish", "leave"].map(|of| format!("doppler-node {of}"));
                let known = of.iter().any(|of| commands[of].contains(word));
                assert!(known, "{file}: {line}: there is no option {word}");
            }
        }
    }
    assert!(seen > 15, "only {seen} options were found");
}

#[test]
fn the_readme_is_short() {
    let lines = read("README.md").lines().count();
    assert!(lines <= README_LINES_MAX, "README.md has {lines} lines");
}
