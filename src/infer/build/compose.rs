//! Composes a kernel's text from its file and the files it includes (build.rs lists the
//! directives).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::formats;

/// What `//!needs coopmat f16` puts before the text.
const COOPERATIVE_ENABLE: &str =
    "enable f16;\nenable wgpu_int16;\nenable wgpu_cooperative_matrix;\n";

/// One kernel's text.
#[derive(Default)]
pub struct Composed {
    pub name: String,
    pub source: String,
    pub subgroups: bool,
    pub cooperative: bool,
    /// Where its structs are declared.
    pub structs: BTreeMap<String, String>,
    /// Files and sections included so far.
    seen: BTreeSet<String>,
}

/// A placeholder, with its braces, and what it stands for in one kernel.
type Picked = Vec<(String, String)>;

/// Each kernel that a file makes.
pub fn compose_all(root: &Path, file: &Path) -> Vec<Composed> {
    let text = fs::read_to_string(file).unwrap();
    let stem = file.file_stem().unwrap().to_str().unwrap();
    let mut kernels: Vec<(String, Picked)> = vec![(stem.to_owned(), Vec::new())];
    for line in text.lines().filter_map(|line| line.strip_prefix("//!for ")) {
        let (name, choices) = choices(line);
        kernels = kernels
            .iter()
            .flat_map(|(kernel, picked)| {
                choices.iter().map(move |choice| {
                    let (choice, kernel) = match choice.strip_prefix('-') {
                        Some(choice) => (choice, kernel.clone()),
                        None => (choice.as_str(), format!("{kernel}_{choice}")),
                    };
                    let mut picked = picked.clone();
                    picked.push((format!("{{{name}}}"), choice.to_owned()));
                    (kernel, picked)
                })
            })
            .collect();
    }
    kernels
        .into_iter()
        .map(|(name, picked)| {
            let mut composed = Composed { name, ..Composed::default() };
            if text.lines().any(|line| line == "//!needs coopmat f16") {
                composed.cooperative = true;
                composed.source.push_str(COOPERATIVE_ENABLE);
            }
            composed.append(root, &format!("{stem}.wgsl"), &text, &picked);
            composed
        })
        .collect()
}

/// What a `//!for` line names, and its choices.
fn choices(line: &str) -> (&str, Vec<String>) {
    match (line.trim(), line.split_once(" in ")) {
        ("format", _) => ("format", formats::each()),
        ("quantised", _) => ("quantised", formats::quantised()),
        ("formats", _) => ("formats", formats::each_and_together()),
        ("mixture", _) => ("mixture", formats::each_and_pairs()),
        (_, Some((name, choices))) => {
            (name, choices.split_whitespace().map(str::to_owned).collect())
        }
        (line, None) => panic!("//!for {line}: of what? Write //!for NAME in A B C"),
    }
}

impl Composed {
    /// Appends the text of `file`, with each include line replaced by what it includes.
    fn append(&mut self, root: &Path, file: &str, text: &str, picked: &Picked) {
        let fill =
            |of: &str| picked.iter().fold(of.to_owned(), |of, (from, to)| of.replace(from, to));
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            if let Some(repeat) = line.strip_prefix("//!repeat ") {
                for line in repeated(&fill(repeat), &mut lines, &fill) {
                    self.source.push_str(&line);
                    self.source.push('\n');
                }
                continue;
            }
            let declared = line.strip_prefix("struct ").and_then(|rest| rest.split_once(' '));
            if let Some((name, _)) = declared {
                self.structs.insert(name.to_owned(), file.to_owned());
            }
            let Some(directive) = line.strip_prefix("//!") else {
                self.source.push_str(&fill(line));
                self.source.push('\n');
                continue;
            };
            match directive.trim().split_once(' ') {
                Some(("needs", "subgroups")) => self.subgroups = true,
                Some(("needs", "coopmat f16")) => self.cooperative = true,
                Some(("include", path)) => self.include(root, &fill(path), picked),
                Some(("pieces", choice)) => {
                    let (sections, text) = formats::pieces(&fill(choice));
                    sections.iter().for_each(|path| self.include(root, path, picked));
                    self.source.push_str(&text);
                }
                Some(("sums", choice)) => {
                    let (each, text) = formats::sums(&fill(choice));
                    self.include(root, "shared/rows_sums.wgsl", picked);
                    let of = fs::read_to_string(root.join("shared/rows_sums_of.wgsl")).unwrap();
                    for format in each {
                        let mut picked = picked.clone();
                        picked.push(("{each}".to_owned(), format.to_owned()));
                        self.append(root, "shared/rows_sums_of.wgsl", &of, &picked);
                    }
                    self.source.push_str(&text);
                }
                Some(("for", _)) => {}
                _ => panic!("{file}: {line} is no directive"),
            }
        }
    }

    /// Appends a file, or the section of it that `#` names, unless it was included already.
    fn include(&mut self, root: &Path, path: &str, picked: &Picked) {
        if !self.seen.insert(path.to_owned()) {
            return;
        }
        let (file, section) = path.split_once('#').unzip();
        let file = file.unwrap_or(path);
        let text = fs::read_to_string(root.join(file))
            .unwrap_or_else(|e| panic!("{}: kernels/{file}: {e}", self.name));
        let text = match section {
            None => text,
            Some(name) => section_of(&text, name)
                .unwrap_or_else(|| panic!("kernels/{file} has no `//!section {name}`")),
        };
        self.append(root, file, &text, picked);
    }
}

/// The lines between `//!section NAME` and the next such line.
fn section_of(text: &str, name: &str) -> Option<String> {
    let mut lines = text.lines();
    lines.find(|line| line.strip_prefix("//!section ").is_some_and(|of| of.trim() == name))?;
    let lines = lines.take_while(|line| !line.starts_with("//!section "));
    Some(lines.flat_map(|line| [line, "\n"]).collect())
}

/// The lines up to `//!end`, for each number that `NAME in COUNT` or `NAME in FIRST..END` says, in
/// place of `{NAME}`. Repetitions may contain others.
fn repeated(
    repeat: &str,
    lines: &mut std::str::Lines<'_>,
    fill: &impl Fn(&str) -> String,
) -> Vec<String> {
    let (name, range) = repeat.split_once(" in ").expect("//!repeat NAME in COUNT");
    let number = |text: &str| text.trim().parse::<usize>().expect("a number of repetitions");
    let (first, end) = range.split_once("..").unwrap_or(("0", range));
    let (first, end) = (number(first), number(end));
    let mut body = Vec::new();
    loop {
        let line = lines.next().expect("an //!end for each //!repeat");
        if line == "//!end" {
            break;
        }
        match line.strip_prefix("//!repeat ") {
            Some(inner) => body.extend(repeated(&fill(inner), lines, fill)),
            None => body.push(fill(line)),
        }
    }
    let name = format!("{{{name}}}");
    let each = (first..end).flat_map(|n| body.iter().map(move |line| (n, line)));
    each.map(|(n, line)| line.replace(&name, &n.to_string())).collect()
}
