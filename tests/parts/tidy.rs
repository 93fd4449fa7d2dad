//! The rules of the code base that neither the compiler nor Cargo checks: which crates may be used
//! where, how long files and functions may be, that every file says what it owns, that every kernel
//! has a twin.

use std::fs;
use std::path::{Path, PathBuf};

use doppler_testing::root;

/// Each room's crate and the rooms that it may depend on (ARCHITECTURE.md, "Doors"). Cargo enforces
/// what the manifests say; this checks the manifests.
const DOORS: [(&str, &[&str]); 7] = [
    ("src/testing", &[]),
    ("src/ids", &[]),
    ("src/store", &["ids"]),
    ("src/swarm", &["ids"]),
    ("src/mesh", &["ids", "store", "swarm"]),
    ("src/infer", &["store"]),
    ("src/node", &["infer", "mesh", "store", "swarm"]),
];

/// External crates, with the only directories that may use them.
const CRATE_HOMES: [(&str, &[&str]); 5] = [
    ("wgpu::", &["src/infer/gpu"]),
    ("libp2p", &["src/swarm"]),
    ("sled::", &["src/store"]),
    ("anyhow", &["src/node"]),
    ("axum", &["src/node"]),
];

const LINES_MAX: usize = 900;
const LINES_MEDIAN_MAX: usize = 260;
/// A longer function says why on a line above it that begins with `// Long:`.
const FUNCTION_LINES_MAX: usize = 80;

fn walk(dir: &Path, extension: &str, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target" && name != "node_modules") {
                walk(&path, extension, files);
            }
        } else if path.extension().is_some_and(|e| e == extension) {
            files.push(path);
        }
    }
}

/// Paths relative to the repository and their text, in order.
fn sources(dirs: &[&str], extension: &str) -> Vec<(String, String)> {
    let root = root();
    let mut files = Vec::new();
    for dir in dirs {
        let path = root.join(dir);
        if path.is_file() { files.push(path) } else { walk(&path, extension, &mut files) }
    }
    files.sort();
    files
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
            (name, fs::read_to_string(&path).unwrap())
        })
        .collect()
}

fn rust() -> Vec<(String, String)> {
    let files = sources(&["src", "simnet", "tests", "benches", "fuzz"], "rs");
    assert!(files.len() > 30, "the walk found only {} files", files.len());
    files
}

/// The numbered lines of code without comments, to search for names.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"))
}

/// The rooms that a manifest's ordinary dependencies name.
fn rooms(manifest: &str) -> Vec<String> {
    let mut rooms = Vec::new();
    let mut dependencies = false;
    for line in manifest.lines() {
        if line.starts_with('[') {
            dependencies = line.ends_with("dependencies]") && !line.contains("dev-");
        } else if dependencies && let Some(rest) = line.strip_prefix("doppler-") {
            rooms.push(rest.split(['.', ' ']).next().unwrap_or_default().to_owned());
        }
    }
    rooms
}

#[test]
fn rooms_know_only_whom_they_may() {
    for (room, may) in DOORS {
        let manifest = fs::read_to_string(root().join(room).join("Cargo.toml")).unwrap();
        for known in rooms(&manifest) {
            assert!(may.contains(&known.as_str()), "{room}/Cargo.toml names doppler-{known}");
        }
    }
    let crates = fs::read_dir(root().join("src")).unwrap().flatten();
    let crates = crates.filter(|entry| entry.path().join("Cargo.toml").is_file()).count();
    assert_eq!(crates, DOORS.len(), "a room in src/ has no entry in DOORS");
}

#[test]
fn crates_stay_behind_their_doors() {
    let mut wrong = Vec::new();
    for (file, text) in rust().into_iter().filter(|(file, _)| file.starts_with("src/")) {
        for (krate, homes) in CRATE_HOMES {
            if homes.iter().any(|home| file.starts_with(home)) {
                continue;
            }
            for (number, line) in code_lines(&text) {
                if line.contains(krate) {
                    wrong.push(format!("{file}:{} names {krate}", number + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_store_knows_no_wall_clock() {
    // The order of use is counted and deadlines are monotonic, so a wrong clock does no harm.
    for (file, text) in rust().into_iter().filter(|(file, _)| file.starts_with("src/store")) {
        for (number, line) in code_lines(&text) {
            assert!(!line.contains("SystemTime"), "{file}:{} names SystemTime", number + 1);
        }
    }
}

#[test]
fn files_are_short() {
    let mut lengths: Vec<(usize, String)> =
        rust().into_iter().map(|(file, text)| (text.lines().count(), file)).collect();
    lengths.sort();
    let (longest, file) = lengths.last().unwrap();
    assert!(*longest <= LINES_MAX, "{file} has {longest} lines");
    let median = lengths[lengths.len() / 2].0;
    assert!(median <= LINES_MEDIAN_MAX, "the median file has {median} lines");
}

/// The functions of a file formatted by rustfmt: name, first line (counted from 1), number of lines,
/// and whether a `// Long:` line is right above.
fn functions(text: &str) -> Vec<(String, usize, usize, bool)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let words: Vec<&str> = code.split(' ').collect();
        let Some(name) = words.iter().position(|word| *word == "fn").and_then(|i| words.get(i + 1))
        else {
            continue;
        };
        if code.starts_with("//") {
            continue;
        }
        let indent = &line[..line.len() - code.len()];
        let end = format!("{indent}}}");
        let Some(body) = lines[at..].iter().position(|line| line.ends_with(['{', ';', '}'])) else {
            continue;
        };
        if !lines[at + body].ends_with('{') {
            continue;
        }
        let Some(length) = lines[at..].iter().position(|line| *line == end) else { continue };
        let above = lines[..at].iter().rev().find(|line| {
            let line = line.trim_start();
            !line.starts_with("#[") && !line.starts_with("///")
        });
        let excused = above.is_some_and(|line| line.trim_start().starts_with("// Long: "));
        let name = name.split(['(', '<']).next().unwrap_or_default().to_owned();
        found.push((name, at + 1, length + 1, excused));
    }
    found
}

#[test]
fn functions_are_short_or_say_why_not() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (file, text) in rust() {
        for (name, line, length, excused) in functions(&text) {
            seen += 1;
            if length > FUNCTION_LINES_MAX && !excused {
                wrong.push(format!("{file}:{line} {name} has {length} lines"));
            }
        }
    }
    assert!(seen > 2000, "only {seen} functions were found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_file_says_what_it_owns() {
    for (file, text) in rust() {
        let first = text.lines().next().unwrap_or_default();
        assert!(first.starts_with("//!"), "{file} does not open with `//!`");
    }
    for (file, text) in sources(&["kernels"], "wgsl") {
        let first = text.lines().next().unwrap_or_default();
        assert!(first.starts_with("//"), "{file} does not open with a comment");
    }
}

/// The kernels' names.
fn kernels() -> Vec<String> {
    let kernels: Vec<_> = fs::read_dir(root().join("kernels"))
        .unwrap()
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "wgsl"))
        .map(|entry| entry.path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    assert!(!kernels.is_empty());
    kernels
}

/// Whether a file is a kernel's twin: it defines a function of the kernel's name. A tiled or
/// cooperative-matrix form of a kernel may share that kernel's twin.
fn is_twin(kernel: &str, text: &str) -> bool {
    let defines = |line: &str| {
        let rest = line.strip_prefix("pub fn ").and_then(|rest| rest.strip_prefix(kernel));
        rest.is_some_and(|rest| rest.starts_with(['(', '<']))
    };
    let form = ["_tile", "_coop"].into_iter().find_map(|form| kernel.strip_suffix(form));
    let shares = |line: &str| {
        form.is_some_and(|of| line == format!("pub use super::{of}::{of} as {kernel};"))
    };
    code_lines(text).any(|(_, line)| defines(line) || shares(line))
}

#[test]
fn every_kernel_has_a_cpu_twin() {
    for kernel in kernels() {
        let twin = root().join(format!("src/infer/cpu/{kernel}.rs"));
        let text = fs::read_to_string(&twin).unwrap_or_default();
        let at = twin.display();
        assert!(is_twin(&kernel, &text), "kernels/{kernel}.wgsl has no twin of its name in {at}");
    }
    assert!(!is_twin("decode_norm", "pub use super::rms_norm::rms_norm as decode_norm;"));
    assert!(!is_twin("decode_norm", "// pub fn decode_norm(\npub fn decode_norms() {}"));
    assert!(!is_twin("linear_tile", "pub use super::gated::gated as linear_tile;"));
}

#[test]
fn every_decode_kernel_is_run_alone_beside_its_twin() {
    let tests = sources(&["src/infer/gpu/tests"], "rs");
    for kernel in kernels().iter().filter(|kernel| kernel.starts_with("decode_")) {
        let (run, twin) = (format!("\"{kernel}"), format!("cpu::{kernel}::"));
        let compares = |text: &String| text.contains(&run) && text.contains(&twin);
        assert!(tests.iter().any(|(_, text)| compares(text)), "no test runs {kernel} alone");
    }
}

/// What the mesh's decisions may not name: runtimes, clocks, locks, and what lies behind the swarm.
const IMPURE: [&str; 6] =
    ["tokio", "Instant::now", "SystemTime", "Mutex", "RwLock", "doppler_swarm"];

#[test]
fn the_mesh_core_is_pure() {
    let files = sources(&["src/mesh/core"], "rs");
    assert!(files.len() > 10, "only {} files were found", files.len());
    let tests = |file: &str| file.ends_with("tests.rs") || file.contains("/tests/");
    for (file, text) in files.into_iter().filter(|(file, _)| !tests(file)) {
        // Tests begin their virtual time somewhere.
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        for (number, line) in code_lines(code) {
            for name in IMPURE {
                assert!(!line.contains(name), "{file}:{} names {name}", number + 1);
            }
        }
    }
}

#[test]
fn every_limit_of_the_mesh_is_written_down() {
    let documented = fs::read_to_string(root().join("docs/limits.md")).unwrap();
    let file = |name| fs::read_to_string(root().join(name)).unwrap();
    let options = file("src/mesh/core/limits.rs") + &file("src/mesh/options.rs");
    let mut seen = 0;
    for (number, line) in code_lines(&options) {
        let Some((_, rest)) = line.split_once("const ") else { continue };
        let Some((name, _)) = rest.split_once(':') else { continue };
        if ["SHARD_PROTOCOL", "PROTOCOL_VERSION"].contains(&name) {
            continue;
        }
        seen += 1;
        let line = number + 1;
        assert!(documented.contains(&format!("`{name}`")), "options.rs:{line} {name} is not there");
    }
    assert!(seen > 40, "only {seen} constants were found");
}
