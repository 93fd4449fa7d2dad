//! The demo, through the binary: a node without the weights generates the same text
//! as a node with all of them, while one of its providers is killed.

use crate::common;
use std::collections::BTreeSet;

/// How long the demo may take on two cores.
const SECONDS_MAX: f64 = 20.0;

#[test]
fn the_fourth_node_writes_what_a_whole_node_writes() {
    let outcome = common::run(["demo", "--json"]).ok().json();
    println!("{outcome}");
    let keys: BTreeSet<&str> = outcome.as_object().unwrap().keys().map(String::as_str).collect();
    let expected = BTreeSet::from([
        "tokens",
        "text",
        "identical_to_local",
        "tok_s",
        "hits",
        "peer_bytes",
        "verified_bytes",
        "rejected_bytes",
        "killed_peer",
        "seconds",
    ]);
    assert_eq!(keys, expected);
    assert_eq!(outcome["identical_to_local"], true);
    assert_eq!(outcome["tokens"], 96);
    assert!(outcome["text"].as_str().unwrap().len() > 100);
    for tier in ["vram", "ram", "disk", "peer"] {
        assert!(outcome["hits"][tier].as_u64().unwrap() > 0, "no hit in {tier}");
    }
    let peers = outcome["peer_bytes"].as_object().unwrap();
    let sum: u64 = peers.values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(sum, outcome["verified_bytes"].as_u64().unwrap());
    assert_eq!(outcome["rejected_bytes"], 0);
    assert!(peers.contains_key(outcome["killed_peer"].as_str().unwrap()));
    assert_eq!(peers.len(), 3, "every seeder has sent something");
    assert!(outcome["seconds"].as_f64().unwrap() < SECONDS_MAX);
}

#[test]
fn a_demo_too_short_or_too_long_is_refused() {
    common::run(["demo", "-n", "2"]).fails(&["-n 2", "at least 3"]);
    common::run(["demo", "-n", "1000"]).fails(&["-n 1000", "at most"]);
}

#[cfg(unix)]
#[test]
fn a_demo_told_to_end_takes_its_nodes_and_files_along() {
    let dir = tempfile::tempdir().unwrap();
    let mut demo = common::command();
    demo.args(["demo", "--json"]).env("TMPDIR", dir.path()).stdout(std::process::Stdio::null());
    let mut child = demo.spawn().unwrap();
    // The process ids in the control files of running nodes, anywhere in the directory.
    let running = || -> Vec<u64> {
        let files = std::fs::read_dir(dir.path()).unwrap().flatten().flat_map(|made| {
            ["seeder-1", "seeder-2"].map(|name| made.path().join(name).join("control.json"))
        });
        let read = |path| serde_json::from_slice(&std::fs::read(path).ok()?).ok();
        let control: Vec<serde_json::Value> = files.filter_map(read).collect();
        control.iter().filter_map(|control| control["pid"].as_u64()).collect()
    };
    while running().len() < 2 {
        assert!(child.try_wait().unwrap().is_none(), "it ended too soon");
        std::thread::yield_now();
    }
    let nodes = running();
    let kill = |signal: &str, pid: u64| {
        let args = [signal.to_owned(), pid.to_string()];
        std::process::Command::new("kill").args(args).output().unwrap().status.success()
    };
    assert!(kill("-TERM", child.id().into()));
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(!nodes.iter().any(|pid| kill("-0", *pid)), "a node goes on");
}
