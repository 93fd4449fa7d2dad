//! Two nodes in namespaces of their own, connected by a link that is dropped and restored.
//! Needs root and iproute2.

use std::process::{Output, Stdio};
use std::time::Instant;

use crate::common::netns::Namespace;
use crate::common::{Node, PATIENCE, model};
use serde_json::Value;

const NAME: &str = "tiny-mixtral-q4_k_m";
const LEFT: &str = "10.213.78.1";
const RIGHT: &str = "10.213.78.2";

fn ask(namespace: &Namespace, node: &Node, args: &[&str]) -> Output {
    namespace.command().args(args).arg("--data").arg(&node.data).output().unwrap()
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_dropped_link_is_an_error_and_a_returned_one_is_used() {
    let (Some(left), Some(right)) = (Namespace::create("left"), Namespace::create("right")) else {
        return;
    };
    left.ip(&format!("link add near type veth peer name far netns {}", right.name()));
    left.ip(&format!("addr add {LEFT}/24 dev near"));
    right.ip(&format!("addr add {RIGHT}/24 dev far"));
    left.ip("link set near up");
    right.ip("link set far up");

    let dir = tempfile::tempdir().unwrap();
    let holder = left.join(&dir.path().join("a"), LEFT, &["--no-mdns"]);
    let model = model();
    let published = ask(&left, &holder, &["publish", model.to_str().unwrap()]);
    assert!(published.status.success(), "{}", told(&published));
    let extra = ["--no-mdns", "--find-timeout", "3", "--download-limit", "1MB/s"];
    let extra = [&extra[..], &["--bootstrap", &holder.address]].concat();
    let mut node = right.join(&dir.path().join("b"), RIGHT, &extra);
    assert_eq!(node.event("model")["name"], NAME);

    // The link is cut in the middle of a transfer that takes about nine seconds.
    let mut fetching = right.command();
    fetching.args(["pin", NAME, "--fetch"]).arg("--data").arg(&node.data);
    let fetching = fetching.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while verified_bytes(&right, &node) < 1_000_000 {
        assert!(started.elapsed() < PATIENCE, "nothing comes");
    }
    right.ip("link set far down");
    let cut = fetching.wait_with_output().unwrap();
    let error = told(&cut);
    assert!(!cut.status.success(), "there was nobody to fetch from");
    assert!(error.starts_with("error: ") && error.lines().count() == 1, "{error}");
    assert!(error.contains("shard"), "{error}");
    let before = verified_bytes(&right, &node);

    right.ip("link set far up");
    let fetched = ask(&right, &node, &["pin", NAME, "--fetch"]);
    assert!(fetched.status.success(), "{}", told(&fetched));
    let models: Value =
        serde_json::from_slice(&ask(&right, &node, &["ls", "--json"]).stdout).unwrap();
    assert_eq!(models[0]["shards"], models[0]["shards_here"], "{models}");
    // What had been stored is not fetched again.
    let again = verified_bytes(&right, &node) - before;
    let bytes = models[0]["bytes"].as_u64().unwrap();
    assert!(again + 500_000 < bytes, "{again} of {bytes} came after the link did");
}

/// Verified bytes from peers.
fn verified_bytes(namespace: &Namespace, node: &Node) -> u64 {
    let status = ask(namespace, node, &["status", "--json"]);
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    status["traffic"]["verified_bytes"].as_u64().unwrap()
}
