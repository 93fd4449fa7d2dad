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
