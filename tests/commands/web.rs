//! The browser's page: checks that the committed build is what its sources give, and runs the
//! tests of `tests/web/`, which drive the page in Chromium against nodes.
//!
//! They need Node.js, the packages of `web/` (`npm ci`) and Chromium (`DOPPLER_CHROMIUM`, or
//! Debian's path). Without these they say so and pass, unless `DOPPLER_REQUIRE_WEB` is set.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::common::{root, scripted};
use doppler_infer::quant::planes;
use doppler_store::DType;
use doppler_testing::hub::{Behaviour, Hub};

/// The path of Chromium; the error says what is missing.
fn tools() -> Result<PathBuf, String> {
    let node = Command::new("node").arg("--version").output();
    if !node.is_ok_and(|said| said.status.success()) {
        return Err("Node.js is not installed".into());
    }
    if !root().join("web/node_modules/esbuild").is_dir() {
        return Err("the packages of web/ are not installed (npm ci)".into());
    }
    let chromium = std::env::var_os("DOPPLER_CHROMIUM")
        .map_or_else(|| PathBuf::from("/usr/bin/chromium"), PathBuf::from);
    if chromium.is_file() {
        Ok(chromium)
    } else {
        Err(format!("{} is not installed", chromium.display()))
    }
}

/// The path of Chromium. Prints the reason and returns `None` if the test cannot run.
fn chromium() -> Option<PathBuf> {
    match tools() {
        Ok(chromium) => Some(chromium),
        Err(reason) if std::env::var_os("DOPPLER_REQUIRE_WEB").is_some() => panic!("{reason}"),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            None
        }
    }
}

fn say(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}

/// Runs the tests of one file of `tests/web/` whose names match `pattern`.
fn drive(file: &str, pattern: &str) {
    drive_with(file, pattern, &[]);
}

fn drive_with(file: &str, pattern: &str, settings: &[(&str, &str)]) {
    let Some(chromium) = chromium() else { return };
    let mut child = Command::new("node")
        .args(["--test", "--test-concurrency=1", "--test-name-pattern", pattern])
        .arg(root().join("tests/web").join(file))
        .env("DOPPLER_NODE_BIN", env!("CARGO_BIN_EXE_doppler-node"))
        .env("DOPPLER_CHROMIUM", chromium)
        .envs(settings.iter().copied())
        .env_remove("DOPPLER_DATA")
        .env_remove("DOPPLER_LOG")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Told as it comes, so that one that is ended from outside has said how far it was.
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let none = lines.map_while(Result::ok).inspect(|line| println!("{line}"));
    let none = none.fold(false, |none, line| none | line.contains("# pass 0"));
    assert!(child.wait().unwrap().success(), "a test of {file} failed");
    assert!(!none, "no test matches {pattern:?}");
}

fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .flatten()
        .map(|entry| {
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

#[test]
fn the_committed_page_is_what_its_sources_build() {
    if chromium().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let web = root().join("web");
    let output =
        Command::new("node").arg("build.mjs").arg(dir.path()).current_dir(&web).output().unwrap();
    assert!(output.status.success(), "{}", say(&output));
    let (built, committed) = (files(dir.path()), files(&web.join("dist")));
    let names = |files: &[(String, Vec<u8>)]| {
        files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(names(&built), names(&committed));
    for ((name, built), (_, committed)) in built.iter().zip(&committed) {
        assert!(built == committed, "web/dist/{name} is not what web/src builds: npm run build");
    }
    let check = web.join("node_modules/.bin/tsc");
    let output = Command::new(check).arg("--noEmit").current_dir(&web).output().unwrap();
    assert!(output.status.success(), "{}", say(&output));
}

#[test]
fn packages_come_from_the_public_registry_with_permissive_licences() {
    let lock = std::fs::read(root().join("web/package-lock.json")).unwrap();
    let lock: serde_json::Value = serde_json::from_slice(&lock).unwrap();
    let packages = lock["packages"].as_object().unwrap();
    assert!(packages.len() > 20, "{} packages", packages.len());
    for (name, package) in packages {
        if let Some(from) = package["resolved"].as_str() {
            assert!(from.starts_with("https://registry.npmjs.org/"), "{name}: {from}");
        }
        let licence = package["license"].as_str().unwrap_or_default();
        let permissive =
            ["MIT", "Apache-2.0", "ISC", "BSD-3-Clause", "BSD-2-Clause", "0BSD", "WTFPL"];
        // Tools of the tests, which are not part of the page.
        let is_tool = licence == "MPL-2.0" && package["dev"] == true;
        assert!(
            is_tool || permissive.iter().any(|one| licence.contains(one)),
            "{name}: {licence:?}"
        );
    }
}

#[test]
fn pages_hash_as_nodes_do() {
    drive("tree.test.mjs", ".");
}

#[test]
fn pages_say_and_show_what_is_right() {
    drive("words.test.mjs", ".");
}

#[test]
fn pages_repack_tokenize_and_page_as_nodes_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("formats.json");
    std::fs::write(&path, formats().to_string()).unwrap();
    drive_with("parts.test.mjs", ".", &[("DOPPLER_FORMATS", path.to_str().unwrap())]);
}

/// Every weight format as a program describes it, and planes that this node makes of bytes that
/// xorshift (Marsaglia, 2003) makes of a seed: rows that end within a group of blocks, and others.
fn formats() -> serde_json::Value {
    let (mut formats, mut made) = (serde_json::Map::new(), Vec::new());
    for dtype in DType::ALL {
        let planes = planes::of(dtype);
        formats.insert(dtype.file_name().into(), serde_json::to_value(planes).unwrap());
        for (rows, blocks) in [(1, 1), (3, 5), (7, 4), (70, 2)] {
            let (seed, cols) = (rand::random::<u32>().max(1), blocks * dtype.block_len());
            let mut state = seed;
            let stored: Vec<u8> = (0..rows * dtype.row_bytes(cols))
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 17;
                    state ^= state << 5;
                    state as u8
                })
                .collect();
            let bytes = rows * planes.groups(cols) * planes.bytes();
            let mut out = vec![0; bytes.next_multiple_of(16)];
            planes.pack(cols, &stored, &mut out);
            let hex: String = out.iter().map(|byte| format!("{byte:02x}")).collect();
            made.push(serde_json::json!([dtype.file_name(), rows, cols, seed, hex]));
        }
    }
    serde_json::json!({ "formats": formats, "made": made })
}

#[test]
fn a_tab_runs_the_embedded_model_and_pages_its_experts() {
    drive("engine.test.mjs", "empty node");
}

#[test]
fn a_tab_pages_from_its_own_storage_and_from_peers() {
    drive("engine.test.mjs", "after a reload|from peers");
}

#[test]
fn a_tab_that_runs_a_model_repairs_what_it_lost() {
    drive("engine.test.mjs", "damage|removed from the tab");
}

#[test]
fn a_tab_says_what_it_cannot_run_and_why() {
    drive("engine.test.mjs", "without an adapter|refused by name|stops when asked");
}

#[test]
fn a_tab_outlives_its_adapter() {
    drive("engine.test.mjs", "lost in the middle");
}

#[test]
fn browsers_compile_every_portable_kernel() {
    drive("engine.test.mjs", "portable kernel");
}

#[test]
fn a_tab_runs_published_mixtures() {
    drive("engine.test.mjs", "published checkpoint.*moe");
}

#[test]
fn a_tab_runs_published_dense_models() {
    drive("engine.test.mjs", "published checkpoint.*(llama3|window)");
}

/// The page as the node's face. With `DOPPLER_UPDATE_DOCS` the screenshots of the documentation are
/// made anew.
#[test]
fn the_page_talks_to_models_and_shows_and_changes_the_node() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, model) = (dir.path().join("Sorting-Assistant"), dir.path().join("rdrr"));
    scripted::write_for_page(&checkpoint);
    let hub = Hub::start();
    let gguf = root().join("tests/data/gguf/qwen3/model.gguf");
    hub.add("lab/small", &[("small-Q8_0.gguf", gguf.as_path())], 1024);
    hub.add("lab/slow", &[("slow-Q8_0.gguf", gguf.as_path())], 1024);
    hub.behave(Behaviour { slow: Some(("slow-Q8_0.gguf", 1 << 10)), ..Behaviour::default() });
    let pictures = match std::env::var_os("DOPPLER_UPDATE_DOCS") {
        Some(_) => root().join("docs"),
        None => dir.path().join("pictures"),
    };
    let settings = [
        ("DOPPLER_CHECKPOINT", checkpoint.to_str().unwrap()),
        ("DOPPLER_MODEL", model.to_str().unwrap()),
        ("HF_ENDPOINT", &hub.endpoint),
        ("HF_HOME", dir.path().to_str().unwrap()),
        ("DOPPLER_PICTURES", pictures.to_str().unwrap()),
    ];
    drive_with("face.test.mjs", ".", &settings);
}

#[test]
fn a_tab_fetches_proves_and_keeps() {
    drive("page.test.mjs", "64 MiB over|without WebSocket|browser forbids");
}

#[test]
fn a_tab_refuses_wrong_bytes_and_resumes() {
    drive("page.test.mjs", "wrong byte|breaks off|quota");
}

#[test]
fn a_tab_serves_nodes_and_can_be_used() {
    drive("page.test.mjs", "native node|between them|two tabs|keyboard");
}

#[test]
fn a_tab_outlives_a_browser_that_fails_it() {
    drive("faults.test.mjs", ".");
}

#[test]
fn a_tab_proves_a_private_swarms_key_or_learns_nothing() {
    drive("private.test.mjs", ".");
}

#[test]
fn nothing_is_left_of_tabs_that_have_gone() {
    drive("sessions.test.mjs", ".");
}

/// Takes several minutes: `cargo nextest run --release --test commands --run-ignored only`.
#[test]
#[ignore = "a measurement of minutes"]
fn memory_stays_flat_over_two_hundred_tabs() {
    let settings = [("DOPPLER_SESSIONS", "200"), ("DOPPLER_VIA", "websocket")];
    drive_with("sessions.test.mjs", ".", &settings);
}

/// As above, over WebRTC.
#[test]
#[ignore = "a measurement of minutes"]
fn memory_stays_flat_over_two_hundred_tabs_by_webrtc() {
    let settings = [("DOPPLER_SESSIONS", "200"), ("DOPPLER_VIA", "webrtc")];
    drive_with("sessions.test.mjs", ".", &settings);
}
