//! What a node says of addresses that lead nowhere, of places where it cannot listen, and of another
//! node with its identity.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::Value;

use crate::common::{Node, PATIENCE, run};

/// A node on loopback whose standard error goes to a file.
fn join(data: &Path, bootstrap: &[&str]) -> (Node, PathBuf) {
    let log = data.with_extension("log");
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec \"$@\" 2>\"$LOG\"", "sh", env!("CARGO_BIN_EXE_doppler-node")]);
    shell.args(["join", "--json", "--no-mdns", "--swarm", "meeting", "--backend", "cpu"]);
    shell.args(["--listen", "/ip4/127.0.0.1/tcp/0"]).arg("--data").arg(data);
    for address in bootstrap {
        shell.args(["--bootstrap", address]);
    }
    shell.env("LOG", &log).env_remove("DOPPLER_DATA").env_remove("DOPPLER_LOG");
    (Node::spawn(shell, data), log)
}

fn status(node: &Node) -> Value {
    node.ask(&["status", "--json"]).ok().json()
}

fn until(what: &str, node: &Node, is_so: impl Fn(&Value) -> bool) -> Value {
    let started = Instant::now();
    loop {
        let status = status(node);
        if is_so(&status) {
            return status;
        }
        assert!(started.elapsed() < 2 * PATIENCE, "waited in vain: {what}; {status}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

#[test]
fn an_address_that_cannot_lead_anywhere_is_told_once_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (there, _) = join(&dir.path().join("there"), &[]);
    let port = there.address.split('/').nth(4).unwrap();
    let nobody = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp";
    let wrong = format!("/ip4/127.0.0.1/tcp/{port}/p2p/{nobody}");
    let (alone, name) = (format!("/p2p/{nobody}"), "/dns4/nowhere.invalid/tcp/4001");
    let names = "/dnsaddr/nowhere.invalid";
    let bootstrap = [wrong.as_str(), name, names, alone.as_str()];
    let (node, log) = join(&dir.path().join("node"), &bootstrap);
    let told = until("every address has failed", &node, |status| {
        let all = status["bootstrap"].as_array().unwrap();
        all.len() == 4 && all.iter().all(|one| one["state"] == "failed")
    });
    let reason = |index: usize| told["bootstrap"][index]["reason"].as_str().unwrap().to_owned();
    assert!(reason(0).contains(&there.peer_id), "{}", reason(0));
    assert!(reason(3).contains("no place"), "{}", reason(3));
    let peers = node.ask(&["peers"]).ok();
    for (index, address) in bootstrap.iter().enumerate() {
        assert!(peers.err.contains(address) && peers.err.contains(&reason(index)), "{}", peers.err);
    }
    // One warning each, however often it is tried.
    let told = |address: &str| {
        let log = std::fs::read_to_string(&log).unwrap();
        log.lines().filter(|line| line.contains(&format!("bootstrap address {address}: "))).count()
    };
    let started = Instant::now();
    while bootstrap.iter().any(|address| told(address) == 0) {
        assert!(started.elapsed() < PATIENCE, "{}", std::fs::read_to_string(&log).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(bootstrap.iter().all(|address| told(address) == 1));
}

#[test]
fn where_nobody_can_listen_the_system_says_why() {
    let dir = tempfile::tempdir().unwrap();
    // A documentation address, which no machine has.
    for rest in ["tcp/0", "tcp/0/ws", "tcp/4001", "udp/0/quic-v1", "udp/0/webrtc-direct"] {
        let address = format!("/ip4/192.0.2.1/{rest}");
        let data = dir.path().join("data");
        let join = ["join", "--swarm", "x", "--no-mdns", "--listen", &address, "--data"];
        let said = run(join.map(std::ffi::OsStr::new).into_iter().chain([data.as_os_str()]));
        said.fails(&["cannot listen on", &address, "assign requested address"]);
    }
}

#[test]
fn two_nodes_of_one_identity_are_told_and_so_are_their_peers() {
    let dir = tempfile::tempdir().unwrap();
    let (peer, peer_log) = join(&dir.path().join("peer"), &[]);
    let (first, first_log) = join(&dir.path().join("first"), &[&peer.address]);
    let copy = dir.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    std::fs::copy(first.data.join("identity.key"), copy.join("identity.key")).unwrap();
    let (second, second_log) = join(&copy, &[&peer.address]);
    assert_eq!(first.peer_id, second.peer_id);
    let warned = |log: &Path| {
        let log = std::fs::read_to_string(log).unwrap();
        log.contains("identity") && log.contains(&first.peer_id) && log.contains("identity.key")
    };
    for (name, node, log) in [
        ("peer", &peer, &peer_log),
        ("first", &first, &first_log),
        ("second", &second, &second_log),
    ] {
        let is_told = |status: &Value| status["twins"].as_array().is_some_and(|t| !t.is_empty());
        until(&format!("the {name} knows"), node, is_told);
        assert!(warned(log), "{name}: {}", std::fs::read_to_string(log).unwrap());
    }
    // A node that starts again is one node.
    let (other, _) = join(&dir.path().join("other"), &[&peer.address]);
    let id = other.peer_id.clone();
    drop(other);
    let (again, _) = join(&dir.path().join("other"), &[&peer.address]);
    assert_eq!(again.peer_id, id);
    until("it is back", &peer, |status| status["peers"] == 2);
    assert!(!std::fs::read_to_string(&peer_log).unwrap().contains(&format!("identity {id}")));
}
