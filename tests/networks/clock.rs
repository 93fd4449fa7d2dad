//! Nodes whose wall clocks are hours apart and jump: they meet, announce, accept each other's
//! leases, fetch, and lose nothing. This proves that a node's wall clock only orders its own
//! messages.
//!
//! The clocks are set by libfaketime (Debian's `faketime`), which is preloaded into the node. Without
//! it the test says so and passes, unless `DOPPLER_REQUIRE_FAKETIME` is set.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::{Node, PATIENCE, command, model};
use serde_json::Value;

/// Seconds; longer than the lease of a node's holdings (35 s).
const LEASE: f64 = 40.0;

fn faketime() -> Option<PathBuf> {
    let places =
        ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"];
    let places = places.map(|dir| Path::new(dir).join("faketime/libfaketime.so.1"));
    let found = places.into_iter().find(|place| place.is_file());
    if found.is_none() {
        assert!(std::env::var_os("DOPPLER_REQUIRE_FAKETIME").is_none(), "no libfaketime");
        eprintln!("skipped: libfaketime is not installed (Debian: faketime)");
    }
    found
}

/// A wall clock that is set through a file.
struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    fn new(library: &Path, dir: &Path, name: &str, hours: i64) -> Self {
        let clock = Self { library: library.into(), file: dir.join(name) };
        clock.set(hours);
        clock
    }

    fn set(&self, hours: i64) {
        // Replace the file atomically, so that nobody reads half of it.
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{:+}\n", hours * 3600)).unwrap();
        fs::rename(new, &self.file).unwrap();
    }

    fn start(&self, data: &Path, bootstrap: &[&Node]) -> Node {
        let mut command = command();
        command.args(["join", "--json", "--no-mdns", "--swarm", "clocks", "--backend", "cpu"]);
        command.args(["--listen", "/ip4/127.0.0.1/tcp/0", "--listen"]);
        command.arg("/ip4/127.0.0.1/udp/0/quic-v1").arg("--data").arg(data);
        for node in bootstrap {
            command.args(["--bootstrap", &node.address]);
        }
        command.env("LD_PRELOAD", &self.library).env("FAKETIME_TIMESTAMP_FILE", &self.file);
        // Read the file at each call, and leave the monotonic clock alone.
        command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        command.env("DONT_FAKE_MONOTONIC", "1");
        Node::spawn(command, data)
    }
}

fn ask(node: &Node, args: &[&str]) -> Value {
    node.ask(&[args, &["--json"]].concat()).ok().json()
}

/// How many objects `node` believes `peer` to hold; 0 if the peer is not connected.
fn held(node: &Node, peer: &Node) -> u64 {
    let peers = ask(node, &["peers"]);
    let row = peers.as_array().unwrap().iter().find(|row| row["id"] == peer.peer_id.as_str());
    row.map_or(0, |row| row["shards_held"].as_u64().unwrap())
}

fn until(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < 2 * PATIENCE, "waited for {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn publish(node: &Node, shards: &str) {
    ask(node, &["publish", model().to_str().unwrap(), "--shards", shards]);
}

#[test]
fn nodes_hours_apart_hold_their_leases_and_lose_nothing() {
    let Some(library) = faketime() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let clock = |name: &str, hours| Clock::new(&library, dir.path(), name, hours);
    // Check that the clock is really ahead.
    let ahead = clock("ahead.clock", 1);
    let shown = std::process::Command::new("date")
        .arg("+%s")
        .env("LD_PRELOAD", &library)
        .env("FAKETIME_TIMESTAMP_FILE", &ahead.file)
        .output()
        .unwrap();
    let shown: u64 = String::from_utf8(shown.stdout).unwrap().trim().parse().unwrap();
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!(shown.abs_diff(now + 3600) < 60, "{shown} at {now}");

    let right = clock("right.clock", 0).start(&path("right"), &[]);
    publish(&right, "0-5");
    let jumping = ahead.start(&path("jumping"), &[&right]);
    publish(&jumping, "5-10");
    let mut behind = clock("behind.clock", -1).start(&path("behind"), &[&right, &jumping]);
    behind.event("model");
    let fetched = ask(&behind, &["pin", "tiny-mixtral-q4_k_m", "--fetch"]);
    assert_eq!(fetched["missing"], 0, "{fetched}");

    // Two hours back in one step, then wait longer than any lease: nothing changes.
    ahead.set(-1);
    let uptime = |node: &Node| ask(node, &["status"])["uptime_s"].as_f64().unwrap();
    let jumped = uptime(&behind);
    until("a lease's time", || uptime(&behind) > jumped + LEASE);
    let nodes = [&right, &jumping, &behind];
    for (node, peer) in nodes.iter().flat_map(|node| nodes.map(|peer| (node, peer))) {
        if node.peer_id != peer.peer_id {
            until("a lease that was renewed", || held(node, peer) > 0);
        }
    }

    // Another hour back, across a restart: its holdings are accepted again once its old lease, which
    // had higher sequence numbers, has expired.
    let peer_id = jumping.peer_id.clone();
    drop(jumping);
    ahead.set(-3);
    let jumping = ahead.start(&path("jumping"), &[&right]);
    assert_eq!(jumping.peer_id, peer_id);
    until("the lease after the restart", || held(&right, &jumping) > 0);

    // Only these two are left. A new node whose clock is an hour ahead gets everything.
    drop(right);
    let newcomer = clock("newcomer.clock", 1).start(&path("newcomer"), &[&behind, &jumping]);
    until("the model", || ask(&newcomer, &["ls"]).as_array().is_some_and(|all| !all.is_empty()));
    let fetched = ask(&newcomer, &["pin", "tiny-mixtral-q4_k_m", "--fetch"]);
    assert_eq!(fetched["missing"], 0, "{fetched}");
    for node in [&behind, &jumping, &newcomer] {
        node.ask(&["fsck"]).ok();
    }
}
